"""Perturbations of the noise: how large (``Radius``), and in which direction (none, random, adversarial).

A perturbation ``omega`` is in units of ``eps``: it moves the state by ``sigma(t) * omega`` and obeys
``|omega|_inf <= r(t)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from robustdiff.utils.errors import check_choice
from robustdiff.utils.random import Generators, draw_uniform
from robustdiff.utils.tensors import expand_to


@dataclass(frozen=True)
class Radius:
    """``r = scale * u * sigma(t)^exponent + floor``, with u ~ Uniform[0, 1] per image, or 1.

    It bounds omega, which is in units of eps, or the move of the state x_t itself, ``sigma(t) omega``::

        |omega| <= r                 units = "noise"
        |omega| <= r / sigma(t)      units = "state"

    The paper states the ingredients (a power of the noise scale, a random factor, a "minimum bias" of 8/255), not the
    formula; its readings are :data:`robustdiff.losses.PRESETS` (docs/explanation/method.md).

    Args:
        exponent: Power of the noise scale sigma(t), >= 0; 0 makes r the same at every noise level.
        scale: Factor, in the units chosen, >= 0.
        floor: Least r, in the units chosen, >= 0, so that the constraint does not vanish as t -> 0.
        random: Draw the factor u per image (True) or use 1.
        units: ``"noise"`` or ``"state"``, as above.

    Raises:
        ValueError: If a number is negative or not finite, or the units are unknown.

    Source: Briglia et al. (2025), arXiv 2505.21742.
    """

    exponent: float = 2.0
    scale: float = 1.0
    floor: float = 8 / 255
    random: bool = True
    units: Literal["noise", "state"] = "noise"

    def __post_init__(self) -> None:
        """Refuse radii that could become negative."""
        if not all(0 <= number < float("inf") for number in (self.scale, self.floor, self.exponent)):
            raise ValueError(
                f"Radius needs finite scale, floor and exponent >= 0, got scale={self.scale}, floor={self.floor}, "
                f"exponent={self.exponent}"
            )
        check_choice("units", self.units, ("noise", "state"))

    def __call__(self, sigma: Tensor, generator: Generators = None) -> Tensor:
        """The bound on omega per image, shape (B,), for noise scales ``sigma``, shape (B,)."""
        return self.at(sigma, draw_uniform(sigma, generator) if self.random else torch.ones_like(sigma))

    def at(self, sigma: Tensor, factor: Tensor) -> Tensor:
        """The bound on omega for given factors u; ``sigma`` and ``factor`` broadcast."""
        radius = self.scale * factor * sigma**self.exponent + self.floor
        return radius / sigma if self.units == "state" else radius

    def mean(self, function: Callable[[Tensor], Tensor], sigma: Tensor) -> Tensor:
        """The mean of ``function(radius)`` over the factors u, of the shape of ``sigma``; exact up to cubic functions.

        By the two nodes of Gauss and Legendre.
        """
        if not self.random:
            return function(self.at(sigma, torch.ones_like(sigma)))
        nodes = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)
        low, high = (function(self.at(sigma, torch.full_like(sigma, u))) for u in nodes)
        return (low + high) / 2


class Response(NamedTuple):
    """What the network does when its input moves by ``sigma * omega``; both of shape (B, ...)."""

    shift: Tensor
    """``eps_hat(x') - eps_hat(x)``."""
    residual: Tensor
    """The equivariance residual (``Prediction.equivariance_residual``)."""


Respond = Callable[[Tensor], Response]


class Perturbation(Protocol):
    """Anything that chooses ``omega``; bring your own.

    It may say ``mean_square``, the mean of ``omega^2`` in units of the squared radius; 1 if it does not.
    """

    def __call__(self, respond: Respond, radius: Tensor, like: Tensor, generator: Generators = None) -> Tensor:
        """Return ``omega``, of the shape of ``like`` (B, ...), with ``|omega|_inf <= radius``, shape (B,).

        Args:
            respond: Maps a trial ``omega`` to the network's :class:`Response`; each call is one forward pass.
            radius: Bound per image, in units of eps.
            like: A tensor of the wanted shape, device and dtype.
            generator: Source of randomness.
        """
        ...


@dataclass(frozen=True)
class RandomPerturbation:
    """Noise that ignores the network, akin to randomised smoothing.

    Args:
        distribution: ``"uniform"`` on [-r, r] (the paper's; E omega^2 = r^2/3), or ``"signs"``: +-r (E omega^2 = r^2).
    """

    distribution: Literal["uniform", "signs"] = "uniform"

    def __post_init__(self) -> None:
        """Check the name."""
        check_choice("distribution", self.distribution, ("uniform", "signs"))

    @property
    def mean_square(self) -> float:
        """Mean of ``omega^2`` in units of the squared radius."""
        return 1 / 3 if self.distribution == "uniform" else 1.0

    def __call__(self, respond: Respond, radius: Tensor, like: Tensor, generator: Generators = None) -> Tensor:
        """Draw ``omega``; ``respond`` is not called."""
        centred = 2 * draw_uniform(like, generator) - 1
        if self.distribution == "signs":
            centred = torch.where(centred < 0, -torch.ones_like(centred), torch.ones_like(centred))
        return centred * expand_to(radius, like)


@dataclass(frozen=True)
class AdversarialPerturbation:
    """Projected sign-gradient ascent in the box, from a random start in it.

    The start must be random: at omega = 0 the gradient of both is exactly 0.

    Args:
        steps: Number of ascent steps k >= 1; each costs a forward pass and an input gradient.
        inner: What is ascended: ``"shift"`` ``||eps_hat(x') - eps_hat(x)||^2`` (the paper's), or ``"residual"``, the
            penalised quantity itself. They pull in different directions where SNR * Cov(x0 | x_t) has its eigenvalues
            in [0, 1], that is, almost everywhere but between modes.
        step_size: Step in units of the radius, > 0. Default: 1 for one step, ``2.5 / steps`` for more.

    Raises:
        ValueError: If ``steps`` < 1 or ``step_size`` <= 0.

    Nearly all elements of omega end at the rim of the box: its mean square is about r^2.

    Source: Briglia et al. (2025); one step: Goodfellow et al. (2015), k steps: Madry et al. (2018).
    """

    mean_square: ClassVar[float] = 1.0
    steps: int = 1
    inner: Literal["shift", "residual"] = "shift"
    step_size: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.steps < 1:
            raise ValueError(f"AdversarialPerturbation needs steps >= 1, got {self.steps}")
        check_choice("inner", self.inner, ("shift", "residual"))
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"AdversarialPerturbation needs step_size > 0, got {self.step_size}")

    def __call__(self, respond: Respond, radius: Tensor, like: Tensor, generator: Generators = None) -> Tensor:
        """Ascend; only the gradient with respect to ``omega`` is computed, none of the weights'."""
        bound = expand_to(radius, like)
        size = self.step_size if self.step_size is not None else (1.0 if self.steps == 1 else 2.5 / self.steps)
        omega = (2 * draw_uniform(like, generator) - 1) * bound
        for _ in range(self.steps):
            with torch.enable_grad():
                omega = omega.detach().requires_grad_()
                value = getattr(respond(omega), self.inner).square().sum()
                (gradient,) = torch.autograd.grad(value, omega)
            omega = torch.clamp(omega.detach() + size * bound * gradient.sign(), -bound, bound)
        return omega.detach()


def named_perturbation(name: str) -> Perturbation | None:
    """``"none"`` (None), ``"random"`` or ``"adversarial"`` with their default settings.

    Raises:
        ValueError: For any other name.
    """
    named = {"none": None, "random": RandomPerturbation(), "adversarial": AdversarialPerturbation()}
    check_choice("perturbation", name, named)
    return named[name]
