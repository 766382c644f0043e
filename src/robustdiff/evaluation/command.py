"""What ``robustdiff evaluate`` does: images in, one JSON per result out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from robustdiff import durable
from robustdiff.config import EvaluateConfig, RobustdiffWarning, SampleConfig, UsageError
from robustdiff.evaluation import few_step, sheets
from robustdiff.evaluation.card import fill_card
from robustdiff.evaluation.extractors import Extractor, open_extractor
from robustdiff.evaluation.features import Features, default_cache, extract
from robustdiff.evaluation.judging import Quality, judge
from robustdiff.evaluation.memorisation import memorisation
from robustdiff.evaluation.neighbours import k_nearest
from robustdiff.images import DataError, ImageSet, load_images
from robustdiff.machine import check_launcher
from robustdiff.sample_files import class_labels, draw
from robustdiff.sampling import load_pipeline, make_scheduler, without_accelerator
from robustdiff.sources import HUB_ID
from robustdiff.version import __version__

FORMAT = "robustdiff evaluation 1"
DEFAULT_N = 1000
RESHAPED = ("reduced", "enlarged", "cropped to a square", "colour reduced to grey", "grey expanded to RGB")
"""Conversions of ``images.py`` that change what is compared."""


@dataclass(frozen=True, eq=False)
class Generated:
    """The images to judge, and where they come from.

    Attributes:
        images: uint8 (n, C, H, W).
        about: ``generated`` of the protocol.
        sampler: ``sampler`` of the protocol; None for images as given.
        draw: (scheduler, steps) -> uint8 images from the same seeds; None for images as given.
        pipeline: None for images as given.
    """

    images: Tensor
    about: Mapping[str, Any]
    sampler: Mapping[str, Any] | None
    draw: Callable[[str, int], Tensor] | None = None
    pipeline: DiffusionPipeline | None = None


def evaluate(config: EvaluateConfig) -> list[Path]:
    """Judge as ``robustdiff evaluate`` does, under accelerate with all processes drawing, and write the results.

    Returns:
        The JSON files written; none on other processes than the main one.

    Raises:
        UsageError: In one line, if anything named cannot be used; nothing is drawn before that is known.
    """
    config.validate()
    check_launcher()
    device = PartialState(cpu=without_accelerator()).device
    folder = _output(config)
    extractors = [open_extractor(spec, device) for spec in config.extractor or ("pixels",)]
    source = _open(config)
    size, channels = source.size, source.channels
    square = size[0] if size[0] == size[1] else None
    resolution = config.resolution or square
    real = _real(config, "reference", resolution, channels, size)
    held_out = _real(config, "held_out", resolution, channels, size) if config.held_out else None
    training, missing = _training(config, resolution, channels, size)
    generated = source.load()
    if generated is None:
        return []
    evaluation = _Evaluation(config, folder, generated, real, held_out, training, missing)
    if training is not None:
        sheets.overview(training.images, folder / "training.png")
    written = [path for extractor in extractors for path in evaluation.run(extractor)]
    fill_card(folder.parent)
    return written


# -- what is judged ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Source:
    """Images to come: their size is known before they are drawn or read."""

    size: tuple[int, int]
    channels: int
    load: Callable[[], Generated | None]


def _is_pipeline(run: str) -> bool:
    return (Path(run) / "model_index.json").is_file() or (not Path(run).exists() and bool(HUB_ID.fullmatch(run)))


def _open(config: EvaluateConfig) -> _Source:
    if not _is_pipeline(config.run):
        given = ("steps", "scheduler", "relabel", "label_floor", "few_step")
        defaults = {field.name: field.default for field in dataclasses.fields(EvaluateConfig)}
        for name in given:
            if getattr(config, name) != defaults[name]:
                raise UsageError(
                    f"--{name.replace('_', '-')} needs a pipeline: {config.run} holds images, leave it out"
                )
        images = _load(config.run, "RUN", config.max_bad_fraction, resolution=config.resolution)
        count = config.n or len(images)
        if count > len(images):
            raise UsageError(f"-n {count}: {config.run} has {len(images)} images; lower it")
        about = {"source": images.source, "sha256": images.sha256, "skipped": len(images.skipped)}
        return _Source(images.size, images.channels, lambda: Generated(images.images[:count], about, None))
    pipeline = load_pipeline(config.run)
    unet = pipeline.unet.config
    side = unet["sample_size"]
    size = (side, side) if isinstance(side, int) else tuple(side)
    if config.resolution not in (None, size[0]) or (config.resolution and len(set(size)) > 1):
        raise UsageError(f"--resolution {config.resolution}: the pipeline draws {size[1]} x {size[0]}; leave it out")
    if unet["in_channels"] not in (1, 3):
        raise UsageError(f"{config.run} draws {unet['in_channels']} channels: only grey or RGB can be judged")
    for steps in config.few_step_counts():
        for name in config.few_step_samplers():
            make_scheduler(name, pipeline.scheduler, steps)  # says what does not fit before anything is drawn
    return _Source(size, unet["in_channels"], lambda: _drawn(config, pipeline))


def _drawn(config: EvaluateConfig, pipeline: DiffusionPipeline) -> Generated | None:
    """Images of a pipeline; kept, so that another extractor need not draw them again."""
    weights = _weights(pipeline)
    asked = SampleConfig(
        config.run,
        n=config.n or DEFAULT_N,
        scheduler=config.scheduler,
        steps=config.steps,
        seed=config.seed,
        batch_size=config.batch_size,
        relabel=config.relabel,
        label_floor=config.label_floor,
    )
    labels = class_labels(asked, pipeline.unet.config["num_class_embeds"])
    folder = _output(config) / "drawn"

    def drawing(scheduler: str, steps: int) -> Tensor | None:
        this = dataclasses.replace(asked, scheduler=scheduler, steps=steps)
        key = {**dataclasses.asdict(this), "run": weights, "batch_size": None, "overwrite": None}
        path = folder / f"{scheduler}-{steps}-n{this.n}-{_digest(key)}.npy"
        state = PartialState(cpu=without_accelerator())
        found = _kept(path, this.n) if state.is_main_process else None
        there = [found is not None]
        if state.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(there)
        if there[0]:
            return found
        images = draw(this, pipeline, labels)
        if images is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.npy")
            np.save(part, images.numpy())
            durable.fsync_file(part)
            part.replace(path)
        return images

    images = drawing(config.scheduler, config.steps)
    others = {
        (name, steps): drawing(name, steps) for name in config.few_step_samplers() for steps in config.few_step_counts()
    }
    if images is None:
        return None
    sampler = {
        "scheduler": config.scheduler,
        "steps": config.steps,
        "timesteps": few_step.timesteps_of(pipeline, config.scheduler, config.steps),
        "seed": config.seed,
        "relabel": config.relabel,
        "label_floor": config.label_floor,
        "ema": _settings(config.run).get("use_ema"),
    }
    about = {"source": _name(config.run), "sha256": _sha256(images), "weights": weights}
    return Generated(images, about, sampler, lambda name, steps: others[name, steps], pipeline)


def _kept(path: Path, n: int) -> Tensor | None:
    """Images drawn before; None if there are none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        images = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        images = torch.empty(0)
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != n:
        _warn(f"{path} is damaged: its images are drawn again")
        return None
    return images


