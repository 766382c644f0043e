"""Is any training robust end to end, once shrinking is divided out? Samplers of worlds whose truth is known, attacked.

    python -m experiments.attacked_worlds --output attacked --results experiments/results/attacked

For every method: its error on clean data, and how far the final draw moves, in generated spreads, when the start of the
trajectory is moved: by random noise, by PGD at the start, by PGD at all steps. Beside it the bound T14 of
docs/explanation/theory.md, which no generator of that spread can beat. Networks are kept in ``--output``, every row and
seed in ``--results``: what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.paper import linear
from experiments.paper.errors import (
    ImageOptions,
    build_world,
    dimension,
    floor_of,
    free_choices,
    judge,
    training_for,
    training_set,
)
from experiments.paper.toy_grid import FRONTIER, MAIN, METHODS, Method, Row, equivariant
from experiments.paper.toy_training import Denoiser, load, save, schedule_for, train
from experiments.paper.worker import trained_network
from robustdiff import __version__
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import FinalImageShift
from robustdiff.attacks.optimizers import APGD, PGD, RandomSearch
from robustdiff.diffusion.model import Model
from robustdiff.diffusion.samplers import DifferentiableSampler
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.denoising import DenoisingLoss, LossOutput
from robustdiff.losses.perturbation import AdversarialPerturbation
from robustdiff.utils import atomic_io
from robustdiff.utils.random import Generators, draw_normal
from robustdiff.utils.seeds import derive_seed

RHO = 0.1
"""Of the random move x' = sqrt(1 - rho^2) x + rho z, which leaves the law of the start as it is."""


@dataclass(frozen=True)
class Attacks:
    """What is done to a DDIM sampler.

    Attributes:
        calls: Sampler steps.
        points: Trajectories attacked.
        draws: For the spread and the random move; the attacked ones are the first of them.
        radius: L_inf in units of the noise scale, at the start alone; radius_all: at each of all steps.
        steps: Of the optimiser; restarts: likewise.
        optimiser: ``"pgd"`` or ``"apgd"``.
    """

    calls: int = 50
    points: int = 128
    draws: int = 2000
    radius: float = 0.1
    radius_all: float = 0.01
    steps: int = 40
    restarts: int = 2
    optimiser: Literal["pgd", "apgd"] = "pgd"

    def settings(self, clipping: str) -> dict[str, Any]:
        """For a row's file."""
        often = f" x {self.restarts}" if self.restarts > 1 else ""
        return {
            "attack": f"L_inf {self.radius} at the start, {self.radius_all} at all steps, "
            f"{self.optimiser.upper()}-{self.steps}{often}",
            "sampler": f"ddim, trailing, {self.calls} calls, {clipping}",
            "points": self.points,
            "draws": self.draws,
            "rho": RHO,
        }


ATTACKS = Attacks()


@dataclass(frozen=True)
class Unrolled:
    """The denoising loss, and how far an adversarial push of the start moves the end of a short sampler.

    Args:
        schedule: Noise schedule.
        strength: Of the penalty ``mean ||G(x + w) - G(x)||^2 / radius^2``.
        radius: Of w, one sign-gradient step from a random start in the box.
        calls: Steps of the unrolled DDIM.
    """

    schedule: NoiseSchedule
    strength: float = 1.0
    radius: float = 0.3
    calls: int = 5

    def __call__(self, model: Model, x0: Tensor, generator: Generators = None) -> LossOutput:
        """Loss terms of a batch, (B, d)."""
        terms = DenoisingLoss(self.schedule)(model, x0, generator=generator)
        trajectory = DifferentiableSampler.of(model, self.schedule, "ddim", self.calls)
        x, start = draw_normal(x0, generator), draw_normal(x0, generator)
        end = trajectory.run(x)
        leaf = (self.radius * start.clamp(-1, 1)).requires_grad_()
        (slope,) = torch.autograd.grad((trajectory.run(x + leaf) - end.detach()).square().sum(), leaf)
        moved = trajectory.run(x + (leaf.detach() + self.radius * slope.sign()).clamp(-self.radius, self.radius))
        penalty = (moved - end).square().flatten(1).mean(1) / self.radius**2
        return replace(terms, total=terms.total + self.strength * penalty)


