"""The noise schedule equals diffusers' own schedulers, and its conversions are inverse to one another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from helpers import PREDICTIONS, ddpm_schedule, normal, schedule_at, seeded
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.utils.random import draw_normal, draw_uniform

BETAS: dict[str, dict[str, Any]] = {
    **{
        name: {"beta_schedule": name} for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
    },
    "trained_betas": {"trained_betas": torch.linspace(1e-4, 0.03, 1000).tolist()},
}
FAMILY = [
    (kind, prediction)
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler)
    for prediction in PREDICTIONS
] + [(PNDMScheduler, "epsilon"), (PNDMScheduler, "v_prediction")]
ALL_T = torch.arange(1000)


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """One small (x0, eps) for each of the 1000 timesteps."""
    x0 = torch.rand(1000, 1, 2, 2, generator=seeded(1), dtype=torch.float64) * 2 - 1
    return x0.to(dtype), normal(1000, 1, 2, 2, seed=2).to(dtype)


# -- equality with diffusers -----------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", BETAS)
def test_state_and_target_are_bitwise_those_of_ddpm_for_every_beta_schedule(
    betas: str, prediction: str, zero_snr: bool
) -> None:
    scheduler = DDPMScheduler(**BETAS[betas], prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x0, eps = batch()
    assert schedule.prediction.name == prediction
    assert schedule.num_timesteps == 1000
    assert torch.equal(schedule.add_noise(x0, eps, ALL_T), scheduler.add_noise(x0, eps, ALL_T))
    wanted = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, ALL_T)}[prediction]
    assert torch.equal(schedule.target(x0, eps, ALL_T), wanted)


@pytest.mark.parametrize(("kind", "prediction"), FAMILY)
def test_the_tables_of_other_schedulers_of_the_family_are_read(kind: type, prediction: str) -> None:
    schedule = NoiseSchedule.from_scheduler(kind(prediction_type=prediction, beta_schedule="scaled_linear"))
    reference = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    x0, eps = batch()
    assert schedule.prediction.name == prediction
    assert torch.equal(schedule.add_noise(x0, eps, ALL_T), reference.add_noise(x0, eps, ALL_T))


def test_alpha_sigma_snr_and_noise_to_signal_follow_their_definitions() -> None:
    table = DDPMScheduler().alphas_cumprod.double()
    schedule = NoiseSchedule(table)
    torch.testing.assert_close(schedule.alpha(ALL_T), table**0.5, rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.sigma(ALL_T), (1 - table) ** 0.5, rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.snr(ALL_T), table / (1 - table), rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.noise_to_signal(ALL_T), (1 / table - 1) ** 0.5, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_hat_and_eps_hat_are_those_of_a_ddim_step(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(1000)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x_t, output = normal(3, 1, 4, 4, seed=3), normal(3, 1, 4, 4, seed=4)
    for t in (1, 10, 250, 700, 999):
        step = scheduler.step(output, t, x_t)
        times = torch.full((3,), t)
        x0_hat = schedule.x0_hat(output, x_t, times)
        torch.testing.assert_close(x0_hat, step.pred_original_sample, rtol=1e-12, atol=1e-12)
        previous = scheduler.alphas_cumprod[t - 1]  # eta = 0: the step is a' x0_hat + s' eps_hat
        eps_hat = (step.prev_sample - previous.sqrt() * x0_hat) / (1 - previous).sqrt()
        torch.testing.assert_close(schedule.eps_hat(output, x_t, times), eps_hat, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_hat_is_that_of_a_ddpm_step(prediction: str, zero_snr: bool) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, clip_sample=False, rescale_betas_zero_snr=zero_snr)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x_t, output = normal(2, 1, 3, 3, seed=5).float(), normal(2, 1, 3, 3, seed=6).float()
    for t in (0, 1, 500, 998 if prediction == "epsilon" else 999):
        wanted = scheduler.step(output, t, x_t, generator=seeded()).pred_original_sample
        torch.testing.assert_close(schedule.x0_hat(output, x_t, torch.full((2,), t)), wanted, rtol=1e-5, atol=1e-5)


# -- conversions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_target_stands_for_the_true_image_and_the_true_noise(prediction: str) -> None:
    schedule = ddpm_schedule(prediction)
    x0, eps = batch(torch.float64)
    x_t, target = schedule.add_noise(x0, eps, ALL_T), schedule.target(x0, eps, ALL_T)
    torch.testing.assert_close(schedule.x0_hat(target, x_t, ALL_T), x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(schedule.eps_hat(target, x_t, ALL_T), eps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_output_from_x0_inverts_x0_hat(prediction: str) -> None:
    schedule = ddpm_schedule(prediction)
    x_t, output = normal(1000, 1, 2, 2, seed=7), normal(1000, 1, 2, 2, seed=8)
    x0_hat = schedule.x0_hat(output, x_t, ALL_T)
    torch.testing.assert_close(schedule.output_from_x0(x0_hat, x_t, ALL_T), output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eps_hat_and_x0_hat_put_together_give_the_state(prediction: str) -> None:
    schedule = ddpm_schedule(prediction)
    x_t, output = normal(1000, 1, 2, 2, seed=7), normal(1000, 1, 2, 2, seed=8)
    again = schedule.add_noise(schedule.x0_hat(output, x_t, ALL_T), schedule.eps_hat(output, x_t, ALL_T), ALL_T)
    torch.testing.assert_close(again, x_t, rtol=1e-9, atol=1e-9)


def test_perturbing_the_state_is_adding_omega_to_the_noise() -> None:
    schedule = ddpm_schedule()
    x0, eps = batch(torch.float64)
    omega = normal(1000, 1, 2, 2, seed=9)
    perturbed = schedule.perturb(schedule.add_noise(x0, eps, ALL_T), omega, ALL_T)
    torch.testing.assert_close(perturbed, schedule.add_noise(x0, eps + omega, ALL_T), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 4), (5, 2, 3, 4), (5, 1, 2, 3, 4)])
def test_any_number_of_dimensions_and_one_timestep_for_all(shape: tuple[int, ...]) -> None:
    schedule = ddpm_schedule("v_prediction")
    x0, eps, t = normal(*shape, seed=1), normal(*shape, seed=2), torch.tensor(300)
    a, s = schedule.alphas_cumprod[300] ** 0.5, (1 - schedule.alphas_cumprod[300]) ** 0.5
    for times in (t, t.expand(5)):
        torch.testing.assert_close(schedule.add_noise(x0, eps, times), a * x0 + s * eps, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(schedule.target(x0, eps, times), a * eps - s * x0, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_states_use_scales_computed_in_float32(half: torch.dtype) -> None:
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    ones, zeros = torch.ones(1000, 1, dtype=half), torch.zeros(1000, 1, dtype=half)
    sigma = (1 - schedule.alphas_cumprod).sqrt().to(half)  # rounding alpha_bar to half first gives sigma(0) = 0
    state = schedule.add_noise(zeros, ones, ALL_T)
    assert state.dtype == half
    assert torch.equal(state[:, 0], sigma)
    assert torch.equal(schedule.add_noise(ones, zeros, ALL_T)[:, 0], schedule.alphas_cumprod.sqrt().to(half))


# -- from a noise level back to a timestep ---------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
def test_timestep_at_is_the_nearest_level_in_logarithm(zero_snr: bool) -> None:
    schedule = ddpm_schedule(zero_snr=zero_snr)
    wanted = torch.logspace(-2.5, 3, 400, dtype=torch.float64)
    levels = (1 / schedule.alphas_cumprod - 1).sqrt().log()
    nearest = (wanted.log()[:, None] - levels[None]).abs().argmin(1)
    assert torch.equal(schedule.timestep_at(wanted), nearest)


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
def test_timestep_at_inverts_noise_to_signal_and_clamps(zero_snr: bool) -> None:
    schedule = ddpm_schedule(zero_snr=zero_snr)
    finite = ALL_T[: 999 if zero_snr else 1000]
    assert torch.equal(schedule.timestep_at(schedule.noise_to_signal(finite)), finite)
    ends = schedule.timestep_at(torch.tensor([0.0, 1e-9, 1e30, float("inf")]))
    assert ends.tolist() == [0, 0, finite[-1].item(), finite[-1].item()]
    assert schedule.timestep_at(torch.tensor(0.5)).shape == ()
    assert schedule.timestep_at(torch.full((2, 3), 0.5)).shape == (2, 3)


def test_timestep_at_stays_in_a_table_of_one_level() -> None:
    assert schedule_at(torch.tensor([0.5])).timestep_at(torch.tensor([0.1, 0.5, 9.0])).tolist() == [0, 0, 0]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, EDMEulerScheduler])
def test_a_scheduler_without_a_ddpm_table_is_refused_by_name(kind: type) -> None:
    with pytest.raises(TypeError, match=kind.__name__):
        NoiseSchedule.from_scheduler(kind())


@pytest.mark.parametrize(
    "table",
    [[[0.9, 0.5]], [1.0, 0.5], [0.5, -0.1], [0.5, float("nan")], 0.5],
    ids=["matrix", "no_noise", "negative", "nan", "scalar"],
)
def test_a_bad_table_is_refused(table: Any) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        NoiseSchedule(torch.tensor(table))


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'score' is not one of epsilon, sample, v_prediction, flow_prediction"):
        NoiseSchedule(torch.tensor([0.9, 0.5]), "score")
    config = SimpleNamespace(prediction_type="score")
    scheduler = SimpleNamespace(alphas_cumprod=torch.tensor([0.9, 0.5]), config=config)
    with pytest.raises(ValueError, match="score"):
        NoiseSchedule.from_scheduler(scheduler)


def test_a_table_that_flow_matching_leaves_unused_is_refused() -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(TypeError, match="flow matching"):
        NoiseSchedule.from_scheduler(scheduler)


# -- draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [draw_normal, draw_uniform])
def test_with_one_generator_per_image_a_row_does_not_depend_on_its_batch(draw: Any) -> None:
    together = draw(torch.empty(4, 2, 3), [seeded(i) for i in range(4)])
    for i in range(4):
        assert torch.equal(draw(torch.empty(1, 2, 3), [seeded(i)])[0], together[i])
    backwards = draw(torch.empty(4, 2, 3), [seeded(i) for i in reversed(range(4))])
    assert torch.equal(backwards.flip(0), together)
    assert len({row.sum().item() for row in together}) == 4


def test_timesteps_from_one_generator_per_image_do_not_depend_on_the_batch() -> None:
    schedule = ddpm_schedule()
    together = schedule.draw_timesteps(5, [seeded(i) for i in range(5)])
    assert together.tolist() == [schedule.draw_timesteps(1, [seeded(i)]).item() for i in range(5)]


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_wrong_number_of_generators_is_refused(count: int) -> None:
    generators = [seeded(i) for i in range(count)]
    for draw in (draw_normal, draw_uniform):
        with pytest.raises(ValueError, match="generators"):
            draw(torch.empty(3, 2), generators)
    with pytest.raises(ValueError, match="generators"):
        ddpm_schedule().draw_timesteps(3, generators)


def test_timesteps_are_uniform_on_the_whole_table() -> None:
    schedule = schedule_at(torch.linspace(0.1, 2, 10))
    counts = torch.bincount(schedule.draw_timesteps(100_000, seeded(3)), minlength=10)
    assert counts.shape == (10,)
    assert (counts - 10_000).abs().max() < 4 * (100_000 * 0.09) ** 0.5  # four standard deviations


def test_draws_follow_the_dtype_and_the_generator() -> None:
    for draw in (draw_normal, draw_uniform):
        assert draw(torch.empty(2, 3, dtype=torch.float64), seeded(1)).dtype == torch.float64
        assert torch.equal(draw(torch.empty(2, 3), seeded(1)), draw(torch.empty(2, 3), seeded(1)))
        assert not torch.equal(draw(torch.empty(2, 3), seeded(1)), draw(torch.empty(2, 3), seeded(2)))
    assert torch.equal(draw_normal(torch.empty(4, 2), seeded(1)), torch.randn(4, 2, generator=seeded(1)))
    assert torch.equal(draw_uniform(torch.empty(4, 2), seeded(1)), torch.rand(4, 2, generator=seeded(1)))
