"""Expectation over the sampler's noise: what an attacker gains by averaging over more draws, and the curve of it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attack_runs import FAST, attack, result, stop_at, value
from robustdiff.attacks.benchmark.grid import Cell, eot_draws, plan
from robustdiff.attacks.benchmark.runner import Batch
from robustdiff.attacks.benchmark.sanity_checks import check_gain
from robustdiff.attacks.config import AttackConfig
from robustdiff.attacks.optimizers import PGD
from robustdiff.commands import main
from robustdiff.diffusion.samplers import DifferentiableSampler
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.report import collect, render
from robustdiff.utils.seeds import derive_seed

pytestmark = pytest.mark.usefixtures("few_for_the_spread")
BLIND = ("--scheduler", "ddpm", "--noise", "fixed", "--eot", "2", "--verdicts", "3")
IMAGES, RADIUS = 40, 1.0


def bent(x_t: Tensor, t: Tensor) -> Tensor:
    """Nothing at the first step, so that the noise after it counts; the square of the state at the last."""
    return x_t.square() / 8 if int(t) == 0 else torch.zeros_like(x_t)


def bent_batch(eot: int) -> Batch:
    """Two ancestral steps of images with one value each; the first is pushed, and then noise is added."""
    schedule = NoiseSchedule(torch.tensor([0.5, 0.3]).double(), "sample")
    trajectory = DifferentiableSampler.of(bent, schedule, "ddpm", [1, 0])
    config = AttackConfig(
        "run", scheduler="ddpm", steps=2, at="0", noise="fixed", eot=eot, verdicts=7, n=IMAGES, radius=RADIUS
    )
    return Batch(config, trajectory, range(IMAGES), (1, 1, 1), torch.device("cpu"), lambda: torch.empty(0))


def noise_of(batch: Batch, what: str, draws: int) -> Tensor:
    """What is added after the first step, (draws, IMAGES)."""
    rows = []
    for i in range(draws):
        seeds = [derive_seed(what, i, batch.config.seed, image) for image in batch.images]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        first = torch.stack([torch.randn(1, 1, 1, generator=generator) for generator in generators])
        rows.append(batch.trajectory.steps[0].noise * first.flatten())
    return torch.stack(rows).double()


@pytest.mark.parametrize(
    "draws",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        5,
        pytest.param(20, marks=pytest.mark.slow),
    ],
)
def test_with_more_draws_the_attacker_knows_better_which_way_to_push(draws: int) -> None:
    """The image is ``y^2 / 8``, ``y = c x + z``: best is the sign of c x + the mean of the z that are seen."""
    batch = bent_batch(eot=5)
    found = batch.run(Cell("eot", PGD(6, restarts=16), eot=draws), lambda calls: None)
    first = batch.trajectory.steps[0]
    sigma = float(batch.trajectory.schedule.sigma(torch.tensor(1)))
    state = first.x * batch.state.flatten().double()
    push = first.x * RADIUS * sigma * (state + noise_of(batch, "eot", draws).mean(0)).sign()
    reached = state + noise_of(batch, "verdict", 7)
    expected = (((reached + push).square() - reached.square()) / 8).square().mean(0).sqrt()
    assert found.moved.numpy() == pytest.approx(expected.numpy(), rel=1e-4)


@pytest.mark.slow
def test_on_noise_that_it_has_not_seen_the_attack_gains_by_draws() -> None:
    """20 draws are nearly the truth, 1 draw is often wrong: the mean displacement says so, and the flag."""
    batch = bent_batch(eot=5)
    moved = [
        float(batch.run(Cell("eot", PGD(6, restarts=16), eot=draws), lambda calls: None).score.mean())
        for draws in (1, 20)
    ]
    assert moved[1] > 1.05 * moved[0]
    assert check_gain("eot-too-few", *moved).raised


def test_the_draws_of_the_curve_hold_what_was_asked_for_and_twice_that() -> None:
    assert eot_draws(AttackConfig("run", scheduler="ddpm")) == ()
    blind = {"scheduler": "ddpm", "noise": "fresh"}
    assert eot_draws(AttackConfig("run", **blind)) == (5, 1, 2, 10, 20)
    assert eot_draws(AttackConfig("run", eot=20, **blind)) == (20, 1, 2, 5, 10, 40)
    names = [cell.name for cell in plan(AttackConfig("run", **blind))]
    assert [name for name in names if "eot" in name] == [f"pgd-10 eot {e}" for e in (1, 2, 10, 20)]
    assert not any("eot" in cell.name for cell in plan(AttackConfig("run", scheduler="ddpm")))


@pytest.fixture(scope="module")
def blind(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("blind") / "run" / "evaluation"
    attack(pipeline, output, *BLIND)
    return output


@pytest.mark.slow
def test_the_curve_is_in_the_file_and_on_the_page(blind: Path) -> None:
    body = result(blind)
    curve = body["details"]["by_eot"]
    assert curve["draws"] == [1, 2, 4, 5, 10, 20]
    asked = value(body, "displacement, pgd-1 (first 2)")
    assert curve["displacement"][1] == pytest.approx(asked, rel=1e-9)
    others = [value(body, f"displacement, pgd-1 eot {e} (first 2)") for e in (1, 4, 5, 10, 20)]
    assert curve["displacement"][:1] + curve["displacement"][2:] == pytest.approx(others, rel=1e-9)
    assert "Displacement by draws of the noise (EOT)" in render(collect([blind.parent]))


@pytest.mark.slow
def test_without_noise_to_draw_there_is_no_curve_and_the_flag_says_why(
    pipeline: Path,
    tmp_path: Path,
) -> None:
    body = attack(pipeline, tmp_path / "out")
    assert body["details"]["by_eot"] is None
    (flag,) = (flag for flag in body["details"]["flags"] if flag["name"] == "eot-too-few")
    assert not flag["raised"]
    assert "nothing to draw" in flag["text"]


@pytest.mark.slow
def test_stopped_in_the_middle_of_the_curve_it_goes_on_and_ends_as_a_whole_one(
    pipeline: Path,
    blind: Path,
    tmp_path: Path,
    monkeypatch,
) -> None:
    stops = [signal.SIGINT]
    saves = stop_at(monkeypatch, lambda saves: stops.pop() if stops and "eot_4" in saves[-1] else None)
    assert main.main(["attack", str(pipeline), "-o", str(tmp_path / "out"), *FAST, *BLIND]) == 130
    before = len(saves)
    assert not list((tmp_path / "out").glob("attack-*.json"))
    body: dict[str, Any] = attack(pipeline, tmp_path / "out", *BLIND)
    assert len(saves) == len(set(saves)) > before
    for part in ("values", "details", "warnings"):
        assert body[part] == result(blind)[part]
