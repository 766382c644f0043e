"""Nearest neighbours against brute force, and what is made of them against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.spatial.distance import cdist
from scipy.stats import beta, binom
from torch import Tensor

from experiments.paper.linear import coverage_of_one_law
from helpers import normal
from robustdiff.evaluation.neighbours import (
    clipped,
    covered_by,
    diversity,
    k_nearest,
    mean_distance,
    prdc,
    vendi,
)


def brute_force(a: Tensor, b: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    distances = (a.double()[:, None] - b.double()).square().sum(2).sqrt()
    if exclude_self:
        distances.fill_diagonal_(math.inf)
    found = distances.sort(dim=1, stable=True)
    return found.values[:, :k], found.indices[:, :k]


# -- nearest neighbours ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 2**28])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_the_nearest_are_those_of_brute_force(chunk_bytes: int, exclude_self: bool) -> None:
    b = normal(70, 5, seed=1)
    a = b if exclude_self else normal(31, 5)
    done: list[int] = []
    distances, indices = k_nearest(
        a, b, 6, chunk_bytes=chunk_bytes, exclude_self=exclude_self, progress=lambda rows: done.append(rows)
    )
    wanted, where = brute_force(a, b, 6, exclude_self)
    assert torch.equal(indices, where)
    torch.testing.assert_close(distances, wanted, rtol=1e-12, atol=0)
    assert sum(done) == len(a)
    assert (len(done) == 1) == (chunk_bytes == 2**28)


def test_rounding_does_not_reorder_neighbours_far_from_the_origin() -> None:
    """Neighbours 1e-4 apart at 1e4 from zero: ``|a|^2 + |b|^2 - 2 a . b`` about zero, or in float32, confuses them."""
    b = 1e4 + 1e-4 * normal(300, 50, seed=1)
    a = b[:40] + 1e-6 * normal(40, 50, seed=2)
    distances, indices = k_nearest(a, b, 5)
    wanted, where = brute_force(a, b, 5, False)
    assert torch.equal(indices, where)
    torch.testing.assert_close(distances, wanted, rtol=1e-4, atol=0)


def test_an_outlier_does_not_take_the_precision_of_the_others() -> None:
    """It makes the products imprecise: equal rows must be at zero all the same, and the nearest be the nearest."""
    b = normal(200, 20, seed=1)
    b[7] = 1e7
    distances, indices = k_nearest(b[:50] + 1e-3 * normal(50, 20, seed=2), b, 3)
    assert torch.equal(indices[8:, 0], torch.arange(8, 50))
    distances, indices = k_nearest(b[:50], b, 3)
    assert torch.equal(indices[:, 0], torch.arange(50))
    assert torch.equal(distances[:, 0], torch.zeros(50, dtype=torch.float64))


def test_equal_rows_are_at_zero_and_in_order() -> None:
    x = torch.tensor([[3], [9], [3], [3], [200]], dtype=torch.uint8)
    distances, indices = k_nearest(x, x, 3)
    assert indices.tolist() == [[0, 2, 3], [1, 0, 2], [0, 2, 3], [0, 2, 3], [4, 1, 0]]
    assert distances[4].tolist() == [0.0, 191.0, 197.0]
    distances, indices = k_nearest(x, x, 2, exclude_self=True)
    assert indices.tolist() == [[2, 3], [0, 2], [0, 3], [0, 2], [1, 0]]
    assert distances[0].tolist() == [0.0, 0.0]


def test_too_few_rows_are_refused() -> None:
    x = normal(4, 2)
    with pytest.raises(ValueError, match="k must be from 1 to 3, the rows there are, got 4"):
        k_nearest(x, x, 4, exclude_self=True)
    with pytest.raises(ValueError, match="k must be from 1 to 4, the rows there are, got 0"):
        k_nearest(x, x, 0)
    with pytest.raises(ValueError, match="the same set on both sides"):
        k_nearest(x, x[:3], 1, exclude_self=True)
    with pytest.raises(ValueError, match="fake must have at least 6 rows, got 4"):
        prdc(normal(9, 2), x)


# -- balls -------------------------------------------------------------------------------------------


def test_balls_on_a_line_are_counted_by_hand() -> None:
    """k = 1."""
    real = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
    fake = torch.tensor([[0.5], [1.6], [30.0], [60.0], [0.9]])
    # real balls: (-1, 1), (0, 2), (6, 14), (10, 18)
    found = prdc(real, fake, 1)
    # 0.5 in two real balls, 1.6 in one, 0.9 in two; 30 and 60 in none
    assert found["precision"] == pytest.approx(3 / 5)
    assert found["density"] == pytest.approx(5 / 5)
    assert found["coverage"] == pytest.approx(2 / 4)
    # fake balls: (.1,.9), (.9,2.3), (1.6,58.4), (30,90), (.5,1.3): 1, 10 and 14 are inside one
    assert found["recall"] == pytest.approx(3 / 4)


@pytest.mark.parametrize("chunk_bytes", [1, 3_000, 2**28])
def test_copies_lie_on_the_rims_and_not_inside(chunk_bytes: int) -> None:
    """Of a copied set every ball holds its centre and k - 1 others: density is 1 exactly, whatever the rounding."""
    real = 100 + normal(150, 30, dtype=torch.float32)
    found = prdc(real, real.flip(0), 5, chunk_bytes=chunk_bytes)
    assert found == {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}


def test_balls_are_open() -> None:
    """Balls of radius zero, about images that occur more than k times, hold nothing."""
    same = torch.ones(6, 2)
    assert set(prdc(same, same, 2).values()) == {0.0}


def test_far_sets_share_nothing_and_a_collapsed_one_covers_nothing() -> None:
    real = normal(100, 3)
    assert set(prdc(real, real + 100).values()) == {0.0}
    collapsed = prdc(real, real[:1] + 1e-3 * normal(100, 3, seed=1))
    assert collapsed["precision"] == 1.0
    assert collapsed["recall"] == pytest.approx(0.0, abs=0.011)
    assert collapsed["coverage"] < 0.2


def test_T11_coverage_and_density_of_one_law() -> None:
    """Coverage is the closed form, density 1, and both tell their set from its half."""
    n, k, repeats = 150, 4, 40
    found = [prdc(normal(n, 3, seed=2 * i), normal(n, 3, seed=2 * i + 1), k) for i in range(repeats)]
    mean = {name: sum(f[name] for f in found) / repeats for name in found[0]}
    assert mean["coverage"] == pytest.approx(coverage_of_one_law(n, k), abs=0.006)
    assert mean["density"] == pytest.approx(1, abs=0.03)
    assert mean["precision"] == pytest.approx(mean["recall"], abs=0.01)
    swapped = prdc(normal(n, 3, seed=1), normal(n, 3), k)
    assert swapped["precision"] == found[0]["recall"]
    assert swapped["recall"] == found[0]["precision"]


# -- diversity ---------------------------------------------------------------------------------------


# -- clipped -----------------------------------------------------------------------------------------


def plainly(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """The formulas, by loops: clipped density, and the mean of min(count, k) / k that clipped coverage looks up."""
    among, across = cdist(real, real), cdist(real, fake)
    radii = np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(among)])
    least = np.minimum(radii, np.median(radii))
    mine = [min(sum(across[i, j] <= least[i] for i in range(len(real))), k) / k for j in range(len(fake))]
    ideal = [min(sum(among[i, j] <= least[i] for i in range(len(real)) if i != j), k) / k for j in range(len(real))]
    held = np.mean([min(sum(across[i] < radii[i]), k) / k for i in range(len(real))])
    return min(float(np.mean(mine) / np.mean(ideal)), 1.0), float(held)


@pytest.mark.parametrize("chunk_bytes", [2000, 2**26])
@pytest.mark.parametrize(("n", "m", "d", "shift"), [(60, 45, 3, 0.0), (40, 70, 2, 0.8), (33, 20, 30, 0.3)])
def test_clipped_is_as_its_formula_says(n: int, m: int, d: int, shift: float, chunk_bytes: int) -> None:
    real, fake = normal(n, d, seed=1), normal(m, d, seed=2) + shift
    real[0] *= 20  # an outlier, whose ball would hold everything
    density, held = plainly(real.numpy(), fake.numpy(), 3)
    found = clipped(real, fake, 3, chunk_bytes=chunk_bytes)
    assert found["clipped density"] == pytest.approx(density, abs=1e-12)
    assert found["clipped coverage"] == covered_by(held, n, m, 3)
    assert 0 < found["clipped coverage"] <= 1


@pytest.mark.parametrize(("n", "m", "k"), [(50, 40, 5), (30, 90, 2)])
def test_the_expected_filling_of_balls_is_that_of_an_integral(n: int, m: int, k: int) -> None:
    """Over the mass of a ball, Beta(k, n - k), of the binomial mean of min(count, k) / k."""
    for good in (m // 4, m // 2, m):

        def filled(mass: float, good: int = good) -> float:
            counts = np.arange(good + 1)
            mean = (np.minimum(counts, k) * binom.pmf(counts, good, mass)).sum() / k
            return float(mean * beta.pdf(mass, k, n - k))

        assert covered_by(quad(filled, 0, 1)[0], n, m, k) == pytest.approx(good / m, abs=1e-6)
    assert covered_by(0.0, n, m, k) == 0
    assert covered_by(1.0, n, m, k) == 1


@pytest.mark.parametrize("good", [1.0, 0.7, 0.3, 0.0])
def test_clipped_values_are_the_share_of_good_samples(good: float) -> None:
    """The others lie far away. Density and coverage count from 0 to 1, precision and coverage of the usual kind not."""
    real, fake = normal(1000, 6, seed=1), normal(1000, 6, seed=2)
    fake[round(good * 1000) :] += 100
    found = clipped(real, fake, 5)
    assert found["clipped density"] == pytest.approx(good, abs=0.05)
    assert found["clipped coverage"] == pytest.approx(good, abs=0.06)


def test_no_sample_counts_for_others() -> None:
    """Of ten images one is at the mean, in most balls, the others far away: density above 1, clipped a quarter.

    A tenth, over what real images among themselves reach in so many dimensions, .4.
    """
    real = normal(500, 30, seed=1)
    fake = torch.full((10, 30), 100.0).double()
    fake[0] = 0
    assert prdc(real, fake, 5)["density"] > 1
    assert clipped(real, fake, 5)["clipped density"] == pytest.approx(0.25, abs=0.02)
    alike = clipped(torch.ones(20, 3), torch.zeros(20, 3), 5)
    assert alike["clipped density"] == 0
    assert alike["clipped coverage"] == 0


# -- diversity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(60, 20), (20, 60)])
def test_vendi_is_that_of_the_kernel_matrix(n: int, d: int) -> None:
    x = normal(n, d, seed=3).numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / n)
    values = values[values > 1e-15]
    assert vendi(torch.from_numpy(x)) == pytest.approx(math.exp(-(values * np.log(values)).sum()), rel=1e-9)


def test_vendi_counts_different_images() -> None:
    """Of k directions at right angles, equally often, whatever their lengths; one has as many as it is worth."""
    apart = torch.eye(7).repeat(3, 1) * torch.arange(1, 22)[:, None]
    assert vendi(apart) == pytest.approx(7)
    assert vendi(torch.ones(9, 4)) == pytest.approx(1)
    uneven = torch.eye(2)[[0, 0, 0, 1]]
    assert vendi(uneven) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert math.isnan(vendi(torch.zeros(3, 4)))


def test_mean_distance_is_over_pairs_of_different_rows() -> None:
    x = 1000 + normal(60, 4)
    wanted = float(torch.pdist(x).mean())
    assert mean_distance(x) == pytest.approx(wanted, rel=1e-9)
    assert mean_distance(x, chunk_bytes=1500) == pytest.approx(wanted, rel=1e-9)
    assert mean_distance(torch.tensor([[0], [0], [255]], dtype=torch.uint8)) == pytest.approx(170)
    with pytest.raises(ValueError, match="at least 2 rows"):
        mean_distance(x[:1])


def test_diversity_of_gaussians_is_the_ratio_of_their_spreads() -> None:
    """On a line two normal numbers are ``2 / sqrt(pi)`` apart on average."""
    real = normal(3000, 1)
    assert mean_distance(real) == pytest.approx(2 / math.pi**0.5, rel=0.03)
    assert diversity(0.5 * normal(3000, 1, seed=1), real) == pytest.approx(0.5, rel=0.05)
    assert diversity(real[:1].expand(50, 1), real) == 0
