"""Which image is trained at which noise level, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robustdiff.audit.result import AuditResult
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.utils.errors import UsageError

MOST_OFTEN = 50
"""How many times its due an image is used at most where few others can be."""


@dataclass(frozen=True, eq=False)
class LevelBalancedSampler:
    """Which image is used how often, and at which timesteps, if every timestep is to be trained equally often.

    Image i may be used from timestep ``first_i`` on, with a weight ``w_i``. The pair is drawn with probability in
    proportion to ``w_i / n(t)`` for ``t >= first_i``, where ``n(t)`` is the weight of all images that may be used at t:
    every timestep that has images comes equally often, and at each the images by their weights. Where ``n(t)`` is below
    a fiftieth of the whole, t comes less often, rather than the few images there still more often.

    Args:
        first: int64, shape (N,), in 0 .. T - 1.
        weight: Shape (N,), >= 0, not all 0.
        num_timesteps: T.

    Raises:
        ValueError: If shapes or ranges do not fit.
    """

    first: Tensor
    weight: Tensor
    num_timesteps: int

    def __post_init__(self) -> None:
        """Check."""
        first, weight = self.first, self.weight
        if (
            first.shape != weight.shape
            or first.ndim != 1
            or not bool(((first >= 0) & (first < self.num_timesteps)).all())
        ):
            raise ValueError(
                f"LevelBalancedSampler needs first and weight of one shape (N,), first in 0 .. {self.num_timesteps - 1}"
            )
        if not bool((weight.isfinite() & (weight >= 0)).all()) or not bool((weight > 0).any()):
            raise ValueError("LevelBalancedSampler needs finite weights >= 0, not all of them 0")

    @cached_property
    def used(self) -> Tensor:
        """Places of the images that are used at all, int64."""
        return self.weight.nonzero().flatten()

    @cached_property
    def _rate(self) -> Tensor:
        """Sum of 1 / n(t) over the timesteps before each, float64, shape (T + 1,)."""
        counts = torch.zeros(self.num_timesteps, dtype=torch.float64)
        n = counts.index_add(0, self.first, self.weight.double()).cumsum(0)
        rate = torch.where(n > 0, 1 / n.clamp(min=float(n[-1]) / MOST_OFTEN), torch.zeros_like(n))
        return torch.cat([torch.zeros(1, dtype=torch.float64), rate.cumsum(0)])

    @property
    def share(self) -> Tensor:
        """Probability of each image, float64, shape (N,)."""
        share = self.weight.double() * (self._rate[-1] - self._rate[self.first])
        return share / share.sum()

    def order(self, generator: torch.Generator) -> Tensor:
        """Images of one pass over the data, in random order, int64: as many as are used.

        Each comes as often as its share says, rounded up or down at random (systematic sampling).
        """
        count = len(self.used)
        mark = (torch.arange(count) + torch.rand((), generator=generator, dtype=torch.float64)) / count
        edges = self.share.cumsum(0)
        places = torch.searchsorted(edges / edges[-1], mark, right=True).clamp(max=int(self.used[-1]))
        return places[torch.randperm(count, generator=generator)]

    def timesteps(self, places: Tensor, u: Tensor) -> Tensor:
        """A timestep for each visit.

        Args:
            places: The images, int64, shape (B,).
            u: Uniform numbers in [0, 1), float64, shape (B,).

        Returns:
            int64, shape (B,), not below ``first``.
        """
        first = self.first[places]
        low = self._rate[first]
        mark = low + u * (self._rate[-1] - low)
        t = torch.searchsorted(self._rate, mark, right=True) - 1
        return torch.maximum(t.clamp(max=self.num_timesteps - 1), first)


def sampler_from_audit(found: AuditResult, schedule: NoiseSchedule) -> LevelBalancedSampler | None:
    """When each image is used, after an audit; None if there is nothing to rule.

    The audit speaks of noise levels sigma/alpha; here they become timesteps. A level at or above the largest of the
    schedule leaves that image out.

    Raises:
        UsageError: If that leaves none.
    """
    if found.trivial:
        return None
    lowest = found.lowest
    inside = lowest < _largest(schedule)
    if not bool((inside & (found.weight > 0)).any()):
        raise UsageError("`auto` found no image that can be trained on: look at them with robustdiff audit")
    first = schedule.first_timesteps(torch.where(inside, lowest, torch.zeros_like(lowest)))
    weight = torch.where(inside, found.weight, torch.zeros_like(found.weight))
    return LevelBalancedSampler(first, weight, schedule.num_timesteps)


def masked_below(found: AuditResult, schedule: NoiseSchedule) -> Tensor | None:
    """The timestep below which lost pixels, filled in, do not count in the loss, int64, shape (N,); None: all do."""
    if not (found.masked and bool((found.has_missing & (found.min_sigma > found.noise_std)).any())):
        return None
    always = torch.full_like(found.min_sigma, schedule.num_timesteps, dtype=torch.long)
    inside = found.min_sigma < _largest(schedule)
    level = torch.where(inside & found.has_missing, found.min_sigma, torch.zeros_like(found.min_sigma))
    first = schedule.first_timesteps(level)
    return torch.where(inside, first, always)


def _largest(schedule: NoiseSchedule) -> float:
    """The largest noise level sigma/alpha."""
    return float(schedule.noise_to_signal(torch.tensor(schedule.num_timesteps - 1)))
