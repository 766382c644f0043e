"""Image sets: any source -> 8-bit images, held in memory or decoded again at every access.

Nothing is dropped in silence: what cannot be read is skipped with its name and the reason, what was converted is
counted, and too many bad files are an error.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustdiff.data import decode
from robustdiff.data.decode import Pixels
from robustdiff.data.decode_pool import in_parallel
from robustdiff.data.doubts import Doubts
from robustdiff.data.sources.folder import first_level
from robustdiff.data.sources.open import Source, open_source
from robustdiff.utils.errors import DataError
from robustdiff.utils.images import from_uint8
from robustdiff.utils.resources import free_memory, processes_here

__all__ = ["DataError", "ImageDataset", "StreamedImages", "load_images"]

# -- the noun ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images too many for memory: decoded at every access, the same pixels each time.

    Indexed like a uint8 tensor of shape (N, C, H, W), by its first axis only.

    Attributes:
        source: Where they come from.
        places: Place of each image in the source, int64, shape (N,).
        checks: CRC-32 of each image's pixels, uint32, shape (N,).
        shape: (N, C, H, W).
        resolution: As asked for; None leaves sizes alone.
        sha256: Digest of the pixels, taken when all were decoded once.
    """

    source: Source
    places: np.ndarray[Any, np.dtype[np.int64]]
    checks: np.ndarray[Any, np.dtype[np.uint32]]
    shape: tuple[int, int, int, int]
    resolution: int | None
    sha256: str

    def __len__(self) -> int:
        """How many images."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """What they would take in memory."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One image, uint8 (C, H, W), or several, (B, C, H, W).

        Raises:
            DataError: If an image that could be read when the set was loaded no longer can.
        """
        if isinstance(index, int):
            return torch.from_numpy(self._decode(int(self.places[index]), int(self.checks[index])))
        rows = index.numpy() if isinstance(index, Tensor) else index
        wanted = zip(self.places[rows].tolist(), self.checks[rows].tolist(), strict=True)
        images = [self._decode(place, check) for place, check in wanted]
        return torch.from_numpy(np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8))

    def _decode(self, place: int, check: int) -> Pixels:
        work = partial(_decoder(self.source, self.resolution), channels=self.shape[1])
        with warnings.catch_warnings():  # remarks on metadata were passed over when the set was loaded, too
            warnings.filterwarnings("ignore", module="PIL")
            decoded, reason = decode.guarded(work, self.source.read, place)
        if decoded is not None and decoded[0].shape != self.shape[1:]:
            reason = "another size"
        elif decoded is not None and zlib.crc32(np.ascontiguousarray(decoded[0]).data) != check:
            reason = "other pixels"
        if decoded is None or reason:
            raise DataError(
                f"{self.source.names[place]} changed since the run began: {reason}; restore it and go on with `resume`"
            )
        return np.array(decoded[0], order="C")  # its own: Pillow's may not be written to, of which torch warns


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """8-bit images, and what happened on the way there.

    Attributes:
        source: What was asked for, as the user wrote it.
        images: uint8, shape (N, C, H, W), C = 1 or 3; in memory, or streamed.
        names: One per image: the path relative to the folder with ``/``, or a zero-padded number.
        skipped: (name, reason) of every image that was not read.
        notes: How many images were converted, by kind of conversion, and how many side-car files were ignored.
        classes: Names of the classes; none if the images have no labels.
        labels: Each image's place in ``classes``, int64, shape (N,), or None.
        what: The kind of source.
        unlabelled: Why there are no labels, and what would help.
    """

    source: str
    images: Tensor | StreamedImages = field(repr=False)
    names: Sequence[str] = field(repr=False)
    skipped: tuple[tuple[str, str], ...]
    notes: Mapping[str, int]
    classes: tuple[str, ...] = ()
    labels: Tensor | None = field(default=None, repr=False)
    what: str = field(default="array")
    unlabelled: str = field(default="", repr=False)

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

    @property
    def bytes(self) -> int:
        """Size of the pixels: memory taken, or what would be taken."""
        return self.images.nbytes

    @property
    def streamed(self) -> bool:
        """Whether every access decodes anew."""
        return isinstance(self.images, StreamedImages)

    @cached_property
    def sha256(self) -> str:
        """Digest over the pixel bytes in (N, C, H, W) order."""
        if isinstance(self.images, StreamedImages):
            return self.images.sha256
        return hashlib.sha256(self.images.contiguous().numpy().data).hexdigest()

    def x0(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """One image (C, H, W), or several (B, C, H, W): float32 in [-1, 1], ``v / 127.5 - 1``."""
        return from_uint8(self.images[index])

    def describe(self) -> dict[str, Any]:
        """JSON-ready account for ``data.json``."""
        counts = torch.zeros(0) if self.labels is None else torch.bincount(self.labels, minlength=len(self.classes))
        labels = None if self.labels is None else hashlib.sha256(self.labels.numpy().data).hexdigest()
        return {
            "source": self.source,
            "kind": self.what,
            "count": len(self),
            "size": list(self.size),
            "channels": self.channels,
            "classes": dict(zip(self.classes, map(int, counts), strict=True)),
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "conversions": dict(self.notes),
            "sha256": self.sha256,
            "labels_sha256": labels,
        }


# -- from a source -----------------------------------------------------------------------------------


def load_images(
    source: str | Path,
    *,
    resolution: int | None = None,
    channels: int | None = None,
    max_bad_fraction: float = 0.01,
    max_memory: int | None = None,
    **options: str | None,
) -> ImageDataset:
    """Read a set of images.

    Every image is decoded once here, in parallel, whether it is then held or not: so bad ones are known before
    anything starts, and the set is the same either way.

    Args:
        source: What ``open_source`` takes: a folder, an array file, a table, a hub id ...
        resolution: Make every image square: the shorter side is resized to this many pixels (Lanczos, antialiased) and
            the centre is cropped. Default: leave sizes alone; they must then be equal.
        channels: 1 (grey) or 3 (RGB). Default: 1 if every readable image is grey by its mode, else 3.
        max_bad_fraction: Stop if more than ``max(1, max_bad_fraction * N)`` of the N image files cannot be read: one
            bad file never stops a small folder, unless this is 0. Files that are no images do not count.
        max_memory: Hold the pixels if they take at most this many bytes, stream them otherwise. Default: half of the
            memory that is free, divided by the processes of this machine.
        options: ``split``, ``config``, ``image_column``, ``label_column``, ``value_range`` of ``open_source``.

    Warns if what was read is hardly meant so: pixels within a sliver of their range, classes without an image that can
    be read, animations that all begin alike.

    Raises:
        DataError: In one line, if the source or an option cannot be used; NoSuchSplit, which is one, of its splits.
    """
    if resolution is not None and resolution < 1:
        raise DataError(f"`resolution` must be at least 1, got {resolution}")
    if channels not in (None, 1, 3):
        raise DataError(f"`channels` must be 1 (grey) or 3 (RGB), got {channels}")
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"`max_bad_fraction` must be in [0, 1], got {max_bad_fraction}")
    try:
        opened = open_source(source, **options)
        if max_memory is None:  # asked now: an archive is in memory already
            max_memory = free_memory() // 2 // processes_here()
        return _load(str(source), opened, resolution, channels, max_bad_fraction, max_memory)
    except DataError as error:
        raise type(error)(f"{source}: {error}") from None
    except PermissionError:
        raise DataError(f"{source}: no permission to read it") from None
    except MemoryError:
        raise DataError(
            f"{source}: the images do not fit in memory; make them smaller with `resolution` N, or stream them with "
            "`max_memory` 0"
        ) from None


def _load(
    asked: str, source: Source, resolution: int | None, channels: int | None, max_bad_fraction: float, max_memory: int
) -> ImageDataset:
    skipped = list(source.skipped)
    bad = [item for item in skipped if source.what != "folder" or decode.is_image_name(item[0])]

    # -- headers only: channels, sizes and most bad files are known before anything large is decoded
    readable: list[int] = []
    greys: set[bool] = set()
    sizes: Counter[tuple[int, ...]] = Counter()
    look = partial(decode.header, crop=source.crop)
    for place, (header, reason) in in_parallel(source, look, None, "headers", whole=False):
        if header is None:
            skipped.append((source.names[place], reason))
            if _counts_as_image(source, place):
                bad.append(skipped[-1])
        else:
            readable.append(place)
            greys.add(header[0])
            sizes[header[1]] += 1
    if not readable:
        reasons = Counter(reason for _, reason in skipped) + Counter(source.notes)
        counted = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(4))
        raise DataError(f"no readable image; found {counted or 'nothing'}")
    total = len(bad) + len(readable)
    limit = _check_bad(bad, total, max_bad_fraction)
    # A few files that may yet turn out unreadable must not decide about sizes: only clear cases stop here.
    if resolution is None and len(readable) - max(sizes.values()) > limit:
        raise _mixed_sizes(sizes)

    # -- pixels: all are decoded once; what fits is kept
    target = channels or (1 if all(greys) else 3)
    pixels: Pixels | None = None
    digest = hashlib.sha256()
    shape: tuple[int, ...] = ()
    kept: list[int] = []
    checks: list[int] = []
    notes: Counter[str] = Counter()
    sizes, any_colour, doubts = Counter(), False, Doubts(asked, source)
    decoder = partial(_decoder(source, resolution), channels=target)
    for place, (decoded, reason) in in_parallel(source, decoder, readable, "decoding"):
        if decoded is None:
            skipped.append((source.names[place], reason))
            bad.append(skipped[-1])
            _check_bad(bad, total, max_bad_fraction)
            continue
        image, grey, remarks = decoded
        sizes[image.shape[:0:-1]] += 1
        if len(sizes) > 1:
            continue  # certain to be an error: only the counting for its message goes on
        if not kept:
            shape = image.shape
            if len(readable) * image.size <= max_memory:
                pixels = np.empty((len(readable), *shape), np.uint8)
        if pixels is not None:
            pixels[len(kept)] = image
        else:
            image = np.ascontiguousarray(image)
            digest.update(image.data)
            checks.append(zlib.crc32(image.data))
        kept.append(place)
        notes.update(remarks)
        any_colour |= not grey
        doubts.look(image, remarks)
    if len(sizes) > 1:
        raise _mixed_sizes(sizes)
    if not kept:
        raise DataError(f"no readable image; {bad[0][0]}: {bad[0][1]}")
    if channels is None and target == 3 and not any_colour:  # the only colour files were unreadable ones
        return _load(asked, source, resolution, 1, max_bad_fraction, max_memory)
    images: Tensor | StreamedImages
    if pixels is not None:
        images = torch.from_numpy(pixels[: len(kept)])
    else:
        full = (len(kept), shape[0], shape[1], shape[2])
        images = StreamedImages(
            source, np.array(kept), np.array(checks, np.uint32), full, resolution, digest.hexdigest()
        )
    names, notes = tuple(source.names[place] for place in kept), notes + Counter(source.notes)
    classes, labels, why = _labels(source, names, kept, [name for name, _ in bad])
    doubts.say(len(kept), notes, classes, labels)
    return ImageDataset(asked, images, names, tuple(sorted(skipped)), dict(notes), classes, labels, source.what, why)


def _decoder(source: Source, resolution: int | None) -> Callable[..., tuple[Pixels, bool, list[str]]]:
    return partial(decode.decode, resolution=resolution, crop=source.crop, value_range=source.value_range)


def _labels(
    source: Source, names: Sequence[str], kept: Sequence[int], bad: Sequence[str]
) -> tuple[tuple[str, ...], Tensor | None, str]:
    """The source's own labels; for a folder, its first level; or why there are none."""
    classes, labels, why = source.classes, source.labels, source.unlabelled
    if labels is not None:
        labels = [labels[place] for place in kept]
        if None in labels:
            classes, why = (), f"{names[labels.index(None)]} has no label, others have: give it one"
            labels = None
    elif source.what == "folder":
        classes, labels, other = first_level(names, bad)
        why = "" if labels is not None else why or other
    if labels is None:
        return (), None, why or f"{source.what} comes without any"
    return classes, torch.tensor(labels), ""


def _counts_as_image(source: Source, place: int) -> bool:
    """Whether a file that cannot be read is a bad image rather than some other file in the folder."""
    return source.what != "folder" or decode.is_image(source.read(place))


def _check_bad(bad: Sequence[tuple[str, str]], total: int, max_bad_fraction: float) -> float:
    """The number of bad files that is allowed.

    Raises:
        DataError: If there are more.
    """
    limit = max(1.0, max_bad_fraction * total) if max_bad_fraction else 0.0
    if len(bad) > limit:
        example = f"{bad[0][0]} ({bad[0][1]})"
        raise DataError(
            f"at least {len(bad)} of {total} images cannot be read, for example {example}; see them all with "
            f"`robustdiff audit` and remove them, or raise `max_bad_fraction` (now {max_bad_fraction:g})"
        )
    return limit


def _mixed_sizes(sizes: Counter[tuple[int, ...]]) -> DataError:
    (width, height), count = sizes.most_common(1)[0]
    return DataError(
        f"images of {len(sizes)} different sizes (the commonest: {width} x {height}, {count} times); use "
        "`resolution` N (the shorter side is resized to N, the centre is cropped)"
    )


# -- writing -----------------------------------------------------------------------------------------
