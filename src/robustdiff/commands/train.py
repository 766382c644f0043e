"""`robustdiff train`: train a diffusion model on a folder of images."""

from __future__ import annotations

from robustdiff.commands.console import quiet_libraries
from robustdiff.commands.flags import Say
from robustdiff.training.config import TrainConfig


def run(config: TrainConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.training.trainer import train

    quiet_libraries()
    train(config, say)
    return 0
