"""Settings of `robustdiff sample`, each with its unit and default, checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from robustdiff.utils.options import MAX_SEED, FloorShape, SamplerSteps, Settings, SigmaFloor, check_floor, require


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Draw images from any pipeline built on UNet2DModel: a run folder, another folder, or a hub id."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Pipeline folder or hub id."""
    n: Annotated[int, arg(aliases=["-n"])] = 64
    """Number of images."""
    output: Annotated[str | None, arg(aliases=["-o", "--output-dir"], metavar="PATH")] = None
    """Folder for PNGs and grid.png, or a file ending in .npz. Default: RUN/samples/SCHEDULER-STEPS-seedSEED."""
    scheduler: Literal["ddim", "ddpm", "dpm", "unipc", "euler"] = "ddim"
    """Sampler. ddim, dpm, unipc and euler are deterministic."""
    steps: SamplerSteps = 50
    seed: int = 0
    """Image i is drawn from its own generator, seeded with SEED + i (SEED >= 0), whatever the batch size."""
    batch_size: Annotated[int, arg(aliases=["--eval-batch-size"])] = 64
    """Images per forward pass."""
    relabel: float = 1.0
    """Query the network at RELABEL times the noise level (>= 1): smoother images, no training."""
    sigma_floor: SigmaFloor = 0.0
    floor_shape: FloorShape = "hard"
    class_label: Annotated[str | None, arg(metavar="CLASS")] = None
    """Class to draw, by name or counted from 0, for class-conditional pipelines. Default: classes in turn."""
    overwrite: bool = False
    """Replace existing output."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            UsageError: One line that names the setting and the remedy.
        """
        self.check_homes()
        self.check_choices()
        require(self.run != "", "`run` is empty: name a pipeline folder or a hub id")
        require(self.output != "", "`output` is empty: name a folder, or a file ending in .npz")
        require(self.class_label != "", "`class_label` is empty: name a class, or its number")
        require(self.n >= 1, f"`n` {self.n} must be at least 1")
        require(self.steps >= 1, f"`steps` {self.steps} must be at least 1")
        require(self.batch_size >= 1, f"`batch_size` {self.batch_size} must be at least 1")
        require(0 <= self.seed <= MAX_SEED, f"`seed` must be in 0 .. {MAX_SEED}")
        require(math.isfinite(self.relabel) and self.relabel >= 1, f"`relabel` {self.relabel} must be 1 or more")
        check_floor(self.sigma_floor, self.floor_shape)
