"""The plan that a run follows: every default resolved, and how a person reads it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DModel

from robustdiff.data.dataset import ImageDataset
from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.networks import NETWORKS, network_for
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.training.config import TrainConfig
from robustdiff.utils.errors import UsageError
from robustdiff.utils.options import parse_count


@dataclass(frozen=True)
class Plan:
    """What a run will do, resolved: printed before it starts and saved as ``config.json``."""

    images: int
    batch: int
    steps: int
    warmup_steps: int
    checkpointing_steps: int
    learning_rate: float
    objective: str
    network: str
    parameters: int

    @classmethod
    def resolve(
        cls,
        config: TrainConfig,
        data: ImageDataset,
        trained: int,
        processes: int,
        unet: UNet2DModel,
        network: str,
        objective: str,
    ) -> Plan:
        """Fill in every default that depends on the data, the network or the number of processes.

        ``trained`` is how many of the images are trained on.
        """
        total = parse_count(config.images, "images")
        total = total if config.num_epochs is None else config.num_epochs * trained
        batch = config.train_batch_size * config.gradient_accumulation_steps * processes
        if config.clean_subset and trained < batch:
            raise UsageError(
                f"`clean_subset`: `corrupt` spares {trained} of {len(data)} images, a step takes {batch}: lower its "
                "fraction, or `train_batch_size`"
            )
        steps = max(1, round(total / batch))
        warmup = min(500, steps // 20) if config.lr_warmup_steps is None else config.lr_warmup_steps
        warmup = 0 if config.lr_scheduler == "constant" else warmup
        if warmup > steps:
            raise UsageError(
                f"`lr_warmup_steps` {warmup} is longer than the run of {steps} steps: make one fit the other"
            )
        rate = config.learning_rate
        if rate is None and (config.init_from or config.model_config_name_or_path):
            rate = 1e-4
        return cls(
            images=steps * batch,
            batch=batch,
            steps=steps,
            warmup_steps=warmup,
            checkpointing_steps=config.checkpointing_steps or max(1, math.ceil(steps / 10)),
            learning_rate=rate or NETWORKS[config.network or network_for(data.size)].learning_rate,
            objective=objective,
            network=network,
            parameters=sum(p.numel() for p in unet.parameters()),
        )

    def text(
        self,
        config: TrainConfig,
        data: ImageDataset,
        unet: UNet2DModel,
        workers: int,
        dirt: tuple[str, ...],
        told: Mapping[str, str],
        folder: Path,
        hardware: str,
        seconds_per_step: float,
    ) -> str:
        """The plan as a person reads it, with the estimated time."""
        height, width = data.size
        colour = "grey" if data.channels == 1 else "RGB"
        size = f"{data.bytes / 2**20:.1f} MiB" if data.bytes >= 2**20 else f"{data.bytes / 2**10:.1f} KiB"
        held = f"streamed ({size} decoded at every use)" if data.streamed else f"{size} held"
        held += f", fed by {workers} workers" if workers else ""
        conditional = Denoiser.of(unet).num_classes is not None
        rows = {
            "data": f"{config.data} ({data.what}): {len(data)} images, {width} x {height} {colour}",
            "memory": held,
            "classes": f"{len(data.classes)}: {_listed(data.classes)}" if conditional else "",
            "skipped": _counts(Counter(reason for _, reason in data.skipped)),
            "converted": _counts(data.notes),
            "dirt": "; ".join(dirt),
            **told,
            "network": f"UNet2DModel {self.network}, {self.parameters / 1e6:.2f} M parameters",
            "objective": self.objective,
            "length": f"{self.images:,} images = {self.steps:,} steps of {self.batch}",
            "learning rate": f"{self.learning_rate:g}, {config.lr_scheduler}, {self.warmup_steps} warm-up steps",
            "evaluation": f"every {config.evaluate_every} images" if config.evaluate_every else "",
            "hardware": hardware,
            "output": str(folder),
            "estimated time": _duration(seconds_per_step * self.steps) + ", previews and checkpoints not counted",
        }
        return "\n".join(f"{name + ':':<16}{value}" for name, value in rows.items() if value)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def describe_objective(objective: DenoisingLoss) -> str:
    """The objective and its settings in one line."""
    fields = dataclasses.fields(objective)
    values = {f.name: getattr(objective, f.name) for f in fields if f.name != "schedule"}
    if values.get("perturbation", "") is None:
        return "DenoisingLoss()"
    return f"{type(objective).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(" ".join(name.split()) for name in names[:10]) + (" ..." if len(names) > 10 else "")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
