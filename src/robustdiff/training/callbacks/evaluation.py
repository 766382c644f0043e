"""Quality of a run while it trains: a line of metrics every so many steps, and the best pipeline kept."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers import DiffusionPipeline

from robustdiff.data.dataset import ImageDataset
from robustdiff.diffusion.pipeline import sample, save_pipeline, to_uint8
from robustdiff.evaluation.class_proportions import in_proportion
from robustdiff.evaluation.extractors import Extractor
from robustdiff.evaluation.features import Features, default_cache, extract
from robustdiff.evaluation.metrics import KernelDistance, compute_metrics
from robustdiff.training.callbacks.base import Callback
from robustdiff.training.callbacks.pipeline import check_pipeline, memory_explained
from robustdiff.training.metrics import JsonlLog
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning
from robustdiff.utils.signals import Interrupted
from robustdiff.utils.words import counted

if TYPE_CHECKING:
    from robustdiff.training.run import TrainingRun

BEST = "best"
"""Folder of the best pipeline, in the run folder."""


class EvaluationCallback(Callback):
    """Draws images from the same seeds every so many steps, and judges them as ``robustdiff evaluate`` does.

    Writes ``evaluation/during.jsonl``, and, whenever the metric is better than ever before, the pipeline into ``best/``
    and its step into ``evaluation/best.json``.

    Args:
        folder: Of the run.
        reference: Clean real images, of the size of those trained on.
        extractor: What they are looked at with (:func:`robustdiff.evaluation.open_extractor`).
        every: Optimiser steps between evaluations; the last step is one in any case.
        n: Images drawn, >= 14.
        metric: What the best is best in: Frechet or kernel distance.
        seed: Of the images.
        steps: Network calls per image; divides the timesteps.
        batch_size: Images per call.
        classes: Number of each class that is drawn, and how often beside the others, if the network is conditional.
    """

    def __init__(
        self,
        folder: str | Path,
        reference: ImageDataset,
        extractor: Extractor,
        every: int,
        *,
        n: int = 500,
        metric: Literal["fd", "kid"] = "fd",
        seed: int = 0,
        steps: int = 50,
        batch_size: int = 64,
        classes: Mapping[int, float] | None = None,
    ) -> None:
        """Look at the reference, so that what is wrong with it is known before training.

        Raises:
            ValueError: Naming what is out of range.
        """
        if metric not in ("fd", "kid"):
            raise ValueError(f"EvaluationCallback needs metric to be fd or kid, got {metric!r}")
        for name, value, least in (("every", every, 1), ("n", n, 14)):
            if value < least:
                raise ValueError(f"EvaluationCallback needs {name} >= {least}, got {value}")
        self.folder, self.extractor, self.every, self.n = Path(folder), extractor, every, n
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        self.labels = in_proportion(classes, n, seed) if classes else None
        self.failed = 0
        self.reference = self._features(reference)
        kernel = KernelDistance().label("kernel", extractor)
        self.metric = {"fd": extractor.metric, "kid": kernel}[metric]

    def on_setup(self, run: TrainingRun) -> None:
        """Look for a pipeline."""
        check_pipeline(self, run)

    def on_start(self, run: TrainingRun) -> None:
        """Cut off later lines, find the best of those that stay, which is to be beaten; make up for one left out."""
        self.lines = JsonlLog(self.folder / "evaluation" / "during.jsonl", run.step)
        kept = [json.loads(line) for line in self.lines.kept]
        values = (line["values"].get(self.metric, {}).get("value") for line in kept)
        self.best = min((value for value in values if value is not None), default=None)
        if run.step and (not kept or kept[-1]["step"] < run.step):  # left in the middle when the run was stopped
            self.on_step(run)

    def on_step(self, run: TrainingRun) -> None:
        """Evaluate, if it is time."""
        if run.step % self.every and run.step < run.options.steps:
            return
        run.check_finite()
        if run.is_main:
            with run.averaged():
                run.say(self._judged(run))
        run.restart_clock()

    def _judged(self, run: TrainingRun) -> str:
        """What :meth:`measure` says; if it fails, that: an evaluation never ends the training that it is for."""
        try:
            with memory_explained("evaluating", run.step):
                return self.measure(run.pipeline, run.step, run.images)
        except Interrupted:
            raise
        except Exception as error:
            self.failed += 1
            reason = atomic_io.one_line(error)
            self.lines.write({"step": run.step, "images": run.images, "n": self.n, "values": {}, "failed": reason})
            message = f"step {run.step}: the evaluation failed ({reason}), {counted(self.failed, 'time')} so far: "
            warnings.warn(message + "training goes on", RobustdiffWarning, stacklevel=2)
            return f"step {run.step}: not evaluated"

    def on_sync(self, run: TrainingRun) -> None:
        """Bring the lines onto the disk."""
        if run.is_main:
            self.lines.sync()

    def measure(self, pipeline: DiffusionPipeline, step: int, seen: int) -> str:
        """Judge the pipeline as it is, write the line, keep the pipeline if it is the best.

        Args:
            pipeline: With the weights to judge.
            step: Of the run.
            seen: Images seen by then.

        Returns:
            One line for people.
        """
        images = sample(
            pipeline,
            self.n,
            seed=self.seed,
            steps=self.steps,
            batch_size=self.batch_size,
            class_labels=self.labels,
        )
        quality = compute_metrics(self._features(to_uint8(images), cached=False), self.reference, intervals=False)
        values = {value.name: _finite(value.to_json()) for value in quality.values}
        (self.folder / "evaluation").mkdir(parents=True, exist_ok=True)
        self.lines.write({"step": step, "images": seen, "n": self.n, "values": values})
        missing = [name for name, value in values.items() if value["value"] is None]
        if missing:
            message = f"step {step}: {', '.join(missing)} not finite, written as null: training goes on"
            warnings.warn(message, RobustdiffWarning, stacklevel=2)
        now = values[self.metric]
        if now["value"] is None:
            return f"step {step}: {self.metric} is not finite"
        better = self.best is None or now["value"] < self.best
        if better:
            self.best = now["value"]
            (self.folder / BEST).mkdir(exist_ok=True)
            save_pipeline(self.folder / BEST, pipeline)
            if (self.folder / "data.json").exists():  # it names the classes
                shutil.copyfile(self.folder / "data.json", self.folder / BEST / "data.json")
            about = {"step": step, "images": seen, "metric": self.metric, "pipeline": BEST}
            atomic_io.write_json(
                self.folder / "evaluation" / "best.json", {**about, "value": now["value"], "floor": now["floor"]}
            )
        floor = "" if now["floor"] is None else f" (floor {now['floor']:.4g})"
        return f"step {step}: {self.metric} {now['value']:.4g}{floor}" + ", the best" * better

    def _features(self, images: Any, cached: bool = True) -> Features:  # noqa: ANN401 - a tensor or an image set
        cache = default_cache() if cached else None
        return extract(self.extractor, images, batch_size=self.batch_size, cache=cache)


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """The same, with None for numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
