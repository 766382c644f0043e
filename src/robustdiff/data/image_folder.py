"""A dirty copy of an image set on disk, with the truth about it: what ``robustdiff corrupt`` writes."""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import DataError, ImageDataset
from robustdiff.data.decode_pool import progress_bar
from robustdiff.utils import atomic_io
from robustdiff.utils.images import save_png, to_uint8

LONGEST_NAME = 255
"""Bytes that file systems allow in a name."""
MANIFEST_FORMAT = "robustdiff dirty copy 1"


class Poison(Protocol):
    """Dirt that needs a model and a batch, applied last: :class:`robustdiff.attacks.poisoning.Poison`."""

    @property
    def batch_size(self) -> int:
        """Images that it takes at a time."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready account of it."""
        ...

    def hits(self, seed: int, index: int, position: int) -> bool:
        """Whether it hits an image, as :meth:`Corruption.hits`."""
        ...

    def __call__(self, images: Tensor, places: Sequence[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 images (B, C, H, W) with it, and the model's loss at each before and after, (B,)."""
        ...


def write_dirty_copy(
    images: ImageDataset,
    destination: str | Path,
    corruptions: Sequence[Corruption],
    seed: int,
    *,
    overwrite: bool = False,
    poison: Poison | None = None,
) -> dict[str, Any]:
    """Write every image as PNG with its dirt, and ``manifest.json`` with the truth about it.

    Everything goes to a temporary folder beside the destination, renamed at the end: an interrupted call leaves no
    half-written destination.

    Args:
        images: What to copy; an image's index in it is the index of its dirt.
        destination: A new or empty folder.
        corruptions: Applied in this order.
        seed: Seed of the experiment.
        overwrite: Replace the destination, if it is itself a dirty copy.
        poison: Applied last, to the images as they would be written without it.

    Returns:
        The manifest. ``images[i]["corruptions"]`` lists the places (from 0) in ``corruptions`` of those that hit;
        with a poison, ``images[i]["poison"]`` is false, or the loss before and after.

    Raises:
        DataError: If the destination is not empty, or a name points outside it.
    """
    folder = check_destination(images.source, destination, overwrite=overwrite)
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "seed": seed,
        "corruptions": [str(corruption) for corruption in corruptions],
        "range": "parameters refer to pixels in [-1, 1], v / 127.5 - 1 for v in 0..255",
        "written": "clipped to [-1, 1] and rounded to 8 bit: noise beyond the range is cut off in these files",
        "clean": images.describe(),
        "images": [
            {
                "index": index,
                "source": images.names[index],
                "file": file,
                "corruptions": [place for place, c in enumerate(corruptions) if c.hits(seed, index, place)],
            }
            for index, file in enumerate(png_names(images.names))
        ],
    }
    pictures: Iterator[Tensor] = (to_uint8(corrupt(images.x0(i), corruptions, seed, i)[0]) for i in range(len(images)))
    if poison is not None:
        entries = manifest.pop("images")
        manifest |= {"poison": poison.describe(), "images": entries}  # the long list last
        pictures = _poisoned(pictures, manifest["images"], poison, seed, len(corruptions))
    what, least = ("writing", 1000) if poison is None else ("poisoning", 0)
    write_copy(folder, manifest, progress_bar(pictures, len(images), what, least))
    return manifest


def _poisoned(
    pictures: Iterator[Tensor], entries: Sequence[dict[str, Any]], poison: Poison, seed: int, position: int
) -> Iterator[Tensor]:
    """The pictures with their poison, told to their entries in the manifest."""
    for start in range(0, len(entries), poison.batch_size):
        batch = entries[start : start + poison.batch_size]
        out = list(itertools.islice(pictures, len(batch)))
        hit = [i for i, entry in enumerate(batch) if poison.hits(seed, entry["index"], position)]
        for entry in batch:
            entry["poison"] = False
        if hit:
            pushed, before, after = poison(torch.stack([out[i] for i in hit]), [batch[i]["index"] for i in hit], seed)
            for i, image, *losses in zip(hit, pushed, before.tolist(), after.tolist(), strict=True):
                out[i] = image
                batch[i]["poison"] = {"loss_before": losses[0], "loss_after": losses[1]}
        yield from out


def write_copy(folder: Path, manifest: Mapping[str, Any], pictures: Iterable[Tensor]) -> None:
    """Write PNGs and ``manifest.json``: to a temporary folder beside ``folder``, renamed at the end.

    Args:
        folder: New or empty, or one that may be replaced (:func:`check_destination`).
        manifest: Names each picture's ``file`` in ``images``.
        pictures: uint8 (C, H, W), one after the other, in that order.
    """
    with atomic_io.new_folder(folder) as unfinished:
        for entry, picture in zip(manifest["images"], pictures, strict=True):
            path = unfinished / entry["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(picture, path)
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def check_destination(
    source: str, destination: str | Path, *, overwrite: bool, written: str = MANIFEST_FORMAT, what: str = "a dirty copy"
) -> Path:
    """Where a copy goes.

    Args:
        source: What is copied.
        destination: As the user wrote it.
        overwrite: Whether a folder whose manifest is of the same format may be replaced.
        written: That format.
        what: What such a folder is called in messages.

    Raises:
        DataError: If it is not empty, no folder, or inside the source.
    """
    folder, clean = Path(destination).expanduser().absolute(), Path(source).expanduser()
    if source != "digits" and clean.is_dir() and clean.resolve() in folder.resolve().parents:
        raise DataError(f"{destination}: lies inside {source}, whose images it would join; choose another destination")
    if not os.path.lexists(folder):
        return folder
    if folder.is_symlink() or not folder.is_dir():
        raise DataError(f"{destination}: exists and is not a folder; choose another destination")
    if any(folder.iterdir()):
        if not overwrite:
            raise DataError(f"{destination}: not empty; choose another, or replace {what} with `overwrite`")
        try:
            ours = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["format"] == written
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            ours = False
        if not ours:  # never delete somebody's photographs
            raise DataError(f"{destination}: not {what}, so `overwrite` spares it; remove it yourself")
    return folder


def png_names(names: Sequence[str]) -> list[str]:
    """The same relative names with .png.

    Of several that would share one, ``a.bmp``, ``a.jpg`` and ``a.png``, only that which is a PNG has it; the others
    keep their suffix, ``a.bmp.png``: whoever pairs files by name compares the same picture. Names that a file system
    would not take are cut.

    Raises:
        DataError: If a name points elsewhere.
    """
    paths = [PurePosixPath(name) for name in names]
    outside = next((str(path) for path in paths if path.is_absolute() or ".." in path.parts), None)
    if outside is not None:
        raise DataError(f"image name {outside!r} points outside the destination")
    wanted = Counter(_key(path.with_suffix(".png")) for path in paths)
    taken: set[str] = set()
    files: dict[int, str] = {}
    alone = [wanted[_key(path.with_suffix(".png"))] == 1 or path.suffix.lower() == ".png" for path in paths]
    for place in sorted(range(len(paths)), key=lambda place: not alone[place]):
        path = paths[place]
        file = _shortened(path.with_suffix(".png") if alone[place] else path.with_name(f"{path.name}.png"))
        while _key(file) in taken:
            path = path.with_name(f"{path.name}.png")
            file = _shortened(path)
        taken.add(_key(file))
        files[place] = str(file)
    return [files[place] for place in range(len(paths))]


def _key(path: PurePosixPath) -> str:
    """What two names share that are one on file systems that ignore case."""
    return str(path).casefold()


def _shortened(path: PurePosixPath) -> PurePosixPath:
    """A name of at most 255 bytes; one that is cut ends in a digest of the whole, so that it stays its own."""
    name = os.fsencode(path.name)
    if len(name) <= LONGEST_NAME:
        return path
    mark = f"~{zlib.crc32(name):08x}.png"
    return path.with_name(name[: LONGEST_NAME - len(mark)].decode(errors="ignore") + mark)
