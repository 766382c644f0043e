"""What ``robustdiff attack`` computes, in cells: one attack on one batch of images, kept on disk, never done twice."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustdiff.attacks.batch_goals import BatchDistance, FeatureDistance
from robustdiff.attacks.benchmark.grid import EOT, VERDICTS, Cell, is_blind, radius
from robustdiff.attacks.benchmark.sanity_checks import (
    HUGE,
    Flag,
    check_checkpointing,
    check_gradient,
)
from robustdiff.attacks.config import AttackConfig
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import AttackGoal, FinalImageShift, NoisePredictionShift
from robustdiff.attacks.optimizers import AttackResult
from robustdiff.diffusion.samplers import DifferentiableSampler, frozen
from robustdiff.utils import atomic_io
from robustdiff.utils.random import draw_normal, image_generators
from robustdiff.utils.seeds import derive_seed

Tell = Callable[[int], None]
"""Told of finished work, in network calls per image; may raise, to stop."""
CHECKED, CHECKED_STEPS = 8, 4
"""Images that gradients are checked on; sampler steps that plain gradients, which hold all of them, go through."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a cell found on some images.

    Attributes:
        moved: Euclidean distance of the final image from the undisturbed one, root mean square over the verdicts, (B,).
        score: What the attack makes large, in distances, (B,): ``moved``; for a target how much nearer it came, over
            the verdicts alike; for a batch how much farther from the reference, each image the same; for shift and
            residual their size.
        trace: The best value of the objective so far, (evaluations, B), of the first restart.
        restarts: The same after each restart, (R, B).
        images: The images reached, uint8 (B, C, H, W), in the first verdict.
        excess: Largest norm over its radius.
        mismatch: Largest difference per pixel from what the stock sampler makes of it; NaN if not compared.
    """

    moved: Tensor
    score: Tensor
    trace: Tensor
    restarts: Tensor
    images: Tensor
    excess: Tensor
    mismatch: Tensor

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({f.name: getattr(self, f.name).cpu().contiguous() for f in dataclasses.fields(self)}, part)
        atomic_io.fsync_file(part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path, count: int) -> Outcome | None:
        """From disk; None if it is not there.

        Raises:
            ValueError: If the file is damaged.
        """
        if not path.is_file():
            return None
        names = [f.name for f in dataclasses.fields(cls)]
        try:
            with safe_open(path, "pt") as file:
                found = cls(**{name: file.get_tensor(name) for name in names})
        except Exception as error:  # safetensors raises types of its own
            raise ValueError(atomic_io.one_line(error)) from None
        shapes = (found.moved.shape[:1], found.trace.shape[1:], found.restarts.shape[1:], found.images.shape[:1])
        if any(tuple(shape) != (count,) for shape in shapes):
            raise ValueError("it is of other images")
        return found


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of several batches as one."""
    return Outcome(
        torch.cat([one.moved for one in outcomes]),
        torch.cat([one.score for one in outcomes]),
        torch.cat([one.trace for one in outcomes], 1),
        torch.cat([one.restarts for one in outcomes], 1),
        torch.cat([one.images for one in outcomes]),
        torch.stack([one.excess for one in outcomes]).max(),
        torch.stack([one.mismatch for one in outcomes]).amax(),
    )


