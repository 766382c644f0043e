"""Checkpoints: written aside and renamed, checked by hash, pruned after, read without pickle.

A checkpoint is a folder ``step-00001000`` holding ``model.safetensors``, ``ema.safetensors``,
``optimizer.safetensors``, ``state.json``, and ``manifest.json``: the size and SHA-256 of each, written last. A folder
without a manifest is not complete. Every file is on the disk before the manifest is, the manifest before the
folder has its name, and that before anything older is deleted, so that a kill or a power cut at any instant leaves
a checkpoint to go on from. What a kill leaves beside it has a name that starts with a dot:

* ``.step-00001000.tmp`` is being written, or, with a manifest, waits to be renamed;
* ``.step-00001000.old`` is about to be replaced by one of the same step (see ``atomic_io.replace_folder``);
* ``.step-00001000.trash`` is being deleted, and never read.

The first two count as checkpoints if they have a manifest and nothing better is there of their step. The next save
gives such a one its name and deletes the rest.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robustdiff.training.checkpoint_fit import OPTIMIZER, check_record, misfit, moments, require
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError

FORMAT = 1
"""Version of the layout, in the manifest; any other is refused."""
_FILES = ("model.safetensors", OPTIMIZER, "state.json")
_EMA = "ema.safetensors"
_NAME = re.compile(r"(\.)?step-(\d{8,18})(?(1)\.(tmp|old|trash))", re.ASCII)
_ASKED = re.compile(r"\.?(?:step-|checkpoint-)?(\d{1,18})(?:\.tmp|\.old)?", re.ASCII)
_RANK = {"old": 0, "tmp": 1, None: 2}
_verified: dict[Path, tuple[tuple[object, ...], ...]] = {}
"""Checkpoints this process has written or hashed, with the marks (:func:`_marks`) their files had then."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes during training.

    Args:
        model: The network, unwrapped.
        optimizer: Its optimiser, holding the network's parameters in their order; keeps per parameter tensors of the
            parameter's shape and a scalar ``step``, as AdamW does.
        ema: The moving average, or None.
        extra: Objects with ``state_dict``/``load_state_dict`` that fit into JSON (learning-rate schedule, scaler).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None
    extra: dict[str, Any]


def save_checkpoint(folder: Path, step: int, state: TrainingState, counters: dict[str, Any], keep: int) -> Path:
    """Write ``folder/step-...`` as a whole or not at all, then delete what it makes superfluous.

    What is kept: this one and the ``keep`` - 1 newest others that are undamaged; nothing is deleted if there are fewer.
    One that has the same step already is replaced, and stays until this one is complete.

    Args:
        folder: The run's ``checkpoints`` folder; made if missing.
        step: Optimiser steps done, >= 0.
        state: What to save.
        counters: Values to find again on loading (images seen ...); anything strict JSON can hold, by names other than
            step, optimizer, ema and extra.
        keep: Checkpoints to keep, >= 1.

    Returns:
        The checkpoint's folder; it is on the disk.

    Raises:
        OSError: If the disk is full, read-only, or broken; the earlier checkpoints are then as they were.
        ValueError: If the counters or the state do not fit into strict JSON; nothing is written then.
    """
    optimizer = state.optimizer.state_dict()
    flat = {f"{index}.{key}": v for index, values in optimizer["state"].items() for key, v in values.items()}
    record = {
        "step": step,
        "optimizer": {
            "param_groups": optimizer["param_groups"],
            "numbers": {key: value for key, value in flat.items() if not isinstance(value, Tensor)},
        },
        "ema": None if state.ema is None else {"optimization_step": state.ema.optimization_step},
        "extra": {name: part.state_dict() for name, part in state.extra.items()},
    }
    if taken := counters.keys() & record.keys():
        raise ValueError(f"counters may not be called {', '.join(sorted(taken))}")
    record = {**counters, **record}
    json.dumps(record, allow_nan=False)  # what does not fit is known before the first byte is written
    tensors = {
        "model.safetensors": state.model.state_dict(),
        "optimizer.safetensors": {key: value for key, value in flat.items() if isinstance(value, Tensor)},
    }
    if state.ema is not None:
        tensors[_EMA] = _averages(state)

    final = folder / f"step-{step:08d}"
    staging = folder / f".{final.name}.tmp"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        atomic_io.fsync_folder(folder.parent)
    _tidy(folder)
    try:
        os.mkdir(staging)
        for name, values in tensors.items():
            _save_tensors(values, staging / name)
        atomic_io.write_json(staging / "state.json", record)
        atomic_io.write_manifest(staging, format=FORMAT, step=step)
    except OSError:
        atomic_io.remove(staging)  # a full disk needs the room
        raise
    atomic_io.replace_folder(staging, final)
    _verified[final] = _marks(final)
    _prune(folder, final, keep)
    return final


