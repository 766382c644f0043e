"""The worlds: draws, densities and scores against numerical integration, differentiation and scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, linalg, special, stats
from torch import Tensor

from experiments.paper.worlds import (
    LinearGaussian,
    Mixture,
    Plane,
    Subspace,
    World,
    make_dirty,
)
from helpers import normal, seeded
from robustdiff.data.corruption import Corruption, corrupt

GAUSSIAN = LinearGaussian(torch.tensor([1.0, 0.3, 0.02], dtype=torch.float64), torch.linalg.qr(normal(3, 3, seed=4)).Q)
UNEVEN = Mixture(
    torch.tensor([[0.0, 0.5], [-0.7, 0.1], [0.4, -0.6]]), torch.tensor([0.05, 0.2, 0.1]), torch.tensor([3.0, 1.0, 2.0])
)
DENSE: dict[str, Any] = {
    "plane": Plane(), "ring": Mixture.ring(), "grid": Mixture.grid(), "uneven": UNEVEN, "gaussian": GAUSSIAN,
}  # fmt: skip
LEVELS = [(1.0, 0.05), (0.9, 0.43), (0.1, 0.99), (0.0, 1.0)]


def images(n: int = 40, seed: int = 0) -> Tensor:
    return normal(n, 1, 4, 5, seed=seed, dtype=torch.float32) * torch.linspace(0.05, 0.5, 20).reshape(1, 4, 5)


SUBSPACE = Subspace(images(), 3)
SMOOTHINGS = (0.0, 0.3, 0.9, 1.0)
DENSE |= {"subspace": SUBSPACE, "smooth subspace": Subspace(images(), 3, 0.3)}


@pytest.mark.parametrize("world", DENSE.values(), ids=DENSE)
def test_every_world_draws_reproducibly_what_lies_on_its_support(world: World) -> None:
    x = world.sample(500, seeded(1))
    assert isinstance(world, World)
    assert x.shape == (500, *world.shape)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, world.sample(500, seeded(1)), rtol=0, atol=0)
    assert not torch.equal(x, world.sample(500, seeded(2)))
    assert (world.distance_to_support(x) < 1e-6).double().mean() > 0.99
    assert (world.distance_to_support(x + 3) > 0.5).all() or isinstance(world, LinearGaussian)


@pytest.mark.parametrize("name", ["ring", "uneven"])
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_densities_in_two_dimensions_integrate_to_one(name: str, alpha: float, sigma: float) -> None:
    line = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    total = DENSE[name].log_density(grid, alpha, sigma).exp().sum() * (line[1] - line[0]) ** 2
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_density_of_the_plane_is_that_of_a_blurred_square(alpha: float, sigma: float) -> None:
    world = Plane()
    x = normal(6, 3, seed=2) * 0.8
    found = world.log_density(x, alpha, sigma).exp()
    u = world.coordinates(x)
    for row, value in zip(u, found, strict=True):
        parts = []
        for place in row[:2].tolist():
            edge = alpha * world.half_width
            if edge == 0:
                parts.append(stats.norm.pdf(place, 0, sigma))
            else:
                mass = integrate.quad(
                    lambda s, p=place: stats.norm.pdf(p - s, 0, sigma), -edge, edge, points=[place], epsabs=1e-13
                )
                parts.append(mass[0] / (2 * edge))
        expected = parts[0] * parts[1] * stats.norm.pdf(float(row[2]), 0, sigma)
        assert float(value) == pytest.approx(expected, rel=1e-6)


def test_the_density_of_the_plane_is_finite_and_exact_far_from_it() -> None:
    far = torch.tensor([[4.0, -4.0, 0.0], [-30.0, 30.0, 5.0]], dtype=torch.float64)
    world = Plane()
    density, score = world.log_density(far, 0.5, 0.05), world.score(far, 0.5, 0.05)
    assert torch.isfinite(density).all()
    # far outside, only the distance to the nearest edge counts: log density ~ -distance^2 / (2 sigma^2)
    u = world.coordinates(far)
    squares = (u[:, :2].abs() - 0.4).clamp(min=0).square().sum(1) + u[:, 2].square()
    torch.testing.assert_close(-density * 2 * 0.05**2, squares, rtol=0.02, atol=0)
    assert torch.isfinite(score).all()
    direction = world.coordinates(score)
    torch.testing.assert_close(
        direction[0, 0], -torch.sign(u[0, 0]) * (u[0, 0].abs() - 0.4) / 0.05**2, rtol=0.02, atol=0
    )


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_score_is_the_gradient_of_the_log_density(name: str, alpha: float, sigma: float) -> None:
    world = DENSE[name]
    x = (0.7 * normal(20, *world.shape, seed=3)).requires_grad_()
    (slope,) = torch.autograd.grad(world.log_density(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(world.score(x.detach(), alpha, sigma), slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DENSE)
def test_the_density_is_that_of_the_draws_blurred_by_noise(name: str) -> None:
    """E[f(alpha x0 + sigma eps)] by sampling against the integral of f p: f = log p itself (the cross entropy)."""
    world, alpha, sigma = DENSE[name], 0.8, 0.6
    x_t = alpha * world.sample(40_000, seeded(5)).double() + sigma * normal(40_000, *world.shape, seed=6)
    # Stein: E[score] = 0 and E[x . score] = -d, whatever the law
    score = world.score(x_t, alpha, sigma)
    assert score.mean(0).abs().max() < 0.04
    assert float((x_t * score).flatten(1).sum(1).mean()) == pytest.approx(-math.prod(world.shape), abs=0.08)


def test_gaussian_densities_are_those_of_scipy() -> None:
    x = normal(7, 3, seed=9)
    law = stats.multivariate_normal(np.zeros(3), 0.49 * GAUSSIAN.covariance.numpy() + 0.25 * np.eye(3))
    np.testing.assert_allclose(GAUSSIAN.log_density(x, 0.7, 0.5).numpy(), law.logpdf(x.numpy()), rtol=1e-10)
    one = Mixture(torch.tensor([[0.2, -0.3]]), 0.4)
    law = stats.multivariate_normal([0.2, -0.3], 0.16 * np.eye(2))
    np.testing.assert_allclose(one.log_density(x[:, :2]).numpy(), law.logpdf(x[:, :2].numpy()), rtol=1e-6)


def test_draws_have_the_moments_of_the_law() -> None:
    plane = Plane(0.5)
    u = plane.coordinates(plane.sample(50_000, seeded(0)).double())
    torch.testing.assert_close(u.T.cov()[:2, :2], torch.eye(2).double() * 0.25 / 3, rtol=0, atol=0.002)
    assert u[:, :2].abs().max() <= 0.5 + 1e-5
    x = UNEVEN.sample(60_000, seeded(1)).double()
    distance, which = UNEVEN.nearest(x)
    assert float((which == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(distance[which == 0].median()) == pytest.approx(0.05 * (2 * math.log(2)) ** 0.5, rel=0.02)
    x = GAUSSIAN.sample(60_000, seeded(2)).double()
    torch.testing.assert_close(x.T.cov(), GAUSSIAN.covariance, rtol=0, atol=0.02)


def test_the_plane_is_oblique_and_inside_the_range_of_images() -> None:
    plane = Plane()
    axes = torch.cat([plane.basis, plane.normal[:, None]], 1)
    torch.testing.assert_close(axes.T @ axes, torch.eye(3).double())
    corners = torch.cartesian_prod(*[torch.tensor([-0.8, 0.8]).double()] * 2) @ plane.basis.T
    assert corners.abs().max() < 1
    assert (plane.normal.abs() > 0.5).all()


def test_distance_and_coverage_of_the_plane() -> None:
    plane = Plane()
    x = torch.tensor([[0.4, 0.0, 0.1], [1.1, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.1, 1.2, -0.4]]).double()
    axes = torch.cat([plane.basis, plane.normal[:, None]], 1)
    points = x @ axes.T
    torch.testing.assert_close(plane.distance_to_plane(points), x[:, 2].abs())
    expected = torch.tensor([0.1, 0.3, 0.0, (0.3**2 + 0.4**2 + 0.4**2) ** 0.5]).double()
    torch.testing.assert_close(plane.distance_to_support(points), expected)
    centres = (torch.arange(10).double() + 0.5) * 0.16 - 0.8
    every = torch.cat([torch.cartesian_prod(centres, centres), torch.zeros(100, 1).double()], 1) @ axes.T
    assert plane.coverage(every) == 1
    assert plane.coverage(every[:37]) == pytest.approx(0.37)
    assert plane.coverage(9 * plane.basis.T) == 0


def test_dirt_on_a_mixture_is_the_mixture_that_it_says() -> None:
    dirty_law = Mixture.ring().with_gaussian_dirt(0.2, 0.9)
    corruptions = [Corruption.parse("gaussian:sigma=0.2,fraction=0.9")]
    x, hit = make_dirty(Mixture.ring().sample(20_000, seeded(0)), corruptions, seed=0)
    assert float(hit.double().mean()) == pytest.approx(0.9, abs=0.01)
    entropy = -dirty_law.log_density(x).mean()
    fresh = -dirty_law.log_density(dirty_law.sample(20_000, seeded(1))).mean()
    assert float(entropy) == pytest.approx(float(fresh), abs=0.02)
    assert float(-Mixture.ring().log_density(x).mean()) > float(entropy) + 1


# -- the image subspace ----------------------------------------------------------------------------


def test_the_subspace_is_that_of_the_covariance() -> None:
    flat = SUBSPACE.originals.flatten(1).double()
    values, vectors = np.linalg.eigh(np.cov(flat.T.numpy(), bias=True))
    np.testing.assert_allclose(SUBSPACE.variances.numpy(), values[::-1][:3], rtol=1e-9)
    assert pytest.approx(values[::-1][:3].sum() / values.sum()) == SUBSPACE.explained
    overlap = np.linalg.svd(vectors[:, ::-1][:, :3].T @ SUBSPACE.basis.numpy())[1]
    np.testing.assert_allclose(overlap, 1, rtol=1e-9)
    images = SUBSPACE.images.flatten(1).double()
    torch.testing.assert_close(images.mean(0), SUBSPACE.mean, rtol=0, atol=1e-7)
    cov = (SUBSPACE.basis * SUBSPACE.variances) @ SUBSPACE.basis.T
    torch.testing.assert_close(images.T.cov(correction=0), cov, rtol=0, atol=1e-6)


def test_projection_residual_and_psnr() -> None:
    x = SUBSPACE.images[:5].double()
    normal_direction = torch.linalg.svd(SUBSPACE.basis.T)[2][-1]
    off = (x.flatten(1) + 0.1 * normal_direction).reshape(x.shape)
    torch.testing.assert_close(SUBSPACE.project(off), SUBSPACE.project(x))
    torch.testing.assert_close(SUBSPACE.distance_to_support(off), torch.full((5,), 0.1).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(SUBSPACE.residual(off), torch.full((5,), 0.01 / 20).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(SUBSPACE.psnr(off), torch.full((5,), 10 * math.log10(4 / (0.01 / 20))).double())


def test_the_frechet_distance_is_that_of_a_matrix_square_root() -> None:
    x = (SUBSPACE.sample(200, seeded(3)) * 1.2 + 0.1 * normal(200, 1, 4, 5, dtype=torch.float32)).double() + 0.05
    flat = x.flatten(1).numpy()
    cov, other = np.cov(flat.T), ((SUBSPACE.basis * SUBSPACE.variances) @ SUBSPACE.basis.T).numpy()
    root = linalg.sqrtm(cov).real
    middle = linalg.sqrtm(root @ other @ root).real
    expected = ((flat.mean(0) - SUBSPACE.mean.numpy()) ** 2).sum() + np.trace(cov + other - 2 * middle)
    assert SUBSPACE.frechet(x) == pytest.approx(expected, rel=1e-5)
    n = len(SUBSPACE.images)
    exact = SUBSPACE.images.double()
    scaled = (exact.flatten(1) - SUBSPACE.mean) * (
        (n - 1) / n
    ) ** 0.5 + SUBSPACE.mean  # unbiased covariance = the law's
    assert SUBSPACE.frechet(scaled.reshape(exact.shape)) == pytest.approx(0, abs=1e-6)


def test_draws_of_the_subspace_without_smoothing_are_its_images() -> None:
    x = SUBSPACE.sample(100, seeded(0))
    assert (x[:, None] == SUBSPACE.images[None]).flatten(2).all(2).any(1).all()
    assert torch.equal(x, SUBSPACE.images[torch.randint(40, (100,), generator=seeded(0))])


def law(h: float, n: int = 40, k: int = 3) -> tuple[Any, Any, Any]:
    """The law of ``Subspace(images(n), k, h)``, by numpy: means of its n Gaussians, their covariance, its mean."""
    flat = images(n).flatten(1).double().numpy()
    mean, cov = flat.mean(0), np.cov(flat.T, bias=True)
    axes = np.linalg.eigh(cov)[1][:, -k:]
    onto = axes @ axes.T
    return mean + (1 - h**2) ** 0.5 * (flat - mean) @ onto, h**2 * onto @ cov @ onto, mean


@pytest.mark.parametrize("h", SMOOTHINGS)
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_the_density_of_the_subspace_is_that_of_a_mixture_in_all_of_pixel_space(
    h: float, alpha: float, sigma: float
) -> None:
    world = Subspace(images(), 3, h)
    x = torch.cat([normal(4, 1, 4, 5, seed=1), alpha * world.sample(4, seeded(2)) + sigma * normal(4, 1, 4, 5, seed=3)])
    means, cov, _ = law(h)
    noisy = alpha**2 * cov + sigma**2 * np.eye(20)
    parts = [stats.multivariate_normal(alpha * m, noisy).logpdf(x.flatten(1).numpy()) for m in means]
    expected = special.logsumexp(parts, axis=0) - math.log(40)
    found = world.log_density(x, alpha, sigma)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-4)  # images are kept in float32
    shares = special.softmax(parts, axis=0)[..., None] * (alpha * means[:, None] - x.flatten(1).numpy())
    pull = np.linalg.solve(noisy, shares.sum(0).T).T
    score = world.score(x, alpha, sigma)
    assert score.shape == x.shape
    np.testing.assert_allclose(score.flatten(1).numpy(), pull, rtol=1e-5, atol=1e-5 * np.abs(pull).max())
    # flat or not
    assert torch.equal(world.log_density(x.flatten(1), alpha, sigma), found)
    assert torch.equal(world.score(x.flatten(1), alpha, sigma), score.flatten(1))


def test_a_subspace_smoothed_all_the_way_is_gaussian() -> None:
    world, alpha, sigma = Subspace(images(), 3, 1.0), 0.7, 0.4
    x = 0.5 * normal(9, 20, seed=1)
    factor = alpha * world.basis * world.variances.sqrt()
    gauss = torch.distributions.LowRankMultivariateNormal(
        alpha * world.mean, factor, torch.full((20,), sigma**2, dtype=torch.float64)
    )
    torch.testing.assert_close(world.log_density(x, alpha, sigma), gauss.log_prob(x), rtol=1e-9, atol=1e-9)
    pull = torch.linalg.solve(gauss.covariance_matrix, (alpha * world.mean - x).T).T
    torch.testing.assert_close(world.score(x, alpha, sigma), pull, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("h", [0.0, 0.3])
def test_the_score_of_the_subspace_is_the_slope_of_its_log_density(h: float) -> None:
    world, step = Subspace(images(6), 2, h), 1e-5
    x = 0.5 * normal(3, 20, seed=2)
    moved = step * torch.eye(20, dtype=torch.float64)
    up, down = (world.log_density((x[:, None] + s * moved).flatten(0, 1), 0.9, 0.2) for s in (1, -1))
    slope = ((up - down) / (2 * step)).reshape(3, 20)
    torch.testing.assert_close(world.score(x, 0.9, 0.2), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("h", SMOOTHINGS)
def test_smoothing_changes_neither_mean_nor_covariance_nor_support(h: float) -> None:
    """100,000 draws: in units of the law's deviations a mean is off by .003, a covariance by .003 to .005 (one sd)."""
    world = Subspace(images(), 3, h)
    means, cov, mean = law(h)
    projected = law(0.0)[0]
    wanted = np.cov(projected.T, bias=True)  # that of the projected images
    np.testing.assert_allclose(means.mean(0), mean, atol=1e-12)
    np.testing.assert_allclose(np.cov(means.T, bias=True) + cov, wanted, atol=1e-12)
    np.testing.assert_allclose((world.basis * world.variances) @ world.basis.T, wanted, atol=1e-12)
    x = world.sample(100_000, seeded(4))
    white = world.coordinates(x) / world.variances.sqrt()
    assert white.mean(0).abs().max() < 0.015
    torch.testing.assert_close(white.T.cov(), torch.eye(3).double(), rtol=0, atol=0.02)
    assert world.distance_to_support(x).max() < 1e-6


