"""The classifier behind the comparison: what it must find where the truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import seeded
from robustdiff.audit.damage_network import LEAST_SHARE, Scaling, calibration, fit_folds, with_own_shares


def two_gaussians(count: int, share: float, distance: float = 3.0) -> tuple[Tensor, Tensor]:
    """Numbers of N(0, 1) and, a share of them, N(distance, 1), and which they are."""
    of = (torch.arange(count) < share * count).long()
    return torch.randn(count, generator=seeded(0)) + distance * of, of


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_the_shares_of_classes_are_found(share: float) -> None:
    """Exact likelihood ratios, trained half and half: the shares of those asked come out to a hundredth."""
    x, of = two_gaussians(20_000, share)
    ratio = 3.0 * x - 4.5  # log N(x; 3, 1) / N(x; 0, 1)
    equal = torch.tensor([0.5, 0.5])
    trained = torch.stack([-ratio, torch.zeros_like(ratio)], 1).log_softmax(1)
    probability, shares = with_own_shares(trained - equal.log(), equal)
    assert float(shares[1]) == pytest.approx(share, abs=0.01)
    asked = probability[:, 1].exp()
    among = (asked > 0.7) & (asked < 0.95)
    assert float(of[among].float().mean()) == pytest.approx(float(asked[among].mean()), abs=0.06)


def test_no_class_vanishes() -> None:
    """A class that nothing is of keeps its least share."""
    x, _ = two_gaussians(2000, 0.0)
    ratio = 3.0 * x - 4.5
    trained = torch.stack([-ratio, torch.zeros_like(ratio)], 1).log_softmax(1)
    _, shares = with_own_shares(trained - math.log(0.5), torch.tensor([0.5, 0.5]))
    assert LEAST_SHARE / 2 < float(shares[1]) < 0.01


def test_too_sure_is_calibrated() -> None:
    """Logarithms three times too large, and one class preferred by 1, come out as they should be."""
    x, of = two_gaussians(20_000, 0.5, distance=1.0)
    right = torch.stack([torch.zeros_like(x), x - 0.5], 1)
    factor, offset = calibration(3 * right + torch.tensor([1.0, 0.0]), of, torch.ones(len(x)))
    assert factor == pytest.approx(1 / 3, rel=0.05)
    assert float(offset[0] - offset[1]) == pytest.approx(-1 / 3, abs=0.05)


def test_folds_learn_and_chance_is_seeded() -> None:
    """Three networks at once tell what can be told, each from its own examples; the same again."""
    x = torch.randn(600, 5, generator=seeded(1))
    y = (x[:, 0] > 0).long()
    flipped = 1 - y

    def ask() -> list[Tensor]:
        known = [(x, y, torch.ones(600)), (x, flipped, torch.ones(600))]
        return fit_folds(known, [x[:50], x[:80]], 2, seed=0)

    first, second = ask()
    assert (len(first), len(second)) == (50, 80)
    assert float((first.argmax(1) == y[:50]).float().mean()) > 0.9
    assert float((second.argmax(1) == flipped[:80]).float().mean()) > 0.9
    torch.testing.assert_close(first.exp().sum(1), torch.ones(50))
    assert all(torch.equal(a, b) for a, b in zip(ask(), (first, second), strict=True))


def test_weights_decide_between_contradictions() -> None:
    """Of equal inputs with both classes, the heavier one is believed, in proportion."""
    x, y = torch.zeros(200, 3), torch.arange(200) % 2
    weight = torch.where(y == 1, 3.0, 1.0)
    (told,) = fit_folds([(x, y, weight)], [x[:1]], 2, seed=0)
    assert float(told[0, 1].exp()) == pytest.approx(0.75, abs=0.06)


def test_scaling_draws_large_values_in() -> None:
    """The median is 0, the spread of a normal distribution 1, and far values grow as logarithms."""
    x = torch.randn(5000, 1, generator=seeded(2)) * 4 + 7
    scaling = Scaling.of(x)
    assert float(scaling(torch.tensor([[7.0]]))) == pytest.approx(0, abs=0.1)
    assert float(scaling(torch.tensor([[11.0]]))) == pytest.approx(math.log(2), abs=0.1)
    assert float(scaling(torch.tensor([[4007.0]]))) < 8
