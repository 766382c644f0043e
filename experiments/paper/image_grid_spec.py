"""The image grid: which dirt, which method, how long; every row by name. CIFAR-10, CelebA and LSUN share it.

A row is a few command lines (``image_rows.py``): what a row is, anybody can type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

IMAGE_EXPERIMENTS: Mapping[str, tuple[str, str | None]] = {
    "cifar10": ("train", "test"),
    "celeba": ("train", "test"),
    "lsun": ("train", "val"),
}
"""Experiments on images, and the splits that are trained on and judged against. A split that the data do not have, or
that holds too few images for the scale, is replaced by images of the first one that are not trained on."""
SCALES = ("cpu", "cpu-32", "gpu-10min", "gpu-1h", "gpu-paper", "gpu")

# -- dirt ------------------------------------------------------------------------------------------------

IMAGE_DIRTS: Mapping[str, tuple[str, ...]] = {
    "clean": (),
    **{
        f"gaussian-p{p:g}-s{sigma:g}": (f"gaussian:sigma={sigma:g},fraction={p:g}",)
        for p in (0.9, 0.6, 0.3)
        for sigma in (0.2, 0.1, 0.05)
    },
    **{f"outliers-q{q:g}": (f"outlier:source=uniform,fraction={q:g}",) for q in (0.1, 0.05, 0.2)},
    "missing": ("missing:amount=0.3,fraction=0.9",),
    "jpeg": ("jpeg:quality=15,fraction=0.9",),
    "blur": ("blur:radius=1,fraction=0.9",),
    "mixed": (
        "outlier:source=uniform,fraction=0.05",
        "jpeg:quality=15,fraction=0.3",
        "missing:amount=0.3,fraction=0.2",
        "gaussian:sigma=0.2,fraction=0.4",
    ),
}
"""Dirt by name, as ``--corrupt`` takes it: in [-1, 1], unclipped, frozen per image."""
KEY_DIRTS = ("clean", "gaussian-p0.9-s0.2", "outliers-q0.1")
"""The dirt that every method is run on; the rest of the grid has plain training and what helped."""

# -- methods ---------------------------------------------------------------------------------------------

RELABELS, FLOORS, SHRINKS = (1.1, 1.2, 1.41, 2.0), (0.05, 0.1, 0.15, 0.2, 0.3), (0.95, 0.9, 0.8, 0.7)
QUADRATURES = (0.055, 0.1, 0.173, 0.191, 0.316)
"""Settings tried for each of the free baselines, on clean validation images (worlds: draws) of no row. The floors in
quadrature are the roots of K = .003, .01, .03, .0366 (the published radius and strength) and .1."""
FREE_FLAGS: Mapping[str, tuple[str, ...]] = {
    "relabel": ("--relabel",),
    "label_floor": ("--sigma-floor",),
    "quadrature_floor": ("--floor-shape", "quadrature", "--sigma-floor"),
}
"""Flags of ``robustdiff evaluate`` for the free baselines that only ask elsewhere; their setting follows."""
IMAGE_RELABELS = (1.02, 1.05, *RELABELS)
"""Factors tried on images. The sampler asks at every level in turn, so that even 1.1 takes detail off clean images."""


@dataclass(frozen=True)
class ImageMethod:
    """A way of training, as flags of ``robustdiff train``, or a free change to the plain run.

    Attributes:
        title: As the tables call it.
        what: One sentence.
        flags: Of ``robustdiff train``.
        told: What it was told beyond the dirty images.
        free: What it changes on the plain run's samples: a key of :data:`FREE_FLAGS`, or ``shrink``, done on images.
        gaussian_only: Only Gaussian dirt has noise levels that could be told.
        dirty_only: On clean data it is plain training.
        tuned: Share of the length that is spent on it, starting from the plain run; None: it starts anew.
    """

    title: str
    what: str
    flags: tuple[str, ...] = ()
    told: str = "nothing"
    free: Literal["relabel", "label_floor", "quadrature_floor", "shrink"] | None = None
    gaussian_only: bool = False
    dirty_only: bool = False
    tuned: float | None = None

    @property
    def tried(self) -> tuple[float, ...]:
        """Settings of a free baseline."""
        tried: dict[str | None, tuple[float, ...]] = {
            "relabel": IMAGE_RELABELS,
            "label_floor": FLOORS,
            "quadrature_floor": QUADRATURES,
            "shrink": SHRINKS,
        }
        return tried.get(self.free, ())


_BEST = "the best of {} on clean validation images"
PLAIN = ("--preset", "plain")
NOISE, STATE = ("--preset", "paper-noise"), ("--preset", "paper")
"""Two readings of the published radius: in units of the noise, and of the state (docs/explanation/method.md)."""

IMAGE_METHODS: Mapping[str, ImageMethod] = {
    "plain": ImageMethod("plain", "the denoising loss alone", PLAIN),
    "invariance": ImageMethod(
        "invariance (paper-noise)",
        "classifier-style adversarial training: the predicted noise must not move",
        (*NOISE, "--objective", "invariance"),
    ),
    "random": ImageMethod(
        "random (paper-noise)",
        "equivariance to uniform noise, published settings read in units of the noise",
        (*NOISE, "--perturbation", "random"),
    ),
    "adversarial": ImageMethod(
        "adversarial (paper-noise)",
        "equivariance to one-step adversarial noise, published settings read in units of the noise",
        NOISE,
    ),
    "paper": ImageMethod(
        "paper (adversarial, state)",
        "equivariance to one-step adversarial noise, published settings read in units of the state",
        STATE,
    ),
    "paper-random": ImageMethod(
        "paper-random (state)",
        "equivariance to uniform noise, published settings read in units of the state",
        ("--preset", "paper-random"),
    ),
    "paper-random-half": ImageMethod(
        "paper-random, half the radius",
        "as paper-random, with U / 2 + 8/255 for the radius",
        ("--preset", "paper-random", "--radius-scale", "0.5"),
    ),
    "paper-half": ImageMethod(
        "paper, half the radius",
        "as paper, with U / 2 + 8/255 for the radius",
        (*STATE, "--radius-scale", "0.5"),
    ),
    "gated": ImageMethod(
        "gated, as shipped",
        "the default preset: random noise of radius 1 at sigma/alpha <= 0.2, m = 1.25",
        ("--preset", "gated"),
        told="nothing of these data; chosen on worlds whose truth is known",
    ),
    "gated-strong": ImageMethod(
        "gated, c = 0.15, m = 5",
        "random noise of radius 1 at sigma/alpha <= 0.15, m = 5",
        ("--preset", "gated", "--gate", "0:0.15", "--strength", "15"),
        told="nothing of these data; a former default",
    ),
    "pseudo-huber": ImageMethod(
        "pseudo-Huber", "denoising loss that large errors pull less at", ("--objective", "pseudo-huber")
    ),
    "input-perturbation": ImageMethod(
        "input perturbation",
        "more noise in the input than the target says, gamma = 0.1",
        ("--objective", "input-perturbation"),
    ),
    "fine-tuned": ImageMethod(
        "fine-tuned, gated",
        "the plain run, its last 15 % with the gate c = 0.15, m = 5: 15 % more training",
        ("--preset", "gated", "--gate", "0:0.15", "--strength", "15"),
        tuned=0.15,
    ),
    "relabelled": ImageMethod(
        "plain, relabelled",
        "the plain network asked at a larger noise level",
        told=_BEST.format("six factors"),
        free="relabel",
    ),
    "label-floor": ImageMethod(
        "plain, label floor",
        "the plain network never asked below a noise level",
        told=_BEST.format("five levels"),
        free="label_floor",
    ),
    "quadrature-floor": ImageMethod(
        "plain, floor in quadrature",
        "the free twin of paper-random: the plain network asked at sqrt(c^2 + F^2 (1 + c^2))",
        told=_BEST.format("five levels"),
        free="quadrature_floor",
    ),
    "shrunk": ImageMethod(
        "plain, shrunk",
        "images of the plain network pulled towards their mean",
        told=_BEST.format("four factors"),
        free="shrink",
    ),
    "clean-subset": ImageMethod(
        "plain on the clean part",
        "the denoising loss on those images that carry no dirt",
        (*PLAIN, "--clean-subset"),
        told="which images are clean",
        dirty_only=True,
    ),
    "told": ImageMethod(
        "told each image's noise level",
        "each image is trained only at noise levels above its own, the target re-expressed by Tweedie's formula",
        (*PLAIN, "--noise-levels", "corrupt"),
        told="the noise level of every image",
        gaussian_only=True,
        dirty_only=True,
    ),
    "auto": ImageMethod(
        "auto", "the set is searched for dirt, and each image trained only where it can be trusted", ("--auto",)
    ),
    "auto-gated": ImageMethod(
        "auto and gated", "the same, and the default preset's regulariser", ("--auto", "--preset", "gated")
    ),
}
"""Every method of the tables, in their order. ``told`` is the yardstick of Daras et al. (2024, arXiv 2411.02780)."""
TWICE = ("plain", "paper", "gated", "gated-strong", "label-floor", "quadrature-floor", "clean-subset", "told", "auto")
"""Methods whose rows on :data:`KEY_DIRTS` have the full number of seeds; all others have one."""
ELSEWHERE = (
    "plain",
    "adversarial",
    "paper",
    "paper-random",
    "paper-random-half",
    "gated",
    "label-floor",
    "quadrature-floor",
    "clean-subset",
    "told",
    "auto",
)
"""Methods that are also run on dirt outside of :data:`KEY_DIRTS`."""

# -- scales ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How large, how long, and how judged.

    Attributes:
        resolution: Pixels of a side.
        channels: 1 (grey) or 3 (RGB).
        training: Training images, the first of the split; 0 = all.
        reference: Clean images of the other split that rows are judged against.
        validation: Further ones, on which free baselines choose their setting; against them the reference has its
            floor.
        images: Length of training in images seen.
        batch: Images per step.
        network: Preset.
        flags: Further flags of ``robustdiff train``.
        schedule: Flags of a new network's noise levels; a fine-tuned one has its own.
        samples: n of the rows.
        choosing: n of each setting that a free baseline tries.
        steps: Network calls per image (DDIM, trailing).
        few: Network calls of the few-step curve, first seed.
        workers: Rows side by side; None: one per core, one thread each, or one if there is a GPU.
    """

    resolution: int
    channels: int
    training: int
    reference: int
    validation: int
    images: int
    batch: int
    network: str
    flags: tuple[str, ...] = ()
    schedule: tuple[str, ...] = ()
    samples: int = 1000
    choosing: int = 300
    steps: int = 50
    few: tuple[int, ...] = (5, 10, 20)
    workers: int | None = None

    @property
    def quick(self) -> Scale:
        """The same path with a tiny network for a minute: every flag but ``--compile``, which takes minutes itself.

        So few images because a processor without 16-bit instructions trains two a second in bf16, others eighty.
        """
        return replace(
            self,
            training=256,
            reference=128,
            validation=64,
            images=128,
            batch=16,
            network="tiny",
            flags=tuple(flag for flag in self.flags if flag != "--compile"),
            samples=32,
            choosing=16,
            steps=5,
            few=(2,),
        )


