"""Ask a network at a larger noise level than the state has: smoother images without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robustdiff.diffusion.model import Model, call_model
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.utils.errors import check_choice
from robustdiff.utils.tensors import expand_to

FloorShape = Literal["hard", "quadrature"]


@dataclass(frozen=True)
class SigmaClampedModel:
    """A model queried at a larger noise level than the state has; no training, any pipeline.

    At noise level ``c = sigma/alpha`` the wrapped model is asked for the clean image at a level that is not below
    ``sigma_floor``, with the state rescaled to the signal scale of that level, and the answer is expressed as the
    prediction the sampler expects::

        max(sigma_scale c, sigma_floor)                              hard
        sqrt((sigma_scale c)^2 + sigma_floor^2 (1 + c^2))            quadrature

    The second is, in a linear-Gaussian world, exactly what the equivariance regulariser does whose perturbation is
    bounded in units of the state, with ``sigma_floor^2 = lambda E[delta^2]`` (docs/explanation/theory.md T16).

    Args:
        model: ``callable(x_t, t, **kwargs)``.
        schedule: Its noise schedule.
        sigma_scale: Factor >= 1 on the noise level. In a linear-Gaussian world ``sqrt(1 + m)`` gives exactly what the
            equivariance regulariser of strength m gives.
        sigma_floor: Least noise level sigma/alpha to query at, >= 0: details finer than this are not asked for.
        floor_shape: ``"hard"`` or ``"quadrature"``, as above.

    Raises:
        ValueError: If a setting is out of range.

    The level is rounded to the nearest timestep, and clamped to the noisiest one.
    """

    model: Model
    schedule: NoiseSchedule
    sigma_scale: float = 1.0
    sigma_floor: float = 0.0
    floor_shape: FloorShape = "hard"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_choice("floor_shape", self.floor_shape, get_args(FloorShape))
        if not (self.sigma_scale >= 1 and self.sigma_floor >= 0):
            raise ValueError(
                f"need sigma_scale >= 1 and sigma_floor >= 0, got {self.sigma_scale} and {self.sigma_floor}"
            )

    def level_asked(self, level: Tensor) -> Tensor:
        """The noise level sigma/alpha at which the model is asked where the state has ``level``; any shape."""
        scaled = self.sigma_scale * level
        if self.floor_shape == "hard":
            return scaled.clamp(min=self.sigma_floor)
        return (scaled.square() + self.sigma_floor**2 * (1 + level.square())).sqrt()

    def __call__(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401 - passed through
        """The prediction for state ``x_t``, (B, ...), at timesteps ``t``, (B,) or ()."""
        t = t.to(x_t.device).round().long().reshape(-1).expand(x_t.shape[0])
        level = self.schedule.noise_to_signal(t)
        wanted = self.level_asked(level)
        changed = wanted > level
        asked = torch.where(changed, self.schedule.timestep_at(wanted), t)
        rescale = torch.where(changed, self.schedule.alpha(asked) / self.schedule.alpha(t), torch.ones_like(level))
        state = x_t * expand_to(rescale.to(x_t.dtype), x_t)
        output = call_model(self.model, state, asked, kwargs)
        answer = self.schedule.output_from_x0(self.schedule.x0_hat(output, state, asked), x_t, t)
        return torch.where(expand_to(asked != t, x_t), answer, output)
