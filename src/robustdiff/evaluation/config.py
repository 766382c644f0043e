"""Settings of `robustdiff evaluate`, each with its unit and default, checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from robustdiff.utils.options import (
    MAX_SEED,
    BadFraction,
    CacheFolder,
    FloorShape,
    OptionalInt,
    OptionalText,
    ReferenceColumn,
    ReferenceConfig,
    ReferenceSplit,
    SamplerSteps,
    Settings,
    SigmaFloor,
    Title,
    Told,
    ValueRange,
    check_bad_fraction,
    check_extractors,
    check_floor,
    check_given,
    check_resolution,
    require,
)


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Judge a pipeline, or a folder of images made anywhere: quality, coverage, copying, few steps.

    Every number is written with its floor (real against real) and with all that it rests on: one JSON per result.
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run folder, pipeline folder or hub id; or images: anything that `robustdiff train` reads."""
    reference: OptionalText = None
    """Clean real images to compare with, not trained on if there are such: anything that `robustdiff train` reads."""
    extractor: UseAppendAction[tuple[str, ...]] = ()
    """What turns images into features (repeatable): pixels, a TorchScript file, inception or inception:WEIGHTS.pth, or
    the folder of a vision model of transformers. Default: pixels. A TorchScript file is a program: trust it."""
    n: Annotated[int | None, arg(aliases=["-n"], metavar="INT")] = None
    """Images judged, >= 14. Default: 1000 of a pipeline, all of a folder."""
    training: OptionalText = None
    """Training images, to look for copies of. Default: those that the run folder names; `none` = leave it out."""
    held_out: OptionalText = None
    """More clean real images: the floor is theirs against the reference. Default: one half of the reference against the
    other, which is too few."""
    split: ReferenceSplit = None
    training_split: OptionalText = None
    """Part of --training. Default: train."""
    held_out_split: OptionalText = None
    """Part of --held-out. Default: train."""
    dataset_config_name: ReferenceConfig = None
    image_column: ReferenceColumn = None
    value_range: ValueRange = None
    resolution: OptionalInt = None
    """Resize the shorter side of every image to this many pixels and crop the centre square. Default: as the generated
    images are; real images of another size are brought to that if it is square."""
    few_step: OptionalText = None
    """Also draw with these numbers of network calls, for example 5,10,20,50. Default: none."""
    few_step_schedulers: OptionalText = None
    """Samplers of --few-step, for example ddim,dpm. Default: ddim."""
    class_proportions: Literal["reference", "training", "equal"] = "reference"
    """How often a class-conditional pipeline draws each class: as the reference has them (if it has none of the model's
    labels, as the training images had), as the training images had, or equally often."""
    scheduler: Literal["ddim", "ddpm", "dpm", "unipc", "euler"] = "ddim"
    """Sampler of a pipeline."""
    steps: SamplerSteps = 50
    seed: int = 0
    """Image i is drawn from its own generator, seeded with SEED + i; SEED >= 0."""
    relabel: float = 1.0
    """Query the network at RELABEL times the noise level (>= 1)."""
    sigma_floor: SigmaFloor = 0.0
    floor_shape: FloorShape = "hard"
    batch_size: Annotated[int, arg(aliases=["--eval-batch-size"])] = 64
    """Images per forward pass, >= 1."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder for the JSON files and sheets. Default: RUN/evaluation of a pipeline folder, else
    evaluation/NAME/evaluation here."""
    title: Title = None
    told: Told = None
    cache: CacheFolder = None
    max_bad_fraction: BadFraction = 0.01

    def validate(self) -> None:
        """Check ranges, and refuse flags that would do nothing.

        Raises:
            UsageError: One line that names the setting and the remedy.
        """
        self.check_homes()
        self.check_choices()
        texts = ("run", "reference", "training", "held_out", "split", "training_split", "held_out_split", "title")
        check_given(
            self, *texts, "dataset_config_name", "image_column", "value_range", "few_step", "output", "told", "cache"
        )
        require(
            self.reference is not None,
            "`reference` is missing: name clean real images to compare with (a folder, a parquet file ...)",
        )
        check_extractors(self.extractor)
        for owner in ("training", "held_out"):
            idle = getattr(self, owner) in (None, "none") and getattr(self, f"{owner}_split") is not None
            require(not idle, f"`{owner}_split` needs `{owner}`: add it, or leave this one out")
        require(
            self.n is None or self.n >= 14, f"`n` {self.n} must be at least 14: neighbours are looked for in halves"
        )
        require(self.steps >= 1, f"`steps` {self.steps} must be at least 1")
        require(self.batch_size >= 1, f"`batch_size` {self.batch_size} must be at least 1")
        require(0 <= self.seed <= MAX_SEED, f"`seed` must be in 0 .. {MAX_SEED}")
        require(math.isfinite(self.relabel) and self.relabel >= 1, f"`relabel` {self.relabel} must be 1 or more")
        check_floor(self.sigma_floor, self.floor_shape)
        check_resolution(self.resolution)
        check_bad_fraction(self.max_bad_fraction)
        idle = self.few_step_schedulers is not None and self.few_step is None
        require(not idle, "`few_step_schedulers` needs `few_step`: name numbers of steps, such as 5,10,20")
        self.few_step_counts()
        self.few_step_samplers()

    def few_step_counts(self) -> tuple[int, ...]:
        """``few_step`` as numbers, ascending.

        Raises:
            UsageError: If they are no whole numbers, or fewer than one.
        """
        try:
            counts = sorted({int(text) for text in (self.few_step or "").split(",") if self.few_step})
        except ValueError:
            counts = [0]
        require(not counts or counts[0] >= 1, f"`few_step` {self.few_step} is no list such as 5,10,20,50")
        return tuple(counts)

    def few_step_samplers(self) -> tuple[str, ...]:
        """``few_step_schedulers``, in the order given.

        Raises:
            UsageError: If one is unknown.
        """
        known = ("ddim", "ddpm", "dpm", "unipc", "euler")
        names = tuple(dict.fromkeys((self.few_step_schedulers or "ddim").split(",")))
        for name in names:
            require(name in known, f"`few_step_schedulers` {name!r} is not one of {', '.join(known)}")
        return names
