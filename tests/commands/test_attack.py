"""``robustdiff attack`` from end to end: what it finds, what it flags, that it goes on, what it refuses, the report.

Long, because one command is followed through all its ends, on the same small pipelines.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from attack_runs import FAST, attack, raised, result, stop_at, value
from helpers import normal, seeded
from linear_networks import network_objective, random_network
from pipelines import small_pipeline
from robustdiff.attacks.benchmark import run, runner
from robustdiff.attacks.benchmark.runner import Outcome
from robustdiff.attacks.benchmark.sanity_checks import (
    INFORMATIVE,
    LIMITS,
    RAISED_WHEN,
    Flag,
    check_checkpointing,
    check_gain,
    check_gradient,
    check_huge,
    check_random,
    check_rising,
)
from robustdiff.attacks.config import AttackConfig
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import FinalImageShift, NoGradient
from robustdiff.attacks.optimizers import PGD
from robustdiff.commands import main
from robustdiff.diffusion.pipeline import sample, to_uint8
from robustdiff.diffusion.samplers import DifferentiableSampler
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.report import collect, render

pytestmark = pytest.mark.usefixtures("few_for_the_spread")
FLAGS = Path(__file__).parents[2] / "docs" / "guide" / "attack.md"


@pytest.fixture(scope="module")
def whole(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "evaluation"
    attack(pipeline, output)
    return output


# -- what it finds -----------------------------------------------------------------------------------


def test_an_ordinary_model_is_moved_and_no_flag_says_otherwise(whole: Path) -> None:
    body = result(whole)
    assert value(body, "displacement") > 1.2 * value(body, "displacement, random") > 0
    assert value(body, "displacement, strongest of all") >= value(body, "displacement")
    assert [flag["name"] for flag in body["details"]["flags"]] == [
        *dict.fromkeys(f["name"] for f in body["details"]["flags"])
    ]
    assert {flag["name"] for flag in body["details"]["flags"]} == set(RAISED_WHEN)
    assert raised(body) <= set(INFORMATIVE)
    moved = body["details"]["by_radius"]["displacement"]
    assert moved == sorted(moved)
    assert body["details"]["by_radius"]["radius"] == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert body["details"]["by_steps"]["steps"] == [1, 4, 10]
    starts = body["details"]["by_starts"]
    assert starts["starts"] == [1, 2, 3, 4, 5]
    assert starts["displacement"] == sorted(starts["displacement"])
    best = value(body, "displacement, pgd-1 starts 5 (first 2)")
    assert starts["displacement"][-1] == pytest.approx(best, rel=1e-5)
    first = value(body, "displacement, one-step")  # PGD of a quarter of 4 steps, of all three images
    assert starts["displacement"][0] > 0.5 * first
    assert len(body["details"]["by_evaluation"]) == 5
    assert body["details"]["by_evaluation"][-1] == pytest.approx(value(body, "displacement"), rel=1e-5)
    assert body["protocol"]["attack"]["at"] == [0, 1]
    assert body["protocol"]["sampler"]["timesteps"] == [99, 49]
    assert (whole / body["sheets"]["attacked"]).read_bytes().startswith(b"\x89PNG")
    clean, attacked = (np.load(next(whole.glob(f"*-{name}.npy"))) for name in ("undisturbed", "attacked"))
    moved = 2 * np.linalg.norm((attacked / 255 - clean / 255).reshape(3, -1), axis=1) / body["details"]["spread"]
    assert moved == pytest.approx(body["details"]["per_image"], rel=0.02)
    per_pixel = value(body, "generated spread per pixel")
    assert value(body, "moved per pixel") == pytest.approx(value(body, "displacement") * per_pixel, rel=1e-6)


def test_a_class_conditional_model_is_attacked_class_by_class(tmp_path: Path) -> None:
    pipeline = small_pipeline(classes=2)
    with torch.no_grad():
        pipeline.unet.class_embedding.weight.mul_(20)  # so that an image of the wrong class is far from its own
    pipeline.save_pretrained(tmp_path / "classes")
    body = attack(tmp_path / "classes", tmp_path / "out", "--workers", "2")
    drawn = sample(pipeline, 3, seed=0, scheduler="ddim", steps=2, class_labels=[0, 1, 0])
    kept = np.load(next((tmp_path / "out").glob("*-undisturbed.npy")))
    assert np.abs(kept - to_uint8(drawn)[:, 0].numpy().astype(float)).max() <= 1
    other = sample(pipeline, 3, seed=0, scheduler="ddim", steps=2, class_labels=[1, 0, 1])
    assert (other - drawn).abs().mean() > 0.02
    (mismatch,) = (flag["value"] for flag in body["details"]["flags"] if flag["name"] == "sampler-mismatch")
    assert mismatch < 1e-5
    assert value(body, "displacement") > value(body, "displacement, random")


def test_the_default_radius_has_the_same_energy_in_both_norms() -> None:
    assert runner.radius(AttackConfig("run"), (1, 8, 8)) == 0.01
    assert runner.radius(AttackConfig("run", norm="l2"), (1, 8, 8)) == pytest.approx(0.08)
    assert runner.radius(AttackConfig("run", radius=0.3, norm="l2"), (1, 8, 8)) == 0.3


def test_the_batch_size_changes_nothing_beyond_rounding(pipeline: Path, whole: Path, tmp_path: Path) -> None:
    other = attack(pipeline, tmp_path / "out", "--batch-size", "3")
    assert other["details"]["per_image"] == pytest.approx(result(whole)["details"]["per_image"], rel=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(
            ("--objective", "target", "--norm", "l2", "--momentum", "0.9", "--step-size", "0.5"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("--objective", "shift", "--optimiser", "one-step", "--restarts", "2", "--at", "1"), marks=pytest.mark.slow
        ),
        ("--objective", "residual", "--optimiser", "apgd", "--restarts", "2", "--at", "1"),
        pytest.param(("--scheduler", "ddpm", "--optimiser", "random"), marks=pytest.mark.slow),
        ("--scheduler", "ddpm", "--noise", "fixed", "--eot", "2", "--verdicts", "3"),
        pytest.param(
            ("--scheduler", "ddpm", "--noise", "fresh", "--eot", "1", "--verdicts", "2", "--at", "1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_every_objective_optimiser_and_sampler_runs_and_is_sound(more, pipeline: Path, tmp_path: Path) -> None:
    body = attack(pipeline, tmp_path / "out", *more)
    wrong = {flag["name"] for flag in body["details"]["flags"] if flag["invalid"]}
    # too short to be good: what depends on how good an attack is may be raised, what says that it is broken may not
    assert wrong <= {"steps-not-monotone", "random-beats-attack", "radius-not-monotone"}
    assert value(body, "displacement") > 0
    about = body["protocol"]["attack"]
    assert about["radius"] == 0.1
    assert about["knows"] == "weights, sampler" + ("" if "--eot" in more else ", noise")


# -- flags -------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A network that rounds its input: the gradient through it is 0."""

    def __init__(self, network: nn.Module, cell: float) -> None:
        super().__init__()
        self.network, self.cell = network, cell

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.network((x_t / self.cell).round() * self.cell, t)
        return found


