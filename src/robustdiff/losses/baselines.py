"""The losses that :class:`EquivarianceLoss` is compared with; called as it is, see ``denoising.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustdiff.losses.ambient import NoisyBatch
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import EquivarianceLoss, checked
from robustdiff.losses.perturbation import AdversarialPerturbation
from robustdiff.utils.random import Generators, draw_normal
from robustdiff.utils.tensors import expand_to, to_device

FunctionOfSigma = Callable[[Tensor], Tensor]
"""Maps noise levels sigma/alpha, shape (B,), to values, shape (B,)."""


@dataclass(frozen=True)
class InvarianceLoss(EquivarianceLoss):
    """The wrong one, for contrast: ``||eps_hat(x_t') - eps_hat(x_t)||^2``, classifier-style adversarial training.

    The noise prediction is asked not to notice added noise. In a variance-exploding sampler the generated variance
    then grows with the largest noise level without bound. Takes the settings of :class:`EquivarianceLoss`.

    Source: the contrast row of Briglia et al. (2025); the form is Zhang et al.'s (2019, TRADES) for regression.
    """

    def __post_init__(self) -> None:
        """Refuse what has no meaning here."""
        super().__post_init__()
        other = isinstance(self.perturbation, AdversarialPerturbation) and self.perturbation.inner != "shift"
        if self.target != "output" or other:
            raise ValueError(
                "InvarianceLoss penalises the shift of the model's own output: target='output', inner='shift'"
            )

    def _penalised(self, noised: NoisyBatch, output: Tensor, perturbed: Tensor, omega: Tensor, t: Tensor) -> Tensor:
        return self.schedule.eps_shift(self._shift(output, perturbed), omega, t)


@dataclass(frozen=True)
class InputPerturbationLoss(DenoisingLoss):
    """Input perturbation: the state is built with ``eps + gamma xi``, xi ~ N(0, I), the target keeps ``eps``.

    Args:
        schedule: The noise schedule.
        gamma: Extra noise relative to eps, >= 0 (0.1 in the source).

    Source: Ning et al. (2023), "Input Perturbation Reduces Exposure Bias in Diffusion Models", Algorithm 1.
    """

    gamma: float = 0.1

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.gamma >= 0:
            raise ValueError(f"InputPerturbationLoss needs gamma >= 0, got {self.gamma}")

    def _noise(
        self, x0: Tensor, generator: Generators, t: Tensor | None, eps: Tensor | None, noise_level: Tensor | None
    ) -> NoisyBatch:
        noised = super()._noise(x0, generator, t, eps, noise_level)
        xi = draw_normal(x0, generator)
        return replace(noised, x_t=self.schedule.add_noise(x0, noised.eps + self.gamma * xi, noised.t))


@dataclass(frozen=True)
class PseudoHuberLoss(DenoisingLoss):
    """Pseudo-Huber denoising loss ``2 c (sqrt(e^2 + c^2) - c)`` per element, with a width c set by the noise level.

    Close to ``e^2`` for errors below c and to ``2 c |e|`` above, so that outliers pull less. It does not take
    ``noise_level``: what a noisy image tells of the clean one is a mean, and this loss has its least value elsewhere.

    Args:
        schedule: The noise schedule.
        width: c > 0, finite: a number, or a function of sigma/alpha, shape (B,) -> (B,).
            Default: falls from 1 (no noise) to ``0.1`` (all noise) as ``0.1 + 0.9 / (1 + sigma/alpha)^2``.

    Differences from the source: its width falls exponentially in the step index and so changes meaning with the noise
    schedule; ours is a function of the noise-to-signal ratio.

    Source: Khrapov et al. (2024), arXiv 2403.16728.
    """

    width: float | FunctionOfSigma | None = None
    takes_noise_level: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check a constant width."""
        if self.width is not None and not callable(self.width) and not 0 < self.width < float("inf"):
            raise ValueError(f"PseudoHuberLoss needs a finite width > 0, got {self.width}")

    def _denoising(self, noised: NoisyBatch, output: Tensor) -> Tensor:
        level = self.schedule.noise_to_signal(noised.t)
        if self.width is None:
            width = 0.1 + 0.9 / (1 + level).square()
        else:
            width = self.width(level) if callable(self.width) else torch.full_like(level, self.width)
            width = checked("width", width, noised.t)
            if not bool((width > 0).all()):
                raise ValueError("the width function returned a value that is 0")
        error = output - noised.target
        width = expand_to(to_device(width, error.device).to(error.dtype), error)
        return noised.mean(2 * width * error.square() / (torch.sqrt(error.square() + width.square()) + width))
