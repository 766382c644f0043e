"""The spectral noise estimate, against sets whose spectrum, contrasts and noise are known, and against scipy."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from fields import gaussian_set, loader, spectrum
from helpers import normal, seeded
from robustdiff.audit.spectral_model import (
    Energies,
    SpectralFit,
    block_side,
    cut,
    energies_of,
    fit,
    same_above,
    separate,
)

N, SIDE = 1200, 8


def known(sigma: float, share: float) -> tuple[SpectralFit, Tensor, Tensor]:
    """The fit to a set of which about ``share`` carries noise; who carries it; the contrasts."""
    noisy = torch.rand(N, generator=seeded(5)) < share
    x, s, _ = gaussian_set(N, SIDE, noisy.double() * sigma, spectrum(SIDE**2))
    return separate(energies_of(loader(x), N)), noisy, s


# -- energies ----------------------------------------------------------------------------------------


def test_cut_keeps_every_pixel_of_whole_blocks_and_leaves_out_the_rest() -> None:
    images = normal(2, 3, 11, 8)
    blocks = cut(images, 4)
    assert blocks.shape == (2, 4, 48)
    rows = blocks.reshape(2, 2, 2, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 8, 8)
    assert torch.equal(rows, images[:, :, :8])


def test_directions_are_orthonormal_and_keep_all_energy() -> None:
    images = normal(300, 2, 10, 8)
    energies = energies_of(loader(images), 300)
    assert energies.side == 4
    assert energies.blocks == 4
    assert energies.values.sum() == 32
    torch.testing.assert_close(energies.basis.T @ energies.basis, torch.eye(32).double())
    total = (cut(images, 4) - energies.mean).square().sum(2).mean(1)
    torch.testing.assert_close((energies.q * energies.values).sum(1), total)
    torch.testing.assert_close(energies.mean, cut(images, 4).flatten(0, 1).mean(0))
    torch.testing.assert_close(energies.of(images[7:9]), energies.q[7:9])


def test_directions_are_those_of_the_covariance_weakest_first_of_a_subset_if_one_is_given() -> None:
    images = normal(600, 1, 4, 4) * torch.linspace(1, 2, 16).reshape(4, 4)
    some = torch.arange(600) % 3 == 0
    energies = energies_of(loader(images), 600, some)
    blocks = images[some].flatten(1).numpy()
    values, _ = np.linalg.eigh(np.cov(blocks.T, bias=True))
    found = (cut(images[some], 4)[:, 0] - energies.mean) @ energies.basis
    np.testing.assert_allclose(found.square().mean(0), values, rtol=1e-9)
    assert len(energies.q) == 600


@pytest.mark.parametrize(
    ("count", "shape", "side"),
    [
        (1, (1, 3, 5), 3),  # no block of 4 fits
        (1, (1, 4, 4), 4),
        (1023, (1, 8, 8), 4),
        (1024, (1, 8, 8), 8),  # 16 blocks per value
        (3071, (3, 8, 8), 4),
        (3072, (3, 8, 8), 8),
        (4096, (1, 16, 16), 16),
        (4096, (1, 15, 16), 8),
        (191, (3, 128, 128), 8),  # 64 blocks of 16 each, where 12,288 are needed
        (192, (3, 128, 128), 16),
    ],
)
def test_blocks_are_the_largest_of_which_there_are_16_per_value(count: int, shape: tuple, side: int) -> None:
    assert block_side(count, shape) == side


# -- the likelihood ----------------------------------------------------------------------------------


def deviance(q: np.ndarray, freedom: np.ndarray, values: np.ndarray, s: float, v: float) -> float:
    """Minus twice Whittle's log likelihood of one image, but for a constant."""
    mean = s * values + v
    return float((freedom * (q / mean + np.log(mean))).sum())


