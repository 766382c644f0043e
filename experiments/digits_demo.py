"""The demo: 90 % of the digits are noised; a plain model and one by ``--auto`` are trained on them, side by side.

    python -m experiments.digits_demo --output demo

Neither is told anything; a third, the regulariser alone, has a gate placed knowing the noise level. Everything is
drawn, measured and written into one folder: ``figure.png``, ``table.md``, ``results.json`` and four runs, each an
ordinary diffusers pipeline. The fourth, plain training on clean digits, is the yardstick: it shows what is lost to the
dirt.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from robustdiff import __version__
from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.pipeline import load_pipeline, sample
from robustdiff.evaluation import distances
from robustdiff.utils.images import to_uint8

DIRT = "gaussian:sigma=0.2,fraction=0.9"
COMMON = [
    *("--prediction-type", "v_prediction", "--ddpm-beta-schedule", "squaredcos_cap_v2", "--network", "tiny"),
    *("--learning-rate", "2e-3", "--adam-beta2", "0.99", "--adam-weight-decay", "0.01", "--ema-max-decay", "0.999"),
    *("--preview-images", "0", "--logging-steps", "100"),
]
ROBUST = ["--preset", "gated", "--gate", "0:0.2", "--strength", "15"]
STEPS = 50
PATIENCE = 8.0
"""Seconds after which the demo says again what it is at: it is never silent for ten."""
FLOORS, RELABELS, SHRINKS = (0.05, 0.1, 0.15, 0.2, 0.3), (1.1, 1.2, 1.41), (0.95, 0.9, 0.8)
QUADRATURES = (0.055, 0.1, 0.173, 0.191, 0.316)


def frechet(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Pixel Frechet distance of two uint8 sets (N, 1, 8, 8), in squared units of the [-1, 1] range."""
    return distances.frechet_distance(*(images.flatten(1).double() / 127.5 - 1 for images in (generated, real)))


def noise_estimate(images: torch.Tensor) -> float:
    """Blind estimate of the noise in a set: root of the mean of the smallest quarter of its covariance's eigenvalues.

    White noise of standard deviation sigma adds sigma^2 to every eigenvalue; those of clean digits end near 0. Clipping
    at black and white, which dirty and generated images share, takes away more than half of it in empty corners.
    """
    pixels = images.flatten(1).double() / 127.5 - 1
    return torch.linalg.eigvalsh(pixels.T.cov())[:16].clamp(min=0).mean().sqrt().item()


def spread(images: torch.Tensor, real: torch.Tensor) -> float:
    """Root-mean-square standard deviation per pixel, relative to that of ``real``."""
    one, other = ((x.flatten(1).double()).var(0).mean().sqrt() for x in (images, real))
    return (one / other).item()


def train_all(folder: Path, data: Path, images: str, seed: int) -> dict[str, float]:
    """Train the four models, two at a time with half of the cores each; seconds per model."""
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    runs = {
        "plain": ["--preset", "plain", "--corrupt", DIRT],
        "auto": ["--auto", "--corrupt", DIRT],
        "robust": [*ROBUST, "--corrupt", DIRT],
        "plain-on-clean": ["--preset", "plain"],
    }

    def one(name: str) -> float:
        flags = [str(data), "--output-dir", str(folder / name), "--images", images, "--seed", str(seed)]
        flags += [*COMMON, *runs[name], "--overwrite"]
        print(f"robustdiff train {' '.join(flags)}", flush=True)
        started = time.perf_counter()
        with (folder / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "robustdiff", "train", *flags]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=log, stderr=log)
        if done.returncode:
            sys.exit(f"training {name} failed, see {folder / f'{name}.log'}")
        return time.perf_counter() - started

    with ThreadPoolExecutor(2) as pool:
        queues = (("auto", "robust"), ("plain", "plain-on-clean"))
        waiting = [pool.submit(lambda names=names: {name: one(name) for name in names}) for names in queues]
        while wait(waiting, timeout=PATIENCE).not_done:
            logs = {name: folder / f"{name}.log" for name in runs}
            last = {name: log.read_text().splitlines()[-1:] for name, log in logs.items() if log.exists()}
            said = [f"  {name}: {line}" for name, lines in last.items() for line in lines if line[:4] != "done"]
            print("\n".join(said or ["  starting"]), flush=True)
        return {name: seconds for queue in waiting for name, seconds in queue.result().items()}


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """Print what is done now, and again, with the time it has taken, for as long as it lasts."""
    started, done = time.perf_counter(), threading.Event()

    def remind() -> None:
        while not done.wait(PATIENCE):
            print(f"  {what}: {time.perf_counter() - started:.0f} s", flush=True)

    print(f"  {what}", flush=True)
    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
        yield
    finally:
        done.set()
        reminder.join()


