"""Does every metric move the way it should? CIFAR-10 images with known damage, judged as if they were generated.

    python -m experiments.known_damage --data CIFAR10 --extractor pixels --extractor squeezenet10_imagenet.pt \
        --extractor resnet20_cifar10.pt --output experiments/results/known_damage.json

The "generated" images are real test images with one damage. For every seed, all from the test split and disjoint, also
between seeds: ``-n`` images to be damaged and ``REFERENCE`` to compare with, equally many of each class. For dropped
modes the images are further test images of the classes that are left, the next classes for every seed. Copies are
looked for among ``TRAINING`` images of the training split, other ones for every seed; replay takes them from there. The
row "none" is the same images undamaged: real against real, the floor of every other row.

About 30 minutes on one core that is shared with other work; features are cached. The tables: results/pages
(``python -m experiments.pages``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import ImageDataset, load_images
from robustdiff.evaluation.extractors import Extractor, open_extractor
from robustdiff.evaluation.features import default_cache, extract
from robustdiff.evaluation.memorisation import find_copies
from robustdiff.evaluation.metrics import compute_metrics
from robustdiff.utils.images import from_uint8, to_uint8
from robustdiff.utils.seeds import derive_seed

RESULT = Path(__file__).parent / "results" / "known_damage.json"
REFERENCE = 1000
TRAINING = 5000
NONE = "none"
COPYING = "copying"
"""Where the shares of copies stand, which are counted in pixels whatever the extractor."""

STRENGTHS: Mapping[str, Sequence[float]] = {
    "noise": (0.05, 0.1, 0.2),
    "blur": (0.5, 1.0, 2.0),
    "contrast": (0.75, 0.5, 0.25),
    "modes": (5, 2, 1),
    "replay": (0.1, 0.5, 1.0),
    "duplicates": (0.5, 0.1, 0.02),
}
MEANING: Mapping[str, str] = {
    "noise": "Gaussian, standard deviation in [-1, 1]",
    "blur": "Gaussian, standard deviation in pixels",
    "contrast": "factor towards mid grey",
    "modes": "classes left, of ten",
    "replay": "share that are training images",
    "duplicates": "share that are different images; each is repeated",
}
METRICS = ("FD", "KID", "precision", "recall", "coverage", "clipped density", "clipped coverage", "diversity", "vendi")
SHARES = ("near-copies", "close copies")
UP, DOWN, SAME = "up", "down", "same"
EXPECTED: Mapping[str, Mapping[str, str]] = {
    "noise": {
        "FD": UP, "KID": UP, "precision": DOWN, "recall": DOWN, "coverage": DOWN,
        "clipped density": DOWN, "clipped coverage": DOWN, "near-copies": SAME,
    },
    "blur": {
        "FD": UP, "KID": UP, "precision": DOWN, "recall": DOWN, "coverage": DOWN,
        "clipped density": DOWN, "clipped coverage": DOWN, "near-copies": SAME,
    },
    "contrast": {
        "FD": UP, "KID": UP, "precision": DOWN, "recall": DOWN, "coverage": DOWN,
        "clipped density": DOWN, "clipped coverage": DOWN, "near-copies": SAME,
    },
    "modes": {
        "FD": UP, "KID": UP, "precision": SAME, "recall": DOWN, "coverage": DOWN, "diversity": DOWN,
        "clipped density": SAME, "clipped coverage": DOWN, "vendi": DOWN,
        "near-copies": SAME,
    },
    "replay": {
        "FD": SAME, "KID": SAME, "precision": SAME, "recall": SAME, "coverage": SAME, "diversity": SAME,
        "clipped density": SAME, "clipped coverage": SAME, "vendi": SAME,
        "near-copies": UP, "close copies": UP,
    },
    "duplicates": {
        "FD": UP, "KID": UP, "precision": SAME, "recall": DOWN, "coverage": DOWN, "diversity": DOWN,
        "clipped density": SAME, "clipped coverage": DOWN, "vendi": DOWN,
        "near-copies": SAME,
    },
}  # fmt: skip
"""What each metric should do as the damage grows. Left out: diversity and vendi under noise, blur and contrast, where
they may do either, and close copies wherever nothing is copied, as their threshold lets one real image in a hundred
through."""


_SQUEEZENET = "squeezenet10_imagenet"
EXCEPTIONS: Mapping[tuple[str, str, str], str] = {
    ("pixels", "noise", "KID"): SAME,
    ("pixels", "noise", "recall"): UP,
    ("pixels", "blur", "FD"): "unclear",
    ("pixels", "blur", "KID"): SAME,
    ("pixels", "blur", "precision"): UP,
    ("pixels", "blur", "coverage"): UP,
    ("pixels", "contrast", "precision"): UP,
    ("pixels", "contrast", "coverage"): "unclear",
    ("pixels", "modes", "recall"): "unclear",
    ("pixels", "modes", "coverage"): "unclear",
    ("pixels", "modes", "diversity"): "unclear",
    ("pixels", "replay", "recall"): "unclear",
    ("pixels", "duplicates", "precision"): UP,
    (_SQUEEZENET, "blur", "precision"): "unclear",
    (_SQUEEZENET, "contrast", "precision"): UP,
    (_SQUEEZENET, "modes", "diversity"): "unclear",
    (_SQUEEZENET, "replay", "KID"): "unclear",
    (_SQUEEZENET, "replay", "coverage"): "unclear",
    (_SQUEEZENET, "duplicates", "diversity"): "unclear",
    ("pixels", "blur", "clipped density"): SAME,
    ("pixels", "blur", "clipped coverage"): SAME,
    ("pixels", "contrast", "clipped density"): SAME,
    ("pixels", "contrast", "clipped coverage"): SAME,
    ("pixels", "modes", "clipped density"): "unclear",
    ("pixels", "modes", "clipped coverage"): SAME,
    ("pixels", "modes", "vendi"): "unclear",
    ("pixels", "duplicates", "clipped density"): "unclear",
    (_SQUEEZENET, "blur", "clipped density"): SAME,
    (_SQUEEZENET, "contrast", "clipped density"): SAME,
    (_SQUEEZENET, "modes", "clipped density"): "unclear",
    (_SQUEEZENET, "replay", "clipped density"): "unclear",
    (_SQUEEZENET, "replay", "clipped coverage"): "unclear",
    (_SQUEEZENET, "replay", "vendi"): "unclear",
    (_SQUEEZENET, "duplicates", "clipped density"): "unclear",
    ("resnet20_cifar10", "modes", "clipped density"): "unclear",
    ("resnet20_cifar10", "replay", "vendi"): "unclear",
}
"""What does not move as expected in the committed result; docs/protocols.md says why, as far as that is known."""


# -- damage ------------------------------------------------------------------------------------------


class Draw:
    """The images of one seed: disjoint parts of the test split and of the training split."""

    def __init__(self, test: ImageDataset, train: ImageDataset, n: int, seed: int) -> None:
        """Cut them out.

        Args:
            test: With labels.
            train: Any.
            n: Images to be damaged; a multiple of ten.
            seed: From 0.
        """
        assert test.labels is not None
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(derive_seed("known damage", "test")))
        labels, self.classes = test.labels[order], len(test.classes)
        self.of_class = [order[labels == c] for c in range(self.classes)]
        part, base = n // self.classes, REFERENCE // self.classes
        least = min(map(len, self.of_class))
        if n % self.classes or (seed + 1) * (part + base) > least or n > least - base:
            sys.exit(
                f"-n {n} must be a multiple of {self.classes}, and --seeds such draws, with {REFERENCE} images for the "
                f"reference of each, must be had from {least} test images of a class: lower -n or --seeds"
            )
        first = seed * (part + base)
        self.reference = torch.cat([places[first : first + base] for places in self.of_class])
        self.plain = torch.cat([places[first + base : first + base + part] for places in self.of_class])
        self.first, self.base, self.n, self.seed, self.test = first, base, n, seed, test
        shuffled = torch.randperm(
            len(train), generator=torch.Generator().manual_seed(derive_seed("known damage", "train"))
        )
        if (seed + 1) * TRAINING > len(shuffled):
            sys.exit(f"--seeds: {len(shuffled)} training images are too few for draws of {TRAINING}: lower it")
        self.training = train.images[shuffled[seed * TRAINING : (seed + 1) * TRAINING]]

    def damaged(self, damage: str, strength: float) -> Tensor:
        """The images that stand for generated ones, uint8 (n, C, H, W)."""
        images: Tensor = self.test.images[self.plain]
        if damage == "noise":
            return self._each(images, Corruption("gaussian", {"sigma": strength}))
        if damage == "blur":
            return self._each(images, Corruption("blur", {"radius": strength}))
        if damage == "contrast":
            return to_uint8(from_uint8(images) * strength)
        shuffled = images[torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed))]
        if damage == "modes":
            return self._modes(int(strength))
        if damage == "replay":
            copies = round(strength * self.n)
            return torch.cat([self.training[:copies], shuffled[copies:]])
        if damage == "duplicates":
            different = shuffled[: max(1, round(strength * self.n))]
            return different.repeat(-(-self.n // len(different)), 1, 1, 1)[: self.n]
        return images

    def _each(self, images: Tensor, dirt: Corruption) -> Tensor:
        return torch.stack(
            [to_uint8(dirt.apply(from_uint8(image), self.seed, index)) for index, image in enumerate(images)]
        )

    def _modes(self, left: int) -> Tensor:
        """Images of ``left`` classes: the first ones for the first seed, then the next; none of the reference's."""
        found = []
        for c in range(self.seed * left, (self.seed + 1) * left):
            places = self.of_class[c % self.classes]
            free = torch.cat([places[: self.first], places[self.first + self.base :]])
            found.append(free[: self.n // left])
        images: Tensor = self.test.images[torch.cat(found)]
        return images


# -- measuring ---------------------------------------------------------------------------------------


def measure(draw: Draw, extractors: Sequence[Extractor], cache: Path | None, say: Callable[[str], None]) -> Any:  # noqa: ANN401
    """Values by (where, damage, strength as text, metric), where being an extractor or :data:`COPYING`."""
    found: dict[tuple[str, str, str, str], float] = {}
    held_out = draw.test.images[draw.reference]
    references = [extract(extractor, held_out, cache=cache) for extractor in extractors]
    cases = [(NONE, 0.0), *((damage, strength) for damage, values in STRENGTHS.items() for strength in values)]
    for damage, strength in cases:
        images, at = draw.damaged(damage, strength), f"{strength:g}"
        for extractor, reference in zip(extractors, references, strict=True):
            fake = extract(extractor, images, cache=cache)
            for value in compute_metrics(fake, reference, seed=draw.seed, intervals=False).values:
                name = value.name.split("-")[0] if value.name.startswith(("FD-", "KID-", "FID")) else value.name
                found[extractor.name, damage, at, name.replace("FID", "FD")] = value.value
        copying = find_copies(images.flatten(1), draw.training.flatten(1), held_out.flatten(1))
        for value in copying.values():
            if value.name in SHARES:
                found[COPYING, damage, at, value.name] = value.value
                if damage == NONE and value.floor is not None:
                    found[COPYING, "null", "0", value.name] = value.floor
        say(f"seed {draw.seed}, {damage} {strength:g}")
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it is written."""
    started = time.perf_counter()
    test = load_images(arguments.data, split="test")
    train = load_images(arguments.data, split="train")
    if test.labels is None:
        sys.exit(f"--data {arguments.data} has no labels, and modes are classes: name CIFAR-10")
    extractors = [open_extractor(spec) for spec in arguments.extractor or ["pixels"]]
    draws = [Draw(test, train, arguments.n, seed) for seed in range(arguments.seeds)]

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:7.0f} s  {text}", file=sys.stderr, flush=True)

    each = [measure(draw, extractors, None if arguments.no_cache else default_cache(), say) for draw in draws]
    rows = []
    for where, damage, strength, metric in each[0]:
        values = [float(f"{one[where, damage, strength, metric]:.6g}") for one in each]
        rows.append({"where": where, "damage": damage, "strength": strength, "metric": metric, "values": values})
    protocol = {
        "data": "CIFAR-10, test split; copies: training split",
        "test_sha256": test.sha256,
        "train_sha256": train.sha256,
        "n": arguments.n,
        "reference": REFERENCE,
        "training": TRAINING,
        "seeds": list(range(arguments.seeds)),
        "extractors": [{"name": e.name, "sha256": e.sha256, "resize": e.resize} for e in extractors],
        "torch": torch.__version__.split("+")[0],
        "seconds": round(time.perf_counter() - started),
    }
    return {"protocol": protocol, "rows": rows}


# -- reading -----------------------------------------------------------------------------------------

Values = Mapping[tuple[str, str, str, str], Sequence[float]]


def by_key(result: Mapping[str, Any]) -> Values:
    """(where, damage, strength, metric) -> the values of the seeds."""
    return {(r["where"], r["damage"], r["strength"], r["metric"]): r["values"] for r in result["rows"]}


def series(values: Values, where: str, damage: str, metric: str) -> list[Sequence[float]]:
    """Undamaged first, then by strength."""
    stronger = [values[where, damage, f"{strength:g}", metric] for strength in STRENGTHS[damage]]
    return [values[where, NONE, "0", metric], *stronger]


def direction(steps: Sequence[Sequence[float]]) -> str:
    """What a metric does as the damage grows: "up", "down", "same", or "unclear".

    Up: on the strongest damage every seed is above its own undamaged value, by more than the largest difference between
    undamaged values of two seeds in the mean, and no step goes down by more than a tenth of the whole change. Same: no
    mean on any strength differs from that of the undamaged by more than that largest difference.
    """
    base = steps[0]
    noise = max(base) - min(base)
    means = [statistics.mean(step) for step in steps]
    if all(abs(mean - means[0]) <= noise for mean in means):
        return SAME
    for name, sign in ((UP, 1), (DOWN, -1)):
        paired = [sign * (b - a) for a, b in zip(base, steps[-1], strict=True)]
        rises = [sign * (b - a) for a, b in itertools.pairwise(means)]
        change = statistics.mean(paired)
        if min(paired) > 0 and change > noise and min(rises) >= -0.1 * change:
            return name
    return "unclear"


def verdicts(result: Mapping[str, Any]) -> dict[tuple[str, str, str], tuple[str, str]]:
    """(where, damage, metric) -> (what it should do, what it does), for all that something is expected of."""
    values, found = by_key(result), {}
    places = [extractor["name"] for extractor in result["protocol"]["extractors"]]
    for damage, wanted in EXPECTED.items():
        for metric, should in wanted.items():
            for where in [COPYING] if metric in SHARES else places:
                found[where, damage, metric] = (should, direction(series(values, where, damage, metric)))
    return found


# -- writing -----------------------------------------------------------------------------------------


def _number(metric: str, values: Sequence[float]) -> str:
    """Mean and deviation; kernel distances run from 1e-4 to 1e8, by the scale of the features."""
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    if metric == "KID":
        return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{mean:.2g} ± {deviation:.1g}")
    digits = 0 if abs(mean) >= 100 else 2 if abs(mean) >= 2 else 3
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"


def table(result: Mapping[str, Any], where: str) -> str:
    """Mean and standard deviation between seeds, a row per damage and strength."""
    values, metrics = by_key(result), SHARES if where == COPYING else METRICS
    lines = [f"| damage | {' | '.join(metrics)} |", f"|---|{'--:|' * len(metrics)}"]
    cases = [(NONE, 0.0), *((damage, s) for damage, strengths in STRENGTHS.items() for s in strengths)]
    if where == COPYING:
        cases.insert(0, ("null", 0.0))
    titles = {NONE: "none: real test images", "null": "null: the reference, scored alike"}
    for damage, strength in cases:
        cells = [_number(metric, values[where, damage, f"{strength:g}", metric]) for metric in metrics]
        lines.append(f"| {titles.get(damage, f'{damage} {strength:g}')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def order(result: Mapping[str, Any]) -> str:
    """What each metric does under each damage; in bold what it should not."""
    found = verdicts(result)
    places = [extractor["name"] for extractor in result["protocol"]["extractors"]]
    columns = [*METRICS, *SHARES]
    lines = [f"| damage | by | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for damage in STRENGTHS:
        for where in [*places, COPYING]:
            cells = []
            for metric in columns:
                should, does = found.get((where, damage, metric), ("", ""))
                cells.append("" if not should else does if should == does else f"**{does}** (should: {should})")
            lines.append(f"| {damage} | {'pixels' if where == COPYING else where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print what each metric does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="CIFAR-10: anything `robustdiff train` reads, with splits train and test"
    )
    parser.add_argument("--extractor", action="append", default=[], help="as for `robustdiff evaluate` (repeatable)")
    parser.add_argument("-n", type=int, default=500, help="images that stand for generated ones")
    parser.add_argument("--seeds", type=int, default=3, help="disjoint draws")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    arguments = parser.parse_args()
    result = run(arguments)
    print(order(result))
    if arguments.output:
        rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
        text = f'{{\n "protocol": {json.dumps(result["protocol"])},\n "rows": [\n  {rows}\n ]\n}}\n'
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
