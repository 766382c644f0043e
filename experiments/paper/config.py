"""Settings of `python -m experiments.paper`, each with its unit and default."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from robustdiff.utils.options import (
    MAX_SIDE,
    MAX_WORKERS,
    OptionalFloat,
    OptionalInt,
    OptionalText,
    Settings,
    check_extractors,
    require,
)

EXPERIMENTS = ("plane", "mixture", "subspace", "linear-gaussian", "invariance", "cifar10", "celeba", "lsun")


IMAGE_GRIDS = ("cifar10", "celeba", "lsun")
"""Experiments on images that the user has."""


@dataclass(frozen=True)
class ReproduceConfig(Settings):
    """Run an experiment; run it again, and it goes on where it was stopped.

    NAME is plane, mixture, subspace, linear-gaussian or invariance (distributions whose truth is known), or cifar10,
    celeba or lsun (the image grid). Writes one JSON per row, figures and a page.
    """

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """plane | mixture | subspace | linear-gaussian | invariance | cifar10 | celeba | lsun."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="FOLDER")] = None
    """Folder for results, networks and figures. Default: reproduce/NAME (image grids: NAME-SCALE), -quick added."""
    quick: bool = False
    """Few rows, one seed, short training: shows what happens in a minute or two; its numbers prove nothing."""
    rows: UseAppendAction[tuple[str, ...]] = ()
    """Only rows whose name matches, e.g. 'plane-inlier-*' (repeatable; shell wildcards; see --list)."""
    list: bool = False
    """Print the names of the rows and stop; writes nothing."""
    seeds: OptionalInt = None
    """Seeds of the rows that conclusions rest on, from 0; the others have one. Default: 3; image grids: 2."""
    workers: OptionalInt = None
    """Rows run side by side, >= 1. Default: one per core, one core each; on a GPU 1."""
    data: OptionalText = None
    """Images: anything that `robustdiff train` reads. Image grids need it; `subspace` has digits built in."""
    resolution: OptionalInt = None
    """For --data of `subspace`: resize the shorter side to this many pixels and crop the centre square; made grey."""
    components: OptionalInt = None
    """Principal components that span the image world of `subspace`, >= 1. Default: 8."""
    dimension: OptionalInt = None
    """Dimension of `linear-gaussian`, >= 2 and at most 64. Default: 16."""
    spectrum: OptionalText = None
    """Variances of `linear-gaussian`: powerlaw, flat or two-level. Default: powerlaw."""
    scale: Literal["cpu", "cpu-32", "gpu-10min", "gpu-1h", "gpu-paper", "gpu"] | None = None
    """How large an image grid is. cpu: 16 x 16 grey, 8 to 25 minutes a row on one core; cpu-32: 32 x 32 RGB, three
    times as long; gpu: 32 x 32 RGB, the paper's length; gpu-10min, gpu-1h: shorter runs of a smaller network;
    gpu-paper: the paper's network and schedule. Default: cpu."""
    extractor: UseAppendAction[tuple[str, ...]] = ()
    """What image grids are judged by, beside pixels: see --extractor of `robustdiff evaluate`; the first one ranks."""
    minutes: OptionalFloat = None
    """Image grids: save and stop after so many minutes (> 0); the same command goes on. Default: when all is done."""
    overwrite: bool = False
    """Delete what FOLDER holds and start anew."""

    def validate(self) -> None:
        """Check ranges, and refuse flags that would do nothing.

        Raises:
            UsageError: One line that names the flag and the remedy.
        """
        near = difflib.get_close_matches(self.name, EXPERIMENTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        require(self.name in EXPERIMENTS, f"no experiment {self.name!r}{hint}; there are {', '.join(EXPERIMENTS)}")
        require(self.output != "", "--output is empty: name a folder, or leave the flag out")
        seeds = self.seeds
        require(seeds is None or 1 <= seeds <= 100, f"--seeds {seeds} must be in 1 .. 100")
        require(not (self.quick and seeds is not None), "--quick has one seed: leave out --seeds")
        workers = self.workers
        require(workers is None or 1 <= workers <= MAX_WORKERS, f"--workers {workers} must be in 1 .. {MAX_WORKERS}")
        owners = {
            "data": ("subspace", *IMAGE_GRIDS),
            **dict.fromkeys(("resolution", "components"), ("subspace",)),
            **dict.fromkeys(("dimension", "spectrum"), ("linear-gaussian",)),
            **dict.fromkeys(("scale", "extractor", "minutes"), IMAGE_GRIDS),
        }
        for name, names in owners.items():
            idle = self.name not in names and getattr(self, name) not in (None, ())
            require(not idle, f"--{name} belongs to {', '.join(names)}: leave it out")
        if self.name == "linear-gaussian":
            require(seeds is None and workers is None, "linear-gaussian runs alone: leave out --seeds and --workers")
        require(not (self.resolution and self.data is None), "--resolution needs --data: digits are 8 x 8")
        for name in ("resolution", "components"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= MAX_SIDE, f"--{name} {value} must be in 1 .. {MAX_SIDE}")
        require(self.data != "", "--data is empty: name a source of images, or leave the flag out")
        needed = self.name in IMAGE_GRIDS and self.data is None and not self.list
        require(not needed, f"{self.name} needs images: add --data PATH (docs/guide/data.md says in which forms)")
        good = self.minutes is None or (math.isfinite(self.minutes) and self.minutes > 0)
        require(good, f"--minutes {self.minutes} must be more than 0")
        check_extractors(self.extractor)
