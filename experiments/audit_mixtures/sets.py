"""Which sets are audited, and how each is made: clean pictures, some of them damaged, and the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np

from experiments.audit_mixtures.damages import DAMAGES, Bytes, Rng, damaged, kinds
from experiments.picture_sets import KINDS, pictures
from robustdiff.data.dataset import ImageDataset, load_images

FOREIGN = 0.15
"""Of the damaged images of a mixture, those with a kind that the audit does not simulate."""
DRAWN = "scenes"
"""Drawn pictures that are most like photographs."""
MOST_DRAWN = 1000
"""Of which a set has at most: they take longer to draw than to audit."""
ENLARGED = 0.01
"""Share of a folder's images at most that a size may enlarge: more, and the clean ones would not be clean."""
Scale = Literal["small", "full"]
Group = Literal["mixture", "single", "clean", "half"]
Shape = tuple[int, int, int]
"""Edge in pixels, channels, how many."""

MIXTURES: dict[Scale, tuple[tuple[Shape, tuple[float, ...]], ...]] = {
    "small": (((64, 3, 1000), (0.3,)), ((32, 1, 300), (0.6,))),
    "full": (
        ((64, 3, 2000), (0.05, 0.1, 0.3, 0.6, 0.9)),
        ((64, 3, 4000), (0.3,)),
        ((64, 3, 200), (0.3, 0.6)),
        ((32, 3, 1000), (0.1, 0.6)),
        ((128, 3, 400), (0.3,)),
        ((64, 1, 1000), (0.05, 0.3)),
        ((32, 1, 1000), (0.6,)),
        ((128, 1, 200), (0.1,)),
    ),
}
"""Shapes, and which shares of them are damaged."""
SINGLE: dict[Scale, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "small": (("noise", "jpeg"), (0.05,)),
    "full": (kinds(3), (0.05, 0.5)),
}
"""Kinds of damage alone, and which shares they hit, of :data:`FEW`."""
FEW: Shape = (64, 3, 200)
CLEAN_DRAWN: dict[Scale, tuple[tuple[tuple[str, ...], tuple[Shape, ...]], ...]] = {
    "small": ((("line_art", "screenshots", "night", "halftone"), (FEW,)),),
    "full": (
        (KINDS, ((64, 3, 300), (32, 1, 200))),
        (("line_art", "screenshots", "text", "night", "halftone", "fog"), ((128, 3, 100),)),  # minutes each
    ),
}
CLEAN_PHOTOGRAPHS: dict[Scale, tuple[Shape, ...]] = {
    "small": (FEW,),
    "full": ((64, 3, 2000), FEW, (32, 3, 1000), (32, 1, 1000), (64, 1, 200), (128, 3, 400)),
}
HALVES: dict[Scale, tuple[tuple[str, ...], Shape]] = {"small": (("maps",), FEW), "full": (KINDS, (64, 3, 300))}


@dataclass(frozen=True)
class Row:
    """One set.

    Attributes:
        group: What it is for.
        source: Name of a folder, or of a kind of drawn pictures.
        size: Edge in pixels.
        channels: 1 or 3.
        count: How many images.
        dirty: Share of them that is damaged.
        kind: Of the damage, if it is a single one; of the other half of the pictures.
    """

    group: Group
    source: str
    size: int
    channels: int
    count: int
    dirty: float = 0.0
    kind: str = ""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        words = [self.group, self.source, str(self.size), "RGB" if self.channels == 3 else "grey", str(self.count)]
        return " ".join([*words, *([self.kind] if self.kind else []), *([f"{self.dirty:g}"] if self.dirty else [])])

    @property
    def seed(self) -> int:
        """Its own."""
        return crc32(self.name.encode())


class Truth(NamedTuple):
    """What was done to each of N images: the kind of damage, empty for none, and its strength, nan for none."""

    kind: tuple[str, ...]
    strength: np.ndarray

    @property
    def clean(self) -> np.ndarray:
        """Images that nothing was done to, bool, (N,)."""
        return np.array([not kind for kind in self.kind])

    @property
    def part(self) -> tuple[str, ...]:
        """``judged``, or ``weak``, where damage need not be found; empty for clean images."""
        return tuple(
            DAMAGES[kind].part(float(strength)) if kind else ""
            for kind, strength in zip(self.kind, self.strength, strict=True)
        )


