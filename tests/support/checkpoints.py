"""A small training state, what it holds, and its checkpoints: shared by the tests of checkpoints."""

import contextlib
import json
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from helpers import SmallNet, normal
from robustdiff.training.checkpoint import (
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from robustdiff.utils.errors import UsageError


def fresh(seed: int = 0, ema: bool = True, width: int = 6) -> TrainingState:
    """A network with batch norm (so with buffers), fused AdamW, moving average and a warm-up schedule."""
    model = SmallNet(width=width, seed=seed, dtype=torch.float32, norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=20)
    return TrainingState(model, optimizer, EMAModel(model.parameters()) if ema else None, {"schedule": schedule})


def advance(state: TrainingState, steps: range) -> None:
    """Optimiser steps, each on its own seeded batch."""
    for step in steps:
        x = normal(4, 2, 5, 5, seed=step, dtype=torch.float32)
        state.model(x, torch.arange(4)).square().mean().backward()
        state.optimizer.step()
        state.extra["schedule"].step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.step(state.model.parameters())


def everything(state: TrainingState) -> dict[str, object]:
    """All that training changes."""
    optimizer = state.optimizer.state_dict()
    tensors = {f"model.{name}": value.clone() for name, value in state.model.state_dict().items()}
    for index, values in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value).clone() for name, value in values.items()}
    result: dict[str, object] = {**tensors, "groups": optimizer["param_groups"]}
    if state.ema is not None:
        result |= {f"ema.{i}": value.clone() for i, value in enumerate(state.ema.shadow_params)}
        result["ema step"] = state.ema.optimization_step
    result["schedule"] = state.extra["schedule"].state_dict()
    return result


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    """Bit for bit, types included."""

    def equal(x: object, y: object) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        return x == y

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def plain(value: dict[str, object]) -> dict[str, object]:
    """As JSON gives it back: AdamW's betas as a list, for instance."""
    return {k: v if isinstance(v, torch.Tensor) else json.loads(json.dumps(v)) for k, v in value.items()}


def save(folder: Path, step: int, state: TrainingState, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, state, {"images": 4 * step}, keep)


def good_steps(folder: Path) -> dict[int, Path]:
    """Undamaged checkpoints by step, oldest first."""
    found = {}
    for path in list_checkpoints(folder):
        with contextlib.suppress(UsageError):
            found[int(path.name.split("-")[1].split(".")[0])] = find_checkpoint(folder, path.name)
    return found


def flip(path: Path, place: int = -1) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
