"""A stranger adds what a network predicts, in this one file: EDM's F, and trains and samples with it.

Karras et al. (2022), Eq. 7: ``D = c_skip x / a + c_out F`` at sigma = s / a, so that F has unit variance for data of
standard deviation ``sigma_data``. As a linear target ``F = p x0 + q eps`` two coefficients say all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from helpers import Given, normal, uncorrelated
from robustdiff.diffusion import DifferentiableSampler, NoiseSchedule, Prediction
from robustdiff.losses import DenoisingLoss, EquivarianceLoss


@dataclass(frozen=True)
class EDMPrediction(Prediction, name="edm"):
    """EDM's network target F, for data of standard deviation ``sigma_data``."""

    sigma_data: float = 0.5

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """p and q."""
        root = (sigma.square() + (self.sigma_data * alpha).square()).sqrt()
        return sigma / (self.sigma_data * root), -self.sigma_data * alpha / root


VARIANCES = torch.tensor([0.04, 0.3, 1.0], dtype=torch.float64)
TABLE = torch.tensor([0.99, 0.9, 0.6, 0.2, 0.02], dtype=torch.float64)
LEVELS = len(TABLE)


class Gains(nn.Module):
    """A linear network: one gain per timestep and direction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(LEVELS, 3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 3), (B,) or () -> (B, 3)."""
        return self.weight[t] * x


def trained(loss: DenoisingLoss, rows: int = 32) -> Gains:
    """The minimiser, on draws whose second moments are exact."""
    x0, eps, _ = uncorrelated(rows, 3, 3, 3)
    network, t = Gains(), torch.arange(LEVELS).repeat_interleave(rows)
    x0, eps = (VARIANCES.sqrt() * x0).repeat(LEVELS, 1), eps.repeat(LEVELS, 1)
    exact = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 0.0}
    optimiser = torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe", **exact)

    def closure() -> Tensor:
        optimiser.zero_grad()
        total = loss(network, x0, t=t, eps=eps).total.mean()
        total.backward()
        return total

    optimiser.step(closure)
    return network


def test_it_is_found_by_its_name_and_is_edms_denoiser() -> None:
    schedule, t = NoiseSchedule(TABLE, "edm"), torch.arange(LEVELS)
    assert schedule.prediction == EDMPrediction()
    x, f = normal(LEVELS, 3), normal(LEVELS, 3, seed=1)
    sigma, data = schedule.noise_to_signal(t)[:, None], 0.5
    denoised = data**2 / (sigma**2 + data**2) * x / schedule.alpha(t)[:, None]
    denoised = denoised + sigma * data / (sigma**2 + data**2).sqrt() * f
    torch.testing.assert_close(schedule.x0_hat(f, x, t), denoised)
    x0, eps = data * normal(20_000, 1, seed=2), normal(20_000, 1, seed=3)
    for step in t:
        assert float(schedule.target(x0, eps, step).var()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("m", [0.0, 1.5], ids=["denoising", "equivariance"])
def test_losses_train_the_closed_form_and_the_sampler_generates_its_variance(m: float) -> None:
    schedule = NoiseSchedule(TABLE, EDMPrediction(sigma_data=0.7))
    omega = uncorrelated(32, 3, 3, 3)[2].repeat(LEVELS, 1)
    loss = EquivarianceLoss(schedule, Given(omega), strength=m) if m else DenoisingLoss(schedule)
    network = trained(loss)

    t = torch.arange(LEVELS)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    w = s * (1 + m) / (a**2 * VARIANCES + (1 + m) * s**2)  # docs/explanation/theory.md T3, as a noise prediction
    ones = torch.ones(LEVELS, 3, dtype=torch.float64)
    torch.testing.assert_close(schedule.eps_hat(network(ones, t), ones, t), w, rtol=1e-6, atol=1e-8)

    sampler = DifferentiableSampler.of(network, schedule, "ddim", list(range(LEVELS - 1, -1, -1)))
    generated = sampler.run(ones[:1])[0]
    a_next, s_next = torch.cat([torch.ones(1, 1), a[:-1]]), torch.cat([torch.zeros(1, 1), s[:-1]])
    torch.testing.assert_close(generated, (a_next * (1 - s * w) / a + s_next * w).prod(0), rtol=1e-6, atol=1e-8)
