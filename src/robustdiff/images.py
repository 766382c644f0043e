"""Image sets: a folder, an array file or the built-in digits -> 8-bit images in memory.

Nothing is dropped in silence: what cannot be read is skipped with its name and the reason, what was converted is
counted, and too many bad files are an error.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from robustdiff import decoding
from robustdiff.config import UsageError
from robustdiff.corruption import from_uint8
from robustdiff.decoding import Pixels

SIDE_CARS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".html", ".db", ".ini")
"""Suffixes of files that commonly lie beside images; they are counted, neither opened nor named."""
CHUNK = 256
"""Files decoded at a time: bounds what waits in memory beside the array that is being filled."""

T = TypeVar("T")


class DataError(UsageError):
    """The user's data cannot be used; one line that says why and what to do."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """8-bit images in memory, and what happened on the way there.

    Attributes:
        source: What was asked for, as the user wrote it.
        images: uint8, shape (N, C, H, W), C = 1 or 3.
        names: One per image: the path relative to the folder with ``/``, or a zero-padded number.
        skipped: (name, reason) of every file that was not read.
        notes: How many images were converted, by kind of conversion, and how many side-car files were ignored.
    """

    source: str
    images: Tensor
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: Mapping[str, int]

    def __len__(self) -> int:
        """How many images."""
        return len(self.images)

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.images.shape[2], self.images.shape[3]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The folders of the first level, sorted, if every image lies in one of them; else none."""
        tops = {top if slash else "" for top, slash, _ in (name.partition("/") for name in self.names)}
        return () if "" in tops else tuple(sorted(tops))

    @cached_property
    def labels(self) -> Tensor | None:
        """Each image's place in :attr:`classes`, int64, shape (N,); None without classes."""
        place = {name: number for number, name in enumerate(self.classes)}
        return torch.tensor([place[name.partition("/")[0]] for name in self.names]) if place else None

    @property
    def bytes(self) -> int:
        """Memory taken by the pixels."""
        return self.images.nbytes

    def x0(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One image (C, H, W), or several (B, C, H, W): float32 in [-1, 1], ``v / 127.5 - 1``."""
        return from_uint8(self.images[index])

    def describe(self) -> dict[str, Any]:
        """JSON-ready account for ``data.json``; the digest is SHA-256 over the pixel bytes in (N, C, H, W) order."""
        return {
            "source": self.source,
            "count": len(self),
            "size": list(self.size),
            "channels": self.channels,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "conversions": dict(self.notes),
            "sha256": hashlib.sha256(self.images.contiguous().numpy().data).hexdigest(),
        }


def load_images(
    source: str | Path,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    max_bad_fraction: float = 0.01,
) -> ImageSet:
    """Read a set of images.

    Args:
        source: A folder (searched recursively, in the order of the relative paths, hidden files ignored); an ``.npy``
            or ``.npz`` file of uint8 images; or the word ``digits`` (``./digits`` is a folder of that name).
        resolution: Make every image square: the shorter side is resized to this many pixels (Lanczos, antialiased) and
            the centre is cropped. Default: leave sizes alone; they must then be equal.
        channels: 1 (grey) or 3 (RGB). Default: 1 if every readable image is grey by its mode, else 3.
        max_bad_fraction: Stop if more than ``max(1, max_bad_fraction * N)`` of the N image files cannot be read: one
            bad file never stops a small folder, unless this is 0. Files that are no images do not count.

    Raises:
        DataError: In one line, if the source or an option cannot be used.
    """
    if resolution is not None and resolution < 1:
        raise DataError(f"--resolution must be at least 1, got {resolution}")
    if channels not in (None, 1, 3):
        raise DataError(f"--channels must be 1 (grey) or 3 (RGB), got {channels}")
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"--max-bad-fraction must be in [0, 1], got {max_bad_fraction}")
    try:
        if source == "digits":
            return _from_array("digits", _digits(), resolution, channels)
        path = Path(source).expanduser()
        if path.is_dir():
            return _from_folder(str(source), path, resolution, channels, max_bad_fraction)
        if path.is_file() and path.suffix.lower() in (".npy", ".npz"):
            return _from_array(str(source), _read_array(path), resolution, channels)
        if os.path.exists(path):
            raise DataError("neither a folder nor an .npy or .npz file; to use an image, give the folder it is in")
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" (did you mean {path.parent / near[0]}?)" if near else ""
        raise DataError(f"no such file or folder{hint}; give a folder, an .npy or .npz file, or the word digits")
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    except PermissionError:
        raise DataError(f"{source}: no permission to read it") from None
    except MemoryError:
        raise DataError(f"{source}: the images do not fit in memory; make them smaller with --resolution N") from None


# -- a folder ----------------------------------------------------------------------------------------


def _from_folder(
    source: str, folder: Path, resolution: int | None, channels: int | None, max_bad_fraction: float
) -> ImageSet:
    found, skipped, side_cars = _scan(folder)
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Pillow's bomb warning is replaced by the check in decoding.guarded; its remarks on metadata concern nobody.
        warnings.filterwarnings("ignore", module="PIL")

        # -- headers only: channels, sizes and most bad files are known before anything large is decoded
        names: list[str] = []
        modes: set[str] = set()
        sizes: Counter[tuple[int, ...]] = Counter()
        for name, (header, reason) in _in_chunks(
            pool, partial(decoding.guarded, decoding.header, folder), found, "headers"
        ):
            if header is None:
                skipped.append((name, reason))
            else:
                names.append(name)
                modes.add(header[0])
                sizes[header[1]] += 1
        bad = [item for item in skipped if decoding.is_image_name(item[0])]
        if not names:
            reasons = Counter(reason for _, reason in skipped) + Counter({"side-car file": side_cars})
            counted = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(4))
            raise DataError(f"no readable image; found {counted}")
        total = len(bad) + len(names)
        limit = _check_bad(bad, total, max_bad_fraction)
        # A few files that may yet turn out unreadable must not decide about sizes: only clear cases stop here.
        if resolution is None and len(names) - max(sizes.values()) > limit:
            raise _mixed_sizes(sizes)

        # -- pixels
        target = channels or (1 if all(map(decoding.is_grey, modes)) else 3)
        pixels: Pixels | None = None
        kept: list[str] = []
        notes: Counter[str] = Counter()
        sizes, any_colour = Counter(), False
        decode = partial(decoding.guarded, partial(decoding.decode, channels=target, resolution=resolution), folder)
        for name, (decoded, reason) in _in_chunks(pool, decode, names, "decoding"):
            if decoded is None:
                skipped.append((name, reason))
                bad.append((name, reason))
                _check_bad(bad, total, max_bad_fraction)
                continue
            image, grey, remarks = decoded
            sizes[image.shape[:0:-1]] += 1
            if len(sizes) > 1:
                continue  # certain to be an error: only the counting for its message goes on
            if pixels is None:
                pixels = np.empty((len(names), *image.shape), np.uint8)
            pixels[len(kept)] = image
            kept.append(name)
            notes.update(remarks)
            any_colour |= not grey
    if len(sizes) > 1:
        raise _mixed_sizes(sizes)
    if pixels is None:
        raise DataError(f"no readable image; {bad[0][0]}: {bad[0][1]}")
    if channels is None and target == 3 and not any_colour:  # the only colour files were unreadable ones
        pixels = np.ascontiguousarray(pixels[:, :1])
        del notes["grey expanded to RGB"]
    if side_cars:
        notes["side-car files ignored (not images)"] = side_cars
    images = torch.from_numpy(pixels[: len(kept)])
    return ImageSet(source, images, tuple(kept), tuple(sorted(skipped)), dict(notes))


def _scan(folder: Path) -> tuple[list[str], list[tuple[str, str]], int]:
    """Relative POSIX paths of the files to try, sorted; what is skipped at sight; the number of side-car files."""
    found: list[str] = []
    skipped: list[tuple[str, str]] = []
    side_cars = 0
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        skipped.append((Path(error.filename).relative_to(folder).as_posix(), f"folder not read: {error.strerror}"))

    for directory, subfolders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(directory, file) for file in files if not file.startswith(".")):
            name = path.relative_to(folder).as_posix()
            if path.suffix.lower() in SIDE_CARS:
                side_cars += 1
            elif path.is_file():
                found.append(name)
            else:  # opening a pipe would wait for ever
                skipped.append((name, "broken symbolic link" if path.is_symlink() else "not a regular file"))
    if not (found or skipped or side_cars):
        raise DataError("the folder is empty (hidden files are ignored)")
    return sorted(found), skipped, side_cars


def _in_chunks(
    pool: ThreadPoolExecutor, work: Callable[[str], T], names: Sequence[str], what: str
) -> Iterator[tuple[str, T]]:
    """(name, work(name)) in order, computed by threads a chunk at a time."""
    starts = range(0, len(names), CHUNK)
    results = (result for start in starts for result in pool.map(work, names[start : start + CHUNK]))
    yield from zip(names, progress_bar(results, len(names), what), strict=True)


def progress_bar(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """``items``, with a progress bar where it is worth one: many items, on a terminal."""
    return tqdm(items, what, total, unit="file") if total > 1000 and sys.stderr.isatty() else items


def _check_bad(bad: Sequence[tuple[str, str]], total: int, max_bad_fraction: float) -> float:
    """The number of bad files that is allowed.

    Raises:
        DataError: If there are more.
    """
    limit = max(1.0, max_bad_fraction * total) if max_bad_fraction else 0.0
    if len(bad) > limit:
        example = f"{bad[0][0]} ({bad[0][1]})"
        raise DataError(
            f"{len(bad)} of {total} image files cannot be read, for example {example}; remove them, or raise "
            f"--max-bad-fraction (now {max_bad_fraction:g})"
        )
    return limit


def _mixed_sizes(sizes: Counter[tuple[int, ...]]) -> DataError:
    (width, height), count = sizes.most_common(1)[0]
    return DataError(
        f"images of {len(sizes)} different sizes (the commonest: {width} x {height}, {count} times); use "
        "--resolution N (the shorter side is resized to N, the centre is cropped)"
    )


# -- arrays ------------------------------------------------------------------------------------------


def _read_array(path: Path) -> NDArray[Any]:
    try:
        if path.suffix.lower() == ".npy":  # mapped: read once, when its header has been found usable
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if "images" not in arrays.files and len(arrays.files) != 1:
                keys = ", ".join(arrays.files) or "none"
                raise DataError(f"needs an array named images, or a single array; it has {keys}")
            return np.asarray(arrays["images" if "images" in arrays.files else arrays.files[0]])
    except (DataError, MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files raise many types
        raise DataError(
            f"cannot be read as an array ({decoding.reason(error)}); save uint8 images with numpy.save"
        ) from None


def _digits() -> NDArray[Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("scikit-learn is not installed: pip install 'robustdiff[digits]'") from None
    return np.round(np.asarray(load_digits().images) * (255 / 16)).astype(np.uint8)


def _from_array(source: str, array: NDArray[Any], resolution: int | None, channels: int | None) -> ImageSet:
    array = _channels_last(array)
    count, height, width, own = array.shape
    target = channels or own
    notes: Counter[str] = Counter()
    if target == own and resolution in (None, height) and resolution in (None, width):
        pixels = np.array(array.transpose(0, 3, 1, 2), order="C")  # a copy: the file may change under a mapped array
    else:
        pixels = np.empty((count, target, resolution or height, resolution or width), np.uint8)
        for index, image in enumerate(array):
            remarks: list[str] = []
            pixels[index] = decoding.fit(
                Image.fromarray(image[..., 0] if own == 1 else image), target, resolution, remarks
            )
            notes.update(remarks)
    names = tuple(f"{index:0{len(str(count - 1))}d}" for index in range(count))
    return ImageSet(source, torch.from_numpy(pixels), names, (), dict(notes))


def _channels_last(array: NDArray[Any]) -> Pixels:
    """View of shape (N, H, W, C).

    Raises:
        DataError: If it is not uint8, is empty, or its axes cannot be told apart.
    """
    if array.dtype != np.uint8:
        how = "x.astype(numpy.uint8) if the values are whole numbers in 0..255"
        if np.issubdtype(array.dtype, np.floating):
            how = "numpy.uint8(numpy.round(s)) with s = 127.5 * (x + 1) for x in [-1, 1], 255 * x for x in [0, 1]"
        raise DataError(f"holds {array.dtype}, needs uint8; convert it with {how}")
    if array.size == 0:
        raise DataError(f"holds no image, its shape is {array.shape}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):  # else it may as well be one image (H, W, C)
        return array[..., None]
    if array.ndim == 4:
        last, first = array.shape[3] in (1, 3), array.shape[1] in (1, 3)
        if last != first:
            return array if last else array.transpose(0, 2, 3, 1)
    layouts = "(N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3"
    raise DataError(f"shape {array.shape} is ambiguous or unknown; needs {layouts}")


# -- writing ----------------------------------------------------------------------------------------


def save_png(image: Tensor, path: str | Path) -> None:
    """Write one image, uint8 of shape (C, H, W) with C = 1 or 3, as PNG."""
    pixels = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path, "PNG")