def checked(model: Any, prediction: str = "epsilon", radius: float = 0.3) -> dict[str, Flag]:
    schedule = NoiseSchedule(network_objective().trajectory.schedule.alphas_cumprod, prediction)  # type: ignore[arg-type]
    objective = FinalImageShift(DifferentiableSampler.of(model, schedule, "ddim", 10), normal(6, 3, seed=1), [0, 5])
    flags = check_gradient(objective, LpBall("linf", radius), objective.like, seeded())
    return {flag.name: flag for flag in flags}


@pytest.mark.parametrize("radius", [0.05, 0.3, 1.0])
def test_gradients_of_an_ordinary_network_raise_nothing(radius: float) -> None:
    assert not any(flag.raised for flag in checked(random_network().double(), radius=radius).values())


@pytest.mark.parametrize("cell", [0.01, 0.1])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_a_network_that_rounds_inside_is_flagged(cell: float, prediction: str) -> None:
    flags = checked(Masked(random_network().double(), cell), prediction)
    assert flags["gradient-zero" if prediction == "sample" else "gradient-mismatch"].raised
    assert flags["gradient-local"].raised


def test_a_network_with_a_made_up_gradient_is_flagged() -> None:
    network = random_network().double()

    def straight_through(x_t: Tensor, t: Tensor) -> Tensor:
        return 3 * x_t - (3 * x_t).detach() + network(x_t.detach(), t)

    assert checked(straight_through, "sample")["gradient-mismatch"].raised


