"""What is judged and what it is compared with: images drawn, read, and brought to one size."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from torch import Tensor

from robustdiff.data.dataset import DataError, ImageDataset, load_images
from robustdiff.data.sources.open import HUB_ID
from robustdiff.diffusion.config import SampleConfig
from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.pipeline import (
    clip_bound,
    load_pipeline,
    make_scheduler,
    weights_sha256,
    without_accelerator,
)
from robustdiff.diffusion.sample_files import class_counts, class_names, draw, trained_classes
from robustdiff.evaluation.class_proportions import counts_of, in_proportion
from robustdiff.evaluation.config import EvaluateConfig
from robustdiff.evaluation.distributed import share
from robustdiff.evaluation.metrics import check_enough, drawn, timesteps_of
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError
from robustdiff.utils.words import counted

DEFAULT_N = 1000
WHOSE = {
    "reference": "as often as the reference has them",
    "training": "as often as the training images had them",
    "equal": "equally often",
}
"""Proportions of classes, in words."""


@dataclass(frozen=True, eq=False)
class Generated:
    """The images to judge, and where they come from.

    Attributes:
        images: uint8 (n, C, H, W).
        about: ``generated`` of the protocol.
        sampler: ``sampler`` of the protocol; None for images as given.
        few_step: uint8 images from the same seeds by (scheduler, steps), for `few_step`.
        pipeline: None for images as given.
        remarks: What a reader must know of them.
        jpeg: Share of them that are JPEG by the names of their files; None if files have no names.
    """

    images: Tensor
    about: Mapping[str, Any]
    sampler: Mapping[str, Any] | None
    few_step: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    pipeline: DiffusionPipeline | None = None
    remarks: Sequence[str] = ()
    jpeg: float | None = None


# -- what is judged ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """Images to come: their size is known before they are drawn or read; drawing looks at the reference's classes."""

    size: tuple[int, int]
    channels: int
    load: Callable[[ImageDataset], Generated]


def _is_pipeline(run: str) -> bool:
    return (Path(run) / "model_index.json").is_file() or (not Path(run).exists() and bool(HUB_ID.fullmatch(run)))


def open_generated(config: EvaluateConfig) -> Source:
    """The images to judge, not yet drawn.

    Raises:
        UsageError: If ``run`` is neither a pipeline nor images, or a flag does not fit it.
    """
    if not _is_pipeline(config.run):
        given = ("class_proportions", "steps", "scheduler", "relabel", "sigma_floor", "floor_shape", "few_step")
        defaults = {field.name: field.default for field in dataclasses.fields(EvaluateConfig)}
        for name in given:
            if getattr(config, name) != defaults[name]:
                raise UsageError(f"`{name}` needs a pipeline: {config.run} holds images, leave it out")
        images = _load(config.run, "`run`", config.max_bad_fraction, resolution=config.resolution)
        count = config.n or len(images)
        if count > len(images):
            raise UsageError(f"`n` {count}: {config.run} has {len(images)} images; lower it")
        check_enough("`run`", count)
        part = count < len(images)
        judged = images.images[drawn(len(images), count, config.seed) if part else slice(None)]
        about = {"source": name_of(images.source), "sha256": _sha256(judged), "skipped": len(images.skipped)}
        remarks = left_out("`run`", images)
        if part:
            remarks.append(
                f"{count} of the {len(images)} images of {name_of(images.source)} are judged, drawn at random"
            )
        conversions = {"conversions": dict(images.notes)}
        given_as = Generated(judged, {**about, **conversions}, None, remarks=remarks, jpeg=jpeg_share(images))
        return Source(images.size, images.channels, lambda _: given_as)
    pipeline = load_pipeline(config.run)
    denoiser = Denoiser.of(pipeline)
    size, channels = denoiser.size, denoiser.channels
    if config.resolution not in (None, size[0]) or (config.resolution and len(set(size)) > 1):
        raise UsageError(f"`resolution` {config.resolution}: the pipeline draws {size[1]} x {size[0]}; leave it out")
    if channels not in (1, 3):
        raise UsageError(f"{config.run} draws {channels} channels: only grey or RGB can be judged")
    for steps in config.few_step_counts():
        for name in config.few_step_samplers():
            make_scheduler(name, pipeline.scheduler, steps)  # says what does not fit before anything is drawn
    return Source(size, channels, lambda reference: _drawn(config, pipeline, reference))