# -- which ---------------------------------------------------------------------------------------------------


def plan(folders: Mapping[str, Path], scale: Scale) -> list[Row]:
    """Every set of a scale, the larger questions first."""
    fits = {name: _Folder(path) for name, path in folders.items()}

    def shaped(group: Group, source: str, shape: Shape) -> Iterator[Row]:
        """The set, of as many images as there are, if there are any of that size."""
        size, channels, count = shape
        there = min(count, fits[source].count(size) if source in fits else MOST_DRAWN)
        if there:
            yield Row(group, source, size, channels, there)

    found: list[Row] = []
    for source in (*folders, DRAWN):
        for shape, shares in MIXTURES[scale]:
            found += [replace(row, dirty=dirty) for row in shaped("mixture", source, shape) for dirty in shares]
    home = next((name for name in folders if fits[name].count(FEW[0])), DRAWN)
    names, shares = SINGLE[scale]
    for kind in names:
        found += [replace(row, kind=kind, dirty=dirty) for row in shaped("single", home, FEW) for dirty in shares]
    for source in folders:
        found += [row for shape in CLEAN_PHOTOGRAPHS[scale] for row in shaped("clean", source, shape)]
    for names, shapes in CLEAN_DRAWN[scale]:
        found += [row for source in names for shape in shapes for row in shaped("clean", source, shape)]
    names, shape = HALVES[scale]
    found += [replace(row, kind=kind) for kind in names if kind != home for row in shaped("half", home, shape)]
    return list(dict.fromkeys(found))  # a folder of few images has some shapes twice


class _Folder:
    """How many images of each size it has without enlarging any."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[int, int]()

    def count(self, size: int) -> int:
        if size not in self.known:
            images = load_images(self.path, resolution=size, max_memory=0)
            self.known[size] = len(images) if images.notes.get("enlarged", 0) <= ENLARGED * len(images) else 0
        return self.known[size]


# -- how -----------------------------------------------------------------------------------------------------


def make(row: Row, folders: Mapping[str, Path]) -> tuple[Bytes, Truth]:
    """The images of a set, uint8 (N, C, H, W), and the truth."""
    rng = np.random.default_rng(row.seed)
    images = _clean(row.source, row.count, row, folders, rng)
    if row.group == "half":
        other = rng.permutation(row.count)[: row.count // 2]
        images[other] = _clean(row.kind, len(other), row, folders, rng)
    hit = rng.permutation(row.count)[: round(row.dirty * row.count)]
    dealt = [row.kind] * len(hit) if row.group == "single" else _dealt(len(hit), row.channels, rng)
    kind, strength = [""] * row.count, np.full(row.count, np.nan)
    for place, name in zip(hit.tolist(), dealt, strict=True):
        kind[place] = name
        images[place], strength[place] = damaged(images[place], name, np.random.default_rng([row.seed, place]))
    return images, Truth(tuple(kind), strength)


def _dealt(count: int, channels: int, rng: Rng) -> list[str]:
    """So many kinds of damage, each as often as any other that is known, or that is not."""

    def some(names: Sequence[str], many: int) -> list[str]:
        return [names[number % len(names)] for number in range(many)]

    foreign = round(FOREIGN * count)
    return some(rng.permutation(kinds(channels, True)).tolist(), count - foreign) + some(
        rng.permutation(kinds(channels, False)).tolist(), foreign
    )


def _clean(source: str, count: int, row: Row, folders: Mapping[str, Path], rng: Rng) -> Bytes:
    if source not in folders:
        return pictures(source, count, row.size, row.channels, seed=row.seed)
    images: ImageDataset = load_images(folders[source], resolution=row.size, channels=row.channels)
    return images.images[np.sort(rng.permutation(len(images))[:count]).tolist()].numpy().copy()