def main() -> None:
    """Train, sample, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    parser.add_argument("--images", default="120k", help="length of each training, in images seen (default: 120k)")
    parser.add_argument("--samples", type=int, default=1000, help="images drawn per row (default: 1000)")
    parser.add_argument(
        "--seed", type=int, default=0, help="rules the dirt, the trainings and the samples (default: 0)"
    )
    arguments = parser.parse_args()
    folder, n, seed = arguments.output, arguments.samples, arguments.seed
    started = time.perf_counter()

    # Data: a fixed split; the model never sees the held-out half-thousand
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    digits = load_images("digits").images[order]
    held_out, training = digits[:500], digits[500:]
    validation, test = held_out[:250], held_out[250:]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        log.unlink()
    np.save(folder / "data" / "train.npy", training[:, 0].numpy())
    dirt = Corruption.parse(DIRT)
    clean = training.float() / 127.5 - 1
    dirty = to_uint8(torch.stack([dirt.apply(image, seed, index) for index, image in enumerate(clean)]))

    # Training
    print(f"== training four models of {arguments.images} images each, two at a time", flush=True)
    seconds = train_all(folder, folder / "data" / "train.npy", arguments.images, seed)
    logging.disable_progress_bar()
    with saying("loading the four models"):
        pipelines = {name: load_pipeline(folder / name) for name in seconds}

    # Rows
    def draw(name: str, count: int = n, first: int = 0, **settings: Any) -> torch.Tensor:  # noqa: ANN401
        indices = range(first, first + count)
        asked = "".join(f", {setting} {value}" for setting, value in settings.items())
        with saying(f"{count} images of {name}{asked}"):
            return to_uint8(sample(pipelines[name], indices, seed=10_000, steps=STEPS, batch_size=250, **settings))

    def shrink(images: torch.Tensor, factor: float) -> torch.Tensor:
        pixels = images.float() / 127.5 - 1
        return to_uint8(pixels.mean(0) + factor * (pixels - pixels.mean(0)))

    def best(setting: str, values: tuple[float, ...], **also: str) -> float:
        """The value with the lowest distance to the validation images, on samples that no row uses."""
        return min(
            values, key=lambda value: frechet(draw("plain", n // 2, 100_000, **{setting: value}, **also), validation)
        )

    print(f"== sampling {n} images per row, {STEPS} deterministic steps", flush=True)
    plain, auto = draw("plain"), draw("auto")
    apart = draw("plain", n // 2, 100_000)
    floor, relabel = best("sigma_floor", FLOORS), best("sigma_scale", RELABELS)
    twin = best("sigma_floor", QUADRATURES, floor_shape="quadrature")
    factor = min(SHRINKS, key=lambda value: frechet(shrink(apart, value), validation))
    rows = {
        "clean training digits (the floor)": ("-", training[:n]),
        "dirty training digits": ("-", dirty[:n]),
        "plain, trained on clean digits": ("clean images", draw("plain-on-clean")),
        "plain": ("nothing", plain),
        f"plain, relabelled x {relabel:g}": (
            "factor chosen on clean validation images",
            draw("plain", sigma_scale=relabel),
        ),
        f"plain, label floor {floor:g}": ("level chosen on clean validation images", draw("plain", sigma_floor=floor)),
        f"plain, floor {twin:g} in quadrature": (
            "level chosen on clean validation images",
            draw("plain", sigma_floor=twin, floor_shape="quadrature"),
        ),
        f"plain, shrunk x {factor:g}": ("factor chosen on clean validation images", shrink(plain, factor)),
        "robust": (
            "noise level; gate and strength chosen on clean held-out digits, the test half included",
            draw("robust"),
        ),
        "--auto": ("nothing", auto),
    }
    results = [
        {
            "row": name,
            "told": told,
            "frechet": frechet(images, test),
            "noise": noise_estimate(images),
            "spread": spread(images, test),
            "n": len(images),
        }
        for name, (told, images) in rows.items()
    ]
    record = {
        "what": "digits demo",
        "dirt": DIRT,
        "seed": seed,
        "images": arguments.images,
        "steps": STEPS,
        "sampler": "ddim, trailing, noise of the clipped image",
        "robust": ROBUST,
        "common": COMMON,
        "reference": "250 held-out clean digits",
        "rows": results,
        "training_seconds": seconds,
        "versions": {"robustdiff": __version__, "torch": torch.__version__},
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "table.md").write_text(table(results))
    with saying("drawing the figure"):
        panels = {"training images": dirty, "plain samples": plain, "samples of --auto": auto}
        draw_figure(folder / "figure.png", panels)
    print(table(results), end="")
    print(f"== {folder}/figure.png, table.md, results.json after {(time.perf_counter() - started) / 60:.1f} minutes")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown."""
    lines = ["| row | told | pixel Frechet | noise | spread |", "|---|---|---|---|---|"]
    lines += [f"| {r['row']} | {r['told']} | {r['frechet']:.3f} | {r['noise']:.3f} | {r['spread']:.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


def draw_figure(path: Path, panels: dict[str, torch.Tensor], side: int = 7) -> None:
    """One picture: the first ``side`` x ``side`` images of each panel, unselected."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from robustdiff.utils.images import image_grid

    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.8), layout="constrained")
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        axis.imshow(image_grid(images[: side * side], columns=side)[0], cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=15)
        axis.axis("off")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