def _averages(state: TrainingState) -> dict[str, Tensor]:
    """The moving average itself, by the names of the parameters; empty without one."""
    names = [name for name, _ in state.model.named_parameters()]
    return {} if state.ema is None else dict(zip(names, state.ema.shadow_params, strict=True))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file and wait until it is on the disk; the library's I/O errors become OSErrors."""
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library's own mode shuts other users out
    atomic_io.fsync_file(path)


def _tidy(folder: Path) -> None:
    """Finish what a killed save left: a good leftover of a step without a good one gets its name, others go."""
    left = {path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and match[1]}
    found = _candidates(folder)
    for step in {step for step, _, path in found if path in left}:
        choices = [path for number, _, path in reversed(found) if number == step]
        best = next((path for path in choices if not verify(path)), None)
        if best in left:
            final = folder / f"step-{step:08d}"
            if os.path.lexists(final):
                _discard(final)
            os.rename(best, final)
            atomic_io.fsync_folder(folder)
    for path in left:
        atomic_io.remove(path)


def _prune(folder: Path, written: Path, keep: int) -> None:
    """Delete all but ``written`` and the newest ``keep`` - 1 good others; nothing if there are not so many."""
    others = [path for path in list_checkpoints(folder) if path != written]
    if len(others) < keep:
        return
    kept = list(itertools.islice((path for path in reversed(others) if _unharmed(path)), keep - 1))
    if len(kept) == keep - 1:
        for path in others:
            if path not in kept:
                _discard(path)


def _unharmed(path: Path) -> bool:
    """Whether ``path`` verifies; what this process hashed before, and nobody has touched since, is not read again."""
    marks = _marks(path)
    if _verified.get(path) != marks:
        if verify(path):
            return False
        _verified[path] = marks
    return True


def _marks(path: Path) -> tuple[tuple[object, ...], ...]:
    """What changes when a file in ``path`` is touched."""
    stats = [(file.name, file.stat()) for file in sorted(path.iterdir())]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)


def _discard(path: Path) -> None:
    """Delete a checkpoint: in one instant it is none any more, then its files go."""
    trash = path.with_name(f".{path.name.strip('.').split('.')[0]}.trash")
    atomic_io.remove(trash)
    os.rename(path, trash)
    _verified.pop(path, None)
    atomic_io.remove(trash)  # the next save tries again


def _candidates(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, rank, path) of what may be a checkpoint, worst first: by step, complete leftovers before the real one."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and match[3] in _RANK and (match[3] is None or _is_complete(path)):
            found.append((int(match[2]), _RANK[match[3]], path))
    return sorted(found)


def _is_complete(path: Path) -> bool:
    return (path / atomic_io.MANIFEST).is_file()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, one per step, oldest first.

    Complete means that there is a manifest; :func:`verify` says whether it is undamaged. One of a save that was killed
    just before the last rename is listed under its hidden name.
    """
    return list({step: path for step, _, path in _candidates(folder) if _is_complete(path)}.values())


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, also a hidden one."""
    return int(path.name.removeprefix(".").removeprefix("step-").partition(".")[0])


def verify(path: Path) -> str:
    """Read a whole checkpoint and compare it with its manifest.

    Args:
        path: The checkpoint's folder.

    Returns:
        "" if it is undamaged, else what is wrong with which file, in one line.
    """
    match = _NAME.fullmatch(path.name)
    about = {"step": int(match[2])} if match else {}
    return atomic_io.check_manifest(path, _FILES, (_EMA,), format=FORMAT, **about)


