"""What must hold of a group of noise estimates to be called noisy, on estimates made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fields import gaussian_set, loader, spectrum
from helpers import seeded
from robustdiff.audit import mixture
from robustdiff.audit.detectors import noise
from robustdiff.audit.detectors.noise import noisy_images
from robustdiff.audit.finding import Action
from robustdiff.audit.spectral_model import Energies, SpectralFit

K = 48


def fit(sigma: Tensor, least: float = 1.0, blocks: float = 64, side: int = 8, picture: float = 1e-4) -> SpectralFit:
    """Estimates of images of one contrast, whose excess rises from ``least`` along the weakest direction to 1.

    The pictures themselves have the variance ``picture``.
    """
    v, values = sigma.double().square(), spectrum(K, 2.0) * 10 * picture
    q = values + v[:, None] * torch.linspace(least, 1, K).double()
    energies = Energies(q, torch.ones(K).double(), blocks, torch.zeros(K), torch.eye(K), side)
    return SpectralFit(torch.ones(len(v)).double(), v, values, energies)


def around(level: float, count: int) -> Tensor:
    """Estimates within 5 % of a level."""
    return level * torch.linspace(0.95, 1.05, count)


def standing_apart(seen: SpectralFit, **settings: bool) -> list[tuple[Tensor, float]]:
    return noise._standing_apart(seen, mixture.split(seen.sigma), **settings)


def test_white_excess_is_1_and_a_ramp_from_a_half_is_between_the_two_bounds() -> None:
    everyone = torch.ones(200, dtype=torch.bool)
    assert fit(around(0.2, 200)).whiteness(everyone) == pytest.approx(1)
    assert noise.WHITE < fit(around(0.2, 200), 0.5).whiteness(everyone) < noise.WHITER
    assert fit(around(0.2, 200), 0.1).whiteness(everyone) < noise.WHITE


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_white_group_apart_is_noisy(share: float) -> None:
    count = round(1000 * share)
    ((members, distance),) = standing_apart(fit(torch.cat([around(0.01, 1000 - count), around(0.2, count)])))
    assert torch.equal(members, torch.arange(1000) >= 1000 - count)
    assert distance > 3


@pytest.mark.parametrize(("share", "called"), [(0.1, 1), (0.9, 0)])
def test_only_a_minority_may_be_coloured_and_only_at_first(share: float, called: int) -> None:
    count = round(1000 * share)
    seen = fit(torch.cat([around(0.01, 1000 - count), around(0.2, count)]), least=0.1)
    assert len(standing_apart(seen, coloured=True)) == called
    assert not standing_apart(seen)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.001, 0.02), (0.01, 0.028)],  # that of cameras
)
def test_faint_noise_is_left_alone(low: float, high: float) -> None:
    assert not standing_apart(fit(torch.cat([around(low, 500), around(high, 500)])))


def test_a_long_tail_is_no_group() -> None:
    tail = 0.2 + 0.07 * torch.special.ndtri(torch.linspace(0.01, 0.99, 500))
    assert tail.quantile(0.05) < noise.TIGHT * tail.median()
    assert not standing_apart(fit(torch.cat([around(0.001, 500), tail])))


def test_a_group_that_chance_makes_is_none() -> None:
    """The same estimates of one block of 48 values are too uncertain to stand apart."""
    sigma = torch.cat([around(0.16, 50), around(0.2, 950)])
    assert len(standing_apart(fit(sigma))) == 1
    assert not standing_apart(fit(sigma, blocks=1))


@pytest.mark.parametrize(
    ("highest", "least", "found"),
    [
        (0.14, 1.0, False),  # too small
        (0.18, 1.0, True),
        (0.18, 0.5, False),  # clean photographs, small and grey, are like this
        (0.3, 0.5, True),
        (0.3, 0.1, False),  # texture
    ],
)
def test_many_levels_are_believed_if_they_are_large_or_white(highest: float, least: float, found: bool) -> None:
    sigma = torch.linspace(0, highest / 0.95, 1000)
    more = noise._everywhere(fit(sigma, least), torch.ones(1000, dtype=torch.bool))
    assert (more is not None) == found
    if more is not None:
        members, levels = more
        assert torch.equal(members, sigma.double() >= noise.ALL_NOISY)
        torch.testing.assert_close(levels, sigma.double()[members])


def test_one_level_of_all_is_believed_if_estimates_agree_or_chance_scatters_them() -> None:
    everyone = torch.ones(1000, dtype=torch.bool)
    members, levels = noise._everywhere(fit(around(0.1, 1000)), everyone) or (everyone, everyone)
    assert torch.equal(members, everyone)
    assert levels.unique().tolist() == [pytest.approx(0.1, rel=0.05)]
    assert noise._everywhere(fit(around(0.04, 1000)), everyone) is None
    assert noise._everywhere(fit(around(0.1, 1000), side=4), everyone) is None


def test_noise_without_a_picture_is_left_out_and_noise_over_one_is_trained_above_it() -> None:
    for level, buried in ((0.2, False), (3.0, True)):
        sigma = (torch.arange(2000) % 2).double() * level
        x, _, _ = gaussian_set(2000, 8, sigma, spectrum(64))
        seen, noise, (group,), foreign = noisy_images(loader(x), 2000)
        assert not foreign.any()
        assert (group.members != (sigma > 0)).sum() <= 10
        assert group.level == pytest.approx(level, rel=0.1)
        assert group.action is (Action.LEFT_OUT_AS_NOISE if buried else Action.TRAINED_ABOVE)
        assert torch.equal(noise > 0, group.members & (not buried))
        assert math.isfinite(float(seen.error.max()))


@pytest.mark.parametrize(("share", "bend", "foreign"), [(0.1, 8, True), (0.1, 1, False), (0.6, 8, False)])
def test_the_lowest_group_is_foreign_if_it_is_small_and_the_spectrum_does_not_describe_it(
    share: float, bend: float, foreign: bool
) -> None:
    count = round(1000 * share)
    seen = fit(torch.cat([around(0.01, count), around(0.2, 1000 - count)]))
    scatter = 1 + 0.1 * torch.randn(seen.energies.q.shape, generator=seeded()).double()
    seen.energies.q.mul_(scatter.clamp(min=0.5))
    seen.energies.q[:count, ::2] *= bend
    assert seen.oddness(torch.arange(1000) >= count)[count:].median() == 0
    assert torch.equal(noise._foreign(seen, mixture.split(seen.sigma)), (torch.arange(1000) < count) & foreign)


def test_scatter_that_is_chance_is_one_level_or_none_and_never_many() -> None:
    everyone, sigma = torch.ones(1000, dtype=torch.bool), torch.linspace(0.02, 0.3, 1000)
    few = torch.cat([around(0.02, 900), torch.linspace(0.1, 0.3, 100)])
    for of, one in ((sigma, True), (few, False)):
        members, levels = noise._everywhere(fit(of), everyone) or pytest.fail("sure estimates of many levels")
        assert torch.equal(levels, of.double()[members].square().sqrt())
        vague = noise._everywhere(fit(of, blocks=0.05), everyone)
        assert (vague is not None) == one
        if vague is not None:
            assert torch.equal(vague[0], everyone)
            assert len(vague[1].unique()) == 1


# -- borders, on both sides; by number, so that moving one is seen ---------------------------------------


@pytest.mark.parametrize(("distance", "groups"), [(1.27, 0), (1.33, 1)])
def test_groups_are_two_from_1_3_times_the_distance_that_chance_makes(distance: float, groups: int) -> None:
    sigma = torch.cat([around(0.16, 50), around(0.2, 950)])
    low = torch.arange(1000) < 50
    reached = fit(sigma).beyond_chance(low, ~low)  # grows as the root of the blocks that the estimates are of
    seen = fit(sigma, blocks=64 * (distance / reached) ** 2)
    assert seen.beyond_chance(low, ~low) == pytest.approx(distance, rel=1e-3)
    assert len(standing_apart(seen)) == groups


def judged(monkeypatch: pytest.MonkeyPatch, seen: SpectralFit) -> tuple[Tensor, list[noise.NoisyGroup]]:
    """What is made of these estimates, whatever the images."""
    monkeypatch.setattr(noise, "energies_of", lambda *_: seen.energies)
    monkeypatch.setattr(noise, "separate", lambda *_: seen)
    _, levels, groups, foreign = noisy_images(lambda places: pytest.fail("nothing to look at"), len(seen.sigma))
    assert not foreign.any()
    return levels, groups


@pytest.mark.parametrize(("signal", "left_out"), [(0.245, True), (0.255, False)])
def test_a_group_is_left_out_below_a_quarter_of_signal_to_noise(
    monkeypatch: pytest.MonkeyPatch, signal: float, left_out: bool
) -> None:
    seen = fit(torch.cat([around(0.01, 1001), around(0.2, 999)]), picture=signal * 0.2**2)
    levels, (group,) = judged(monkeypatch, seen)
    assert group.members.sum() == 999
    assert group.action is (Action.LEFT_OUT_AS_NOISE if left_out else Action.TRAINED_ABOVE)
    assert torch.equal(levels > 0, group.members & (not left_out))


@pytest.mark.parametrize(("spread", "own"), [(0.29, False), (0.31, True)])
def test_a_group_has_a_common_level_up_to_a_spread_of_0_3(
    monkeypatch: pytest.MonkeyPatch, spread: float, own: bool
) -> None:
    wide = 0.2 * (1 + spread * math.sqrt(3) * torch.linspace(-1, 1, 1000))
    assert wide.std() / wide.mean() == pytest.approx(spread, rel=1e-2)
    seen = fit(torch.cat([around(0.005, 1000), wide]), picture=0.1)
    levels, (group,) = judged(monkeypatch, seen)
    assert torch.equal(group.members, torch.arange(2000) >= 1000)
    assert group.action is Action.TRAINED_ABOVE
    if own:
        assert torch.equal(levels[1000:], seen.sigma[1000:])
    else:
        assert levels[1000:].unique().tolist() == [group.level]
    assert not levels[:1000].any()
