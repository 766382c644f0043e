"""What an image set is made of, before anything is trained on it: bad files, duplicates, blank images, noise.

Each image is reduced to its statistics (:func:`measure`) in the thread that decoded it and then dropped, so memory does
not grow with the size of the images. A further estimator is one more pure function of an array, called there. Small
images wait for one another, to be estimated together: alone, threads would wait for one another instead.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustdiff.audit.file_summary import file_lines, file_summary
from robustdiff.audit.single_image_noise import LEVEL, noise_std, noise_stds
from robustdiff.data.dataset import ImageDataset
from robustdiff.data.decode import Pixels
from robustdiff.data.decode_pool import decode_all
from robustdiff.data.file_evidence import FileEvidence
from robustdiff.data.sources.open import Source
from robustdiff.utils.images import thumbnail
from robustdiff.utils.resources import cores
from robustdiff.utils.words import counted, printable

NEAR_CONSTANT = 2 / 255
"""Largest standard deviation, in [0, 1], of every channel of an image that counts as near-constant: two grey levels.
Not the range of values: a dead pixel or a date in a corner would hide a blank image."""
WORST = 20
"""Images on the contact sheet."""
SMALL, TOGETHER, SHAPES = 64 * 64, 64, 64
"""Pixels of images whose noise is estimated together; how many are; of how many shapes some wait at most."""
LIGHT = 2**18
"""Bytes of an image that may be kept: 256 of them are decoded before the first is looked at."""


# -- one image ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What is known about one readable image.

    Attributes:
        index: Its place in the source.
        name: Its name there.
        size: (H, W) in pixels.
        mean: Per channel (1 or 3), in [0, 1].
        std: Per channel, in [0, 1].
        noise: :func:`noise_std`, in units of [-1, 1]; None where the image is too small to say.
        sha256: Of shape and decoded pixels: equal for the same picture in different files.
        flags: ``near-constant`` (every channel's ``std`` is at most 2 / 255), ``duplicate``.
        file: What its file says of itself; None where it is not in one.
    """

    index: int
    name: str
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    noise: float | None
    sha256: str
    flags: tuple[str, ...] = ()
    file: FileEvidence | None = None

    def as_json(self) -> dict[str, Any]:
        """For ``audit.json``: six decimals, the first 16 digits of the sum."""
        return {
            "index": self.index,
            "name": self.name,
            "size": list(self.size),
            "mean": _rounded(self.mean),
            "std": _rounded(self.std),
            "noise": None if self.noise is None else round(self.noise, 6),
            "sha256": self.sha256[:16],
            "flags": list(self.flags),
            **({} if self.file is None else {"file": self.file.as_json()}),
        }


def measure(pixels: Pixels, noise: bool = True) -> ImageRecord:
    """Everything the audit keeps of one image; the caller puts in its index and name.

    Args:
        pixels: uint8, shape (C, H, W).
        noise: Whether to estimate that here.
    """
    height, width = pixels.shape[1:]
    shares = np.array([Image.fromarray(channel).histogram() for channel in pixels]) / (height * width)
    grey = np.arange(256) / 255
    mean = shares @ grey
    std = np.sqrt((shares * (grey - mean[:, None]) ** 2).sum(axis=1))
    level = noise_std(pixels) if noise else math.nan
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return ImageRecord(
        index=-1,
        name="",
        size=(height, width),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        noise=None if math.isnan(level) else level,
        sha256=digest.hexdigest(),
        flags=("near-constant",) if std.max() <= NEAR_CONSTANT + 1e-9 else (),
    )


