"""Nearest neighbours between two sets of rows, and the metrics made of them.

Distances are Euclidean, in float64, a block of rows at a time: memory does not grow with the product of the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.stats import betabinom
from torch import Tensor

from robustdiff.evaluation.distances import check_sets

CHUNK_BYTES = 256 * 2**20
"""Memory of one block of distances, about."""
SPARE = 8
"""Neighbours looked at beyond the k asked for, so that rounding cannot lose one of the k."""
Progress = Callable[[int], object]
"""Told how many rows are done since the last call, as ``tqdm.update`` takes it."""


def _centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, less the mean of b: distances stay, and rounding is that of the spread, not of the offset."""
    mean = b.double().mean(0)
    return a.double() - mean, b.double() - mean


def _blocks(rows: int, bytes_per_row: int, chunk_bytes: int) -> Iterator[slice]:
    step = max(1, chunk_bytes // bytes_per_row)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def k_nearest(
    a: Tensor,
    b: Tensor,
    k: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    exclude_self: bool = False,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of b for each row of a.

    Candidates come from ``|b|^2 - 2 a . b``; the distances returned are computed anew from the differences, so equal
    rows are at distance zero exactly. Equal distances are in the order of b.

    Args:
        a: Shape (n, d), of any real dtype.
        b: Shape (m, d), on the same device.
        k: Neighbours, at least 1 and at most m, less one with ``exclude_self``.
        chunk_bytes: Memory of a block of rows, about; both sets in float64 come on top.
        exclude_self: a is b: a row is not its own neighbour, but another row equal to it is.
        progress: Told of finished rows; n in all.

    Returns:
        Distances (n, k), float64, ascending, and indices into b, int64.

    Raises:
        ValueError: If the sets do not fit each other, or hold too few rows for k.
    """
    check_sets(1, a=a, b=b)
    if exclude_self and a.shape != b.shape:
        raise ValueError("exclude_self needs the same set on both sides")
    available = len(b) - exclude_self
    if not 1 <= k <= available:
        raise ValueError(f"k must be from 1 to {available}, the rows there are, got {k}")
    a, b = _centred(a, b)
    squares, looked_at = b.square().sum(1), min(k + SPARE, available)
    distances = a.new_empty(len(a), k)
    indices = torch.empty(len(a), k, dtype=torch.int64, device=a.device)
    # one block of products with as much again for topk, and one of candidates
    for rows in _blocks(len(a), 8 * (2 * len(b) + looked_at * a.shape[1]), chunk_bytes):
        block = a[rows]
        rank = torch.addmm(squares, block, b.T, alpha=-2)  # less |a|^2, which orders nothing
        if exclude_self:
            rank.diagonal(rows.start).fill_(torch.inf)
        candidates = rank.topk(looked_at, dim=1, largest=False, sorted=False).indices.sort(1).values
        exact = torch.linalg.vector_norm(b[candidates].sub_(block[:, None]), dim=2)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        distances[rows], indices[rows] = exact.gather(1, order), candidates.gather(1, order)
        if progress is not None:
            progress(len(block))
    return distances, indices


def prdc(
    real: Tensor, fake: Tensor, k: int = 5, *, chunk_bytes: int = CHUNK_BYTES, progress: Progress | None = None
) -> dict[str, float]:
    """Four shares of points that lie in the other set's nearest-neighbour balls.

    The ball of a point reaches to its k-th nearest neighbour in its own set, and is open: points on its rim are
    outside, rounding or not.

    * precision: generated points in the ball of some real point; recall: real points in that of some generated one;
    * density: how many real balls a generated point lies in, mean, divided by k: about 1 for equal laws, unbounded;
    * coverage: real points whose ball holds a generated point. For equal laws and sizes its expectation is
      docs/explanation/theory.md T11; the others have no such closed form, so measure their floors.

    Args:
        real: Features of real images, shape (n, d), n > k.
        fake: Of generated ones, shape (m, d), m > k.
        k: Neighbours, >= 1.
        chunk_bytes: As in :func:`k_nearest`.
        progress: Told of finished rows; ``2 n + m`` in all.

    Returns:
        ``precision``, ``recall``, ``density`` and ``coverage``.

    Raises:
        ValueError: As :func:`k_nearest`.

    Source: Kynkaanniemi et al. (2019), Eq. 1 and 2; Naeem et al. (2020), Eq. 3 and 4.
    """
    check_sets(k + 1, real=real, fake=fake)
    real_radii, fake_radii = (
        k_nearest(x, x, k, chunk_bytes=chunk_bytes, exclude_self=True, progress=progress)[0][:, -1].square()
        for x in (real, fake)
    )
    real, fake = _centred(real, fake)
    # Upper ends of the squares' rounding error: what lies on a rim, such as a copy of a neighbour, stays outside
    rounding = 1 + real.shape[1] * torch.finfo(torch.float64).eps
    real_squares, fake_squares = (rounding * x.square().sum(1) for x in (real, fake))
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    recalled = covered = 0
    for rows in _blocks(len(real), 8 * 2 * len(fake), chunk_bytes):
        squares = torch.addmm(fake_squares, real[rows], fake.T, alpha=-2).add_(real_squares[rows, None])
        inside = squares < real_radii[rows, None]
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((squares < fake_radii).any(1).sum())
        if progress is not None:
            progress(len(squares))
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": recalled / len(real),
        "density": float(balls.sum()) / (k * len(fake)),
        "coverage": covered / len(real),
    }


def clipped(
    real: Tensor, fake: Tensor, k: int = 5, *, chunk_bytes: int = CHUNK_BYTES, progress: Progress | None = None
) -> dict[str, float]:
    """Density and coverage in which no point counts more than once, calibrated: equivalent shares of good samples.

    * clipped density: of each generated point the number of real balls it lies in, over k, at most 1; the mean over
      what it is for real points among themselves, at most 1. Balls reach to the k-th neighbour, but not beyond the
      median of these radii, so that outliers have no large ones.
    * clipped coverage: of each real point the number of generated points in its ball, over k, at most 1; the mean is
      turned into the share of generated images that, if good, would give it (:func:`covered_by`).

    Args:
        real: Features of real images, shape (n, d), n > k + 1.
        fake: Of generated ones, shape (m, d).
        k: Neighbours, >= 1.
        chunk_bytes: As in :func:`k_nearest`.
        progress: Told of finished rows; ``2 n`` in all.

    Returns:
        ``clipped density``, not a number if no real point lies in a ball, and ``clipped coverage``, both in [0, 1].

    Raises:
        ValueError: As :func:`k_nearest`.

    Source: Salvy, Talbot and Thirion (2025).
    """
    check_sets(k + 2, real=real)
    distances, nearest = k_nearest(real, real, k, chunk_bytes=chunk_bytes, exclude_self=True, progress=progress)
    radii = distances[:, -1]
    least = radii.clamp(max=float(radii.quantile(0.5)))
    ideal = torch.bincount(nearest[distances <= least[:, None]], minlength=len(real)).clamp(max=k).double().mean()
    real, fake = _centred(real, fake)
    rounding = 1 + real.shape[1] * torch.finfo(torch.float64).eps  # as in prdc: what lies on a rim stays outside
    real_squares, fake_squares = real.square().sum(1), fake.square().sum(1)
    balls, held = torch.zeros(len(fake), dtype=torch.int64, device=fake.device), 0.0
    for rows in _blocks(len(real), 8 * 2 * len(fake), chunk_bytes):
        squares = torch.addmm(fake_squares, real[rows], fake.T, alpha=-2).add_(real_squares[rows, None])
        balls += (squares <= least[rows, None].square()).sum(0)
        held += float((rounding * squares < radii[rows, None].square()).sum(1).clamp(max=k).sum())
        if progress is not None:
            progress(len(squares))
    density = float(balls.clamp(max=k).double().mean() / ideal) if ideal else math.nan
    return {
        "clipped density": min(density, 1.0) if ideal else density,
        "clipped coverage": covered_by(held / (k * len(real)), len(real), len(fake), k),
    }


def covered_by(held: float, n: int, m: int, k: int) -> float:
    """Which share of m generated points, drawn of the real law, would fill the balls of n real ones so far.

    The mass of a ball to the k-th of n - 1 other points is Beta(k, n - k), so how many of j points lie in it is
    beta-binomial, of which the mean of min(count, k) / k is known; the j for which it is ``held`` is looked up.

    Args:
        held: Mean of min(count, k) / k over the balls.
        n: Real points.
        m: Generated points.
        k: Neighbours.

    Source: Salvy, Talbot and Thirion (2025).
    """
    return float(np.interp(held, _expected(n, m, k), np.arange(m + 1) / m))


@cache
def _expected(n: int, m: int, k: int) -> np.ndarray[Any, Any]:
    """Mean of min(count, k) / k in a ball, for 0 to m points: min(count, k) is how many of 0 ... k - 1 it exceeds."""
    return np.asarray(sum(betabinom.sf(count, np.arange(m + 1), k, n - k) for count in range(k)) / k)


def vendi(x: Tensor) -> float:
    """Vendi score: how many different images a set is worth, from 1, all alike, to n, none like another.

    The exponential of the entropy of the eigenvalues of K / n, where K holds the cosines between features.

    Args:
        x: Features, shape (n, d); not a number if those of an image are all 0, which have no direction.

    Source: Friedman and Dieng (2023), Eq. 2.
    """
    check_sets(1, x=x)
    rows = x.double()
    norms = rows.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        return math.nan
    rows = rows / norms
    gram = rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T
    shares = torch.linalg.eigvalsh(gram / len(rows)).clamp(min=0)
    return float(torch.special.entr(shares / shares.sum()).sum().exp())


def mean_distance(x: Tensor, *, chunk_bytes: int = CHUNK_BYTES, progress: Progress | None = None) -> float:
    """Mean Euclidean distance over all pairs of different rows.

    Args:
        x: Shape (n, d), n >= 2.
        chunk_bytes: As in :func:`k_nearest`.
        progress: Told of finished rows; n in all.
    """
    check_sets(2, x=x)
    x, _ = _centred(x, x)
    squares, total = x.square().sum(1), 0.0
    for rows in _blocks(len(x), 8 * 2 * len(x), chunk_bytes):
        block = torch.addmm(squares, x[rows], x.T, alpha=-2).add_(squares[rows, None]).clamp_(min=0)
        block.diagonal(rows.start).zero_()
        total += float(block.sqrt_().sum())
        if progress is not None:
            progress(len(block))
    return total / (len(x) * (len(x) - 1))


def diversity(
    generated: Tensor, real: Tensor, *, chunk_bytes: int = CHUNK_BYTES, progress: Progress | None = None
) -> float:
    """:func:`mean_distance` of generated images divided by that of real ones: 1 for equal laws, 0 for one image.

    Above 1 is no better than below: noise is diverse. Not a number if all real images are alike.
    """
    of_generated, of_real = (mean_distance(x, chunk_bytes=chunk_bytes, progress=progress) for x in (generated, real))
    return of_generated / of_real if of_real else math.nan
