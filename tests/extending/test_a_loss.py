"""A loss of your own: one class, given to ``fit``. This is the documented way; nothing is registered anywhere.

The class says what an image costs, term by term; ``fit`` averages ``total`` over the images, and does the rest. Here:
the absolute error of the denoised image, whose least value is at the median of the images where that of the squared
error is at their mean, so that a few outliers draw it nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from robustdiff import DenoisingLoss, NoiseSchedule, fit
from robustdiff.losses.denoising import LossOutput
from robustdiff.training import FitOptions


@dataclass(frozen=True)
class AbsoluteLoss:
    """``|x0_hat(x_t) - x0|``, of a network that predicts the image (prediction type ``sample``)."""

    schedule: NoiseSchedule

    def __call__(self, model, x0: Tensor, *, generator=None, **_: object) -> LossOutput:
        t = self.schedule.draw_timesteps(len(x0), generator)
        eps = torch.stack([torch.randn(x0.shape[1:], generator=one) for one in generator])
        error = (model(self.schedule.add_noise(x0, eps, t), t) - x0).abs().flatten(1).mean(1)
        nothing = torch.zeros_like(error)
        return LossOutput(total=error, denoising=error, equivariance=nothing, t=t, radius=nothing, strength=nothing)


class Constant(nn.Module):
    """Answers every image with the same grey."""

    def __init__(self) -> None:
        super().__init__()
        self.grey = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.grey.expand_as(x)


@pytest.mark.parametrize(("kind", "grey"), [(AbsoluteLoss, -0.5), (DenoisingLoss, 0.06)])
def test_a_loss_of_ones_own_trains_through_fit(kind: type, grey: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    images = torch.tensor([-0.5, -0.5, -0.5, 0.9, 0.9])[:, None, None, None].expand(-1, 1, 4, 4)  # median, mean: above
    network = Constant()
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 10), "sample")
    options = FitOptions(steps=150, learning_rate=0.03, lr_scheduler="linear", max_grad_norm=float("inf"))
    result = fit(network, kind(schedule), [images], options)
    assert network.grey.item() == pytest.approx(grey, abs=0.02)
    assert result.records[-1]["loss"] < result.records[0]["loss"]
