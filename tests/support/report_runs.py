"""Run folders as training and evaluation leave them, made by hand in milliseconds: for the tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Json = dict[str, Any]
REAL, TRAINING, WEIGHTS = "a" * 64, "b" * 64, "c" * 64
SEED = 7


def grid(path: Path, seed: int, *, size: int = 8, rows: int = 4, columns: int = 4, noise: float = 0.0) -> None:
    """A real PNG: a grid of strokes on black, grey lines between them, as ``image_grid`` lays them out."""
    random = np.random.default_rng(seed)
    picture = np.full((rows * (size + 1) - 1, columns * (size + 1) - 1), 128, np.uint8)
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    for i in range(rows * columns):
        angle, bend, shift = random.uniform(0, math.pi), random.uniform(-1, 1), random.uniform(-0.4, 0.4)
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        ink = np.exp(-8 * (across - bend * along**2 - shift) ** 2 - along**4)
        ink = np.clip(ink + random.normal(0, noise, ink.shape), 0, 1) * 255
        top, left = i // columns * (size + 1), i % columns * (size + 1)
        picture[top : top + size, left : left + size] = ink
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def value(number: float | None, floor: float | None = None, better: str = "lower", **more: Any) -> Json:
    return {"value": number, "floor": floor, "better": better, "interval": None, "about": {}, **more}


def evaluation(kind: str, title: str, values: Json, *, n: int = 1000, **more: Any) -> Json:
    """A file of ``evaluation/``; ``extractor`` and the other parts of the protocol may be given by name."""
    protocol = {
        "extractor": {
            "name": "squeezenet10_imagenet", "kind": "torchscript", "sha256": WEIGHTS, "features": 512,
            "resize": "inside the file",
        },
        "n_generated": n, "n_real": 797,
        "generated": {"source": f"runs/{title}", "sha256": f"{len(title):064x}"},
        "reference": {"source": "digits", "split": "held out", "sha256": REAL},
        "training": {"source": "digits", "sha256": TRAINING} if kind == "memorisation" else None,
        "sampler": {
            "scheduler": "ddim", "steps": 50, "timesteps": list(range(999, 0, -20)), "seed": 0, "ema": True,
        },
        "floor": "two halves of the real images, equally many", "seeds": [0],
    }  # fmt: skip
    protocol |= {key: more.pop(key) for key in list(more) if key in protocol}
    return {
        "format": "robustdiff evaluation 1", "kind": kind, "run": f"runs/{title}", "title": title, "told": "nothing",
        "protocol": protocol, "values": values, "details": {}, "sheets": {}, "warnings": [], "seconds": 12.3,
        "version": "0.1.0", "torch": "2.13.0", "hardware": "CPU, 2 threads", "date": "2026-11-23", **more,
    }  # fmt: skip


def quality(title: str, fd: float, **more: Any) -> Json:
    """Seven metrics, some with intervals, one with a standard error, FD with neither."""
    values = {
        "FD-squeezenet10_imagenet": value(fd, 3.1),
        "KID-squeezenet10_imagenet": value(
            fd / 4000, 0.0001, about={"subset_size": 398, "subsets": 100, "standard_error": 0.0003}
        ),
        **{
            name: value(x := base - fd / 100, 0.95, "higher", interval=[x - 0.03, x + 0.02], about={"k": 5})
            for name, base in (("precision", 0.9), ("recall", 0.8), ("density", 1.1), ("coverage", 0.97))
        },
        "diversity": value(0.98, 1.0, "neither"),
    }
    return evaluation("quality", title, values, **more)


def memorisation(title: str, share: float, **more: Any) -> Json:
    edges = [round(0.5 + 0.02 * i, 2) for i in range(26)]
    middle = 0.8 + 0.5 * share

    def bell(centre: float, total: int) -> list[int]:
        return [round(total * 0.02 / 0.17 * math.exp(-(((e + 0.01 - centre) / 0.1) ** 2))) for e in edges[:-1]]

    values = {
        "near-copies": value(share, 0.01, interval=[max(0.0, share - 0.01), share + 0.02], about={"threshold": 0.3333}),
        "near-copies above the null": value(share - 0.01, None),
        "Carlini L2 below threshold": value(share / 2, 0.01),
    }
    details = {
        "histogram": {"edges": edges, "generated": bell(middle, 1000), "null": bell(0.78, 797)},
        "pairs": [[17 * i % 1000, 31 * i % 1000, 0.05 + 0.02 * i] for i in range(20)],
        "copied": [[31 * i, f"digits/{31 * i:05d}.png", 20 - i] for i in range(5)],
    }
    return evaluation("memorisation", title, values, **{"details": details, **more})


def few_steps(title: str, fd: float, schedulers: Sequence[str] = ("ddim", "dpm-solver++")) -> Json:
    steps = [5, 10, 20, 50, 100]
    curves = [
        {
            "scheduler": scheduler,
            "steps": steps,
            "values": {"FD-squeezenet10_imagenet": [fd * (1 + (3 - i) / n) for n in steps]},
            "timesteps": [[float(t) for t in range(999, 0, -1000 // n)] for n in steps],
        }
        for i, scheduler in enumerate(schedulers)
    ]
    values = {
        f"{metric} at {n} {curve['scheduler']} steps": value(column[i], 3.1)
        for curve in curves
        for metric, column in curve["values"].items()
        for i, n in enumerate(steps)
    }
    return evaluation("few-step", title, values, details={"curves": curves}, sampler=None)


def training_run(folder: Path, *, preset: str, seed: int = 0, lines: int = 60, quality: float = 10.0) -> None:
    """What ``robustdiff train`` writes, without networks."""
    flags = {
        "data": "digits", "output_dir": str(folder), "images": "500k", "seed": seed, "preset": preset,
        "corrupt": ["gaussian:sigma=0.2,fraction=0.9"], "train_batch_size": 64, "ddpm_num_inference_steps": 50,
    }  # fmt: skip
    objective = "DenoisingLoss()" if preset == "plain" else (
        "EquivarianceLoss(perturbation=RandomPerturbation(distribution='uniform'), strength=SigmaRange(low=0.0, "
        "high=0.15, value=15.0), radius=Radius(exponent=0.0, scale=1.0, floor=0.0, random=False), gradient='both')"
    )  # fmt: skip
    plan = {"images": 500_000, "batch": 64, "steps": 7813, "objective": objective, "network": "tiny"}
    write(folder / "config.json", {"settings": flags, "plan": plan, "versions": {"robustdiff": "0.1.0"}})
    data = {"source": "digits", "count": 1000, "size": [8, 8], "channels": 1, "skipped": [], "sha256": TRAINING}
    write(folder / "data.json", {"data": data, "corrupt": flags["corrupt"], "corrupt_seed": 0})
    random = np.random.default_rng(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(1, lines + 1):
            denoising = (0.05 + quality / 400 + 0.9 / i) * math.exp(random.normal(0, 0.03))
            equivariance = 0.0 if preset == "plain" else quality / 500 / i**0.5
            record = {
                "step": 130 * i, "images": 8333 * i, "loss": denoising + 15 * equivariance, "denoising": denoising,
                "equivariance": equivariance, "radius": 1.0, "regularised": 0.0 if preset == "plain" else 0.05,
                "gradient_norm": 1.0 / i**0.5, "learning_rate": 1e-3 * (1 - i / (lines + 1)),
                "images_per_second": 480.0,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    for step in range(0, 8001, 800):
        noise = 0.3 * quality / (10 + step / 40) + quality / 400
        grid(folder / "samples" / f"step-{step:08d}.png", SEED, noise=noise)


def during(folder: Path, fd: float) -> None:
    lines = [
        {"step": 800 * i, "images": 51_200 * i, "values": {"FD-pixels": value(fd + 40 / i, 2.0)}} for i in range(1, 10)
    ]
    path = folder / "evaluation" / "during.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def three_runs(root: Path) -> list[Path]:
    """Plain, gated and robust-random, trained and evaluated in every way that the report shows."""
    folders = []
    for i, (name, fd, share) in enumerate(
        (("plain", 21.4, 0.12), ("gated", 12.3, 0.02), ("robust-random", 13.1, 0.03))
    ):
        folder = root / name
        training_run(folder, preset=name, quality=fd)
        during(folder, fd)
        grid(folder / "evaluation" / "training.png", 1, noise=0.1)
        grid(folder / "evaluation" / "nearest.png", 2 + i, rows=6, columns=12)
        grid(folder / "evaluation" / "pairs.png", 9 + i, rows=4, columns=10)
        judged = quality(name, fd, sheets={"nearest": "nearest.png"})
        if name == "plain":
            judged["warnings"] = ["797 real images are few for 512 features: the floor is a large part of every value"]
        write(folder / "evaluation" / "quality.json", judged)
        write(folder / "evaluation" / "memorisation.json", memorisation(name, share, sheets={"pairs": "pairs.png"}))
        write(folder / "evaluation" / "few-step.json", few_steps(name, fd))
        folders.append(folder)
    pixels = {"name": "pixels", "kind": "pixels", "sha256": None, "features": 64, "resize": "none"}
    for name, fd in (("gated", 2.9), ("plain", 4.4)):
        judged = evaluation("quality", name, {"FD-pixels": value(fd, 2.2)}, extractor=pixels, n=500)
        write(root / name / "evaluation" / "quality-pixels.json", judged)
    write(root / "gated" / "evaluation" / "later.json", {"format": "robustdiff evaluation 1", "kind": "later"})
    return folders
