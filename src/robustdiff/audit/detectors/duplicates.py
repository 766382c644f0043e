"""Pictures that a set holds more than once, equal or nearly so: they drive what a model learns by heart.

Two images are near copies if they are far closer to one another than to the rest of the set: seen at 8 x 8 cells, where
compression, noise and small damage have gone, and without their brightness and contrast, their distance is less than a
fifth of that from either to the nearest fiftieth of the set, or than a twentieth of the median one; twice as much
where it is as small with brightness and contrast, as that of faint pictures with noise is. One of them may be mirrored,
or be the centre of the other: a crop to about nine tenths; other crops are not seen. Pictures whose brightness or
contrast differ by much are none: the same sign in other colours is another picture.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.spectral_model import Load, batches
from robustdiff.audit.survey import Survey
from robustdiff.utils.words import counted

CELLS = 8
"""Cells along each side at which images are compared."""
NEAR, FIFTIETH = 0.2, 0.02
"""Distance of near copies over that to the nearest share of the set. Of 8,000 images of CIFAR-10, 8 have a neighbour
below 0.2, copies compressed by JPEG of quality 30 all do; of 1,797 digits none has, and at 0.25 four."""
FAR = 0.25
"""Least yardstick, over the median distance: a picture that is there often is its own nearest fiftieth."""
NOISY = 1.75
"""How much farther apart the shapes of copies may be that are as near as they are."""
BRIGHTER, STRONGER = 0.3, 0.3
"""How much the brightness of copies differs, in units of [-1, 1], and the logarithm of their contrast, at most."""
FAINT = 0.3
"""Contrast, over the median one, below which it counts: noise would be all that is left of faint pictures."""
MARGIN = 0.03
"""Left out on each side of the centre: a crop to 0.9 and the whole image are both near enough to it."""
SAMPLE = 1000
"""Images, evenly spread, that stand for the set."""
COMPONENTS = 48
"""Of the cells, in which neighbours are searched."""
NEIGHBOURS = 8
"""Nearest neighbours looked at; larger groups hang together by chains of them."""
ALIKE, MANY = 0.01, 5
"""Near copies count once from this share of all images on; fewer, of every large set, only where a picture is there so
often."""


@register_detector
class Duplicates(Detector):
    """Pictures that are there more than once count once."""

    name = "duplicates"
    title = "pictures more than once"
    order = 60
    least_side = 1

    def measure(self, survey: Survey, shows: Tensor | None) -> None:
        """Copies of equal pixels count as one; near copies do where they are many."""
        count, weight = survey.count, survey.result.weight.clone()
        same = equal(survey.load, count)
        asked = weight > 0
        for group in same:
            asked[group[1:]] = False
        equals = {group[0]: group for group in same}
        alike = [
            sorted(i for one in group for i in equals.get(one, [one])) for group in near(survey.load, count, asked)
        ]
        matter = sum(map(len, alike)) >= ALIKE * count
        some = [group for group in alike if matter or len(group) >= MANY]
        within = {place for group in some for place in group}
        for group in (*some, *(group for group in same if group[0] not in within)):
            weight[group] /= len(group)
        survey.add(weight=weight)
        few = [group for group in alike if group not in some]
        for groups, nearly, action in (
            (same, "", Action.COUNTED_ONCE),
            (some, ", nearly alike", Action.COUNTED_ONCE),
            (few, ", nearly alike", Action.LEFT_ALONE),
        ):
            if groups:
                members = torch.zeros(count, dtype=torch.bool)
                members[[place for group in groups for place in group]] = True
                what = f"{counted(len(groups), 'picture')} more than once{nearly}"
                survey.add(Finding(self.name, int(members.sum()), what, action), members)
        within = {place for group in alike for place in group}
        every = sorted((*alike, *(group for group in same if group[0] not in within)), key=len)[::-1]
        survey.add(copies=tuple(map(tuple, every)))


def equal(load: Load, count: int) -> list[list[int]]:
    """Groups of images whose pixels are equal, two or more each: their places.

    Args:
        load: The images.
        count: N >= 1.
    """
    seen: dict[bytes, list[int]] = {}
    for places in batches(count):
        for place, image in zip(places, load(places), strict=True):
            seen.setdefault(hashlib.sha256(image.contiguous().numpy().data).digest(), []).append(place)
    return [same for same in seen.values() if len(same) > 1]


def near(load: Load, count: int, asked: Tensor) -> list[list[int]]:
    """Groups of images that are near copies of one another, two or more each: their places.

    Args:
        load: The images.
        count: N >= 1.
        asked: Images that are looked at, bool, shape (N,): one of each equal ones, and none without a picture.
    """
    places = asked.nonzero().flatten()
    least = int(1 / FIFTIETH) + 1  # fewer have no nearest fiftieth but themselves
    if len(places) < 2 * least:
        return []
    views = zip(*(_views(load(some)[asked[list(some)]]) for some in batches(count)), strict=True)
    whole, centre = (_Seen.of(torch.cat(parts)) for parts in views)
    usual = [_usual(points) for points in (whole.cells, whole.shapes)]
    bases = _bases(whole.shapes)  # near copies are near there, too, and few others are
    search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(_coordinates(whole.shapes, bases))
    ones, others = [], []
    for view in (whole, centre):
        other = torch.from_numpy(search.kneighbors(_coordinates(view.shapes, bases), return_distance=False))
        one = torch.arange(len(places))[:, None].expand_as(other)
        within = [NEAR * torch.minimum(some[:, None], some[other]) for some in usual]
        apart = _distance(view.shapes, whole.shapes, other)
        close = (apart < within[1]) & view.of_like_light(whole, other)
        if view is whole:
            close |= (_distance(whole.cells, whole.cells, other) < within[0]) & (apart < NOISY * within[1])
        ones.append(one[close])  # each is its own copy, too: no matter
        others.append(other[close])
    return _groups(torch.cat(ones), torch.cat(others), places)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Images seen at few cells.

    Attributes:
        cells: Their means, shape (N, C, h, w).
        shapes: The same without brightness and contrast: of mean 0 and length 1, less where they are faint.
        level: Mean of the cells, shape (N,).
        contrast: Logarithm of what they were divided by, shape (N,).
    """

    cells: Tensor
    shapes: Tensor
    level: Tensor
    contrast: Tensor

    @classmethod
    def of(cls, cells: Tensor) -> _Seen:
        level = cells.mean((1, 2, 3), keepdim=True)
        length = (cells - level).flatten(1).norm(dim=1)
        unit = (length.square() + (FAINT * length.median()).square()).sqrt().clamp(min=1e-6)
        return cls(cells, (cells - level) / unit[:, None, None, None], level.flatten(), unit.log())

    def of_like_light(self, whole: _Seen, other: Tensor) -> Tensor:
        """Whether brightness and contrast differ by no more than a picture's that was made a little lighter, (N, k)."""
        alike = (self.level[:, None] - whole.level[other]).abs() <= BRIGHTER
        return alike & ((self.contrast[:, None] - whole.contrast[other]).abs() <= STRONGER)


