"""Attacks as objective x constraint x optimiser; on sampling trajectories, and on anything else that is differentiable.

The optimisers are here, goals and constraints in ``goals.py`` and ``constraints.py``::

    objective = FinalImageShift(sampler, x_T, attacked=[0, 10, 20])
    ball = LpBall("linf", 0.1)
    found = PGD(steps=40)(objective, ball, objective.like, generator)
    found.value.sqrt()    # how far each image moved, shape (B,)

What an attack finds is a lower bound on what there is to find. When to disbelieve it: docs/guide/attack.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import AttackGoal, evaluate, value_and_gradient
from robustdiff.diffusion.samplers import frozen
from robustdiff.utils.random import Generators

Progress = Callable[[], object]
"""Called after each evaluation of the objective; may raise, to stop."""
TOLERANCE = 1e-5
"""Relative rounding that a constraint is allowed."""


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack found.

    Attributes:
        omega: The best perturbation of each image, shape (B, K, ...).
        value: The objective there, (B,).
        trace: The best value so far, after each evaluation within the first restart, (evaluations, B).
        restarts: The best value so far, after each restart, (restarts, B).
    """

    omega: Tensor
    value: Tensor
    trace: Tensor
    restarts: Tensor


class _Best:
    """Keeps the best iterate of each image, without asking the device for anything."""

    def __init__(self, omega: Tensor) -> None:
        self.omega = omega.clone()
        self.value = torch.full(omega.shape[:1], -torch.inf, dtype=omega.dtype, device=omega.device)

    def see(self, omega: Tensor, value: Tensor) -> Tensor:
        """Take what is better; which images those are, shape (B,)."""
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.omega = torch.where(better.reshape(-1, *(1,) * (omega.ndim - 1)), omega, self.omega)
        return better

    def found(self, ball: LpBall, trace: Sequence[Tensor], restarts: Sequence[Tensor]) -> AttackResult:
        """The result, checked.

        Raises:
            ArithmeticError: If it is outside of the ball, or an image has no finite value at all.
        """
        excess = float(ball.excess(self.omega))
        if not excess <= 1 + TOLERANCE:
            raise ArithmeticError(f"the attack left its ball: {excess:.7g} times the radius")
        if not bool(torch.isfinite(self.value).all()):
            raise ArithmeticError("the objective is not finite, whatever the perturbation")
        return AttackResult(self.omega, self.value, torch.stack(list(trace)), torch.stack(list(restarts)))


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class RandomSearch:
    """The best of random points on the ball's surface: what any attack must beat.

    Args:
        draws: How many, >= 1.
    """

    draws: int = 10

    def __post_init__(self) -> None:
        """Check the number."""
        if self.draws < 1:
            raise ValueError(f"RandomSearch needs draws >= 1, got {self.draws}")

    def __call__(
        self, objective: AttackGoal, ball: LpBall, like: Tensor, generator: Generators = None, tell: Progress = _nothing
    ) -> AttackResult:
        """Draw and compare; arguments as of :class:`PGD`."""
        best, trace = _Best(torch.zeros_like(like)), []
        with frozen(objective.modules):
            for _ in range(self.draws):
                omega = ball.draw(like, generator, surface=True)
                best.see(omega, evaluate(objective, omega))
                trace.append(best.value)
                tell()
        return best.found(ball, trace, [best.value])


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent from random starts, keeping the best iterate of each image.

    Args:
        steps: Gradient steps of each restart, >= 1. One step of ``step_size=2`` reaches the surface from anywhere: the
            one-step attack (Goodfellow et al. 2015, with a random start).
        step_size: In units of the radius, > 0. Default: ``2.5 / steps``, and 2 for one step.
        momentum: Decay of the accumulated gradient, each divided by its mean absolute value, >= 0; 0 = none.
        restarts: Random starts, >= 1.
        keep: ``"best"``, or ``"last"``: each image's last iterate, for objectives that draw anew at every evaluation,
            where the best would be the luckiest; one restart only.

    Raises:
        ValueError: If a setting is out of range.

    Source: Madry et al. (2018); momentum: Dong et al. (2018), Eq. 6.
    """

    steps: int = 40
    step_size: float | None = None
    momentum: float = 0.0
    restarts: int = 1
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"PGD needs steps >= 1 and restarts >= 1, got {self.steps} and {self.restarts}")
        if not (self.momentum >= 0 and (self.step_size is None or self.step_size > 0)):
            raise ValueError(f"PGD needs step_size > 0 and momentum >= 0, got {self.step_size} and {self.momentum}")
        if self.keep not in ("best", "last") or (self.keep == "last" and self.restarts > 1):
            raise ValueError(f"PGD keeps best, or the last of one restart, got {self.keep!r} of {self.restarts}")

    @property
    def evaluations(self) -> int:
        """Evaluations of the objective, the last one of each restart without a gradient."""
        return self.restarts * (self.steps + 1)

    def __call__(
        self,
        objective: AttackGoal,
        ball: LpBall,
        like: Tensor,
        generator: Generators = None,
        tell: Progress = _nothing,
        start: Tensor | None = None,
    ) -> AttackResult:
        """Ascend.

        Args:
            objective: What to make large.
            ball: Where to stay.
            like: A tensor of the shape of omega, (B, K, ...), its device and dtype.
            generator: One, or one per image: then no image depends on its neighbours.
            tell: Called after each evaluation.
            start: Of the first restart, in the ball; default: random.

        Raises:
            NoGradient: If the model gives none.
            ArithmeticError: If nothing finite was found, or the constraint is violated.
        """
        size = self.step_size if self.step_size is not None else (2.0 if self.steps == 1 else 2.5 / self.steps)
        best = _Best(torch.zeros_like(like))
        trace: list[Tensor] = []
        restarts: list[Tensor] = []
        with frozen(objective.modules):
            for restart in range(self.restarts):
                omega = ball.draw(like, generator) if restart or start is None else start
                gathered = torch.zeros_like(like)
                for step in range(self.steps + 1):
                    last = step == self.steps
                    if last:
                        value = evaluate(objective, omega)
                    else:
                        value, gradient = value_and_gradient(objective, omega)
                    if last and self.keep == "last":
                        best = _Best(omega)
                    best.see(omega, value)
                    if restart == 0:
                        trace.append(best.value)
                    tell()
                    if not last:
                        if self.momentum:
                            mean = gradient.abs().flatten(1).mean(1).clamp(min=torch.finfo(like.dtype).tiny)
                            gathered = self.momentum * gathered + gradient / mean.reshape(-1, *(1,) * (like.ndim - 1))
                            gradient = gathered
                        omega = ball.project(omega + size * ball.bound(omega) * ball.direction(gradient))
                restarts.append(best.value)
        return best.found(ball, trace, restarts)


@dataclass(frozen=True)
class APGD:
    """Gradient ascent that sets its own step: halved at checkpoints where an image has stopped improving.

    Args:
        steps: Gradient steps of each restart, >= 1.
        restarts: Random starts, >= 1.

    Raises:
        ValueError: If a setting is out of range.

    Source: Croce and Hein (2020), "Reliable evaluation of adversarial robustness", Algorithm 1, with its constants
    (first step twice the radius, alpha = 0.75, rho = 0.75); every image by itself.
    """

    steps: int = 40
    restarts: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"APGD needs steps >= 1 and restarts >= 1, got {self.steps} and {self.restarts}")

    @property
    def evaluations(self) -> int:
        """Evaluations of the objective, the last one of each restart without a gradient."""
        return self.restarts * (self.steps + 1)

    def checkpoints(self) -> list[int]:
        """Steps after which each image's progress is judged: ``ceil(p_j steps)``, the intervals shrinking."""
        shares, interval = [0.22], 0.22
        while shares[-1] < 1:
            interval = max(interval - 0.03, 0.06)
            shares.append(shares[-1] + interval)
        return sorted({math.ceil(round(share * self.steps, 6)) for share in shares if share <= 1})

    def __call__(
        self, objective: AttackGoal, ball: LpBall, like: Tensor, generator: Generators = None, tell: Progress = _nothing
    ) -> AttackResult:
        """Ascend; arguments and errors as of :class:`PGD`."""
        best = _Best(torch.zeros_like(like))
        trace: list[Tensor] = []
        restarts: list[Tensor] = []
        with frozen(objective.modules):
            for restart in range(self.restarts):
                own, own_trace = self._ascend(objective, ball, ball.draw(like, generator), tell)
                if restart == 0:
                    trace = own_trace
                best.see(own.omega, own.value)
                restarts.append(best.value)
        return best.found(ball, trace, restarts)

    def _ascend(self, objective: AttackGoal, ball: LpBall, omega: Tensor, tell: Progress) -> tuple[_Best, list[Tensor]]:
        """One restart."""
        column = (-1, *(1,) * (omega.ndim - 1))
        size = torch.full_like(omega[:, 0].flatten(1)[:, 0], 2.0)
        checkpoints = self.checkpoints()
        value, gradient = value_and_gradient(objective, omega)
        best, trace = _Best(omega), []
        best.see(omega, value)
        trace.append(best.value)
        tell()
        before, best_gradient = omega, gradient
        rises, since = torch.zeros_like(size), 0
        kept_value, halved = best.value, torch.ones_like(size, dtype=torch.bool)
        for step in range(1, self.steps + 1):
            pushed = ball.project(omega + size.reshape(column) * ball.bound(omega) * ball.direction(gradient))
            inertia = 1.0 if step == 1 else 0.75
            moved = ball.project(omega + inertia * (pushed - omega) + (1 - inertia) * (omega - before))
            before, omega, old_value = omega, moved, value
            if step == self.steps:
                value = evaluate(objective, omega)
            else:
                value, gradient = value_and_gradient(objective, omega)
            better = best.see(omega, value)
            best_gradient = torch.where(better.reshape(column), gradient, best_gradient)
            trace.append(best.value)
            tell()
            rises, since = rises + (value > old_value), since + 1
            if step in checkpoints and step < self.steps:
                stuck = (rises < 0.75 * since) | (~halved & (best.value <= kept_value))
                size = torch.where(stuck, size / 2, size)
                back = stuck.reshape(column)
                omega = torch.where(back, best.omega, omega)
                before = torch.where(back, best.omega, before)
                gradient, value = torch.where(back, best_gradient, gradient), torch.where(stuck, best.value, value)
                rises, since, kept_value, halved = torch.zeros_like(size), 0, best.value, stuck
        return best, trace