# -- all images --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SetStatistics:
    """What was found in an image set.

    Attributes:
        data: What was asked for, as the user wrote it.
        what: The kind of source.
        records: One per readable image, in the order of the source.
        unreadable: (name, reason) of every other.
        notes: How many images were converted, by kind of conversion, and what else the source says about itself.
        duplicates: Groups of places in ``records`` whose pixels are equal, each and all in order.
        worst: Places in ``records`` of the noisiest images by estimate, noisiest first, at most twenty.
        thumbnails: Theirs, uint8, shape (len(worst), 3, S, S): the centre, never scaled down, which would hide noise.
        images: The readable images without their labels, if they are of one size and were kept.
    """

    data: str
    what: str
    records: tuple[ImageRecord, ...]
    unreadable: tuple[tuple[str, str], ...]
    notes: Mapping[str, int]
    duplicates: tuple[tuple[int, ...], ...]
    worst: tuple[int, ...]
    thumbnails: Tensor
    images: ImageDataset | None = None

    def summary(self) -> dict[str, Any]:
        """The findings in short, JSON-ready; means and deviations in [0, 1], noise in units of [-1, 1]."""
        sizes = Counter(record.size for record in self.records)
        channels = Counter(len(record.mean) for record in self.records)
        noise = np.array([record.noise for record in self.records if record.noise is not None])
        quantiles = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
        return {
            "count": len(self.records),
            "unreadable": len(self.unreadable),
            "reasons": dict(Counter(reason for _, reason in self.unreadable).most_common()),
            "sizes": [{"size": list(size), "count": count} for size, count in sizes.most_common()],
            "channels": [{"channels": number, "count": count} for number, count in channels.most_common()],
            **self._moments(),
            "duplicates": [[self.records[place].name for place in group] for group in self.duplicates],
            "near_constant": [record.name for record in self.records if "near-constant" in record.flags],
            "noise": {
                "count": len(noise),
                "quantiles": {f"{q:g}": round(float(np.quantile(noise, q)), 6) for q in quantiles if len(noise)},
            },
            "conversions": dict(self.notes),
            "files": file_summary(self.files),
        }

    @property
    def files(self) -> list[FileEvidence]:
        """What the files of the records say of themselves, those that are in one."""
        return [record.file for record in self.records if record.file is not None]

    def _moments(self) -> dict[str, Any]:
        """Mean and standard deviation over all pixels, per channel and overall; grey counts as R = G = B beside RGB."""
        if not self.records:
            return {"mean": [], "std": [], "overall": None}
        channels = max(len(record.mean) for record in self.records)
        weight = np.array([math.prod(record.size) for record in self.records], np.float64)
        weight /= weight.sum()
        means = np.stack([np.broadcast_to(record.mean, channels) for record in self.records])
        stds = np.stack([np.broadcast_to(record.std, channels) for record in self.records])
        mean = weight @ means
        variance = weight @ (stds**2 + (means - mean) ** 2)
        overall = math.sqrt((variance + (mean - mean.mean()) ** 2).mean())
        return {
            "mean": _rounded(mean),
            "std": _rounded(np.sqrt(variance)),
            "overall": {"mean": round(float(mean.mean()), 6), "std": round(overall, 6)},
        }

    def text(self) -> str:
        """The findings for a terminal."""
        found = self.summary()
        sizes = [
            f"{w} x {h} ({counted(n, 'image')})" for (h, w), n in ((e["size"], e["count"]) for e in found["sizes"])
        ]
        more = f", and {len(sizes) - 5} more" if len(sizes) > 5 else ""
        many = counted(found["count"], "image")
        lines = [f"{printable(self.data)}: {many} ({self.what}), {found['unreadable']} not readable"]
        if self.records:
            kinds = [f"{e['channels']} ({counted(e['count'], 'image')})" for e in found["channels"]]
            mean, std = (" ".join(f"{value:.3f}" for value in found[name]) for name in ("mean", "std"))
            overall = found["overall"]
            lines += [
                f"size, width x height: {', '.join(sizes[:5])}{more}",
                f"channels: {', '.join(kinds)}",
                f"mean in [0, 1]: {mean} (overall {overall['mean']:.3f})",
                f"standard deviation: {std} (overall {overall['std']:.3f})",
            ]
        lines += file_lines(found["files"])
        lines += [f"{what}: {count}" for what, count in found["conversions"].items()]
        if self.unreadable:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in found["reasons"].items())
            lines.append(f"not readable: {reasons}")
            lines += _first([f"{printable(name)}: {reason}" for name, reason in self.unreadable])
        groups, blank = found["duplicates"], found["near_constant"]
        lines.append(f"exact duplicates: {sum(map(len, groups))} images in {counted(len(groups), 'group')}")
        lines += _first([_listed(group) for group in groups])
        lines.append(f"near-constant (standard deviation at most 2 of 255 in every channel): {len(blank)}")
        lines += _first([printable(name) for name in blank])
        return "\n".join([*lines, *self._noise_lines(found["noise"]["quantiles"])])

    def _noise_lines(self, quantiles: Mapping[str, float]) -> list[str]:
        if not quantiles:
            return ["noise: no image is large enough to estimate it"]
        values = [record.noise for record in self.records if record.noise is not None]
        quarters = ", ".join(f"{float(q):.0%} {value:.3f}" for q, value in quantiles.items())
        return [
            "noise per image, a blind estimate of sigma in units of [-1, 1] "
            "(too small for JPEG or enlarged images, too large for fine texture and tiny ones)",
            f"  quantiles: {quarters}",
            *_histogram(values),
        ]


