"""The experiment that attacks samplers of known worlds: its own loss, and its numbers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from experiments.paper import linear
from experiments.paper.toy_training import schedule_for
from helpers import experiment


@pytest.fixture(scope="module")
def attacked() -> ModuleType:
    return experiment("attacked_worlds")


def test_the_unrolled_penalty_of_a_linear_denoiser_is_its_squared_gain(attacked: ModuleType) -> None:
    schedule, v = schedule_for("epsilon"), torch.tensor([0.2, 0.01, 1.0])
    alphas_cumprod = schedule.alphas_cumprod.double()

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        w = linear.optimum(alphas_cumprod[t.reshape(-1)], v.double(), 0.0)
        return (w * x_t).to(x_t.dtype)

    objective = attacked.Unrolled(schedule, strength=2.0, radius=0.3, calls=5)
    x0 = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * v.sqrt()
    terms = objective(model, x0, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([999, 799, 599, 399, 199])
    alpha_bar = torch.cat([alphas_cumprod[steps], torch.ones(1)])
    gains = linear.ddim_gains(alpha_bar, linear.optimum(alphas_cumprod[steps], v.double(), 0.0))
    expected = float(gains.prod(0).square().mean())
    # one sign step from anywhere in the box reaches a corner, whichever it is
    assert (terms.total - terms.denoising).mean().item() == pytest.approx(2 * expected, rel=1e-4)


def test_a_row_is_measured_kept_and_not_measured_again(
    attacked: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacked, "ATTACKS", attacked.Attacks(points=16, draws=500, steps=5))
    found = attacked.row("plane", "ideal", 1, tmp_path, tmp_path)
    values = found["runs"]["0"]
    assert values["random"] > 0.9 * found["bound"]  # T14, up to the noise of 500 draws
    assert values["pgd_start"] > values["signs_start"]
    assert values["error"] < 0.08  # the exact score: its floor is 0.05
    assert values["spread"] == pytest.approx(1, abs=0.1)
    monkeypatch.setattr(attacked, "measure", lambda *_: pytest.fail("measured again"))
    assert attacked.row("plane", "ideal", 1, tmp_path, tmp_path) == found
    assert "| ideal network | 1 |" in attacked.table(tmp_path, "plane")


def test_a_sampler_that_runs_away_has_no_spread_and_ends_nothing(
    attacked: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = schedule_for("epsilon")
    away = attacked.Denoiser(lambda x_t, t: 1e38 * x_t, schedule, 0.0)
    monkeypatch.setattr(attacked, "ATTACKS", attacked.Attacks(points=4, draws=50, steps=2))
    monkeypatch.setattr(attacked, "network", lambda *_: away)
    monkeypatch.setattr(attacked, "judge", lambda *_: {"w2": 1e6})
    values = attacked.row("ring", "invariance", 1, tmp_path, tmp_path)["runs"]["0"]
    assert values["error"] == 1e6
    assert {values[key] for key in ("spread", "random", "signs_start", "pgd_start", "signs_all", "pgd_all")} == {None}
    assert attacked.table(tmp_path, "ring").endswith("| 1 | 1e+06" + 4 * " | not finite" + " |")
