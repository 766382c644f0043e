"""Objectives of a batch as a whole: all images together, away from the features of real ones.

Every image keeps its own ball; only what is made large is shared, so that each image gets the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustdiff.attacks.goals import FinalImageShift
from robustdiff.evaluation.distances import _kernel, _within

Distance = Literal["mean", "kernel"]


@dataclass(frozen=True, eq=False)
class FeatureDistance:
    """How far a batch of images is from real ones, by their features; in float64.

    Args:
        features: Differentiable, images (B, ...) in [-1, 1] -> (B, d).
        reference: Features of real images, (m, d), m >= 2.
        kind: ``"mean"``: ``|mean_batch - mean_reference|^2``; ``"kernel"``: the unbiased squared MMD of
            ``(x . y / d + 1)^3``, KID's, of all images at once; slightly below 0 where the laws agree.

    Raises:
        ValueError: If the kind is unknown or the reference too small.

    Source: Binkowski et al. (2018), section 4; Gretton et al. (2012), Eq. 3.
    """

    features: Callable[[Tensor], Tensor]
    reference: Tensor
    kind: Distance = "mean"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.kind not in get_args(Distance):
            raise ValueError(f"distance {self.kind!r} is not one of {', '.join(get_args(Distance))}")
        if self.reference.ndim != 2 or len(self.reference) < 2:
            raise ValueError(f"reference must have shape (m, d), m >= 2, got {tuple(self.reference.shape)}")

    @cached_property
    def _real(self) -> Tensor:
        """The reference, or its mean, in float64."""
        rows = self.reference.double()
        return rows if self.kind == "kernel" else rows.mean(0)

    @cached_property
    def _real_within(self) -> Tensor:
        return _within(self._real)

    def __call__(self, rows: Tensor) -> Tensor:
        """The squared distance, shape (), of a batch with these features, (B, d), B >= 2 for the kernel."""
        rows = rows.double()
        if self.kind == "mean":
            return (rows.mean(0) - self._real).square().sum()
        return _within(rows) + self._real_within - 2 * _kernel(rows, self._real).mean()


@dataclass(frozen=True, eq=False)
class BatchDistance:
    """A batch away from real images, end to end: the distance of its final images' features from the reference's.

    Args:
        batch: The sampler, the states, the attacked steps, the noise and its draws; its target is not used.
        distance: What is made large, as it is, squared.
        at_once: Images in memory at a time, >= 1; None: all. It changes nothing but memory and time: each part is
            computed once for its features and again for its gradient, a quarter more network calls.
    """

    batch: FinalImageShift
    distance: FeatureDistance
    at_once: int | None = None
    joint: ClassVar[bool] = True

    @property
    def terms(self) -> int:
        """Draws of the noise that are averaged."""
        return self.batch.terms

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The network."""
        return self.batch.modules

    @property
    def like(self) -> Tensor:
        """A tensor of the shape of omega, (B, K, ...)."""
        return self.batch.like

    def __call__(self, omega: Tensor, term: int) -> Tensor:
        """The distance, the same for every image, shape (B,), float64."""
        noise = self.batch.noise(term)
        step = self.at_once or len(omega)
        parts = [slice(start, start + step) for start in range(0, len(omega), step)]
        again = torch.is_grad_enabled() and len(parts) > 1
        found = []
        for rows in parts:
            given = (rows, omega[rows], [None if z is None else z[rows] for z in noise])
            found.append(checkpoint(self._rows, *given, use_reentrant=False) if again else self._rows(*given))
        return self.distance(torch.cat(found)).expand(len(omega))

    def _rows(self, rows: slice, omega: Tensor, noise: Sequence[Tensor | None]) -> Tensor:
        """Features of some of the images, perturbed."""
        return self.distance.features(self.batch.part(rows).images(omega, noise))
