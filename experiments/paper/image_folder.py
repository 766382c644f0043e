"""The folder of an image experiment: whose it is, one grid at a time, its images, and the rows that are done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.paper.config import ReproduceConfig
from experiments.paper.image_grid_spec import IMAGE_EXPERIMENTS, ImageRow, Scale
from experiments.paper.image_rows import (
    REFERENCE,
    TRAINING,
    VALIDATION,
    pixels_digest,
    read_json,
    save_array,
    settings_of,
)
from robustdiff.data.dataset import DataError, ImageDataset, load_images
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import NoSuchSplit, UsageError

FORMAT = 1
LOCK, DATA = ".lock", "data/data.json"


def folder_of(config: ReproduceConfig, scale: str) -> Path:
    """Where the experiment goes; nothing is made yet.

    Raises:
        UsageError: If that is a file, or ``--overwrite`` would delete something else than an experiment.
    """
    folder = Path(config.output or f"reproduce/{config.name}-{scale}{'-quick' if config.quick else ''}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: name a folder")
    strange = folder.exists() and set(os.listdir(folder)) - {LOCK} and not (folder / "experiment.json").is_file()
    if config.overwrite and strange:
        raise UsageError(f"--output {folder} holds something else than an experiment: name another folder")
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Keep other grids away from a folder until this one and its commands, which inherit the lock, have ended.

    Yields:
        The lock's file descriptor; None where the system has no such locks.

    Raises:
        UsageError: If another grid is at work.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--output {folder}: another grid is at work there, or its commands are still saving: wait, or name "
                "another folder"
            ) from None
        yield file.fileno()


# -- what is trained on, and judged against ------------------------------------------------------------------


def prepared(folder: Path) -> bool:
    """Whether the folder has its images."""
    return (folder / DATA).is_file()


def read_images(config: ReproduceConfig, scale: Scale) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The images of the experiment by the name of their file, and what they are, for the rows.

    Training images are the first of their split. Reference and validation images are the first of the other split; if
    there is none, or it is too small, they are the last of the training split, which are then not trained on.

    Raises:
        UsageError: If the images cannot be read or are too few.
    """
    print("reading images", flush=True)
    first, second = IMAGE_EXPERIMENTS[config.name]
    training = _load(config, scale, first)
    judged = scale.reference + scale.validation
    other = _other(config, scale, second, judged)
    available = len(training) - (judged if other is None else 0)
    count = min(scale.training, available) if scale.training else available
    if count < scale.batch:
        kept = f"{judged} of them are needed to judge and " if other is None else ""
        raise UsageError(
            f"--data {config.data} has {len(training)} training images: {kept}at least {scale.batch} to "
            "train; give more"
        )
    start = available if other is None else 0
    source = training if other is None else other
    parts: dict[str, Tensor] = {
        TRAINING: training.images[slice(0, count)],
        REFERENCE: source.images[slice(start, start + scale.reference)],
        VALIDATION: source.images[slice(start + scale.reference, start + judged)],
    }
    about = {
        "kind": training.what,
        "judged_on": "the last images of the training split, not trained on" if other is None else other.what,
        **{Path(name).stem: len(images) for name, images in parts.items()},
        **{f"{Path(name).stem}_pixels": pixels_digest(images) for name, images in parts.items()},
    }
    return parts, about


def _load(config: ReproduceConfig, scale: Scale, split: str | None) -> ImageDataset:
    assert config.data is not None
    try:
        return load_images(config.data, split=split, resolution=scale.resolution, channels=scale.channels)
    except NoSuchSplit as error:  # digits, arrays and folders have none
        if split is not None:
            return _load(config, scale, None)
        raise UsageError(f"--data {error}") from None
    except DataError as error:
        raise UsageError(f"--data {error}") from None


def _other(config: ReproduceConfig, scale: Scale, split: str | None, count: int) -> ImageDataset | None:
    """The split that rows are judged against, or None if there is none or it is too small."""
    try:
        found = load_images(str(config.data), split=split, resolution=scale.resolution, channels=scale.channels)
    except NoSuchSplit:
        return None
    except DataError as error:
        raise UsageError(f"--data {error}") from None
    return found if len(found) >= count else None


# -- rows on disk --------------------------------------------------------------------------------------------


def check_claim(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another experiment, or anything else.

    Raises:
        UsageError: Likewise.
    """
    note = folder / "experiment.json"
    if note.is_file():
        found = read_json(note)
        differ = [key for key, value in {"format": FORMAT, **about}.items() if found.get(key) != value]
        if differ:
            raise UsageError(
                f"--output {folder} holds an experiment with another {differ[0]}: name another folder, or add "
                "--overwrite"
            )
    elif folder.is_dir() and set(os.listdir(folder)) - {LOCK, ".experiment.json.tmp"}:
        raise UsageError(f"--output {folder} holds something else than an experiment: name another folder")


def claim(
    folder: Path,
    about: Mapping[str, Any],
    images: tuple[dict[str, Tensor], dict[str, Any]] | None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make the folder this experiment's, with its images; returns what these are.

    Args:
        folder: Locked.
        about: What the experiment is.
        images: As :func:`read_images` gives them, or None if the folder has them.
        overwrite: Delete what it holds first.
    """
    folder.mkdir(parents=True, exist_ok=True)  # without locks, nobody has
    if overwrite:
        for path in folder.iterdir():
            if path.name not in (LOCK, "experiment.json"):  # which says that it is ours, should this be cut off
                atomic_io.remove(path) if path.is_dir() else path.unlink()
    atomic_io.write_json(folder / "experiment.json", {"format": FORMAT, **about})
    for name in ("data", "results", "logs"):
        (folder / name).mkdir(exist_ok=True)
    if images is not None:
        parts, counts = images
        for name, part in parts.items():
            save_array(part, folder / name)
        atomic_io.write_json(folder / DATA, counts)
    else:
        print(f"with the images in {folder / 'data'}, read from {about['data']} before", flush=True)
    return read_json(folder / DATA)


def done(row: ImageRow, scale: Scale, folder: Path) -> dict[str, Any]:
    """Results by seed, as text; empty if there are none.

    Raises:
        UsageError: If the file holds results of other settings, or is damaged.
    """
    path = folder / "results" / f"{row.name}.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    if found.get("settings") != settings_of(row, scale) or not isinstance(found.get("runs"), dict):
        raise UsageError(f"{path} holds results of other settings: delete it, or name another --output")
    runs: dict[str, Any] = found["runs"]
    return runs
