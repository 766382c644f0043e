"""Distances between sets of features against closed forms, plain formulas and repeated draws."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from helpers import normal, seeded
from robustdiff.evaluation import distances
from robustdiff.evaluation.distances import (
    MetricValue,
    clopper_pearson,
    frechet_bias,
    frechet_distance,
    frechet_gaussians,
    half_sampled,
    kernel_distance,
)
from robustdiff.evaluation.neighbours import prdc


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def exact_sample(mean: Tensor, covariance_root: Tensor, n: int, seed: int = 0) -> Tensor:
    """n rows whose mean and unbiased covariance are exactly ``mean`` and ``root^T root``."""
    draw = normal(n, len(mean), seed=seed)
    basis = torch.linalg.qr(draw - draw.mean(0)).Q * math.sqrt(n - 1)
    return mean + basis @ covariance_root


# -- Frechet distance --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [12, 5])
def test_frechet_of_gaussians_with_common_axes_is_exact(rank: int) -> None:
    """There the distance is ``|mean|^2 + sum (sqrt(v_a) - sqrt(v_b))^2``; twelve orders of magnitude, or rank 5."""
    d, q = 12, rotation(12)
    v_a = 10 ** -torch.arange(d, dtype=torch.float64)
    v_b = v_a.flip(0).clone()
    v_a[rank:] = 0
    mean_a, mean_b = normal(d, seed=1), normal(d, seed=2)
    expected = float((mean_a - mean_b).square().sum() + (v_a.sqrt() - v_b.sqrt()).square().sum())
    cov_a, cov_b = (q * v_a) @ q.T, (q * v_b) @ q.T
    assert frechet_gaussians(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-10)
    samples = [exact_sample(mean, v.sqrt()[:, None] * q.T, 40) for mean, v in ((mean_a, v_a), (mean_b, v_b))]
    assert frechet_distance(*samples) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_gaussians_without_common_axes_is_that_of_the_optimal_map() -> None:
    """Pushing N(0, S) by a symmetric positive T gives N(0, T S T) at distance ``tr((T - I) S (T - I))`` (Brenier)."""
    d = 6
    root, factor = normal(d, d, seed=1), normal(d, d, seed=2)
    covariance, transport = root @ root.T, factor @ factor.T / d + 0.1 * torch.eye(d)
    away = transport - torch.eye(d)
    expected = float((away @ covariance @ away).trace())
    zero = torch.zeros(d)
    pushed = transport @ covariance @ transport
    assert frechet_gaussians(zero, covariance, zero, pushed) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (15, 40)])
def test_frechet_of_a_set_with_itself_is_zero_and_of_its_shift_the_squared_length(n: int, d: int) -> None:
    x, shift = normal(n, d), normal(d, seed=1)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-12)
    assert frechet_distance(x, 3 * x) == pytest.approx(
        float(4 * x.var(0).sum() + 4 * x.mean(0).square().sum()), rel=1e-12
    )


def test_frechet_takes_float32_features_far_from_the_origin() -> None:
    """Accumulating squares in float32, or about zero instead of the mean, would be off by more than the distance."""
    x = normal(500, 8, dtype=torch.float32).round(decimals=2)
    y = normal(400, 8, seed=1, dtype=torch.float32).round(decimals=2)
    near = frechet_distance(x, y)
    assert frechet_distance((x + 4096).double(), (y + 4096).double()) == pytest.approx(near, rel=1e-4)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(x.double(), y.double()), rel=1e-14)


@pytest.mark.parametrize(("n", "m", "d"), [(600, 500, 32), (60, 50, 64)])
def test_frechet_is_its_formula_by_the_eigenvalues_of_the_product(n: int, m: int, d: int) -> None:
    scale = torch.arange(1, d + 1) ** -0.5
    a, b = normal(n, d) * scale, 1.1 * normal(m, d, seed=1) * scale + 0.1
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    wanted = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_T11_the_bias_is_the_mean_distance_of_two_samples_of_one_law(decay: float) -> None:
    d, n, m = 24, 300, 200
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** (-decay / 2)
    found = [
        frechet_distance(normal(n, d, seed=2 * i) * scale, normal(m, d, seed=2 * i + 1) * scale) for i in range(100)
    ]
    many = exact_sample(torch.ones(d), torch.diag(scale), 1000, seed=7)
    assert frechet_bias(many, n, m) == pytest.approx(sum(found) / len(found), rel=0.04)
    assert frechet_bias(many, n, n) > frechet_bias(many, 2 * n, n)


# -- kernel distance ---------------------------------------------------------------------------------


def third_moments(mean: float, sd: float) -> tuple[float, float, float]:
    """E x, E x^2, E x^3 of a Gaussian."""
    return mean, mean**2 + sd**2, mean**3 + 3 * mean * sd**2


def exact_kernel_distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    """In one dimension ``(x y + 1)^3`` has the features x^3, sqrt(3) x^2, sqrt(3) x, 1."""
    first, second, third = (p - q for p, q in zip(third_moments(*a), third_moments(*b), strict=True))
    return 3 * first**2 + 3 * second**2 + third**2


def test_kid_is_the_exact_unbiased_distance_of_two_sets() -> None:
    """Of subsets as large as all but one row, whose mean over all subsets is the statistic of the whole."""
    a, b = normal(5, 3), normal(5, 3, seed=1) + 1
    wanted = []
    for i in range(5):
        for j in range(5):
            x, y = a[torch.arange(5) != i], b[torch.arange(5) != j]

            def k(u: Tensor, v: Tensor) -> float:
                return float((u @ v / 3 + 1) ** 3)

            pairs = [(p, q) for p in range(4) for q in range(4) if p != q]
            within = sum(k(x[p], x[q]) + k(y[p], y[q]) for p, q in pairs) / 12
            wanted.append(within - 2 * sum(k(p, q) for p in x for q in y) / 16)
    value, _, size = kernel_distance(a, b, subset_size=4, subsets=3000)
    assert size == 4
    assert value == pytest.approx(sum(wanted) / 25, abs=4 * float(torch.tensor(wanted).std()) / 3000**0.5)
    single = [kernel_distance(a, b, subset_size=4, subsets=2, seed=s)[0] for s in range(10)]
    means = {round((p + q) / 2, 9) for p in wanted for q in wanted}
    assert {round(v, 9) for v in single} <= means


@pytest.mark.parametrize("b", [(0.0, 0.3), (0.15, 0.36)])
def test_kid_is_unbiased_and_its_standard_error_honest(b: tuple[float, float]) -> None:
    """The mean of 100 repetitions is the closed form; the standard error is right where the laws differ."""
    truth, repeats = exact_kernel_distance((0.0, 0.3), b), 100
    found = [
        kernel_distance(0.3 * normal(120, 1, seed=2 * i), normal(120, 1, seed=2 * i + 1) * b[1] + b[0], subsets=40)
        for i in range(repeats)
    ]
    values, errors = (torch.tensor([f[j] for f in found]) for j in (0, 1))
    assert all(f[2] == 60 for f in found)
    assert float(values.mean()) == pytest.approx(truth, abs=4 * float(values.std()) / repeats**0.5)
    # for equal laws sqrt(3) too large
    assert (0.8 if truth else 1.3) < float(errors.square().mean().sqrt() / values.std()) < (1.25 if truth else 2.1)
    # in one dimension the distance of different laws is skewed, and a symmetric interval covers about 89 %
    assert float(((values - truth).abs() < 1.96 * errors).double().mean()) >= (0.8 if truth else 0.98)


@pytest.mark.parametrize("rows", [7, 1024])
def test_kid_of_many_subsets_at_once_is_that_of_each(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ROWS", rows)
    a, b = normal(50, 6, seed=1), normal(40, 6, seed=2) + 0.3
    of_a, of_b = ([torch.randperm(len(x), generator=seeded(i))[:12] for i in range(9)] for x in (a, b))
    each = torch.stack([distances.squared_mmd(a[one], b[other]) for one, other in zip(of_a, of_b, strict=True)])
    torch.testing.assert_close(distances._of_subsets(a, b, of_a, of_b), each, rtol=1e-10, atol=1e-12)


def test_kid_draws_from_its_seed_alone_and_takes_subsets_of_at_most_a_thousand() -> None:
    a, b = normal(50, 2), normal(40, 2, seed=1)
    torch.manual_seed(0)
    first = kernel_distance(a, b, seed=3)
    torch.manual_seed(1)
    assert kernel_distance(a, b, seed=3) == first
    assert kernel_distance(a, b, seed=4) != first
    assert first[2] == 20
    assert kernel_distance(normal(2100, 1), normal(2200, 1), subsets=2)[2] == 1000


# -- intervals ---------------------------------------------------------------------------------------


def coverage_of_intervals(n: int, m: int, d: int, shift: float, scale: float, repeats: int = 80) -> tuple[float, float]:
    """(share of intervals that hold the mean value, mean width in units of the narrowest that could)."""
    values, intervals = [], []
    for i in range(repeats):
        a, b = normal(n, d, seed=2 * i) * scale + shift, normal(m, d, seed=2 * i + 1)
        values.append(frechet_distance(a, b))
        found = half_sampled(lambda x, y: {"fd": frechet_distance(x, y)}, a, b, repeats=20, seed=i)
        intervals.append(found["fd"])
    mean, sd = sum(values) / repeats, float(torch.tensor(values).std())
    covered = sum(low < mean < high for low, high in intervals) / repeats
    return covered, sum(high - low for low, high in intervals) / repeats / (2 * 1.96 * sd)


@pytest.mark.parametrize(
    ("n", "m", "d", "shift", "scale", "widest"),
    [
        (200, 200, 4, 0.5, 1.3, 1.35),
        pytest.param(300, 120, 4, 0.3, 1.0, 1.6, marks=pytest.mark.slow),
        pytest.param(80, 80, 8, 0.0, 1.0, 2.1, marks=pytest.mark.slow),
        pytest.param(40, 40, 40, 0, 1.2, 2.1, marks=pytest.mark.slow),
    ],
)
def test_half_sampled_intervals_of_frechet_cover(
    n: int, m: int, d: int, shift: float, scale: float, widest: float
) -> None:
    """At least as often as stated; nearly exact for different laws, up to sqrt(3) too wide for equal ones."""
    covered, width = coverage_of_intervals(n, m, d, shift, scale)
    assert covered >= 0.9
    assert 0.85 < width < widest


@pytest.mark.slow
def test_half_sampled_intervals_of_balls_cover_also_where_nothing_varies() -> None:
    """Recall is 1 in most of these draws, and then in most halves; its mean is below."""
    rows = {"precision": 80, "recall": 80, "coverage": 80}
    values: list[dict[str, float]] = []
    intervals = []
    for i in range(60):
        real, fake = normal(80, 2, seed=2 * i), 1.5 * normal(80, 2, seed=2 * i + 1)
        values.append(prdc(real, fake))
        intervals.append(half_sampled(prdc, real, fake, repeats=20, seed=i, shares=rows))
    assert sum(v["recall"] == 1 for v in values) > 20
    for name in values[0]:
        mean = sum(v[name] for v in values) / len(values)
        assert sum(f[name][0] <= mean <= f[name][1] for f in intervals) / len(intervals) >= 0.9, name
    upper = [f["recall"][1] for f in intervals]
    assert max(upper) == 1.0
    assert min(f["recall"][0] for f in intervals) > 0.85


def test_half_sampled_uses_the_mean_of_a_set_as_theory_says() -> None:
    """For a mean, half-sampling has a closed form: the standard error is ``sd / sqrt(n)``."""
    x = 10 + normal(400, 1)
    interval = half_sampled(lambda a, b: {"mean": float(a.mean())}, x, x, repeats=400)["mean"]
    assert (interval[0] + interval[1]) / 2 == pytest.approx(float(x.mean()), abs=1e-12)
    assert (interval[1] - interval[0]) / 2 == pytest.approx(1.966 * float(x.std()) / 20, rel=0.12)
    few = half_sampled(lambda a, b: {"mean": float(a.mean())}, x, x, repeats=400, seed=1)["mean"]
    assert few != interval


def test_no_interval_reaches_below_zero() -> None:
    x = normal(8, 1)
    assert half_sampled(lambda a, b: {"fd": frechet_distance(a, b)}, x, x)["fd"][0] == 0.0


@pytest.mark.parametrize("trials", [1, 7, 100, 20000])
def test_clopper_pearson_is_scipys(trials: int) -> None:
    for successes in sorted({0, 1, trials // 3, trials - 1, trials}):
        wanted = binomtest(successes, trials).proportion_ci(0.95, "exact")
        assert clopper_pearson(successes, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    with pytest.raises(ValueError, match="no share"):
        clopper_pearson(trials + 1, trials)


# -- refusals ----------------------------------------------------------------------------------------


def test_bad_sets_are_refused() -> None:
    x, nan = normal(10, 2), torch.full((10, 2), torch.nan)
    with pytest.raises(ValueError, match="b holds numbers that are not finite"):
        frechet_distance(x, nan)
    with pytest.raises(ValueError, match="of one length"):
        frechet_distance(x, normal(10, 3))
    with pytest.raises(ValueError, match="a must have at least 2 rows, got 1"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match=r"a must have shape \(n, d\), got \(10,\)"):
        frechet_distance(x[:, 0], x)
    with pytest.raises(ValueError, match="subset_size must be from 2 to 9"):
        kernel_distance(x, x, subset_size=10)
    with pytest.raises(ValueError, match="subsets"):
        kernel_distance(x, x, subsets=1)
    with pytest.raises(ValueError, match="repeats"):
        half_sampled(lambda a, b: {}, x, x, repeats=9)


def test_a_value_is_json() -> None:
    value = MetricValue("FID", 3.0, None, "lower", (1.0, 2.0), {"n": 3})
    entry = json.loads(json.dumps(value.to_json()))
    assert entry == {"value": 3.0, "floor": None, "better": "lower", "interval": [1.0, 2.0], "about": {"n": 3}}
    assert MetricValue("x", 1.0, 0.5, "higher").to_json()["interval"] is None
