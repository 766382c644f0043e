"""Is a U-Net that was trained robustly harder to attack end to end? Clean digits, every method, three seeds.

    python -m experiments.attacked_digits --work attacked-digits --results experiments/results/attacked_digits

What ``attacked_worlds.py`` asks of worlds whose truth is known, of digits: for every method the quality of its draws,
and how far the final image moves, in generated spreads, when the start of the trajectory is moved by random noise, by
random signs and by PGD, and when all steps are. A plain network trained half as long shows what an attack does at
lower quality. Networks are trained by ``robustdiff train`` into ``--work``, rows and seeds are kept in ``--results``:
what is there is not done again. One thread. ``--strong``: APGD-40 with three starts on 16 images, into a folder of its
own.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging

from experiments import digits_demo
from experiments.attacked_worlds import Attacks, displacements, keep, table
from experiments.poisoning import train
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.pipeline import load_pipeline, sample, trajectory_of
from robustdiff.diffusion.sigma_floor import SigmaClampedModel
from robustdiff.utils import atomic_io
from robustdiff.utils.images import to_uint8
from robustdiff.utils.seeds import derive_seed

ATTACKS = Attacks(calls=25, points=32, draws=500, radius_all=0.02, steps=20, restarts=1)
STRONG = dataclasses.replace(ATTACKS, points=16, steps=40, restarts=3, optimiser="apgd")
SAMPLES = 1000
"""Draws for the quality."""
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
        relabel: See :class:`robustdiff.SigmaClampedModel`.
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
    "invariance": Row("invariance (paper-noise)", ("--preset", "paper-noise", "--objective", "invariance")),
    "random": Row("random (paper-noise)", ("--preset", "paper-noise", "--perturbation", "random")),
    "adversarial": Row("adversarial (paper-noise)", ("--preset", "paper-noise")),
    "paper": Row("paper (adversarial, state)", ("--preset", "paper")),
    "paper-random": Row("paper-random (state)", ("--preset", "paper-random")),
    "gated": Row("gated, as shipped", ("--preset", "gated")),
    "pseudo-huber": Row("pseudo-Huber", ("--objective", "pseudo-huber")),
}


def trained(name: str, seed: int, work: Path, data: Path) -> Path:
    """The run of a row's network, trained on clean digits unless it is there."""
    row = ROWS[name]
    return train(work, f"{row.network or name}-seed{seed}", data, str(round(IMAGES * row.share)), seed, row.flags)


def measure(
    name: str,
    seed: int,
    work: Path,
    data: Path,
    held_out: torch.Tensor,
    unshrunk: dict[str, float] | None,
    attacks: Attacks,
) -> dict[str, float | None]:
    """Every number of one row and seed.

    Shrinking scales displacements and spread alike: those of a shrunk row are those of the row before it, ``unshrunk``.
    """
    row = ROWS[name]
    pipeline = load_pipeline(trained(name, seed, work, data))
    images = sample(
        pipeline, SAMPLES, seed=10_000 * (1 + seed), steps=attacks.calls, batch_size=250, sigma_scale=row.relabel
    )
    images = images.mean(0) + row.shrink * (images - images.mean(0))
    error = digits_demo.frechet(to_uint8(images), held_out)
    if unshrunk is not None:
        return unshrunk | {"error": error, "spread": row.shrink * unshrunk["spread"]}
    trajectory = trajectory_of(pipeline, "ddim", attacks.calls)
    if row.relabel != 1:
        model = SigmaClampedModel(pipeline.unet, trajectory.schedule, row.relabel)
        trajectory = dataclasses.replace(trajectory, model=model)
    pipeline.unet.eval()
    generator = torch.Generator().manual_seed(derive_seed("attacked digits", seed))
    real = (held_out.flatten(1).double() / 127.5 - 1).var(0).sum().sqrt()
    return {"error": error} | displacements(trajectory, images.shape[1:], attacks, generator, float(real))


def bring(name: str, seeds: int, work: Path, results: Path, attacks: Attacks) -> None:
    """One row's file, brought up to ``seeds``."""
    row = ROWS[name]
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    digits = load_images("digits").images[order]
    held_out, training = digits[:500], digits[500:]
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "clean.npy").exists():
        np.save(work / "clean.npy", training[:, 0].numpy())

    def one(seed: int) -> dict[str, float | None]:
        unshrunk = None
        if row.shrink != 1:
            unshrunk = atomic_io.read_json(results / f"digits-{row.network}.json")["runs"][str(seed)]
        return measure(name, seed, work, work / "clean.npy", held_out, unshrunk, attacks)

    about = {
        "what": "end-to-end attacks on samplers of digits, clean training images",
        "world": "digits",
        "method": name,
        "title": row.title,
        "settings": {
            "train": " ".join([*digits_demo.COMMON, *ROWS[row.network or name].flags]),
            "images": round(IMAGES * row.share),
            "relabel": row.relabel,
            "shrink": row.shrink,
            **attacks.settings("x0 clipped in every step"),
        },
        "measured": "error: pixel Frechet distance of 1,000 draws to 500 held-out clean digits",
    }
    keep(
        results / f"digits-{name}.json",
        seeds,
        one,
        about,
        lambda: {"floor": digits_demo.frechet(training[:SAMPLES], held_out), "n": SAMPLES},
    )


def main() -> None:
    """Run what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("attacked-digits"), help="folder of data and networks")
    parser.add_argument("--results", type=Path, help="folder of the rows; default: WORK/results")
    parser.add_argument("--seeds", type=int, default=3, help="per row (default: 3)")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="only these")
    parser.add_argument("--strong", action="store_true", help="APGD with three starts, on fewer images")
    arguments = parser.parse_args()
    attacks = STRONG if arguments.strong else ATTACKS
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    results = arguments.results or arguments.work / f"results{'-strong' * arguments.strong}"
    results.mkdir(parents=True, exist_ok=True)
    for seed in range(1, arguments.seeds + 1):  # all rows of a seed before the next one
        for name in arguments.rows:
            bring(name, seed, arguments.work, results, attacks)
    print(table(results, "digits", list(ROWS), "plain", attacks.optimiser))


if __name__ == "__main__":
    main()
