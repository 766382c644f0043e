"""Records of a run, sent to accelerate's trackers (tensorboard, wandb ...)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from accelerate.tracking import GeneralTracker

from robustdiff.training.callbacks.base import Callback
from robustdiff.utils.errors import RobustdiffWarning
from robustdiff.utils.signals import WaitOver, ends_with_signals

if TYPE_CHECKING:
    from robustdiff.training.run import TrainingRun


class TrackerCallback(Callback):
    """Sends records to a tracker; one that fails is given up with one warning, and training goes on.

    Args:
        name: Which: the accelerator was made with it, ``log_with``.
        settings: Sent once, JSON-ready.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """See the class."""
        self.name, self.settings, self._given_up = name, settings, False

    def on_setup(self, run: TrainingRun) -> None:
        """Start the tracker."""
        settings = {"settings": json.dumps(dict(self.settings))}
        self._try(lambda: run.accelerator.init_trackers("robustdiff", config=settings))
        known = [one.name if isinstance(one, GeneralTracker) else str(one) for one in run.accelerator.log_with]
        if self.name not in known:
            self._give_up("the accelerator was not made with it, `log_with`")

    def on_log(self, run: TrainingRun, record: Mapping[str, Any]) -> None:
        """Send a record."""
        numbers = {name: value for name, value in record.items() if value is not None}
        self._try(lambda: run.accelerator.log(numbers, step=run.step))

    def on_end(self, run: TrainingRun) -> None:
        """Let the tracker finish."""
        self._try(lambda: [tracker.finish() for tracker in run.accelerator.trackers])
        run.accelerator.trackers = []

    def _try(self, action: Callable[[], object]) -> None:
        if self._given_up:
            return
        try:
            with ends_with_signals():
                action()
        except WaitOver:
            self._give_up("it did not answer before the run was stopped")
        except Exception as error:  # trackers are other people's services: anything may come
            self._give_up(" ".join(str(error).split()) or type(error).__name__)

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            warnings.warn(
                f"`logger` {self.name} failed ({reason}): training goes on without it, metrics.jsonl has everything",
                RobustdiffWarning,
                stacklevel=4,
            )
        self._given_up = True
