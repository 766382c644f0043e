"""How well one image tells how noisy it is: clean images against the same with Gaussian noise, clipped to 8 bit.

    python -m experiments.noise_estimates --data CIFAR10-FOLDER:test --data BUTTERFLIES-FOLDER

For every set: the median blind estimate (`audit.single_image_noise`) with its 5 to 95 % range, and the area under the
curve of telling noisy from clean images by it, one estimate per image, nothing told.
Colour sets also as grey, and as 16 x 16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from robustdiff.audit.single_image_noise import noise_std
from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import ImageDataset, load_images
from robustdiff.utils.images import to_uint8

LEVELS = (0.05, 0.1, 0.2)
SEED = 0
MEANING = "Area under the curve of clean against noisy; in brackets the median estimate. One estimate an image."


def estimates(images: ImageDataset, count: int, sigma: float) -> np.ndarray:
    """Blind noise estimates of the first ``count`` images after noise of level ``sigma``; nan where there is none."""
    dirt = Corruption.parse(f"gaussian:sigma={sigma:g}") if sigma else None
    result = []
    for index in range(min(count, len(images))):
        x0 = images.x0(index)
        x0 = x0 if dirt is None else dirt.apply(x0, SEED, index)
        result.append(noise_std(to_uint8(x0)))
    return np.array(result)


def row(name: str, images: ImageDataset, count: int) -> dict[str, object]:
    """One line of the table."""
    clean = estimates(images, count, 0)
    found: dict[str, object] = {"set": name, "images": len(clean), "clean": summary(clean)}
    for sigma in LEVELS:
        noisy = estimates(images, count, sigma)
        truth = np.repeat([0, 1], [len(clean), len(noisy)])
        area = float(roc_auc_score(truth, np.concatenate([clean, noisy])))
        found[f"sigma {sigma:g}"] = {"auc": round(area, 4), **summary(noisy)}
    return found


def summary(values: np.ndarray) -> dict[str, float]:
    """Median and 5 to 95 % range."""
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {"5 %": round(float(low), 4), "median": round(float(median), 4), "95 %": round(float(high), 4)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown; :data:`MEANING` says what a cell is."""
    lines = [f"| set | images | clean | {' | '.join(f'{x:g}' for x in LEVELS)} |", f"|:--|{'--:|' * (len(LEVELS) + 2)}"]
    for one in rows:
        cells = [f"({one['clean']['median']:.3f})"]
        cells += [f"{one[f'sigma {x:g}']['auc']:.3f} ({one[f'sigma {x:g}']['median']:.3f})" for x in LEVELS]
        lines.append(f"| {one['set']} | {one['images']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table as it grows, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], help="source, or SOURCE:SPLIT (repeatable)")
    parser.add_argument("--images", type=int, default=2000, help="images of each set")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows = []
    for source in ("digits", *arguments.data):
        path, _, split = source.partition(":")
        images = load_images(path, split=split or None)
        name = f"{Path(path).name} {images.size[0]} x {images.size[1]}"
        variants = [(f"{name}{'' if images.channels == 1 else ' colour'}", images)]
        if images.channels == 3:
            variants.append((f"{name} grey", load_images(path, split=split or None, channels=1)))
            grey16 = load_images(path, split=split or None, channels=1, resolution=16)
            variants.append((f"{Path(path).name} 16 x 16 grey", grey16))
        for label, one in variants:
            rows.append(row(label, one, arguments.images))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.output:
        protocol = {"seed": SEED, "noise": "gaussian in [-1, 1], clipped, 8 bit", "told": "nothing"}
        arguments.output.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
