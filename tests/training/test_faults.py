"""Kills, signals, damage, trackers: a run goes on from its last checkpoint and ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from diffusers import DiffusionPipeline

from robustdiff.commands import main
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.training import processes
from robustdiff.training.checkpoint import find_checkpoint, list_checkpoints
from robustdiff.utils import atomic_io
from runs import (
    EVERY,
    STEPS,
    DieAt,
    Run,
    assert_same_run,
    checkpoint,
    command,
    complaint,
    lines,
    run,
    started_at,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
SHORT = 2 * EVERY


@pytest.fixture(scope="module")
def short(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two checkpoints, of which one is kept."""
    folder = tmp_path_factory.mktemp("short")
    assert run(brief(inputs, folder / "run"), folder / "log")[0] == 0
    return folder / "run"


def brief(inputs: Path, output: Path, *more: str) -> list[str]:
    return command(inputs, output, "--checkpoints-total-limit", "1", *more, steps=SHORT)


def logged(folder: Path) -> int:
    """The last step in metrics.jsonl: every checkpoint before it must be there."""
    path = folder / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=0) if path.exists() else 0


def go_on(arguments: list[str], folder: Path, log: Path, before: object = None) -> int:
    """Resume, or start anew where there is nothing to resume; returns the step gone on from."""
    safe = (logged(folder) - 1) // EVERY * EVERY
    there = bool(list_checkpoints(folder / "checkpoints"))
    status, text = run([*arguments, "--resume"], log, before)
    if not there:
        assert status == 2
        message = complaint(text)
        assert "no complete checkpoint" in message  # rather than a damaged one
        assert "start anew with --overwrite" in message
        assert safe <= 0
        status, text = run([*arguments, "--overwrite"], log)
    assert status == 0, text
    assert "warning" not in text
    assert started_at(text) >= safe
    return started_at(text)