def image_statistics(
    source: Source, *, data: str = "", resolution: int | None = None, memory: int = 0
) -> SetStatistics:
    """Look at every image of a source; mixed sizes and bad files are findings, not errors.

    Args:
        source: Where images come from.
        data: What the user calls it, for the report.
        resolution: Make every image square first, as in training. Default: as they are.
        memory: Bytes that may be taken to keep the pixels of images of one size, which saves decoding them again.
    """
    kept = _Kept(memory)
    records: list[ImageRecord] = []
    unreadable = list(source.skipped)
    notes: Counter[str] = Counter()
    same: dict[str, list[int]] = {}
    waiting: dict[tuple[int, ...], list[tuple[int, Pixels]]] = {}
    with ThreadPoolExecutor(cores()) as pool:
        estimates = _Estimates(records, pool)
        for decoded in decode_all(source, partial(_measured, keep=memory > 0), resolution=resolution, what="auditing"):
            if decoded.value is None:
                unreadable.append((decoded.name, decoded.reason))
                continue
            record, small, pixels = decoded.value
            kept.add(pixels)
            same.setdefault(record.sha256, []).append(len(records))
            if small is not None:
                there = waiting.setdefault(small.shape, [])
                there.append((len(records), small))
            records.append(replace(record, index=decoded.index, name=decoded.name, file=decoded.file))
            notes.update(decoded.remarks)
            if small is not None and len(there) == TOGETHER:
                estimates.begin(waiting.pop(small.shape))
            elif len(waiting) > SHAPES:  # of that many sizes few will meet enough others
                for rest in (waiting.pop(shape) for shape in list(waiting)):
                    estimates.begin(rest)
        for rest in waiting.values():
            estimates.begin(rest)
        estimates.settle(0)
    notes.update(source.notes)
    duplicates = tuple(tuple(group) for group in same.values() if len(group) > 1)
    for place in (place for group in duplicates for place in group):
        records[place] = replace(records[place], flags=(*records[place].flags, "duplicate"))
    worst, thumbnails = _worst(source, records, resolution)
    return SetStatistics(
        data or source.what,
        source.what,
        tuple(records),
        tuple(sorted(unreadable)),
        dict(notes),
        duplicates,
        worst,
        thumbnails,
        kept.images(data or source.what, source.what, [record.name for record in records], unreadable, notes),
    )


def _measured(pixels: Pixels, keep: bool) -> tuple[ImageRecord, Pixels | None, Pixels | None]:
    """All but the noise of a small image; its pixels if it is small; its pixels if they may be kept."""
    small, light = pixels[0].size <= SMALL, keep and pixels.nbytes <= LIGHT
    return measure(pixels, noise=not small), pixels if small else None, pixels if light else None


