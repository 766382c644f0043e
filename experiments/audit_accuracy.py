"""How right the audit of a set is: each kind of dirt on known images, nothing told.

    python experiments/audit_accuracy.py --data CIFAR10 --data BUTTERFLIES --output experiments/results/audit.json

For every set and dirt: how many of the dirty images were called clean, how many of the clean ones dirty, and the level
found, all as `robustdiff train --auto` would act on it. Dirt is added as training adds it, frozen and unclipped, or,
with `8 bit`, clipped and rounded as in a file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from robustdiff import Corruption, load_images
from robustdiff.corruption import corrupt, from_uint8, to_uint8
from robustdiff.trust import examine

DIRT = {
    "clean": (),
    **{f"gaussian {s} on 90 %": (f"gaussian:sigma={s},fraction=0.9",) for s in (0.2, 0.1, 0.05)},
    **{f"gaussian {s} on 30 %": (f"gaussian:sigma={s},fraction=0.3",) for s in (0.2, 0.1, 0.05)},
    "gaussian 0.2 on all": ("gaussian:sigma=0.2",),
    "gaussian 0.2 on 90 %, 8 bit": ("gaussian:sigma=0.2,fraction=0.9",),
    "uniform outliers, 10 %": ("outlier:source=uniform,fraction=0.1",),
    "checkerboards, 10 %": ("outlier:source=checker,fraction=0.1",),
    "missing 30 % of pixels, on 90 %": ("missing:amount=0.3,fraction=0.9",),
    "missing blocks, on 90 %": ("missing:amount=0.3,block=4,fraction=0.9",),
    "impulse 10 % of pixels, on 50 %": ("impulse:amount=0.1,fraction=0.5",),
    "JPEG 15 on 90 %": ("jpeg:quality=15,fraction=0.9",),
    "JPEG 50 on 30 %": ("jpeg:quality=50,fraction=0.3",),
    "blur 1 on 90 %": ("blur:radius=1,fraction=0.9",),
    "mixed": (
        "outlier:source=uniform,fraction=0.05",
        "jpeg:quality=15,fraction=0.3",
        "missing:amount=0.3,fraction=0.2",
        "gaussian:sigma=0.2,fraction=0.4",
    ),
}
SEED = 0


def row(name: str, x0: torch.Tensor, dirt: str) -> dict[str, object]:
    """One line of the table."""
    corruptions = tuple(Corruption.parse(spec) for spec in DIRT[dirt])
    images, hit = x0.clone(), torch.zeros(len(x0), dtype=torch.bool)
    for index in range(len(x0)):
        changed, kinds = corrupt(x0[index], corruptions, SEED, index)
        if kinds:
            images[index], hit[index] = changed, True
    if dirt.endswith("8 bit"):
        images = from_uint8(to_uint8(images))
    started = time.perf_counter()
    trust = examine(lambda places: images[places.start : places.stop], len(images))
    called = ~trust.clean if trust.regularise is None else torch.ones_like(hit)
    return {
        "set": name,
        "dirt": dirt,
        "images": len(x0),
        "dirty": int(hit.sum()),
        "missed": int((hit & ~called).sum()),
        "false": int((~hit & called).sum()),
        "levels": {
            part: [round(f.level, 4) for f in trust.findings if f.part == part and f.level is not None]
            for part in dict.fromkeys(f.part for f in trust.findings)
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown: for every dirt and set, missed of dirty, false of clean, and the levels found."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    by_place = {(row["dirt"], row["set"]): row for row in rows}
    lines = [f"| dirt | {' | '.join(sets)} |", f"|:--|{':--|' * len(sets)}"]
    for dirt in DIRT:
        cells = []
        for name in sets:
            one = by_place[dirt, name]
            clean = one["images"] - one["dirty"]
            parts = [f"{one['missed']}/{one['dirty']}" if one["dirty"] else "-"]
            parts.append(f"{one['false']}/{clean}" if clean else "-")
            said = ((part, " ".join(f"{level:.3g}" for level in levels)) for part, levels in one["levels"].items())
            found = ", ".join(" ".join(words).strip() for words in said)
            cells.append(f"{', '.join(parts)}; {found or 'nothing'}")
        lines.append(f"| {dirt} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print every row as it comes, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], help="source (repeatable); digits always")
    parser.add_argument("--images", type=int, default=4000, help="images of each set")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows = []
    for source in ("digits", *arguments.data):
        variants = [(None, None)] if source == "digits" else [(32, 3), (16, 1)]
        for resolution, channels in variants:
            images = load_images(source, resolution=resolution, channels=channels)
            x0 = images.x0(slice(0, arguments.images))
            name = f"{Path(source).name}, {images.size[0]} x {images.size[1]} {'grey' if channels != 3 else 'RGB'}"
            for dirt in DIRT:
                rows.append(row(name, x0, dirt))
                print(json.dumps(rows[-1]), flush=True)
    if arguments.output:
        protocol = {"seed": SEED, "told": "nothing", "dirt": DIRT}
        text = json.dumps({"protocol": protocol, "rows": rows}, indent=1)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
