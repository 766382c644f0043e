"""How strong the regulariser is: functions of the noise level and of the radius of the perturbation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Strength = Callable[[Tensor, Tensor], Tensor]
"""Maps noise levels sigma/alpha and bounds on omega, both of shape (B,), to strengths lambda, shape (B,)."""


@dataclass(frozen=True)
class SigmaRange:
    """A strength that is ``value`` where ``low <= sigma/alpha <= high`` and 0 elsewhere.

    Images drawn outside take no perturbed forward pass at all: where a share q is inside, a step costs ``1 + q`` plain
    ones with a random and ``1 + 1.67 q`` with an adversarial perturbation.

    Args:
        low: Lower noise level sigma/alpha, >= 0.
        high: Upper noise level, >= low; ``float("inf")`` for none.
        value: Strength inside, >= 0.

    Raises:
        ValueError: If the levels are not ordered or the value is negative.

    Source: docs/explanation/theory.md T6: below c = ``high`` the generated variance of a direction of variance v is
    ``v (v + c^2) / (v + (1 + m) c^2)``, m = lambda E[omega^2]: small directions shrink, large ones stay.
    """

    low: float
    high: float
    value: float

    def __post_init__(self) -> None:
        """Check the order."""
        if not 0 <= self.low <= self.high:
            raise ValueError(f"SigmaRange needs 0 <= low <= high, got low={self.low}, high={self.high}")
        if not 0 <= self.value < float("inf"):
            raise ValueError(f"SigmaRange needs a finite value >= 0, got {self.value}")

    def __call__(self, noise_to_signal: Tensor, radius: Tensor) -> Tensor:
        """The strength per image, shape (B,), whatever the radius."""
        inside = (noise_to_signal >= self.low) & (noise_to_signal <= self.high)
        return self.value * inside.to(noise_to_signal.dtype)


@dataclass(frozen=True)
class InverseRadius:
    """A strength over the standard deviation of a uniform perturbation: ``value sqrt(3) / (beta r)``.

    Args:
        value: Strength, >= 0, where that deviation, ``beta r / sqrt(3)``, is 1.
        beta: Factor of the radius, > 0; it is not public.

    Raises:
        ValueError: If a setting is out of range.

    Source: lambda_t as summaries of Briglia et al. (2025) print it.
    """

    value: float
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 <= self.value < float("inf") and 0 < self.beta < float("inf")):
            raise ValueError(f"InverseRadius needs value >= 0 and beta > 0, got value={self.value}, beta={self.beta}")

    def __call__(self, noise_to_signal: Tensor, radius: Tensor) -> Tensor:
        """The strength per image, shape (B,), at any noise level."""
        return self.value * 3**0.5 / (self.beta * radius)


def check_takes_two(what: str, function: Callable[..., Tensor], arguments: str) -> None:
    """Refuse a function of another kind before training starts.

    Args:
        what: ``"strength"`` or ``"radius"``.
        function: What a user gave.
        arguments: What it must take.

    Raises:
        ValueError: In one line that says what it must take.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(f"a {what} function takes {arguments}, of shape (B,): {error}") from None