def assert_usable(folder: Path) -> None:
    """Killed at any instant, what has once become a pipeline is one."""
    if (folder / "model_index.json").exists():
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(("kills", "places"), [(5, 2), pytest.param(50, STEPS // EVERY - 1, marks=pytest.mark.long)])
def test_killed_at_random_instants_and_resumed_a_run_equals_a_whole_one(inputs, whole, tmp_path, kills, places) -> None:
    draw, length, resumed = random.Random(0), 60.0, []
    for trial in range(3 * kills):
        folder, started = tmp_path / f"run{trial}", time.monotonic()
        it = Run(command(inputs, folder), tmp_path / "log")
        if trial > 1 and it.alive(draw.uniform(0.1, 1) * length):
            os.kill(it.pid, signal.SIGKILL)
        if it.wait() == 0:  # the first two, and what was faster than they
            length = min(length, time.monotonic() - started)
            continue
        assert_usable(folder)
        resumed.append(go_on(command(inputs, folder), folder, tmp_path / "log"))
        assert_same_run(folder, whole)
        if len(resumed) == kills:
            break
    assert len(resumed) == kills
    assert len(set(resumed)) >= places  # the instants were spread over the run


@pytest.mark.parametrize("apart", [24, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", ["new", "overwrite", "resume"])
def test_killed_at_any_change_to_the_disk_a_run_can_be_gone_on_with(inputs, short, tmp_path, mode, apart) -> None:
    """Aimed at what random instants rarely hit: between two changes to the folder, in claiming it and in saving.

    Changes so many apart, each mode beginning with another.
    """
    first = ["new", "overwrite", "resume"].index(mode)
    operation, died = first * apart // 3, True
    while died:
        folder = tmp_path / f"run{operation}"
        more: list[str] = []
        if mode != "new":
            assert run(brief(inputs, folder, "--seed", "1" if mode == "overwrite" else "0"), tmp_path / "log")[0] == 0
            more = [f"--{mode}"]
        status, text = run(brief(inputs, folder, *more), tmp_path / "log", DieAt(operation))
        died = status == -signal.SIGKILL
        assert died or (status == 0 and "operations:" in text)
        assert_usable(folder) if mode != "overwrite" else None
        status, text = run(brief(inputs, folder, "--resume"), tmp_path / "log")
        if status != 0:
            assert mode != "resume"
            complaint(text)
            status, text = run(brief(inputs, folder, "--overwrite"), tmp_path / "log")
        assert status == 0, text
        assert_same_run(folder, short, SHORT)
        operation += apart
    assert operation > 24


# -- signals -----------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_sigterm_to_the_whole_group_saves_and_exits_143(inputs, whole, tmp_path, workers) -> None:
    folder = tmp_path / "run"
    arguments = command(inputs, folder, "--dataloader-num-workers", workers)
    it = Run(arguments, tmp_path / "log")
    wait_for(lambda: logged(folder) >= EVERY + 1)
    os.killpg(it.pid, signal.SIGTERM)
    assert it.wait() == 143, it.text
    assert "--resume" in complaint(it.text)
    step = int(find_checkpoint(folder / "checkpoints").name[5:])
    assert EVERY < step < STEPS
    assert logged(folder) == step // 2 * 2  # nothing was lost
    assert go_on(arguments, folder, tmp_path / "log") == step
    assert_same_run(folder, whole)


def signals(monkeypatch, step: int, *numbers: int) -> None:
    """Send this process signals in the second pass of a step."""
    calls, original = [], EquivarianceLoss.__call__

    def call(self, *arguments, **draws):
        calls.append(1)
        if len(calls) == 2 + 2 * step + 2:  # two timed passes, two a step
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *arguments, **draws)

    monkeypatch.setattr(EquivarianceLoss, "__call__", call)


@pytest.mark.parametrize(
    ("numbers", "status", "saved"),
    [
        ((signal.SIGINT,), 130, 5),
        ((signal.SIGTERM,), 143, 5),
        ((signal.SIGTERM, signal.SIGTERM), 143, 5),  # who is impatient sends a SIGKILL
        ((signal.SIGINT, signal.SIGTERM), 130, 5),
        ((signal.SIGINT, signal.SIGINT), 130, 3),
        ((signal.SIGTERM, signal.SIGINT), 130, 3),
    ],
)
def test_a_signal_saves_and_a_second_ctrl_c_stops_at_once(
    inputs, whole, tmp_path, monkeypatch, capfd, numbers, status, saved
) -> None:
    folder, before = tmp_path / "run", signal.getsignal(signal.SIGINT)  # a background job ignores it
    with monkeypatch.context() as patch:
        signals(patch, 4, *numbers)
        assert main.main(command(inputs, folder)) == status
    assert ("saved; go on with" if saved == 5 else "stopped at once") in complaint(capfd.readouterr().err)
    assert find_checkpoint(folder / "checkpoints").name == f"step-{saved:08d}"
    assert signal.getsignal(signal.SIGINT) is before
    assert main.main(command(inputs, folder, "--resume")) == 0
    assert started_at(capfd.readouterr().out) == saved
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("place", "numbers", "status", "saved"),
    [
        ("write_manifest", (signal.SIGTERM,), 143, 7),  # the save at 6 is finished, and one more step taken and saved
        ("write_manifest", (signal.SIGINT, signal.SIGINT), 130, 3),
        ("replace_folder", (signal.SIGINT, signal.SIGINT), 130, 6),  # complete, though not yet renamed
    ],
)
def test_a_signal_while_saving_leaves_the_last_checkpoint_good(
    inputs, whole, tmp_path, monkeypatch, capfd, place, numbers, status, saved
) -> None:
    folder, original = tmp_path / "run", getattr(atomic_io, place)

    def write(path, *arguments, **about):
        if path.name == ".step-00000006.tmp":
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(path, *arguments, **about)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_io, place, write)
        assert main.main(command(inputs, folder)) == status
    complaint(capfd.readouterr().err)
    assert int(find_checkpoint(folder / "checkpoints").name.strip(".")[5:13]) == saved
    assert main.main(command(inputs, folder, "--resume")) == 0
    assert started_at(capfd.readouterr().out) == saved
    assert_same_run(folder, whole)


# -- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    inputs, whole, tmp_path, monkeypatch, capfd, damage
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        signals(patch, 4, signal.SIGTERM)
        assert main.main(command(inputs, folder)) == 143
    victim = checkpoint(folder, 5) / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content[: None if damage == "flip" else len(content) // 2])
    if damage == "missing":
        victim.unlink()
    capfd.readouterr()
    assert main.main(command(inputs, folder, "--resume")) == 0
    text = capfd.readouterr()
    assert started_at(text.out) == 3
    warned = [line for line in text.err.splitlines() if "warning" in line]
    assert len(warned) == 1
    for word in ("step-00000005", "damaged", "model.safetensors", "step-00000003"):
        assert word in warned[0]
    assert not (folder / "checkpoints" / "step-00000005").exists()
    assert_same_run(folder, whole)


def test_exit_statuses_without_a_good_checkpoint(inputs, tmp_path, monkeypatch, capfd) -> None:
    folder = tmp_path / "run"
    assert main.main(command(inputs, folder, "--resume")) == 2
    assert "start anew with --overwrite" in complaint(capfd.readouterr().err)
    with monkeypatch.context() as patch:
        signals(patch, 1, signal.SIGINT, signal.SIGINT)
        assert main.main(command(inputs, folder)) == 130
    assert (folder / "config.json").exists()
    capfd.readouterr()
    for more in ((), ("--resume",)):
        assert main.main(command(inputs, folder, *more)) == 2
        assert "--overwrite" in complaint(capfd.readouterr().err)
    with monkeypatch.context() as patch:
        signals(patch, 4, signal.SIGTERM)
        assert main.main(command(inputs, folder, "--overwrite")) == 143
    for path in (folder / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    capfd.readouterr()
    assert main.main(command(inputs, folder, "--resume")) == 2
    message = complaint(capfd.readouterr().err)
    assert "step-00000003: state.json" in message
    assert "step-00000005: state.json" in message


def test_lines_are_cut_back_to_the_checkpoint(inputs, whole, tmp_path, capfd) -> None:
    """Lines after the checkpoint come again, the last one cut off anywhere."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(checkpoint(folder))
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-1])
    assert main.main(command(inputs, folder, "--resume")) == 0
    assert started_at(capfd.readouterr().out) == STEPS - EVERY
    assert len(lines(folder)) == STEPS // 2
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        path.name for path in (whole / "checkpoints").iterdir()
    }


# -- trackers ----------------------------------------------------------------------------------------


class Board:
    """A tracker that works, as far as it goes."""

    def __init__(self, fails: str) -> None:
        self.fails, self.seen, self.tried = fails, [], 0

    def log(self, values, step=None, **_):
        self.tried += 1
        if self.fails == "log":
            raise ConnectionError("no route\nto host")
        self.seen.append((step, values))

    def finish(self):
        if self.fails == "finish":
            raise ConnectionError("no route\nto host")


@pytest.mark.parametrize("fails", ["init", "log", "finish", "nothing"])
def test_a_failing_tracker_costs_one_warning_and_nothing_else(inputs, whole, tmp_path, monkeypatch, capfd, fails):
    board = Board(fails)

    def init_trackers(self, *_, **__):
        if fails == "init":
            raise ConnectionError("no route\nto host")
        self.trackers = [board]

    def log(self, values, step=None, **_):
        for tracker in self.trackers:
            tracker.log(values, step=step)

    monkeypatch.setattr(Accelerator, "init_trackers", init_trackers)
    monkeypatch.setattr(Accelerator, "log", log)
    monkeypatch.setattr(processes, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [LoggerType.TENSORBOARD])
    folder = tmp_path / "run"
    assert main.main(command(inputs, folder, "--logger", "tensorboard")) == 0
    warned = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    if fails == "nothing":
        assert not warned
    else:
        (line,) = warned
        assert line.startswith("robustdiff: warning: --logger tensorboard failed (no route to host)")
    assert board.tried == {"init": 0, "log": 1}.get(fails, STEPS // 2)  # given up, not tried again and again
    there = [step for step, _ in board.seen]
    assert there == ([] if fails in ("init", "log") else list(range(2, STEPS + 1, 2)))
    assert_same_run(folder, whole)
