"""Distances between two sets of features, each with what it needs to be believed: a floor and an interval.

A set is a tensor of shape (n, d), one row per image; everything is computed in float64. Which extractor made the
features decides what a distance may be called: see ``features.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from scipy.stats import beta, norm
from scipy.stats import t as student
from torch import Tensor

Interval = tuple[float, float]
"""Lower and upper end, 95 %."""
NORMAL_95 = float(norm.ppf(0.975))
"""The 97.5 % quantile of the standard normal law."""


@dataclass(frozen=True)
class MetricValue:
    """One number with what it needs to be believed.

    Args:
        name: ``"FD-pixels"``, ``"FID"``, ``"KID-pixels"``, ``"precision"``, ...
        value: The number; nan if it is not defined.
        floor: The same metric between real images and real images, or None if it was not measured.
        better: Which way is better.
        interval: 95 %, or None.
        about: Settings and counts behind the number; whatever JSON can hold.
    """

    name: str
    value: float
    floor: float | None
    better: Literal["lower", "higher", "neither"]
    interval: Interval | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry under ``values`` of a result file, whose key is the name."""
        entry = {**asdict(self), "interval": None if self.interval is None else list(self.interval)}
        del entry["name"]
        for name in ("value", "floor"):
            entry[name] = entry[name] if entry[name] is not None and math.isfinite(entry[name]) else None
        return entry


def check_sets(least: int = 1, **sets: Tensor) -> None:
    """Refuse sets that no distance is defined for.

    Args:
        least: Fewest rows.
        **sets: Tensors by the name that errors use.

    Raises:
        ValueError: If a set is not of shape (n, d) with d as in the others, has too few rows, or is not finite.
    """
    for name, x in sets.items():
        if x.ndim != 2 or x.shape[1] < 1:
            raise ValueError(f"{name} must have shape (n, d), got {tuple(x.shape)}")
        if len(x) < least:
            raise ValueError(f"{name} must have at least {least} rows, got {len(x)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds numbers that are not finite")
    widths = {name: x.shape[1] for name, x in sets.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"all sets must have rows of one length, got {widths}")


# -- Frechet distance ----------------------------------------------------------------------------------------


def _factor(x: Tensor) -> Tensor:
    """A with ``A^T A`` the unbiased covariance of the rows of x (float64), of at most d rows."""
    root: Tensor = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    if len(x) > x.shape[1]:
        _, root = torch.linalg.qr(root, mode="r")
    return root


def _root(covariance: Tensor) -> Tensor:
    """The same for a given covariance; directions below the numerical rank have no variance."""
    values, vectors = torch.linalg.eigh(covariance)
    least = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = torch.where(values > least, values, 0).sqrt()[:, None] * vectors.T
    return root


