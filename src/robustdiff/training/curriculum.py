"""Which image is trained at which noise level, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robustdiff.audit.result import AuditResult
from robustdiff.diffusion.schedule import NoiseSchedule, draw_fractions
from robustdiff.utils.errors import UsageError
from robustdiff.utils.random import Generators

MOST_OFTEN = 50
"""How many times its due an image is used at most where few others can be."""
Names = Sequence[str] | Sequence[int] | Tensor
"""Images of a batch: as the audit calls them, or their places in it."""


@dataclass(frozen=True, eq=False)
class LevelBalancedSampler:
    """Which image is used how often, and at which timesteps, if every timestep is to be trained as often as plainly.

    Image i may be used from timestep ``first_i`` on, with a weight ``w_i``. The pair is drawn with probability in
    proportion to ``d(t) w_i / n(t)`` for ``t >= first_i``, where ``n(t)`` is the weight of all images that may be used
    at t: every timestep that has images comes as often as its density ``d(t)`` says, and at each the images by their
    weights. Where ``n(t)`` is below a fiftieth of the whole, t comes less often, rather than the few images there
    still more often.

    A loop that visits every image equally often gets the same with :meth:`plain_timesteps` and :meth:`loss_weight`.

    Args:
        first: int64, shape (N,), in 0 .. T - 1.
        weight: Shape (N,), >= 0, not all 0.
        num_timesteps: T.
        density: How often plain training draws each timestep, in any unit, shape (T,). Default: all alike.

    Raises:
        ValueError: If shapes or ranges do not fit.
    """

    first: Tensor
    weight: Tensor
    num_timesteps: int
    density: Tensor | None = None

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
        d = self.density
        if d is not None and not (d.shape == (self.num_timesteps,) and bool((d.isfinite() & (d >= 0)).all())):
            raise ValueError(f"`density` needs shape ({self.num_timesteps},) and finite values >= 0")
        if not bool((self._mass_left[first][weight > 0] > 0).all()):
            raise ValueError("`density` is 0 at every timestep at which some image may be used")

    @cached_property
    def used(self) -> Tensor:
        """Places of the images that are used at all, int64."""
        return self.weight.nonzero().flatten()

    @cached_property
    def _scarcity(self) -> Tensor:
        """1 / n(t), at most fifty times that of all images; 0 where no image may be used. Float64, shape (T,)."""
        counts = torch.zeros(self.num_timesteps, dtype=torch.float64)
        n = counts.index_add(0, self.first, self.weight.double()).cumsum(0)
        return torch.where(n > 0, 1 / n.clamp(min=float(n[-1]) / MOST_OFTEN), torch.zeros_like(n))

    @cached_property
    def _rate(self) -> Tensor:
        """Sum of d(t) / n(t) over the timesteps before each, float64, shape (T + 1,)."""
        return _sums(self._scarcity if self.density is None else self.density.double() * self._scarcity)

    @cached_property
    def _mass(self) -> Tensor:
        """Sum of d(t) over the timesteps before each, float64, shape (T + 1,)."""
        alike = torch.ones(self.num_timesteps, dtype=torch.float64)
        return _sums(alike if self.density is None else self.density.double())

    @property
    def _mass_left(self) -> Tensor:
        """Sum of d(t) from each timestep on."""
        return self._mass[-1] - self._mass

    @cached_property
    def _shares(self) -> Tensor:
        """Probability of each image in no unit, float64, shape (N,)."""
        return self.weight.double() * (self._rate[-1] - self._rate[self.first])

    @property
    def share(self) -> Tensor:
        """Probability of each image, float64, shape (N,)."""
        return self._shares / self._shares.sum()

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
        return self._drawn(self._rate, places, u)

    def plain_timesteps(self, places: Tensor, u: Tensor) -> Tensor:
        """A timestep for each visit as plain training draws it, given that it is not below ``first``.

        Args:
            places: The images, int64, shape (B,).
            u: Uniform numbers in [0, 1), float64, shape (B,).

        Returns:
            int64, shape (B,).
        """
        return self._drawn(self._mass, places, u)

    def loss_weight(self, places: Tensor, t: Tensor) -> Tensor:
        """What the loss of a plain visit is multiplied by, so that its expectation is that of this sampler.

        A plain visit is one of N images, all equally often, at one of :meth:`plain_timesteps`: the factor is the
        probability of (i, t) here over the one there, ``w_i / n(t)`` times the image's part of the density, so scaled
        that its mean over plain visits is 1.

        Args:
            places: The images, int64, shape (B,).
            t: Their timesteps, int64, shape (B,).

        Returns:
            float64, shape (B,); 0 for images of weight 0.
        """
        one_image = self.weight.double()[places] * self._mass_left[self.first[places]]
        return one_image * self._scarcity[t] * (len(self.first) / self._shares.sum())

    def _drawn(self, sums: Tensor, places: Tensor, u: Tensor) -> Tensor:
        """Timesteps by the increments of ``sums``, not below ``first``: the inverse of their distribution at u."""
        first = self.first[places]
        mark = sums[first] + u * (sums[-1] - sums[first])
        t = torch.searchsorted(sums, mark, right=True) - 1
        return torch.maximum(t.clamp(max=self.num_timesteps - 1), first)


def _sums(values: Tensor) -> Tensor:
    """Sum of the values before each place, one more than there are."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)])


