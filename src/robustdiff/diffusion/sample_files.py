"""What ``robustdiff sample`` does: draw images on all processes, and write them whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor

from robustdiff.diffusion.config import SampleConfig
from robustdiff.diffusion.pipeline import (
    load_pipeline,
    make_scheduler,
    sample,
    to_uint8,
    without_accelerator,
)
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import image_grid, save_png
from robustdiff.utils.progress import progress
from robustdiff.utils.resources import check_launcher
from robustdiff.utils.words import counted


def sample_to_files(config: SampleConfig) -> str:
    """Draw images as ``robustdiff sample`` does, on all processes under accelerate, and write them.

    Returns:
        One line that says what was written, on the main process; nothing on the others.

    Raises:
        UsageError: If the pipeline, a setting or the output cannot be used.
    """
    config.validate()
    check_launcher()
    output = _output_path(config)
    pipeline = load_pipeline(config.run)
    labels = class_labels(config, pipeline.unet.config["num_class_embeds"])
    make_scheduler(config.scheduler, pipeline.scheduler, config.steps)
    everything = draw(config, pipeline, labels)
    if everything is None:
        return ""
    archive = output.suffix == ".npz"
    staging = output.with_name(f".{output.name}.tmp" + (".npz" if archive else ""))
    atomic_io.remove(staging)
    try:
        if archive:
            output.parent.mkdir(parents=True, exist_ok=True)
            images = everything.permute(0, 2, 3, 1).numpy()
            if labels is None:
                np.savez(staging, images=images)
            else:
                np.savez(staging, images=images, labels=np.array(labels))
            atomic_io.fsync_file(staging)
            staging.replace(output)
            return f"{config.output or output}: {counted(config.n, 'image')}, uint8, (N, H, W, C)"
        staging.mkdir(parents=True)
        for i, image in enumerate(everything):
            save_png(image, staging / f"{i:06d}.png")
        save_png(image_grid(everything[:256]), staging / "grid.png")
        atomic_io.replace_folder(staging, output)
    finally:  # half of it helps nobody, and a full disk needs the room
        atomic_io.remove(staging)
    return f"{config.output or output}: {counted(config.n, 'image')} and grid.png"


def draw(config: SampleConfig, pipeline: DiffusionPipeline, labels: Sequence[int] | None) -> Tensor | None:
    """Draw images on all processes, and say how far the first one is.

    Args:
        config: How many, from which seed, by which sampler.
        pipeline: Moved to this process's device.
        labels: The class of each image, for class-conditional pipelines (:func:`class_labels`).

    Returns:
        uint8 (n, C, H, W) on the main process, None on the others.
    """
    state = PartialState(cpu=without_accelerator())
    pipeline.unet.to(state.device)
    with (
        state.split_between_processes(list(range(config.n))) as mine,
        progress("drawing", len(mine), "image", shown=state.is_main_process) as tell,
    ):
        images = sample(
            pipeline,
            mine,
            seed=config.seed,
            scheduler=config.scheduler,
            steps=config.steps,
            batch_size=config.batch_size,
            sigma_scale=config.relabel,
            sigma_floor=config.sigma_floor,
            floor_shape=config.floor_shape,
            class_labels=None if labels is None else [labels[i] for i in mine],
            progress=tell,
        )
    parts = gather_object([to_uint8(images)])
    return torch.cat(parts) if state.is_main_process else None


_SAMPLE = re.compile(r"\d{6,}\.png|grid\.png")
"""What ``sample`` writes into a folder, and all that ``overwrite`` may delete."""


def _output_path(config: SampleConfig) -> Path:
    """Where images go; refuses what is there already."""
    changed = f"-relabel{config.relabel:g}" if config.relabel != 1 else ""
    shape = "" if config.floor_shape == "hard" else f"-{config.floor_shape}"
    changed += f"-floor{config.sigma_floor:g}{shape}" if config.sigma_floor else ""
    changed += "" if config.class_label is None else f"-class-{re.sub(r'[^0-9A-Za-z._-]', '_', config.class_label)}"
    name = f"{config.scheduler}-{config.steps}-seed{config.seed}{changed}"
    if config.output:
        output = Path(config.output).resolve()
    else:
        output = Path(config.run) / "samples" / name if Path(config.run).is_dir() else Path("samples") / name
    if output.suffix == ".npz":
        occupied = output.exists()
    else:
        occupied = output.is_file() or (output.is_dir() and any(output.iterdir()))
    if occupied and not config.overwrite:
        raise UsageError(f"`output` {output} exists: name another, or add `overwrite`")
    if there := atomic_io.read_only(output.parent):  # where it is made ready
        raise UsageError(f"`output` {output}: {there} is read-only: name another place")
    if output.is_dir() and os.path.ismount(output):
        raise UsageError(f"`output` {output} is where a disk is mounted: name a folder in it")
    if occupied and output.is_dir() and not all(_SAMPLE.fullmatch(path.name) for path in output.iterdir()):
        raise UsageError(f"`output` {output} holds other files than samples: name another folder")
    return output


def class_labels(config: SampleConfig, classes: int | None) -> list[int] | None:
    """The class of each image, those that were trained in turn if none is named; None for an unconditional pipeline."""
    if classes is None:
        if config.class_label is not None:
            raise UsageError(f"`class_label`: {config.run} is not class-conditional")
        return None
    trained = trained_classes(config.run, classes)
    if config.class_label is None:
        return in_turn(trained, config.n)
    names, label = class_names(config.run), str(config.class_label)
    if label in names:
        number = names.index(label)
    elif label.isdecimal() and int(label) < classes and not any(name.isdecimal() for name in names):
        number = int(label)
    else:
        known = [f"one of {', '.join(names[:20])}"] if names else []
        if not any(name.isdecimal() for name in names):  # such names are no numbers of classes
            known.insert(0, f"in 0 .. {classes - 1}")
        raise UsageError(f"`class_label` {config.class_label} is not {', nor '.join(known)}")
    if number not in trained:
        there = ", ".join(names[one] if one < len(names) else str(one) for one in trained[:20])
        raise UsageError(
            f"`class_label` {label}: {config.run} was trained on no image of that class: give one of {there}"
        )
    return [number] * config.n


def in_turn(classes: Sequence[int], n: int) -> list[int]:
    """The class of each of ``n`` images, one class after the other."""
    return [classes[i % len(classes)] for i in range(n)]


def class_names(run: str) -> list[str]:
    """Names of the classes, in the order of their numbers, if ``run`` is a run folder that knows them."""
    account = _account(run)
    classes = account["data"].get("classes") if isinstance(account.get("data"), dict) else None
    return [str(name) for name in classes] if isinstance(classes, dict | list) else []


def trained_classes(run: str, classes: int) -> list[int]:
    """Numbers of the classes that ``run`` was trained on; all of ``classes`` if it does not say."""
    account = _account(run)
    trained = account.get("trained_classes")
    if not isinstance(trained, list):  # a run of before there was the list
        counts = account["data"].get("classes") if isinstance(account.get("data"), dict) else None
        trained = [i for i, n in enumerate(counts.values()) if n != 0] if isinstance(counts, dict) else []
    return [i for i in trained if isinstance(i, int) and 0 <= i < classes] or list(range(classes))


def class_counts(run: str, classes: int) -> dict[int, int]:
    """How many images of each class ``run`` was trained on, by number; empty if it does not say."""
    account = _account(run)
    counts = account["data"].get("classes") if isinstance(account.get("data"), dict) else None
    found = list(counts.values()) if isinstance(counts, dict) else []
    known = all(isinstance(count, int) and count >= 0 for count in found)
    return dict(enumerate(found[:classes])) if known and any(found[:classes]) else {}


def _account(run: str) -> dict[str, Any]:
    """``data.json`` of a run folder; empty for another program's pipeline, which knows classes by number only."""
    try:
        account = json.loads((Path(run) / "data.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return account if isinstance(account, dict) else {}