Replay = Callable[[Sequence[int], Tensor], Tensor]
"""(images, omega (B, K, C, H, W)) -> the images that the stock sampler draws, (B, C, H, W)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images under attack.

    Args:
        config: The command's flags.
        trajectory: The sampler, its ``kwargs`` those of these images.
        images: Their indices.
        shape: (C, H, W).
        device: Where.
        targets: Gives the images that the objective ``target`` comes near, (B, C, H, W).
        measure: What the objectives ``batch-mean`` and ``batch-kernel`` make large.
        checkpointed: Whether the network is computed again for every step's gradient, or its graph kept.

    No more than ``batch_size`` images are computed at a time.
    """

    config: AttackConfig
    trajectory: DifferentiableSampler
    images: Sequence[int]
    shape: tuple[int, ...]
    device: torch.device
    targets: Callable[[], Tensor]
    measure: FeatureDistance | None = None
    checkpointed: bool = True
    _ends: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    # -- the undisturbed images ------------------------------------------------------------------------

    @cached_property
    def _start(self) -> tuple[Tensor, list[Tensor | None]]:
        """Pure noise and the noise of every step, drawn as ``robustdiff sample`` draws them."""
        generators = image_generators(self.config.seed, self.images)
        x = draw_normal(torch.empty(len(self.images), *self.shape, device=self.device), generators)
        return x, self.trajectory.draw_noise(x, generators)

    @cached_property
    def attacked(self) -> tuple[int, ...]:
        """Sampler steps."""
        return self.config.attacked()

    @cached_property
    def state(self) -> Tensor:
        """Before the first attacked step."""
        x, noise = self._start
        return self._run(x, noise=noise, last=self.attacked[0])

    @cached_property
    def clean(self) -> Tensor:
        """The images as they would be, with the sampler's own noise, shape (B, C, H, W)."""
        return self._images(None, self._start[1])

    def _run(
        self,
        x: Tensor,
        omega: Tensor | None = None,
        *,
        noise: Sequence[Tensor | None],
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """The sampler without gradients, a few images at a time."""
        attacked, found = self.attacked if omega is not None else (), []
        with torch.no_grad(), frozen(self.trajectory.modules):
            for rows in self._parts():
                pushes, own = None if omega is None else omega[rows], [None if z is None else z[rows] for z in noise]
                part = self.trajectory.part(rows)
                found.append(part.run(x[rows], pushes, attacked, first=first, last=last, noise=own))
        return torch.cat(found)

    def _parts(self) -> list[slice]:
        step = self.config.batch_size
        return [slice(start, start + step) for start in range(0, len(self.images), step)]

    def _images(self, omega: Tensor | None, noise: Sequence[Tensor | None]) -> Tensor:
        """The final images, with a perturbation or without."""
        return self._run(self.state, omega, noise=noise, first=self.attacked[0])

    def _end(self, verdict: int) -> Tensor:
        """The undisturbed images under the noise that judges."""
        if verdict not in self._ends:
            self._ends[verdict] = self._images(None, self.verdict_noise(verdict))
        return self._ends[verdict]

    def _distance(self, images: Tensor) -> Tensor:
        """Squared, of the batch from the reference, shape ()."""
        assert self.measure is not None
        with torch.no_grad():
            return self.measure(torch.cat([self.measure.features(images[rows]) for rows in self._parts()]))

    @property
    def undisturbed_distance(self) -> float:
        """Of the undisturbed batch from the reference, root mean square over the verdicts; 0 if it is below."""
        squares = torch.stack([self._distance(self._end(i)) for i in range(self.verdicts)])
        return float(squares.mean().clamp(min=0).sqrt())

    @cached_property
    def target(self) -> Tensor:
        """What to come near."""
        return self.targets()

    # -- noise -----------------------------------------------------------------------------------------

    def _generators(self, *what: str | int) -> list[torch.Generator]:
        """One per image, a function of the image alone."""
        seeds = [derive_seed(*what, self.config.seed, image) for image in self.images]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    @property
    def blind(self) -> bool:
        """Whether the attacker does not know the noise."""
        return is_blind(self.config)

    def verdict_noise(self, i: int) -> Sequence[Tensor | None]:
        """The noise that judges, number i: the sampler's own if the attacker knows it, or one that he has not seen."""
        if not self.blind:
            return self._start[1]
        return self.trajectory.draw_noise(self.state, self._generators("verdict", i), first=self.attacked[0])

    @property
    def verdicts(self) -> int:
        """How many."""
        return (self.config.verdicts or VERDICTS) if self.blind else 1

    def _draws(self, eot: int | None) -> int:
        """Draws of the noise per gradient."""
        return (eot or self.config.eot or EOT) if self.blind else 1

    def _displacement(self, cell: str, eot: int | None = None) -> FinalImageShift:
        """The end-to-end objective under the noise that the attacker uses."""
        target = self.target if self.config.objective == "target" else None
        made: dict[str, Any] = {"target": target, "checkpointed": self.checkpointed}
        first, terms = self.attacked[0], self._draws(eot)
        if self.config.noise == "fresh":
            generators = self._generators("eot", cell)
            made |= {"terms": terms, "fresh": True}
            made["noise"] = lambda term: self.trajectory.draw_noise(self.state, generators, first=first)
        elif self.config.noise == "fixed":
            # drawn again each time, the same: held, twenty draws would be most of the memory
            made |= {"terms": terms}
            made["noise"] = lambda term: self.trajectory.draw_noise(
                self.state, self._generators("eot", term), first=first
            )
        else:
            made["noise"] = lambda term: self._start[1]
        return FinalImageShift(self.trajectory, self.state, self.attacked, **made)

    def objective(self, cell: str, eot: int | None = None) -> AttackGoal:
        """What ``objective`` says."""
        if self.config.objective in ("end-to-end", "target"):
            return self._displacement(cell, eot)
        if self.measure is not None:
            return BatchDistance(self._displacement(cell, eot), self.measure, self.config.batch_size)
        noise, x, here = self._start[1], self.state, self.attacked[0]
        states = []
        with torch.no_grad(), frozen(self.trajectory.modules):
            for k in self.attacked:
                x = self.trajectory.run(x, first=here, last=k, noise=noise)
                states.append(x)
                here = k
        return NoisePredictionShift(
            self.trajectory, states, self.attacked, "shift" if self.config.objective == "shift" else "residual"
        )

    def ball(self, factor: float | None) -> LpBall:
        """The constraint; None: huge, :data:`HUGE` in units of the data at every attacked step."""
        root = float(torch.Size(self.shape).numel()) ** 0.5
        if factor is None:
            sigmas = self.trajectory.sigmas(self.attacked, self.state)
            return LpBall(self.config.norm, HUGE / sigmas * (root if self.config.norm == "l2" else 1.0))
        return LpBall(self.config.norm, factor * radius(self.config, self.shape))

    # -- attacks ---------------------------------------------------------------------------------------

    def work(self, cell: Cell) -> int:
        """Network calls per image, about: a gradient is worth three (forward, backward), checkpoints one more."""
        remaining = len(self.trajectory.steps) - self.attacked[0]
        through = len(self.attacked) if self.config.objective in ("shift", "residual") else remaining
        terms = self._draws(cell.eot)
        with_gradient, without = cell.evaluations
        again = self.checkpointed and self.config.objective not in ("shift", "residual")
        price = 3 + again + (self.measure is not None and len(self._parts()) > 1)
        return (price * with_gradient + without) * through * terms + self.verdicts * remaining

    def run(self, cell: Cell, tell: Tell, replay: Replay | None = None) -> Outcome:
        """Attack these images.

        Args:
            cell: How.
            tell: Told of the work done, in all :meth:`work`; may raise.
            replay: To compare with, if the attacker knows the noise.

        Raises:
            ArithmeticError: If nothing finite was found, or the constraint is violated.
        """
        objective, ball = self.objective(cell.name, cell.eot), self.ball(cell.factor)
        total, (with_gradient, without) = self.work(cell), cell.evaluations
        told = 0

        def progress() -> None:
            nonlocal told
            share = total // (with_gradient + without + 1)
            told += share
            tell(share)

        like = self._displacement(cell.name).like
        # the same starts whatever the attack: what a longer one or a larger radius gains is not drowned by their chance
        found = cell.optimiser(objective, ball, like, self._generators("start"), progress)
        outcome = self._judge(found, ball, replay)
        tell(total - told)
        return outcome

    def _judge(self, found: AttackResult, ball: LpBall, replay: Replay | None) -> Outcome:
        squares, nearer, away, first = [], [], [], None
        for i in range(self.verdicts):
            reached = self._images(found.omega, self.verdict_noise(i))
            first = reached if first is None else first
            squares.append((reached - self._end(i)).square().flatten(1).sum(1))
            if self.config.objective == "target":
                gaps = [(self.target - images).square().flatten(1).sum(1) for images in (self._end(i), reached)]
                nearer.append(torch.stack(gaps))
            if self.measure is not None:
                away.append(self._distance(reached))
        assert first is not None
        mismatch = torch.tensor(float("nan"))
        if replay is not None and not self.blind:
            parts = [replay(self.images[rows], found.omega[rows]) for rows in self._parts()]
            mismatch = (torch.cat(parts) - first.cpu()).abs().max()
        moved = torch.stack(squares).mean(0).sqrt()
        score = moved if self.config.objective == "end-to-end" else found.value.clamp(min=0).sqrt()
        if nearer:
            before, left = torch.stack(nearer).mean(0).sqrt()
            score = before - left
        if away:
            gained = torch.stack(away).mean().clamp(min=0).sqrt() - self.undisturbed_distance
            score = gained.expand(len(moved))
        return Outcome(
            moved.double(),
            score.double(),
            found.trace.double(),
            found.restarts.double(),
            ((first / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8),
            ball.excess(found.omega).double(),
            mismatch.double(),
        )

    def check(self) -> list[Flag]:
        """The flags about gradients, on these images: give few."""
        noise, held = self._start[1], self.checkpointed
        objective: AttackGoal = FinalImageShift(
            self.trajectory, self.state, self.attacked, lambda term: noise, checkpointed=held
        )
        if self.measure is not None:
            known = FinalImageShift(self.trajectory, self.state, self.attacked, lambda term: noise, checkpointed=held)
            objective = BatchDistance(known, self.measure, self.config.batch_size)
        elif self.config.objective not in ("end-to-end", "target"):
            objective = self.objective("check")
        like, ball = self._displacement("check").like, self.ball(1.0)
        with frozen(self.trajectory.modules):
            flags = check_gradient(objective, ball, like, self._generators("check"))
            last = self.attacked[-1]
            few = dataclasses.replace(self.trajectory, steps=self.trajectory.steps[: last + CHECKED_STEPS], clamp=False)
            with torch.no_grad():
                x = self.trajectory.run(self.state, first=self.attacked[0], last=last, noise=noise)
            short = FinalImageShift(few, x, [last], lambda term: noise)
            flags.append(
                check_checkpointing(short, LpBall("linf", 0.1).draw(short.like, self._generators("checkpoints")))
            )
        return flags
