"""Purification: what it does to a Gaussian, its gradients, and attacks through the whole chain."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from experiments.paper import linear
from helpers import normal, seeded
from linear_networks import gaussian
from pipelines import small_pipeline
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import evaluate, value_and_gradient
from robustdiff.attacks.optimizers import PGD, RandomSearch
from robustdiff.attacks.purification import PurifiedLoss, accuracy, purify
from robustdiff.diffusion.samplers import trailing
from robustdiff.utils.errors import UsageError

SIZE = 8


def images(n: int = 4, scale: float = 0.3, seed: int = 0) -> Tensor:
    return (scale * normal(n, 1, SIZE, SIZE, seed=seed)).clamp(-1, 1)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_what_is_foreign_to_the_model_is_removed_and_more_of_it_with_more_strength(sampler: str) -> None:
    """The data are of deviation 0.1: noise of deviation 0.3 goes, the smooth part of its size stays at low strength."""
    pipeline, x = gaussian(), images(64)
    left = []
    for strength in (0.001, 0.05, 0.1, 0.3, 1.0):
        with torch.no_grad():
            found = purify(x, pipeline, strength, steps=50, sampler=sampler, generator=seeded(7))
        left.append(float((found * x).mean() / x.square().mean()))
        assert found.shape == x.shape
        assert found.dtype == x.dtype
    assert left[0] > 0.95
    assert all(a > b for a, b in pairwise(left))
    assert left[-1] < 0.05
    # all noise, then what the sampler makes of it
    times = torch.tensor(trailing(1000, 50))
    alpha_bar = torch.cat([pipeline.unet.schedule.alphas_cumprod.double()[times], torch.ones(1).double()])
    variance = linear.ddim_variance if sampler == "ddim" else linear.ddpm_variance
    truth = variance(alpha_bar, linear.optimum(alpha_bar[:-1], torch.tensor([0.01])))
    assert float(found.var()) == pytest.approx(float(truth), rel=0.1)


def test_ddim_purification_is_its_closed_form() -> None:
    """Every step of a linear network multiplies; the noise at the start is the only randomness."""
    pipeline, x = gaussian(), images()
    times = torch.tensor(trailing(100, 10))
    assert times[0] == 99
    alpha_bar = torch.cat([pipeline.unet.schedule.alphas_cumprod.double()[times], torch.ones(1).double()])
    gain = linear.ddim_gains(alpha_bar, linear.optimum(alpha_bar[:-1], torch.tensor([0.01]))).prod()
    eps = torch.randn(x.shape, generator=seeded(3), dtype=torch.float64)
    with torch.no_grad():
        found = purify(x, pipeline, 0.1, generator=seeded(3))
    assert torch.allclose(found, gain * (alpha_bar[0].sqrt() * x + (1 - alpha_bar[0]).sqrt() * eps), atol=1e-6)


def test_gradients_reach_the_image_and_no_weight() -> None:
    pipeline = small_pipeline()
    pipeline.unet.train()
    x = images(2).float().requires_grad_()
    purify(x, pipeline, 0.3, steps=3, generator=seeded(), sampler="ddpm").square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert all(p.grad is None and p.requires_grad for p in pipeline.unet.parameters())
    assert pipeline.unet.training
    exact, y, h = gaussian(), images(2), 1e-6
    way = normal(2, 1, SIZE, SIZE, seed=5)

    def total(z: Tensor) -> Tensor:
        return (purify(z, exact, 0.1, generator=seeded(1), sampler="ddpm") ** 3).sum()

    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    assert float((total(y + h * way) - total(y - h * way)) / (2 * h)) == pytest.approx(
        float((gradient * way).sum()), rel=1e-5
    )


def test_no_image_depends_on_its_neighbours() -> None:
    pipeline, x = small_pipeline(), images(3).float()
    generators = [[seeded(i) for i in which] for which in ((0, 1, 2), (1,))]
    with torch.no_grad():
        together = purify(x, pipeline, generator=generators[0], sampler="ddpm")
        alone = purify(x[1:2], pipeline, generator=generators[1], sampler="ddpm")
    assert torch.allclose(together[1:2], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.5}, "strength"),
        ({"steps": 0}, "steps >= 1"),
        ({"image": torch.zeros(2, 3, 8, 8)}, "do not fit"),
        ({"image": torch.zeros(1, 8, 8)}, "do not fit"),
        ({"class_labels": torch.zeros(2).long()}, "class_labels"),
        ({"sampler": "euler"}, "use ddim or ddpm"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, words: str) -> None:
    arguments = {"image": torch.zeros(2, 1, 8, 8), "pipeline": small_pipeline(), **change}
    with pytest.raises((ValueError, UsageError), match=words):
        purify(**arguments)


class Brightness(nn.Module):
    """Two classes: is the mean above 0?"""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(20.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight * x.flatten(1).mean(1)
        return torch.stack([-mean, mean], 1)


def chain(**settings) -> PurifiedLoss:
    labels = torch.tensor([0, 1] * 4)
    x = 0.04 * (2 * labels - 1).double().reshape(-1, 1, 1, 1) + 0.05 * normal(8, 1, SIZE, SIZE, seed=2)
    usual = {"strength": 0.05, "steps": 5}
    return PurifiedLoss(Brightness(), gaussian(), x, labels, settings=usual, **settings)


@pytest.mark.parametrize("fresh", [False, True])
def test_pgd_through_the_chain_breaks_what_random_noise_does_not(fresh: bool) -> None:
    """The full gradient, averaged over the purifier's noise, judged on noise that the attack has not seen."""
    objective = chain(terms=4, fresh=fresh)
    ball = LpBall("linf", 0.06)
    flags = [p.requires_grad for m in objective.modules for p in m.parameters()]
    random = RandomSearch(5)(objective, ball, objective.like, seeded(1))
    found = PGD(8)(objective, ball, objective.like, seeded(1))
    assert [p.requires_grad for m in objective.modules for p in m.parameters()] == flags
    clean, noisy, attacked = (accuracy(objective, omega, draws=10) for omega in (None, random.omega, found.omega))
    assert clean[0] > 0.9
    assert noisy[0] > 0.8
    assert attacked[0] < 0.3
    assert all(always <= mean for mean, always in (clean, noisy, attacked))


def test_fixed_noise_repeats_and_fresh_noise_does_not() -> None:
    omega = 0.01 * normal(8, 1, 1, SIZE, SIZE, seed=4)
    fixed, fresh = chain(terms=2), chain(terms=2, fresh=True)
    assert torch.equal(evaluate(fixed, omega), evaluate(fixed, omega))
    assert not torch.equal(evaluate(fresh, omega), evaluate(fresh, omega))
    other = dataclasses.replace(fixed, seed=1)
    assert not torch.equal(evaluate(fixed, omega), evaluate(other, omega))
    value, gradient = value_and_gradient(fixed, omega)
    assert torch.allclose(value, evaluate(fixed, omega))
    h, way = 1e-6, normal(8, 1, 1, SIZE, SIZE, seed=6)
    slope = (evaluate(fixed, omega + h * way) - evaluate(fixed, omega - h * way)) / (2 * h)
    assert slope == pytest.approx((gradient * way).flatten(1).sum(1), rel=1e-4, abs=1e-8)
