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
from robustdiff.diffusion.sample_files import class_labels, draw
from robustdiff.evaluation.config import EvaluateConfig
from robustdiff.evaluation.distributed import share
from robustdiff.evaluation.metrics import check_enough, timesteps_of
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError

DEFAULT_N = 1000


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
    """

    images: Tensor
    about: Mapping[str, Any]
    sampler: Mapping[str, Any] | None
    few_step: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    pipeline: DiffusionPipeline | None = None
    remarks: Sequence[str] = ()


# -- what is judged ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Source:
    """Images to come: their size is known before they are drawn or read."""

    size: tuple[int, int]
    channels: int
    load: Callable[[], Generated]


def _is_pipeline(run: str) -> bool:
    return (Path(run) / "model_index.json").is_file() or (not Path(run).exists() and bool(HUB_ID.fullmatch(run)))


def open_generated(config: EvaluateConfig) -> Source:
    """The images to judge, not yet drawn.

    Raises:
        UsageError: If ``run`` is neither a pipeline nor images, or a flag does not fit it.
    """
    if not _is_pipeline(config.run):
        given = ("steps", "scheduler", "relabel", "sigma_floor", "floor_shape", "few_step")
        defaults = {field.name: field.default for field in dataclasses.fields(EvaluateConfig)}
        for name in given:
            if getattr(config, name) != defaults[name]:
                raise UsageError(f"`{name}` needs a pipeline: {config.run} holds images, leave it out")
        images = _load(config.run, "`run`", config.max_bad_fraction, resolution=config.resolution)
        count = config.n or len(images)
        if count > len(images):
            raise UsageError(f"`n` {count}: {config.run} has {len(images)} images; lower it")
        check_enough("`run`", count)
        judged = images.images[:count]
        about = {"source": name_of(images.source), "sha256": _sha256(judged), "skipped": len(images.skipped)}
        given_as = Generated(
            judged, {**about, "conversions": dict(images.notes)}, None, remarks=left_out("`run`", images)
        )
        return Source(images.size, images.channels, lambda: given_as)
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
    return Source(size, channels, lambda: _drawn(config, pipeline))


def _drawn(config: EvaluateConfig, pipeline: DiffusionPipeline) -> Generated:
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
    labels = class_labels(asked, Denoiser.of(pipeline).num_classes)
    folder = output_folder(config) / "drawn"

    def drawing(scheduler: str, steps: int) -> Tensor:
        this = dataclasses.replace(asked, scheduler=cast(Any, scheduler), steps=steps)  # validate() knows the names
        key = {**dataclasses.asdict(this), "run": weights, "batch_size": None, "overwrite": None}
        if labels is not None:
            key["classes"] = sorted(set(labels))
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
    return Generated(images, about, sampler, others, pipeline)


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
