"""Where a perturbation must stay: balls of the maximum norm or the Euclidean norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustdiff.utils.random import Generators, draw_normal, draw_uniform

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, eq=False)
class LpBall:
    """``|omega_k|_p <= radius`` for every attacked step by itself.

    Args:
        norm: ``"linf"``: the largest element; ``"l2"``: the Euclidean length of the whole omega_k.
        radius: In units of the noise scale s_k, > 0; one for all steps, or of shape (K,).

    Raises:
        ValueError: If the norm is unknown or a radius is not above 0.
    """

    norm: Norm
    radius: float | Tensor

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm {self.norm!r} is not one of linf, l2")
        if not bool((torch.as_tensor(self.radius) > 0).all()):
            raise ValueError(f"a ball needs radius > 0, got {self.radius}")

    def bound(self, omega: Tensor) -> Tensor:
        """The radius shaped to broadcast against ``omega``, (B, K, ...)."""
        radius = torch.as_tensor(self.radius, dtype=omega.dtype, device=omega.device)
        return radius.reshape(1, -1, *(1,) * (omega.ndim - 2))

    def length(self, omega: Tensor) -> Tensor:
        """The norm of every omega_k, shape (B, K)."""
        flat = omega.flatten(2) if omega.ndim > 2 else omega.unsqueeze(-1)
        return flat.abs().amax(-1) if self.norm == "linf" else flat.norm(dim=-1)

    def project(self, omega: Tensor) -> Tensor:
        """The nearest point of the ball."""
        bound = self.bound(omega)
        if self.norm == "linf":
            return omega.clamp(-bound, bound)
        length = self.length(omega).reshape(*omega.shape[:2], *(1,) * (omega.ndim - 2))
        return omega * (bound / length.clamp(min=torch.finfo(omega.dtype).tiny)).clamp(max=1)

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest ascent of unit norm: signs, or the gradient divided by its length; 0 where it is 0."""
        if self.norm == "linf":
            return gradient.sign()
        length = self.length(gradient).reshape(*gradient.shape[:2], *(1,) * (gradient.ndim - 2))
        return gradient / length.clamp(min=torch.finfo(gradient.dtype).tiny)

    def draw(self, like: Tensor, generator: Generators = None, *, surface: bool = False) -> Tensor:
        """A random point: uniform in the ball, or on its surface with the largest energy it allows (signs, a sphere).

        Args:
            like: A tensor of the wanted shape (B, K, ...), device and dtype.
            generator: One, or one per image.
            surface: As told.
        """
        bound = self.bound(like)
        if self.norm == "linf":
            centred = 2 * draw_uniform(like, generator) - 1
            return bound * (torch.where(centred < 0, -1.0, 1.0).to(like.dtype) if surface else centred)
        normal = self.direction(draw_normal(like, generator))
        if surface:
            return bound * normal
        size = draw_uniform(like.flatten(2)[..., 0], generator) ** (1 / like[0, 0].numel())
        return bound * normal * size.reshape(*like.shape[:2], *(1,) * (like.ndim - 2))

    def excess(self, omega: Tensor) -> Tensor:
        """The largest norm divided by its radius, shape (): at most 1 in the ball."""
        radius = torch.as_tensor(self.radius, dtype=omega.dtype, device=omega.device)
        return (self.length(omega) / radius).max()