def test_a_network_that_draws_something_itself_is_flagged() -> None:
    network = random_network().double()
    assert checked(lambda x, t: network(x, t) + torch.randn_like(x))["not-repeatable"].raised
    assert not checked(network)["not-repeatable"].raised


class Counting(nn.Module):
    """Answers differently every time: what is computed again for the gradient is not what was computed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = self.network(x_t, t) * (1 + 0.3 * (self.calls % 3))
        return found


def test_a_network_with_a_state_is_flagged_by_its_checkpoints() -> None:
    schedule, x = network_objective().trajectory.schedule, normal(2, 3, seed=1)
    for model, expected in ((random_network().double(), False), (Counting(random_network().double()), True)):
        objective = FinalImageShift(DifferentiableSampler.of(model, schedule, "ddim", 4), x, [0])
        assert check_checkpointing(objective, 0.1 * normal(2, 1, 3, seed=2)).raised is expected


def test_a_constant_predictor_is_not_called_robust(tmp_path: Path) -> None:
    model = small_pipeline("sample")
    with torch.no_grad():
        model.unet.conv_out.weight.zero_()
        model.unet.conv_out.bias.fill_(0.3)
    model.save_pretrained(tmp_path / "constant")
    body = attack(tmp_path / "constant", tmp_path / "out")
    assert {"gradient-zero", "radius-unbroken", "no-spread"} <= raised(body)
    assert value(body, "displacement") is None
    assert any("radius-unbroken" in text and "not valid" in text for text in body["warnings"])
    (unbroken,) = [flag for flag in body["details"]["flags"] if flag["name"] == "radius-unbroken"]
    assert (unbroken["measured"], unbroken["value"]) == (False, None)
    assert any("radius-unbroken was not measured (generated images do not differ" in text for text in body["warnings"])
    page = render(collect([tmp_path]) if (tmp_path / "evaluation").exists() else collect([_beside(tmp_path)]))
    assert "not valid (gradient-zero" in page
    assert "not measured" in page
    assert "radius-unbroken" not in page[page.index("not valid (gradient-zero") :].partition(")")[0]


def _beside(folder: Path) -> Path:
    (folder / "out").rename(folder / "evaluation")
    return folder


def test_every_flag_that_compares_is_raised_by_what_it_is_for() -> None:
    assert check_rising("radius-not-monotone", [1.0, 2.0, 1.9]).raised
    assert not check_rising("radius-not-monotone", [1.0, 2.0, 1.99, 5.0]).raised
    assert check_rising("steps-not-monotone", [1.0, 0.9]).raised
    assert check_gain("not-converged", 1.0, 1.1).raised
    assert not check_gain("not-converged", 1.0, 1.01).raised
    assert not check_gain("not-converged", 0.0, 0.0).raised
    assert check_gain("other-attack-stronger", 0.0, 0.1).raised
    one = torch.ones(10)
    assert check_random(one, one * torch.tensor([1.5] + [0.5] * 9)).raised
    assert not check_random(one, one * 1.005).raised
    assert check_huge(0.1).raised
    assert check_huge(None).raised
    assert not check_huge(1.2).raised
    assert Flag("constraint-violated", 1.01).raised
    assert not Flag("constraint-violated", 1.0).raised
    assert Flag("sampler-mismatch", 0.1).raised
    assert Flag("no-spread", 0.0).raised
    assert Flag("gradient-zero", float("nan")).raised
    assert Flag("gradient-zero", float("nan")).to_json()["value"] is None
    assert Flag("gradient-zero", float("nan")).to_json()["measured"]


def test_the_document_of_flags_is_about_these_flags() -> None:
    text = " ".join(FLAGS.read_text().split())
    rows = re.findall(r"\* \*\*`([\w-]+)`\*\*: (.+?)\. Means: .+?\. Do: .+?\.", text)
    assert dict(rows) == RAISED_WHEN
    assert LIMITS.keys() == RAISED_WHEN.keys() >= set(INFORMATIVE)


# -- stopping and going on ---------------------------------------------------------------------------


def test_a_stopped_attack_goes_on_and_ends_as_a_whole_one(
    pipeline: Path, whole: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    command = ["attack", str(pipeline), "-o", str(tmp_path / "out"), *FAST]
    stops = {3: signal.SIGINT, 7: signal.SIGTERM}
    saves = stop_at(monkeypatch, lambda saves: stops.get(len(saves)))
    for done, status in ((3, 130), (7, 143)):
        assert main.main(command) == status
        assert f"stopped; {done} of 17 parts are finished, the same command goes on" in capsys.readouterr().err
        assert len(saves) == done
        assert not list((tmp_path / "out").glob("attack-*.json"))
    body, before = attack(pipeline, tmp_path / "out"), result(whole)
    assert len(saves) == len(set(saves)) == 17
    for part in ("values", "protocol", "warnings", "details"):
        assert body[part] == before[part]


# -- side by side, and memory ------------------------------------------------------------------------


@pytest.mark.parametrize("more", [("--workers", "3"), ("--gradient-checkpointing", "always")], ids=lambda more: more[0])
def test_workers_and_checkpoints_change_nothing_beyond_rounding(pipeline, whole: Path, tmp_path: Path, more) -> None:
    threads = torch.get_num_threads()
    found, before = attack(pipeline, tmp_path / "out", *more), result(whole)
    assert torch.get_num_threads() == threads
    for name, one in before["values"].items():
        assert value(found, name) == pytest.approx(one["value"], rel=1e-4), name
    assert found["details"]["per_image"] == pytest.approx(before["details"]["per_image"], rel=1e-4)
    settings = [(body["protocol"]["workers"], body["protocol"]["gradient_checkpointing"]) for body in (before, found)]
    assert settings == [(1, False), (3, False) if more[0] == "--workers" else (1, True)]


def test_workers_that_are_stopped_go_on_and_end_as_a_whole_one(
    pipeline: Path, whole: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    saves = stop_at(monkeypatch, lambda saves: signal.SIGINT if len(saves) == 5 else None)
    command = ["attack", str(pipeline), "-o", str(tmp_path / "out"), *FAST, "--workers", "2"]
    assert main.main(command) == 130
    assert "parts are finished, the same command goes on" in capsys.readouterr().err
    assert 5 <= len(saves) <= 6
    assert main.main(command) == 0
    assert len(saves) == len(set(saves)) == 17
    for name, one in result(whole)["values"].items():
        assert value(result(tmp_path / "out"), name) == pytest.approx(one["value"], rel=1e-4)


def test_checkpoints_call_the_network_again(pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    calls, forward = [0, 0], UNet2DModel.forward

    def counted(self: UNet2DModel, *arguments: Any, **settings: Any) -> Any:
        calls[-1] += 1
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(UNet2DModel, "forward", counted)
    attack(pipeline, tmp_path / "always", "--gradient-checkpointing", "always")
    calls.append(0)
    attack(pipeline, tmp_path / "never", "--gradient-checkpointing", "never")
    gradients = 2 * (4 + 1) + 10 + 4 + 1 + 5 + 2 * 1 + 4 * 1 + 1  # of all images in two batches, then of few in one
    gradients_of_both = 2 * gradients  # of each of the two sampler steps
    assert calls[1] - calls[2] >= gradients_of_both


def test_all_attacks_start_at_the_same_points(pipeline: Path, whole: Path) -> None:
    """One step of PGD, under three names: on all images in two batches, on few, and the first of five starts on few."""
    (cells,) = (whole / "attack-cells").iterdir()
    names = ("one-step-000000-000001", "pgd-1-000000-000001", "pgd-1_starts_5-000000-000001")
    one, few, starts = (Outcome.load(cells / f"{name}.safetensors", 2) for name in names)
    assert one is not None and few is not None and starts is not None  # noqa: PT018
    assert torch.allclose(one.moved, few.moved, rtol=1e-6)
    assert torch.allclose(starts.restarts[0], few.restarts[0], rtol=1e-6)
    assert (starts.restarts[-1] > few.restarts[0]).any()


def test_an_attack_that_ends_thaws_nothing_that_others_use(pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    run, thawed = runner.Batch.run, []

    def looked_at(self: runner.Batch, *arguments: Any) -> Outcome:
        outcome = run(self, *arguments)
        (network,) = self.trajectory.modules
        thawed.append(network.training or any(weight.requires_grad for weight in network.parameters()))
        return outcome

    monkeypatch.setattr(runner.Batch, "run", looked_at)
    attack(pipeline, tmp_path / "out", "--workers", "2")
    assert thawed == [False] * 17


@pytest.mark.slow
def test_checkpoints_are_kept_where_memory_is_short(pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run, "free_memory", lambda: 10_000)
    assert attack(pipeline, tmp_path / "short")["protocol"]["gradient_checkpointing"] is True
    never = attack(pipeline, tmp_path / "never", "--gradient-checkpointing", "never")
    assert never["protocol"]["gradient_checkpointing"] is False
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        few = [*FAST[:-2], "--n", "2", "--sweep-n", "2", "--iterations", "4"]
        assert main.main(["attack", str(pipeline), "-o", str(tmp_path / "few"), *few]) == 0
        assert result(tmp_path / "few")["protocol"]["workers"] == 1
        monkeypatch.undo()
        assert main.main(["attack", str(pipeline), "-o", str(tmp_path / "more"), *few]) == 0
        assert result(tmp_path / "more")["protocol"]["workers"] == 3
    finally:
        torch.set_num_threads(threads)


def test_a_finished_attack_is_not_done_again_unless_told_and_damage_is_noticed(
    pipeline: Path, whole: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    runs, original, output = [], runner.Batch.run, tmp_path / "out"
    shutil.copytree(whole, output)

    def counted(self: runner.Batch, cell: runner.Cell, *more: Any) -> Outcome:
        runs.append(cell.name)
        return original(self, cell, *more)

    monkeypatch.setattr(runner.Batch, "run", counted)
    attack(pipeline, output)
    assert not runs
    (path,) = output.rglob("one-step-000000*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    attack(pipeline, output)
    assert runs == ["one-step"]
    assert "is damaged" in capsys.readouterr().err
    # done anew, and replayed in a sampler that draws something else
    monkeypatch.setattr(run._Run, "_replay", lambda self, images, omega: torch.zeros(len(images), 1, 8, 8))
    assert "sampler-mismatch" in raised(attack(pipeline, output, "--overwrite"))
    assert len(runs) == 1 + 17


# -- what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--radius", "0"], "--radius 0.0 is not a push"),
        (["--radius", "-1"], "--radius -1.0 is not a push"),
        (["--radius", "50"], "at most 10.0: use 0.001 to 1"),
        (["--radius", "nan"], "--radius nan"),
        (["--norm", "l2", "--radius", "500"], "--radius 500.0 is more than ten times"),
        (["--at", "2"], "--at 2: the sampler has steps 0 .. 1"),
        (["--at", "-1"], "--at -1"),
        (["--at", "first"], "--at first is no list"),
        (["--steps", "7"], "--steps 7 does not divide"),
        (["--iterations", "1"], "--iterations 1 must be at least 4"),
        (["--restarts", "0"], "--restarts 0 must be at least 1"),
        (["-n", "1"], "-n 1 must be at least 2"),
        (["--eot", "3"], "--eot: ddim draws no noise"),
        (["--noise", "fixed"], "--noise: ddim draws no noise"),
        (["--scheduler", "ddpm", "--eot", "3"], "--eot needs --noise fixed or fresh"),
        (
            ["--scheduler", "ddpm", "--noise", "fresh", "--objective", "shift"],
            "--noise fresh does nothing with --objective shift",
        ),
        (["--optimiser", "apgd", "--step-size", "0.1"], "--step-size does nothing with --optimiser apgd"),
        (["--optimiser", "one-step", "--iterations", "10"], "--iterations does nothing"),
        (["--optimiser", "random", "--restarts", "2"], "--restarts does nothing"),
        (["--momentum", "-1"], "--momentum -1.0 must be"),
        (["--step-size", "0"], "--step-size 0.0 must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--title", ""], "--title is empty"),
        (["--workers", "0"], "--workers 0 must be at least 1"),
        (
            ["--objective", "residual", "--gradient-checkpointing", "never"],
            "--gradient-checkpointing does nothing with --objective residual",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(pipeline: Path, tmp_path: Path, capsys, arguments, words) -> None:
    usual = [word for pair in zip(FAST[::2], FAST[1::2], strict=True) if pair[0] not in arguments for word in pair]
    assert main.main(["attack", str(pipeline), "-o", str(tmp_path / "out"), *usual, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_failures_inside_are_one_line(workers: str, pipeline: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    assert main.main(["attack", str(tmp_path / "nothing"), *FAST]) == 2
    arguments = ["attack", str(pipeline), "-o", str(tmp_path / "out"), *FAST, "--workers", workers]
    for error, status, words in (
        (NoGradient("the model gives no gradients"), 2, "it cannot be attacked through its gradients"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory: lower --batch-size or --workers"),
        (ArithmeticError("the objective is not finite"), 1, "attack failed: the objective is not finite"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(PGD, "__call__", fail)
        capsys.readouterr()
        assert main.main(arguments) == status
        assert words in capsys.readouterr().err.splitlines()[-1]


# -- the report --------------------------------------------------------------------------------------


def test_the_report_shows_displacements_curves_and_flags(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation").symlink_to(whole, target_is_directory=True)
    page = render(collect([tmp_path / "run"]))
    for words in (
        "end-to-end · linf 0.1 · all sampler steps · the attacker knows weights, sampler, noise · 3 images",
        "none of 15 flags says that it is invalid",
        "displacement, strongest of all",
        "Displacement by radius",
        "Best so far, by evaluation",
        "undisturbed images, and the same ones attacked",
    ):
        assert words in page


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("flags", [{"name": "x"}], "does not say whether it is raised"),
        ("flags", [{"raised": True}], "has no name"),
        ("flags", [{"name": "x", "raised": True, "value": "high"}], "is not a number"),
        ("by_radius", {"radius": [1.0], "displacement": []}, "not one number per radius"),
        ("by_radius", {"displacement": [1.0]}, "no list 'radius'"),
        ("by_steps", {"steps": [1], "displacement": ["x"]}, "something else than numbers"),
        ("by_restart", ["x"], "not a list of numbers"),
    ],
)
def test_damaged_results_are_refused_by_the_report(whole: Path, tmp_path: Path, key, value, words) -> None:
    body = result(whole)
    body["details"][key] = value
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "attack.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=re.escape(words)):
        collect([tmp_path])
