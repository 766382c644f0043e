"""Equality with torchattacks' PGD (Kim 2020) on a small classifier.

Not a dependency. To run this: ``pip install --no-deps torchattacks requests scipy`` (it names torchvision as a
requirement, but this attack does not import it).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import seeded
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import CallableGoal
from robustdiff.attacks.optimizers import PGD


@pytest.mark.parametrize(("eps", "alpha", "steps"), [(8 / 255, 2 / 255, 10), (0.1, 0.03, 25), (0.1, 0.2, 1)])
def test_pgd_is_that_of_torchattacks(eps: float, alpha: float, steps: int) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    # away from 0 and 1, where torchattacks also clamps
    images = 0.3 + 0.4 * torch.rand(16, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    labels = torch.arange(16) % 5
    theirs = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=steps, random_start=False)(images, labels)
    iterates: list[Tensor] = []

    def loss(omega: Tensor) -> Tensor:
        iterates.append(omega.detach())
        return nn.functional.cross_entropy(model(images + omega[:, 0]), labels, reduction="none")

    like = torch.zeros_like(images).unsqueeze(1)
    found = PGD(steps, step_size=alpha / eps)(
        CallableGoal(loss, modules=[model]), LpBall("linf", eps), like, start=like
    )
    assert len(iterates) == steps + 1
    moved = (theirs - images).unsqueeze(1)
    assert torch.allclose(iterates[-1], moved, atol=1e-9)
    with torch.no_grad():
        assert (found.value >= loss(moved) - 1e-9).all()  # they return the last iterate, we the best
