"""What a callback is: hooks of the training loop, all of which do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustdiff.training.metrics import NonFinite
    from robustdiff.training.run import TrainingRun


class Callback:
    """Does something beside the steps of a run: override what you need.

    Every hook is called on every process, one callback after the other in the order of their list. Only
    ``run.is_main`` prints and writes. Whoever uses the weights, to evaluate them, say, calls ``run.check_finite()``
    first, which is for all processes at the same step, then works in ``with run.averaged():``, and calls
    ``run.restart_clock()`` after what takes long. What a hook draws at random it draws from generators of its own.
    """

    def on_setup(self, run: TrainingRun) -> None:
        """The network is on its device: restore what was saved, or say ``run.stop()``."""

    def on_start(self, run: TrainingRun) -> None:
        """The first step comes next; Ctrl-C and SIGTERM are held back from here on."""

    def on_step(self, run: TrainingRun) -> None:
        """A step was done: ``run.step`` of them are."""

    def on_log(self, run: TrainingRun, record: Mapping[str, Any]) -> None:
        """Every ``log_every`` steps and after the last, before :meth:`on_step`.

        Args:
            run: The run.
            record: step, images, the means ``loss``, ``denoising``, ``equivariance``, ``radius``, ``regularised`` and
                the last ``gradient_norm`` (None where not finite), learning_rate, images_per_second.
        """

    def on_nonfinite(self, run: TrainingRun, found: NonFinite) -> None:
        """A step was not finite; it changed no weight. The run ends next, or goes on if such are skipped."""

    def on_sync(self, run: TrainingRun) -> None:
        """The run is to be saved: what must not be later on the disk than the checkpoint is written down now."""

    def on_checkpoint(self, run: TrainingRun) -> None:
        """Save, or make what is made from what was saved; every ``checkpoint_every`` steps and at the end."""

    def on_end(self, run: TrainingRun) -> None:
        """No step follows and everything is saved; not called if the run ends with an error."""