def _drawn(config: EvaluateConfig, pipeline: DiffusionPipeline, reference: ImageDataset) -> Generated:
    """Images of a pipeline, on all processes; kept, so that another extractor need not draw them again."""
    weights = weights_sha256(pipeline)
    asked = SampleConfig(
        config.run,
        n=config.n or DEFAULT_N,
        scheduler=config.scheduler,
        steps=config.steps,
        seed=config.seed,
        batch_size=config.batch_size,
        relabel=config.relabel,
        sigma_floor=config.sigma_floor,
        floor_shape=config.floor_shape,
    )
    labels, whose = _classes(config, asked.n, Denoiser.of(pipeline).num_classes, reference)
    folder = output_folder(config) / "drawn"

    def drawing(scheduler: str, steps: int) -> Tensor:
        this = dataclasses.replace(asked, scheduler=cast(Any, scheduler), steps=steps)  # validate() knows the names
        key = {**dataclasses.asdict(this), "run": weights, "batch_size": None, "overwrite": None}
        if labels is not None:
            key["classes"] = labels
        path = folder / f"{scheduler}-{steps}-n{this.n}-{digest(key)}.npy"
        state = PartialState(cpu=without_accelerator())
        found = _kept(path, this.n) if state.is_main_process else None
        there = [found is not None]
        if state.num_processes > 1:
            broadcast_object_list(there)
        if there[0]:
            return share(found)
        images = draw(this, pipeline, labels)
        if images is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.npy")
            np.save(part, images.numpy())
            atomic_io.fsync_file(part)
            part.replace(path)
        return share(images)

    images = drawing(config.scheduler, config.steps)
    others = {
        (name, steps): drawing(name, steps) for name in config.few_step_samplers() for steps in config.few_step_counts()
    }
    sampler = {
        "scheduler": config.scheduler,
        "steps": config.steps,
        "timesteps": timesteps_of(pipeline, config.scheduler, config.steps),
        "seed": config.seed,
        "relabel": config.relabel,
        "sigma_floor": config.sigma_floor,
        "floor_shape": config.floor_shape,
        "clip": clip_bound(pipeline.scheduler),
        "ema": _settings(config.run).get("use_ema"),
    }
    about = {"source": name_of(config.run), "sha256": _sha256(images), "weights": weights}
    if labels is not None:
        about["classes"] = whose
    remarks = [f"classes are drawn {whose}"] if labels is not None else []
    return Generated(images, about, sampler, others, pipeline, remarks)


def _classes(
    config: EvaluateConfig, n: int, classes: int | None, reference: ImageDataset
) -> tuple[list[int] | None, str]:
    """The class of each image to draw, and whose proportions these are, in words; None without classes.

    Raises:
        UsageError: If the training images' proportions are asked for, and the run does not know them.
    """
    if classes is None:
        if config.class_proportions != "reference":
            raise UsageError(f"`class_proportions`: {config.run} is not class-conditional, leave it out")
        return None, ""
    trained = trained_classes(config.run, classes)
    counts = {
        "reference": counts_of(reference, class_names(config.run), classes) or {},
        "training": class_counts(config.run, classes),
        "equal": dict.fromkeys(trained, 1),
    }
    asked = config.class_proportions
    if asked == "training" and not counts[asked]:
        raise UsageError(
            f"`class_proportions` training: {config.run} does not say how many it had of each; leave it out"
        )
    for whose in list(counts)[list(counts).index(asked) :]:
        known = {number: count for number, count in counts[whose].items() if number in trained and count}
        if known:
            total = len(reference) if whose == "reference" else sum(counts[whose].values())
            other = total - sum(known.values())
            left = f" (but for {counted(other, 'image')} of classes that it was not trained on)" if other else ""
            return in_proportion(known, n, config.seed), WHOSE[whose] + left
    raise AssertionError("some class was trained")


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


def jpeg_share(images: ImageDataset) -> float | None:
    """Share of a set that is JPEG by the names of the files; None if they are not named."""
    suffixes = [Path(name).suffix.lower() for name in images.names]
    return None if not all(suffixes) else sum(one in (".jpg", ".jpeg") for one in suffixes) / len(suffixes)


def shared_images(generated: Tensor, reference: ImageDataset) -> int:
    """How many generated images, uint8 (n, C, H, W), are images of the reference, pixel for pixel."""
    rows = range(0, len(reference), 256)
    parts = (reference.images[range(first, min(first + 256, len(reference)))] for first in rows)
    there = {_sha256(image) for part in parts for image in part}
    return sum(_sha256(image) in there for image in generated)


def left_out(flag: str, images: ImageDataset) -> list[str]:
    """One line if files of a set could not be read; none otherwise."""
    if not images.skipped:
        return []
    name, reason = images.skipped[0]
    return [f"{flag}: {len(images.skipped)} of its files left out, the first is {name} ({reason})"]


