"""Images in few groups, each with one least noise level, for trainers that cannot be told one per image.

A level is sigma/alpha of the diffusion process, for images in [-1, 1]. Trainers count otherwise: the functions below
convert, and round so that no image is trained below its level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robustdiff.audit.result import AuditResult
from robustdiff.diffusion.schedule import NoiseSchedule

MOST_LEVELS = 4
"""Groups above 0 at most; each is one more stage of training."""
HIGHEST = 10.0
"""Images that can be trusted above this level only are left out: a state there holds a hundredth of the image."""
CANDIDATES = 64
"""Levels between which thresholds are chosen, at most."""
ALL, HIGH, LEFT_OUT = "all noise levels", "high noise only", "left out"


@dataclass(frozen=True)
class Group:
    """Images that are trained at the same noise levels.

    Attributes:
        kind: :data:`ALL`, :data:`HIGH` or :data:`LEFT_OUT`.
        level: Least noise level sigma/alpha; infinite for those left out.
        places: Which images, in the order of the audit.
    """

    kind: str
    level: float
    places: tuple[int, ...]

    @property
    def slug(self) -> str:
        """In names of files: ``all-levels``, ``from-0.25``, ``left-out``."""
        return {ALL: "all-levels", LEFT_OUT: "left-out"}.get(self.kind, f"from-{self.level:g}")

    @property
    def title(self) -> str:
        """For people, with the unit."""
        return f"{self.kind}, sigma/alpha >= {self.level:g}" if self.kind == HIGH else self.kind


@dataclass(frozen=True)
class Stage:
    """One run of a trainer that has one range of noise levels per run, or one part of it.

    Attributes:
        number: From 1, the first to run.
        level: Least noise level sigma/alpha that it trains.
        groups: Whose images it may train: those whose level is not above.
    """

    number: int
    level: float
    groups: tuple[Group, ...]

    @property
    def slug(self) -> str:
        """In names of files: ``1-from-0.25``."""
        return f"{self.number}-{self.groups[-1].slug}"


def groups(found: AuditResult) -> tuple[Group, ...]:
    """All images, by least noise level: those for all levels, at most four groups above, those left out.

    Empty groups are not there. Images with lost pixels are left out: their levels are those of repaired ones. Where
    weights are below 1, only as many images are listed as their weights add up to (of k equal ones, which weigh 1/k
    each, the one that may be used lowest); the others are left out.
    """
    level, used = found.min_sigma.tolist(), set(_listed(found))
    holed = found.has_missing.tolist()
    usable = [p for p in range(len(found)) if p in used and level[p] <= HIGHEST and not holed[p]]
    several = thresholds([level[place] for place in usable])
    of = {place: min(high for high in (0.0, *several) if high >= level[place]) for place in usable}
    made = [
        Group(HIGH if high else ALL, high, tuple(place for place in usable if of[place] == high))
        for high in (0.0, *several)
    ]
    made.append(Group(LEFT_OUT, math.inf, tuple(place for place in range(len(found)) if place not in of)))
    return tuple(group for group in made if group.places)


def stages(made: Sequence[Group]) -> tuple[Stage, ...]:
    """The runs that train each group at every noise level it may be trained at, highest first."""
    trained = [group for group in made if group.kind != LEFT_OUT]
    return tuple(
        Stage(number, group.level, tuple(other for other in trained if other.level <= group.level))
        for number, group in enumerate(reversed(trained), 1)
    )


def thresholds(levels: Sequence[float], most: int = MOST_LEVELS) -> tuple[float, ...]:
    """At most so many levels, such that the least noise is lost when each image is trained above the next of them.

    What is lost is counted on the axis c / (1 + c), flow matching's. Exact for up to 64 different levels; of more,
    quantiles are candidates. Levels are rounded up to three digits.

    Args:
        levels: Least level of each image; those that are 0 need none.
        most: How many.
    """
    rounded = sorted(round_up(level) for level in levels if level > 0)
    values = sorted(set(rounded))
    if len(values) > CANDIDATES:
        at = [math.ceil((number + 1) / CANDIDATES * len(rounded)) - 1 for number in range(CANDIDATES)]
        values = sorted({rounded[place] for place in at})
    if len(values) <= most:
        return tuple(values)
    edges = [0.0, *values]
    places = torch.bucketize(torch.tensor(rounded), torch.tensor(values)).tolist()
    counts, sums = [0] * len(values), [0.0] * len(values)
    for level, place in zip(rounded, places, strict=True):
        counts[place] += 1
        sums[place] += flow_sigma(level)
    # best[j]: the least that the images up to values[j - 1] lose, if that is a threshold; and the thresholds
    unknown: tuple[float, tuple[float, ...]] = (math.inf, ())
    best: list[tuple[float, tuple[float, ...]]] = [(0.0, ()), *[unknown] * len(values)]
    for _ in range(most):
        best = [
            min(
                (best[i][0] + sum(counts[i:j]) * flow_sigma(edges[j]) - sum(sums[i:j]), (*best[i][1], edges[j]))
                for i in range(j)
            )
            if j
            else best[0]
            for j in range(len(edges))
        ]
    return best[-1][1]


def round_up(level: float) -> float:
    """A level to three digits, not below it."""
    unit = 10.0 ** (2 - math.floor(math.log10(level)))
    near = round(level * unit) / unit
    return near if near >= level else (round(level * unit) + 1) / unit


def flow_sigma(level: float) -> float:
    """The s of flow matching at a level c = s / (1 - s): ``s = c / (1 + c)``, with any shift already in it."""
    return level / (1 + level)


def first_timestep(level: float) -> int:
    """The first of the 1000 timesteps of Stable Diffusion 1, 2 and XL whose sigma/alpha is above a level.

    Their betas are ``linspace(sqrt(0.00085), sqrt(0.012), 1000) ** 2``, "scaled_linear".
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    schedule = NoiseSchedule((1 - betas).cumprod(0))
    return int(schedule.first_timesteps(torch.tensor([level]))[0]) if level > 0 else 0


def _listed(found: AuditResult) -> list[int]:
    """Places of so many images as their weights add up to: the first of every whole one, copies side by side."""
    level, holed = found.min_sigma.tolist(), found.has_missing.tolist()
    copy = {place: number for number, group in enumerate(found.copies) for place in group}
    order = sorted(range(len(found)), key=lambda p: (copy.get(p, -1), holed[p], level[p], p))
    before = torch.cat([torch.zeros(1).double(), found.weight[order].double().cumsum(0)])
    whole = (before - 1e-6).ceil()  # a hair, for what 1/3 + 1/3 + 1/3 is not
    return [place for place, new in zip(order, (whole.diff() > 0).tolist(), strict=True) if new]