def _everywhere(m: float, steps: int) -> Method:
    word = "one step" if steps == 1 else f"{steps} steps"
    return Method(
        f"adversarial ({word}), r = 1, m = {m:g}",
        f"equivariance to noise that ascends the residual, {word}, radius 1, at every noise level",
        equivariant(m, AdversarialPerturbation(steps=steps, inner="residual")),
        settings={"perturbation": f"adversarial residual, {word}, r = 1", "m": m},
    )


OWN: dict[str, Method] = {
    **{f"adversarial-everywhere-m{m:g}": _everywhere(m, 1) for m in (0.3, 1.0)},
    "adversarial-10-steps-m1": _everywhere(1.0, 10),
    **{
        f"unrolled-m{m:g}": Method(
            f"end to end, unrolled, strength {m:g}",
            "the end of a five-step sampler must not follow an adversarial push of its start",
            lambda schedule, m=m: Unrolled(schedule, m),  # type: ignore[misc,return-value]
            settings={"unrolled": 5, "radius": 0.3, "strength": m},
        )
        for m in (0.1, 1.0)
    },
}
FREE: dict[str, tuple[str, float]] = {
    **{f"relabelled-{f:g}": ("relabel", f) for f in (1.2, 1.41, 2.0)},
    **{f"label-floor-{f:g}": ("label_floor", f) for f in (0.1, 0.3)},
    "shrunk-0.9": ("shrink", 0.9),
}
EXACT, CONTROL, EVERYWHERE = "ideal", ("plain-epsilon", "invariance"), "adversarial-everywhere-m1"
PAPER = ("random", "adversarial-shift", "adversarial-residual")
GATES = ("preset", "gated-low")
SWEPT = ("constant-m0.3", "constant-m1", "constant-m3", "adversarial-c0.2-m3", "adversarial-c0.2-m10")
PLAN: dict[str, tuple[tuple[str, int], ...]] = {
    "plane": tuple(
        (name, 3) for name in (EXACT, "plain", *FREE, *CONTROL, *PAPER, *GATES, *SWEPT, "pseudo-huber", *OWN)
    ),
    "ring": tuple(
        (name, 3) for name in (EXACT, "plain", *FREE, "invariance", *PAPER, "pseudo-huber", "constant-m1", EVERYWHERE)
    )
    + tuple((name, 1) for name in ("plain-epsilon", "gated-low")),
    "subspace": tuple((name, 3) for name in (EXACT, "plain", *FREE, *CONTROL, *PAPER, *GATES, "pseudo-huber"))
    + tuple((name, 1) for name in ("constant-m1", EVERYWHERE)),
}
"""Rows of each world, with their seeds."""


def network(world_name: str, name: str, seed: int, folder: Path) -> Denoiser:
    """A method's network, trained on clean data unless it is there."""
    if name not in OWN:
        row = Row(world_name if world_name != "ring" else "mixture", world_name, "clean", name, 1)
        found = trained_network(row, seed, False, ImageOptions(), folder)
        assert found is not None  # nobody told it to stop
        return found
    method, world = OWN[name], build_world(world_name)
    training, schedule = training_for(world, False), schedule_for(method.prediction)
    x0, _ = training_set(world, "clean", training, seed)
    path = folder / "networks" / f"{world_name}-clean-{name}-seed{seed}.safetensors"
    about = [str(training), dict(method.settings), seed, list(x0.shape)]
    there = load(path, x0.shape[1], training, about)
    if there is None:
        started = time.perf_counter()
        there = train(method.objective(schedule), x0, training, seed), time.perf_counter() - started
        save(there[0], path, about, there[1])
    return Denoiser(there[0], schedule, there[1])