@dataclass
class _Kept:
    """Images of one size, as long as they fit."""

    memory: int
    pixels: list[Pixels] | None = field(default_factory=list)

    def add(self, image: Pixels | None) -> None:
        if image is None or self.pixels is None:
            self.pixels = None
            return
        self.pixels.append(image)
        # Three channels each, if one image has colour; and twice, while they are put into one array.
        fit = 6 * image[0].size * len(self.pixels) <= self.memory
        if not fit or image.shape[1:] != self.pixels[0].shape[1:]:
            self.pixels = None

    def images(
        self, asked: str, what: str, names: Sequence[str], bad: Sequence[tuple[str, str]], notes: Mapping[str, int]
    ) -> ImageDataset | None:
        """As :func:`robustdiff.data.dataset.load_images` would, without labels; None if not kept."""
        if not self.pixels:
            return None
        channels = max(map(len, self.pixels))
        pixels = np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in self.pixels])
        self.pixels = None
        return ImageDataset(asked, torch.from_numpy(pixels), tuple(names), tuple(sorted(bad)), dict(notes), what=what)


@dataclass
class _Estimates:
    """Noise of small images, found while others are decoded."""

    records: list[ImageRecord]
    pool: ThreadPoolExecutor
    running: deque[tuple[list[int], Future[NDArray[np.float64]]]] = field(default_factory=deque)

    def begin(self, images: Sequence[tuple[int, Pixels]]) -> None:
        """Estimate images of one shape, (place, pixels); waits while many are under way, to bound the memory."""
        pixels = np.stack([x for _, x in images])
        self.running.append(([place for place, _ in images], self.pool.submit(noise_stds, pixels)))
        self.settle(2 * cores())

    def settle(self, left: int) -> None:
        """Put estimates into the records until at most so many batches are under way."""
        while len(self.running) > left:
            places, found = self.running.popleft()
            for place, level in zip(places, found.result().tolist(), strict=True):
                self.records[place] = replace(self.records[place], noise=None if math.isnan(level) else level)


def _worst(source: Source, records: Sequence[ImageRecord], resolution: int | None) -> tuple[tuple[int, ...], Tensor]:
    """The noisiest images, decoded once more: keeping pixels of all would take memory."""
    noise = {place: record.noise for place, record in enumerate(records) if record.noise is not None}
    worst = sorted(noise, key=lambda place: (-noise[place], place))[:WORST]
    longest = max((max(records[place].size) for place in worst), default=1)
    side = min(128, max(64, longest))
    indices = [records[place].index for place in worst]
    again = decode_all(
        source, lambda pixels: thumbnail(pixels, side), resolution=resolution, indices=indices, what="thumbnails"
    )
    blank = torch.full((3, side, side), 128, dtype=torch.uint8)  # in place of a file that has gone meanwhile
    pictures = [blank if decoded.value is None else torch.from_numpy(decoded.value) for decoded in again]
    return tuple(worst), torch.stack(pictures) if pictures else torch.empty(0, 3, side, side, dtype=torch.uint8)


# -- words -------------------------------------------------------------------------------------------


def _rounded(values: Sequence[float] | NDArray[Any]) -> list[float]:
    return [round(float(value), 6) for value in values]


def _listed(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return " = ".join(map(printable, names[:limit])) + more


def _first(lines: Sequence[str], limit: int = 5) -> list[str]:
    """The first few, indented, and how many more there are."""
    more = [f"  and {len(lines) - limit} more"] if len(lines) > limit else []
    return [f"  {line}" for line in lines[:limit]] + more


def _histogram(values: Sequence[float], width: int = 40) -> list[str]:
    """Bars of ``#`` over steps of 1, 2 or 5 times a power of ten; the last step takes the largest per cent as well."""
    reach = max(float(np.quantile(values, 0.99)), LEVEL)
    power = 10.0 ** math.floor(math.log10(reach / 8))
    step = power * next(factor for factor in (1, 2, 5, 10) if reach / (power * factor) <= 16)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    last = math.floor(min(reach, max(values)) / step)
    counts = Counter(min(int(value / step + 1e-9), last) for value in values)
    longest = max(counts.values())
    lines = []
    for place in range(last + 1):
        end = "or more" if place == last else f"{(place + 1) * step:.{digits}f}".ljust(7)
        bar = "#" * math.ceil(width * counts[place] / longest)
        lines.append(f"  {place * step:.{digits}f} - {end} {counts[place]:>7} {bar}".rstrip())
    return lines
