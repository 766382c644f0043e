"""Settings of `robustdiff attack`, `purify` and `corrupt`, checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from robustdiff.data.corruption import check_corruptions
from robustdiff.utils.options import (
    MAX_SEED,
    BadFraction,
    CacheFolder,
    HubConfig,
    ImageColumn,
    MemoryGiB,
    OptionalFloat,
    OptionalInt,
    OptionalText,
    ReferenceColumn,
    ReferenceConfig,
    ReferenceSplit,
    Settings,
    Split,
    Title,
    Told,
    ValueRange,
    check_bad_fraction,
    check_extractors,
    check_given,
    check_memory,
    check_resolution,
    listed,
    require,
)

OF_REFERENCE = ("split", "dataset_config_name", "image_column", "value_range")
"""Settings of `attack` that say which part of the reference, and how to read it."""


@dataclass(frozen=True)
class AttackConfig(Settings):
    """Attack a pipeline while it draws: push its states within a radius, so that images end far from where they would.

    Beside the attack asked for: random noise, one step, shorter and longer PGD, an adaptive one, other radii and step
    sizes, and flags that say when the result must not be believed. Interrupted, the same command goes on.
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder, pipeline folder or hub id."""
    radius: OptionalFloat = None
    """Bound on each push, in units of the noise scale of its step, > 0; the pushes of many steps add up. Default: 0.01
    (linf), 0.01 times the root of the number of values of an image (l2)."""
    norm: Literal["linf", "l2"] = "linf"
    """linf: every value of a push within the radius; l2: its Euclidean length."""
    at: str = "all"
    """Sampler steps that are pushed, counted from 0 (pure noise): `all`, or a list such as 0,10,20."""
    objective: Literal["end-to-end", "target", "batch-mean", "batch-kernel", "shift", "residual"] = "end-to-end"
    """end-to-end: the final image far from the undisturbed one, through all remaining steps; target: near the
    undisturbed next image; batch-mean, batch-kernel: all images together away from the reference, in the mean of the
    features of the first --extractor, or in KID's kernel distance; shift, residual: the network's answer at each step
    by itself, as training attacks it."""
    optimiser: Literal["pgd", "apgd", "one-step", "random"] = "pgd"
    """pgd: projected gradient ascent; apgd: with adaptive steps; one-step: one gradient step; random: best of draws."""
    iterations: OptionalInt = None
    """Gradient steps of pgd and apgd, draws of random, >= 4. Default: 40. Baselines: a quarter and 2.5 times of it."""
    restarts: int = 1
    """Random starts of pgd, apgd and one-step, >= 1; each image keeps the best."""
    step_size: OptionalFloat = None
    """Step of pgd in units of the radius, > 0. Default: 2.5 / iterations."""
    momentum: float = 0.0
    """Decay of the gradients that pgd gathers, >= 0; 0 = none."""
    scheduler: Literal["ddim", "ddpm"] = "ddim"
    """Sampler that is attacked: deterministic, or with fresh noise at each step."""
    steps: int = 50
    """Network calls per image, trailing spacing; must divide the noise levels (1000)."""
    noise: Literal["known", "fixed", "fresh"] | None = None
    """What the attacker knows of ddpm's noise: all of it (known), or nothing: then the attack is on the mean over --eot
    draws, the same throughout (fixed) or new at each step (fresh). Default: known."""
    eot: OptionalInt = None
    """Draws of the noise per gradient for --noise fixed and fresh, >= 1. Default: 5."""
    verdicts: OptionalInt = None
    """Other draws of the noise that judge the result of --noise fixed and fresh, >= 1. Default: 20."""
    n: Annotated[int, arg(aliases=["-n"])] = 64
    """Number of images attacked, >= 2."""
    sweep_n: int = 16
    """Images of these, the first, on which longer and shorter PGD, adaptive steps, other radii and step sizes are
    tried, >= 2; every curve and comparison is of the same images."""
    seed: int = 0
    """Image i starts from its own generator, seeded with SEED + i, as `robustdiff sample` does; SEED >= 0."""
    batch_size: Annotated[int, arg(aliases=["--eval-batch-size"])] = 64
    """Images per forward pass, >= 1; memory grows with it."""
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    """Less memory for more time, the same result. always: a gradient holds one state per step, and calls the network
    twice; never: it holds the activations of all steps; auto: never where they fit into half of the free memory."""
    workers: OptionalInt = None
    """Attacks computed side by side, >= 1, each on its share of the threads; memory grows with it. Default: as many as
    there are threads (OMP_NUM_THREADS), at most 4 and no more than there is memory for; on a GPU 1."""
    reference: OptionalText = None
    """Clean real images that quality before and after the attack is measured against: anything that `robustdiff train`
    reads. Default: 2000 of those that the run folder names as its data; `none` = leave it out."""
    extractor: UseAppendAction[tuple[str, ...]] = ()
    """What turns images into features for that (repeatable), as of `robustdiff evaluate`. Default: pixels."""
    split: ReferenceSplit = None
    dataset_config_name: ReferenceConfig = None
    image_column: ReferenceColumn = None
    value_range: ValueRange = None
    max_bad_fraction: float = 0.01
    """Largest share of unreadable images of the reference that is skipped rather than an error, 0 to 1."""
    cache: CacheFolder = None
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder for the result and its pictures. Default: RUN/evaluation of a pipeline folder, else
    evaluation/NAME/evaluation here."""
    title: Title = None
    told: Told = None
    overwrite: bool = False
    """Attack anew, even what is finished; without, finished parts are kept and the rest is done."""

    def validate(self) -> None:
        """Check ranges, and refuse flags that would do nothing.

        Raises:
            UsageError: One line that names the setting and the remedy.
        """
        self.check_homes()
        check_given(self, "run", "output", "title", "told", "at", "reference", "cache", *OF_REFERENCE)
        radius, most = self.radius, 10.0 if self.norm == "linf" else math.inf
        good = radius is None or (math.isfinite(radius) and 0 < radius <= most)
        remedy = "use 0.001 to 1" + ("" if self.norm == "linf" else " times the root of the values of an image")
        require(
            good, f"`radius` {radius} is not a push in units of the noise scale, above 0 and at most {most}: {remedy}"
        )
        counts = {
            "iterations": 4,
            "restarts": 1,
            "steps": 1,
            "eot": 1,
            "verdicts": 1,
            "n": 2,
            "sweep_n": 2,
            "batch_size": 1,
            "workers": 1,
        }
        for name, least in counts.items():
            value, flag = getattr(self, name), f"`{name}`"
            require(value is None or value >= least, f"{flag} {value} must be at least {least}")
        good = self.step_size is None or (math.isfinite(self.step_size) and self.step_size > 0)
        require(good, f"`step_size` {self.step_size} must be a finite number above 0")
        good = math.isfinite(self.momentum) and self.momentum >= 0
        require(good, f"`momentum` {self.momentum} must be a finite number, 0 or more")
        require(0 <= self.seed <= MAX_SEED, f"`seed` must be in 0 .. {MAX_SEED}")
        if self.optimiser != "pgd":
            idle = [name for name in ("step_size", "momentum") if getattr(self, name)]
            require(
                not idle, f"{listed(idle)} does nothing with `optimiser` {self.optimiser}: leave it out, or use pgd"
            )
        idle_restarts = self.optimiser == "random" and self.restarts > 1
        require(not idle_restarts, "`restarts` does nothing with `optimiser` random: raise `iterations`")
        idle_iterations = self.optimiser == "one-step" and self.iterations is not None
        require(not idle_iterations, "`iterations` does nothing with `optimiser` one-step: use `restarts`, or pgd")
        if self.scheduler == "ddim":
            idle = [name for name in ("noise", "eot", "verdicts") if getattr(self, name) is not None]
            require(not idle, f"{listed(idle)}: ddim draws no noise; add `scheduler` ddpm, or leave it out")
        alone = self.noise in ("fixed", "fresh") and self.objective in ("shift", "residual")
        message = (
            f"`noise` {self.noise} does nothing with `objective` {self.objective}, whose attacker knows each state: "
        )
        require(not alone, message + "leave it out, or use end-to-end")
        if self.noise in (None, "known"):
            idle = [name for name in ("eot", "verdicts") if getattr(self, name) is not None]
            require(not idle, f"{listed(idle)} needs `noise` fixed or fresh: the attacker knows the noise")
        alone = self.gradient_checkpointing != "auto" and self.objective in ("shift", "residual")
        message = f"`gradient_checkpointing` does nothing with `objective` {self.objective}, whose steps are separate: "
        require(not alone, message + "leave it out, or use end-to-end")
        self.check_reference()
        self.attacked()

    def check_reference(self) -> None:
        """What quality after the attack is measured against, and by."""
        check_extractors(self.extractor)
        check_bad_fraction(self.max_bad_fraction)
        nothing = self.reference == "none" and bool(self.extractor)
        require(not nothing, "`extractor` does nothing with `reference` none: leave one of them out")
        away = self.reference == "none" and self.objective.startswith("batch")
        require(not away, f"`objective` {self.objective} needs real images to push away from: name a `reference`")
        if self.reference in (None, "none"):
            idle = [name for name in OF_REFERENCE if getattr(self, name)]
            require(not idle, f"{listed(idle)} needs `reference`: add it, or leave this out")

    def attacked(self) -> tuple[int, ...]:
        """The sampler steps of ``at``, rising.

        Raises:
            UsageError: If they are no steps of the sampler.
        """
        if self.at == "all":
            return tuple(range(self.steps))
        try:
            found = sorted({int(text) for text in self.at.split(",")})
        except ValueError:
            found = []
        require(bool(found), f"`at` {self.at} is no list of sampler steps such as 0,10,20: use that, or all")
        wrong = next((step for step in found if not 0 <= step < self.steps), None)
        require(
            wrong is None, f"`at` {wrong}: the sampler has steps 0 .. {self.steps - 1}; name those, or raise `steps`"
        )
        return tuple(found)


