"""Quality of a run while it trains: a line of metrics every so many images, and the best pipeline kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from robustdiff.data.dataset import DataError, ImageDataset, load_images
from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.pipeline import sample, save_pipeline, to_uint8
from robustdiff.evaluation.extractors import open_extractor
from robustdiff.evaluation.features import Features, default_cache, extract
from robustdiff.evaluation.metrics import LEAST, judge
from robustdiff.training.config import TrainConfig
from robustdiff.training.metrics import JsonlLog
from robustdiff.training.plan import Plan
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.options import parse_count

BEST = "best"
"""Folder of the best pipeline, in the run folder."""


class EvaluationCallback:
    """Draws images from the same seeds every so many steps, and judges them as ``robustdiff evaluate`` does.

    Writes ``evaluation/during.jsonl``, and, whenever ``evaluate_metric`` is better than ever before, the pipeline
    into ``best/`` and its step into ``evaluation/best.json``.
    """

    def __init__(self, config: TrainConfig, plan: Plan, data: ImageDataset, steps: int, device: torch.device) -> None:
        """Load the extractor and the reference, so that what is wrong with them is known before training.

        Args:
            config: With ``evaluate_every``.
            plan: For the images per step.
            data: Training images, whose size and channels the reference is brought to.
            steps: Network calls per image.
            device: Where features are computed.

        Raises:
            UsageError: If the extractor or the reference cannot be used.
        """
        assert config.evaluate_every is not None
        assert config.evaluate_reference is not None
        self.config, self.batch, self.sampler_steps, self.total = config, plan.batch, steps, plan.steps
        self.every = max(1, round(parse_count(config.evaluate_every, "evaluate_every") / plan.batch))
        height, width = data.size
        self.extractor = open_extractor(config.evaluate_extractor, device)
        try:
            reference = load_images(
                config.evaluate_reference,
                resolution=height if height == width else None,
                channels=data.channels,
                split=config.evaluate_split,
            )
        except DataError as error:
            raise UsageError(f"`evaluate_reference` {error}") from None
        if reference.size != data.size:
            raise UsageError(
                f"`evaluate_reference`: its images are {reference.size[1]} x {reference.size[0]}, those trained on "
                f"{width} x {height}: bring them to one size"
            )
        if len(reference) < LEAST:
            raise UsageError(
                f"`evaluate_reference` has {len(reference)} images; at least {LEAST} are needed: give more"
            )
        self.reference = self._features(reference)
        kernel = "KID" if self.extractor.metric == "FID" else f"KID-{self.extractor.name}"
        self.metric = {"fd": self.extractor.metric, "kid": kernel}[config.evaluate_metric]
        self.classes = len(data.classes)

    def begin(self, folder: Path, step: int) -> None:
        """Go on after ``step``: later lines are cut off, and the best of those that stay is to be beaten."""
        self.folder = folder
        self.lines = JsonlLog(folder / "evaluation" / "during.jsonl", step)
        kept = [json.loads(line) for line in self.lines.kept]
        self.best = min(
            (line["values"][self.metric]["value"] for line in kept if self.metric in line["values"]), default=None
        )

    def due(self, step: int) -> bool:
        """Whether to measure after ``step``."""
        return step % self.every == 0 or step == self.total

    def measure(self, pipeline: DiffusionPipeline, step: int) -> str:
        """Judge the pipeline as it is, write the line, keep the pipeline if it is the best.

        Returns:
            One line for people.
        """
        n, classes = self.config.evaluate_n, self.classes
        conditional = Denoiser.of(pipeline).num_classes is not None
        images = sample(
            pipeline,
            n,
            seed=self.config.seed,
            steps=self.sampler_steps,
            batch_size=self.config.eval_batch_size,
            class_labels=[i % classes for i in range(n)] if conditional else None,
        )
        quality = judge(self._features(to_uint8(images), cached=False), self.reference, intervals=False)
        values = {value.name: value.to_json() for value in quality.values}
        (self.folder / "evaluation").mkdir(exist_ok=True)
        self.lines.write({"step": step, "images": step * self.batch, "n": n, "values": values})
        now = values[self.metric]
        better = self.best is None or now["value"] < self.best
        if better:
            self.best = now["value"]
            (self.folder / BEST).mkdir(exist_ok=True)
            save_pipeline(self.folder / BEST, pipeline)
            about = {"step": step, "images": step * self.batch, "metric": self.metric, "pipeline": BEST}
            atomic_io.write_json(
                self.folder / "evaluation" / "best.json", {**about, "value": now["value"], "floor": now["floor"]}
            )
        return f"step {step}: {self.metric} {now['value']:.4g} (floor {now['floor']:.4g})" + ", the best" * better

    def _features(self, images: Any, cached: bool = True) -> Features:  # noqa: ANN401 - a tensor or an image set
        cache = default_cache() if cached else None
        return extract(self.extractor, images, batch_size=self.config.eval_batch_size, cache=cache)