def find_checkpoint(folder: Path, name: str = "latest", damaged: list[tuple[Path, str]] | None = None) -> Path:
    """The newest undamaged checkpoint, or the one called ``name`` (``step-1000`` and ``step-00001000`` alike).

    Changes nothing on the disk. Every file of the checkpoint is read once, to compare hashes.

    Args:
        folder: The run's ``checkpoints`` folder.
        name: ``latest``, or which one.
        damaged: Takes (path, reason) of each newer one that was passed over; the caller should warn of them.

    Raises:
        UsageError: If there is none, or none undamaged; names the flag and lists what there is.
    """
    found = _candidates(folder)
    if name == "latest":
        if not found:
            raise UsageError(f"`resume`: no complete checkpoint in {folder}; start anew with `overwrite`")
        chosen = found
    else:
        asked = _ASKED.fullmatch(Path(name).name)
        chosen = [item for item in found if asked and item[0] == int(asked[1])]
        if not chosen:
            there = ", ".join(path.name for path in list_checkpoints(folder)) or "none"
            raise UsageError(f"`resume_from_checkpoint` {name!r}: not in {folder} (there: {there})")
    bad: list[tuple[Path, str]] = []
    for _, _, path in reversed(chosen):
        reason = verify(path)
        if not reason:
            if damaged is not None:
                damaged += bad
            return path
        bad.append((path, reason))
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in bad)
    if name == "latest":
        raise UsageError(
            f"`resume`: no checkpoint in {folder} is undamaged ({reasons}): bring one back from a backup, "
            "or start anew with `overwrite`"
        )
    good = next((path.name for step, _, path in reversed(found) if step != chosen[0][0] and not verify(path)), None)
    remedy = f"the newest good one is {good}" if good else "no other is good: start anew with `overwrite`"
    raise UsageError(f"`resume_from_checkpoint` {name!r}: damaged ({reasons}); {remedy}")


def load_checkpoint(path: Path, state: TrainingState) -> dict[str, Any]:
    """Put a checkpoint back into ``state``, exactly; returns what it was saved with: ``step`` and the counters.

    Everything is read and compared with ``state`` before anything is changed. Hashes are not: :func:`find_checkpoint`
    has done that.

    Raises:
        UsageError: If it is damaged, was made with another network, or with a moving average where now there is none.
    """
    try:
        record = atomic_io.read_json(path / "state.json")
        average: Any = record.get("ema")
        weights, tensors = load_file(path / _FILES[0]), load_file(path / _FILES[1])
        if (average is None) != (state.ema is None):
            raise UsageError(f"{path} and `use_ema` disagree: resume with the flags the run was started with")
        if unfit := misfit(state.model.state_dict(), weights):
            raise UsageError(f"{path} was made with another network: {unfit}")
        check_record(record, state)
        saved = {} if state.ema is None else load_file(path / _EMA)
        averages = _averages(state)
        unfit = misfit(averages, saved)
        require(not unfit, f"{_EMA}: {unfit}")
        adam = moments(state.optimizer, {**tensors, **record["optimizer"]["numbers"]})
    except UsageError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = atomic_io.one_line(error)
        raise UsageError(f"{path} is damaged ({reason}): name another with `resume_from_checkpoint`") from None

    state.model.load_state_dict(weights)
    for name, value in averages.items():
        value.copy_(saved[name])
    if state.ema is not None:
        state.ema.optimization_step = average["optimization_step"]
    groups = []
    for group in record["optimizer"]["param_groups"]:
        betas = {"betas": tuple(group["betas"])} if "betas" in group else {}  # JSON has lists only
        groups.append({**group, **betas})
    state.optimizer.load_state_dict({"state": adam, "param_groups": groups})
    for parameter, values in state.optimizer.state.items():
        for key, value in values.items():  # fused AdamW on CUDA wants the strides of the parameter (channels_last)
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter).copy_(value)
    for name, part in state.extra.items():
        known = part.state_dict().keys()  # a schedule would take any other name for an attribute of its own
        part.load_state_dict({key: value for key, value in record["extra"][name].items() if key in known})
    return record