def _distance(some: Tensor, whole: Tensor, other: Tensor) -> Tensor:
    """Of each to others, as they are or mirrored, whichever is less: (N, C, h, w), the same, (N, k) -> (N, k)."""
    parts = zip(torch.split(some, 1000), torch.split(other, 1000), strict=True)
    return torch.cat(
        [
            torch.minimum(*((part[:, None] - them).flatten(2).norm(dim=2) for them in (nearest, nearest.flip(4))))
            for part, nearest in ((part, whole[places]) for part, places in parts)
        ]
    )


def _usual(points: Tensor) -> Tensor:
    """The yardstick of each image, its distance to the nearest share of a sample, (N, C, h, w) -> (N,)."""
    flat = points.flatten(1)
    flat = flat - flat.mean(0)  # the distances are of large vectors otherwise, and lose digits
    sample = flat[:: -(-len(flat) // SAMPLE)]
    rank = max(2, round(FIFTIETH * len(sample)))  # the first may be the image itself
    distances = (torch.cdist(some, sample) for some in torch.split(flat, 1000))
    return torch.cat([torch.maximum(one.kthvalue(rank, dim=1).values, FAR * one.median(1).values) for one in distances])


def _views(images: Tensor) -> tuple[Tensor, Tensor]:
    """Cells of whole images and of their centres, (B, C, h, w) each."""
    height, width = (min(CELLS, edge) for edge in images.shape[2:])
    top, left = (round(edge * MARGIN) for edge in images.shape[2:])
    centre = images[:, :, top : images.shape[2] - top, left : images.shape[3] - left]
    cells, inner = (adaptive_avg_pool2d(view.float(), (height, width)) for view in (images, centre))
    return cells, inner


def _parts(shapes: Tensor) -> tuple[Tensor, Tensor]:
    """What mirroring leaves and what it turns into its negative, (N, d) each."""
    mirrored = shapes.flip(3)
    return (shapes + mirrored).flatten(1) / 2, (shapes - mirrored).flatten(1) / 2


def _bases(shapes: Tensor) -> list[Tensor]:
    """Leading principal components of both parts, 48 together."""
    even, odd = _parts(shapes)
    found = [torch.linalg.eigh((part.T @ part).double()) for part in (even - even.mean(0), odd)]
    least = torch.cat([values for values, _ in found]).sort(descending=True).values[:COMPONENTS].min()
    return [basis[:, values >= least].float() for values, basis in found]


def _coordinates(shapes: Tensor, bases: list[Tensor]) -> NDArray[np.float32]:
    """Images where mirrored ones lie at the same place, and none is farther from another than it is, (N, 48)."""
    even, odd = (part @ basis for part, basis in zip(_parts(shapes), bases, strict=True))
    return np.asarray(torch.cat([even, odd.abs()], 1).numpy(), np.float32)


def _groups(one: Tensor, other: Tensor, places: Tensor) -> list[list[int]]:
    """Connected pairs, as groups of places."""
    pairs = coo_array((np.ones(len(one), bool), (one.numpy(), other.numpy())), shape=(len(places), len(places)))
    label = torch.from_numpy(connected_components(pairs, directed=False)[1]).long()
    large = torch.bincount(label)[label] > 1
    groups: dict[int, list[int]] = {}
    for group, place in zip(label[large].tolist(), places[large].tolist(), strict=True):
        groups.setdefault(group, []).append(place)
    return list(groups.values())
