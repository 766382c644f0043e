"""LevelBalancedSampler: every timestep equally often, against the table of all probabilities."""

import pytest
import scipy.stats
import torch
from torch import Tensor

from helpers import seeded
from robustdiff.training.curriculum import LevelBalancedSampler

T = 10
FIRST = torch.tensor([0, 3, 3, 7, 0, 9])
WEIGHT = torch.tensor([1.0, 1.0, 0.5, 2.0, 0.0, 0.25]).double()


def table(first: Tensor, weight: Tensor, steps: int = T) -> Tensor:
    """P(i, t), (N, T), by the words of the docstring."""
    p = torch.zeros(len(first), steps).double()
    for t in range(steps):
        allowed = [i for i in range(len(first)) if first[i] <= t]
        n = sum(float(weight[i]) for i in allowed)
        for i in allowed:
            p[i, t] = float(weight[i]) / max(n, float(weight.sum()) / 50) if n else 0.0
    return p / p.sum()


def test_the_share_of_an_image_is_its_row_of_the_table() -> None:
    p = table(FIRST, WEIGHT)
    torch.testing.assert_close(LevelBalancedSampler(FIRST, WEIGHT, T).share, p.sum(1))
    torch.testing.assert_close(p.sum(0), torch.full((T,), 1 / T).double())  # every timestep equally often


def test_images_without_noise_and_of_equal_weight_are_uniform() -> None:
    visits = LevelBalancedSampler(torch.zeros(5, dtype=torch.long), torch.ones(5), T)
    torch.testing.assert_close(visits.share, torch.full((5,), 0.2).double())
    u = torch.linspace(0, 1, 1001).double()[:-1]
    assert torch.equal(visits.timesteps(torch.zeros(1000, dtype=torch.long), u), (u * T).long())


def test_timesteps_of_an_image_are_its_row_of_the_table() -> None:
    visits, p, count = LevelBalancedSampler(FIRST, WEIGHT, T), table(FIRST, WEIGHT), 100_000
    u = (torch.arange(count).double() + 0.5) / count
    for image in visits.used.tolist():
        t = visits.timesteps(torch.full((count,), image), u)
        assert t.min() >= FIRST[image]
        found = torch.bincount(t, minlength=T).double() / count
        torch.testing.assert_close(found, p[image] / p[image].sum(), atol=2 / count, rtol=0)


def test_no_number_leads_below_the_first_timestep_or_beyond_the_last() -> None:
    first = torch.tensor([0, 1, 998, 999])
    visits = LevelBalancedSampler(first, torch.tensor([1e-6, 1.0, 1.0, 3.0]), 1000)
    for u in (0.0, 1e-300, 0.5, 1 - 2**-53):
        t = visits.timesteps(torch.arange(4), torch.full((4,), u).double())
        assert (t >= first).all()
        assert (t <= 999).all()


def test_images_and_timesteps_together_follow_the_table() -> None:
    visits, p, passes = LevelBalancedSampler(FIRST, WEIGHT, T), table(FIRST, WEIGHT), 4000
    generator = seeded(0)
    places = torch.cat([visits.order(generator) for _ in range(passes)])
    t = visits.timesteps(places, torch.rand(len(places), generator=generator, dtype=torch.float64))
    counts = torch.bincount(places * T + t, minlength=len(FIRST) * T).reshape(-1, T)
    assert not counts[p == 0].any()
    result = scipy.stats.chisquare(counts[p > 0], p[p > 0] * len(places))
    assert result.pvalue > 0.01
    assert scipy.stats.chisquare(counts.sum(0)).pvalue > 0.01  # uniform over t
    column = counts[:, 8].double()  # by weight at a timestep
    torch.testing.assert_close(column[:4] / column[:4].sum(), WEIGHT[:4] / WEIGHT[:4].sum(), atol=0.02, rtol=0)


def test_few_images_are_used_at_most_fifty_times_their_due() -> None:
    """One image for the lower half of the timesteps, where 999 others cannot be: every second visit would be its."""
    first, weight = torch.tensor([0] + [5] * 999), torch.ones(1000)
    visits, p = LevelBalancedSampler(first, weight, T), table(first, weight)
    torch.testing.assert_close(visits.share, p.sum(1))
    others, alone = p[1, 5:].mean(), p[0, :5].mean()  # per image and timestep: beside the others, and alone
    assert alone / others == pytest.approx(50, rel=1e-9)
    assert visits.share[0] / visits.share[1] == pytest.approx((5 * 50 + 5) / 5, rel=1e-9)
    enough = LevelBalancedSampler(torch.tensor([0] * 20 + [5] * 980), weight, T)  # a fiftieth: every timestep alike
    assert enough.share[0] / enough.share[-1] == pytest.approx((5 * 50 + 5) / 5, rel=1e-9)
    fewer = LevelBalancedSampler(torch.tensor([0] * 10 + [5] * 990), weight, T)  # a hundredth: still fifty
    assert fewer.share[0] / fewer.share[-1] == pytest.approx((5 * 50 + 5) / 5, rel=1e-9)
    more = LevelBalancedSampler(torch.tensor([0] * 100 + [5] * 900), weight, T)  # a tenth: ten times
    assert more.share[0] / more.share[-1] == pytest.approx((5 * 10 + 5) / 5, rel=1e-9)


def test_a_pass_has_each_image_as_often_as_its_share_says_rounded_up_or_down() -> None:
    first = torch.randint(0, T, (200,), generator=seeded(1))
    weight = torch.rand(200, generator=seeded(2)).double() * (torch.arange(200) % 5 > 0)
    visits, generator = LevelBalancedSampler(first, weight, T), seeded(3)
    due = visits.share * 160
    orders = [visits.order(generator) for _ in range(300)]
    for order in orders:
        assert len(order) == len(visits.used) == 160
        counts = torch.bincount(order, minlength=200)
        assert (counts >= due.floor()).all()
        assert (counts <= due.ceil()).all()
        assert not counts[weight == 0].any()
    mean = torch.bincount(torch.cat(orders), minlength=200).double() / 300
    assert (mean - due).abs().max() < 0.15  # 5 standard deviations of a count that is one of two
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(visits.order(seeded(3)), orders[0])


def test_where_no_image_may_be_used_no_timestep_is_drawn() -> None:
    visits = LevelBalancedSampler(torch.tensor([4, 6]), torch.ones(2), T)
    torch.testing.assert_close(visits.share, table(visits.first, visits.weight).sum(1))
    assert visits.timesteps(torch.tensor([0, 1]), torch.zeros(2).double()).tolist() == [4, 6]


@pytest.mark.parametrize(
    ("first", "weight"),
    [
        ([0, 1], [1.0]),
        ([[0]], [[1.0]]),
        ([-1, 0], [1.0, 1.0]),
        ([T, 0], [1.0, 1.0]),
        ([0, 0], [1.0, -1.0]),
        ([0, 0], [1.0, float("nan")]),
        ([0, 0], [1.0, float("inf")]),
        ([0, 0], [0.0, 0.0]),
        ([], []),
    ],
)
def test_what_does_not_fit_is_refused(first: list, weight: list) -> None:
    with pytest.raises(ValueError, match="LevelBalancedSampler needs"):
        LevelBalancedSampler(torch.tensor(first, dtype=torch.long), torch.tensor(weight), T)