_GPU = ("--mixed-precision", "bf16", "--compile", "--dataloader-num-workers", "4")
_LARGE = Scale(
    resolution=32,
    channels=3,
    training=0,
    reference=5000,
    validation=5000,
    images=80_000_000,
    batch=128,
    network="base",
    flags=(*_GPU, "--random-flip"),
    samples=5000,
    choosing=1000,
    steps=100,
    few=(10, 20, 50),
    workers=1,
)
SCALE: Mapping[str, Scale] = {
    "cpu": Scale(
        resolution=16,
        channels=1,
        training=20_000,
        reference=5000,
        validation=2000,
        images=96_000,
        batch=32,
        network="small",
    ),
    "cpu-32": Scale(
        resolution=32,
        channels=3,
        training=20_000,
        reference=5000,
        validation=2000,
        images=80_000,
        batch=32,
        network="small",
        few=(10, 20),
    ),
    "gpu-10min": replace(_LARGE, images=1_000_000, network="medium", samples=2000, choosing=500),
    "gpu-1h": replace(_LARGE, images=5_000_000, network="medium"),
    "gpu-paper": replace(
        _LARGE,
        images=1_500_000,
        network="improved-ddpm",
        schedule=("--ddpm-beta-schedule", "squaredcos_cap_v2", "--ddpm-num-steps", "4000"),
    ),
    "gpu": _LARGE,
}
"""``cpu``: 16 x 16 grey, 1.1 M parameters; ``cpu-32``: 32 x 32 RGB, the same network. ``gpu``: 32 x 32 RGB, the
network of Ho et al. (2020), 35.7 M parameters; the two shorter ones have one of about 10 M; ``gpu-paper`` that of
Nichol and Dhariwal (2021) with their schedule, as the paper has it, at a fraction of its length."""


