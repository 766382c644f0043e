"""Is a U-Net that was trained robustly harder to attack end to end? Clean digits, every method, three seeds.

    python experiments/attacked_digits.py --work attacked-digits --results experiments/results/attacked_digits

What ``attacked_worlds.py`` asks of worlds whose truth is known, of digits: for every method the quality of its draws,
and how far the final image moves, in generated spreads, when the start of the trajectory is moved by random noise, by
random signs and by PGD, and when all steps are. A plain network trained half as long shows what an attack does at
lower quality. Networks are trained by ``robustdiff train`` into ``--work``, rows and seeds are kept in ``--results``:
what is there is not done again. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import digits_demo
import numpy as np
import torch
from diffusers.utils import logging

from robustdiff import PGD, Ball, Displacement, RelabelledModel, durable, linear, load_images, load_pipeline, sample
from robustdiff.attack import RandomSearch
from robustdiff.corruption import derive_seed, to_uint8
from robustdiff.process import draw_normal
from robustdiff.sampling import trajectory_of
from robustdiff.version import __version__

CALLS, POINTS, DRAWS, SAMPLES = 25, 32, 500, 1000
"""Sampler steps; images attacked; draws for spread and bound; draws for the quality."""
RADIUS, RADIUS_ALL, STEPS = 0.1, 0.02, 20
"""L_inf in units of the noise scale, at the start alone and at each of all steps; PGD."""
RHO = 0.1
"""Of the random move x' = sqrt(1 - rho^2) x + rho z, which leaves the law of the start as it is."""
IMAGES = 40_000
"""Length of each training, in images seen."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A network, and how its draws are changed afterwards.

    Attributes:
        title: As the table calls it.
        flags: Of ``robustdiff train``.
        share: Of the length of training.
        network: The row whose network it uses; its own if empty.
        relabel: See :class:`robustdiff.RelabelledModel`.
        shrink: Of the images towards their mean.
    """

    title: str
    flags: tuple[str, ...] = ("--preset", "plain")
    share: float = 1.0
    network: str = ""
    relabel: float = 1.0
    shrink: float = 1.0


ROWS = {
    "plain": Row("plain"),
    "plain-half": Row("plain, half as long", share=0.5),
    "relabelled-1.2": Row("plain, relabelled x 1.2", network="plain", relabel=1.2),
    "shrunk-0.9": Row("plain, shrunk x 0.9", network="plain", shrink=0.9),
    "invariance": Row("invariance (paper)", ("--preset", "paper", "--objective", "invariance")),
    "random": Row("random (paper)", ("--preset", "paper", "--perturbation", "random")),
    "adversarial": Row("adversarial (paper)", ("--preset", "paper")),
    "gated": Row("gated, as shipped", ("--preset", "gated")),
    "pseudo-huber": Row("pseudo-Huber", ("--objective", "pseudo-huber")),
}


def trained(name: str, seed: int, work: Path, data: Path) -> Path:
    """A row's run, trained on clean digits unless it is there."""
    row = ROWS[name]
    run = work / "runs" / f"{row.network or name}-seed{seed}"
    if not (run / "trained").exists():
        shutil.rmtree(run, ignore_errors=True)  # one that was stopped in the middle
        images = str(round(IMAGES * row.share))
        flags = [str(data), "--output-dir", str(run), "--images", images, "--seed", str(seed)]
        command = [sys.executable, "-m", "robustdiff", "train", *flags, *digits_demo.COMMON, *row.flags]
        with (work / f"{run.name}.log").open("w") as log:
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)
        (run / "trained").touch()
    return run


def measure(
    name: str, seed: int, work: Path, data: Path, held_out: torch.Tensor, unshrunk: dict[str, float] | None
) -> dict[str, float]:
    """Every number of one row and seed; displacements are root mean squares in units of the generated deviation.

    Shrinking scales displacements and spread alike: those of a shrunk row are those of the row before it, ``unshrunk``.
    """
    row = ROWS[name]
    pipeline = load_pipeline(trained(name, seed, work, data))
    images = sample(pipeline, SAMPLES, seed=10_000 * (1 + seed), steps=CALLS, batch_size=250, relabel=row.relabel)
    images = images.mean(0) + row.shrink * (images - images.mean(0))
    error = digits_demo.frechet(to_uint8(images), held_out)
    if unshrunk is not None:
        return unshrunk | {"error": error, "spread": row.shrink * unshrunk["spread"]}
    trajectory = trajectory_of(pipeline, "ddim", CALLS)
    if row.relabel != 1:
        model = RelabelledModel(pipeline.unet, trajectory.process, row.relabel)
        trajectory = dataclasses.replace(trajectory, model=model)
    generator = torch.Generator().manual_seed(derive_seed("attacked digits", seed))
    x = draw_normal(torch.empty(DRAWS, *images.shape[1:]), generator)
    pipeline.unet.eval()
    with torch.no_grad():
        end = trajectory.run(x).double()
        jump = trajectory.run((1 - RHO**2) ** 0.5 * x + RHO * draw_normal(x, generator)).double() - end
    spread = float(end.flatten(1).var(0).sum().sqrt())
    real = (held_out.flatten(1).double() / 127.5 - 1).var(0).sum().sqrt()
    found = {
        "error": error,
        "spread": spread / float(real),
        "random": float(jump.flatten(1).square().sum(1).mean().sqrt()) / spread,
    }
    for key, attacked, radius in (("start", (0,), RADIUS), ("all", tuple(range(CALLS)), RADIUS_ALL)):
        objective = Displacement(trajectory, x[:POINTS], attacked, checkpointed=False)
        for word, attack in (("signs", RandomSearch(1)), ("pgd", PGD(STEPS))):
            value = attack(objective, Ball("linf", radius), objective.like, generator).value
            found[f"{word}_{key}"] = float(value.double().mean().sqrt()) / spread
    return found


