"""Nearest neighbours against brute force, and what is made of them against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from experiments.paper.linear import coverage_of_one_law
from helpers import normal
from robustdiff.evaluation.neighbours import (
    diversity,
    k_nearest,
    mean_distance,
    prdc,
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