# -- rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRow:
    """One line of a table: a method on some dirt."""

    world: str
    dirt: str
    method: str
    seeds: int

    @property
    def name(self) -> str:
        """``world-dirt-method``, the name of its file."""
        return f"{self.world}-{self.dirt}-{self.method}"

    @property
    def what(self) -> ImageMethod:
        """The method itself."""
        return IMAGE_METHODS[self.method]


def world_of(experiment: str, scale: str) -> str:
    """What the tables call an experiment at a scale."""
    return f"{experiment}-{scale}"


IMAGE_WORLDS = tuple(world_of(experiment, scale) for experiment in IMAGE_EXPERIMENTS for scale in SCALES)


def image_rows(experiment: str, scale: str, *, quick: bool = False, seeds: int = 2) -> list[ImageRow]:
    """Every row, those that conclusions rest on first.

    Args:
        experiment: A key of :data:`IMAGE_EXPERIMENTS`.
        scale: One of :data:`SCALES`.
        quick: A few rows of each kind, one seed.
        seeds: Seeds of :data:`TWICE` on :data:`KEY_DIRTS`; other rows have one.
    """
    world = world_of(experiment, scale)
    if quick:
        dirt = KEY_DIRTS[1]
        return [ImageRow(world, dirt, m, 1) for m in ("plain", "gated", "told", "fine-tuned", "label-floor", "shrunk")]
    rows = []
    for dirt in (*KEY_DIRTS[1:], "clean", *(d for d in IMAGE_DIRTS if d not in KEY_DIRTS)):
        for method, what in IMAGE_METHODS.items():
            if (dirt == "clean" and what.dirty_only) or (not dirt.startswith("gaussian") and what.gaussian_only):
                continue
            if dirt not in KEY_DIRTS and method not in ELSEWHERE:
                continue
            rows.append(ImageRow(world, dirt, method, seeds if method in TWICE and dirt in KEY_DIRTS else 1))
    place = {dirt: i for i, dirt in enumerate(KEY_DIRTS[1:] + KEY_DIRTS[:1])}
    return sorted(rows, key=lambda row: (row.dirt not in KEY_DIRTS, row.method not in TWICE, place.get(row.dirt, 9)))
