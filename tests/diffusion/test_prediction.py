"""Every parametrisation is one linear target, and what follows from it holds: docs/explanation/theory.md T17."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from helpers import SmallNet, ddpm_schedule, normal, seeded
from robustdiff.diffusion.flow_matching import FlowSchedule
from robustdiff.diffusion.prediction import EpsilonPrediction, FlowPrediction, Prediction, VPrediction
from robustdiff.diffusion.schedule import NoiseSchedule, Schedule
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import EquivarianceLoss

NAMES = ("epsilon", "sample", "v_prediction", "flow_prediction")
LINEAR = {
    "epsilon": lambda a, s: (0, 1),
    "sample": lambda a, s: (1, 0),
    "v_prediction": lambda a, s: (-s, a),
    "flow_prediction": lambda a, s: (-1, 1),
}
"""p and q of theory T17."""
SCHEDULES = [*((name, False) for name in NAMES), *((name, True) for name in NAMES if name != "v_prediction")]


def schedule_of(name: str, flow: bool) -> tuple[Schedule, Tensor]:
    """A schedule with that prediction, and timesteps all over it."""
    if flow:
        return FlowSchedule(prediction=name), torch.tensor([0.5, 30.0, 400.0, 650.5, 990.0], dtype=torch.float64)
    return ddpm_schedule(name), torch.tensor([0, 30, 400, 650, 990])


def shaped(scale: Tensor) -> Tensor:
    return scale.double().reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("name", "flow"), SCHEDULES)
def test_T17_target_image_noise_and_weight_follow_from_p_and_q(name: str, flow: bool) -> None:
    schedule, t = schedule_of(name, flow)
    x0, eps, y, omega, shift = (normal(5, 2, 4, 4, seed=seed) for seed in range(5))
    a, s = shaped(schedule.alpha(t)), shaped(schedule.sigma(t))
    p, q = LINEAR[name](a, s)
    d, x = a * q - s * p, a * x0 + s * eps

    def same(got: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)

    same(schedule.add_noise(x0, eps, t), x)
    same(schedule.target(x0, eps, t), p * x0 + q * eps)
    same(schedule.x0_hat(y, x, t), (q * x - s * y) / d)
    same(schedule.eps_hat(y, x, t), (a * y - p * x) / d)
    same(schedule.x0_hat(p * x0 + q * eps, x, t), x0)
    same(schedule.eps_hat(p * x0 + q * eps, x, t), eps)
    same(schedule.output_from_x0(schedule.x0_hat(y, x, t), x, t), y)
    same(schedule.x0_weight(t).double(), ((d / s) ** 2).expand(5, 1, 1, 1).flatten())
    same(schedule.equivariance_residual(shift, omega, t), shift - q * omega)
    eps_shift = schedule.eps_hat(y + shift, x + s * omega, t) - schedule.eps_hat(y, x, t)
    same(schedule.eps_shift(shift, omega, t), eps_shift)


@pytest.mark.parametrize(("name", "flow"), SCHEDULES)
def test_T1_the_residual_is_the_movement_of_the_denoised_image(name: str, flow: bool) -> None:
    schedule, t = schedule_of(name, flow)
    x0, eps, omega = (normal(5, 2, 4, 4, seed=seed) for seed in range(3))
    a, s = shaped(schedule.alpha(t)), shaped(schedule.sigma(t))
    p, q = LINEAR[name](a, s)
    model, x = SmallNet(), schedule.add_noise(x0, eps, t)
    moved = schedule.perturb(x, omega, t)
    output, after = model(x, t), model(moved, t)
    residual = schedule.equivariance_residual(after - output, omega, t)
    movement = schedule.x0_hat(after, moved, t) - schedule.x0_hat(output, x, t)
    torch.testing.assert_close(residual, -(a * q - s * p) / s * movement, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "flow"), SCHEDULES)
def test_the_denoising_loss_weights_the_error_of_the_image_by_x0_weight(name: str, flow: bool) -> None:
    schedule, t = schedule_of(name, flow)
    x0, eps, model = normal(5, 2, 4, 4), normal(5, 2, 4, 4, seed=1), SmallNet()
    x = schedule.add_noise(x0, eps, t)
    error = (schedule.x0_hat(model(x, t), x, t) - x0).square().flatten(1).mean(1)
    loss = DenoisingLoss(schedule)(model, x0, t=t, eps=eps).denoising
    torch.testing.assert_close(loss, schedule.x0_weight(t).double() * error, rtol=1e-8, atol=1e-10)


# -- zero terminal SNR and pure noise --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_where_alpha_is_zero_only_the_image_of_epsilon_is_undefined(name: str) -> None:
    schedule, t = ddpm_schedule(name, zero_snr=True), torch.tensor([999, 999])
    assert float(schedule.alpha(t)[0]) == 0
    y, x, omega, shift = (normal(2, 1, 3, 3, seed=seed) for seed in range(4))
    finite = {
        "target": schedule.target(x, y, t),
        "eps_hat": schedule.eps_hat(y, x, t),
        "output_from_x0": schedule.output_from_x0(y, x, t),
        "x0_weight": schedule.x0_weight(t),
        "residual": schedule.equivariance_residual(shift, omega, t),
        "eps_shift": schedule.eps_shift(shift, omega, t),
    }
    assert [what for what, value in finite.items() if not value.isfinite().all()] == []
    assert bool(schedule.x0_hat(y, x, t).isfinite().all()) == (name != "epsilon")


@pytest.mark.parametrize("name", ["sample", "v_prediction", "flow_prediction"])
def test_both_losses_are_finite_at_zero_terminal_snr_with_their_gradients(name: str) -> None:
    schedule, model = ddpm_schedule(name, zero_snr=True), SmallNet()
    loss = EquivarianceLoss(schedule, "adversarial", strength=1.0)
    terms = loss(model, normal(4, 2, 4, 4), t=torch.full((4,), 999), generator=seeded(1))
    terms.total.mean().backward()
    assert bool(terms.total.isfinite().all())
    assert float(terms.equivariance.detach().min()) > 0
    assert all(bool(weight.grad.isfinite().all()) for weight in model.parameters() if weight.grad is not None)


# -- equality with diffusers -----------------------------------------------------------------------


def test_flow_states_are_those_of_the_euler_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    schedule, t = FlowSchedule(), FlowMatchEulerDiscreteScheduler().timesteps[::100]
    x0, eps = (normal(len(t), 1, 2, 2, seed=seed, dtype=torch.float32) for seed in (1, 2))
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), scheduler.scale_noise(x0, t, eps), rtol=1e-6, atol=1e-6)
    assert torch.equal(schedule.target(x0, eps, t), eps - x0)  # what diffusers' flow-matching trainers regress on


def test_a_flow_step_of_diffusers_follows_the_velocity_to_the_image() -> None:
    scheduler, schedule = FlowMatchEulerDiscreteScheduler(), FlowSchedule()
    scheduler.set_timesteps(1)
    x, y = normal(2, 1, 2, 2, dtype=torch.float32), normal(2, 1, 2, 2, seed=1, dtype=torch.float32)
    step = scheduler.step(y, scheduler.timesteps[0], x).prev_sample  # from pure noise to the end
    torch.testing.assert_close(schedule.x0_hat(y, x, scheduler.timesteps[:1]), step, rtol=1e-6, atol=1e-6)


def test_velocity_and_state_of_the_ddpm_scheduler_are_met_bit_for_bit() -> None:
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule, t = NoiseSchedule.from_scheduler(scheduler), torch.arange(1000)
    x0, eps = (normal(1000, 1, 2, 2, seed=seed, dtype=torch.float32) for seed in (1, 2))
    assert torch.equal(schedule.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t))
    assert torch.equal(schedule.target(x0, eps, t), scheduler.get_velocity(x0, eps, t))


# -- the schedule of flow matching -----------------------------------------------------------------


def test_noise_levels_and_timesteps_of_the_flow_are_inverse_and_continuous() -> None:
    schedule = FlowSchedule()
    t = torch.linspace(0.1, 999, 50, dtype=torch.float64)
    s = t / 1000
    torch.testing.assert_close(schedule.noise_to_signal(t), s / (1 - s))
    torch.testing.assert_close(schedule.snr(t), ((1 - s) / s) ** 2)
    torch.testing.assert_close(schedule.timestep_at(schedule.noise_to_signal(t)), t)
    ends = schedule.timestep_at(torch.tensor([0.0, 1.0, float("inf")]))
    assert ends.tolist() == [0.0, 500.0, 1000.0]
    assert float(schedule.noise_to_signal(torch.tensor(1000.0))) == float("inf")


def test_flow_timesteps_are_uniform_above_zero_and_above_the_images_own_noise() -> None:
    schedule = FlowSchedule()
    t = schedule.draw_timesteps(20_000, seeded(1))
    assert t.dtype == torch.float32
    assert 0 < float(t.min()) < 1
    assert 999 < float(t.max()) <= 1000
    assert float(t.mean()) == pytest.approx(500, abs=10)
    level = torch.tensor([0.0, 0.5, 2.0]).repeat_interleave(2000)
    first = schedule.first_timesteps(level)
    torch.testing.assert_close(schedule.noise_to_signal(first), level.double())
    above = schedule.draw_timesteps(6000, seeded(2), first)
    assert bool((schedule.noise_to_signal(above).double() >= level * (1 - 1e-5)).all())
    means = above.reshape(3, -1).mean(1)
    torch.testing.assert_close(means, (first.reshape(3, -1)[:, 0].float() + 1000) / 2, rtol=0.05, atol=0)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="noise_level"):
            schedule.first_timesteps(torch.tensor([bad]))


def test_images_of_known_noise_train_on_the_flow_too() -> None:
    """T13 for a single image with x0 = 0: the denoiser that always says 0 pays for the noise of y alone."""
    schedule = FlowSchedule(prediction="sample")
    y = 0.5 * normal(4000, 1, 2, 2)
    terms = DenoisingLoss(schedule)(
        lambda x, t: torch.zeros_like(x), y, noise_level=torch.full((4000,), 0.5), generator=seeded(1)
    )
    assert bool(terms.total.isfinite().all())
    c = schedule.noise_to_signal(terms.t).double()
    rho = (0.5 / c).square()
    # the image in the target is (1 - rho) y - (sigma_n^2 / c) e: two independent parts
    wanted = ((1 - rho).square() * 0.25 + (0.25 / c).square() * (1 - rho)).mean()
    assert float(terms.denoising.mean()) == pytest.approx(float(wanted), rel=0.05)


# -- names -----------------------------------------------------------------------------------------


def test_predictions_are_found_by_diffusers_names_and_equal_by_value() -> None:
    assert [Prediction.named(name).name for name in NAMES] == list(NAMES)
    assert Prediction.named("epsilon") == EpsilonPrediction()
    assert Prediction.named("epsilon") != VPrediction()
    assert NoiseSchedule(torch.tensor([0.5]), FlowPrediction()).prediction == FlowPrediction()
    with pytest.raises(ValueError, match="prediction_type 'noise' is not one of epsilon, sample, v_prediction"):
        Prediction.named("noise")


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="'epsilon' is taken by EpsilonPrediction"):

        @dataclass(frozen=True)
        class Mine(Prediction, name="epsilon"):
            def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
                return 0.0, 1.0

    assert Prediction.named("epsilon") == EpsilonPrediction()


def test_v_needs_a_variance_preserving_schedule() -> None:
    with pytest.raises(ValueError, match="v_prediction"):
        FlowSchedule(prediction="v_prediction")
    with pytest.raises(ValueError, match="num_timesteps"):
        FlowSchedule(num_timesteps=0)