class Curriculum:
    """An audit in a training loop that is not ours: at which timesteps each image of a batch is trained, and how much.

    ``t, weight = Curriculum(AuditResult.load("photos-audit"), scheduler).draw(names, generator)``

    An image is never trained below its ``min_sigma``, a noise level sigma/alpha. From there on its timesteps are drawn
    as the loop draws them anyway. The weight of the loss makes up for what is missing below: every noise level counts
    as much as in plain training, and at each the images by their weights (:class:`LevelBalancedSampler`). It has mean
    1 over a pass, and is 1 everywhere if the audit found nothing.

    Args:
        found: What an audit found.
        scheduler: Of diffusers: one with ``alphas_cumprod`` (DDPM, DDIM, ...), or one of flow matching as it was made
            (``FlowMatchEulerDiscreteScheduler``, with any ``shift``), where sigma/alpha is ``s / (1 - s)``.
        density: How often the loop draws each timestep (flow matching: each index of ``scheduler.timesteps``), in any
            unit, shape (T,). Default: all alike.
        repaired: Whether the loop fills in lost pixels (:meth:`AuditResult.repaired`), which the levels of such images
            take for granted. Default: it does not, and they have weight 0.

    Raises:
        UsageError: If no image can be trained on.
        TypeError: If the scheduler is neither.
        ValueError: If it has been set to fewer steps, or ``density`` does not fit.
    """

    def __init__(
        self,
        found: AuditResult,
        scheduler: Any,  # noqa: ANN401 - diffusers is not imported here
        density: Tensor | None = None,
        repaired: bool = False,
    ) -> None:
        """Turn noise levels into places of the scheduler's table, from the least noise on."""
        self._found = found
        self._place = {name: place for place, name in enumerate(found.names)}
        self._sigmas, levels, self._timesteps = _table(scheduler)
        self._flow = self._timesteps.is_floating_point()
        usable = found.min_sigma.isfinite() & (found.min_sigma <= levels[-1]) & (~found.has_missing | repaired)
        if not bool((usable & (found.weight > 0)).any()):
            holes = "; fill in lost pixels, with `repaired` true" if bool(found.has_missing.any()) else ""
            raise UsageError(f"the audit left no image to train on: look at them with robustdiff audit{holes}")
        first = torch.searchsorted(levels, found.min_sigma.contiguous()).clamp(max=len(levels) - 1)
        weight = torch.where(usable, found.weight, torch.zeros_like(found.weight))
        if density is not None and self._flow:
            density = density.flip(0)
        self._sampler = LevelBalancedSampler(first, weight, len(levels), density)

    def draw(
        self, names: Names, generator: Generators = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Timesteps of a batch, and the weights of its losses.

        Args:
            names: As the audit calls the images (paths relative to DATA), or their places in it, (B,).
            generator: Source of randomness: one, or one for each image; one number is drawn per image.
            device: Where both go. Default: the generator's device, the CPU if there is none.

        Returns:
            Timesteps, int64, or of flow matching those of ``scheduler.timesteps``; and weights, float32; shape (B,).

        Raises:
            UsageError: If the audit has no such image.
        """
        places = self._places(names)
        u = draw_fractions(len(places), generator)
        at = self._sampler.plain_timesteps(places, u.cpu())
        weight = self._sampler.loss_weight(places, at).float()
        device = u.device if device is None else device
        return self._timesteps[at].to(device), weight.to(device)

    def indices(self, timesteps: Tensor) -> Tensor:
        """Places of drawn timesteps in the scheduler's own table (flow matching: the largest noise first), int64."""
        at = self._at(timesteps)
        return len(self._timesteps) - 1 - at if self._flow else at

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Noise scale s of drawn timesteps: ``x_t = (1 - s) x0 + s eps`` of flow matching, ``s = sigma_t`` of DDPM."""
        return self._sigmas.to(timesteps.device)[self._at(timesteps)]

    def min_sigma(self, names: Names) -> Tensor:
        """Least noise level sigma/alpha at which each image is trained, float32, (B,)."""
        return self._found.min_sigma[self._places(names)].float()

    def noise_level(self, names: Names) -> Tensor:
        """Noise that each image carries itself, as ``DenoisingLoss`` takes it, float32, (B,)."""
        return self._found.noise_std[self._places(names)].float()

    def _at(self, timesteps: Tensor) -> Tensor:
        table = self._timesteps.to(timesteps.device)
        return torch.searchsorted(table, timesteps.to(table.dtype).contiguous()).clamp(max=len(table) - 1)

    def _places(self, names: Names) -> Tensor:
        if isinstance(names, Tensor):
            names = names.tolist()
        places = [self._place.get(name, -1) if isinstance(name, str) else int(name) for name in names]
        for name, place in zip(names, places, strict=True):
            if not 0 <= place < len(self._found):
                example = self._found.names[0]
                raise UsageError(f"{name!r} is no image of this audit of {len(self._found)}: name it as {example!r}")
        return torch.tensor(places, dtype=torch.long)


def _table(scheduler: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401 - as above
    """Sigma, sigma/alpha (float64) and timestep of every entry of a scheduler's table, from the least noise on."""
    s, t = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) or not (
        isinstance(s, Tensor) and isinstance(t, Tensor)
    ):
        schedule = NoiseSchedule.from_scheduler(scheduler)
        places = torch.arange(schedule.num_timesteps)
        levels = schedule.noise_to_signal(places).double()
        if not bool((levels.diff().nan_to_num(0.0) >= 0).all()):  # inf - inf is no fall
            raise ValueError("`scheduler` must have noise that grows with t: sort alphas_cumprod downwards")
        return schedule.sigma(places), levels, places
    steps, name = int(scheduler.config.num_train_timesteps), type(scheduler).__name__
    s, t = s.detach().cpu(), t.detach().cpu()
    if not 0 < float(s.max()) <= 1 or getattr(scheduler.config, "invert_sigmas", False):
        raise TypeError(f"{name} has neither alphas_cumprod nor sigmas that fall from 1 to 0, as flow matching has")
    s = s[:steps]
    straight = len(t) == steps and torch.allclose(t.double(), s.double() * steps, rtol=1e-4)
    if not straight or not bool((s.diff() < 0).all()):
        raise ValueError(f"`scheduler` is set to {len(t)} of {steps} timesteps for sampling: give a fresh {name}")
    s = s.flip(0)
    return s, s.double() / (1 - s.double()), t.flip(0)


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
