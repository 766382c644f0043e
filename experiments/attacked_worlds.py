"""Is any training robust end to end, once shrinking is divided out? Samplers of worlds whose truth is known, attacked.

    python experiments/attacked_worlds.py --output attacked --results experiments/results/attacked

For every method: its error on clean data, and how far the final draw moves, in generated spreads, when the start of the
trajectory is moved: by random noise, by PGD at the start, by PGD at all steps. Beside it the bound of docs/theory.md
T14, which no generator of that spread can beat. Networks are kept in ``--output``, every row and seed in
``--results``: what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff import PGD, AdversarialPerturbation, Ball, Displacement, PlainObjective, durable, linear
from robustdiff.attack import RandomSearch
from robustdiff.calling import Model
from robustdiff.corruption import derive_seed
from robustdiff.objective import LossTerms, mean_square
from robustdiff.process import Generators, NoiseProcess, draw_normal
from robustdiff.reproduce.measuring import (
    ImageOptions,
    build_world,
    dimension,
    floor_of,
    free_choices,
    judge,
    training_for,
    training_set,
)
from robustdiff.reproduce.rows import FRONTIER, MAIN, METHODS, Method, Row, equivariant
from robustdiff.reproduce.running import Denoiser, load, process_for, save, train
from robustdiff.reproduce.working import trained_network
from robustdiff.trajectory import Trajectory
from robustdiff.version import __version__

CALLS, POINTS, DRAWS = 50, 128, 2000
"""Sampler steps; trajectories attacked; draws for spread and bound."""
RADIUS, RADIUS_ALL, STEPS, RESTARTS = 0.1, 0.01, 40, 2
"""L_inf in units of the noise scale, at the start alone and at each of all steps; PGD."""
RHO = 0.1
"""Of the random move x' = sqrt(1 - rho^2) x + rho z, which leaves the law of the start as it is."""


