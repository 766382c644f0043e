"""`accelerate launch` as it is typed: several processes see, do, write and survive what one does.

Long, because launches are dear: each one serves several tests.
"""

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fields import natural
from helpers import TINY_UNET as UNET
from launches import LIMIT, command, environment, launch, launched
from robustdiff.commands import main
from robustdiff.data.dataset import load_images
from robustdiff.training.config import TrainConfig
from robustdiff.training.loader import Batches
from robustdiff.training.processes import steps_between_votes
from robustdiff.training.trainer import train
from robustdiff.utils.errors import UsageError
from robustdiff.utils.resources import check_launcher

STEPS, EVERY = 40, 20
"""Steps of a run, and between its checkpoints: after twenty, rounding has not grown yet."""


# What an evaluation does: each process takes its share of the images, and the first gathers.
EVALUATE = """
import json, sys
from accelerate import PartialState
from accelerate.utils import gather_object
from robustdiff.commands import main
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.pipeline import without_accelerator

state = PartialState(cpu=without_accelerator())
folder, result, commands = sys.argv[1:]
found = []
for limit in (None, 0):
    data = load_images(folder, max_memory=limit)
    for count in (len(data), 3, 1):
        with state.split_between_processes(list(range(count))) as mine:
            values = [(index, data.names[index], float(data.x0(index).double().sum())) for index in mine]
        found.append(gather_object(values))
if state.is_main_process:
    with open(result, "w") as file:
        json.dump([state.num_processes, found], file)
for command in json.loads(commands):
    status = main.main(command)
    assert status == 0
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven 8 x 8 grey images of two classes: passes over the data end inside batches."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    random = np.random.default_rng(0)
    for i in range(7):
        path = folder / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def base(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of a few steps of four images; the gate is wide enough that some of so few fall in."""
    path = tmp_path_factory.mktemp("config") / "unet.json"
    path.write_text(json.dumps(UNET))
    return TrainConfig(
        str(photos),
        images=str(4 * STEPS),
        train_batch_size=4,
        model_config_name_or_path=str(path),
        learning_rate=3e-5,
        ddpm_num_steps=100,
        ddpm_num_inference_steps=5,
        preview_images=2,
        checkpointing_steps=EVERY,
        checkpoints_total_limit=9,
        logging_steps=1,
        random_flip=True,
        class_conditional=True,
        corrupt=("gaussian:sigma=0.2,fraction=0.5",),
        gate="0:0.5",
    )


def flags(config: TrainConfig) -> list[str]:
    """The command line of a configuration: what differs from the defaults."""
    result = ["train", config.data]
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if field.default is dataclasses.MISSING or value == field.default:
            continue
        if isinstance(value, tuple):
            result += [part for item in value for part in (name, item)]
        else:
            result += [name] if value is True else [name, str(value)]
    return result


def metrics(folder: str | Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and their moving average."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    parts = {name: load_file(path / f"{name}.safetensors") for name in ("model", "ema")}
    return {f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}


def assert_close(a: Path, b: Path, steps: range) -> None:
    """Lines of metrics of ``steps``, and weights after the last, up to rounding."""
    for mine, theirs in zip(metrics(a)[steps.start : steps.stop], metrics(b)[steps.start : steps.stop], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-5), mine["step"]
    theirs = tensors(b, steps.stop)
    for name, value in tensors(a, steps.stop).items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)


def assert_same(a: Path, b: Path) -> None:
    """Lines of metrics and weights at the end, bit for bit."""
    assert metrics(a) == metrics(b)
    theirs = tensors(b, STEPS)
    for name, value in tensors(a, STEPS).items():
        assert torch.equal(theirs[name], value), name


