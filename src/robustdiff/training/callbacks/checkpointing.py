"""Checkpoints to go on from, exactly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from robustdiff.training.callbacks.base import Callback
from robustdiff.training.checkpoint import load_checkpoint, save_checkpoint
from robustdiff.utils.errors import UsageError

if TYPE_CHECKING:
    from robustdiff.training.run import TrainingRun


class CheckpointCallback(Callback):
    """Saves everything that changes, and goes on from a checkpoint as if nothing had come between.

    Args:
        folder: Where checkpoints lie; made if missing.
        keep: How many are kept, >= 1.
        resume: One to go on from, as :func:`robustdiff.training.checkpoint.find_checkpoint` finds it. A loader of your
            own then begins anew; image sets go on where they were.
    """

    def __init__(self, folder: str | Path, keep: int = 2, resume: Path | None = None) -> None:
        """See the class."""
        if keep < 1:
            raise ValueError(f"CheckpointCallback needs keep >= 1, got {keep}")
        self.folder, self.keep, self.resume = Path(folder), keep, resume

    def on_setup(self, run: TrainingRun) -> None:
        """Restore.

        Raises:
            UsageError: If the checkpoint is damaged, or of another network, seed or number of images per step, or
                later than the last step.
        """
        if self.resume is None:
            return
        saved = load_checkpoint(self.resume, run.training_state())
        run.metrics.restore(saved.get("metrics"))
        if not isinstance(saved.get("images"), int):
            raise UsageError(f"{self.resume} is damaged (state.json: images): name another checkpoint")
        for name, now in _rules(run).items():
            if saved.get(name, now) != now:  # earlier checkpoints do not tell
                what = name.replace("_", " ")
                raise UsageError(
                    f"{self.resume} is of a run with {what} {saved[name]!r:.40}, not {now}: keep it the same"
                )
        if saved["step"] > run.options.steps:
            raise UsageError(f"{self.resume} is later than the last step, {run.options.steps}: give more `steps`")
        run.step, run.images = saved["step"], saved["images"]
        run.say(f"going on from {self.resume}: step {run.step} of {run.options.steps}")
        _follow_schedule(run)

    def on_checkpoint(self, run: TrainingRun) -> None:
        """Save."""
        if run.is_main:
            counters = {"images": run.images, "metrics": run.metrics.state(), **_rules(run)}
            # In a row of bad steps nothing is deleted: the checkpoint before it may be the one to go back to.
            keep = sys.maxsize if run.metrics.streak else self.keep
            save_checkpoint(self.folder, run.step, run.training_state(), counters, keep)


def _follow_schedule(run: TrainingRun) -> None:
    """The learning rate as if the run had been of this length from its start, which the checkpoint may not know."""
    schedule = run.lr_schedule
    rules = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [base * rule(schedule.last_epoch) for base, rule in rules]
    before = schedule.get_last_lr()
    if rates != before:
        schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        run.say(
            f"learning rate: {rates[0]:.3g} from here, where the checkpoint has {before[0]:.3g}: "
            f"{run.options.lr_scheduler} over all {run.options.steps} steps"
        )


def _rules(run: TrainingRun) -> dict[str, int]:
    """What says which images come next, and may not change on the way."""
    options = run.options
    batch = options.batch_size * options.gradient_accumulation_steps * run.accelerator.num_processes
    return {"seed": int(options.seed), "images_per_step": int(batch)}