def _weights(pipeline: DiffusionPipeline) -> str:
    """SHA-256 over the network's weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- what it is compared with --------------------------------------------------------------------------


def _load(source: str, flag: str, max_bad_fraction: float, **options: Any) -> ImageSet:  # noqa: ANN401
    try:
        return load_images(source, max_bad_fraction=max_bad_fraction, **options)
    except DataError as error:
        raise UsageError(f"{flag} {error}") from None


def _real(config: EvaluateConfig, name: str, resolution: int | None, channels: int, size: tuple[int, int]) -> ImageSet:
    """The reference or the held-out images, brought to the size and the channels of the generated ones."""
    flag = "--" + name.replace("_", "-")
    own = {"config": config.dataset_config_name, "image_column": config.image_column}
    options = {"split": config.split, **own} if name == "reference" else {"split": getattr(config, f"{name}_split")}
    shape = {"resolution": resolution, "channels": channels}
    images = _load(getattr(config, name), flag, config.max_bad_fraction, **shape, **options)
    _same_size(images, flag, size)
    return images


def _same_size(images: ImageSet, flag: str, size: tuple[int, int]) -> None:
    if images.size != size:
        raise UsageError(
            f"{flag}: its images are {images.size[1]} x {images.size[0]}, the generated ones {size[1]} x {size[0]}, "
            f"which is no square: bring them to one size, or give --resolution N"
        )


def _training(
    config: EvaluateConfig, resolution: int | None, channels: int, size: tuple[int, int]
) -> tuple[ImageSet | None, str | None]:
    """The training images, or why they cannot be looked at."""
    if config.training == "none":
        return None, None
    if config.training is not None:
        options = {"split": config.training_split, "resolution": resolution, "channels": channels}
        images = _load(config.training, "--training", config.max_bad_fraction, **options)
        _same_size(images, "--training", size)
        return images, None
    settings = _settings(config.run)
    if not settings:
        return None, "copying was not looked for: name the training images with --training"
    options = {"split": settings.get("split"), "config": settings.get("dataset_config_name")}
    options["image_column"] = settings.get("image_column")
    try:
        images = load_images(settings["data"], resolution=resolution, channels=channels, **options)
        _same_size(images, "the training images", size)
    except UsageError as error:
        return None, f"copying was not looked for, as the training images cannot be read ({error}): give --training"
    return images, None


def _settings(run: str) -> Mapping[str, Any]:
    """The flags of a run folder's training; empty for other pipelines and images."""
    path = Path(run) / "config.json"
    if not (path.is_file() and (Path(run) / "data.json").is_file()):
        return {}
    try:
        settings = durable.read_json(path)["settings"]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({durable.one_line(error)}): repair it") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("data"), str):
        raise UsageError(f"{path} has no settings of a run: repair it")
    return settings


