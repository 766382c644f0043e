"""What is compared: worlds, dirt, methods and strengths; every row of every experiment, by name.

A little over 400 lines, so that all rows of all worlds stand in one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor

from experiments.paper.image_grid_spec import FLOORS, QUADRATURES, RELABELS, SHRINKS
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.baselines import (
    InputPerturbationLoss,
    InvarianceLoss,
    PseudoHuberLoss,
)
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import PRESETS, EquivarianceLoss
from robustdiff.losses.perturbation import (
    AdversarialPerturbation,
    Radius,
    RandomPerturbation,
)
from robustdiff.losses.strength import SigmaRange
from robustdiff.utils.errors import UsageError

Objective = Callable[[NoiseSchedule], DenoisingLoss]

DIRTS: Mapping[str, tuple[str, ...]] = {
    "clean": (),
    "inlier": ("gaussian:sigma=0.2,fraction=0.9",),
    "inlier-s0.1": ("gaussian:sigma=0.1,fraction=0.9",),
    "outliers": ("outlier:source=uniform,fraction=0.1",),
}
"""Dirt by name, as ``--corrupt`` takes it."""


@dataclass(frozen=True)
class Training:
    """How a denoiser is trained and sampled.

    Attributes:
        points: Size of the training set.
        steps: Optimiser steps.
        batch_size: Points per step.
        learning_rate: Peak rate of AdamW, warmed up over 200 steps, then falling as a half cosine.
        width: Hidden units of the ``PointDenoiser``.
        depth: Hidden layers.
        input_scale: Factor on the first layer's initial weights: above 1 where sharp modes need a steep function.
        modulated: Whether the time embedding multiplies in the ``PointDenoiser``.
        samples: n, the number of draws that every error is measured on.
        calls: Network calls per draw (DDIM, trailing spacing).
    """

    points: int = 20_000
    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 4e-3
    width: int = 128
    depth: int = 3
    input_scale: float = 1.0
    modulated: bool = False
    samples: int = 2000
    calls: int = 200

    @property
    def short(self) -> Training:
        """The same for ``--quick``: three eighths of the steps, half of the draws and of the network calls."""
        return replace(self, steps=self.steps * 3 // 8, samples=self.samples // 2, calls=self.calls // 2)


POINTS = Training()
MIXTURES = Training(steps=8000, depth=5, input_scale=4.0)
"""With 4000 steps, three layers and no scale, plain training on clean data still draws bridges between the modes."""
IMAGES = Training(points=50_000, steps=12_000, batch_size=128, learning_rate=2e-3, width=192, modulated=True)
"""For 64 pixels; more pixels make the network wider, see ``images_training``. Why so: docs/lab-notes.md, 2026-11-25."""


def images_training(values: int) -> Training:
    """Settings for images of ``values`` numbers each: three hidden units per number, 192 to 512."""
    return replace(IMAGES, width=min(512, max(192, 3 * values)))


@dataclass(frozen=True)
class Method:
    """A way of training, or a free change to plain training.

    Attributes:
        title: As the tables call it.
        what: One sentence.
        told: What it was told beyond the dirty data.
        objective: The objective, given the schedule; free methods share that of ``plain``.
        settings: What was set, flat.
        free: A change at sampling time that costs no training of its own.
        base: Whose network a free change is made to.
        exact: No network: the exact score of the clean law, through the same sampler.
        family: Row of a frontier: which family of strengths.
        clean_only: Train on the clean part of the data only.
        prediction: What the network predicts. Invariance is a penalty on the predicted noise: only there is T5 exact.
    """

    title: str
    what: str
    objective: Objective = DenoisingLoss
    told: str = "nothing"
    settings: Mapping[str, Any] = field(default_factory=dict)
    free: Literal["relabel", "label_floor", "quadrature_floor", "shrink"] | None = None
    base: str = "plain"
    exact: bool = False
    family: str | None = None
    clean_only: bool = False
    prediction: str = "v_prediction"


SIGNS = RandomPerturbation("signs")
UNIT = Radius(exponent=0.0, scale=1.0, floor=0.0, random=False)
"""Random signs of radius 1: kappa = E[omega^2] = 1, so that the strength is m of docs/explanation/theory.md."""


def equivariant(strength: float | SigmaRange, perturbation: Any = SIGNS) -> Objective:  # noqa: ANN401 - either kind
    """The robust objective with perturbations of radius 1: with signs the strength is m."""
    return lambda schedule: EquivarianceLoss(schedule, perturbation=perturbation, strength=strength, radius=UNIT)


def _strength(low: float, high: float, m: float) -> dict[str, Any]:
    """As JSON: infinity is written as a word."""
    return {"perturbation": "random signs, r = 1", "low": low, "high": high if math.isfinite(high) else "inf", "m": m}


def _noise(perturbation: Any) -> Objective:  # noqa: ANN401 - either kind
    return lambda schedule: EquivarianceLoss.preset("paper-noise", schedule, perturbation=perturbation)


def _state(perturbation: Any, scale: float = 1.0) -> Objective:  # noqa: ANN401 - either kind
    radius = replace(PRESETS["paper"]["radius"], scale=scale)
    return lambda schedule: EquivarianceLoss.preset("paper", schedule, perturbation=perturbation, radius=radius)


PAPER = {"strength": 0.3, "radius": "s^2 U(0, 1) + 8/255"}
STATE = {"strength": 0.3, "radius": "(U(0, 1) + 8/255) / s", "levels": "normalised"}
HALF = {**STATE, "radius": "(U(0, 1) / 2 + 8/255) / s"}
BEST_OF = "the best of {} on clean validation draws"

METHODS: dict[str, Method] = {
    "ideal": Method(
        "ideal network", "the exact score of the clean law through the same sampler", told="the law", exact=True
    ),
    "plain": Method("plain", "the denoising loss alone"),
    "plain-epsilon": Method("plain, epsilon-prediction", "the control of the next row", prediction="epsilon"),
    "invariance": Method(
        "invariance (paper-noise)",
        "classifier-style adversarial training: the predicted noise must not move",
        lambda schedule: InvarianceLoss(
            schedule, perturbation=AdversarialPerturbation(), strength=0.3, radius=Radius()
        ),
        settings={"perturbation": "adversarial, one step, shift", **PAPER},
        prediction="epsilon",
    ),
    "random": Method(
        "random (paper-noise)",
        "equivariance to uniform noise, published settings in units of the noise",
        _noise(RandomPerturbation()),
        settings={"perturbation": "random uniform", **PAPER},
    ),
    "adversarial-shift": Method(
        "adversarial, shift (paper-noise)",
        "equivariance to one-step noise that moves the prediction most, published settings in units of the noise",
        _noise(AdversarialPerturbation(inner="shift")),
        settings={"perturbation": "adversarial, one step, shift", **PAPER},
    ),
    "adversarial-residual": Method(
        "adversarial, residual",
        "the same, the inner step ascending the penalised residual",
        _noise(AdversarialPerturbation(inner="residual")),
        settings={"perturbation": "adversarial, one step, residual", **PAPER},
    ),
    "paper": Method(
        "paper (adversarial, state)",
        "equivariance to one-step noise that moves the prediction most, published settings in units of the state",
        _state(AdversarialPerturbation()),
        settings={"perturbation": "adversarial, one step, shift", **STATE},
    ),
    "paper-random": Method(
        "paper-random (state)",
        "equivariance to uniform noise, published settings in units of the state",
        _state(RandomPerturbation()),
        settings={"perturbation": "random uniform", **STATE},
    ),
    "paper-half": Method(
        "paper, half the radius",
        "as paper, with U / 2 + 8/255 for the radius",
        _state(AdversarialPerturbation(), 0.5),
        settings={"perturbation": "adversarial, one step, shift", **HALF},
    ),
    "paper-random-half": Method(
        "paper-random, half the radius",
        "as paper-random, with U / 2 + 8/255 for the radius",
        _state(RandomPerturbation(), 0.5),
        settings={"perturbation": "random uniform", **HALF},
    ),
    "preset": Method(
        "gated, as shipped",
        "the package's default preset: random uniform noise of radius 1 at sigma/alpha <= 0.2, m = 1.25",
        lambda schedule: EquivarianceLoss.preset("gated", schedule),
        told="nothing of these data; chosen on the frontiers of these worlds",
        settings={
            "perturbation": "random uniform, r = 1",
            "low": PRESETS["gated"]["strength"].low,
            "high": PRESETS["gated"]["strength"].high,
            "strength": PRESETS["gated"]["strength"].value,
        },
    ),
    "gated-strong": Method(
        "gated, c = 0.15, m = 5",
        "stronger than the preset: random uniform noise of radius 1 at sigma/alpha <= 0.15, m = 5",
        lambda schedule: EquivarianceLoss.preset("gated", schedule, strength=SigmaRange(0.0, 0.15, 15.0)),
        settings={"perturbation": "random uniform, r = 1", "low": 0.0, "high": 0.15, "strength": 15.0},
    ),
    "gated-low": Method(
        "gated, low noise",
        "random signs at sigma/alpha <= 0.1 only, m = 10: by T6 a soft Wiener filter whose edge sqrt(m) c = 0.32 lies "
        "between the deviation of the dirt, 0.2, and that of the data, 0.46 on the plane",
        equivariant(SigmaRange(0.0, 0.1, 10.0)),
        told="kind and size of the dirt (to place the gate)",
        settings=_strength(0.0, 0.1, 10.0),
    ),
    "gated-mid": Method(
        "gated, middle band",
        "random signs at 0.5 <= sigma/alpha <= 3 only, m = 3 (T6: the band for outliers)",
        equivariant(SigmaRange(0.5, 3.0, 3.0)),
        told="kind of the dirt (to place the band)",
        settings=_strength(0.5, 3.0, 3.0),
    ),
    "gated-low-floor": Method(
        "gated, low noise, with a label floor",
        "the network of the row gated-low, never asked below a noise level",
        told="kind and size of the dirt; the best of five levels on clean validation draws",
        settings={**_strength(0.0, 0.1, 10.0), "tried": list(FLOORS)},
        free="label_floor",
        base="gated-low",
    ),
    "pseudo-huber": Method(
        "pseudo-Huber",
        "denoising loss that large errors pull less at",
        PseudoHuberLoss,
        settings={"loss_width": "level"},
    ),
    "input-perturbation": Method(
        "input perturbation",
        "more noise in the input than the target says, gamma = 0.1",
        InputPerturbationLoss,
        settings={"gamma": 0.1},
    ),
    "relabelled": Method(
        "plain, relabelled",
        "the plain network asked at a larger noise level",
        told=BEST_OF.format("four factors"),
        settings={"tried": list(RELABELS)},
        free="relabel",
    ),
    "label-floor": Method(
        "plain, label floor",
        "the plain network never asked below a noise level",
        told=BEST_OF.format("five levels"),
        settings={"tried": list(FLOORS)},
        free="label_floor",
    ),
    "quadrature-floor": Method(
        "plain, floor in quadrature",
        "the free twin of paper-random: the plain network asked at sqrt(c^2 + F^2 (1 + c^2))",
        told=BEST_OF.format("five levels"),
        settings={"tried": list(QUADRATURES)},
        free="quadrature_floor",
    ),
    "shrunk": Method(
        "plain, shrunk",
        "draws of the plain network pulled towards their mean",
        told=BEST_OF.format("four factors"),
        settings={"tried": list(SHRINKS)},
        free="shrink",
    ),
    "clean-subset": Method(
        "plain on the clean part",
        "the denoising loss on those training points that carry no dirt",
        told="which points are clean",
        clean_only=True,
    ),
}
"""Every method of the tables, in their order."""

_ADVERSARIAL = AdversarialPerturbation(inner="residual")


def _family(family: str, low: float, high: float, m: float, perturbation: Any = SIGNS) -> Method:  # noqa: ANN401
    kind = "adversarial" if perturbation is not SIGNS else "random signs"
    settings = {**_strength(low, high, m), "perturbation": f"{kind}, r = 1"}
    return Method(
        f"{family}: [{low:g}, {high:g}], m = {m:g}",
        f"equivariance, {kind}, strength {m:g} for sigma/alpha in [{low:g}, {high:g}]",
        equivariant(SigmaRange(low, high, m), perturbation),
        settings=settings,
        family=family,
    )


FRONTIER: dict[str, Method] = {
    **{f"constant-m{m:g}": _family("constant", 0.0, math.inf, m) for m in (0.1, 0.3, 1.0, 3.0)},
    **{
        f"gated-c{c:g}-m{m:g}": _family("gated", 0.0, c, m)
        for c, ms in {0.1: (5.0, 20.0, 80.0), 0.2: (1.25, 5.0, 20.0), 0.4: (0.3, 1.25, 5.0)}.items()
        for m in ms
    },
    **{f"mid-band-m{m:g}": _family("mid-band", 0.5, 3.0, m) for m in (0.3, 1.0, 3.0, 10.0)},
    **{f"adversarial-c0.2-m{m:g}": _family("adversarial-gated", 0.0, 0.2, m, _ADVERSARIAL) for m in (1.0, 3.0, 10.0)},
}
"""Strengths of the frontier. Gates of edge c are swept so that m c^2, which rules the price (T6), runs over the same
three values 0.05, 0.2, 0.8 for every c."""

STRENGTHS = (0.1, 0.5, 2.0)
INVARIANCE: dict[str, Method] = {
    "plain": replace(METHODS["plain"], prediction="epsilon"),
    **{
        f"{name}-m{m:g}": Method(
            f"{name}, m = {m:g}",
            f"{what}, random signs of radius 1 at every noise level",
            lambda schedule, kind=kind, m=m: kind(schedule, perturbation=SIGNS, strength=m, radius=UNIT),  # type: ignore[misc]
            settings=_strength(0.0, math.inf, m),
            prediction="epsilon",
        )
        for name, kind, what in (
            ("equivariance", EquivarianceLoss, "the predicted noise must move with the noise"),
            ("invariance", InvarianceLoss, "the predicted noise must not move"),
        )
        for m in STRENGTHS
    },
}
"""Invariance against equivariance at equal m, on clean data."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a method on a world with some dirt."""

    experiment: str
    world: str
    dirt: str
    method: str
    seeds: int

    @property
    def name(self) -> str:
        """``world-dirt-method``, the name of its file."""
        return f"{self.world}-{self.dirt}-{self.method}"

    @property
    def trained(self) -> str:
        """The method whose network it needs: free methods ask another one's."""
        return self.what.base if self.what.free else self.method

    @property
    def what(self) -> Method:
        """The method itself."""
        known = INVARIANCE if self.experiment == "invariance" else {**METHODS, **FRONTIER}
        return known[self.method]


