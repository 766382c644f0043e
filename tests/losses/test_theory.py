"""T1 to T8, T15, T16 of docs/explanation/theory.md: what the loss's optimum is and what samplers make of it.

Loss gradients are taken from the objectives themselves. Where the model is linear the loss depends on the data only
through second moments, so samples whose moments are exact (``helpers.uncorrelated``) give expectations without error.

Long, because it mirrors docs/explanation/theory.md: one section per claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy.linalg import solve_banded
from torch import Tensor, nn

from helpers import (
    PREDICTIONS,
    Given,
    SmallNet,
    Spy,
    ddpm_schedule,
    normal,
    schedule_at,
    seed_parameters,
    seeded,
    uncorrelated,
)
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.diffusion.sigma_floor import SigmaClampedModel
from robustdiff.losses.baselines import InvarianceLoss
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import PRESETS, EquivarianceLoss
from robustdiff.losses.perturbation import (
    AdversarialPerturbation,
    Radius,
    RandomPerturbation,
)
from robustdiff.losses.strength import InverseRadius, SigmaRange

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)

# -- T1: equivariance of eps is invariance of the denoised image -----------------------------------


class PointNet(nn.Module):
    """A random two-layer network on points."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        seed_parameters(self, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 3), (B,) -> (B, 3)."""
        return self.layers(torch.cat([x, t.to(x.dtype)[:, None] / 1000], 1))


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("perturbation", [RandomPerturbation(), AdversarialPerturbation(3, "residual")])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("network", ["convolutions", "points"])
def test_T1_the_regulariser_is_the_weighted_shift_of_the_denoised_image(
    network: str, prediction: Any, perturbation: Any, zero_snr: bool
) -> None:
    schedule, t = ddpm_schedule(prediction, zero_snr), torch.tensor([0, 1, 20, 150, 400, 700, 950, 998])
    model: Callable[..., Tensor] = SmallNet(seed=2) if network == "convolutions" else PointNet()
    x0, eps = (normal(8, 2, 5, 5, seed=s) if network == "convolutions" else normal(8, 3, seed=s) for s in (1, 2))
    spy = Spy(perturbation)
    objective = EquivarianceLoss(schedule, perturbation=spy, radius=Radius(floor=0.3))
    terms = objective(model, x0, t=t, eps=eps, generator=seeded(1))

    x_t = schedule.add_noise(x0, eps, t)
    moved = schedule.add_noise(x0, eps + spy.omega, t)
    denoised, denoised_moved = schedule.x0_hat(model(x_t, t), x_t, t), schedule.x0_hat(model(moved, t), moved, t)
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    weight = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction]
    close(schedule.x0_weight(t), weight)
    expected = weight * (denoised_moved - denoised).square().flatten(1).mean(1)
    middle = (t >= 20) & (t <= 700)
    close(terms.equivariance[middle], expected[middle])  # to 1e-10
    # at the ends of the table the right-hand side subtracts two images that agree to about 1e-4, and loses a digit
    close(terms.equivariance, expected, rtol=1e-9)
    assert (terms.equivariance > 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T1_the_plain_loss_weighs_an_error_of_the_denoised_image_alike(prediction: Any) -> None:
    schedule, t = ddpm_schedule(prediction), torch.tensor([1, 20, 150, 400, 700, 950])
    x0, eps, model = normal(6, 2, 5, 5, seed=1), normal(6, 2, 5, 5, seed=2), SmallNet()
    x_t = schedule.add_noise(x0, eps, t)
    error = (schedule.x0_hat(model(x_t, t), x_t, t) - x0).square().flatten(1).mean(1)
    close(DenoisingLoss(schedule)(model, x0, t=t, eps=eps).denoising, schedule.x0_weight(t) * error, rtol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T1_the_residual_of_eps_is_minus_alpha_over_sigma_times_the_shift_of_x0(prediction: Any) -> None:
    schedule, t, model = ddpm_schedule(prediction), torch.tensor([1, 20, 150, 400, 700, 950]), SmallNet(seed=5)
    x_t, omega = normal(6, 2, 5, 5, seed=3), 0.3 * normal(6, 2, 5, 5, seed=4)
    moved = schedule.perturb(x_t, omega, t)
    before, after = model(x_t, t), model(moved, t)
    eps_residual = schedule.eps_hat(after, moved, t) - schedule.eps_hat(before, x_t, t) - omega
    x0_shift = schedule.x0_hat(after, moved, t) - schedule.x0_hat(before, x_t, t)
    ratio = (schedule.alpha(t) / schedule.sigma(t))[:, None, None, None]
    close(eps_residual, -ratio * x0_shift, atol=1e-10)
    close(schedule.eps_shift(after - before, omega, t), eps_residual + omega, atol=1e-10)
    factor = {
        "epsilon": -ratio,
        "sample": torch.ones_like(ratio),
        "v_prediction": -1 / schedule.sigma(t)[:, None, None, None],
    }
    close(schedule.equivariance_residual(after - before, omega, t), factor[prediction] * x0_shift, atol=1e-9)


# -- T2: it penalises posterior covariance ---------------------------------------------------------


def test_T2_for_the_ideal_gaussian_denoiser_the_penalty_is_snr_squared_times_the_posterior_covariance() -> None:
    variances = torch.tensor([0.02, 0.3, 1.0, 2.5], dtype=torch.float64)
    (omega,) = uncorrelated(64, 4, seed=1)
    for index in (50, 300, 800):
        schedule, t = ddpm_schedule(), torch.full((64,), index)
        a2 = schedule.alphas_cumprod[index]
        s2 = 1 - a2

        def ideal(x: Tensor, t: Tensor, a2: Tensor = a2, s2: Tensor = s2) -> Tensor:
            return s2.sqrt() * x / (a2 * variances + s2)

        objective = EquivarianceLoss(schedule, perturbation=Given(0.2 * omega))
        terms = objective(ideal, normal(64, 4), t=t, generator=seeded())
        posterior = variances * s2 / (a2 * variances + s2)
        close(4 * terms.equivariance.mean(), 0.2**2 * (a2 / s2) ** 2 * posterior.square().sum())


def mixture_score(y: Tensor, noise: Tensor | float) -> Tensor:
    """Score in y of .5 N(-1, .04) + .5 N(1, .04) blurred by variance ``noise``."""
    scale = 0.04 + noise
    return (torch.tanh(y / scale) - y) / scale


def test_T2_for_a_mixture_and_small_omega_the_penalty_is_snr_squared_times_the_posterior_variance_squared() -> None:
    schedule, t = schedule_at(torch.tensor([0.6])), torch.zeros(41, dtype=torch.int64)
    a2, s2 = schedule.alphas_cumprod[0], 1 - schedule.alphas_cumprod[0]

    def ideal(x: Tensor, t: Tensor) -> Tensor:
        return -s2.sqrt() * mixture_score(x / a2.sqrt(), s2 / a2) / a2.sqrt()

    x0 = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    objective = EquivarianceLoss(schedule, perturbation=Given(torch.full_like(x0, 1e-5)))
    terms = objective(ideal, x0, t=t, eps=torch.zeros_like(x0))
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    prior = torch.exp(-(grid - 1).square() / 0.08) + torch.exp(-(grid + 1).square() / 0.08)
    posterior = prior * torch.exp(-(a2.sqrt() * x0 - a2.sqrt() * grid).square() / (2 * s2))
    posterior /= posterior.sum(1, keepdim=True)
    mean = (posterior * grid).sum(1, keepdim=True)
    variance = (posterior * (grid - mean).square()).sum(1)
    torch.testing.assert_close(terms.equivariance, 1e-10 * (a2 / s2 * variance).square(), rtol=1e-3, atol=0)
    assert variance.max() > 20 * variance.min()


# -- T3, T4, T5: the linear optimum ----------------------------------------------------------------

LAMBDA, RADIUS = 0.8, 0.9  # m = lambda r^2 / 3 = .216 for uniform omega


class Linear(nn.Module):
    """``output = x M^T`` at one noise level."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, d), (B,) -> (B, d)."""
        return x @ self.matrix.T


def covariance(d: int = 4) -> Tensor:
    """A covariance with eigenvalues from .05 to 2 and axes that are not the coordinates'."""
    basis = torch.linalg.qr(normal(d, d, seed=11)).Q
    return basis @ torch.diag(torch.logspace(-1.3, 0.3, d, dtype=torch.float64)) @ basis.T


def output_matrix(schedule: NoiseSchedule, index: int, eps_matrix: Tensor) -> Tensor:
    """The matrix of the network's output, in its parametrisation, whose eps_hat is ``eps_matrix x_t``."""
    a, s = schedule.alphas_cumprod[index].sqrt(), (1 - schedule.alphas_cumprod[index]).sqrt()
    eye = torch.eye(len(eps_matrix), dtype=torch.float64)
    x0_matrix = (eye - s * eps_matrix) / a
    return {"epsilon": eps_matrix, "sample": x0_matrix, "v_prediction": (a * eye - x0_matrix) / s}[
        schedule.prediction.name
    ]


def T3_optimum(schedule: NoiseSchedule, index: int, m: float, sigma: Tensor) -> Tensor:
    """T3: ``W* = s (1+m) [a^2 Sigma + (1+m) s^2 I]^-1``."""
    a2 = schedule.alphas_cumprod[index]
    s2 = 1 - a2
    eye = torch.eye(len(sigma), dtype=torch.float64)
    return s2.sqrt() * (1 + m) * torch.linalg.inv(a2 * sigma + (1 + m) * s2 * eye)


def expected_gradient(objective: Any, index: int, matrix: Tensor, kappa: float) -> Tensor:
    """The gradient of the expected total loss at ``matrix``, exactly: omega of second moment kappa, x0 ~ (0, Sigma)."""
    d = len(matrix)
    x0, eps, omega = uncorrelated(256, d, d, d, seed=21)
    x0 = x0 @ torch.linalg.cholesky(covariance(d)).T
    objective = type(objective)(**{**objective.__dict__, "perturbation": Given(kappa**0.5 * omega)})
    model = Linear(matrix)
    objective(model, x0, t=torch.full((256,), index), eps=eps).total.mean().backward()
    assert model.matrix.grad is not None
    return model.matrix.grad


def assert_stationary(objective: Any, index: int, eps_matrix: Tensor, kappa: float, elsewhere: Tensor) -> None:
    """The expected gradient vanishes at ``eps_matrix`` and does not at ``elsewhere``."""
    schedule = objective.schedule
    at = expected_gradient(objective, index, output_matrix(schedule, index, eps_matrix), kappa)
    away = expected_gradient(objective, index, output_matrix(schedule, index, elsewhere), kappa)
    assert away.abs().max() > 1e-5
    assert at.abs().max() < 1e-8 * away.abs().max()


@pytest.mark.parametrize("index", [30, 200, 600, 900])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T3_the_expected_gradient_vanishes_at_the_closed_form_optimum(prediction: Any, index: int) -> None:
    schedule, kappa = ddpm_schedule(prediction), RADIUS**2 / 3
    optimum = partial(T3_optimum, schedule, index, sigma=covariance())
    objective = EquivarianceLoss(schedule, strength=LAMBDA)
    assert_stationary(objective, index, optimum(LAMBDA * kappa), kappa, elsewhere=optimum(0.0))


def test_T3_the_plain_objective_has_its_optimum_at_m_zero() -> None:
    schedule = ddpm_schedule()
    optimum = partial(T3_optimum, schedule, 300, sigma=covariance())
    assert_stationary(EquivarianceLoss(schedule, strength=0), 300, optimum(0.0), 0.3, elsewhere=optimum(0.2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T4_a_stop_gradient_on_the_clean_branch_has_the_same_optimum(prediction: Any) -> None:
    schedule, kappa = ddpm_schedule(prediction), RADIUS**2 / 3
    optimum = partial(T3_optimum, schedule, 400, sigma=covariance())
    objective = EquivarianceLoss(schedule, strength=LAMBDA, gradient="perturbed")
    assert_stationary(objective, 400, optimum(LAMBDA * kappa), kappa, elsewhere=optimum(0.0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T4_a_stop_gradient_on_the_perturbed_branch_leaves_the_plain_expected_gradient(prediction: Any) -> None:
    schedule, kappa = ddpm_schedule(prediction), RADIUS**2 / 3
    matrix = normal(4, 4, seed=31)
    clean = expected_gradient(EquivarianceLoss(schedule, strength=LAMBDA, gradient="clean"), 400, matrix, kappa)
    plain = expected_gradient(EquivarianceLoss(schedule, strength=0), 400, matrix, kappa)
    both = expected_gradient(EquivarianceLoss(schedule, strength=LAMBDA), 400, matrix, kappa)
    close(clean, plain, atol=1e-10)
    assert (both - plain).abs().max() > 0.05


@pytest.mark.parametrize("gradient", ["both", "perturbed"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T4_with_the_true_noise_as_target_m_is_lambda_kappa_over_one_plus_lambda(
    prediction: Any, gradient: Any
) -> None:
    schedule, kappa = ddpm_schedule(prediction), RADIUS**2 / 3
    optimum = partial(T3_optimum, schedule, 400, sigma=covariance())
    objective = EquivarianceLoss(schedule, strength=LAMBDA, target="noise", gradient=gradient)
    m = LAMBDA * kappa / (1 + LAMBDA)
    assert_stationary(objective, 400, optimum(m), kappa, elsewhere=optimum(LAMBDA * kappa))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T5_the_optimum_of_invariance(prediction: Any) -> None:
    schedule, kappa = ddpm_schedule(prediction), RADIUS**2 / 3
    optimum = partial(T3_optimum, schedule, 400, sigma=covariance())
    objective = InvarianceLoss(schedule, strength=LAMBDA)
    if prediction == "epsilon":
        wanted = optimum(LAMBDA * kappa) / (1 + LAMBDA * kappa)
    else:
        # the plain loss weighs eps errors by (s/a)^2 or 1/a^2, the penalty is on eps_hat itself: m is divided by it
        a2 = schedule.alphas_cumprod[400]
        m = LAMBDA * kappa / ((1 - a2) / a2 if prediction == "sample" else 1 / a2).item()
        wanted = optimum(m) / (1 + m)
    assert_stationary(objective, 400, wanted, kappa, elsewhere=optimum(LAMBDA * kappa))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T3_training_a_linear_model_reaches_the_closed_form_optimum(prediction: Any) -> None:
    schedule, index, rows = ddpm_schedule(prediction), 300, 2048
    sigma = covariance()
    objective = EquivarianceLoss(
        schedule, perturbation="random", strength=6.0, radius=Radius(scale=0, floor=RADIUS, random=False)
    )
    model = Linear(torch.zeros(4, 4, dtype=torch.float64))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    average, steps = torch.zeros(4, 4, dtype=torch.float64), 700
    x0, eps = uncorrelated(rows, 4, 4, seed=41)
    x0 = x0 @ torch.linalg.cholesky(sigma).T
    generator = seeded(42)
    for step in range(steps):
        optimiser.zero_grad()
        loss = objective(model, x0, t=torch.full((rows,), index), eps=eps, generator=generator).total.mean()
        loss.backward()
        optimiser.step()
        if step == steps // 2:
            optimiser.param_groups[0]["lr"] = 0.002
        if step >= 3 * steps // 4:
            average += model.matrix.detach() / (steps - 3 * steps // 4)
    wanted = output_matrix(schedule, index, T3_optimum(schedule, index, 6.0 * RADIUS**2 / 3, sigma))
    plain = output_matrix(schedule, index, T3_optimum(schedule, index, 0.0, sigma))
    scale = torch.linalg.matrix_norm(wanted - plain)
    assert torch.linalg.matrix_norm(average - wanted) < 0.01 * torch.linalg.matrix_norm(wanted)
    assert torch.linalg.matrix_norm(average - wanted) < 0.01 * scale


# -- T3, T5, T6, T7: what samplers make of it ------------------------------------------------------


def factorial(levels: int, variance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t, x0, eps, omega pattern) for a 1-D problem: the 8 sign combinations at every level, so moments are exact."""
    signs = torch.tensor([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)], dtype=torch.float64) * 2 - 1
    x0, eps, omega = (signs[:, [i]].repeat(levels, 1) for i in range(3))
    return torch.arange(levels).repeat_interleave(8), variance**0.5 * x0, eps, omega


class PerLevel(nn.Module):
    """``eps_hat = w[t] x``: one number per noise level."""

    def __init__(self, value: float, levels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((levels,), value, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 1), (B,) -> (B, 1)."""
        return self.weight[t][:, None] * x


def optimum_per_level(
    kind: type[EquivarianceLoss], schedule: NoiseSchedule, variance: float, **settings: Any
) -> Tensor:
    """The minimiser w[t] of the objective's expected loss, found from its own gradient (affine in w), shape (T,)."""
    levels = schedule.num_timesteps
    t, x0, eps, omega = factorial(levels, variance)
    kappa = settings.pop("kappa")
    given = Given(lambda like: kappa**0.5 * omega[: len(like)])
    objective = kind(schedule, perturbation=given, **settings)
    slopes = []
    for value in (0.0, 1.0):
        model = PerLevel(value, levels)
        objective(model, x0, t=t, eps=eps).total.sum().backward()
        assert model.weight.grad is not None
        slopes.append(model.weight.grad)
    return slopes[0] / (slopes[0] - slopes[1])


def ode_variance(schedule: NoiseSchedule, w: Tensor) -> float:
    """Variance generated by dy/dsigma = eps_hat from sigma_T noise: trapezoid in log sigma."""
    level = schedule.noise_to_signal(torch.arange(schedule.num_timesteps))
    rate = w * schedule.alpha(torch.arange(schedule.num_timesteps)) * level
    return (level[-1].square() * torch.exp(-2 * torch.trapezoid(rate, level.log()))).item()


def sde_variance(schedule: NoiseSchedule, w: Tensor) -> float:
    """Variance after all DDPM steps, ``V -> A^2 V + beta_tilde``, in units of y = x/a."""
    table = schedule.alphas_cumprod
    value = torch.ones((), dtype=torch.float64)
    for t in range(len(table) - 1, 0, -1):
        beta = 1 - table[t] / table[t - 1]
        gain = (1 - beta * w[t] / (1 - table[t]).sqrt()) / (1 - beta).sqrt()
        value = gain.square() * value + beta * (1 - table[t - 1]) / (1 - table[t])
    return (value / table[0]).item()


@pytest.mark.parametrize(("m", "largest", "stated"), [(0.5, 80.0, 0.658), (0.5, 20.0, None), (0.2, 80.0, None)])
def test_T5_the_variance_generated_by_invariance_grows_with_the_largest_noise(
    m: float, largest: float, stated: float | None
) -> None:
    v, kappa = 0.01, 0.3
    schedule = schedule_at(torch.logspace(-4, math.log10(largest), 2000, dtype=torch.float64))
    w = optimum_per_level(InvarianceLoss, schedule, v, kappa=kappa, strength=m / kappa)
    wanted = largest**2 * (v / (v + (1 + m) * largest**2)) ** (1 / (1 + m))
    assert ode_variance(schedule, w) == pytest.approx(wanted, rel=2e-3)
    if stated is not None:
        assert wanted == pytest.approx(stated, abs=5e-4)
    robust = optimum_per_level(EquivarianceLoss, schedule, v, kappa=kappa, strength=m / kappa)
    assert ode_variance(schedule, robust) == pytest.approx(v / (1 + m), rel=2e-3)


@pytest.mark.parametrize("v", [0.001, 0.03, 0.3, 3.0])
@pytest.mark.parametrize(("strength", "edge"), [(1.7, 0.17), (5.9, 0.115), (0.44, 0.9)])
def test_T6_a_gated_strength_is_a_soft_wiener_filter(v: float, strength: float, edge: float) -> None:
    kappa, count = 0.3, 3000
    # the edge lies half-way between two levels, so that the trapezoid across the jump is right
    step = math.log(edge / 1e-4) / count
    schedule = schedule_at(torch.exp(math.log(edge) + step * torch.arange(0.5 - count, math.log(200 / edge) / step)))
    w = optimum_per_level(EquivarianceLoss, schedule, v, kappa=kappa, strength=SigmaRange(0, edge, strength / kappa))
    c2 = edge**2
    assert ode_variance(schedule, w) == pytest.approx(v * (v + c2) / (v + (1 + strength) * c2), rel=2e-3)
    sde = v / (1 + strength) * (1 + strength * v**2 / (v + (1 + strength) * c2) ** 2)
    assert sde_variance(schedule, w) == pytest.approx(sde, rel=1e-2)


def test_T7_the_regularised_denoiser_is_the_plain_one_asked_at_an_inflated_noise_level() -> None:
    v, m, kappa = 0.2, 0.7, 0.3
    levels = torch.logspace(-2, 2, 50, dtype=torch.float64)
    schedule, inflated = schedule_at(levels), schedule_at(levels * (1 + m) ** 0.5)
    every = torch.arange(50)
    robust = optimum_per_level(EquivarianceLoss, schedule, v, kappa=kappa, strength=m / kappa)
    plain = optimum_per_level(EquivarianceLoss, inflated, v, kappa=kappa, strength=0)
    close(1 - schedule.sigma(every) * robust, 1 - inflated.sigma(every) * plain, rtol=1e-9, atol=1e-11)


VARIANCES = torch.tensor([0.02, 0.3, 2.0], dtype=torch.float64)


def run_step_by_step(scheduler: Any, schedule: NoiseSchedule, m: float) -> tuple[Tensor, Tensor]:
    """diffusers' scheduler on the linear denoiser of T3: gain of the start and variance added, per direction.

    Two states, 1 and 0, take every step with the same noise: their difference is the gain, and what 0 becomes,
    divided by the noise (drawn again from its seed), is the scale at which noise is added.
    """
    gain, added = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    states = torch.stack([torch.ones(3), torch.zeros(3)]).double()[:, :, None]  # (state, direction, one element)
    for t in scheduler.timesteps:
        a2 = schedule.alphas_cumprod[t]
        w = (1 - a2).sqrt() * (1 + m) / (a2 * VARIANCES + (1 + m) * (1 - a2))
        eps_hat = w[None, :, None] * states
        times = t.repeat(2)
        x0_hat = (states - (1 - a2).sqrt() * eps_hat) / a2.sqrt()
        output = schedule.output_from_x0(x0_hat, states, times)
        one, zero = (
            scheduler.step(output[i], t, states[i], generator=seeded(int(t))).prev_sample[:, 0] for i in range(2)
        )
        z = torch.randn(3, 1, generator=seeded(int(t)), dtype=torch.float64)[:, 0]
        gain, added = gain * (one - zero), added * (one - zero).square() + (zero / z).square()
    return gain, added


@pytest.mark.parametrize("steps", [20, 100, 1000])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T3_a_ddim_run_generates_the_product_of_steps(prediction: Any, steps: int) -> None:
    m = 0.5
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    gain, added = run_step_by_step(scheduler, NoiseSchedule.from_scheduler(scheduler), m)
    wanted = torch.ones(3, dtype=torch.float64)
    for t in scheduler.timesteps.tolist():
        a2 = scheduler.alphas_cumprod[t]
        before = t - 1000 // steps
        b2 = scheduler.alphas_cumprod[before] if before >= 0 else torch.tensor(1.0, dtype=torch.float64)
        w = (1 - a2).sqrt() * (1 + m) / (a2 * VARIANCES + (1 + m) * (1 - a2))
        wanted = wanted * (b2.sqrt() * (1 - (1 - a2).sqrt() * w) / a2.sqrt() + (1 - b2).sqrt() * w)
    close(gain.square(), wanted.square(), rtol=1e-9)
    assert torch.equal(added, torch.zeros(3, dtype=torch.float64))
    if steps == 1000:
        torch.testing.assert_close(gain.square(), VARIANCES / (1 + m), rtol=0.04, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T3_a_ddpm_run_generates_the_product_of_steps(prediction: Any) -> None:
    m = 0.5
    scheduler = DDPMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = scheduler.one.double()
    gain, added = run_step_by_step(scheduler, NoiseSchedule.from_scheduler(scheduler), m)
    table, value = scheduler.alphas_cumprod, torch.ones(3, dtype=torch.float64)
    for t in range(999, -1, -1):
        before = table[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
        beta, s = 1 - table[t] / before, (1 - table[t]).sqrt()
        w = s * (1 + m) / (table[t] * VARIANCES + (1 + m) * (1 - table[t]))
        value = ((1 - beta * w / s) / (1 - beta).sqrt()).square() * value + beta * (1 - before) / (1 - table[t])
    close(gain.square() + added, value, rtol=1e-6)
    # the continuum; with fixed_small noise and 1000 steps, a direction as small as .02 is 6 % away from it
    torch.testing.assert_close(value, VARIANCES / (1 + m), rtol=0.07, atol=0)
    torch.testing.assert_close(value[1:], VARIANCES[1:] / (1 + m), rtol=0.02, atol=0)


# -- T8: a nonlinear oracle, in one dimension ------------------------------------------------------


def T8_oracle(alpha2: float, m: float, centre: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(grid, density, eps*, eps_hat) of ``eps_hat = (1+m)(I - m s^2 L)^-1 eps*``.

    For the density .5 N(-centre, .04) + .5 N(centre, .04); ``L f = (p f')' / p``.
    """
    s2, shift = 1 - alpha2, centre * alpha2**0.5
    grid = np.linspace(-6, 6, 4001)
    step, scale = grid[1] - grid[0], 0.04 * alpha2 + s2
    near, far = (np.exp(-((grid - sign * shift) ** 2) / (2 * scale)) for sign in (1, -1))
    density = (near + far) / (2 * np.sqrt(2 * np.pi * scale))
    score = (np.tanh(grid * shift / scale) * shift - grid) / scale
    optimum = -(s2**0.5) * score
    # conservative form, with no flux through the ends
    half = np.sqrt(density[1:] * density[:-1])
    right, left = np.append(half, 0) / density / step**2, np.insert(half, 0, 0) / density / step**2
    bands = np.zeros((3, grid.size))
    bands[0, 1:], bands[1], bands[2, :-1] = -m * s2 * right[:-1], 1 + m * s2 * (right + left), -m * s2 * left[1:]
    return grid, density, optimum, (1 + m) * solve_banded((1, 1), bands, optimum)


def test_T8_a_trained_network_reaches_the_nonlinear_optimum() -> None:
    m, radius, level, rows = 1.0, 0.3, 0.5, 1024
    schedule = schedule_at(torch.tensor([level]))
    objective = EquivarianceLoss(
        schedule,
        perturbation="random",
        strength=m * 3 / radius**2,
        radius=Radius(scale=0, floor=radius, random=False),
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        layers = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return layers(x)

    steps, generator = 2500, seeded(8)
    optimiser = torch.optim.Adam(layers.parameters(), lr=5e-3)
    lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    t = torch.zeros(rows, dtype=torch.int64)
    for _ in range(steps):
        side = torch.randint(0, 2, (rows, 1), generator=generator) * 2 - 1
        x0 = side + 0.2 * torch.randn(rows, 1, generator=generator)
        optimiser.zero_grad()
        objective(model, x0, t=t, generator=generator).total.mean().backward()
        optimiser.step()
        lr_schedule.step()
    grid, density, plain, oracle = T8_oracle(schedule.alphas_cumprod[0].item(), m)
    with torch.no_grad():
        learned = layers(torch.tensor(grid, dtype=torch.float32)[:, None])[:, 0].numpy()

    def rms(difference: np.ndarray) -> float:
        return float(np.sqrt((difference**2 * density).sum() / density.sum()))

    effect = rms(plain - oracle)
    assert effect > 0.15
    assert rms(learned - oracle) < 0.06 * effect


def test_T8_for_one_gaussian_the_oracle_is_T3() -> None:
    """A check of the tridiagonal solve, and of the two theorems against each other."""
    schedule, index, m = ddpm_schedule(), 300, 0.6
    grid, density, plain, oracle = T8_oracle(schedule.alphas_cumprod[index].item(), m, centre=0.0)
    seen = density > 1e-3 * density.max()
    for curve, strength in ((plain, 0.0), (oracle, m)):
        slope = T3_optimum(schedule, index, strength, torch.tensor([[0.04]], dtype=torch.float64)).item()
        np.testing.assert_allclose(curve[seen], slope * grid[seen], rtol=1e-4, atol=1e-5)


# -- T15, T16: the units of the radius --------------------------------------------------------------


class Rim:
    """Omega at the rim of its box, by a pattern of signs that makes every moment exact."""

    mean_square = 1.0

    def __call__(self, respond: Any, radius: Tensor, like: Tensor, generator: Any = None) -> Tensor:
        return factorial(len(like) // 8, 1.0)[3] * radius[:, None]


def best_slopes(objective: EquivarianceLoss, variance: float) -> Tensor:
    """The minimiser w[t] of the objective's expected loss, found from its own gradient (affine in w), shape (T,)."""
    levels = objective.schedule.num_timesteps
    t, x0, eps, _ = factorial(levels, variance)
    slopes = []
    for value in (0.0, 1.0):
        model = PerLevel(value, levels)
        objective(model, x0, t=t, eps=eps, generator=seeded()).total.sum().backward()
        assert model.weight.grad is not None
        slopes.append(model.weight.grad)
    return slopes[0] / (slopes[0] - slopes[1])


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("v", [0.01, 0.3])
def test_T16_a_radius_in_units_of_the_state_is_a_floor_in_quadrature(v: float, normalise: bool) -> None:
    levels, strength, radius = torch.logspace(-2, 2, 50, dtype=torch.float64), 0.3, 0.4
    k = strength * radius**2
    raised = (levels.square() + k * (1 + levels.square())).sqrt()
    schedule, asked, every = schedule_at(levels), schedule_at(raised), torch.arange(50)
    box = Radius(exponent=0, scale=0, floor=radius, random=False, units="state")
    robust = best_slopes(EquivarianceLoss(schedule, Rim(), strength, box, normalise=normalise), v)
    plain = best_slopes(EquivarianceLoss(asked, None), v)
    close(1 - schedule.sigma(every) * robust, 1 - asked.sigma(every) * plain, rtol=1e-8, atol=1e-10)

    # and so is the free twin: a plain network asked at the raised levels
    both = schedule_at(torch.cat([levels, raised]))
    exact = PerLevel(0.0, 100)
    a2, s2 = both.alphas_cumprod, 1 - both.alphas_cumprod
    exact.weight.data = s2.sqrt() / (a2 * v + s2)
    twin = SigmaClampedModel(exact, both, sigma_floor=k**0.5, floor_shape="quadrature")
    close(twin.level_asked(levels), raised)
    order = torch.argsort(torch.cat([levels, raised]))
    sorted_schedule = NoiseSchedule(both.alphas_cumprod[order])
    exact.weight.data = exact.weight.data[order]
    twin = SigmaClampedModel(exact, sorted_schedule, sigma_floor=k**0.5, floor_shape="quadrature")
    place = torch.argsort(order)[:50]
    x = torch.ones(50, 1, dtype=torch.float64)
    close(twin(x, place)[:, 0], robust, rtol=1e-6, atol=1e-8)


def test_T16_the_published_numbers_make_a_floor_of_19_hundredths() -> None:
    box, strength = PRESETS["paper-random"]["radius"], PRESETS["paper-random"]["strength"]
    sigma = torch.tensor([0.02, 0.5, 0.99], dtype=torch.float64)
    mean_square = RandomPerturbation().mean_square * box.mean(torch.square, sigma)
    bias = 8 / 255
    k = strength * (1 / 3 + bias + bias**2) / 3  # E (U + b)^2 / 3
    close(strength * mean_square, k / sigma**2)
    assert k == pytest.approx(0.0366, abs=5e-5)
    assert k**0.5 == pytest.approx(0.19, abs=2e-3)
    drawn = box(torch.full((200_000,), 0.5), seeded())
    assert drawn.square().mean().item() == pytest.approx(box.mean(torch.square, torch.tensor(0.5)).item(), rel=0.01)


def reading(name: str, schedule: NoiseSchedule, v: float) -> Tensor:
    """The optimum w[t] of T3 under a preset of the paper, omega at the rim as an adversary leaves it."""
    settings, every = PRESETS[name], torch.arange(schedule.num_timesteps)
    strength, sigma = settings["strength"], schedule.sigma(every)

    def energy(radius: Tensor) -> Tensor:
        value = strength(sigma, radius) if callable(strength) else strength
        return value * radius.square()

    m = settings["radius"].mean(energy, sigma)
    a2, s2 = schedule.alphas_cumprod, 1 - schedule.alphas_cumprod
    return s2.sqrt() * (1 + m) / (a2 * v + (1 + m) * s2)


def test_T15_the_reading_noise_cannot_denoise_and_the_reading_state_can() -> None:
    schedule, noise = schedule_at(torch.logspace(-4, 3, 4000, dtype=torch.float64)), 0.2
    left = {
        name: ode_variance(schedule, reading(name, schedule, noise**2)) ** 0.5 for name in PRESETS if "paper" in name
    }
    assert noise - 0.02 < left["paper-noise"] < noise
    assert noise - 0.08 < left["paper-scaled"] < left["paper-noise"]
    assert left["paper"] < 0.3 * noise


def test_T15_a_trained_network_moves_no_further_than_the_bound() -> None:
    level, radius, strength, rows = 0.5, 0.4, 4.0, 512
    schedule = schedule_at(torch.tensor([level]))
    box = Radius(scale=0, floor=radius, random=False)
    objective = EquivarianceLoss(schedule, "random", strength, box)
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        layers = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))

    def draw(count: int, generator: torch.Generator) -> Tensor:
        side = torch.randint(0, 2, (count, 1), generator=generator) * 2 - 1
        return side + 0.2 * torch.randn(count, 1, generator=generator)

    steps, generator = 1200, seeded(8)
    optimiser = torch.optim.Adam(layers.parameters(), lr=5e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        batch = draw(rows, generator)
        terms = objective(lambda x, t: layers(x), batch, t=torch.zeros(rows, dtype=torch.int64), generator=generator)
        terms.total.mean().backward()
        optimiser.step()
        rate.step()

    alpha2 = schedule.alphas_cumprod[0].item()
    grid, _, optimum, _ = T8_oracle(alpha2, 0.0)

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return torch.tensor(np.interp(x.numpy(), grid, optimum), dtype=x.dtype)

    x0, t = draw(100_000, seeded(9)), torch.zeros(100_000, dtype=torch.int64)
    terms = objective(plain, x0, t=t, generator=seeded(10))
    x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=seeded(11)), t)
    with torch.no_grad():
        moved = (layers(x_t) - plain(x_t, t)).square().mean().item()
    penalty = strength * terms.equivariance.mean().item()
    assert 0.05 * penalty < moved < penalty  # the bound holds, and is not idle
    assert terms.equivariance.mean().item() < radius**2 * 4  # B, the largest slope of x0_hat in units of the noise


def test_normalising_divides_both_terms_of_a_level_by_one_plus_its_mean_strength() -> None:
    schedule, t = ddpm_schedule(), torch.tensor([3, 80, 300, 700, 950, 998])
    x0, model = normal(6, 2, 5, 5), SmallNet()
    box = Radius(exponent=0, units="state")
    for perturbation, energy in (("random", 1 / 3), ("adversarial", 1.0), (RandomPerturbation("signs"), 1.0)):
        raw, normalised = (
            EquivarianceLoss(schedule, perturbation, strength=0.3, radius=box, normalise=on)(
                model, x0, t=t, generator=seeded(1)
            )
            for on in (False, None)
        )
        bias = 8 / 255
        m = 0.3 * energy * (1 / 3 + bias + bias**2) / schedule.sigma(t) ** 2
        close(normalised.total, raw.total / (1 + m))
        close(normalised.denoising, raw.denoising)
        close(normalised.equivariance, raw.equivariance)
    # images whose level has no strength keep their plain loss, and a strength per radius counts as it is
    gated = EquivarianceLoss(schedule, "random", strength=SigmaRange(0, 0.2, 2.0), radius=box)(model, x0, t=t)
    far = schedule.noise_to_signal(t) > 0.2
    assert 0 < far.sum() < 6
    assert torch.equal(gated.total[far], gated.denoising[far])
    scaled = EquivarianceLoss(schedule, "random", strength=InverseRadius(0.3, 2.0), radius=box)
    terms = scaled(model, x0, t=t, generator=seeded(1))
    close(terms.strength, 0.3 * 3**0.5 / (2 * terms.radius))
    m = 0.3 * 3**0.5 / 2 * (0.5 + bias) / schedule.sigma(t) / 3
    close(terms.total, (terms.denoising + terms.strength * terms.equivariance) / (1 + m))