def _distance(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> float:
    # tr sqrt(S_a S_b) is the sum of the singular values of A B^T: with A^T A = S_a and B^T B = S_b their squares are
    # the eigenvalues of S_a^(1/2) S_b S_a^(1/2). Not squaring keeps directions without variance at 1e-16, not 1e-8.
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    total = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(float(total), 0.0)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets: FID, if the features are Inception's.

    ``|mean_a - mean_b|^2 + tr(S_a + S_b - 2 sqrt(S_a S_b))`` with unbiased covariances; the trace of the root from
    singular values of the centred data, never from a matrix square root. Symmetric; zero for equal sets to about
    1e-15 of the variance, also with fewer rows than columns.

    Args:
        a: Features, shape (n, d), n >= 2.
        b: Features, shape (m, d), m >= 2.

    Raises:
        ValueError: If a set is too small or not finite.

    Source: Heusel et al. (2017), Eq. 6; docs/explanation/theory.md T11.
    """
    check_sets(2, a=a, b=b)
    a, b = a.double(), b.double()
    return _distance(a.mean(0), _factor(a), b.mean(0), _factor(b))


def frechet_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The same between two given Gaussians.

    Args:
        mean_a: Shape (d,).
        cov_a: Symmetric, without negative eigenvalues, shape (d, d).
        mean_b: Shape (d,).
        cov_b: As ``cov_a``.
    """
    return _distance(mean_a.double(), _root(cov_a.double()), mean_b.double(), _root(cov_b.double()))


def frechet_bias(features_real: Tensor, n: int, m: int) -> float:
    """Expected Frechet distance between n and m draws of one Gaussian with the covariance of ``features_real``.

    The sum of two :func:`frechet_floor`, to leading order in 1/n and 1/m: good where n and m are
    several times the number of directions that carry variance, too low below that. Print it beside a measured floor,
    not in its stead.

    Args:
        features_real: As many real images as there are, shape (N, d); a spectrum from few rows is too steep.
        n: Rows on one side, >= 2.
        m: Rows on the other, >= 2.

    Source: docs/explanation/theory.md T11.
    """
    check_sets(2, features_real=features_real)
    v = torch.linalg.svdvals(_factor(features_real.double())).square()
    return frechet_floor(v, n) + frechet_floor(v, m)


# -- kernel distance -----------------------------------------------------------------------------------------


def kernel_distance(
    a: Tensor, b: Tensor, *, subset_size: int | None = None, subsets: int = 100, seed: int = 0
) -> tuple[float, float, int]:
    """Kernel distance: the unbiased squared MMD of ``(x . y / d + 1)^3``, mean over random subsets.

    Unbiased at every size, so slightly below zero where the laws agree. The standard error is that of the mean as an
    estimate of the true distance, by the delete-m jackknife: the variance between subsets times ``m / (n - m)``, n
    the smaller set, plus what is left of it after averaging. It is right for half-size subsets of two equally large
    sets of different laws and too large, never too small, otherwise (by up to ``sqrt(n / m + 1)`` for equal laws).
    Twice it covers the truth in 89 % (one dimension, skewed) to 100 % of repetitions. The standard deviation between
    subsets that other libraries print is no error of the mean.

    Args:
        a: Features, shape (n, d).
        b: Features, shape (m, d).
        subset_size: Rows of each subset, 2 to one less than the smaller set; None: ``min(1000, smaller // 2)``.
        subsets: How many, >= 2; drawn without replacement within a subset.
        seed: Of the subsets.

    Returns:
        (mean, standard error, subset size).

    Raises:
        ValueError: If a set is too small or not finite, or there are too few subsets.

    Source: Binkowski et al. (2018), section 4; standard error: Shao and Wu (1989).
    """
    smaller = min(len(a), len(b))
    size = min(1000, smaller // 2) if subset_size is None else subset_size
    check_sets(4, a=a, b=b)
    if not 2 <= size < smaller:
        raise ValueError(f"subset_size must be from 2 to {smaller - 1}, one less than the smaller set, got {size}")
    if subsets < 2:
        raise ValueError(f"subsets must be at least 2, got {subsets}")
    a, b, generator = a.double(), b.double(), torch.Generator().manual_seed(seed)
    drawn = [[torch.randperm(len(x), generator=generator)[:size].to(x.device) for x in (a, b)] for _ in range(subsets)]
    if max(len(a), len(b)) ** 2 <= subsets * size**2:
        found = _of_subsets(a, b, [one for one, _ in drawn], [other for _, other in drawn])
    else:
        found = torch.stack([squared_mmd(a[one], b[other]) for one, other in drawn])
    error = (found.var() * (size / (smaller - size) + 1 / subsets)).sqrt()
    return float(found.mean()), float(error), size


def _part(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Rows drawn without replacement."""
    return x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]


# -- intervals -----------------------------------------------------------------------------------------------


def clopper_pearson(successes: int, trials: int) -> Interval:
    """Exact 95 % interval of a share: it covers the true one at least as often as stated, for every number of trials.

    Args:
        successes: 0 to ``trials``.
        trials: >= 1.

    Source: Clopper and Pearson (1934).
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"no share: {successes} of {trials}")
    lower = 0.0 if successes == 0 else float(beta.ppf(0.025, successes, trials - successes + 1))
    upper = 1.0 if successes == trials else float(beta.ppf(0.975, successes + 1, trials - successes))
    return lower, upper


def half_sampled(
    metric: Callable[[Tensor, Tensor], Mapping[str, float]],
    a: Tensor,
    b: Tensor,
    *,
    repeats: int = 40,
    seed: int = 0,
    shares: Mapping[str, int] | None = None,
) -> dict[str, Interval]:
    """95 % intervals of metrics by half-sampling: of what other draws of the same two sizes would give on average.

    The metric is computed on random halves of both sets, without replacement; its standard deviation between halves
    is the standard error of the metric on the whole (delete-half jackknife), and the interval is the value on the
    whole plus and minus a Student quantile of it. The interval includes the bias of the metric at these sizes: it is
    to be compared with a floor of the same sizes, not with zero. No bootstrap: rows drawn twice raise a Frechet
    distance, and break nearest-neighbour balls.

    It covers the expected value at least as often as stated, nearly. Where the laws agree, distances such as
    :func:`frechet_distance` vary with 1/n, and the interval is up to sqrt(3) too wide. A share near 0 or 1 may not
    vary at all between halves: intervals of shares are widened to :func:`clopper_pearson`.

    Args:
        metric: Maps two sets to named values, for which zero is the least; called ``repeats + 1`` times.
        a: Shape (n, d), n >= 4 and large enough for the metric on half of it.
        b: Shape (m, d), likewise.
        repeats: Pairs of halves, >= 10.
        seed: Of the halves.
        shares: Those values that are shares of rows, with the number of rows on the whole.

    Returns:
        (lower, upper) by name; none of a value below zero, which no interval from zero on would hold, and none of one
        that is not defined, for the whole or for some half.

    Raises:
        ValueError: If a set is too small or not finite, or there are too few repeats.

    Source: Shao and Wu (1989); coverage measured in tests/evaluation/test_distances.py.
    """
    check_sets(4, a=a, b=b)
    if repeats < 10:
        raise ValueError(f"repeats must be at least 10, got {repeats}")
    generator = torch.Generator().manual_seed(seed)
    whole = metric(a, b)
    halves = [metric(_part(a, len(a) // 2, generator), _part(b, len(b) // 2, generator)) for _ in range(repeats)]
    quantile = float(student.ppf(0.975, repeats - 1))
    found = {}
    for name, value in whole.items():
        half_width = quantile * float(torch.tensor([half[name] for half in halves], dtype=torch.float64).std())
        if value < 0 or not math.isfinite(value + half_width):
            continue
        lower, upper = max(value - half_width, 0.0), value + half_width
        if shares is not None and name in shares:
            least, most = clopper_pearson(round(value * shares[name]), shares[name])
            lower, upper = min(lower, least), min(max(upper, most), 1.0)
        found[name] = (lower, upper)
    return found


def frechet_floor(v: Tensor, n: int) -> float:
    """Expected Frechet distance between a Gaussian and n samples of it, to leading order in 1/n.

    ``tr(Sigma) / n + 1/2 sum_ij v_i v_j (1 + [i = j]) / ((n - 1) (v_i + v_j))``; the first term is due to the mean.

    Args:
        v: Eigenvalues of the covariance, >= 0, shape (d,); zeros add nothing.
        n: Samples; the formula is good where n is several times d.

    Source: derived for this project; docs/explanation/theory.md T11.
    """
    v = torch.as_tensor(v, dtype=torch.float64)
    pairs = v[:, None] * v / (v[:, None] + v).clamp(min=torch.finfo(torch.float64).tiny)
    return float(v.sum() / n + (pairs.sum() + pairs.diagonal().sum()) / (2 * (n - 1)))


ROWS = 1024
"""Rows of a kernel matrix at a time."""


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """``(x . y / d + 1)^3`` of every pair, shape (n, m)."""
    return (a @ b.T / a.shape[1] + 1).pow(3)


def _within(rows: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different rows, shape ()."""
    total = torch.stack([_kernel(part, rows).sum() for part in torch.split(rows, ROWS)]).sum()
    alone = (rows.square().sum(1) / rows.shape[1] + 1).pow(3).sum()
    return (total - alone) / (len(rows) * (len(rows) - 1))


def _of_subsets(a: Tensor, b: Tensor, of_a: Sequence[Tensor], of_b: Sequence[Tensor]) -> Tensor:
    """:func:`squared_mmd` of many pairs of subsets, given by places, shape (subsets,): each kernel is computed once.

    With Z, of shape (subsets, n), one where a row is in a subset, the sums over subsets of a kernel matrix K are the
    rows' sums of (Z K) * Z.
    """
    size = len(of_a[0])

    def members(x: Tensor, places: Sequence[Tensor]) -> Tensor:
        return torch.zeros(len(places), len(x), dtype=x.dtype, device=x.device).scatter(1, torch.stack([*places]), 1.0)

    def total(x: Tensor, in_x: Tensor, y: Tensor, in_y: Tensor) -> Tensor:
        parts = zip(torch.split(x, ROWS), torch.split(in_x, ROWS, 1), strict=True)
        return torch.stack([((members @ _kernel(rows, y)) * in_y).sum(1) for rows, members in parts]).sum(0)

    def within(x: Tensor, in_x: Tensor) -> Tensor:
        alone = in_x @ (x.square().sum(1) / x.shape[1] + 1).pow(3)
        return (total(x, in_x, x, in_x) - alone) / (size * (size - 1))

    in_a, in_b = members(a, of_a), members(b, of_b)
    return within(a, in_a) + within(b, in_b) - 2 * total(a, in_a, b, in_b) / size**2


def squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased squared MMD of ``(x . y / d + 1)^3`` between the rows of a and of b, shape ()."""
    return _within(a) + _within(b) - 2 * _kernel(a, b).mean()
