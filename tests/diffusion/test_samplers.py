"""Single steps of the samplers against diffusers' and against their own formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from helpers import PREDICTIONS, normal, seeded
from robustdiff.diffusion.samplers import DifferentiableSampler, ddpm_step
from robustdiff.diffusion.schedule import NoiseSchedule


def test_no_noise_is_added_at_t_0_however_large_the_variance() -> None:
    scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample=False)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    sampler = DifferentiableSampler.of(lambda x, t: 0.1 * x, schedule, "ddpm", [999, 500, 0], large_variance=True)
    assert [step.noise > 0 for step in sampler.steps] == [True, True, False]
    noise = sampler.draw_noise(normal(2, 3), seeded(1))
    assert [z is None for z in noise] == [False, False, True]
    assert 1 - float(schedule.alphas_cumprod[0]) > 1e-5  # left out because the step is the last, not for a beta of 0
    x = normal(2, 1, 2, 2)
    ours = DifferentiableSampler.of(lambda x, t: 0.1 * x, schedule, "ddpm", [0], large_variance=True).run(x)
    stock = [scheduler.step(0.1 * x, 0, x, generator=seeded(seed)).prev_sample for seed in (1, 2)]
    torch.testing.assert_close(ours, stock[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(stock[0], stock[1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_one_ancestral_step_is_that_of_diffusers(prediction: str, kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, variance_type=kind, clip_sample=False)
    schedule, x, output = NoiseSchedule.from_scheduler(scheduler), normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    for t in (1, 400, 999):
        step = ddpm_step(schedule, t, t - 1, large_variance=kind == "fixed_large")
        z = torch.randn(x.shape, generator=seeded(t), dtype=x.dtype)
        moved = step.x0 * schedule.x0_hat(output, x, torch.tensor(t)) + step.x * x + step.noise * z
        wanted = scheduler.step(output, t, x, generator=seeded(t)).prev_sample
        torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-4)
