"""What is left of a classifier's accuracy behind purification when the attacker differentiates through all of it?

    robustdiff train CIFAR10 --output-dir run --preset plain
    python -m experiments.purified_cifar10 --data CIFAR10 --model run --classifier resnet20_cifar10.pt --output out.json

The first n test images, L_inf 8/255, and the accuracy, for every strength of the purification, on: images as they are;
random signs of that size; an attack on the classifier alone, which does not know of the purification; and PGD through
the whole chain, with the full gradient and the mean over draws of its noise, the same ones throughout (fixed) or new
ones at every step (fresh). Judged on draws that no attack has seen. First row: the classifier without purification.

Batches of images that are done are kept in the JSON: the same command goes on where it was stopped. An accuracy is
that of this attack, an upper bound on what a better one would leave (docs/protocols.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from robustdiff import __version__
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import CallableGoal
from robustdiff.attacks.optimizers import PGD, RandomSearch
from robustdiff.attacks.purification import PurifiedLoss, accuracy
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.pipeline import load_pipeline, weights_sha256
from robustdiff.utils import atomic_io
from robustdiff.utils.images import from_uint8
from robustdiff.utils.seeds import derive_seed

RADIUS = 16 / 255
"""Of the perturbation in [-1, 1]: 8/255 of the usual [0, 1]."""
ALONE = "classifier alone"


class Logits(nn.Module):
    """A TorchScript file with a method ``logits`` on [0, 1], as a classifier of images in [-1, 1]."""

    def __init__(self, path: Path) -> None:
        """Load it, on the CPU."""
        super().__init__()
        self.script = torch.jit.load(str(path), map_location="cpu").eval()
        if not hasattr(self.script, "logits"):
            sys.exit(f"--classifier {path} has no method `logits`: give one that has, such as resnet20_cifar10.pt")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (B, classes), of images (B, 3, H, W)."""
        return self.script.logits(images / 2 + 0.5)


@dataclass(frozen=True)
class Attacks:
    """How hard to try.

    Attributes:
        steps: Of PGD.
        eot: Draws of the noise per gradient.
        verdicts: Other draws, that judge.
        seed: Rules all noise.
    """

    steps: int
    eot: int
    verdicts: int
    seed: int


Counts = dict[str, tuple[float, float]]
"""Kind of image -> sum over images of the share of draws that are right; images that are right in every draw."""


def alone(classifier: Logits, images: Tensor, labels: Tensor, attacks: Attacks, first: int) -> tuple[Counts, Tensor]:
    """A batch without purification, and what PGD has found against the classifier.

    Args:
        classifier: See there.
        images: In [-1, 1], (B, 3, H, W), the images ``first``, ``first + 1`` ... of the set.
        labels: Shape (B,).
        attacks: How hard to try.
        first: See there.
    """
    seeds = [derive_seed("alone", attacks.seed, first + i) for i in range(len(images))]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def loss(omega: Tensor) -> Tensor:
        pushed = (images + omega[:, 0]).clamp(-1, 1)
        return nn.functional.cross_entropy(classifier(pushed), labels, reduction="none")

    objective, like, ball = (
        CallableGoal(loss, modules=[classifier]),
        torch.zeros_like(images).unsqueeze(1),
        LpBall("linf", RADIUS),
    )
    omegas = {
        "clean": like,
        "random": RandomSearch(1)(objective, ball, like, generators).omega,
        "attacked": PGD(attacks.steps)(objective, ball, like, generators).omega,
    }
    with torch.no_grad():
        answers = {kind: classifier((images + o[:, 0]).clamp(-1, 1)).argmax(1) for kind, o in omegas.items()}
    right = {kind: float((answer == labels).sum()) for kind, answer in answers.items()}
    return {kind: (count, count) for kind, count in right.items()}, omegas["attacked"]


def purified(chain: PurifiedLoss, attacks: Attacks, first: int, transferred: Tensor) -> Counts:
    """A batch through the whole chain.

    Args:
        chain: Classifier, purifier and the batch.
        attacks: How hard to try.
        first: Place of the batch's first image in the set.
        transferred: What was found against the classifier alone, (B, 1, 3, H, W).
    """
    ball = LpBall("linf", RADIUS)
    fresh = replace(chain, fresh=True)

    def generators(what: str) -> list[torch.Generator]:
        seeds = [derive_seed(what, attacks.seed, first + i) for i in range(len(chain.images))]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    omegas = {
        "clean": None,
        "random": RandomSearch(1)(chain, ball, chain.like, generators("random")).omega,
        "transferred": transferred,
        "fixed": PGD(attacks.steps)(chain, ball, chain.like, generators("fixed")).omega,
        "fresh": PGD(attacks.steps, keep="last")(fresh, ball, chain.like, generators("fresh")).omega,
    }
    found = {kind: accuracy(chain, omega, attacks.verdicts) for kind, omega in omegas.items()}
    return {kind: (mean * len(chain.images), every * len(chain.images)) for kind, (mean, every) in found.items()}


