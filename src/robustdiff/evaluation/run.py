"""What ``robustdiff evaluate`` does: images in, one JSON per result out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from robustdiff.data.dataset import ImageDataset
from robustdiff.data.match_model import labels_for
from robustdiff.diffusion.pipeline import without_accelerator
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.evaluation import contact_sheets
from robustdiff.evaluation.config import EvaluateConfig
from robustdiff.evaluation.distributed import extract_together, release
from robustdiff.evaluation.extractors import Extractor, open_extractor
from robustdiff.evaluation.features import Features, default_cache
from robustdiff.evaluation.inputs import (
    Generated,
    digest,
    jpeg_share,
    left_out,
    load_real,
    load_training,
    name_of,
    open_generated,
    output_folder,
    shared_images,
)
from robustdiff.evaluation.memorisation import find_copies
from robustdiff.evaluation.metrics import Quality, compute_metrics, drawn, few_step_curve
from robustdiff.evaluation.model_card import fill_card
from robustdiff.evaluation.model_copying import MOST, ModelCopying, copying_of_model
from robustdiff.evaluation.neighbours import k_nearest
from robustdiff.evaluation.result_file import write_result
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.progress import progress
from robustdiff.utils.resources import check_launcher
from robustdiff.utils.words import counted

RESHAPED = ("reduced", "enlarged", "cropped to a square", "colour reduced to grey", "grey expanded to RGB")
"""Conversions of ``data/dataset.py`` that change what is compared."""
COMPRESSED_APART = 0.5
"""Difference of the shares of JPEG files from which on a reader is warned."""


def evaluate(config: EvaluateConfig) -> list[Path]:
    """Judge as ``robustdiff evaluate`` does, and write the results.

    Under accelerate all processes draw and extract features; the first one caches, judges and writes.

    Returns:
        The JSON files written; none on other processes than the main one.

    Raises:
        UsageError: In one line, if anything named cannot be used; nothing is drawn before that is known.
    """
    config.validate()
    check_launcher()
    device = PartialState(cpu=without_accelerator()).device
    folder = output_folder(config)
    extractors = [open_extractor(spec, device) for spec in config.extractor or ("pixels",)]
    source = open_generated(config)
    size, channels = source.size, source.channels
    square = size[0] if size[0] == size[1] else None
    resolution = config.resolution or square
    real = load_real(config, "reference", resolution, channels, size)
    held_out = load_real(config, "held_out", resolution, channels, size) if config.held_out else None
    training, missing = load_training(config, resolution, channels, size)
    evaluation = _Evaluation(config, folder, source.load(real), real, held_out, training, missing)
    # All features first: processes part here, and none may wait for the first one to search neighbours.
    features = [evaluation.extract(extractor) for extractor in extractors]
    release()
    if not PartialState().is_main_process:
        return []
    if training is not None:
        contact_sheets.overview(training.images, folder / "training.png")
    written = [path for found in features if found is not None for path in evaluation.run(found)]
    if folder.name == "evaluation":  # with --output elsewhere there is no card beside it
        fill_card(folder.parent)
    return written


# -- results -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Extracted:
    """Every set of images as one extractor sees it."""

    extractor: Extractor
    fake: Features
    real: Features
    held_out: Features | None
    training: Features | None
    few_step: Mapping[tuple[str, int], Features]
    seconds: float


@dataclass(frozen=True, eq=False)
class _Evaluation:
    config: EvaluateConfig
    folder: Path
    generated: Generated
    real: ImageDataset
    held_out: ImageDataset | None
    training: ImageDataset | None
    missing: str | None

    def extract(self, extractor: Extractor) -> _Extracted | None:
        """Features of everything, by all processes; None on others than the first."""
        started, cache = time.perf_counter(), None
        if self.config.cache != "none":
            cache = Path(self.config.cache) if self.config.cache else default_cache()

        def features(images: Tensor | ImageDataset, what: str) -> Features | None:
            with bar(extractor.name, len(images), "image") as tell:
                size = self.config.batch_size
                return extract_together(extractor, images, what, batch_size=size, cache=cache, progress=tell)

        fake, real = features(self.generated.images, "`run`"), features(self.real, "`reference`")
        held_out = None if self.held_out is None else features(self.held_out, "`held_out`")
        training = None if self.training is None else features(self.training, "`training`")
        drawn = {key: features(images, "`few_step`") for key, images in self.generated.few_step.items()}
        few = {key: found for key, found in drawn.items() if found is not None}
        if fake is None or real is None:
            return None
        return _Extracted(extractor, fake, real, held_out, training, few, time.perf_counter() - started)

    def run(self, found: _Extracted) -> list[Path]:
        """Every result by one extractor."""
        started = time.perf_counter() - found.seconds
        extractor, fake, real = found.extractor, found.fake, found.real
        quality = compute_metrics(fake, real, found.held_out, seed=self.config.seed, bars=bar)
        written = [self._quality(extractor, fake, real, quality, started)]
        if found.training is not None:
            written.append(self._copying(extractor, fake, real, found.training, time.perf_counter()))
        if self.config.few_step is not None:
            written.append(self._few_step(extractor, found.few_step, real, quality, time.perf_counter()))
        return written

    def _quality(self, extractor: Extractor, fake: Features, real: Features, quality: Quality, started: float) -> Path:
        protocol = self._protocol(extractor, fake, quality.floor)
        values = {value.name: value.to_json() for value in quality.values}
        more = [self.missing] if self.missing else []
        warnings = [*quality.warnings, *self._conversions(), *self._unlike(), *more]
        path = self._path("quality", extractor, protocol)
        shown = contact_sheets.spread(len(fake.values), contact_sheets.ROWS)
        _, nearest = k_nearest(fake.values[shown], real.values, min(contact_sheets.NEAREST, len(real.values)))
        sheet = path.with_name(f"{path.stem}-nearest.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheets.nearest_sheet(self.generated.images, self.real.images, shown, nearest, sheet)
        body = {"values": values, "details": {}, "sheets": {"nearest": sheet.name}, "warnings": warnings}
        return self._write(path, "quality", protocol, body, started)

    def _conversions(self) -> list[str]:
        """What was left out, and what was done to real images to bring them to the size of the generated ones."""
        height, width = self.generated.images.shape[2:]
        told = list(self.generated.remarks)
        for flag, images in (("`reference`", self.real), ("`held_out`", self.held_out), ("`training`", self.training)):
            told += left_out(flag, images) if images else []
            done = {note: images.notes[note] for note in RESHAPED if note in images.notes} if images else {}
            if done:
                counted = ", ".join(f"{count} x {note}" for note, count in done.items())
                told.append(
                    f"{flag}: {counted} (Lanczos, centre crop), to be like the generated {width} x {height} images"
                )
        return told

    def _unlike(self) -> list[str]:
        """What makes a distance another one than that of two laws: the same images, or other compression."""
        told = []
        if same := shared_images(self.generated.images, self.real):
            told.append(
                f"{same} of the {len(self.generated.images)} images judged are images of the reference, pixel for "
                "pixel: distances are too small, and intervals and floors do not hold for them; compare with others"
            )
        mine, theirs = self.generated.jpeg, jpeg_share(self.real)
        if mine is not None and theirs is not None and abs(mine - theirs) > COMPRESSED_APART:
            told.append(
                f"{mine:.0%} of the images judged are JPEG files, and {theirs:.0%} of the reference: compression alone "
                "moves every distance; save both alike"
            )
        return told

    def _copying(
        self, extractor: Extractor, fake: Features, real: Features, training: Features, started: float
    ) -> Path:
        assert self.training is not None
        same = self.training.sha256 == self.real.sha256
        null, null_features = (None, None) if same else (self.real, real.values)
        warnings = []
        if same:
            warnings.append(
                "the reference is the training set: without held-out real images near-copies have no null to be read "
                "against; name others with `reference`"
            )
        features = (fake.values, training.values, null_features)
        shown, of_null = self.generated.images, None if null is None else null.images[:]
        with bar("copies", 3 * (len(shown) + (0 if of_null is None else len(of_null))), "row") as tell:
            found = find_copies(
                _flat(shown),
                _flat(self.training.images[:]),
                None if of_null is None else _flat(of_null),
                features=features,
                mirrored=(_flat(shown.flip(-1)), None if of_null is None else _flat(of_null.flip(-1))),
                progress=tell,
            )
        null_of = f"{len(self.real)} images of the reference, scored like generated ones"
        protocol = self._protocol(extractor, fake, "none: the reference is the training set" if same else null_of)
        path = self._path("memorisation", extractor, protocol)
        sheet = path.with_name(f"{path.stem}-pairs.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheets.pairs_sheet(self.generated.images, self.training.images, found.pairs, sheet)
        body = {**found.to_json(list(self.training.names)), "sheets": {"pairs": sheet.name}, "warnings": warnings}
        model, why = self._of_model
        if model is not None:
            body["values"] |= {value.name: value.to_json() for value in model.values()}
            body["details"]["denoising_gap"] = model.to_json()
        warnings += why
        return self._write(path, "memorisation", protocol, body, started)

    @cached_property
    def _of_model(self) -> tuple[ModelCopying | None, list[str]]:
        """What the network itself knows of the training images; or why it was not asked."""
        pipeline, training, held_out = self.generated.pipeline, self.training, self.held_out
        if pipeline is None or training is None or held_out is None:
            return None, []
        places = [drawn(len(images), MOST, self.config.seed) for images in (training, held_out)]
        new = held_out.images[places[1]]
        if same := shared_images(new, training):
            said = f"{counted(same, 'image')} of `held_out` {'is' if same == 1 else 'are'} among the training images"
            return None, [f"the model itself was not asked whether it copies: {said}, name others"]
        try:
            labels = [labels_for(images, pipeline, self.config.run) for images in (training, held_out)]
        except UsageError as error:
            return None, [f"the model itself was not asked whether it copies: {error}"]
        pipeline.unet.to(PartialState().device)
        of_training, of_held_out = (
            None if own is None else own[some] for own, some in zip(labels, places, strict=True)
        )
        with bar("the model itself", sum(map(len, places)), "image") as tell:
            found = copying_of_model(
                pipeline,
                NoiseSchedule.from_scheduler(pipeline.scheduler),
                training.images[places[0]],
                new,
                labels=(of_training, of_held_out),
                seed=self.config.seed,
                batch_size=self.config.batch_size,
                progress=tell,
            )
        return found, []

    def _few_step(
        self,
        extractor: Extractor,
        drawn: Mapping[tuple[str, int], Features],
        real: Features,
        quality: Quality,
        started: float,
    ) -> Path:
        assert self.generated.pipeline is not None
        counts, names = self.config.few_step_counts(), self.config.few_step_samplers()
        rows = sum(2 * len(real.values) + len(fake.values) for fake in drawn.values())
        with bar("few steps", rows, "row") as tell:
            curves = [
                few_step_curve([drawn[name, n] for n in counts], self.generated.pipeline, real, name, counts, tell)
                for name in names
            ]
        protocol = self._protocol(extractor, None, quality.floor)
        floors = {value.name: value for value in quality.values}
        values = {}
        for curve in curves:
            for metric, column in curve["values"].items():
                for steps, value in zip(curve["steps"], column, strict=True):
                    floor = floors[metric]
                    about = {"floor_n": floor.about["floor_n"]}
                    entry = {"value": value, "floor": floor.floor, "better": floor.better, "interval": None}
                    values[f"{metric} at {steps} {curve['scheduler']} steps"] = {**entry, "about": about}
        body = {"values": values, "details": {"curves": curves}, "sheets": {}, "warnings": list(quality.warnings)}
        path = self._path("few-step", extractor, {**protocol, "curves": [c["timesteps"] for c in curves]})
        return self._write(path, "few-step", protocol, body, started)

    def _protocol(self, extractor: Extractor, fake: Features | None, floor: str) -> dict[str, Any]:
        return {
            "extractor": describe(extractor, fake),
            "n_generated": len(self.generated.images),
            "n_real": len(self.real),
            "image": list(self.generated.images.shape[1:]),
            "generated": dict(self.generated.about),
            "reference": account(self.real, self.config.split),
            "held_out": None if self.held_out is None else account(self.held_out, self.config.held_out_split),
            "training": None if self.training is None else account(self.training, self.config.training_split),
            "sampler": None if self.generated.sampler is None else dict(self.generated.sampler),
            "floor": floor,
            "seeds": [self.config.seed],
        }

    def _path(self, kind: str, extractor: Extractor, protocol: Mapping[str, Any]) -> Path:
        """Equal protocols have equal names: a repetition replaces, anything else stands beside."""
        name = re.sub(r"[^\w.-]+", "_", extractor.name)[:60]
        return self.folder / f"{kind}-{name}-{digest(protocol)}.json"

    def _write(
        self, path: Path, kind: str, protocol: Mapping[str, Any], body: Mapping[str, Any], started: float
    ) -> Path:
        about = {"run": self.config.run, "title": self.config.title, "told": self.config.told}
        return write_result(path, kind, about, protocol, body, time.perf_counter() - started)


def summary(paths: Sequence[Path]) -> str:
    """What the command prints: every value beside its floor, and the warnings once."""
    lines, warnings = [], {}
    for path in paths:
        result = atomic_io.read_json(path)
        lines.append(f"{path}:")
        for name, value in result["values"].items():
            shown = "-" if value["value"] is None else f"{value['value']:.5g}"
            text = f"  {name:<34} {shown:>11}"
            if value["interval"]:
                text += f"  ({value['interval'][0]:.5g} to {value['interval'][1]:.5g})"
            if value["floor"] is not None:
                text += f"  floor {value['floor']:.5g}"
            if size := value["about"].get("subset_size"):
                text += f"  subsets of {size}"
            lines.append(text)
        warnings.update(dict.fromkeys(result["warnings"]))
    return "\n".join([*lines, *(f"note: {text}" for text in warnings)])


def bar(what: str, total: int, unit: str = "row") -> AbstractContextManager[Callable[[int], object]]:
    """How far the first process is; the others say nothing."""
    return progress(what, total, unit, shown=PartialState().is_main_process)


def describe(extractor: Extractor, features: Features | None) -> dict[str, Any]:
    """``extractor`` of a protocol."""
    return {
        "name": extractor.name,
        "kind": extractor.kind,
        "sha256": extractor.sha256,
        "features": None if features is None else features.values.shape[1],
        "resize": extractor.resize,
        "settings": dict(extractor.settings),
    }


def account(images: ImageDataset, split: str | None) -> dict[str, Any]:
    """``reference`` of a protocol, and its like."""
    return {
        "source": name_of(images.source),
        "split": split,
        "count": len(images),
        "sha256": images.sha256,
        "skipped": len(images.skipped),
        "conversions": dict(images.notes),
    }


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1)
