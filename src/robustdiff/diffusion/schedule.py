"""The forward noise schedule: signal and noise scales, adding noise, and converting predictions.

Notation (used in the whole package): ``x_t = alpha(t) * x0 + sigma(t) * eps`` with
``alpha = sqrt(alpha_bar)`` and ``sigma = sqrt(1 - alpha_bar)``, diffusers' DDPM convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robustdiff.utils.random import Generators, check_generators, draw_uniform
from robustdiff.utils.tensors import expand_to, to_device

Prediction = Literal["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete variance-preserving process and what the network predicts in it.

    Args:
        alphas_cumprod: ``alpha_bar``, shape (T,), each in [0, 1); 0 is allowed (zero terminal SNR).
        prediction_type: What the network returns: the noise (``"epsilon"``), the clean image (``"sample"``), or
            ``v = alpha * eps - sigma * x0`` (``"v_prediction"``; Salimans and Ho 2022).

    Raises:
        ValueError: If the table is not one-dimensional and in [0, 1), or the prediction type is unknown.

    Source: Ho et al. (2020), Eq. 4; diffusers' ``DDPMScheduler`` for the tables.
    """

    alphas_cumprod: Tensor
    prediction_type: Prediction = "epsilon"
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the table once, so that no later formula divides by a zero sigma."""
        table = self.alphas_cumprod
        if table.ndim != 1 or not len(table) or not bool(((table >= 0) & (table < 1)).all()):
            raise ValueError("alphas_cumprod must have shape (T,) and values in [0, 1): every step needs some noise")
        if self.prediction_type not in get_args(Prediction):
            raise ValueError(
                f"prediction_type {self.prediction_type!r} is not one of {', '.join(get_args(Prediction))}"
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:  # noqa: ANN401 - any scheduler, diffusers is not imported here
        """The process of a diffusers scheduler of the DDPM family (DDPM, DDIM, DPM-Solver, Euler, UniPC ...).

        Args:
            scheduler: An object with ``alphas_cumprod``, shape (T,), and ``config.prediction_type``.

        Raises:
            TypeError: If the scheduler has no ``alphas_cumprod`` (flow matching, EDM).
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise TypeError(
                f"{type(scheduler).__name__} has no alphas_cumprod table; use one of the DDPM type (DDPMScheduler, ...)"
            )
        return cls(table.detach().cpu(), getattr(scheduler.config, "prediction_type", "epsilon"))

    # -- scales ------------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """T, the number of noise levels; timesteps are the integers 0 .. T-1, noisier upwards."""
        return self.alphas_cumprod.shape[0]

    def _alpha_bar(self, t: Tensor) -> Tensor:
        table = self._tables.get(t.device)
        if table is None:
            table = self._tables.setdefault(t.device, to_device(self.alphas_cumprod, t.device))
        return table[t]

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale ``a_t = sqrt(alpha_bar_t)`` in [0, 1], of the shape of ``t`` (integers in [0, T))."""
        return self._alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale ``s_t = sqrt(1 - alpha_bar_t)`` in (0, 1], of the shape of ``t``."""
        return (1 - self._alpha_bar(t)).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ``a_t^2 / s_t^2``; 0 at a zero-terminal-SNR step."""
        return self._alpha_bar(t) / (1 - self._alpha_bar(t))

    def noise_to_signal(self, t: Tensor) -> Tensor:
        """``s_t / a_t``: the noise level in units of the data, the axis of gates; infinite at zero terminal SNR."""
        return self.sigma(t) / self.alpha(t)

    def timestep_at(self, noise_to_signal: Tensor) -> Tensor:
        """The timestep whose ``sigma/alpha`` is nearest in logarithm, clamped to the table. Shape as given, int64."""
        levels = self.noise_to_signal(torch.arange(self.num_timesteps, device=noise_to_signal.device))
        levels = levels.double().log()
        wanted = noise_to_signal.double().log().clamp(levels[0].item(), levels[torch.isfinite(levels)][-1].item())
        above = torch.searchsorted(levels, wanted.contiguous()).clamp(1, self.num_timesteps - 1)
        below_is_nearer = (wanted - levels[above - 1]) <= (levels[above] - wanted)
        return torch.where(below_is_nearer, above - 1, above).clamp(min=0)

    def _scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) shaped to broadcast against x; in x's dtype, and at least float32 before the square root."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        alpha_bar = to_device(self._alpha_bar(t), x.device).to(dtype)
        alpha_bar = expand_to(alpha_bar.reshape(-1), x)
        return alpha_bar.sqrt().to(x.dtype), (1 - alpha_bar).sqrt().to(x.dtype)

    def draw_timesteps(self, count: int, generator: Generators = None, first: Tensor | None = None) -> Tensor:
        """``count`` timesteps, uniform on ``first`` .. T-1, int64, on the generator's device (CPU if none).

        Args:
            count: B.
            generator: Source of randomness; one number is drawn per timestep, whatever ``first`` is.
            first: Least timestep of each, int64, shape (B,), below T. Default: 0.

        Returns:
            Shape (B,).
        """
        check_generators(generator, count)
        one = (generator[0] if generator else None) if isinstance(generator, Sequence) else generator
        device = torch.device("cpu") if one is None else one.device
        u = draw_uniform(torch.empty(count, dtype=torch.float64, device=device), generator)
        if first is None:
            return (u * self.num_timesteps).long().clamp_(max=self.num_timesteps - 1)
        first = to_device(first, device)
        left = self.num_timesteps - first
        return first + (u * left).long().minimum(left - 1)

    # -- states and targets ------------------------------------------------------------------------

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``x_t = a x0 + s eps``. ``x0``, ``eps``: (B, ...); ``t``: (B,) or (). Equals diffusers' ``add_noise``."""
        alpha, sigma = self._scales(t, x0)
        return alpha * x0 + sigma * eps

    def perturb(self, x_t: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        """``x_t' = x_t + s omega``: the state of the same image under the noise ``eps + omega``."""
        return x_t + self._scales(t, x_t)[1] * omega

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should return: ``eps``, ``x0`` or ``v = a eps - s x0``. Shapes as in ``add_noise``."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self._scales(t, x0)
        return alpha * eps - sigma * x0

    # -- predictions -------------------------------------------------------------------------------

    def x0_hat(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean image that a network output stands for. With epsilon-prediction it is undefined where a_t = 0."""
        if self.prediction_type == "sample":
            return output
        alpha, sigma = self._scales(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def eps_hat(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a network output stands for."""
        if self.prediction_type == "epsilon":
            return output
        alpha, sigma = self._scales(t, x_t)
        if self.prediction_type == "sample":
            return (x_t - alpha * output) / sigma
        return alpha * output + sigma * x_t

    def output_from_x0(self, x0_hat: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network output that stands for the clean image ``x0_hat``; the inverse of :meth:`x0_hat`."""
        if self.prediction_type == "sample":
            return x0_hat
        alpha, sigma = self._scales(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - alpha * x0_hat) / sigma
        return (alpha * x_t - x0_hat) / sigma

    # -- equivariance ------------------------------------------------------------------------------

    def x0_weight(self, t: Tensor) -> Tensor:
        """How much a squared error of x0_hat weighs in the plain loss: SNR (epsilon), 1 (sample), SNR + 1 (v)."""
        if self.prediction_type == "epsilon":
            return self.snr(t)
        return torch.ones_like(self._alpha_bar(t)) if self.prediction_type == "sample" else self.snr(t) + 1

    def equivariance_residual(self, output_shift: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        """How far the network is from following its input, in the units of its own prediction.

        Moving the state by ``s * omega`` should leave the denoised image where it was. With ``D = x0_hat`` and
        ``output_shift = output(x_t + s omega) - output(x_t)`` the residual is::

            epsilon       output_shift - omega        = -(a/s) (D' - D)
            sample        output_shift                =        (D' - D)
            v_prediction  output_shift - a * omega    = -(1/s) (D' - D)

        so its square is ``x0_weight(t) * |D' - D|^2``: one regulariser on the denoised image, weighted as the plain
        loss weights that image's error. Written this way nothing is divided by a_t, and zero terminal SNR is harmless.

        Args:
            output_shift: Change of the network's output, shape (B, ...).
            omega: Perturbation in units of eps, shape (B, ...).
            t: Timesteps, shape (B,).
        """
        if self.prediction_type == "epsilon":
            return output_shift - omega
        if self.prediction_type == "sample":
            return output_shift
        return output_shift - self._scales(t, omega)[0] * omega

    def eps_shift(self, output_shift: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        """``eps_hat(x_t + s omega) - eps_hat(x_t)`` from the change of the output. Shapes as in the residual."""
        if self.prediction_type == "epsilon":
            return output_shift
        alpha, sigma = self._scales(t, omega)
        if self.prediction_type == "sample":
            return omega - (alpha / sigma) * output_shift
        return alpha * output_shift + sigma.square() * omega
