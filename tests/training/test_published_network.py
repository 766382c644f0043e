"""The network and the settings of the paper's CIFAR-10 runs: trained, resumed and sampled at the smallest size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robustdiff.commands import main
from robustdiff.training.checkpoint import list_checkpoints
from robustdiff.utils import atomic_io

SETTINGS = (
    *("--network", "improved-ddpm", "--ddpm-beta-schedule", "squaredcos_cap_v2", "--ddpm-num-steps", "4000"),
    *("--preset", "paper", "--images", "4", "--train-batch-size", "2", "--checkpointing-steps", "1"),
    *("--preview-images", "0"),
)


@pytest.mark.slow
def test_improved_ddpm_trains_resumes_and_samples(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data, run = tmp_path / "images.npy", tmp_path / "run"
    np.save(data, random.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    flags = ["train", str(data), "--output-dir", str(run), *SETTINGS]
    assert main.main(flags) == 0
    whole = load_file(next((run / "unet").glob("*.safetensors")))
    _, last = list_checkpoints(run / "checkpoints")
    atomic_io.remove(last)
    assert main.main([*flags, "--resume"]) == 0  # one step again, its dropout included
    resumed = load_file(next((run / "unet").glob("*.safetensors")))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert main.main(["sample", str(run), "-n", "2", "--steps", "2", "--output", str(tmp_path / "drawn.npz")]) == 0
    assert np.load(tmp_path / "drawn.npz")["images"].shape == (2, 8, 8, 3)