def bring(name: str, seeds: int, work: Path, results: Path) -> None:
    """One row's file, brought up to ``seeds``."""
    path = results / f"digits-{name}.json"
    runs = durable.read_json(path)["runs"] if path.is_file() else {}
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    digits = load_images("digits").images[order]
    held_out, training = digits[:500], digits[500:]
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "clean.npy").exists():
        np.save(work / "clean.npy", training[:, 0].numpy())
    for seed in map(str, range(seeds)):
        if seed in runs:
            continue
        started = time.perf_counter()
        unshrunk = None
        if ROWS[name].shrink != 1:
            unshrunk = durable.read_json(results / f"digits-{ROWS[name].network}.json")["runs"][seed]
        runs[seed] = measure(name, int(seed), work, work / "clean.npy", held_out, unshrunk)
        body: dict[str, Any] = {
            "what": "end-to-end attacks on samplers of digits, clean training images",
            "world": "digits",
            "method": name,
            "title": ROWS[name].title,
            "settings": {
                "train": " ".join([*digits_demo.COMMON, *ROWS[ROWS[name].network or name].flags]),
                "images": round(IMAGES * ROWS[name].share),
                "relabel": ROWS[name].relabel,
                "shrink": ROWS[name].shrink,
                "attack": f"L_inf {RADIUS} at the start, {RADIUS_ALL} at all steps, PGD-{STEPS}",
                "sampler": f"ddim, trailing, {CALLS} calls, x0 clipped in every step",
                "points": POINTS,
                "draws": DRAWS,
                "rho": RHO,
            },
            "measured": "error: pixel Frechet distance of 1,000 draws to 500 held-out clean digits",
            "bound": linear.displacement_bound(RHO),
            "floor": digits_demo.frechet(training[:SAMPLES], held_out),
            "n": SAMPLES,
            "runs": runs,
            "version": __version__,
            "torch": torch.__version__.split("+")[0],
        }
        durable.write_json(path, body)
        words = json.dumps({key: round(value, 4) for key, value in runs[seed].items()})
        print(f"digits-{name}, seed {seed}: {words} ({time.perf_counter() - started:.0f} s)", flush=True)


def table(results: Path) -> str:
    """The rows, and how far each is moved against plain training, seed by seed."""
    heads = [
        "error on clean data",
        "spread (true = 1)",
        "moved by noise / bound",
        "PGD at the start",
        "PGD at all steps",
    ]
    keys = ["error", "spread", "random", "pgd_start", "pgd_all"]
    lines = [f"| digits | seeds | {' | '.join(heads)} | against plain, start / all |", f"|---|---|{'---|' * 6}"]
    plain = durable.read_json(results / "digits-plain.json")
    lines.append(f"| floor: as many real digits | 1 | {plain['floor']:.3g} | 1 | - | - | - | - |")
    for name, row in ROWS.items():
        path = results / f"digits-{name}.json"
        if not path.is_file():
            continue
        found = durable.read_json(path)
        runs, cells = found["runs"], []
        for key in keys:
            values = [run[key] / (found["bound"] if key == "random" else 1) for run in runs.values()]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3g}{spread}")
        paired = []
        for key in keys[3:]:
            ratios = [100 * (run[key] / plain["runs"][seed][key] - 1) for seed, run in runs.items()]
            paired.append(f"{min(ratios):+.0f} … {max(ratios):+.0f} %")
        cells.append("-" if name == "plain" else " / ".join(paired))
        lines.append(f"| {row.title} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("attacked-digits"), help="folder of data and networks")
    parser.add_argument("--results", type=Path, help="folder of the rows; default: WORK/results")
    parser.add_argument("--seeds", type=int, default=3, help="per row (default: 3)")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    results = arguments.results or arguments.work / "results"
    results.mkdir(parents=True, exist_ok=True)
    for seed in range(1, arguments.seeds + 1):  # all rows of a seed before the next one
        for name in arguments.rows:
            bring(name, seed, arguments.work, results)
    print(table(results))


if __name__ == "__main__":
    main()