@pytest.mark.parametrize("h", SMOOTHINGS[1:])
def test_draws_of_the_subspace_follow_the_law_along_every_axis(h: float) -> None:
    """Kolmogorov-Smirnov on 20,000 draws: a law whose distribution function is off by .012 would be seen."""
    world = Subspace(images(5, seed=3), 2, h)
    white, centres = (
        world.coordinates(x) / world.variances.sqrt() for x in (world.sample(20_000, seeded(5)), world.images)
    )
    for axis in (0, 1):
        middle = (1 - h**2) ** 0.5 * centres[:, axis].numpy()
        found = stats.kstest(white[:, axis].numpy(), lambda u, m=middle: stats.norm.cdf((u[:, None] - m) / h).mean(1))
        assert found.pvalue > 0.01


# -- dirt ------------------------------------------------------------------------------------------


def test_dirt_is_that_of_images_and_leaves_its_input_alone() -> None:
    corruptions = [Corruption.parse(s) for s in ("gaussian:sigma=0.3,fraction=0.5", "outlier:fraction=0.2")]
    x0 = images(30)
    before = x0.clone()
    dirty, hit = make_dirty(x0, corruptions, seed=7)
    assert torch.equal(x0, before)
    for index in range(30):
        expected, kinds = corrupt(x0[index], corruptions, 7, index)
        assert torch.equal(dirty[index], expected)
        assert bool(hit[index]) == bool(kinds)
    assert 0 < int(hit.sum()) < 30


