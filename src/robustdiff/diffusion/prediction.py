"""What a network predicts: a linear target ``y = p x0 + q eps`` of the clean image and the noise in its state.

With ``x_t = a x0 + s eps`` and ``D = a q - s p`` all else follows from p, q, a and s::

    x0_hat  = (q x_t - s y) / D
    eps_hat = (a y - p x_t) / D
    y(x_t + s omega) - y(x_t) - q omega = -(D / s) (x0_hat(x_t + s omega) - x0_hat(x_t))

The classes below write a formula out only where the derived one would divide by a zero alpha (zero terminal SNR), round
differently, or take a gradient through a term that is 0. Another prediction is one more subclass, anywhere: see
``tests/extending/test_a_prediction.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustdiff.utils.errors import check_choice

Scale = Tensor | float


class Prediction(ABC):
    """What a network returns for a state; subclass it and say :meth:`coefficients`.

    Everywhere ``alpha`` and ``sigma`` are the signal and noise scales of the states, broadcast against images (B, ...).
    """

    name: ClassVar[str]
    """What diffusers' schedulers call it (``config.prediction_type``)."""
    _named: ClassVar[dict[str, type[Prediction]]] = {}

    def __init_subclass__(cls, name: str, **kwargs: Any) -> None:  # noqa: ANN401 - of other bases
        """Let :meth:`named` find the class: ``class Mine(Prediction, name="mine")``.

        Raises:
            ValueError: If another class has that name.
        """
        super().__init_subclass__(**kwargs)
        known = Prediction._named.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the prediction name {name!r} is taken by {known.__qualname__}: choose another")
        cls.name, Prediction._named[name] = name, cls  # a cell that is run again takes its own place

    @staticmethod
    def named(name: str) -> Prediction:
        """The prediction that diffusers calls ``name``.

        Raises:
            ValueError: If there is none.
        """
        check_choice("prediction_type", name, Prediction._named)
        return Prediction._named[name]()

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Scale, Scale]:
        """P and q of the target ``p x0 + q eps``."""

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Scale:
        """``D = a q - s p``: how state and output together determine image and noise; 0 where they do not."""
        p, q = self.coefficients(alpha, sigma)
        return alpha * q - sigma * p

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should return."""
        p, q = self.coefficients(alpha, sigma)
        return p * x0 + q * eps

    def x0_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean image that an output stands for."""
        _, q = self.coefficients(alpha, sigma)
        return (q * x_t - sigma * output) / self.determinant(alpha, sigma)

    def eps_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise that an output stands for."""
        p, _ = self.coefficients(alpha, sigma)
        return (alpha * output - p * x_t) / self.determinant(alpha, sigma)

    def output_from_x0(self, x0_hat: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output that stands for the clean image ``x0_hat``; the inverse of :meth:`x0_hat`."""
        _, q = self.coefficients(alpha, sigma)
        return (q * x_t - self.determinant(alpha, sigma) * x0_hat) / sigma

    def x0_weight(self, alpha: Tensor, sigma: Tensor, snr: Tensor) -> Tensor:
        """``(D / s)^2``: how much a squared error of x0_hat weighs in the denoising loss; ``snr`` is ``(a / s)^2``."""
        return torch.square(self.determinant(alpha, sigma) / sigma)

    def equivariance_residual(self, output_shift: Tensor, omega: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``output(x_t + s omega) - output(x_t) - q omega``, what is left of the first difference, ``output_shift``.

        Its square is ``x0_weight * |x0_hat(x_t + s omega) - x0_hat(x_t)|^2``: one regulariser on the denoised image,
        weighted as the denoising loss weights that image's error, and nothing is divided by alpha.
        """
        _, q = self.coefficients(alpha, sigma)
        return output_shift - q * omega

    def eps_shift(self, output_shift: Tensor, omega: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``eps_hat(x_t + s omega) - eps_hat(x_t)`` from the change of the output."""
        p, _ = self.coefficients(alpha, sigma)
        return (alpha * output_shift - (p * sigma) * omega) / self.determinant(alpha, sigma)


@dataclass(frozen=True)
class EpsilonPrediction(Prediction, name="epsilon"):
    """The noise. It says nothing of the image where alpha = 0."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Scale, Scale]:
        """P = 0, q = 1; D = a."""
        return 0.0, 1.0

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise itself: no gradient for the image."""
        return eps

    def eps_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output itself, also where alpha = 0."""
        return output

    def x0_weight(self, alpha: Tensor, sigma: Tensor, snr: Tensor) -> Tensor:
        """The signal-to-noise ratio."""
        return snr

    def eps_shift(self, output_shift: Tensor, omega: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The shift itself, also where alpha = 0."""
        return output_shift


@dataclass(frozen=True)
class SamplePrediction(Prediction, name="sample"):
    """The clean image."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Scale, Scale]:
        """P = 1, q = 0; D = -s."""
        return 1.0, 0.0

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The image itself."""
        return x0

    def x0_hat(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output itself, unrounded."""
        return output

    def output_from_x0(self, x0_hat: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The image itself, unrounded."""
        return x0_hat

    def equivariance_residual(self, output_shift: Tensor, omega: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The shift itself: no gradient for omega."""
        return output_shift

    def eps_shift(self, output_shift: Tensor, omega: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Exactly omega where the image does not move."""
        return omega - (alpha / sigma) * output_shift


@dataclass(frozen=True)
class VPrediction(Prediction, name="v_prediction"):
    """``v = a eps - s x0``, where a^2 + s^2 = 1 (Salimans and Ho 2022)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Scale, Scale]:
        """P = -s, q = a."""
        return -sigma, alpha

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Scale:
        """Exactly 1."""
        return 1.0

    def x0_weight(self, alpha: Tensor, sigma: Tensor, snr: Tensor) -> Tensor:
        """SNR + 1 = 1 / s^2."""
        return snr + 1


@dataclass(frozen=True)
class FlowPrediction(Prediction, name="flow_prediction"):
    """The velocity ``eps - x0`` of flow matching (Lipman et al. 2023), usually with a = 1 - s."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Scale, Scale]:
        """P = -1, q = 1; D = a + s."""
        return -1.0, 1.0
