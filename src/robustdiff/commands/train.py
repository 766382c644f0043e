"""`robustdiff train`: train a diffusion model on a folder of images."""

from __future__ import annotations

from robustdiff.commands.console import fail, quiet_libraries
from robustdiff.training.config import TrainConfig


def run(config: TrainConfig) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.training.trainer import Interrupted, TrainingError, train

    quiet_libraries()
    try:
        train(config)
    except Interrupted as stop:
        return fail(str(stop), stop.status)
    except TrainingError as error:
        return fail(str(error), 1)
    return 0
