"""A loss for the command is one entry in one place, and says of itself what its class says."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.baselines import InvarianceLoss
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.named import LOSSES, NamedLoss
from robustdiff.training.config import TrainConfig
from robustdiff.training.plan import describe_objective
from robustdiff.training.setup import build_objective
from robustdiff.utils.errors import UsageError

SCHEDULE = NoiseSchedule(torch.linspace(0.99, 0.01, 10))


@pytest.mark.parametrize("name", LOSSES)
def test_an_entry_says_of_a_loss_what_its_class_says(name: str) -> None:
    entry, kind = LOSSES[name], LOSSES[name].load()
    assert issubclass(kind, DenoisingLoss)
    assert entry.regularised == issubclass(kind, EquivarianceLoss)
    assert entry.takes_noise_level == kind.takes_noise_level
    assert entry.shift_only == issubclass(kind, InvarianceLoss)
    assert type(build_objective(TrainConfig("x", objective=name), SCHEDULE)) is kind


@dataclass(frozen=True)
class AbsoluteLoss(DenoisingLoss):
    """A loss that the package does not know."""


def test_one_entry_is_all_that_the_command_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{AbsoluteLoss.__module__}:AbsoluteLoss"
    monkeypatch.setitem(LOSSES, "absolute", NamedLoss(path, takes_noise_level=False))
    config = TrainConfig("x", objective="absolute")
    config.validate()
    loss = build_objective(config, SCHEDULE)
    assert type(loss).__name__ == "AbsoluteLoss"
    assert describe_objective(loss) == "AbsoluteLoss()"
    for changes, words in (({"strength": 1.0}, "absolute has no perturbation"), ({"auto": True}, "no clean optimum")):
        with pytest.raises(UsageError, match=words):
            TrainConfig("x", objective="absolute", **changes).validate()  # type: ignore[arg-type]