def test_contrast_and_noise_are_of_maximum_likelihood() -> None:
    values, freedom = spectrum(32, 1.5), torch.full((32,), 4.0).double()
    s, v = torch.tensor([1.0, 0.3, 2.0, 1.0, 0.5]).double(), torch.tensor([0.04, 0.01, 0.0025, 0.0, 0.09]).double()
    chi = torch.distributions.Chi2(freedom)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        q = (s[:, None] * values + v[:, None]) * chi.sample((5,)) / freedom
    found = fit(q, freedom, values, rounds=200)
    interior = 0
    for row, one, two in zip(q, *found, strict=True):
        arrays = [x.numpy() for x in (row, freedom, values)]
        best = scipy.optimize.minimize(
            lambda p, arrays=arrays: deviance(*arrays, *p), (0.5, 0.02), bounds=[(1e-3, None), (0, None)], tol=1e-12
        )
        assert deviance(*arrays, one.item(), two.item()) <= best.fun + 1e-5
        if two > 1e-9:
            interior += 1
            mean = one * values + two
            score = freedom * (row - mean) / mean.square()
            information = freedom / mean.square()
            assert abs(score.sum()) < 1e-6 * information.sum() * two
            assert abs((score * values).sum()) < 1e-6 * (information * values**2).sum() * one
    assert interior >= 3


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_the_level_of_a_noisy_group_is_that_of_its_noise(sigma: float, share: float) -> None:
    """Bias 12 % at 0.05, up to 6 % from 0.1 on."""
    found, noisy, _ = known(sigma, share)
    assert found.level(noisy) == pytest.approx(sigma, rel=0.15 if sigma == 0.05 else 0.07)
    assert found.whiteness(noisy) > 0.5
    clean = ~noisy
    if clean.any():  # medians: single images of 64 numbers are uncertain
        assert found.sigma[clean].median() < 0.5 * sigma or sigma == 0.05
        assert found.sigma[noisy].median() > 1.3 * found.sigma[clean].median()


def test_contrasts_are_recovered_where_there_is_no_noise() -> None:
    found, _, s = known(0.0, 0.0)
    ratio = found.scale / s
    assert (ratio / ratio.median()).log().std() < 2 * (2 / SIDE**2) ** 0.5  # twice that of 64 squares
    torch.testing.assert_close(found.sigma.square(), found.variance)


def test_more_pixels_find_the_noise_of_every_image() -> None:
    """32 x 32 pixels of 16 blocks: within 20 % of 0.2 for nine in ten, and never half of it on a clean image."""
    noisy = torch.arange(400) % 2 == 0
    x, s, _ = gaussian_set(6400, SIDE, torch.zeros(6400).double(), spectrum(SIDE**2))
    contrast = s[:400].repeat_interleave(16)
    blocks = (x.flatten(1) / s.sqrt()[:, None] * contrast.sqrt()[:, None]).reshape(400, 4, 4, 8, 8)
    images = blocks.permute(0, 1, 3, 2, 4).reshape(400, 1, 32, 32)
    images = images + 0.2 * noisy[:, None, None, None] * normal(400, 1, 32, 32, seed=9)
    found = separate(energies_of(loader(images), 400))
    assert found.energies.side == 8
    assert ((found.sigma[noisy] / 0.2 - 1).abs() < 0.2).double().mean() > 0.9
    assert found.sigma[~noisy].max() < 0.1


def test_the_level_is_between_the_estimates_and_theirs_if_they_agree() -> None:
    energies = Energies(torch.empty(0), torch.ones(4).double(), 1, torch.zeros(4), torch.eye(4), 2)
    variance = torch.full((30,), 0.04).double()
    same = SpectralFit(torch.ones(30).double(), variance, torch.ones(4).double(), energies)
    assert same.level(torch.ones(30, dtype=torch.bool)) == pytest.approx(0.2)
    scale = torch.linspace(0.5, 2, 30).double()
    line = SpectralFit(scale, 0.01 + 0.02 * scale, torch.ones(4).double(), energies)  # texture that grows with contrast
    assert line.level(torch.ones(30, dtype=torch.bool)) ** 2 == pytest.approx(line.variance.quantile(0.05).item())


# -- how sure ----------------------------------------------------------------------------------------


@functools.cache
def estimates(blocks: int, v: float) -> SpectralFit:
    """4,000 estimates of one contrast, 1.5, and one noise, the spectrum being known."""
    values, freedom = spectrum(64, 1.5), torch.full((64,), float(blocks)).double()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        q = (1.5 * values + v) * torch.distributions.Chi2(freedom).sample((4000,)) / freedom
    energies = Energies(q, torch.ones(64).double(), blocks, torch.zeros(64), torch.eye(64), 8)
    return SpectralFit(*fit(q, freedom, values, rounds=60), values, energies)


