"""Several processes as one: accelerate's set-up, what all must have read alike, and when all stop."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from robustdiff.diffusion.pipeline import without_accelerator
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.resources import check_launcher

PATIENCE = timedelta(hours=2)
"""How long processes wait for the first one, which saves and draws previews; the usual 10 minutes may be few."""


def build_accelerator(
    mixed_precision: str = "no",
    logger: str | None = None,
    folder: Path | None = None,
    gradient_accumulation_steps: int = 1,
) -> Accelerator:
    """Accelerate's device, precision and trackers; what it would ignore silently is an error here.

    Args:
        mixed_precision: no, fp16 or bf16.
        logger: A tracker that accelerate knows.
        folder: Where trackers write.
        gradient_accumulation_steps: Of the run, which accumulates by itself.

    Raises:
        UsageError: If the tracker is not there, or the set-up is one that training here cannot use.
    """
    check_launcher(mixed_precision, gradient_accumulation_steps)
    if logger is not None:
        available = sorted(tracker.value for tracker in get_available_trackers())
        if logger not in available:
            there = ", ".join(available) or "none"
            raise UsageError(f"`logger` {logger}: not installed, or not known to accelerate (installed: {there})")
    # Accelerate keeps one precision per process; a second run may ask for another.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=without_accelerator(),
            mixed_precision=mixed_precision,
            log_with=logger,
            project_dir=None if folder is None else str(folder),
            # Given here, as accelerate would else read them from the environment, and do them once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            kwargs_handlers=[
                # A gate may leave one process without a perturbed forward pass: no collective may happen in a forward.
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        reason = atomic_io.one_line(error)
        raise UsageError(f"accelerate cannot be set up as its launcher or the environment says: {reason}") from None
    sharding = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharding:
        raise UsageError(
            f"accelerate is set to {accelerator.distributed_type.value}, which splits the network: use plain data "
            "parallelism (accelerate launch --multi_gpu)"
        )
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("`mixed_precision` fp16 has no effect on a CPU: use bf16 or no")
    return accelerator


def check_alike(accelerator: Accelerator, digest: str, what: str) -> None:
    """Every process must have read the same, or none would notice what is trained on.

    Raises:
        UsageError: If a process has something else, from a copy on its own machine, say.
    """
    if accelerator.num_processes > 1:
        mine = torch.tensor([int(digest[:12], 16)], device=accelerator.device)
        every = accelerator.gather(mine)
        if not bool((every == every[0]).all()):
            raise UsageError(f"{what} on some machines than on others: make it the same")


def steps_between_votes(seconds: float) -> int:
    """Every how many steps of so many seconds processes ask one another whether to stop: about every other second.

    Launchers kill 30 s after they ask to stop; and every vote makes the host wait for the device.
    """
    return max(1, min(10, int(2 / max(seconds, 0.001))))  # a clock may stand still


def agree(accelerator: Accelerator, status: int) -> int:
    """The highest exit status that any process was asked to end with."""
    asked = torch.tensor([status == 130, status == 143], dtype=torch.float32, device=accelerator.device)
    interrupt, terminate = (accelerator.reduce(asked, "sum") > 0).tolist()
    return 143 if terminate else 130 if interrupt else 0
