"""What a source of images is, and the two plainest kinds: files in a folder, rows of an array."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.data import decode
from robustdiff.data.decode import Item, Pixels
from robustdiff.data.pixel_values import ValueRange
from robustdiff.utils.errors import DataError, NoSuchSplit

PLAIN = re.compile(r"[\w-][\w.-]{0,254}", re.ASCII)
"""What a name found inside a file must look like to become an image's name: nothing that could lead elsewhere."""


PARTITION = "list_eval_partition.txt"
"""CelebA's list of which image belongs to which split."""


@dataclass(frozen=True, eq=False)
class Source:
    """Where images come from, before anything is decoded.

    Attributes:
        what: Kind of source, and the split where there is one; for people.
        names: One per image, in the order of the data set: relative POSIX paths, or zero-padded numbers.
        read: The item of one place in ``names``. Called from several threads, and from worker processes after pickling
            or forking; raises any exception for a bad item.
        skipped: (name, reason) of what was refused at sight.
        classes: Names of the labels, if the source has labels of its own. Those of a folder follow from its names.
        labels: One per name, places in ``classes``; None for an image that has none.
        crop: Side in pixels of the centre square to cut out before anything else.
        notes: Counts of what else was found, such as side-car files.
        unlabelled: Why there are no labels, and what would help.
        value_range: Values of black and white, where files do not declare them.
    """

    what: str
    names: Sequence[str]
    read: Callable[[int], Item]
    skipped: Sequence[tuple[str, str]] = ()
    classes: tuple[str, ...] = ()
    labels: Sequence[int | None] | None = None
    crop: int | None = None
    notes: Mapping[str, int] = field(default_factory=dict)
    unlabelled: str = ""
    value_range: ValueRange | None = None


@dataclass(frozen=True)
class Files:
    """Reads files of a folder: gives the path, which is opened only when the image is decoded."""

    folder: Path
    names: Sequence[str]

    def __call__(self, index: int) -> Path:
        """The path of one file."""
        return self.folder / self.names[index]


@dataclass(frozen=True, eq=False)
class Rows:
    """Reads an array (N, H, W, C) in memory, uint8 or bool."""

    array: NDArray[Any]

    def __call__(self, index: int) -> Pixels:
        """One image."""
        return eight_bit(self.array[index])


def eight_bit(row: NDArray[Any]) -> Pixels:
    """A row of an array, uint8 or true and false, as pixels: true is white."""
    return np.asarray(row) if row.dtype == np.uint8 else np.where(row, np.uint8(255), np.uint8(0))


def numbers(count: int) -> tuple[str, ...]:
    """``count`` names that sort as they count: 00, 01 ... 99."""
    return tuple(f"{index:0{len(str(count - 1))}d}" for index in range(count))


def choose_splits(splits: Sequence[str], split: str | None) -> Sequence[str]:
    """The splits asked for: ``split``, every one for ``all``; by default ``train``, or the only one there is.

    Raises:
        NoSuchSplit: Or no default.
    """
    if split == "all" and splits:
        return splits
    if split is None and len(splits) <= 1:
        return splits
    if (wanted := split or "train") in splits:
        return [wanted]
    if not splits:
        raise NoSuchSplit("this source has no splits: leave `split` out")
    missing = "there is no split train" if split is None else f"`split` {split}: no such split"
    raise NoSuchSplit(f"{missing}; use `split` with one of {listed(splits)}, or all")


def listed(names: Sequence[Any]) -> str:
    """The first few of many names, for a message of one line."""
    return ", ".join(map(str, names[:8])) + (" ..." if len(names) > 8 else "") or "none"


def by_name(values: Sequence[Any]) -> tuple[tuple[str, ...], list[int]]:
    """Sorted unique values as text, and each value's place among them."""
    unique = sorted(set(values))
    place = {value: number for number, value in enumerate(unique)}
    return tuple(map(str, unique)), [place[value] for value in values]


def missing(package: str) -> DataError:
    """The error for an optional package that is not there."""
    return DataError(f"{package} is not installed: pip install 'robustdiff[data]'")


def short_reason(error: Exception) -> str:
    """:func:`decoding.reason`, cut to a line."""
    text = decode.reason(error)
    return text if len(text) <= 300 else text[:300] + " ..."