# -- what it is compared with --------------------------------------------------------------------------


def _load(source: str, flag: str, max_bad_fraction: float, **options: Any) -> ImageDataset:  # noqa: ANN401
    try:
        return load_images(source, max_bad_fraction=max_bad_fraction, **options)
    except DataError as error:
        raise UsageError(f"{flag} {error}") from None


def load_real(
    config: EvaluateConfig, name: str, resolution: int | None, channels: int, size: tuple[int, int]
) -> ImageDataset:
    """The reference or the held-out images, brought to the size and the channels of the generated ones."""
    flag = f"`{name}`"
    own = {"config": config.dataset_config_name, "image_column": config.image_column}
    options = {"split": config.split, **own} if name == "reference" else {"split": getattr(config, f"{name}_split")}
    shape = {"resolution": resolution, "channels": channels, "value_range": config.value_range}
    images = _load(getattr(config, name), flag, config.max_bad_fraction, **shape, **options)
    _same_size(images, flag, size)
    check_enough(flag, len(images))
    return images


def _same_size(images: ImageDataset, flag: str, size: tuple[int, int]) -> None:
    if images.size != size:
        raise UsageError(
            f"{flag}: its images are {images.size[1]} x {images.size[0]}, the generated ones {size[1]} x {size[0]}, "
            f"which is no square: bring them to one size, or give `resolution` N"
        )


def load_training(
    config: EvaluateConfig, resolution: int | None, channels: int, size: tuple[int, int]
) -> tuple[ImageDataset | None, str | None]:
    """The training images, or why they cannot be looked at."""
    if config.training == "none":
        return None, None
    if config.training is not None:
        options = {"split": config.training_split, "value_range": config.value_range}
        shape = {"resolution": resolution, "channels": channels}
        images = _load(config.training, "`training`", config.max_bad_fraction, **shape, **options)
        _same_size(images, "`training`", size)
        return images, None
    try:
        found = trained_on(config.run, resolution, channels, size)
    except TrainingUnread as error:
        return None, f"copying was not looked for, as the training images cannot be read ({error}): give `training`"
    return found, None if found else "copying was not looked for: name the training images with `training`"


class TrainingUnread(UsageError):
    """A run says what it was trained on, and that cannot be read."""


def trained_on(run: str, resolution: int | None, channels: int, size: tuple[int, int]) -> ImageDataset | None:
    """The images that a run folder says it was trained on, without dirt that was added to them; None if it says none.

    Raises:
        TrainingUnread: If they cannot be read, or brought to this size.
        UsageError: If the run's settings cannot be read.
    """
    settings = _settings(run)
    if not settings:
        return None
    try:
        images = load_images(
            settings["data"],
            resolution=resolution,
            channels=channels,
            split=settings.get("split"),
            config=settings.get("dataset_config_name"),
            image_column=settings.get("image_column"),
            value_range=settings.get("value_range"),
        )
        _same_size(images, "the training images", size)
    except UsageError as error:
        raise TrainingUnread(str(error)) from None
    return images


def _settings(run: str) -> Mapping[str, Any]:
    """The flags of a run folder's training; empty for other pipelines and images."""
    path = Path(run) / "config.json"
    if not (path.is_file() and (Path(run) / "data.json").is_file()):
        return {}
    try:
        settings = atomic_io.read_json(path)["settings"]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({atomic_io.one_line(error)}): repair it") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("data"), str):
        raise UsageError(f"{path} has no settings of a run: repair it")
    return settings


# -- names ------------------------------------------------------------------------------------------


def output_folder(config: EvaluateConfig) -> Path:
    """Where results go; nothing is made yet.

    Raises:
        UsageError: If nothing can be written there.
    """
    run = Path(config.run)
    if config.output is not None:
        folder = Path(config.output)
    elif (run / "model_index.json").is_file():
        folder = run / "evaluation"
    else:
        folder = Path("evaluation") / (name_of(config.run).replace("/", "--") or "images") / "evaluation"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`output` {folder} is a file: name a folder")
    if there := atomic_io.read_only(folder):
        raise UsageError(f"`output` {folder}: {there} is read-only: name another place")
    return folder


def name_of(source: str) -> str:
    """A folder's own name: no result tells where on a machine it was made."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def _sha256(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()


def digest(value: object) -> str:
    """Eight hexadecimal digits that differ when ``value``, anything JSON can hold, does."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _warn(message: str) -> None:
    warnings.warn(message, RobustdiffWarning, stacklevel=2)
