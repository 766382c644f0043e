"""What a run from a configuration does before its first step: the plan, and the output folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from robustdiff.training.callbacks.base import Callback
from robustdiff.training.loader import Batches

if TYPE_CHECKING:
    from robustdiff.training.run import TrainingRun


class PlanCallback(Callback):
    """Prints the plan with a measured estimate.

    Args:
        batches: For the passes that are timed.
        text: The plan, given the seconds that a step takes.
        stop: End there, before anything is written.
    """

    def __init__(self, batches: Batches, text: Callable[[float], str], stop: bool = False) -> None:
        """See the class."""
        self.batches, self.text, self.stop = batches, text, stop

    def on_setup(self, run: TrainingRun) -> None:
        """Time two passes, which change no weight, and print."""
        device = run.accelerator.device
        for _ in range(2):
            started = time.perf_counter()
            batch = self.batches(range(run.options.batch_size))
            run.accelerator.backward(run.loss_of(batch).total.mean())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
        run.optimizer.zero_grad()
        seconds *= run.options.gradient_accumulation_steps
        run.seconds_per_step = run.accelerator.gather(torch.tensor([seconds], device=device)).max().item()
        run.say(self.text(seconds))
        if self.stop:
            run.stop()


class RunFolderCallback(Callback):
    """Makes the output folder.

    Args:
        folder: Which.
        write: Writes into it; called on one process, once it is there.
        overwrite: Empty it first.
    """

    def __init__(self, folder: Path, write: Callable[[], None], overwrite: bool) -> None:
        """See the class."""
        self.folder, self.write, self.overwrite = folder, write, overwrite

    def on_setup(self, run: TrainingRun) -> None:
        """Empty it, make it, and have it written into."""
        run.accelerator.wait_for_everyone()
        if not run.is_main:
            return
        if self.overwrite and self.folder.exists():
            # Not the folder itself, which may be where a disk is mounted; last what says that it is ours.
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "config.json"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        (self.folder / "samples").mkdir(exist_ok=True)
