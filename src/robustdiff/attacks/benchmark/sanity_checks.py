"""Flags that say when an attack must not be believed: each a measured number against a stated limit.

A model that looks robust because its attack failed is the usual mistake (Athalye et al. 2018; Carlini et al. 2019).
Every attack computes all of these; ``docs/guide/attack.md`` says what each means and what to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import (
    AttackGoal,
    FinalImageShift,
    evaluate,
    value_and_gradient,
)
from robustdiff.attacks.optimizers import TOLERANCE
from robustdiff.utils.random import Generators

RAISED_WHEN = {
    "gradient-zero": "for a share of images above the limit the gradient promises no gain at a random point",
    "gradient-mismatch": "directional derivatives differ from finite differences by a share above the limit",
    "gradient-local": "the same over half of the radius",
    "not-repeatable": "the same perturbation and noise give values that differ by a share above the limit",
    "checkpointing": "gradients with and without checkpoints differ by a share above the limit",
    "radius-not-monotone": "a larger radius achieves less, by a share above the limit",
    "radius-unbroken": "a perturbation ten times as large as the data moves images by fewer spreads than the limit",
    "random-beats-attack": "for a share of images above the limit random search achieves more than the attack",
    "steps-not-monotone": "more steps of PGD achieve less, by a share above the limit",
    "not-converged": "the last extension of PGD still gained a share above the limit",
    "other-attack-stronger": "PGD or one of its variants beats the attack asked for by a share above the limit",
    "eot-too-few": "more draws of the noise per gradient achieve more, by a share above the limit",
    "constraint-violated": "a perturbation is larger than its radius times the limit",
    "sampler-mismatch": "replayed in the stock sampler, images end elsewhere by more than the limit, in pixel units",
    "no-spread": "generated images differ from one another by less than the limit, per pixel",
}
"""Every flag, and when it is raised."""
LIMITS = {
    "gradient-zero": 0.05,
    "gradient-mismatch": 0.1,
    "gradient-local": 0.5,
    "not-repeatable": 1e-3,
    "checkpointing": 1e-3,
    "radius-not-monotone": 0.02,
    "radius-unbroken": 0.5,
    "random-beats-attack": 0.05,
    "steps-not-monotone": 0.02,
    "not-converged": 0.05,
    "other-attack-stronger": 0.05,
    "eot-too-few": 0.05,
    "constraint-violated": 1 + TOLERANCE,
    "sampler-mismatch": 0.01,
    "no-spread": 1e-4,
}
INFORMATIVE = ("gradient-local", "not-converged", "other-attack-stronger", "eot-too-few")
"""Raised, these say that a stronger attack may exist; the others, that the number is wrong or means something else."""
HUGE = 10.0
"""Size of the perturbation that must break any model, in units of the data (pixels in [-1, 1])."""


@dataclass(frozen=True)
class Flag:
    """One check.

    Attributes:
        name: One of :data:`RAISED_WHEN`.
        value: What was measured; None if it was not (see ``text``): the result is then as little to be believed as
            if the flag were raised.
        text: What it was measured on, if there is something to say.
    """

    name: str
    value: float | None
    text: str = ""

    @property
    def raised(self) -> bool:
        """Whether the value is on the wrong side of its limit; what is not a number is."""
        if self.value is None:
            return True
        limit = LIMITS[self.name]
        return not (self.value >= limit if self.name in ("radius-unbroken", "no-spread") else self.value <= limit)

    def to_json(self) -> dict[str, Any]:
        """As results hold it."""
        finite = self.value is not None and abs(self.value) < float("inf")
        return {
            "name": self.name,
            "raised": self.raised,
            "invalid": self.raised and self.name not in INFORMATIVE,
            "measured": self.value is not None,
            "value": self.value if finite else None,
            "limit": LIMITS[self.name],
            "raised_when": RAISED_WHEN[self.name],
            "text": self.text,
        }


def _relative(a: Tensor, b: Tensor) -> float:
    """Sum of the differences over the sum of the larger ones; 0 if all are 0."""
    size = torch.maximum(a.abs(), b.abs()).sum()
    return float((a - b).abs().sum() / size) if float(size) > 0 else 0.0


def check_gradient(
    objective: AttackGoal, ball: LpBall, like: Tensor, generator: Generators = None, directions: int = 3
) -> list[Flag]:
    """``gradient-zero``, ``gradient-mismatch``, ``gradient-local`` and ``not-repeatable``.

    Derivatives along random directions of the ball's surface, at a random point of the ball, are compared with central
    differences over 1 % and 5 % of the radius (the better of the two: rounding spoils the smaller, curvature the
    larger) and over half of it. Costs ``6 directions + 3`` evaluations.

    Args:
        objective: With fixed noise, if it has noise.
        ball: Where.
        like: A tensor of the shape of omega.
        generator: Source of randomness.
        directions: How many.
    """
    omega = ball.draw(like, generator)
    value, gradient = value_and_gradient(objective, omega)
    again = evaluate(objective, omega)
    promised = (gradient * ball.bound(omega) * ball.direction(gradient)).flatten(1).sum(1)
    # what is promised over the whole radius, beside what the value itself is rounded to
    rounding = torch.finfo(value.dtype).eps * value.abs()
    zero = float((~(promised > rounding)).double().mean())
    ways = [ball.draw(like, generator, surface=True) for _ in range(directions)]
    slopes = torch.stack([(gradient * way).flatten(1).sum(1) for way in ways])
    if objective.joint:  # one value, and all images move at once
        slopes = slopes.sum(1, keepdim=True).expand_as(slopes)

    def mismatch(h: float) -> float:
        differences = [evaluate(objective, omega + h * way) - evaluate(objective, omega - h * way) for way in ways]
        return _relative(torch.stack(differences) / (2 * h), slopes)

    return [
        Flag("gradient-zero", zero),
        Flag("gradient-mismatch", min(mismatch(h) for h in (0.01, 0.05))),
        Flag("gradient-local", mismatch(0.5)),
        Flag("not-repeatable", _relative(value, again)),
    ]


def check_checkpointing(objective: FinalImageShift, omega: Tensor) -> Flag:
    """Gradients through checkpoints against plain ones.

    Args:
        objective: On few images and steps: the plain gradient needs memory for all of them at once.
        omega: Where, shape (B, K, ...); not 0, where both gradients are 0.
    """
    plain, checkpointed = (dataclasses.replace(objective, checkpointed=flag) for flag in (False, True))
    return Flag(
        "checkpointing", _relative(value_and_gradient(plain, omega)[1], value_and_gradient(checkpointed, omega)[1])
    )


def check_rising(name: str, values: Sequence[float]) -> Flag:
    """Whether something that should only rise does.

    Args:
        name: ``radius-not-monotone`` or ``steps-not-monotone``.
        values: Mean of what the attack makes large, in the order of the radius or the steps.
    """
    drops = [1 - after / before for before, after in pairwise(values) if before > 0]
    return Flag(name, max([0.0, *drops]))


def check_gain(name: str, before: float, after: float) -> Flag:
    """By what share of ``before`` the mean ``after`` is larger: ``not-converged`` and its like."""
    return Flag(name, max(0.0, after / before - 1) if before > 0 else (0.0 if after <= 0 else None))


def check_random(attack: Tensor, random: Tensor) -> Flag:
    """Share of the images for which random search achieves more, by more than 1 %; both of shape (B,)."""
    return Flag("random-beats-attack", float((random > 1.01 * attack).double().mean()))


def check_huge(displacement: float | None) -> Flag:
    """Whether a huge perturbation breaks the model.

    Args:
        displacement: Mean, in units of the generated spread (independent images are about 1.4 apart); None if there is
            no spread to measure by.
    """
    text = "" if displacement is not None else "generated images do not differ: there is no spread to measure by"
    return Flag("radius-unbroken", displacement, text)