# -- results -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Evaluation:
    config: EvaluateConfig
    folder: Path
    generated: Generated
    real: ImageSet
    held_out: ImageSet | None
    training: ImageSet | None
    missing: str | None

    def run(self, extractor: Extractor) -> list[Path]:
        """Every result by one extractor."""
        started = time.perf_counter()
        fake, real = self._features(extractor, self.generated.images), self._features(extractor, self.real)
        held_out = None if self.held_out is None else self._features(extractor, self.held_out)
        quality = judge(fake, real, held_out, seed=self.config.seed)
        written = [self._quality(extractor, fake, real, quality, started)]
        if self.training is not None:
            written.append(self._copying(extractor, fake, real, time.perf_counter()))
        if self.config.few_step is not None:
            written.append(self._few_step(extractor, real, quality, time.perf_counter()))
        return written

    def _features(self, extractor: Extractor, images: Tensor | ImageSet) -> Features:
        cache = None
        if self.config.cache != "none":
            cache = Path(self.config.cache).expanduser() if self.config.cache else default_cache()
        bar = tqdm(total=len(images), unit="image", desc=extractor.name, disable=not sys.stderr.isatty(), leave=False)
        with bar:
            return extract(extractor, images, batch_size=self.config.batch_size, cache=cache, progress=bar.update)

    def _quality(self, extractor: Extractor, fake: Features, real: Features, quality: Quality, started: float) -> Path:
        protocol = self._protocol(extractor, fake, quality.floor)
        values = {value.name: value.to_json() for value in quality.values}
        warnings = [*quality.warnings, *self._conversions(), *([self.missing] if self.missing else [])]
        path = self._path("quality", extractor, protocol)
        _, nearest = k_nearest(fake.values[: sheets.ROWS], real.values, min(sheets.NEAREST, len(real.values)))
        sheet = path.with_name(f"{path.stem}-nearest.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        sheets.nearest_sheet(self.generated.images, self.real.images, nearest, sheet)
        body = {"values": values, "details": {}, "sheets": {"nearest": sheet.name}, "warnings": warnings}
        return self._write(path, "quality", protocol, body, started)

    def _conversions(self) -> list[str]:
        """What was done to real images to bring them to the size and the channels of the generated ones."""
        height, width = self.generated.images.shape[2:]
        told = []
        for flag, images in (("--reference", self.real), ("--held-out", self.held_out), ("--training", self.training)):
            done = {note: images.notes[note] for note in RESHAPED if note in images.notes} if images else {}
            if done:
                counted = ", ".join(f"{count} x {note}" for note, count in done.items())
                told.append(
                    f"{flag}: {counted} (Lanczos, centre crop), to be like the generated {width} x {height} images"
                )
        return told

    def _copying(self, extractor: Extractor, fake: Features, real: Features, started: float) -> Path:
        assert self.training is not None
        same = self.training.sha256 == self.real.sha256
        null, null_features = (None, None) if same else (self.real, real.values)
        warnings = []
        if same:
            warnings.append(
                "the reference is the training set: without held-out real images near-copies have no null to be read "
                "against; name others with --reference"
            )
        features = (fake.values, self._features(extractor, self.training).values, null_features)
        found = memorisation(
            _flat(self.generated.images),
            _flat(self.training.images[:]),
            None if null is None else _flat(null.images[:]),
            features=features,
        )
        null_of = f"{len(self.real)} images of the reference, scored like generated ones"
        protocol = self._protocol(extractor, fake, "none: the reference is the training set" if same else null_of)
        path = self._path("memorisation", extractor, protocol)
        sheet = path.with_name(f"{path.stem}-pairs.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        sheets.pairs_sheet(self.generated.images, self.training.images, found.pairs, sheet)
        body = {**found.to_json(list(self.training.names)), "sheets": {"pairs": sheet.name}, "warnings": warnings}
        return self._write(path, "memorisation", protocol, body, started)

    def _few_step(self, extractor: Extractor, real: Features, quality: Quality, started: float) -> Path:
        generated = self.generated
        assert generated.draw is not None
        assert generated.pipeline is not None
        curves = [
            few_step.curve(
                generated.draw,
                generated.pipeline,
                real,
                name,
                self.config.few_step_counts(),
                self.config.batch_size,
            )
            for name in self.config.few_step_samplers()
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
        about = {
            "name": extractor.name,
            "kind": extractor.kind,
            "sha256": extractor.sha256,
            "features": None if fake is None else fake.values.shape[1],
            "resize": extractor.resize,
            "settings": dict(extractor.settings),
        }
        return {
            "extractor": about,
            "n_generated": len(self.generated.images),
            "n_real": len(self.real),
            "image": list(self.generated.images.shape[1:]),
            "generated": dict(self.generated.about),
            "reference": _account(self.real, self.config.split),
            "held_out": None if self.held_out is None else _account(self.held_out, self.config.held_out_split),
            "training": None if self.training is None else _account(self.training, self.config.training_split),
            "sampler": None if self.generated.sampler is None else dict(self.generated.sampler),
            "floor": floor,
            "seeds": [self.config.seed],
        }

    def _path(self, kind: str, extractor: Extractor, protocol: Mapping[str, Any]) -> Path:
        """Equal protocols have equal names: a repetition replaces, anything else stands beside."""
        name = re.sub(r"[^\w.-]+", "_", extractor.name)[:60]
        return self.folder / f"{kind}-{name}-{_digest(protocol)}.json"

    def _write(
        self, path: Path, kind: str, protocol: Mapping[str, Any], body: Mapping[str, Any], started: float
    ) -> Path:
        threads = torch.get_num_threads()
        device = PartialState().device
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {threads} threads"
        result = {
            "format": FORMAT,
            "kind": kind,
            "run": _name(self.config.run),
            "title": self.config.title or _name(self.config.run),
            "told": self.config.told,
            "protocol": protocol,
            **body,
            "seconds": round(time.perf_counter() - started, 2),
            "version": __version__,
            "torch": torch.__version__.split("+")[0],
            "hardware": hardware,
            "date": datetime.now(timezone.utc).date().isoformat(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_json(path, result)
        return path


def summary(paths: Sequence[Path]) -> str:
    """What the command prints: every value beside its floor, and the warnings once."""
    lines, warnings = [], {}
    for path in paths:
        result = durable.read_json(path)
        lines.append(f"{path}:")
        for name, value in result["values"].items():
            text = f"  {name:<34} {value['value']:>11.5g}"
            if value["interval"]:
                text += f"  ({value['interval'][0]:.5g} to {value['interval'][1]:.5g})"
            if value["floor"] is not None:
                text += f"  floor {value['floor']:.5g}"
            lines.append(text)
        warnings.update(dict.fromkeys(result["warnings"]))
    return "\n".join([*lines, *(f"note: {text}" for text in warnings)])


def _output(config: EvaluateConfig) -> Path:
    run = Path(config.run)
    if config.output is not None:
        folder = Path(config.output).expanduser()
    elif (run / "model_index.json").is_file():
        folder = run / "evaluation"
    else:
        folder = Path("evaluation") / (_name(config.run).replace("/", "--") or "images") / "evaluation"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: name a folder")
    if there := durable.read_only(folder):
        raise UsageError(f"--output {folder}: {there} is read-only: name another place")
    return folder


def _account(images: ImageSet, split: str | None) -> dict[str, Any]:
    return {
        "source": _name(images.source),
        "split": split,
        "count": len(images),
        "sha256": images.sha256,
        "skipped": len(images.skipped),
        "conversions": dict(images.notes),
    }


def _name(source: str) -> str:
    """A folder's own name: no result tells where on a machine it was made."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1)


def _sha256(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _warn(message: str) -> None:
    import warnings

    warnings.warn(message, RobustdiffWarning, stacklevel=2)
