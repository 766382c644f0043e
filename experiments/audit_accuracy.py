"""How right the audit of a set is: each kind of dirt on known images, nothing told.

    python -m experiments.audit_accuracy --data CIFAR10 --data BUTTERFLIES --extractor FILE.pt \
        --output experiments/results/audit.json

For every set and dirt: how many of the dirty images were called clean, how many of the clean ones dirty, and the level
found, all as `robustdiff train --auto` would act on it. Dirt is added as training adds it, frozen and unclipped, or,
with `8 bit`, clipped and rounded as in a file.

Kinds of damage beyond those that --corrupt makes (docs/guide/detector.md) get a row for each of their strengths.

Beside it, near copies: to every set, changed copies of its first 200 images are added, and counted if found with
their original. And foreign pictures: to the first set of --data, images of every other, and how well their distance
in the features of each --extractor tells them apart (area under the curve).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import interpolate

from robustdiff.audit.detector import Detector, registered_detectors
from robustdiff.audit.detectors import duplicates
from robustdiff.audit.detectors.feature_outliers import robust_distance
from robustdiff.audit.run import audit
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import load_images
from robustdiff.evaluation.extractors import open_extractor
from robustdiff.evaluation.features import extract
from robustdiff.utils.images import from_uint8, to_uint8

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
MADE_BY_CORRUPT = ("noise", "holes", "blur", "jpeg")
"""Kinds of damage that the rows above have."""
SHARE = 0.3
"""Of the images, that other kinds hit."""
SEED = 0
CHANGES = (
    "jpeg:quality=50",
    "jpeg:quality=20",
    "gaussian:sigma=0.05",
    "gaussian:sigma=0.1",
    "blur:radius=0.7",
    "mirror",
    "shift",
)
"""What is done to copies: dirt, or mirroring, or a shift by one pixel."""
COPIED = 200
FOREIGN = (0.01, 0.05, 0.1)
"""Foreign images over those of the set."""


def simulated() -> dict[str, tuple[Detector, float]]:
    """Rows of kinds that --corrupt does not make: name of the dirt, who simulates it, how strongly."""
    others = [kind for kind in registered_detectors() if kind.name not in MADE_BY_CORRUPT]
    return {f"{kind.name} {strength:g} on 30 %": (kind, strength) for kind in others for strength in kind.strengths}


def row(name: str, x0: torch.Tensor, dirt: str) -> dict[str, object]:
    """One line of the table."""
    images, hit = x0.clone(), torch.zeros(len(x0), dtype=torch.bool)
    for index in range(len(x0)):
        if dirt in DIRT:
            corruptions = tuple(Corruption.parse(spec) for spec in DIRT[dirt])
            changed, kinds = corrupt(x0[index], corruptions, SEED, index)
        else:
            (kind, strength), generator = simulated()[dirt], torch.Generator().manual_seed(SEED + index)
            kinds = (kind.name,) if torch.rand((), generator=generator) < SHARE else ()
            changed = kind.simulate(x0[index], strength, generator)
        if kinds:
            images[index], hit[index] = changed, True
    if dirt.endswith("8 bit"):
        images = from_uint8(to_uint8(images))
    started = time.perf_counter()
    found = audit(images)
    called = ~found.clean if found.regularise is None else torch.ones_like(hit)
    return {
        "set": name,
        "dirt": dirt,
        "images": len(x0),
        "dirty": int(hit.sum()),
        "missed": int((hit & ~called).sum()),
        "false": int((~hit & called).sum()),
        "levels": {
            kind: [round(one.level, 4) for one in found.findings if one.kind == kind and one.level is not None]
            for kind in dict.fromkeys(one.kind for one in found.findings)
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def changed(images: torch.Tensor, change: str) -> torch.Tensor:
    """Copies that somebody did something to."""
    if change == "mirror":
        return images.flip(-1)
    if change == "shift":
        return images.roll(1, -1)
    dirt = (Corruption.parse(change),)
    return torch.stack([corrupt(image, dirt, SEED, index)[0] for index, image in enumerate(images)])


def copied(name: str, x0: torch.Tensor) -> dict[str, object]:
    """How many planted copies are found with their original, and what the set holds of its own."""

    def groups(images: torch.Tensor) -> list[list[int]]:
        asked = torch.ones(len(images), dtype=torch.bool)
        return duplicates.near(lambda places: images[places.start : places.stop], len(images), asked)

    n, count = min(COPIED, len(x0)), len(x0)
    found = {}
    for change in CHANGES:
        label = {place: group for group in groups(torch.cat([x0, changed(x0[:n], change)])) for place in group}
        found[change] = sum(count + place in label.get(place, []) for place in range(n))
    return {"set": name, "images": count, "own": [len(group) for group in groups(x0)], "copied": n, "found": found}


def foreign(
    name: str, source: str, share: float, x0: torch.Tensor, other: torch.Tensor, extractor: str
) -> dict[str, object]:
    """How well the distance in features tells foreign images from those of the set."""
    few = other[: round(share * len(x0))]
    if x0.shape[2:] != few.shape[2:]:
        few = interpolate(few, size=x0.shape[2:], mode="bilinear", antialias=True)
    images = to_uint8(torch.cat([x0, few.expand(-1, x0.shape[1], -1, -1)]))
    network = open_extractor(extractor)
    distance = robust_distance(extract(network, images, cache=None).values)
    area = roc_auc_score([0] * len(x0) + [1] * len(few), distance)
    return {"set": name, "foreign": source, "count": len(few), "extractor": network.name, "area": round(float(area), 3)}


def copies_table(rows: list[dict[str, Any]]) -> str:
    """The rows of copies in markdown."""
    lines = [f"| set | its own | {' | '.join(CHANGES)} |", f"|:--|:--|{'--:|' * len(CHANGES)}"]
    for one in rows:
        own = f"{sum(one['own'])} of {one['images']}"
        lines.append(f"| {one['set']} | {own} | {' | '.join(str(one['found'][change]) for change in CHANGES)} |")
    return "\n".join(lines) + "\n"


def foreign_table(rows: list[dict[str, Any]]) -> str:
    """The rows of foreign pictures in markdown."""
    names = list(dict.fromkeys(row["extractor"] for row in rows))
    lines = [f"| set | foreign | {' | '.join(names)} |", f"|:--|:--|{'--:|' * len(names)}"]
    kinds = dict.fromkeys((row["set"], row["foreign"], row["count"]) for row in rows)
    area = {(row["set"], row["foreign"], row["count"], row["extractor"]): row["area"] for row in rows}
    for name, source, count in kinds:
        cells = " | ".join(f"{area[name, source, count, extractor]:.2f}" for extractor in names)
        lines.append(f"| {name} | {count} of {source} | {cells} |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown: for every dirt and set, missed of dirty, false of clean, and the levels found."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    by_place = {(row["dirt"], row["set"]): row for row in rows}
    lines = [f"| dirt | {' | '.join(sets)} |", f"|:--|{':--|' * len(sets)}"]
    for dirt in dict.fromkeys(row["dirt"] for row in rows):
        cells = []
        for name in sets:
            one = by_place[dirt, name]
            clean = one["images"] - one["dirty"]
            counts = [f"{one['missed']}/{one['dirty']}" if one["dirty"] else "-"]
            counts.append(f"{one['false']}/{clean}" if clean else "-")
            kinds = {k: levels for k, levels in one["levels"].items() if k != "duplicates"}  # a table by itself
            said = ((kind, " ".join(f"{level:.3g}" for level in levels)) for kind, levels in kinds.items())
            found = ", ".join(" ".join(words).strip() for words in said)
            cells.append(f"{', '.join(counts)}; {found or 'nothing'}")
        lines.append(f"| {dirt} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print every row as it comes, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], help="source (repeatable); digits always")
    parser.add_argument("--images", type=int, default=4000, help="images of each set")
    parser.add_argument("--extractor", action="append", default=[], help="features (repeatable), for foreign pictures")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows, alike, foreigners = [], [], []
    sets: dict[str, torch.Tensor] = {}
    for source in ("digits", *arguments.data):
        variants = [(None, None)] if source == "digits" else [(32, 3), (16, 1)]
        for resolution, channels in variants:
            images = load_images(source, resolution=resolution, channels=channels)
            x0 = images.x0(slice(0, arguments.images))
            name = f"{Path(source).name}, {images.size[0]} x {images.size[1]} {'grey' if channels != 3 else 'RGB'}"
            sets[name] = x0
            alike.append(copied(name, x0))
            print(json.dumps(alike[-1]), flush=True)
            for dirt in (*DIRT, *simulated()):
                rows.append(row(name, x0, dirt))
                print(json.dumps(rows[-1]), flush=True)
    colour = [name for name in sets if "grey" not in name or name.startswith("digits")]
    home = next((name for name in colour if not name.startswith("digits")), None)
    for source in colour:
        for share in FOREIGN if home not in (None, source) else ():
            for extractor in arguments.extractor:
                foreigners.append(foreign(home, source, share, sets[home], sets[source], extractor))
                print(json.dumps(foreigners[-1]), flush=True)
    if arguments.output:
        protocol = {"seed": SEED, "told": "nothing", "dirt": DIRT}
        text = json.dumps({"protocol": protocol, "rows": rows, "copies": alike, "foreign": foreigners}, indent=1)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