@dataclass(frozen=True)
class Unrolled:
    """The denoising loss, and how far an adversarial push of the start moves the end of a short sampler.

    Args:
        process: Noise process.
        strength: Of the penalty ``mean ||G(x + w) - G(x)||^2 / radius^2``.
        radius: Of w, one sign-gradient step from a random start in the box.
        calls: Steps of the unrolled DDIM.
    """

    process: NoiseProcess
    strength: float = 1.0
    radius: float = 0.3
    calls: int = 5

    def __call__(self, model: Model, x0: Tensor, generator: Generators = None) -> LossTerms:
        """Loss terms of a batch, (B, d)."""
        terms = PlainObjective(self.process)(model, x0, generator=generator)
        trajectory = Trajectory.of(model, self.process, "ddim", self.calls)
        x, start = draw_normal(x0, generator), draw_normal(x0, generator)
        end = trajectory.run(x)
        leaf = (self.radius * start.clamp(-1, 1)).requires_grad_()
        (slope,) = torch.autograd.grad((trajectory.run(x + leaf) - end.detach()).square().sum(), leaf)
        moved = trajectory.run(x + (leaf.detach() + self.radius * slope.sign()).clamp(-self.radius, self.radius))
        penalty = mean_square(moved - end) / self.radius**2
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
            lambda process, m=m: Unrolled(process, m),  # type: ignore[misc,return-value]
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
EXACT, CONTROL = "ideal", ("plain-epsilon", "invariance")
PAPER = ("random", "adversarial-shift", "adversarial-residual")
GATES = ("preset", "gated-low")
SWEPT = ("constant-m0.3", "constant-m1", "constant-m3", "adversarial-c0.2-m3", "adversarial-c0.2-m10")
PLAN: dict[str, tuple[tuple[str, int], ...]] = {
    "plane": tuple(
        (name, 3) for name in (EXACT, "plain", *FREE, *CONTROL, *PAPER, *GATES, *SWEPT, "pseudo-huber", *OWN)
    ),
    "ring": tuple(
        (name, 3) for name in (EXACT, "plain", *FREE, "adversarial-shift", "constant-m1", "adversarial-everywhere-m1")
    )
    + tuple((name, 1) for name in ("pseudo-huber", "gated-low", *CONTROL)),
    "subspace": tuple((name, 3) for name in (EXACT, "plain", *FREE, "adversarial-shift", *GATES, "pseudo-huber"))
    + tuple((name, 1) for name in ("random", "adversarial-residual", *CONTROL, "constant-m1"))
    + (("adversarial-everywhere-m1", 1),),
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
    training, process = training_for(world, False), process_for(method.prediction)
    x0, _ = training_set(world, "clean", training, seed)
    path = folder / "networks" / f"{world_name}-clean-{name}-seed{seed}.safetensors"
    about = [str(training), dict(method.settings), seed, list(x0.shape)]
    there = load(path, x0.shape[1], training, about)
    if there is None:
        started = time.perf_counter()
        there = train(method.objective(process), x0, training, seed), time.perf_counter() - started
        save(there[0], path, about, there[1])
    return Denoiser(there[0], process, there[1])


def measure(world_name: str, name: str, seed: int, folder: Path) -> dict[str, float]:
    """Every number of one row and seed.

    ``error`` is the world's main one on clean data. ``spread`` is the generated deviation over the true one; all
    displacements are root mean squares in units of the generated deviation.
    """
    world = build_world(world_name)
    training, kind = training_for(world, False), FREE.get(name, (None, 1.0))
    denoiser = network(world_name, "plain" if name in FREE else name, seed, folder)
    change: Callable[[Tensor], Tensor] = _same
    if kind[0] is not None:
        denoiser, change = free_choices(kind[0], denoiser)[kind[1]]
    error = judge(world, denoiser, training, seed, change)[MAIN[world_name]]
    # Shrinking scales a displacement and the spread alike: what is divided by the spread is that of the plain network
    trajectory = Trajectory.of(denoiser.model, denoiser.process, "ddim", CALLS)
    generator = torch.Generator().manual_seed(derive_seed("attacked", seed))
    x = draw_normal(torch.empty(DRAWS, dimension(world)), generator)
    with torch.no_grad():
        end = trajectory.run(x).double()
        jump = trajectory.run((1 - RHO**2) ** 0.5 * x + RHO * draw_normal(x, generator)).double() - end
    spread = float(end.var(0).sum().sqrt())
    true = world.sample(50_000, torch.Generator().manual_seed(0)).flatten(1).double().var(0).sum().sqrt()
    found = {
        "error": error,
        "spread": (kind[1] if kind[0] == "shrink" else 1.0) * spread / float(true),
        "random": float(jump.square().sum(1).mean().sqrt()) / spread,
    }
    for key, attacked, radius in (("start", (0,), RADIUS), ("all", tuple(range(CALLS)), RADIUS_ALL)):
        objective = Displacement(trajectory, x[:POINTS], attacked, checkpointed=False)
        ball = Ball("linf", radius)
        found |= {
            f"{word}_{key}": float(attack(objective, ball, objective.like, generator).value.double().mean().sqrt())
            / spread
            for word, attack in (("signs", RandomSearch(1)), ("pgd", PGD(STEPS, restarts=RESTARTS)))
        }
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
    path = results / f"{world_name}-{name}.json"
    runs = durable.read_json(path)["runs"] if path.is_file() else {}
    for seed in map(str, range(seeds)):
        if seed not in runs:
            started = time.perf_counter()
            runs[seed] = measure(world_name, name, int(seed), folder)
            world, training = build_world(world_name), training_for(build_world(world_name), False)
            body = {
                "what": "end-to-end attacks on samplers of a known world, clean training data",
                "world": world_name,
                "method": name,
                "title": title_of(name),
                "settings": {
                    "attack": f"L_inf {RADIUS} at the start, {RADIUS_ALL} at all steps, PGD-{STEPS} x {RESTARTS}",
                    "sampler": f"ddim, trailing, {CALLS} calls, nothing clipped",
                    "points": POINTS,
                    "draws": DRAWS,
                    "rho": RHO,
                },
                "bound": linear.displacement_bound(RHO),
                "floor": floor_of(world, training, 0)[MAIN[world_name]],
                "n": training.samples,
                "runs": runs,
                "version": __version__,
                "torch": torch.__version__.split("+")[0],
            }
            durable.write_json(path, body)
            print(
                f"{world_name}-{name}, seed {seed}: {json.dumps({k: round(v, 4) for k, v in runs[seed].items()})}"
                f" ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
    return durable.read_json(path)


COLUMNS = {
    "error": "error on clean data",
    "spread": "spread (true = 1)",
    "random": "moved by noise / bound",
    "pgd_start": "PGD at the start",
    "pgd_all": "PGD at all steps",
}


def table(results: Path, world_name: str) -> str:
    """The rows of a world as a table, in the order of the plan."""
    lines = [f"| {world_name} | seeds | {' | '.join(COLUMNS.values())} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for path in sorted(results.glob(f"{world_name}-*.json"))[:1]:
        lines.append(f"| floor: as many real draws | 1 | {durable.read_json(path)['floor']:.3g} | 1 | - | - | - |")
    for name, _ in PLAN[world_name]:
        path = results / f"{world_name}-{name}.json"
        if path.is_file():
            found = durable.read_json(path)
            runs = list(found["runs"].values())
            cells = []
            for key in COLUMNS:
                values = [run[key] / (found["bound"] if key == "random" else 1) for run in runs]
                spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.3g}{spread}")
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