def table(record: Mapping[str, Any]) -> str:
    """The rows, in percent: the mean over draws; in brackets, right in every draw."""
    kinds = ["clean", "random", "attacked", "transferred", "fixed", "fresh"]
    heads = ["as they are", "random signs", "PGD on the classifier", "the same, purified", "PGD, fixed", "PGD, fresh"]
    lines = [f"| strength | images | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for name, parts in record["rows"].items():
        n = sum(part["images"] for part in parts.values())
        cells = []
        for kind in kinds:
            sums = [part["right"][kind] for part in parts.values() if kind in part["right"]]
            mean, every = (100 * sum(column) / n for column in zip(*sums, strict=True)) if sums else (None, None)
            cells.append("-" if mean is None else f"{mean:.1f}" if name == ALONE else f"{mean:.1f} ({every:.1f})")
        lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as `robustdiff train` takes it")
    parser.add_argument("--model", required=True, help="run or pipeline folder, 32 x 32 RGB")
    parser.add_argument("--classifier", type=Path, required=True, help="TorchScript with a method `logits`")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; goes on with what it holds")
    parser.add_argument("-n", type=int, default=512, help="test images, the first (default: 512)")
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="t* / T (default: .05 .1 .2)"
    )
    parser.add_argument("--calls", type=int, default=10, help="network calls of a purification (default: 10)")
    parser.add_argument("--steps", type=int, default=40, help="of PGD (default: 40)")
    parser.add_argument("--eot", type=int, default=20, help="draws of the noise per gradient (default: 20)")
    parser.add_argument("--verdicts", type=int, default=20, help="draws that judge (default: 20)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="rules all noise (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all")
    return parser.parse_args()


def main() -> None:
    """Attack what is missing; print the table."""
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    attacks = Attacks(arguments.steps, arguments.eot, arguments.verdicts, arguments.seed)
    test = load_images(arguments.data, split="test")
    if test.labels is None:
        sys.exit(f"--data {arguments.data} has no labels: give CIFAR-10 as published")
    pipeline = load_pipeline(arguments.model)
    pipeline.unet.to(arguments.device)
    classifier = Logits(arguments.classifier).to(arguments.device)
    about = {
        "what": "accuracy of a classifier behind purification",
        "classifier": {"name": arguments.classifier.name, "sha256": atomic_io.sha256(arguments.classifier)},
        "model": {"name": Path(arguments.model).name, "weights_sha256": weights_sha256(pipeline)},
        "threat": f"L_inf 8/255 of [0, 1], white box, PGD-{attacks.steps}, mean over {attacks.eot} draws per gradient",
        "settings": {
            "calls": arguments.calls,
            "sampler": "ddim",
            "steps": attacks.steps,
            "eot": attacks.eot,
            "verdicts": attacks.verdicts,
            "seed": attacks.seed,
            "batch_size": arguments.batch_size,
        },
        "versions": {"robustdiff": __version__, "torch": torch.__version__.split("+")[0]},
    }
    record = {**about, "rows": {}}
    if arguments.output.is_file():
        there = atomic_io.read_json(arguments.output)
        if {key: there.get(key) for key in about} != about:
            sys.exit(f"--output {arguments.output} is of other settings, a model or versions: give another file")
        record = there
    for first in range(0, min(arguments.n, len(test)), arguments.batch_size):
        places = list(range(first, min(first + arguments.batch_size, arguments.n, len(test))))
        images = torch.stack([from_uint8(test.images[place]) for place in places]).to(arguments.device)
        labels = test.labels[places].to(arguments.device)
        transferred: Tensor | None = None
        for name in (ALONE, *(f"{strength:g}" for strength in arguments.strengths)):
            started, parts = time.perf_counter(), record["rows"].setdefault(name, {})
            if str(first) in parts and parts[str(first)]["images"] == len(places):
                continue
            if transferred is None:
                right, transferred = alone(classifier, images, labels, attacks, first)
            if name != ALONE:
                settings = {"strength": float(name), "steps": arguments.calls}
                seed = derive_seed("chain", attacks.seed, first)
                chain = PurifiedLoss(classifier, pipeline, images, labels, attacks.eot, False, seed, settings)
                right = purified(chain, attacks, first, transferred)
            parts[str(first)] = {"images": len(places), "right": right}
            atomic_io.write_json(arguments.output, record)
            print(f"images {first} to {places[-1]}, {name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(table(record))


if __name__ == "__main__":
    main()
