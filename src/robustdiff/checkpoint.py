"""Checkpoints: written aside and renamed, pruned after, read without pickle.

A checkpoint is a folder ``step-00001000`` holding ``model.safetensors``, ``ema.safetensors``,
``optimizer.safetensors`` and ``state.json``, which is written last.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from robustdiff.config import UsageError

_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes during training.

    Args:
        model: The network, unwrapped.
        optimizer: Its optimiser, holding the network's parameters in their order.
        ema: The moving average, or None.
        extra: Objects with ``state_dict``/``load_state_dict`` that fit into JSON (learning-rate schedule, scaler).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None
    extra: dict[str, Any]


def save_checkpoint(folder: Path, step: int, state: TrainingState, counters: dict[str, int], keep: int) -> Path:
    """Write ``folder/step-...`` as a whole or not at all, then delete all but the ``keep`` newest.

    Args:
        folder: The run's ``checkpoints`` folder; made if missing.
        step: Optimiser steps done.
        state: What to save.
        counters: Numbers to find again on loading (images seen ...).
        keep: Checkpoints to keep, >= 1.
    """
    final = folder / f"step-{step:08d}"
    staging = folder / f".{final.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    names = [name for name, _ in state.model.named_parameters()]
    weights = {name: value.contiguous() for name, value in state.model.state_dict().items()}
    save_file(weights, staging / "model.safetensors")
    if state.ema is not None:
        shadow = {name: value.contiguous() for name, value in zip(names, state.ema.shadow_params, strict=True)}
        save_file(shadow, staging / "ema.safetensors")
    tensors, numbers = {}, {}
    optimizer = state.optimizer.state_dict()
    for index, values in optimizer["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                numbers[f"{index}.{key}"] = value
    save_file(tensors, staging / "optimizer.safetensors")
    record = {
        **counters,
        "step": step,
        "optimizer": {"param_groups": optimizer["param_groups"], "numbers": numbers},
        "ema": None if state.ema is None else {"optimization_step": state.ema.optimization_step},
        "extra": {name: part.state_dict() for name, part in state.extra.items()},
    }
    (staging / "state.json").write_text(json.dumps(record, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(folder: Path, name: str = "latest") -> Path:
    """The newest checkpoint, or the one called ``name`` (``step-1000`` and ``step-00001000`` alike).

    Raises:
        UsageError: If there is none; names the flag and lists what there is.
    """
    found = list_checkpoints(folder)
    if name == "latest":
        if not found:
            raise UsageError(f"--resume: no complete checkpoint in {folder}; start anew with --overwrite")
        return found[-1]
    digits = Path(name).name.removeprefix("step-").removeprefix("checkpoint-")
    for path in found:
        if digits.isdecimal() and int(path.name.removeprefix("step-")) == int(digits):
            return path
    there = ", ".join(path.name for path in found) or "none"
    raise UsageError(f"--resume-from-checkpoint {name!r}: not in {folder} (there: {there})")


def load_checkpoint(path: Path, state: TrainingState) -> dict[str, Any]:
    """Put a checkpoint back into ``state``, exactly; returns the counters it was saved with.

    Raises:
        UsageError: If it is damaged, was made with another network, or with a moving average where now there is none.
    """
    try:  # everything is read before anything is changed
        record = json.loads((path / "state.json").read_text())
        weights, tensors = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
        shadow = {} if record["ema"] is None else load_file(path / "ema.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is damaged ({reason}): name another with --resume-from-checkpoint") from None
    if (record["ema"] is None) != (state.ema is None):
        raise UsageError(f"{path} and --use-ema disagree: resume with the flags the run was started with")
    try:
        state.model.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{path} was made with another network: {str(error).splitlines()[-1].strip()}") from None
    if state.ema is not None:
        for (name, _), value in zip(state.model.named_parameters(), state.ema.shadow_params, strict=True):
            value.copy_(shadow[name])
        state.ema.optimization_step = record["ema"]["optimization_step"]
    values: dict[int, dict[str, Any]] = {}
    saved = {**tensors, **record["optimizer"]["numbers"]}
    for key, value in saved.items():
        index, name = key.split(".", 1)
        values.setdefault(int(index), {})[name] = value
    groups = record["optimizer"]["param_groups"]
    for group in groups:
        group["betas"] = tuple(group["betas"])  # JSON has lists only
    state.optimizer.load_state_dict({"state": values, "param_groups": groups})
    for parameter, moments in state.optimizer.state.items():
        for key, value in moments.items():  # fused AdamW on CUDA wants the strides of the parameter (channels_last)
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter).copy_(value)
    for name, part in state.extra.items():
        part.load_state_dict(record["extra"][name])
    return record