def halved(config: TrainConfig, folder: Path, processes: int = 2, **changes: object) -> TrainConfig:
    """The same run for several processes."""
    return dataclasses.replace(config, train_batch_size=4 // processes, output_dir=str(folder), **changes)


Run = tuple[Path, str, list[list[str]]]


@pytest.fixture(scope="module")
def one(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run on one process, without a launcher."""
    return train(dataclasses.replace(base, output_dir=str(tmp_path_factory.mktemp("runs") / "one")))


@pytest.fixture(scope="module")
def two(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole run on two: its folder, what was printed, and (rank, event, path) of everything written.

    Streamed, with a worker for each process.
    """
    folder = tmp_path_factory.mktemp("runs")
    watch = {"WATCHED": str(folder / "two"), "WATCH_LOG": str(folder / "log")}
    config = halved(base, folder / "two", max_memory_gib=0.0, dataloader_num_workers=1)
    out = launch(*flags(config), processes=2, folder=folder, **watch)
    return folder / "two", out, [line.split(" ", 2) for line in (folder / "log").read_text().splitlines()]


# -- the same run ------------------------------------------------------------------------------------


def test_the_shares_of_two_processes_make_up_the_batch_of_one(photos: Path) -> None:
    """The counters of rank r, as training asks for them, in any grouping give the same images and generators."""
    batches = Batches(load_images(str(photos)), (), seed=3, random_flip=True)
    whole, parts = batches(range(8, 12)), [batches(range(8, 10)), batches(range(10, 12))]
    assert torch.equal(whole.x0, torch.cat([part.x0 for part in parts]))
    states = [generator.get_state() for part in parts for generator in part.generators]
    assert all(torch.equal(a, b.get_state()) for a, b in zip(states, whole.generators, strict=True))


@pytest.mark.slow
def test_two_processes_train_as_one(one: Path, two: Run) -> None:
    folder, out, _ = two
    assert out.count("2 x cpu") == 1  # the plan is printed once
    assert f"{STEPS} steps of 4" in out
    assert "by 1 workers" in out
    assert_close(one, folder, range(EVERY))
    assert [line["step"] for line in metrics(folder)] == list(range(1, STEPS + 1))
    # a single image regularised: one of the two processes had no perturbed pass
    assert 0.25 in [line["regularised"] for line in metrics(folder)]


@pytest.mark.slow
def test_only_the_first_process_writes_and_writes_what_one_does(one: Path, two: Run) -> None:
    folder, _, written = two
    assert {rank for rank, _, _ in written} == {"0"}
    for file in ("metrics.jsonl", "config.json", "data.json", "README.md"):
        assert any(file in path for _, _, path in written)

    def contents(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

    assert contents(one) == contents(folder)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(base: TrainConfig, two: Run, tmp_path: Path) -> None:
    """Launched with --num_processes 1, which is not distributed."""
    shutil.copytree(two[0], tmp_path / "run")
    config = dataclasses.replace(base, output_dir=str(tmp_path / "run"), resume_from_checkpoint=f"step-{EVERY}")
    out = launch(*flags(config), processes=1)
    assert "1 x cpu" in out
    assert f"step {EVERY} of {STEPS}" in out
    assert_close(two[0], tmp_path / "run", range(STEPS))


@pytest.mark.slow
def test_four_processes_evaluate_and_sample_as_one_and_go_on_with_its_run(base, one, photos, tmp_path) -> None:
    """Everything that four processes do, in one launch: also with fewer images than processes."""
    shutil.copytree(one, tmp_path / "run")
    sample = ["sample", str(one), "-n", "6", "--steps", "5", "--batch-size", "2", "--output"]
    config = halved(base, tmp_path / "run", processes=4, resume_from_checkpoint=f"step-{EVERY}")
    script, result = tmp_path / "evaluate.py", tmp_path / "result.json"
    script.write_text(EVALUATE)
    commands = json.dumps([[*sample, str(tmp_path / "four")], flags(config)])
    out = launch(str(script), str(photos), str(result), commands, processes=4)
    assert "4 x cpu" in out
    assert out.count("6 images and grid.png") == 1

    data = load_images(photos)
    count, found = json.loads(result.read_text())
    assert count == 4
    wanted = [[i, data.names[i], float(data.x0(i).double().sum())] for i in range(len(data))]
    assert found == 2 * [wanted, wanted[:3], wanted[:1]]

    assert main.main([*sample, str(tmp_path / "alone")]) == 0
    alone, four = (sorted((tmp_path / name).iterdir()) for name in ("alone", "four"))
    assert [path.name for path in alone] == [path.name for path in four]
    assert len(alone) == 7
    for a, b in zip(alone, four, strict=True):
        difference = np.asarray(Image.open(a)).astype(int) - np.asarray(Image.open(b))
        assert np.abs(difference).max() <= 1
    assert len({path.read_bytes() for path in four}) == 7

    assert_close(one, tmp_path / "run", range(STEPS))


@pytest.mark.slow
def test_two_processes_follow_the_adversarial_objective_as_one(base: TrainConfig, tmp_path: Path) -> None:
    """Told how noisy their images are, too."""
    config = dataclasses.replace(base, preset="paper", gate=None, images=str(4 * EVERY), preview_images=0)
    config = dataclasses.replace(config, noise_levels="corrupt")
    one = train(dataclasses.replace(config, output_dir=str(tmp_path / "one")))
    launch(*flags(halved(config, tmp_path / "two")), processes=2)
    assert {line["regularised"] for line in metrics(one)} == {1.0}
    assert_close(one, tmp_path / "two", range(EVERY))


@pytest.mark.slow
def test_two_processes_train_with_what_the_first_found_and_end_if_it_is_lost(base: TrainConfig, tmp_path: Path) -> None:
    np.save(tmp_path / "fields.npy", ((natural(300)[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy())
    changes = {"gate": None, "class_conditional": False, "images": str(4 * EVERY), "preview_images": 0}
    dirt = ("missing:amount=0.3,fraction=0.3", "gaussian:sigma=0.3,fraction=0.5")
    config = dataclasses.replace(base, data=str(tmp_path / "fields.npy"), auto=True, corrupt=dirt, **changes)
    one = train(dataclasses.replace(config, output_dir=str(tmp_path / "one")))
    out = launch(*flags(halved(config, tmp_path / "two")), processes=2)
    assert out.count("looking at 300 images") == 1
    assert (tmp_path / "two" / "auto.json").read_bytes() == (one / "auto.json").read_bytes()
    assert_close(one, tmp_path / "two", range(EVERY))
    (tmp_path / "two" / "auto.json").unlink()
    line = command(*flags(halved(config, tmp_path / "two", resume=True)), processes=2)
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, env=environment())
    assert done.returncode != 0
    assert "auto.json cannot be used (No such file or directory): put it back" in done.stderr


# -- stopping ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_once_and_resuming_is_exact(base: TrainConfig, two: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = halved(base, run, checkpointing_steps=STEPS)
    watch = {"WATCHED": str(run), "WATCH_LOG": str(tmp_path / "log")}
    deadline = time.monotonic() + 120
    with launched(*flags(config), folder=tmp_path, **watch) as launcher:
        while not (run / "metrics.jsonl").exists():
            assert launcher.poll() is None, launcher.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        launcher.send_signal(signal.SIGTERM)
        started = time.monotonic()
        _, error = launcher.communicate(timeout=LIMIT)
    assert time.monotonic() - started < 25  # by themselves: launchers kill after thirty seconds
    assert launcher.returncode != 0
    assert "--resume" in error
    (checkpoint,) = (run / "checkpoints").iterdir()
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert 0 < step < STEPS, "too late"
    assert [line["step"] for line in metrics(run)] == list(range(1, step + 1))
    written = [line.split(" ", 2) for line in (tmp_path / "log").read_text().splitlines()]
    assert {rank for rank, _, _ in written} == {"0"}
    assert sum(event == "os.mkdir" and path.endswith(f"{checkpoint.name}.tmp") for _, event, path in written) == 1

    launch(*flags(dataclasses.replace(config, resume=True)), processes=2)
    assert_same(two[0], run)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_a_process_that_hangs_and_those_that_wait_for_it_end_with_sigterm(base, tmp_path: Path, place: int) -> None:
    """One in code that hears no signal, the other in the reduction of gradients: before the launcher kills them."""
    config = halved(base, tmp_path / "run", checkpointing_steps=4, preview_images=0)
    with launched(*flags(config), folder=tmp_path, FAULT=f"hang@{place}") as launcher:
        assert "hangs\n" in launcher.stdout
        launcher.send_signal(signal.SIGTERM)
        started = time.monotonic()
        _, error = launcher.communicate(timeout=LIMIT)
    assert time.monotonic() - started < 29
    ours = [line for line in error.splitlines() if line.startswith("robustdiff (process ")]
    said = "stopped at step 5 of 40, in a wait that did not end, nothing since the last checkpoint was saved; go on"
    assert any(said in line and "--resume" in line for line in ours), error
    assert all(said in line or line.endswith("another process stopped: see its message") for line in ours), error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


# -- failing -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("step@1", "RuntimeError: the sixth step is broken"),
        ("data@1", "robustdiff (process 1): x.png: cannot be read here"),
        (
            "save@0",
            "robustdiff (process 0): no space left on the device: free some, or write elsewhere; a training run",
        ),
    ],
)
def test_one_process_that_fails_ends_all_and_its_message_is_seen(base, tmp_path: Path, fault: str, line: str) -> None:
    config = halved(base, tmp_path / "run", checkpointing_steps=8)
    with launched(*flags(config), folder=tmp_path, FAULT=fault) as launcher:
        _, error = launcher.communicate(timeout=LIMIT)  # returns when the last process has closed its end of the pipe
    assert launcher.returncode not in (0, None)
    lines = error.splitlines()
    assert sum(one.startswith(line) for one in lines) == 1, error
    place = fault.partition("@")[2]
    for one in lines:  # the others say no more than that someone stopped
        if one.startswith("robustdiff (") and not one.startswith(f"robustdiff (process {place})"):
            assert one.endswith("another process stopped: see its message") or "--resume" in one, one
    if fault == "step@1":
        assert "in_the_sixth_step" in error  # an error of the program keeps its stack trace
        assert [one["step"] for one in metrics(tmp_path / "run")] == list(range(1, 6))
    else:
        assert "robustdiff/commands" not in error
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.slow
def test_processes_with_other_images_are_refused(base: TrainConfig, photos: Path, tmp_path: Path) -> None:
    """One pixel of one image differs, as in a copy of the data that is older on one machine."""
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    pixels = np.asarray(Image.open(other / "odd" / "3.png")).copy()
    pixels[4, 5] ^= 1
    Image.fromarray(pixels).save(other / "odd" / "3.png")
    config = halved(base, tmp_path / "run", dry_run=True)
    with launched(*flags(config), folder=tmp_path, FAULT="other@1", OTHER=str(other)) as launcher:
        out, error = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode not in (0, None)
    ours = [line for line in error.splitlines() if line.startswith("robustdiff (process ")]
    assert any(f"DATA {photos} holds other images" in line for line in ours), error
    assert all("holds other images" in line or "another process stopped" in line for line in ours), error
    assert "robustdiff/commands" not in error
    assert "estimated time" not in out


@pytest.mark.slow
def test_an_error_of_the_network_itself_is_shown_whole(base: TrainConfig, tmp_path: Path) -> None:
    """Nobody else has a message to look at: this one names the interface that is not there."""
    config = halved(base, tmp_path / "run", dry_run=True)
    with launched(*flags(config), folder=tmp_path, GLOO_SOCKET_IFNAME="nope0") as launcher:
        _, error = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode not in (0, None)
    assert "RuntimeError" in error
    assert "nope0" in error
    assert "another process stopped" not in error


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_instead_of_two_is_noticed(base: TrainConfig, tmp_path: Path) -> None:
    line = command(*flags(halved(base, tmp_path / "run")), processes=2)
    line[line.index("--multi_gpu")] = "--cpu"
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode != 0
    ours = [text for text in done.stderr.splitlines() if text.startswith("robustdiff")]
    assert len(ours) == 1
    assert "--multi_gpu" in ours[0]
    assert not (tmp_path / "run").exists()


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
"""What `accelerate launch --cpu --num_processes 2` sets in the one process that it starts."""


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        (ACCELERATE, True),
        ({**ACCELERATE, "MASTER_ADDR": "node1"}, False),  # a batch script's, which then starts one process
        ({**ACCELERATE, "WORLD_SIZE": "2"}, False),
        ({**ACCELERATE, "OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
    ],
)
def test_what_tells_that_a_launcher_started_too_few(monkeypatch, variables: dict[str, str], refused: bool) -> None:
    for name in (*ACCELERATE, "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--multi_gpu") if refused else contextlib.nullcontext():
        check_launcher()


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(-1.0, 10), (0.0, 10), (1e-9, 10), (0.2, 10), (0.3, 6), (0.5, 4), (1.0, 2), (1.5, 1), (25.0, 1), (1e9, 1)],
)
def test_processes_ask_one_another_every_other_second(seconds: float, steps: int) -> None:
    """Never rarer than every tenth step, nor than every step where steps are long: launchers wait for 30 s."""
    assert steps_between_votes(seconds) == steps
