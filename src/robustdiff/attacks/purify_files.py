"""What ``robustdiff purify`` does: every image of a set, purified, into a folder with a manifest; all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from robustdiff import __version__
from robustdiff.attacks.config import PurifyConfig
from robustdiff.attacks.purification import purify
from robustdiff.data.dataset import ImageDataset
from robustdiff.data.decode_pool import progress_bar
from robustdiff.data.image_folder import check_destination, png_names, write_copy
from robustdiff.data.match_model import labels_for, load_fitting
from robustdiff.diffusion.pipeline import (
    load_pipeline,
    trajectory_of,
    weights_sha256,
    without_accelerator,
)
from robustdiff.diffusion.samplers import trailing
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import to_uint8
from robustdiff.utils.random import place_generators
from robustdiff.utils.resources import check_launcher, processes
from robustdiff.utils.words import counted

MANIFEST_FORMAT = "robustdiff purified 1"


def purify_to_files(config: PurifyConfig) -> dict[str, Any]:
    """Purify images as ``robustdiff purify`` does, and write them.

    Returns:
        The manifest.

    Raises:
        UsageError: If the pipeline, a setting or the output cannot be used, or the two do not fit.
        DataError: If the images cannot be read.
    """
    config.validate()
    check_launcher()
    if processes() > 1:
        raise UsageError("purify runs in one process: start it without a launcher")
    output = str(config.output)
    folder = check_destination(
        config.data, output, overwrite=config.overwrite, written=MANIFEST_FORMAT, what="a folder of purified images"
    )
    if there := atomic_io.read_only(folder.parent):
        raise UsageError(f"`output` {output}: {there} is read-only: name another place")
    pipeline: Any = load_pipeline(config.model)
    levels = max(1, round(config.strength * pipeline.scheduler.config.num_train_timesteps))
    timesteps = trailing(levels, min(config.steps, levels))
    trajectory_of(pipeline, config.scheduler, timesteps=timesteps)  # says what does not fit before images are read
    images = load_fitting(
        config.data,
        pipeline,
        config.model,
        config.resolution,
        max_bad_fraction=config.max_bad_fraction,
        max_memory=None if config.max_memory_gib is None else int(config.max_memory_gib * 2**30),
        split=config.split,
        config=config.dataset_config_name,
        image_column=config.image_column,
        label_column=config.label_column,
        value_range=config.value_range,
    )
    labels = labels_for(images, pipeline, config.model)
    if labels is None and config.label_column is not None:
        raise UsageError(f"`label_column` does nothing: {config.model} is not class-conditional; leave it out")
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "model": config.model,
        "weights_sha256": weights_sha256(pipeline),
        "strength": config.strength,
        "scheduler": config.scheduler,
        "steps": len(timesteps),
        "timesteps": timesteps,
        "seed": config.seed,
        "written": "clipped to [-1, 1] and rounded to 8 bit",
        "source": images.describe(),
        "versions": {"robustdiff": __version__, "torch": torch.__version__},
        "images": [
            {"index": index, "source": name, "file": file} | ({} if labels is None else {"class": int(labels[index])})
            for index, (name, file) in enumerate(zip(images.names, png_names(images.names), strict=True))
        ],
    }
    pipeline.unet.to(PartialState(cpu=without_accelerator()).device)
    pictures = purified(images, pipeline, labels, config)
    write_copy(folder, manifest, progress_bar(pictures, len(images), "purifying", least=0))
    return manifest


def purified(
    images: ImageDataset,
    pipeline: Any,  # noqa: ANN401 - pipelines share no typed base with a network
    labels: Tensor | None,
    config: PurifyConfig,
) -> Iterator[Tensor]:
    """Every image after :func:`robustdiff.attacks.purify`, uint8 (C, H, W), in order.

    Image i draws from its own generator, a function of the seed and i, whatever the batch size.

    Args:
        images: Of the pipeline's size.
        pipeline: On the device where it is to run.
        labels: Shape (N,), for class-conditional pipelines.
        config: Strength, steps, scheduler, seed, batch size.

    Raises:
        UsageError: If the pipeline gives values that are not finite.
    """
    for start in range(0, len(images), config.batch_size):
        places: Sequence[int] = range(start, min(start + config.batch_size, len(images)))
        with torch.no_grad():
            batch = purify(
                images.x0(slice(places[0], places[-1] + 1)),
                pipeline,
                config.strength,
                steps=config.steps,
                sampler=config.scheduler,
                generator=place_generators("purified", config.seed, places),
                class_labels=None if labels is None else labels[start : places[-1] + 1].to(pipeline.unet.device),
            )
        if not bool(torch.isfinite(batch).all()):
            raise UsageError(f"{config.model} makes values of images that are not finite: name another model")
        yield from to_uint8(batch)


def summary(manifest: dict[str, Any], output: str | Path) -> str:
    """One line that says what was written."""
    settings = f"{manifest['scheduler']}, {manifest['steps']} steps from timestep {manifest['timesteps'][0]}"
    purified = counted(len(manifest["images"]), "image")
    return f"{output}: {purified} purified by {manifest['model']} ({settings}; see manifest.json)"