def test_a_point_is_dirtied_as_an_image_of_one_row() -> None:
    x0, corruption = Plane().sample(50, seeded(0)), Corruption.parse("gaussian:sigma=0.3,fraction=0.5")
    dirty, _ = make_dirty(x0, [corruption], seed=3)
    assert dirty.shape == x0.shape
    for index in range(50):
        assert torch.equal(dirty[index], corruption.apply(x0[index][None, None], 3, index)[0, 0])
    dirty, hit = make_dirty(x0, [Corruption.parse("outlier:fraction=1")], seed=3)
    assert hit.all()
    assert dirty.abs().max() <= 1
    assert Plane().distance_to_plane(dirty).mean() > 0.2


@pytest.mark.parametrize("kind", ["blur", "jpeg"])
def test_points_have_no_neighbours_to_blur(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} needs an image; points can have gaussian"):
        make_dirty(Plane().sample(2, seeded(0)), [Corruption.parse(kind)], seed=0)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plane(0.0), "positive half_width"),
        (lambda: Mixture(torch.zeros(2, 2), -1.0), "positive standard deviations"),
        (lambda: Mixture(torch.zeros(2), 0.1), "centres"),
        (lambda: Mixture(torch.zeros(2, 2), 0.1, torch.tensor([-1.0, 2.0])), "weights >= 0"),
        (lambda: LinearGaussian(torch.ones(1)), "2 to 64"),
        (lambda: LinearGaussian(torch.ones(65)), "2 to 64"),
        (lambda: LinearGaussian(torch.tensor([1.0, -1.0])), "2 to 64 variances >= 0"),
        (lambda: LinearGaussian(torch.ones(2), torch.ones(2, 2)), "orthogonal"),
        (lambda: Subspace(images(), 0), r"1 \.\. 19 for 40 images of 20 values"),
        (lambda: Subspace(images(5), 5), r"1 \.\. 4"),
        (lambda: Subspace(images(), 3, -0.1), r"smoothing must be in \[0, 1\], got -0\.1"),
        (lambda: Subspace(images(), 3, 1.001), r"smoothing must be in \[0, 1\], got 1\.001"),
        (lambda: Subspace(images(), 3, math.nan), r"smoothing must be in \[0, 1\], got nan"),
        (lambda: Subspace(images(), 3, 0.3).log_density(images(1)), "only with some noise: sigma > 0"),
        (lambda: Subspace(images(), 3, 1.0).score(images(1), 1.0, -0.1), "only with some noise: sigma > 0"),
        (lambda: SUBSPACE.score(images(1)), "only with some noise: sigma > 0"),
        (lambda: Plane().log_density(torch.zeros(1, 3)), "only with some noise"),
        (lambda: LinearGaussian(torch.tensor([1.0, 0.0])).score(torch.zeros(1, 2)), "only with some noise"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