def measure(world_name: str, name: str, seed: int, folder: Path) -> dict[str, float | None]:
    """Every number of one row and seed.

    ``error`` is the world's main one on clean data. ``spread`` is the generated deviation over the true one; all
    displacements are root mean squares in units of the generated deviation. None: see :func:`displacements`.
    """
    world = build_world(world_name)
    training, kind = training_for(world, False), FREE.get(name, (None, 1.0))
    denoiser = network(world_name, "plain" if name in FREE else name, seed, folder)
    change: Callable[[Tensor], Tensor] = _same
    if kind[0] is not None:
        denoiser, change = free_choices(kind[0], denoiser)[kind[1]]
    error = judge(world, denoiser, training, seed, change)[MAIN[world_name]]
    trajectory = DifferentiableSampler.of(denoiser.model, denoiser.schedule, "ddim", ATTACKS.calls)
    generator = torch.Generator().manual_seed(derive_seed("attacked", seed))
    true = world.sample(50_000, torch.Generator().manual_seed(0)).flatten(1).double().var(0).sum().sqrt()
    # Shrinking scales a displacement and the spread alike: what is divided by the spread is that of the plain network
    unit = float(true) / (kind[1] if kind[0] == "shrink" else 1.0)
    return {"error": error} | displacements(trajectory, (dimension(world),), ATTACKS, generator, unit)


def displacements(
    trajectory: DifferentiableSampler, shape: Sequence[int], attacks: Attacks, generator: torch.Generator, true: float
) -> dict[str, float | None]:
    """The generated spread over the true one, and how far final draws move: root mean squares in generated spreads.

    All are None of a sampler that runs away: some of its draws, attacked by nobody, are not finite.

    Args:
        trajectory: The sampler, of ``attacks.calls`` steps.
        shape: Of one draw.
        attacks: What is done.
        generator: Rules the starts and the attacks.
        true: Spread of the data.
    """
    x = draw_normal(torch.empty(attacks.draws, *shape), generator)
    with torch.no_grad():
        end = trajectory.run(x).double()
        jump = trajectory.run((1 - RHO**2) ** 0.5 * x + RHO * draw_normal(x, generator)).double() - end
    spread = float(end.flatten(1).var(0).sum().sqrt())
    if not bool(torch.isfinite(end).all() and torch.isfinite(jump).all()):
        moved = [f"{word}_{where}" for where in ("start", "all") for word in ("signs", attacks.optimiser)]
        return dict.fromkeys(("spread", "random", *moved))
    found: dict[str, float | None] = {
        "spread": spread / true,
        "random": float(jump.flatten(1).square().sum(1).mean().sqrt()) / spread,
    }
    everywhere, ascent = tuple(range(attacks.calls)), {"pgd": PGD, "apgd": APGD}[attacks.optimiser]
    for key, attacked, radius in (("start", (0,), attacks.radius), ("all", everywhere, attacks.radius_all)):
        objective = FinalImageShift(trajectory, x[: attacks.points], attacked, checkpointed=False)
        optimiser = ascent(attacks.steps, restarts=attacks.restarts)
        for word, attack in (("signs", RandomSearch(1)), (attacks.optimiser, optimiser)):
            value = attack(objective, LpBall("linf", radius), objective.like, generator).value
            found[f"{word}_{key}"] = float(value.double().mean().sqrt()) / spread
    return found


def _same(x: Tensor) -> Tensor:
    return x


def title_of(name: str) -> str:
    """As the table calls a row."""
    if name in FREE:
        kind, setting = FREE[name]
        return f"plain, {dict(relabel='relabelled x', label_floor='label floor', shrink='shrunk x')[kind]} {setting:g}"
    return {**METHODS, **FRONTIER, **OWN}[name].title


def row(world_name: str, name: str, seeds: int, folder: Path, results: Path) -> dict[str, Any]:
    """One row's file, brought up to ``seeds``."""
    world, training = build_world(world_name), training_for(build_world(world_name), False)
    about = {
        "what": "end-to-end attacks on samplers of a known world, clean training data",
        "world": world_name,
        "method": name,
        "title": title_of(name),
        "settings": ATTACKS.settings("nothing clipped"),
    }
    return keep(
        results / f"{world_name}-{name}.json",
        seeds,
        lambda seed: measure(world_name, name, seed, folder),
        about,
        lambda: {"floor": floor_of(world, training, 0)[MAIN[world_name]], "n": training.samples},
    )


