"""Poisoned digits: what images pushed to where a denoiser is worst do to the training of others: plain, gated, --auto.

    python -m experiments.poisoning --work poisoning --output experiments/results/poisoning.json

Every training image is poisoned (``robustdiff corrupt --poison``) by a model of the same clean digits but of another
seed, which no row uses otherwise; the control moves every pixel by as much in a random direction. Twelve rows: plain
training, the same drawn with a label floor, the preset ``gated`` and ``--auto``, on clean, poisoned and randomly moved
digits; told nothing. Every row is trained ``--seeds`` times, on the same poison. One thread; what is in ``--work`` is
not done again, so the same command goes on where it was stopped.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from experiments import digits_demo
from robustdiff import __version__
from robustdiff.attacks.poisoning import Poison
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.pipeline import load_pipeline, sample
from robustdiff.utils.images import to_uint8

METHODS = {"plain": ("--preset", "plain"), "gated": ("--preset", "gated"), "auto": ("--auto",)}
FLOOR = 0.1
"""Label floor of the free baseline, in sigma/alpha; fixed beforehand, near the size of what was done to the pixels."""
SETS = ("clean", "poisoned", "random")
SURROGATE_SEED, SEED = 100, 0
STEPS = 50


def command(*arguments: str) -> None:
    """``robustdiff ARGUMENTS`` in one thread.

    Raises:
        CalledProcessError: If it fails; it has then said why.
    """
    print(f"robustdiff {' '.join(arguments)}", flush=True)
    run = [sys.executable, "-m", "robustdiff", *arguments]
    subprocess.run(run, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)


def moved(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Every pixel of uint8 images moved by ``levels`` up or down, by the toss of a coin, and clipped."""
    coin = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(SEED))
    return (images.int() + levels * (2 * coin - 1)).clamp(0, 255).to(torch.uint8)


def train(work: Path, name: str, data: Path, images: str, seed: int, own: Sequence[str]) -> Path:
    """A run with the settings of the digits demo and some of its own, unless it is there."""
    run = work / "runs" / name
    if not (run / "trained").exists():
        shutil.rmtree(run, ignore_errors=True)  # one that was stopped in the middle
        flags = ["--output-dir", str(run), "--images", images, "--seed", str(seed)]
        command("train", str(data), *flags, *digits_demo.COMMON, *own)
        (run / "trained").touch()
    return run


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds (None of one), and all of them."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "seeds": list(values)}


def cell(value: float | dict[str, Any]) -> str:
    """As the table shows it."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value['mean']:.3f}" + ("" if value["deviation"] is None else f" +- {value['deviation']:.3f}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in markdown."""
    lines = ["| row | pixel Frechet | noise | spread |", "|---|---|---|---|"]
    lines += [f"| {r['row']} | {cell(r['frechet'])} | {cell(r['noise'])} | {cell(r['spread'])} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, poison, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("poisoning"), help="folder for data and runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--images", default="60k", help="length of each training, in images seen (default: 60k)")
    parser.add_argument("--radius", default="32/255", help="of the poison, in units of [-1, 1] (default: 32/255)")
    parser.add_argument("--poison-steps", default="40", help="gradient steps of the poison (default: 40)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row, from seed 0 (default: 3)")
    parser.add_argument("--samples", type=int, default=1000, help="images drawn per row (default: 1000)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure, work, n = digits_demo, arguments.work, arguments.samples
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)

    # Data: the split of the digits demo
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    digits = load_images("digits").images[order]
    test, training = digits[250:500], digits[500:]
    np.save(data / "clean.npy", training[:, 0].numpy())
    surrogate = train(work, "surrogate", data / "clean.npy", arguments.images, SURROGATE_SEED, ("--preset", "plain"))
    if not (data / "poisoned").exists():
        poison = ["--poison", str(surrogate), "--poison-radius", arguments.radius]
        poison += ["--poison-steps", arguments.poison_steps, "--batch-size", "256", "--seed", str(SEED)]
        command("corrupt", str(data / "clean.npy"), str(data / "poisoned"), *poison)
    told = json.loads((data / "poisoned" / "manifest.json").read_text())["poison"]
    np.save(data / "random.npy", moved(training, told["levels"])[:, 0].numpy())
    sets = {
        "clean": training,
        "poisoned": load_images(data / "poisoned").images,
        "random": moved(training, told["levels"]),
    }

    # How bad the surrogate, and a model that it does not know, are at each of them
    logging.disable_progress_bar()
    paths = {"clean": data / "clean.npy", "poisoned": data / "poisoned", "random": data / "random.npy"}
    runs = {
        (method, name, seed): train(work, f"{method}-{name}-{seed}", paths[name], arguments.images, seed, flags)
        for seed in range(arguments.seeds)
        for method, flags in METHODS.items()
        for name in SETS
    }
    pipelines: dict[Any, Any] = {key: load_pipeline(run) for key, run in runs.items()}
    judges = {"surrogate": load_pipeline(surrogate), "plain on clean": pipelines["plain", "clean", 0]}
    losses = {
        judge: {
            name: Poison(pipeline, judge, 0.1).judge(images, range(len(images)), SEED).mean().item()
            for name, images in sets.items()
        }
        for judge, pipeline in judges.items()
    }

    # Rows
    def score(images: torch.Tensor) -> dict[str, float]:
        return {
            "frechet": measure.frechet(images, test),
            "noise": measure.noise_estimate(images),
            "spread": measure.spread(images, test),
        }

    def draw(pipeline: Any, floor: float) -> torch.Tensor:  # noqa: ANN401
        return to_uint8(sample(pipeline, range(n), seed=10_000, steps=STEPS, batch_size=250, sigma_floor=floor))

    rows: list[dict[str, Any]] = [
        {"row": f"training digits, {name}", **score(images[:n])} for name, images in sets.items()
    ]
    drawn_as = [(method, method, 0.0) for method in METHODS]
    drawn_as.insert(1, (f"plain, label floor {FLOOR}", "plain", FLOOR))
    for title, method, floor in drawn_as:
        for name in SETS:
            scores = [score(draw(pipelines[method, name, seed], floor)) for seed in range(arguments.seeds)]
            rows.append(
                {"row": f"{title} on {name}", **{key: summary([one[key] for one in scores]) for key in scores[0]}}
            )
    record = {
        "what": "poisoned digits",
        "poison": {key: told[key] for key in ("objective", "norm", "radius", "levels", "steps", "draws", "fraction")},
        "surrogate_seed": SURROGATE_SEED,
        "poison_seed": SEED,
        "seeds": list(range(arguments.seeds)),
        "images": arguments.images,
        "steps": STEPS,
        "n": n,
        "common": measure.COMMON,
        "reference": "250 held-out clean digits",
        "denoising_loss": losses,
        "rows": rows,
        "versions": {"robustdiff": __version__, "torch": torch.__version__.split("+")[0]},
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(losses, indent=1))


if __name__ == "__main__":
    main()
