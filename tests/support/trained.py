"""Training in this process, for tests that compare what comes out bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from robustdiff.training.checkpoint import list_checkpoints
from robustdiff.training.config import TrainConfig
from robustdiff.training.trainer import train


def run(config: TrainConfig, name: str = "run", **changes: object) -> dict[str, Tensor]:
    """Weights and moments of the last checkpoint, after training into a folder of this name."""
    folder = Path(str(config.output_dir)).with_name(name)
    train(dataclasses.replace(config, output_dir=str(folder), **changes))
    last = list_checkpoints(folder / "checkpoints")[-1]
    parts = {part: load_file(last / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}
    return {f"{part} {key}": value for part, values in parts.items() for key, value in values.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two results are equal to the bit, and not empty."""
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def plan_of(config: TrainConfig, capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    """What a dry run prints."""
    train(dataclasses.replace(config, dry_run=True, **changes))
    return capsys.readouterr().out