@dataclass(frozen=True)
class PurifyConfig(Settings):
    """Purify images: drown what was done to them in noise, and denoise them with a model; with a manifest."""

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """Any source of images that `robustdiff train` takes, of the model's size (or with --resolution)."""
    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Pipeline that denoises: a run folder, another folder, or a hub id."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder to write: one PNG per image under its own relative name, and manifest.json. Needed."""
    strength: float = 0.1
    """How far up the noise goes, as a share of the model's noise levels, > 0 and at most 1: more removes more, of the
    image too."""
    steps: int = 10
    """Network calls per image from there down, >= 1; no more than there are noise levels below."""
    scheduler: Literal["ddim", "ddpm"] = "ddim"
    """Sampler: ddim draws noise once, at the start; ddpm at each step."""
    seed: int = 0
    """Rules the noise: that of image i is a function of (SEED, i), whatever the batch size; SEED >= 0."""
    batch_size: Annotated[int, arg(aliases=["--eval-batch-size"])] = 64
    """Images per forward pass, >= 1."""
    resolution: OptionalInt = None
    """Resize the shorter side to this many pixels and crop the centre square first: the model's own size."""
    split: Split = None
    dataset_config_name: HubConfig = None
    image_column: ImageColumn = None
    value_range: ValueRange = None
    label_column: OptionalText = None
    """Column of a table that holds the class labels, for class-conditional models. Default: as `robustdiff train`."""
    max_bad_fraction: BadFraction = 0.01
    max_memory_gib: MemoryGiB = None
    overwrite: bool = False
    """Replace FOLDER, if it holds purified images."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: One line that names the setting and the remedy.
        """
        self.check_homes()
        require(
            self.data != "" and self.model != "", "`data` and `model` must not be empty: name images and a pipeline"
        )
        require(self.output is not None, "`output` is missing: name a folder, such as purified")
        check_given(self, "output", "split", "dataset_config_name", "image_column", "label_column", "value_range")
        good = 0 < self.strength <= 1
        require(good, f"`strength` {self.strength} must be above 0 and at most 1: 0.1 removes what is faint")
        require(self.steps >= 1, f"`steps` {self.steps} must be at least 1")
        require(self.batch_size >= 1, f"`batch_size` {self.batch_size} must be at least 1")
        require(0 <= self.seed <= MAX_SEED, f"`seed` must be in 0 .. {MAX_SEED}")
        check_resolution(self.resolution)
        check_bad_fraction(self.max_bad_fraction)
        check_memory(self.max_memory_gib)


