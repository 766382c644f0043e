"""What a wrong audit does to real training: digits of which nine in ten are noised, and noise levels told wrongly.

    python -m experiments.wrong_levels --work wrong --output experiments/results/wrong_levels.json

Data, dirt, network, length and judging are those of ``digits_demo.py``. Rows: plain training, ``--auto``, and training
that is told every image's noise level (``--noise-levels``): rightly, half, nine tenths, eleven tenths and twice of it,
and with a fifth of all images flipped: noisy ones told to be clean, clean ones noisy. What is in ``--work`` is not
done again, so the same command goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from experiments import digits_demo
from robustdiff import __version__
from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.pipeline import load_pipeline, sample
from robustdiff.utils.images import to_uint8

FACTORS = {"told": 1.0, "told half": 0.5, "told 0.9 of it": 0.9, "told 1.1 times": 1.1, "told twice": 2.0}
FLIPPED = "20 % of the flags flipped"
ROWS = ("plain", "auto", *FACTORS, FLIPPED)
STEPS = 50


def levels(row: str, dirt: Corruption, count: int, seed: int) -> list[float]:
    """The noise level that a row is told of each image, 0 for clean ones."""
    sigma = float(dirt.parameters["sigma"])
    noisy = torch.tensor([dirt.hits(seed, index) for index in range(count)])
    if row == FLIPPED:
        flipped = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.2
        return (sigma * (noisy ^ flipped).double()).tolist()
    return (FACTORS[row] * sigma * noisy.double()).tolist()


def train(row: str, work: Path, images: str, seed: int) -> Path:
    """One run in one thread, if it is not there already; its folder."""
    data, name = work / "train.npy", f"{row.replace(' ', '-').replace('%', 'percent')}-seed{seed}"
    folder, done = work / name, work / f"{name}.done"
    if done.exists():
        return folder
    flags = [str(data), "--output-dir", str(folder), "--images", images, "--seed", str(seed), *digits_demo.COMMON]
    flags += ["--corrupt", digits_demo.DIRT, "--overwrite", *(["--auto"] if row == "auto" else ["--preset", "plain"])]
    if row not in ("plain", "auto"):
        names = load_images(str(data)).names
        told = dict(zip(names, levels(row, Corruption.parse(digits_demo.DIRT), len(names), seed), strict=True))
        (work / f"{name}.json").write_text(json.dumps(told))
        flags += ["--noise-levels", str(work / f"{name}.json")]
    print(f"robustdiff train {' '.join(flags)}", flush=True)
    with (work / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "robustdiff", "train", *flags]
        code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"training {name} failed, see {work / f'{name}.log'}")
    done.touch()
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown: means over seeds, and every seed's distance."""
    lines = ["| training | pixel Frechet distance ↓ | noise | spread |", "|:--|:--|--:|--:|"]
    for row in rows:
        every = " and ".join(f"{value:.3f}" for value in row["frechet"])
        noise, spread = (sum(row[key]) / len(row[key]) for key in ("noise", "spread"))
        lines.append(f"| {row['row']} | {every} | {noise:.3f} | {spread:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, sample, measure; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("wrong"), help="folder for the runs (default: wrong)")
    parser.add_argument("--images", default="120k", help="length of each training, in images seen (default: 120k)")
    parser.add_argument("--samples", type=int, default=1000, help="images drawn per row (default: 1000)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds from 0 (default: 1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs side by side, one thread each")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))  # as the demo splits them
    digits = load_images("digits").images[order]
    test, training = digits[250:500], digits[500:]
    np.save(work / "train.npy", training[:, 0].numpy())

    jobs = [(row, seed) for seed in range(arguments.seeds) for row in ROWS]
    with ThreadPoolExecutor(arguments.workers) as pool:
        runs = list(pool.map(lambda job: train(job[0], work, arguments.images, job[1]), jobs))
    logging.disable_progress_bar()
    rows = [{"row": row, "frechet": [], "noise": [], "spread": []} for row in ROWS]
    for (name, _), run in zip(jobs, runs, strict=True):
        drawn = to_uint8(sample(load_pipeline(run), arguments.samples, seed=10_000, steps=STEPS, batch_size=250))
        row = rows[ROWS.index(name)]
        row["frechet"].append(round(digits_demo.frechet(drawn, test), 4))
        row["noise"].append(round(digits_demo.noise_estimate(drawn), 4))
        row["spread"].append(round(digits_demo.spread(drawn, test), 4))
    floor = round(digits_demo.frechet(training, test), 4)
    print(table(rows), f"floor, the clean training digits: {floor}", sep="\n")
    if arguments.output:
        protocol = {
            "dirt": digits_demo.DIRT,
            "images": arguments.images,
            "samples": arguments.samples,
            "steps": STEPS,
            "sampler": "ddim",
            "seeds": list(range(arguments.seeds)),
            "test": "250 clean digits, held out",
            "floor": f"{floor} (the clean training digits)",
            "flags": digits_demo.COMMON,
            "version": __version__,
            "torch": torch.__version__.split("+")[0],
        }
        arguments.output.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
