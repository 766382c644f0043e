"""Images as a pipeline takes them: its size, its channels, its class numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from robustdiff.data.dataset import ImageDataset, load_images
from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.sample_files import class_names
from robustdiff.utils.errors import UsageError


def load_fitting(data: str, pipeline: Any, model: str, resolution: int | None = None, **settings: Any) -> ImageDataset:  # noqa: ANN401
    """Read images that fit a pipeline, in its channels.

    Args:
        data: As :func:`robustdiff.data.dataset.load_images` takes it.
        pipeline: A pipeline, or its network.
        model: What messages call it.
        resolution: Side in pixels to bring images to; None leaves them as they are, and they must fit.
        settings: Passed on to :func:`robustdiff.data.dataset.load_images`.

    Raises:
        UsageError: One line, if they do not fit; DataError if they cannot be read.
    """
    denoiser = Denoiser.of(pipeline)
    channels, (height, width) = denoiser.channels, denoiser.size
    if channels not in (1, 3):
        raise UsageError(f"{model} takes images of {channels} channels: only grey or RGB can be read")
    if resolution is not None and (resolution, resolution) != (height, width):
        raise UsageError(f"`resolution` {resolution}: {model} takes {width} x {height}; {_remedy(height, width)}")
    images = load_images(data, resolution=resolution, channels=channels, **settings)
    if images.size != (height, width):
        found = f"{images.size[1]} x {images.size[0]}"
        raise UsageError(f"{data} holds images of {found}, {model} takes {width} x {height}: {_remedy(height, width)}")
    return images


def _remedy(height: int, width: int) -> str:
    return f"use `resolution` {height}" if height == width else f"give images of {width} x {height}"


def labels_for(images: ImageDataset, pipeline: Any, model: str) -> Tensor | None:  # noqa: ANN401
    """The class of each image as the pipeline numbers it, int64, shape (N,); None if it knows no classes.

    By name where the pipeline is a run folder that names its classes, else by number, which theirs must then be.

    Raises:
        UsageError: One line, if the images have no labels, or others than the pipeline.
    """
    return None if Denoiser.of(pipeline).num_classes is None else renumber(images, pipeline, model).labels


def renumber(images: ImageDataset, pipeline: Any, model: str) -> ImageDataset:  # noqa: ANN401
    """The same images with the classes of a pipeline, as :func:`labels_for` finds them; all that it has, used or not.

    Raises:
        UsageError: As there.
    """
    count = Denoiser.of(pipeline).num_classes
    if count is None:
        return images
    if images.labels is None:
        raise UsageError(
            f"{model} is conditional on {count} classes and {images.source} has no labels: {images.unlabelled}; or "
            "name a pipeline without classes"
        )
    known = tuple(class_names(model))
    strange = [name for name in images.classes if name not in known]
    if known and strange:
        raise UsageError(
            f"{images.source} has a class {strange[0]!r} that {model} does not know: it has {', '.join(known[:20])}; "
            "rename that class, leave its images out, or take another model"
        )
    named = [name for name in images.classes if not name.isdecimal()]
    if named and not known:
        raise UsageError(
            f"{images.source} has a class {named[0]!r}, and {model} has no names of classes (no data.json): call the "
            f"classes by the model's numbers, 0 .. {count - 1}"
        )
    numbers = [known.index(name) if known else int(name) for name in images.classes]  # 7 is class 7, without 3 too
    labels = torch.tensor(numbers)[images.labels] if numbers else images.labels
    largest = int(labels.max())
    if largest >= count:
        raise UsageError(f"{images.source} has a class number {largest}, {model} has 0 .. {count - 1}: name another")
    return dataclasses.replace(images, classes=known or tuple(map(str, range(count))), labels=labels)