WORLDS: Mapping[str, tuple[str, ...]] = {
    "plane": ("plane",),
    "mixture": ("ring", "grid"),
    "subspace": ("subspace",),
    "invariance": ("gaussian", "plane"),
}
"""Worlds of the experiments that train networks; the remaining experiment is ``linear-gaussian``."""
MAIN: Mapping[str, str] = {"plane": "w2", "ring": "w2", "grid": "w2", "subspace": "frechet", "gaussian": "w2"}
"""The error by which settings are chosen, frontiers drawn and methods ranked, by world."""
STATE_UNITS = ("paper", "paper-random", "paper-half", "paper-random-half", "quadrature-floor")
"""Regularisers whose radius is in units of the state, and their free twin: run on three noise levels."""
KEY = (
    "ideal",
    "plain",
    "relabelled",
    "label-floor",
    *STATE_UNITS,
    "shrunk",
    "adversarial-shift",
    "preset",
    "gated-strong",
    "gated-low",
    "gated-mid",
    "gated-low-floor",
    "pseudo-huber",
    "clean-subset",
)
"""Rows that conclusions rest on."""
SWEPT = ("clean", "inlier", "outliers")
"""Dirt of the frontiers."""
QUICK = {
    "clean": ("plain", "invariance", "gated-low"),
    "inlier": (
        "plain",
        "invariance",
        "adversarial-shift",
        "paper",
        "gated-low",
        "relabelled",
        "label-floor",
        "clean-subset",
    ),
    "outliers": ("plain", "gated-mid", "label-floor"),
}


