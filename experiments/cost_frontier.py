"""How much of the regulariser's effect is left when most of its second pass is saved: the plane, three seeds.

    python -m experiments.cost_frontier --output experiments/results/cost_frontier.json    # an hour on one core

The full regularisers are the presets ``paper-random`` and ``paper`` (radius in units of the state). Each is thinned:
only below a noise level; a share of the batch or every k-th step, with the strength raised in return; the perturbation
taken from the gradient of the denoising loss (docs/explanation/theory.md T12); only in the last part of training.

Effect: the share of the full regulariser's fall in the draws' distance to the plane, nine tenths of the training points
being noised (sigma 0.2). Price: the rise of W2 on clean data, as a share of the full one's. Cost: passes through the
network by T12, plain training being 3, with the share of the timesteps below the noise level. Same network, length and
draws as ``python -m experiments.paper plane --quick``. A variant that is in the file is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.paper.errors import build_world, judge, training_set
from experiments.paper.toy_grid import POINTS
from experiments.paper.toy_training import Denoiser, schedule_for, train
from robustdiff import __version__
from robustdiff.diffusion.model import Model, call_model
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses import DenoisingLoss, EquivarianceLoss, SigmaRange
from robustdiff.losses.ambient import NoisyBatch
from robustdiff.losses.denoising import LossOutput
from robustdiff.utils import atomic_io
from robustdiff.utils.random import Generators
from robustdiff.utils.seeds import derive_seed
from robustdiff.utils.tensors import expand_to

TRAINING = POINTS.short
STRENGTH = 0.3
DIRTS = ("inlier", "clean", "outliers")


@dataclass(frozen=True)
class Thinned(EquivarianceLoss):
    """The regulariser of some images, some steps, or the last part of training, stronger in return.

    Args:
        share: Share of the images of a step.
        every: One step of how many.
        last: Share of the training, at its end.
        steps: Length of the training.
    """

    share: float = 1.0
    every: int = 1
    last: float = 1.0
    steps: int = 0
    _at: list[int] = field(default_factory=lambda: [0, 0], init=False, repr=False, compare=False)

    def _terms(
        self, model: Model, noised: NoisyBatch, output: Tensor, generator: Generators, kwargs: dict[str, Any]
    ) -> LossOutput:
        step = self._at[0]
        self._at[0] += 1
        if step % self.every or step < self.steps * (1 - self.last):
            plain = DenoisingLoss._terms(self, model, noised, output, generator, kwargs)
            return replace(plain, total=self._weight(noised.t, output.dtype) * plain.total) if self._is_on else plain
        return super()._terms(model, noised, output, generator, kwargs)

    @property
    def _is_on(self) -> bool:
        """Whether the levels are normalised in this step: not before the last part begins."""
        return self._at[0] > self.steps * (1 - self.last)

    def _taking_part(self, t: Tensor, dtype: torch.dtype) -> Tensor | None:
        inside = super()._taking_part(t, dtype)
        inside = torch.arange(len(t)) if inside is None else inside
        if self.share < 1:
            self._at[1] += 1
            draw = torch.rand(len(t), generator=torch.Generator().manual_seed(self._at[1]))
            inside = inside[draw[inside] < self.share]
        return inside if len(inside) < len(t) else None

    def _regulariser(self, *arguments: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - passed through
        return super()._regulariser(*arguments, **kwargs) * (self.every / self.share)


@dataclass(frozen=True)
class Shared(EquivarianceLoss):
    """Omega along the sign of the gradient of the denoising loss, which the clean backward pass gives anyway."""

    def _regulariser(
        self,
        model: Model,
        noised: NoisyBatch,
        output: Tensor,
        radius: Tensor,
        generator: Generators,
        kwargs: dict[str, Any],
    ) -> Tensor:
        with torch.enable_grad():
            x_t = noised.x_t.detach().requires_grad_()
            loss = (call_model(model, x_t, noised.t, kwargs) - noised.target).square().sum()
            (gradient,) = torch.autograd.grad(loss, x_t)
        omega = expand_to(radius, x_t) * gradient.sign()
        perturbed = call_model(model, self.schedule.perturb(noised.x_t, omega, noised.t), noised.t, kwargs)
        squares = self._penalised(noised, output, perturbed, omega, noised.t).square()
        return squares.flatten(1).mean(1)


@dataclass(frozen=True)
class Variant:
    """A way of saving passes.

    Attributes:
        what: For the table.
        preset: The full regulariser.
        below: Noise level sigma/alpha above which there is none.
        kind: The class of the loss.
        settings: Its further fields.
        cost: Passes over those of plain training, given the share of timesteps below the level.
    """

    what: str
    preset: str
    below: float = float("inf")
    kind: type[EquivarianceLoss] = EquivarianceLoss
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: Callable[[float], float] = lambda q: 1 + q

    def loss(self, schedule: NoiseSchedule) -> EquivarianceLoss:
        """The loss."""
        strength = STRENGTH if self.below == float("inf") else SigmaRange(0.0, self.below, STRENGTH)
        return self.kind.preset(self.preset, schedule, strength=strength, **self.settings)


def _adversarial(q: float) -> float:
    return 1 + 5 / 3 * q


VARIANTS: dict[str, Variant] = {
    "random": Variant("random, full", "paper-random"),
    **{f"random-c{c:g}": Variant(f"random, below {c:g}", "paper-random", c) for c in (0.1, 0.2, 0.3, 0.5, 1.0)},
    "random-share0.25": Variant(
        "random, a quarter of the batch, 4 times as strong",
        "paper-random",
        kind=Thinned,
        settings={"share": 0.25},
        cost=lambda q: 1 + q / 4,
    ),
    "random-every4": Variant(
        "random, every 4th step, 4 times as strong",
        "paper-random",
        kind=Thinned,
        settings={"every": 4},
        cost=lambda q: 1 + q / 4,
    ),
    "random-c0.5-share0.5": Variant(
        "random, below 0.5, half of those images, twice as strong",
        "paper-random",
        0.5,
        kind=Thinned,
        settings={"share": 0.5},
        cost=lambda q: 1 + q / 2,
    ),
    "random-last0.25": Variant(
        "random, the last quarter of training",
        "paper-random",
        kind=Thinned,
        settings={"last": 0.25, "steps": TRAINING.steps},
        cost=lambda q: 1 + q / 4,
    ),
    "adversarial": Variant("adversarial, full", "paper", cost=_adversarial),
    **{
        f"adversarial-c{c:g}": Variant(f"adversarial, below {c:g}", "paper", c, cost=_adversarial)
        for c in (0.1, 0.2, 0.3, 0.5)
    },
    "adversarial-every4": Variant(
        "adversarial, every 4th step, 4 times as strong",
        "paper",
        kind=Thinned,
        settings={"every": 4},
        cost=lambda q: 1 + 5 / 12 * q,
    ),
    "shared": Variant("along the denoising loss's gradient, full", "paper", kind=Shared),
    "shared-c0.5": Variant("along the denoising loss's gradient, below 0.5", "paper", 0.5, kind=Shared),
}


def share_below(schedule: NoiseSchedule, level: float) -> float:
    """Share of the timesteps whose sigma/alpha is at most ``level``."""
    return float((schedule.noise_to_signal(torch.arange(schedule.num_timesteps)) <= level).float().mean())


def measure(loss: DenoisingLoss, dirt: str, seed: int) -> dict[str, float]:
    """Train on the plane and judge."""
    world = build_world("plane")
    x0, _ = training_set(world, dirt, TRAINING, seed)
    started = time.perf_counter()
    model = train(loss, x0, TRAINING, seed)
    found = judge(world, Denoiser(model, loss.schedule), TRAINING, seed)  # type: ignore[arg-type]
    return {**found, "seconds": round(time.perf_counter() - started, 2)}


def main() -> None:
    """Fill the file, variant by variant, first seeds first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; what it holds is not done again")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 (default: 3)")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schedule = schedule_for("v_prediction")
    found: dict[str, Any] = {"runs": {}}
    if arguments.output.exists():
        found = json.loads(arguments.output.read_text())
    found |= {"world": "plane", "dirts": list(DIRTS), "version": __version__, "torch": torch.__version__.split("+")[0]}
    found |= {"training": {"points": TRAINING.points, "steps": TRAINING.steps, "batch_size": TRAINING.batch_size}}
    names = ["plain", *(arguments.variants or VARIANTS)]
    for seed in range(arguments.seeds):
        for dirt in DIRTS:
            for name in names:
                key = f"{name}/{dirt}/{seed}"
                if key in found["runs"]:
                    continue
                loss = DenoisingLoss(schedule) if name == "plain" else VARIANTS[name].loss(schedule)
                with torch.random.fork_rng([]):
                    torch.manual_seed(derive_seed("cost frontier", seed))
                    found["runs"][key] = measure(loss, dirt, seed)
                atomic_io.write_json(arguments.output, found)
                print(key, {k: round(v, 4) for k, v in found["runs"][key].items()}, flush=True)
    print(table(found), end="")


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a variant: cost, effect and price, means over the seeds that all variants have."""
    schedule, runs, made = schedule_for("v_prediction"), found["runs"], []

    def mean(name: str, dirt: str, key: str, seeds: Sequence[str]) -> float:
        return statistics.fmean(runs[f"{name}/{dirt}/{seed}"][key] for seed in seeds)

    for name, variant in VARIANTS.items():
        full = "random" if name.startswith("random") else "adversarial"
        seeds = sorted({key.split("/")[2] for key in runs if key.startswith(f"{name}/")})
        seeds = [s for s in seeds if all(f"{n}/{d}/{s}" in runs for n in ("plain", full, name) for d in DIRTS)]
        if not seeds:
            continue
        effects = [
            (runs[f"plain/inlier/{s}"]["distance"] - runs[f"{name}/inlier/{s}"]["distance"])
            / (runs[f"plain/inlier/{s}"]["distance"] - runs[f"{full}/inlier/{s}"]["distance"])
            for s in seeds
        ]
        q = share_below(schedule, variant.below)
        made.append(
            {
                "variant": name,
                "what": variant.what,
                "cost": variant.cost(q),
                "effect": statistics.fmean(effects),
                "deviation": statistics.stdev(effects) if len(effects) > 1 else None,
                "distance": mean(name, "inlier", "distance", seeds),
                **{f"w2 {dirt}": mean(name, dirt, "w2", seeds) for dirt in DIRTS},
                "seeds": len(seeds),
            }
        )
    return made


def table(found: Mapping[str, Any]) -> str:
    """The rows in markdown."""
    lines = ["| regulariser | passes | effect | off the plane, noised | W2 noised | W2 clean | W2 outliers | seeds |"]
    lines.append("|:--|--:|--:|--:|--:|--:|--:|--:|")
    runs = found["runs"]
    seeds = sorted({key.split("/")[2] for key in runs if key.startswith("plain/outliers/")})
    plain = {
        (dirt, key): statistics.fmean(runs[f"plain/{dirt}/{s}"][key] for s in seeds)
        for dirt in DIRTS
        for key in ("w2", "distance")
    }
    cells = [plain["inlier", "distance"], *(plain[dirt, "w2"] for dirt in DIRTS)]
    lines.append(f"| plain | 1.00 | 0 | {' | '.join(f'{cell:.3f}' for cell in cells)} | {len(seeds)} |")
    for row in rows(found):
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        cells = [row["distance"], *(row[f"w2 {dirt}"] for dirt in DIRTS)]
        numbers = " | ".join(f"{cell:.3f}" for cell in cells)
        lines.append(
            f"| {row['what']} | {row['cost']:.2f} | {row['effect']:.2f}{spread} | {numbers} | {row['seeds']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
