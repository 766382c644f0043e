"""What this machine has free, and what a launcher made of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil

from robustdiff.utils.errors import UsageError

GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows its control groups."""
OWN_GROUP = Path("/proc/self/cgroup")
VERSIONS = (
    ("", r"^0::/(.*)$", "memory.max", "memory.current", r"^inactive_file (\d+)$"),
    ("memory", r"^\d+:memory:/(.*)$", "memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_inactive_file (\d+)$"),
)
"""Versions 2 and 1: root folder, own group, limit, use, and cache that is given back when it is needed."""


def free_memory() -> int:
    """Bytes that can be had: of the machine, or of the tightest control group (container, job) around this process."""
    free = int(psutil.virtual_memory().available)
    try:
        groups = OWN_GROUP.read_text()
    except OSError:  # not Linux
        return free
    for folder, pattern, limit_name, used_name, cache_pattern in VERSIONS:
        own = re.search(pattern, groups, re.MULTILINE)
        root = GROUPS / folder
        group = root / (own[1] if own else "")
        for place in (group, *group.parents):
            if not place.is_relative_to(root):
                break
            try:
                limit, used, stat = ((place / name).read_text() for name in (limit_name, used_name, "memory.stat"))
            except OSError:  # the root group has no limit, and other groups may be hidden
                continue
            cache = re.search(cache_pattern, stat, re.MULTILINE)
            if limit.strip() != "max":
                free = min(free, int(limit) - int(used) + (int(cache[1]) if cache else 0))
    return max(0, free)


def cores() -> int:
    """Processor cores that each process of this machine can have to itself, at least 1."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, mine // processes_here())


def processes_here() -> int:
    """Processes that a launcher started on this machine; 1 without one."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(value)) if value.isdecimal() else 1


def processes() -> int:
    """Processes that a launcher started on all machines; 1 without one."""
    value = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(value)) if value.isdecimal() else 1


def rank() -> int:
    """Number of this process, from 0."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() else 0


PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
"""What accelerate's launcher says in these variables, and nothing here can use."""
SWITCHES = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")
"""Variables that accelerate reads as yes or no, and that are taken over."""
YES_OR_NO = re.compile("y|yes|t|true|on|1|n|no|f|false|off|0", re.IGNORECASE)


def check_launcher(mixed_precision: str | None = None, gradient_accumulation_steps: int = 1) -> None:
    """Refuse what a launcher, or the environment, says to accelerate and what cannot be followed here.

    Args:
        mixed_precision: Of a run that trains; None where nothing is trained and all is computed in float32.
        gradient_accumulation_steps: Of a run that trains.

    Raises:
        UsageError: For what splits the network, for what accelerate cannot read, for what it says otherwise than the
            run, and under ``accelerate launch --cpu --num_processes N``, which starts several processes only through
            MPI.
    """
    for name, plugin in PLUGINS.items():
        if os.environ.get(name, "").lower() == "true":
            raise UsageError(
                f"accelerate is set to {plugin} ({name}), which cannot be used here: use plain data parallelism "
                "(accelerate launch --multi_gpu)"
            )
    for name in SWITCHES:
        if not YES_OR_NO.fullmatch(os.environ.get(name, "no")):
            raise UsageError(f"{name} is {os.environ[name]!r:.40}: accelerate takes true or false")
    _check_settings(mixed_precision, gradient_accumulation_steps)
    through_mpi = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
    # Batch scripts export MASTER_ADDR for reasons of their own; this one is accelerate's.
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("MASTER_ADDR") == "127.0.0.1"
    if alone and "WORLD_SIZE" not in os.environ and not through_mpi:
        raise UsageError(
            "accelerate launch was asked for several processes but started one: on CPUs too it needs --multi_gpu "
            "(without --cpu) --num_processes N"
        )


def _check_settings(mixed_precision: str | None, gradient_accumulation_steps: int) -> None:
    """Accelerate is always told something, "no" or 1 by default: that leaves the run its own."""
    known = {"ACCELERATE_MIXED_PRECISION": ("mixed_precision", mixed_precision or "no")}
    if mixed_precision is not None:
        steps = ("gradient_accumulation_steps", str(gradient_accumulation_steps))
        known["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = steps
    for variable, (name, value) in known.items():
        told = os.environ.get(variable, value)
        if told.lower() not in ("", "no", "1", value):
            here = f"`{name}` is {value}: give the same here, or take it out there"
            if mixed_precision is None:
                here = "and only training follows it: say no there"
            raise UsageError(
                f"accelerate is set to {name} {told:.40} (by its launcher, its configuration or {variable}), {here}"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise UsageError(
            f"accelerate is set to dynamo_backend {backend:.40} (by its launcher, its configuration or "
            "ACCELERATE_DYNAMO_BACKEND): take it out there" + (", and add `compile` here" if mixed_precision else "")
        )
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        import torch  # only here: most commands begin without

        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"ACCELERATE_TORCH_DEVICE {device:.40} cannot be used here: {reason:.200}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or in a worker process that the system killed for it."""
    text = r"out of memory|can't allocate memory"
    return isinstance(error, MemoryError) or re.search(text, str(error), re.IGNORECASE) is not None
