"""The images of a run, and what is known of each: told by flags, or found out by the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from robustdiff.audit.files import write_sheets
from robustdiff.audit.result import AuditResult
from robustdiff.audit.run import audit
from robustdiff.data.corruption import Corruption, check_corruptions
from robustdiff.data.dataset import ImageDataset, load_images
from robustdiff.diffusion.pipeline import to_uint8
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.training.annotations import NoiseLevels, told_levels, trained_images
from robustdiff.training.config import TrainConfig
from robustdiff.training.curriculum import masked_below, sampler_from_audit
from robustdiff.training.loader import Batches
from robustdiff.training.processes import check_alike
from robustdiff.training.setup import source_options
from robustdiff.utils.errors import UsageError
from robustdiff.utils.resources import free_memory

AUTO_FILE = "auto.json"


@dataclass(frozen=True)
class TrainingSet:
    """The images of a run, and what is known of each.

    Attributes:
        images: The data.
        corruptions: Dirt that the run adds.
        trained: Places of the images that are trained on, as flags have it, int64.
        batches: Which are seen when, and how.
        clean_subset: Whether those that the dirt hits are left out.
        levels: What ``noise_levels`` tells.
        audit: What ``auto`` found.
    """

    images: ImageDataset
    corruptions: tuple[Corruption, ...]
    trained: Tensor
    batches: Batches
    clean_subset: bool = False
    levels: NoiseLevels | None = None
    audit: AuditResult | None = None

    @property
    def count(self) -> int:
        """How many images are trained on."""
        return len(self.trained) if self.batches.sampler is None else len(self.batches.sampler.used)

    @property
    def classes(self) -> list[int]:
        """Numbers of the classes that are trained on, rising; none if the images have no labels."""
        if self.images.labels is None:
            return []
        used = self.trained if self.batches.sampler is None else self.batches.sampler.used
        return list(map(int, torch.unique(self.images.labels[used])))

    @property
    def dirt(self) -> tuple[str, ...]:
        """The corruptions as they are typed."""
        return tuple(str(corruption) for corruption in self.corruptions)

    def rows(self) -> dict[str, str]:
        """What is known, for the plan and the model card."""
        spared = f"{len(self.trained)} images: those that `corrupt` spares"
        rows = {"trained on": spared} if self.clean_subset else {}
        for known in (self.levels, self.audit):
            rows |= {} if known is None else known.rows()
        return rows

    def describe(self) -> Mapping[str, Any]:
        """JSON-ready account, ``data.json``."""
        return {
            "data": self.images.describe(),
            "corrupt": self.dirt,
            "corrupt_seed": self.batches.seed,
            "trained": self.count,
            "trained_classes": self.classes,
            "noise_levels": None if self.levels is None else self.levels.describe(),
            "auto": None if self.audit is None else self.audit.describe(),
        }

    def write_audit(self, folder: Path) -> None:
        """Write what ``auto`` found, in numbers and in pictures, where there is anything."""
        if self.audit is not None:
            self.audit.save(folder / AUTO_FILE)
            write_sheets(self.audit, lambda places: to_uint8(self.batches.images_at(places)), folder)


def load_training_images(config: TrainConfig, accelerator: Accelerator) -> ImageDataset:
    """The images that a configuration names, the same on every process.

    Raises:
        UsageError: If they cannot be used, or differ between machines.
    """
    images = load_images(
        config.data,
        resolution=config.resolution,
        channels=config.channels,
        max_bad_fraction=config.max_bad_fraction,
        max_memory=None if config.max_memory_gib is None else int(config.max_memory_gib * 2**30),
        **source_options(config),
    )
    check_alike(accelerator, images.sha256, f"`data` {images.source} holds other images")
    return images


def build_training_set(
    config: TrainConfig, images: ImageDataset, schedule: NoiseSchedule, accelerator: Accelerator, folder: Path
) -> TrainingSet:
    """What is known of the images, and when each is seen.

    Args:
        config: The flags.
        images: The data.
        schedule: Turns noise levels into timesteps.
        accelerator: For what one process finds out for all.
        folder: Of the run, for one that goes on.

    Raises:
        UsageError: If the flags tell what cannot be, or leave no image.
    """
    corruptions = check_corruptions(config.corrupt)
    trained = trained_images(images, corruptions, config.seed, config.clean_subset)
    batches = Batches(images, corruptions, config.seed, config.random_flip, trained)
    if config.noise_levels is not None:
        levels = told_levels(config.noise_levels, images, trained, corruptions, config.seed, schedule)
        check_alike(accelerator, levels.sha256, f"`noise_levels` {config.noise_levels} are others")
        batches = replace(batches, noise_level=levels.sigma, sampler=levels.sampler())
        return TrainingSet(images, corruptions, trained, batches, config.clean_subset, levels)
    if config.auto:
        found = _examined(config, accelerator, batches, folder)
        batches = replace(
            batches,
            noise_level=found.noise_std if bool((found.noise_std > 0).any()) else None,
            sampler=sampler_from_audit(found, schedule),
            repair=found.repaired if found.lost else None,
            masked_below=masked_below(found, schedule),
        )
        return TrainingSet(images, corruptions, trained, batches, audit=found)
    return TrainingSet(images, corruptions, trained, batches, config.clean_subset)


@dataclass(frozen=True)
class _AsTrained:
    """The images as training sees them, with the dirt of ``corrupt``, for the audit."""

    batches: Batches

    @property
    def names(self) -> Sequence[str]:
        """One per image."""
        return self.batches.images.names

    def __len__(self) -> int:
        """How many images."""
        return len(self.batches.images)

    def x0(self, index: Sequence[int], /) -> Tensor:
        """Images with these places."""
        return self.batches.images_at(index)


def _examined(config: TrainConfig, accelerator: Accelerator, batches: Batches, folder: Path) -> AuditResult:
    """What the images can be trusted for; found by one process for all, and once for a run that goes on."""
    found: list[AuditResult | None] = [None]
    if accelerator.is_main_process:
        if config.resuming:
            try:
                found[0] = AuditResult.load(folder / AUTO_FILE, len(batches.images))
            except UsageError as error:
                remedy = "put it back, start anew, or leave out `auto` if the run began without it"
                raise UsageError(f"`resume`: {error}: {remedy}") from None
        else:
            accelerator.print(f"looking at {len(batches.images)} images", flush=True)
            memory = 0 if batches.images.streamed else free_memory() // 4
            found[0] = audit(_AsTrained(batches), without=config.auto_without, memory=memory)
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]