@pytest.mark.parametrize("blocks", [1, 16])
def test_errors_are_those_of_repeated_estimates(blocks: int) -> None:
    found = estimates(blocks, 0.04)
    of_s, of_v, together = found.errors()
    assert of_s.median().item() == pytest.approx(found.scale.var().item(), rel=0.25)
    assert of_v.median().item() == pytest.approx(found.variance.var().item(), rel=0.25)
    both = torch.cov(torch.stack([found.scale, found.variance]))[0, 1]
    assert together.median().item() == pytest.approx(both.item(), rel=0.25)
    right = (found.variance - 0.04).abs() < 2 * of_v.sqrt()
    assert 0.9 < right.double().mean() < 0.98
    torch.testing.assert_close((found.sigma + found.error).square(), found.variance + of_v.sqrt())


@pytest.mark.parametrize("blocks", [1, 16])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_the_lowest_estimates_of_one_group_are_apart_by_chance(share: float, blocks: int) -> None:
    found = estimates(blocks, 0.04)
    lower = found.variance <= found.variance.quantile(share)
    assert found.beyond_chance(lower, ~lower) == pytest.approx(1, abs=0.2)
    assert found.spread_by_chance(torch.ones_like(lower))


def test_two_levels_are_apart_by_more_than_chance() -> None:
    low, high = estimates(16, 0.01), estimates(16, 0.04)
    lower = torch.arange(8000) < 4000
    energies = replace(low.energies, q=torch.cat([low.energies.q, high.energies.q]))
    both = SpectralFit(
        torch.cat([low.scale, high.scale]), torch.cat([low.variance, high.variance]), low.spectrum, energies
    )
    assert both.beyond_chance(lower, ~lower) > 2
    assert not both.spread_by_chance(torch.ones_like(lower))


@pytest.mark.parametrize("blocks", [1, 16])
def test_surprise_is_standard_normal_where_all_carry_one_noise(blocks: int) -> None:
    found = estimates(blocks, 0.04).surprise(torch.ones(4000, dtype=torch.bool)).numpy()
    assert scipy.stats.kstest(found, "norm").statistic < 0.05
    assert found.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("slope", "low", "high"), [(0.0, 0.9, 1.1), (1.0, 0.0, 0.5), (2.0, 0.0, 0.2)])
def test_whiteness_is_1_for_white_and_small_for_coloured_excess(slope: float, low: float, high: float) -> None:
    values = spectrum(64)
    excess = 0.05 * torch.linspace(0.05, 1, 64).double().pow(slope)
    energies = Energies((values + excess)[None], torch.ones(64).double(), 1, torch.zeros(64), torch.eye(64), 8)
    found = SpectralFit(torch.ones(1).double(), torch.tensor([0.05]).double(), values, energies)
    assert low <= found.whiteness(torch.tensor([True])) <= high


def test_a_spectrum_of_constant_images_is_finite() -> None:
    found = separate(energies_of(loader(torch.zeros(100, 1, 8, 8)), 100))
    assert found.sigma.isfinite().all()
    assert found.scale.isfinite().all()
    assert found.sigma.max() < 1e-3


# -- where damage drowns -----------------------------------------------------------------------------


@pytest.mark.parametrize("nats", [0.05, 0.5, 5.0])
def test_damage_drowns_where_gaussians_of_both_spectra_are_so_many_nats_apart(nats: float) -> None:
    clean, damaged, values = spectrum(24), spectrum(24, 4.0), torch.arange(1, 25).double()

    def nats_at(sigma: float) -> float:
        p, q = (torch.distributions.Normal(torch.zeros(24).double(), (x + sigma**2).sqrt()) for x in (damaged, clean))
        return float((values * torch.distributions.kl_divergence(p, q)).sum())

    root = scipy.optimize.brentq(lambda sigma: nats_at(sigma) - nats, 1e-3, 100)
    assert same_above(clean, damaged, values, nats) == pytest.approx(root, rel=1e-6)


def test_what_is_alike_is_alike_from_0_on() -> None:
    values = torch.ones(24).double()
    assert same_above(spectrum(24), spectrum(24), values) == 0.0
    assert same_above(spectrum(24), spectrum(24) * 1.01, values) == 0.0
    assert math.isfinite(same_above(spectrum(24), torch.zeros(24).double(), values))
