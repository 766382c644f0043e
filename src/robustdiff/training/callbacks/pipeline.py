"""What is made from every checkpoint: the folder as a diffusers pipeline, and a picture of what it draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from robustdiff.diffusion.pipeline import sample, save_pipeline, to_uint8
from robustdiff.training.callbacks.base import Callback
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import image_grid, save_png
from robustdiff.utils.resources import is_out_of_memory
from robustdiff.utils.signals import WaitOver, ends_with_signals

if TYPE_CHECKING:
    from robustdiff.training.run import TrainingRun


class PreviewCallback(Callback):
    """Draws the same images after every checkpoint: ``samples/step-....png``.

    Args:
        folder: Of the run.
        count: How many images.
        steps: Network calls per image; divides the timesteps.
        seed: Of the images.
        batch_size: Images per call.
        class_labels: Their classes, for a conditional network.
    """

    def __init__(
        self,
        folder: str | Path,
        count: int = 16,
        *,
        steps: int = 50,
        seed: int = 0,
        batch_size: int = 64,
        class_labels: Sequence[int] | None = None,
    ) -> None:
        """See the class."""
        self.folder, self.count, self.steps, self.seed = Path(folder), count, steps, seed
        self.batch_size, self.class_labels = batch_size, class_labels

    def path(self, step: int) -> Path:
        """The picture of a step."""
        return self.folder / "samples" / f"step-{step:08d}.png"

    def on_setup(self, run: TrainingRun) -> None:
        """Look for a pipeline."""
        check_pipeline(self, run)

    def on_checkpoint(self, run: TrainingRun) -> None:
        """Draw."""
        if run.is_main:
            with run.averaged(), memory_explained("drawing the preview, after saving", run.step):
                self.draw(run)

    def draw(self, run: TrainingRun) -> None:
        """Draw with the weights that the network has; not when a signal has come and it takes long."""
        try:
            with ends_with_signals():
                images = sample(
                    run.pipeline,
                    self.count,
                    seed=self.seed,
                    steps=self.steps,
                    batch_size=self.batch_size,
                    class_labels=self.class_labels,
                )
        except WaitOver:  # a run that goes on from here draws it
            return
        path = self.path(run.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(".preview.tmp")
        save_png(image_grid(to_uint8(images)), staging)
        staging.replace(path)


class PipelineCallback(Callback):
    """Makes the folder a diffusers pipeline after every checkpoint, with the averaged weights.

    Args:
        folder: Of the run.
        card: Writes the model card after so many steps. Default: none is written.
        preview: Drawn last, so that a run killed before it is known by the lack of it.
    """

    def __init__(
        self, folder: str | Path, card: Callable[[int], None] | None = None, preview: PreviewCallback | None = None
    ) -> None:
        """See the class."""
        self.folder, self.card, self.preview = Path(folder), card, preview

    def on_setup(self, run: TrainingRun) -> None:
        """Look for a pipeline."""
        check_pipeline(self, run)

    def on_start(self, run: TrainingRun) -> None:
        """Make up for what a run lacks that was killed between its checkpoint and the end of this."""
        complete = self.preview is not None and self.preview.path(run.step).exists()
        if 0 < run.step < run.options.steps and not complete:
            self.on_checkpoint(run)

    def on_checkpoint(self, run: TrainingRun) -> None:
        """Pipeline, model card, preview."""
        if not run.is_main:
            return
        with run.averaged(), memory_explained("drawing the preview, after saving", run.step):
            save_pipeline(self.folder, run.pipeline)
            if self.card is not None:
                self.card(run.step)
            if self.preview is not None:
                self.preview.draw(run)


def check_pipeline(callback: Callback, run: TrainingRun) -> None:
    """Refuse a run of a bare network.

    Raises:
        ValueError: Naming the callback.
    """
    if run.pipeline is None:
        raise ValueError(f"{type(callback).__name__} needs a pipeline: give fit one as `model`, not a bare network")


@contextlib.contextmanager
def memory_explained(doing: str, step: int) -> Iterator[None]:
    """Say what to do where memory is too small; ``doing`` is for the message."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            f"out of memory while {doing} step {step}: lower `eval_batch_size` or `preview_images`, and go on with "
            "`resume`"
        ) from None