@dataclass(frozen=True)
class CorruptConfig(Settings):
    """Write a dirty copy of a folder of images, with a manifest that says which image got what."""

    source: Annotated[Positional[str], arg(metavar="SRC")]
    """Any source of images that `robustdiff train` takes."""
    destination: Annotated[Positional[str], arg(metavar="DST")]
    """Folder to write: one PNG per image (clipped to 8 bit) and manifest.json."""
    corrupt: Annotated[UseAppendAction[tuple[str, ...]], arg(aliases=["--with"])] = ()
    """KIND:NAME=VALUE,...,fraction=SHARE (repeatable, applied in order)."""
    poison: Annotated[str | None, arg(metavar="MODEL")] = None
    """Adversarial dirt, applied last: pixels are pushed to where this pipeline denoises worst, so as to spoil training
    (folder or hub id; images must be of its size)."""
    poison_radius: Annotated[str | None, arg(metavar="NUMBER")] = None
    """Largest change of a pixel by --poison, in units of [-1, 1]: a number or a fraction, 1/127.5 to 2. Holds in the
    8-bit files. Default: 16/255, which is the usual 8/255 of [0, 1]."""
    poison_fraction: OptionalFloat = None
    """Probability that --poison hits an image, for each independently, 0 to 1. Default: 1."""
    poison_steps: OptionalInt = None
    """Gradient steps of --poison, >= 1. Default: 40."""
    poison_draws: OptionalInt = None
    """Random noise levels and noises behind each gradient of --poison, >= 1. Default: 4."""
    batch_size: OptionalInt = None
    """Images per forward pass of --poison, >= 1; changes no draw. Default: 64."""
    seed: int = 0
    """Rules which images are hit and every draw; a whole number >= 0."""
    resolution: OptionalInt = None
    """Resize the shorter side to this many pixels and crop the centre square first."""
    split: Split = None
    dataset_config_name: HubConfig = None
    image_column: ImageColumn = None
    value_range: ValueRange = None
    max_bad_fraction: BadFraction = 0.01
    max_memory_gib: MemoryGiB = None
    overwrite: bool = False
    """Replace DST."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: One line that names the setting and the remedy.
        """
        self.check_homes()
        require(
            self.source != "" and self.destination != "",
            "`source` and `destination` must not be empty: name two folders",
        )
        message = "`corrupt` is missing: give at least one, e.g. `corrupt` gaussian:sigma=0.2, or `poison` MODEL"
        require(bool(self.corrupt) or self.poison is not None, message)
        check_corruptions(self.corrupt)
        self._check_poison()
        check_memory(self.max_memory_gib)
        check_bad_fraction(self.max_bad_fraction)
        check_given(self, "split", "dataset_config_name", "image_column", "value_range")
        require(self.seed >= 0, "`seed` must be 0 or more")
        check_resolution(self.resolution)

    def _check_poison(self) -> None:
        require(self.poison != "", "`poison` is empty: name a pipeline, or leave the flag out")
        flags = ("poison_radius", "poison_fraction", "poison_steps", "poison_draws", "batch_size")
        idle = [name for name in flags if getattr(self, name) is not None]
        require(self.poison is not None or not idle, f"{listed(idle)} needs `poison` MODEL: add it, or leave it out")
        self.radius()
        fraction = self.poison_fraction
        require(fraction is None or 0 <= fraction <= 1, f"`poison_fraction` {fraction} must be between 0 and 1")
        for name in flags[2:]:
            value = getattr(self, name)
            require(value is None or value >= 1, f"`{name}` {value} must be at least 1")

    def radius(self) -> float:
        """``poison_radius`` as a number, in units of [-1, 1].

        Raises:
            UsageError: If it is none, or out of range.
        """
        text = "16/255" if self.poison_radius is None else self.poison_radius
        top, _, bottom = text.partition("/")
        try:
            value = float(top) / float(bottom or 1)
        except (ValueError, ZeroDivisionError):
            value = math.nan
        good = 1 / 127.5 - 1e-9 <= value <= 2
        require(good, f"`poison_radius` {text} is not in 1/127.5 (one 8-bit step) .. 2: use 16/255, or 0.1")
        return value
