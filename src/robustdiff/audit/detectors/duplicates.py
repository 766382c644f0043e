"""Pictures that a set holds more than once, equal or nearly so: they drive what a model learns by heart.

Two images are near copies if they are far closer to one another than to the rest of the set: seen at 8 x 8 cells, where
compression, noise and small damage have gone, their distance is less than a fifth of that from either to the nearest
fiftieth of the set, or than a twentieth of the median one.
"""

from __future__ import annotations

import hashlib

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

CELLS = 8
"""Cells along each side at which images are compared."""
NEAR, FIFTIETH = 0.2, 0.02
"""Distance of near copies over that to the nearest share of the set. Of 8,000 images of CIFAR-10, 8 have a neighbour
below 0.2, copies compressed by JPEG of quality 30 all do; of 1,797 digits none has, and at 0.25 four."""
FAR = 0.25
"""Least yardstick, over the median distance: a picture that is there often is its own nearest fiftieth."""
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
                what = f"{len(groups)} {self.title}{nearly}"
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
    cells = torch.cat([_cells(load(some))[asked[list(some)]] for some in batches(count)])
    cells = cells - cells.mean(0)  # the distances are of large vectors otherwise, and lose digits
    sample = cells[:: -(-len(cells) // SAMPLE)]
    rank = max(2, round(FIFTIETH * len(sample)))  # the first may be the image itself
    usual = torch.cat([_usual(torch.cdist(some, sample), rank) for some in torch.split(cells, 1000)])
    leading = _leading(cells)  # near copies are near there, too, and few others are
    search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(leading)
    other = torch.from_numpy(search.kneighbors(leading, return_distance=False))
    one = torch.arange(len(cells))[:, None].expand_as(other)
    parts = zip(torch.split(cells, 1000), torch.split(other, 1000), strict=True)
    distance = torch.cat([(some[:, None] - cells[nearest]).norm(dim=2) for some, nearest in parts])
    close = distance < NEAR * torch.minimum(usual[:, None], usual[other])  # each is its own copy, too: no matter
    return _groups(one[close], other[close], places)


def _usual(distance: Tensor, rank: int) -> Tensor:
    """The yardstick of each image from its distances to the sample, (B, S) -> (B,)."""
    return torch.maximum(distance.kthvalue(rank, dim=1).values, FAR * distance.median(1).values)


def _cells(images: Tensor) -> Tensor:
    height, width = (min(CELLS, edge) for edge in images.shape[2:])
    return adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)


def _leading(cells: Tensor) -> NDArray[np.float32]:
    """Images in the leading principal components of their cells, shape (N, at most 48)."""
    _, basis = torch.linalg.eigh((cells.T @ cells).double())
    leading: NDArray[np.float32] = (cells @ basis[:, -COMPONENTS:].to(cells.dtype)).numpy()
    return leading


def _groups(one: Tensor, other: Tensor, places: Tensor) -> list[list[int]]:
    """Connected pairs, as groups of places."""
    pairs = coo_array((np.ones(len(one), bool), (one.numpy(), other.numpy())), shape=(len(places), len(places)))
    label = torch.from_numpy(connected_components(pairs, directed=False)[1]).long()
    large = torch.bincount(label)[label] > 1
    groups: dict[int, list[int]] = {}
    for group, place in zip(label[large].tolist(), places[large].tolist(), strict=True):
        groups.setdefault(group, []).append(place)
    return list(groups.values())