def rows_of(experiment: str, *, quick: bool = False, seeds: int = 3) -> list[Row]:
    """Every row of an experiment that trains networks, those that conclusions rest on first.

    Args:
        experiment: A key of :data:`WORLDS`.
        quick: The few rows of ``--quick``, one seed.
        seeds: Seeds of the rows that conclusions rest on (:data:`KEY`); others, the grid and the frontier have one.
    """
    if experiment == "invariance":
        methods = [m for m in INVARIANCE if not quick or m.endswith(("plain", "m0.5"))]
        worlds = WORLDS[experiment][: 1 if quick else None]
        return [Row(experiment, w, "clean", m, 1 if quick else seeds) for w in worlds for m in methods]
    if quick:
        world = WORLDS[experiment][0]
        return [Row(experiment, world, dirt, method, 1) for dirt, methods in QUICK.items() for method in methods]
    rows = []
    for world in WORLDS[experiment]:
        for dirt in DIRTS:
            for method in METHODS:
                if method == "clean-subset" and dirt == "clean":
                    continue  # it would be plain training
                if method == "ideal" and dirt != "clean":
                    continue  # it sees no data
                if dirt == "inlier-s0.1" and method not in ("plain", *STATE_UNITS, "label-floor"):
                    continue  # a third noise level, where it says whether a method needs to know it
                few = world == "grid" or method not in KEY
                rows.append(Row(experiment, world, dirt, method, 1 if few else seeds))
    key = [row for row in rows if row.method in KEY]
    others = [row for row in rows if row.method not in KEY]
    swept = [Row(experiment, WORLDS[experiment][0], dirt, method, 1) for dirt in SWEPT for method in FRONTIER]
    return key + others + swept


def pick(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """Those rows whose name matches one of ``patterns`` (shell wildcards); all, if there are no patterns.

    Raises:
        UsageError: If a pattern matches nothing, listing the names.
    """
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise UsageError(f"--rows {pattern!r} matches none of: {names}")
    return [row for row in rows if not patterns or any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def training_data(method: Method, dirty: Tensor, hit: Tensor) -> Tensor:
    """What the method is trained on: all of the dirty data, or the part that was not hit."""
    return dirty[~hit] if method.clean_only else dirty
