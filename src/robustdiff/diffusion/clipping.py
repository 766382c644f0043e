"""Hold the predicted image in range, so that image and noise still belong to one state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustdiff.diffusion.model import Model, call_model
from robustdiff.diffusion.schedule import Schedule


def clip_output(schedule: Schedule, output: Tensor, x_t: Tensor, t: Tensor, bound: float) -> Tensor:
    """The output that stands for the predicted image held in [-bound, bound], and for the noise that goes with it.

    A sampler that clips the image and keeps the noise of the unclipped one (diffusers' ``DDIMScheduler`` without
    ``use_clipped_model_output``) leaves the line from image to noise: the more steps, the further.

    Args:
        schedule: The noise schedule.
        output: The network's output for ``x_t``, shape (B, ...); elements that are in range stay bit for bit.
        x_t: States, shape (B, ...).
        t: Timesteps, shape (B,) or ().
        bound: Largest absolute value of the image, > 0.
    """
    x0_hat = schedule.x0_hat(output, x_t, t)
    clipped = x0_hat.clamp(-bound, bound)
    return torch.where(clipped == x0_hat, output, schedule.output_from_x0(clipped, x_t, t))


@dataclass(frozen=True)
class ClippedModel:
    """A model whose predicted image is held in range, whatever sampler calls it; see :func:`clip_output`.

    Args:
        model: ``callable(x_t, t, **kwargs)``.
        schedule: Its noise schedule.
        bound: Largest absolute value of the predicted image, > 0.
    """

    model: Model
    schedule: Schedule
    bound: float = 1.0

    def __call__(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401 - passed through
        """The prediction for state ``x_t``, (B, ...), at timesteps ``t``, (B,) or (), rounded to whole ones."""
        t = t.to(x_t.device).round().long()
        return clip_output(self.schedule, call_model(self.model, x_t, t, kwargs), x_t, t, self.bound)
