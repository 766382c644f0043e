"""Groups of numbers: found where a sample was made of several, and not in the tail of one."""

import numpy as np
import pytest
import torch
from torch import Tensor

from robustdiff.audit import mixture as groups
from robustdiff.audit.mixture import split


def mixture(*parts: tuple[int, float, float], seed: int = 0) -> Tensor:
    """So many numbers of each mean and standard deviation, one part after the other."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(np.concatenate([random.normal(mean, std, count) for count, mean, std in parts]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "tail",
    [
        lambda random: random.normal(0, 1, 1500),
        lambda random: random.lognormal(0, 0.5, 1500),
        lambda random: np.abs(random.normal(0, 1, 1500)),
        lambda random: random.exponential(1, 1500),
        lambda random: random.standard_t(3, 1500),
    ],
    ids=["normal", "lognormal", "half-normal", "exponential", "student"],
)
def test_one_population_is_one_group_however_long_its_tail(tail, seed: int) -> None:
    assert len(split(torch.from_numpy(tail(np.random.default_rng(seed))))) == 1


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(2))
def test_two_that_stand_five_deviations_apart_are_two(share: float, seed: int) -> None:
    upper = int(2000 * share)
    found = split(mixture((2000 - upper, 0, 1), (upper, 5, 1), seed=seed))
    assert len(found) == 2
    truth = torch.arange(2000) >= 2000 - upper
    assert (found.members(1) != truth).double().mean() < 0.02
    torch.testing.assert_close(found.mean, torch.tensor([0.0, 5.0]).double(), atol=0.5, rtol=0)
    assert found.apart[0] == pytest.approx(5, abs=1.2)


def test_two_that_stand_two_deviations_apart_are_one() -> None:
    assert len(split(mixture((1000, 0, 1), (1000, 2, 1)))) == 1


def test_three_are_in_order_whatever_the_order_of_the_numbers() -> None:
    x = mixture((300, 20, 1), (500, 0, 0.5), (200, 8, 1))
    found = split(x)
    assert found.label.shape == (1000,)
    assert found.label.dtype == torch.int64
    assert len(found) == 3
    assert len(found.apart) == 2
    assert (found.mean.diff() > 0).all()
    assert (found.label[:300] == 2).all()
    assert (found.label[300:800] == 0).all()
    assert (found.label[800:] == 1).all()


def test_the_distance_is_ashmans() -> None:
    found = split(mixture((1000, 0, 0.5), (1000, 10, 1.5)))
    (a, b), (s, t) = found.mean.tolist(), found.std.tolist()
    assert found.apart[0].item() == pytest.approx(2**0.5 * (b - a) / (s**2 + t**2) ** 0.5)
    assert found.apart[0].item() == pytest.approx(2**0.5 * 10 / 2.5**0.5, rel=0.05)


@pytest.mark.parametrize("few", [1, groups.FEWEST - 1])
def test_a_few_stragglers_go_to_their_neighbour_and_more_of_them_do_not(few: int) -> None:
    assert len(split(mixture((500, 0, 1), (few, 30, 0.1)))) == 1
    assert len(split(mixture((500, 0, 1), (groups.FEWEST + 2, 30, 0.1)))) == 2


def test_a_tiny_share_is_stragglers_too() -> None:
    assert len(split(mixture((9990, 0, 1), (10, 30, 0.1)))) == 1  # 0.1 %


@pytest.mark.parametrize("count", [1, 2, 15, 16, 100])
def test_equal_numbers_are_one_group(count: int) -> None:
    found = split(torch.full((count,), 0.3))
    assert len(found) == 1
    assert found.label.tolist() == [0] * count
    assert found.mean.item() == pytest.approx(0.3)
    assert found.std.item() == pytest.approx(0, abs=1e-6)
    assert len(found.apart) == 0


def test_fewer_than_twice_the_least_size_are_one_group() -> None:
    assert len(split(torch.tensor([0.0] * 7 + [9.0] * 8))) == 1
    assert len(split(torch.tensor([0.0] * 8 + [9.0] * 8))) == 2


def test_more_numbers_than_are_fitted_are_all_labelled(monkeypatch) -> None:
    monkeypatch.setattr(groups, "FIT", 300)
    found = split(mixture((600, 0, 1), (400, 12, 1)))
    assert torch.bincount(found.label).tolist() == [600, 400]


def test_the_same_numbers_fall_into_the_same_groups() -> None:
    x = mixture((300, 0, 1), (300, 6, 1))
    assert torch.equal(split(x).label, split(x).label)


@pytest.mark.parametrize("seed", range(6))
def test_every_group_has_members_enough(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tails = torch.randn(400, generator=generator).double() / torch.rand(400, generator=generator).double()
    spikes = torch.cat([torch.zeros(390).double(), 5 + torch.rand(10, generator=generator).double()])
    for values in (tails, tails.abs().sqrt(), spikes):
        found = split(values)
        count = torch.bincount(found.label, minlength=len(found))
        assert len(found) == 1 or count.min() >= groups.FEWEST
