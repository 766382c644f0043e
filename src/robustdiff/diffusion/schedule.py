"""Noise schedules: how much signal and how much noise a state holds at each timestep.

Notation (used in the whole package): ``x_t = alpha(t) * x0 + sigma(t) * eps``; the noise level a person sees is
``sigma / alpha``, in units of the data.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from robustdiff.diffusion.prediction import FlowPrediction, Prediction
from robustdiff.utils.random import Generators, check_generators, draw_uniform
from robustdiff.utils.tensors import expand_to, to_device


class Schedule(Protocol):
    """What losses and samplers ask of a schedule; a new one inherits from this and fills in the first methods.

    Timesteps ``t`` have shape (B,), or () for all images alike, and grow with the noise; they are integers or real
    numbers, as the schedule says. Images, states, noise and outputs have shape (B, ...).
    """

    prediction: Prediction
    """What the network returns."""
    num_timesteps: int
    """T, in whose units the network is told the time."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale ``a_t`` in [0, 1], of the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale ``s_t`` in (0, 1], of the shape of ``t``."""

    @abstractmethod
    def timestep_at(self, noise_to_signal: Tensor) -> Tensor:
        """The timestep of a noise level sigma/alpha, the nearest if there are only some. Shape as given."""

    @abstractmethod
    def first_timesteps(self, noise_level: Tensor) -> Tensor:
        """The least timestep whose sigma/alpha is not below that of each image, and above where timesteps are integers.

        Args:
            noise_level: sigma_n, standard deviation of the noise in each image, >= 0, in units of the data, shape (B,).

        Returns:
            Shape (B,), where ``noise_level`` lies; 0 for a clean image.

        Raises:
            ValueError: If a level is negative, not finite, or leaves no timestep.
        """

    @abstractmethod
    def draw_timesteps(self, count: int, generator: Generators = None, first: Tensor | None = None) -> Tensor:
        """``count`` timesteps, uniform from ``first`` on, on the generator's device (CPU if none).

        Args:
            count: B.
            generator: Source of randomness; one number is drawn per timestep, whatever ``first`` is.
            first: Least timestep of each, shape (B,). Default: the least there is.

        Returns:
            Shape (B,).
        """

    def noise_to_signal(self, t: Tensor) -> Tensor:
        """``s_t / a_t``: the noise level in units of the data; infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ``a_t^2 / s_t^2``; 0 where alpha is 0."""
        return (self.alpha(t) / self.sigma(t)).square()

    def scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) in the dtype and on the device of ``x``, shaped to broadcast against it."""
        alpha, sigma = (to_device(scale.reshape(-1), x.device).to(x.dtype) for scale in (self.alpha(t), self.sigma(t)))
        return expand_to(alpha, x), expand_to(sigma, x)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t = a x0 + s eps``. Equals diffusers' ``add_noise``."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0 + sigma * eps

    def perturb(self, x_t: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        """``x_t' = x_t + s omega``: the state of the same image under the noise ``eps + omega``."""
        return x_t + self.scales(t, x_t)[1] * omega

    # What follows asks the prediction; see :class:`~robustdiff.diffusion.prediction.Prediction`.

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should return."""
        return self.prediction.target(x0, eps, *self.scales(t, x0))

    def x0_hat(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean image that a network output stands for; of epsilon-prediction undefined where alpha is 0."""
        return self.prediction.x0_hat(output, x_t, *self.scales(t, x_t))

    def eps_hat(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a network output stands for."""
        return self.prediction.eps_hat(output, x_t, *self.scales(t, x_t))

    def output_from_x0(self, x0_hat: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network output that stands for the clean image ``x0_hat``."""
        return self.prediction.output_from_x0(x0_hat, x_t, *self.scales(t, x_t))

    def x0_weight(self, t: Tensor) -> Tensor:
        """How much a squared error of x0_hat weighs in the denoising loss, of the shape of ``t``."""
        return self.prediction.x0_weight(self.alpha(t), self.sigma(t), self.snr(t))

    def equivariance_residual(self, output_shift: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        """How far the network is from following its input, which moved by ``s omega``, in units of its prediction."""
        return self.prediction.equivariance_residual(output_shift, omega, *self.scales(t, omega))

    def eps_shift(self, output_shift: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        """``eps_hat(x_t + s omega) - eps_hat(x_t)`` from the change of the output."""
        return self.prediction.eps_shift(output_shift, omega, *self.scales(t, omega))


class NoiseSchedule(Schedule):
    """A discrete variance-preserving schedule: ``alpha = sqrt(alpha_bar)``, ``sigma = sqrt(1 - alpha_bar)``.

    Args:
        alphas_cumprod: ``alpha_bar``, shape (T,), each in [0, 1); 0 is allowed (zero terminal SNR). Timesteps are its
            places, the integers 0 .. T-1.
        prediction: What the network returns: a :class:`Prediction`, or diffusers' name of one (``"epsilon"``,
            ``"sample"``, ``"v_prediction"``).

    Raises:
        ValueError: If the table is not one-dimensional and in [0, 1), or no prediction has that name.

    Source: Ho et al. (2020), Eq. 4; diffusers' ``DDPMScheduler`` for the tables.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction | str = "epsilon") -> None:
        """Check the table once, so that no later formula divides by a zero sigma."""
        table = alphas_cumprod
        if table.ndim != 1 or not len(table) or not bool(((table >= 0) & (table < 1)).all()):
            raise ValueError("alphas_cumprod must have shape (T,) and values in [0, 1): every step needs some noise")
        self.alphas_cumprod = table
        self.num_timesteps = len(table)
        self.prediction = Prediction.named(prediction) if isinstance(prediction, str) else prediction
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:  # noqa: ANN401 - any scheduler, diffusers is not imported here
        """The schedule of a diffusers scheduler of the DDPM family (DDPM, DDIM, DPM-Solver, Euler, UniPC ...).

        Args:
            scheduler: An object with ``alphas_cumprod``, shape (T,), and ``config.prediction_type``.

        Raises:
            TypeError: If the scheduler has no ``alphas_cumprod`` (flow matching, EDM), or does not go by it.
            ValueError: If its prediction is unknown.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise TypeError(
                f"{type(scheduler).__name__} has no alphas_cumprod table; use one of the DDPM type (DDPMScheduler, ...)"
            )
        prediction = Prediction.named(getattr(scheduler.config, "prediction_type", "epsilon"))
        if isinstance(prediction, FlowPrediction):
            raise TypeError(f"{type(scheduler).__name__} does flow matching and leaves its alphas_cumprod unused")
        return cls(table.detach().cpu(), prediction)

    def _alpha_bar(self, t: Tensor) -> Tensor:
        table = self._tables.get(t.device)
        if table is None:
            table = self._tables.setdefault(t.device, to_device(self.alphas_cumprod, t.device))
        return table[t]

    def alpha(self, t: Tensor) -> Tensor:
        """``sqrt(alpha_bar_t)``."""
        return self._alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """``sqrt(1 - alpha_bar_t)``."""
        return (1 - self._alpha_bar(t)).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """``alpha_bar_t / (1 - alpha_bar_t)``."""
        return self._alpha_bar(t) / (1 - self._alpha_bar(t))

    def scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) in x's dtype, and at least float32 before the square root."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        alpha_bar = to_device(self._alpha_bar(t), x.device).to(dtype)
        alpha_bar = expand_to(alpha_bar.reshape(-1), x)
        return alpha_bar.sqrt().to(x.dtype), (1 - alpha_bar).sqrt().to(x.dtype)

    def timestep_at(self, noise_to_signal: Tensor) -> Tensor:
        """The timestep whose ``sigma/alpha`` is nearest in logarithm, clamped to the finite ones. int64."""
        levels = self.noise_to_signal(torch.arange(self.num_timesteps, device=noise_to_signal.device))
        levels = levels.double().log()
        wanted = noise_to_signal.double().log().clamp(levels[0].item(), levels[torch.isfinite(levels)][-1].item())
        above = torch.searchsorted(levels, wanted.contiguous()).clamp(1, self.num_timesteps - 1)
        below_is_nearer = (wanted - levels[above - 1]) <= (levels[above] - wanted)
        return torch.where(below_is_nearer, above - 1, above).clamp(min=0)

    def first_timesteps(self, noise_level: Tensor) -> Tensor:
        """The least timestep whose ``sigma/alpha`` is above that of each image. int64.

        Raises:
            ValueError: If a level is negative, not finite, or not below the largest; or if the table is not sorted.
        """
        table = self.noise_to_signal(torch.arange(self.num_timesteps, device=noise_level.device)).double()
        if not bool((table.diff().nan_to_num(0.0) >= 0).all()):  # inf - inf is no fall
            raise ValueError("noise_level needs a schedule whose noise grows with t: sort alphas_cumprod downwards")
        level = check_noise_level(noise_level)
        first = torch.searchsorted(table, level.contiguous(), right=True)
        if bool((first == self.num_timesteps).any()):
            raise ValueError(
                f"noise_level {level.max().item():.4g} is not below {table[-1].item():.4g}, the largest noise level "
                "sigma/alpha of the schedule: no timestep is left for such an image"
            )
        return first

    def draw_timesteps(self, count: int, generator: Generators = None, first: Tensor | None = None) -> Tensor:
        """``count`` timesteps, uniform on the integers ``first`` .. T-1. int64."""
        u = draw_fractions(count, generator)
        if first is None:
            return (u * self.num_timesteps).long().clamp_(max=self.num_timesteps - 1)
        first = to_device(first, u.device)
        left = self.num_timesteps - first
        return first + (u * left).long().minimum(left - 1)


def check_noise_level(noise_level: Tensor) -> Tensor:
    """The noise levels of images in double precision.

    Raises:
        ValueError: If one is negative or not finite.
    """
    level = noise_level.double()
    bad = level[~(level.isfinite() & (level >= 0))]
    if len(bad):
        raise ValueError(f"noise_level must be finite and 0 or more, got {bad[0].item():g}")
    return level


def draw_fractions(count: int, generator: Generators) -> Tensor:
    """``count`` numbers, uniform on [0, 1), float64, on the generator's device (CPU if none)."""
    check_generators(generator, count)
    one = (generator[0] if generator else None) if isinstance(generator, Sequence) else generator
    device = torch.device("cpu") if one is None else one.device
    return draw_uniform(torch.empty(count, dtype=torch.float64, device=device), generator)