def keep(
    path: Path,
    seeds: int,
    measure: Callable[[int], dict[str, float | None]],
    about: Mapping[str, Any],
    judged: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """A row's file, brought up to so many seeds.

    Args:
        path: The file.
        seeds: How many, from 0.
        measure: Every number of a seed.
        about: What the row is.
        judged: ``floor`` and ``n`` of the error.
    """
    runs = atomic_io.read_json(path)["runs"] if path.is_file() else {}
    for seed in map(str, range(seeds)):
        if seed not in runs:
            started = time.perf_counter()
            runs[seed] = measure(int(seed))
            body = {
                **about,
                "bound": linear.displacement_bound(RHO),
                **judged(),
                "runs": runs,
                "version": __version__,
                "torch": torch.__version__.split("+")[0],
            }
            atomic_io.write_json(path, body)
            words = json.dumps({key: value and round(value, 4) for key, value in runs[seed].items()})
            print(f"{path.stem}, seed {seed}: {words} ({time.perf_counter() - started:.0f} s)", flush=True)
    return atomic_io.read_json(path)


COLUMNS = {"error": "error on clean data", "spread": "spread (true = 1)", "random": "moved by noise / bound"}
WHERE = {"start": "the start", "all": "all steps"}


def table(
    results: Path,
    world_name: str,
    names: Sequence[str] | None = None,
    against: str | None = None,
    optimiser: str = "pgd",
) -> str:
    """The rows of a world as a table.

    Args:
        results: Folder of the rows.
        world_name: See :data:`PLAN`, or any other with ``names``.
        names: Methods in their order; default: that of the plan.
        against: A method; one more column then says between which percentages the others are moved farther, seed by
            seed, by the attack at the start and at all steps.
        optimiser: Of the attack that the rows are of.
    """
    attacked = [f"{optimiser}_{key}" for key in WHERE]
    columns = COLUMNS | {f"{optimiser}_{key}": f"{optimiser.upper()} at {where}" for key, where in WHERE.items()}
    heads = [*columns.values(), *([f"against {against}, start / all"] if against else [])]
    lines = [f"| {world_name} | seeds | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for path in sorted(results.glob(f"{world_name}-*.json"))[:1]:
        empty = " | ".join("-" * (len(heads) - 2))
        lines.append(f"| floor: as many real draws | 1 | {atomic_io.read_json(path)['floor']:.3g} | 1 | {empty} |")
    for name in [name for name, _ in PLAN[world_name]] if names is None else names:
        path = results / f"{world_name}-{name}.json"
        if path.is_file():
            found = atomic_io.read_json(path)
            runs = list(found["runs"].values())
            cells = []
            for key in columns:
                values = [run[key] / (found["bound"] if key == "random" else 1) for run in runs if run[key] is not None]
                spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
                whole = len(values) == len(runs)
                cells.append(f"{statistics.fmean(values):.3g}{spread}" if whole else "not finite")
            if against:
                others, parts = atomic_io.read_json(results / f"{world_name}-{against}.json")["runs"], []
                for key in attacked:
                    pairs = [(run[key], others[seed][key]) for seed, run in found["runs"].items()]
                    percent = [100 * (a / b - 1) for a, b in pairs if a is not None and b is not None]
                    whole = len(percent) == len(pairs)
                    parts.append(f"{min(percent):+.0f} … {max(percent):+.0f} %" if whole else "not finite")
                cells.append("-" if name == against else " / ".join(parts))
            lines.append(f"| {found['title']} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("attacked"), help="folder of the networks")
    parser.add_argument("--results", type=Path, help="folder of the rows; default: OUTPUT/results")
    parser.add_argument("--worlds", nargs="*", choices=list(PLAN), default=list(PLAN))
    parser.add_argument("--seeds", type=int, help="at most so many per row; default: as planned")
    parser.add_argument("--rows", nargs="*", default=[], help="only these methods")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = arguments.results or arguments.output / "results"
    results.mkdir(parents=True, exist_ok=True)
    for world_name in arguments.worlds:
        for name, seeds in PLAN[world_name]:
            if arguments.rows and name not in arguments.rows:
                continue
            row(world_name, name, min(seeds, arguments.seeds or seeds), arguments.output, results)
        print(table(results, world_name))


if __name__ == "__main__":
    main()
