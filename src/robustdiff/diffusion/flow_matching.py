"""The schedule of flow matching: straight lines from the image to the noise, in continuous time."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.diffusion.prediction import Prediction, VPrediction
from robustdiff.diffusion.schedule import Schedule, check_noise_level, draw_fractions
from robustdiff.utils.random import Generators
from robustdiff.utils.tensors import to_device


class FlowSchedule(Schedule):
    """``alpha = 1 - s``, ``sigma = s`` with ``s = t / T``, t a real number in (0, T]; ``sigma/alpha = s / (1 - s)``.

    Args:
        num_timesteps: T > 0, the network's time at pure noise (diffusers: ``num_train_timesteps``).
        prediction: What the network returns, a :class:`Prediction` or its name.

    Raises:
        ValueError: If T is not positive, or the prediction is v, which needs a^2 + s^2 = 1.

    Source: Lipman et al. (2023), Liu et al. (2023); diffusers' ``FlowMatchEulerDiscreteScheduler``.
    """

    def __init__(self, num_timesteps: int = 1000, prediction: Prediction | str = "flow_prediction") -> None:
        """Check both."""
        if num_timesteps <= 0:
            raise ValueError(f"FlowSchedule needs num_timesteps > 0, got {num_timesteps}")
        self.num_timesteps = num_timesteps
        self.prediction = Prediction.named(prediction) if isinstance(prediction, str) else prediction
        if isinstance(self.prediction, VPrediction):
            raise ValueError("v_prediction needs alpha^2 + sigma^2 = 1: use flow_prediction, epsilon or sample")

    def alpha(self, t: Tensor) -> Tensor:
        """``1 - t / T``."""
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        """``t / T``."""
        return t / self.num_timesteps

    def timestep_at(self, noise_to_signal: Tensor) -> Tensor:
        """``T c / (1 + c)`` for c = sigma/alpha; T where c is infinite."""
        return self.num_timesteps / (1 + 1 / noise_to_signal)

    def first_timesteps(self, noise_level: Tensor) -> Tensor:
        """:meth:`timestep_at` of each image's own noise; float64."""
        return self.timestep_at(check_noise_level(noise_level))

    def draw_timesteps(self, count: int, generator: Generators = None, first: Tensor | None = None) -> Tensor:
        """``count`` timesteps, uniform on (``first``, T]; float32."""
        left = 1 - draw_fractions(count, generator)  # in (0, 1]: there is always some noise
        start = torch.zeros_like(left) if first is None else to_device(first, left.device).double()
        return (start + left * (self.num_timesteps - start)).float()
