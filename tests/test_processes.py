"""Two processes see and do what one does: same batches, same losses, one writer, same samples."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_UNET as UNET
from PIL import Image
from safetensors.torch import load_file

from robustdiff import TrainConfig, cli, train
from robustdiff.images import load_images
from robustdiff.training import Batches

# `accelerate launch` starts several CPU processes only through MPI; this is what it calls on GPUs.
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "robustdiff"]
STEPS = 6
# Which files a process opens for writing, one line each, from both processes: put in front by a sitecustomize.py.
WATCH = """
import os, sys

def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and any(mode in arguments[1] for mode in "wax+"):
        name = str(arguments[0])
        if name.startswith(os.environ["WATCHED"]):
            os.write(descriptor, f"{os.environ.get('RANK')} {name}\\n".encode())
    elif event in ("os.mkdir", "os.rename", "shutil.rmtree") and str(arguments[0]).startswith(os.environ["WATCHED"]):
        os.write(descriptor, f"{os.environ.get('RANK')} {event} {arguments[0]}\\n".encode())

descriptor = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(hook)
"""


def on_two_processes(*arguments: str, **environment: str) -> str:
    """Run the command on two CPU processes; returns standard output. A hang fails at the time limit."""
    if torch.accelerator.is_available():  # where there is none, it must work without being told
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [sys.executable, *LAUNCH, *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven 8 x 8 grey images: passes over the data end inside batches."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def base(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of a few steps of four images."""
    path = tmp_path_factory.mktemp("config") / "unet.json"
    path.write_text(json.dumps(UNET))
    return TrainConfig(
        str(photos),
        images=str(4 * STEPS),
        train_batch_size=4,
        model_config_name_or_path=str(path),
        learning_rate=1e-3,
        ddpm_num_steps=100,
        ddpm_num_inference_steps=5,
        preview_images=2,
        checkpointing_steps=3,
        logging_steps=1,
        random_flip=True,
        corrupt=("gaussian:sigma=0.2,fraction=0.5",),
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
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_the_shares_of_two_processes_make_up_the_batch_of_one(photos: Path) -> None:
    """The counters of rank r, as training asks for them, in any grouping give the same images and generators."""
    batches = Batches(load_images(str(photos)), (), seed=3, random_flip=True)
    whole, generators, _ = batches(range(8, 12))
    parts = [batches(range(8, 10)), batches(range(10, 12))]
    assert torch.equal(whole, torch.cat([x0 for x0, _, _ in parts]))
    states = [generator.get_state() for _, part, _ in parts for generator in part]
    assert all(torch.equal(a, b.get_state()) for a, b in zip(states, generators, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "gated"])
def test_two_processes_train_as_one_and_only_the_first_writes(base: TrainConfig, preset: str, tmp_path: Path) -> None:
    config = dataclasses.replace(base, preset=preset, output_dir=str(tmp_path / "one"))
    if preset == "gated":  # wide enough that some of so few images fall in
        config = dataclasses.replace(config, gate="0:0.5")
    one = train(config)
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    log, two = tmp_path / "log", tmp_path / "two"
    halves = dataclasses.replace(config, train_batch_size=2, output_dir=str(two))
    path = os.pathsep.join([str(tmp_path / "watch"), *(entry for entry in sys.path if entry)])
    out = on_two_processes(*flags(halves), PYTHONPATH=path, WATCHED=str(two), WATCH_LOG=str(log))
    assert out.count("2 x cpu") == 1  # the plan is printed once
    assert f"{STEPS} steps of 4" in out

    mine, theirs = metrics(one), metrics(two)
    assert [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for a, b in zip(mine, theirs, strict=True):
        for name in ("loss", "denoising", "equivariance", "gradient_norm", "learning_rate", "regularised", "radius"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (name, a["step"])
    share = [line["regularised"] for line in theirs]
    if preset == "gated":  # a single image regularised: one of the two processes had no perturbed pass
        assert 0.25 in share
    else:
        assert set(share) == {1.0}
    for name in ("model", "ema"):
        end = Path("checkpoints") / f"step-{STEPS:08d}" / f"{name}.safetensors"
        a, b = load_file(one / end), load_file(two / end)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)

    written = [line.split(" ", 1) for line in log.read_text().splitlines()]
    assert {rank for rank, _ in written} == {"0"}
    for file in ("metrics.jsonl", "config.json", "data.json", "README.md"):
        assert any(file in line for _, line in written)

    def contents(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

    assert contents(one) == contents(two)


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(base: TrainConfig, tmp_path: Path) -> None:
    run = train(dataclasses.replace(base, output_dir=str(tmp_path / "run")))
    arguments = ["sample", str(run), "-n", "5", "--steps", "5", "--batch-size", "2", "--output"]
    assert cli.main([*arguments, str(tmp_path / "one")]) == 0
    out = on_two_processes(*arguments, str(tmp_path / "two"))
    assert out.count("5 images and grid.png") == 1
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 6
    for a, b in zip(one, two, strict=True):
        difference = np.asarray(Image.open(a)).astype(int) - np.asarray(Image.open(b))
        assert np.abs(difference).max() <= 1
    assert len({path.read_bytes() for path in two}) == 6
