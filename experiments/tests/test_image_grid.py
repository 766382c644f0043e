"""The image grid: its rows are command lines that the command takes; what is run when; stops; the native formats.

Long, because one command is followed from its rows to its ends, with one stand-in for the commands that it runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.paper import image_folder, image_grid, image_rows, tables
from experiments.paper.__main__ import reproduce
from experiments.paper.config import ReproduceConfig
from experiments.paper.image_grid_spec import (
    IMAGE_DIRTS,
    IMAGE_EXPERIMENTS,
    IMAGE_METHODS,
    IMAGE_WORLDS,
    KEY_DIRTS,
    SCALE,
    ImageRow,
)
from experiments.paper.image_grid_spec import image_rows as rows_of
from experiments.paper.image_rows import Command, ImageTask, commands
from robustdiff.commands import main
from robustdiff.data.corruption import Corruption
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.training.config import TrainConfig
from robustdiff.training.setup import build_objective
from robustdiff.utils.errors import UsageError
from robustdiff.utils.signals import Interrupted
from source_files import pixels, save, write_celeba, write_lsun

ROOT = Path(__file__).parents[2]
WORLD = "cifar10-cpu"
DIRT = "gaussian-p0.9-s0.2"
TINY = dataclasses.replace(SCALE["cpu"].quick, samples=20, choosing=14)


# -- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("rows", [pytest.param("all", marks=pytest.mark.long), "some", "quick"])
def test_every_training_of_the_grid_is_a_command_line_that_is_accepted(scale: str, rows: str) -> None:
    """Some: every method on one kind of dirt, and every kind of dirt by one method."""
    schedule, quick = NoiseSchedule(torch.linspace(0.999, 0.001, 10)), rows == "quick"
    for row in rows_of("cifar10", scale, quick=quick):
        if rows == "some" and row.dirt != DIRT and row.method != "plain":
            continue
        methods = {image_rows.trained_by(row)} | ({row.method} if row.what.tuned else set())
        for method in methods:
            size = SCALE[scale].quick if quick else SCALE[scale]
            config = main.parse(list(image_rows.train_flags(row, method, size, 3)))
            assert isinstance(config, TrainConfig)
            config.validate()
            build_objective(config, schedule)
            assert (config.seed, config.corrupt) == (3, IMAGE_DIRTS[row.dirt])
            assert config.compile == ("gpu" in scale and not quick)
            assert config.mixed_precision == ("bf16" if "gpu" in scale else "no")


def test_names_are_unique_and_dirt_is_what_it_is_called() -> None:
    rows = rows_of("cifar10", "cpu")
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for name, specs in IMAGE_DIRTS.items():
        for spec in specs:
            dirt = Corruption.parse(spec)
            if dirt.kind == "gaussian" and name != "mixed":
                assert name == f"gaussian-p{dirt.fraction:g}-s{dirt.parameters['sigma']:g}"
    assert len([d for d in IMAGE_DIRTS if d.startswith("gaussian")]) == 9


def test_rows_that_conclusions_rest_on_come_first_and_told_is_told_only_what_there_is() -> None:
    rows = rows_of("cifar10", "cpu", seeds=2)
    several = [row.seeds > 1 for row in rows]
    assert several == sorted(several, reverse=True)
    assert {row.dirt for row in rows if row.seeds > 1} == set(KEY_DIRTS)
    assert all(row.dirt.startswith("gaussian") for row in rows if row.method == "told")
    assert not [row for row in rows if row.dirt == "clean" and row.method in ("told", "clean-subset")]
    on_key = {row.method for row in rows if row.dirt == DIRT}
    assert on_key == set(IMAGE_METHODS)


def test_the_worlds_are_every_experiment_at_every_scale() -> None:
    assert len(IMAGE_WORLDS) == len(IMAGE_EXPERIMENTS) * len(SCALE)


# -- what is run when --------------------------------------------------------------------------------------


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Commands that take no time: training marks its run, judging writes what a setting is worth."""
    generator = torch.Generator().manual_seed(0)
    for name in (image_rows.TRAINING, image_rows.REFERENCE, image_rows.VALIDATION):
        images = torch.randint(0, 256, (30, 1, 8, 8), generator=generator, dtype=torch.uint8)
        image_rows.save_array(images, tmp_path / name)
    monkeypatch.setattr(image_rows, "list_checkpoints", lambda folder: sorted(folder.glob("step-*")))

    def perform(command: Command) -> None:
        config: Any = main.parse(list(command.arguments))
        if isinstance(config, TrainConfig):
            run = tmp_path / config.output_dir
            run.mkdir(parents=True, exist_ok=True)
            lines = [{"images": 100, "images_per_second": 50.0}, {"images": 300, "images_per_second": 20.0}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return
        config.validate()
        folder = tmp_path / config.output
        (folder / "drawn").mkdir(parents=True, exist_ok=True)
        sha256 = None
        if not config.run.endswith(".npy"):
            images = torch.randint(0, 256, (config.n, 1, 8, 8), generator=generator, dtype=torch.uint8)
            np.save(folder / "drawn" / f"ddim-{config.steps}-n{config.n}-0.npy", images.numpy())
            np.save(folder / "drawn" / "ddim-99-n1-stale.npy", 255 - images.numpy())
            (folder / "drawn" / ".half.npy").write_bytes(b"half")
            sha256 = hashlib.sha256(images.numpy().data).hexdigest()
        best = {"relabel": 1.2, "sigma_floor": 0.15}
        error = 1.0 + sum(abs(getattr(config, name) - best[name]) for name in best)
        if config.run.endswith(".npy"):
            error += abs(float(np.load(tmp_path / config.run).std()) - perform.wanted)
        for name in [Path(e).stem for e in config.extractor]:
            values = {f"FD-{name}": {"value": error, "floor": 0.5}, f"KID-{name}": {"value": 0.1, "floor": 0.0}}
            values |= {"precision": {"value": 0.7, "floor": 0.8}, "coverage": {"value": 0.6, "floor": 0.9}}
            protocol = {"extractor": {"name": name}, "generated": {"sha256": sha256}}
            result = {"kind": "quality", "values": values, "protocol": protocol, "hardware": "cpu"}
            (folder / f"quality-{name}.json").write_text(json.dumps(result))
            curve = {"steps": [2], "values": {f"FD-{name}": [9.0]}}
            few = {"kind": "few-step", "values": {}, "details": {"curves": [curve]}}
            if config.few_step:
                (folder / f"few-step-{name}.json").write_text(json.dumps(few))
        copies = {"kind": "memorisation", "values": {"near-copies": {"value": 0.01, "floor": 0.02}}}
        (folder / "memorisation-pixels.json").write_text(json.dumps(copies))

    perform.wanted = 40.0  # type: ignore[attr-defined]
    return perform


def run(task: ImageTask, perform: Any) -> tuple[list[Command], dict[str, dict[str, Any]]]:
    """Every command of a task, performed, and what each row got."""
    done, results = [], {}
    for step in commands(task):
        if isinstance(step, Command):
            done.append(step)
            perform(step)
        else:
            results[step[0].method] = step[1]
    return done, results


def task(folder: Path, *methods: str, seed: int = 0) -> ImageTask:
    rows = tuple(ImageRow(WORLD, DIRT, method, 2) for method in methods)
    return ImageTask(rows, seed, TINY, ("some/net.pt", "pixels"), ("net", "pixels"), "FD-net", folder)


def test_free_baselines_share_the_plain_run_and_take_the_best_setting(tmp_path: Path, pretend: Any) -> None:
    done, results = run(task(tmp_path, "plain", "relabelled", "label-floor"), pretend)
    assert sum(command.arguments[0] == "train" for command in done) == 1
    assert (results["relabelled"]["chosen"], results["label-floor"]["chosen"]) == (1.2, 0.15)
    judged = [main.parse(list(c.arguments)) for c in done if c.arguments[0] == "evaluate"]
    choosing = [c for c in judged if "choosing" in c.output]
    assert {c.reference for c in choosing} == {image_rows.VALIDATION}
    assert {c.reference for c in judged if c not in choosing} == {image_rows.REFERENCE}
    assert {c.held_out for c in judged if c not in choosing} == {image_rows.VALIDATION}
    drawn = [{i for c in judged if (c in choosing) == which for i in range(c.seed, c.seed + c.n)} for which in (0, 1)]
    assert not drawn[0] & drawn[1]
    assert results["plain"]["main"] == "FD-net"
    assert results["plain"]["curves"] == {
        "calls": [2, TINY.steps],
        "error_by_calls": [9.0, results["plain"]["values"]["FD-net"]],
    }
    assert results["plain"]["seconds"] == 100 / 50 + 200 / 20
    assert results["label-floor"]["seconds"] == 0  # free


def test_shrinking_is_done_on_images_about_their_mean(tmp_path: Path, pretend: Any) -> None:
    _, results = run(task(tmp_path, "plain"), pretend)
    drawn = image_rows.drawn_images(tmp_path / f"evaluations/{DIRT}-plain-seed0").double()
    pretend.wanted = 0.8 * float(drawn.std())
    done, results = run(task(tmp_path, "plain", "shrunk"), pretend)
    assert not [command for command in done if command.arguments[0] == "train"]  # it was trained before
    assert results["shrunk"]["chosen"] in image_rows.ImageRow(WORLD, DIRT, "shrunk", 1).what.tried
    drawn = image_rows.drawn_images(tmp_path / f"evaluations/{DIRT}-plain-seed0").double()
    shrunk = image_rows.read_array(tmp_path / f"evaluations/{DIRT}-shrunk-seed0/shrunk.npy").double()
    mean = drawn.mean(0)
    factor = results["shrunk"]["chosen"]
    torch.testing.assert_close(shrunk, mean + factor * (drawn - mean), atol=0.51, rtol=0)
    spread = {name: results[name]["values"]["image_spread"] for name in ("plain", "shrunk")}
    assert spread["shrunk"] == pytest.approx(factor * spread["plain"], rel=0.02)


def test_a_fine_tuned_row_starts_from_the_plain_run(tmp_path: Path, pretend: Any) -> None:
    done, results = run(task(tmp_path, "plain", "fine-tuned"), pretend)
    first, second = (c.arguments for c in done if c.arguments[0] == "train")
    assert "--init-from" not in first
    assert second[second.index("--init-from") + 1] == f"runs/{DIRT}-plain-seed0"
    assert int(second[second.index("--images") + 1]) == round(0.15 * TINY.images)
    assert results["fine-tuned"]["seconds"] == 2 * results["plain"]["seconds"]


@pytest.mark.parametrize(("left", "flag"), [("checkpoints/step-5", "--resume"), ("config.json", "--overwrite")])
def test_a_run_that_was_cut_off_goes_on_or_starts_anew(tmp_path: Path, pretend: Any, left: str, flag: str) -> None:
    path = tmp_path / f"runs/{DIRT}-plain-seed0" / left
    path.mkdir(parents=True) if "step" in left else (path.parent.mkdir(parents=True), path.touch())
    first = next(step for step in commands(task(tmp_path, "plain")) if isinstance(step, Command))
    assert first.arguments[-1] == flag


def test_a_run_is_whole_only_when_its_command_has_ended_well(tmp_path: Path, pretend: Any) -> None:
    steps = commands(task(tmp_path, "plain"))
    first = next(steps)
    assert isinstance(first, Command)
    pretend(first)  # done, but killed before anyone noted it
    (tmp_path / f"runs/{DIRT}-plain-seed0/checkpoints/step-5").mkdir(parents=True)
    again = next(commands(task(tmp_path, "plain")))
    assert isinstance(again, Command)
    assert again.arguments == (*first.arguments, "--resume")
    assert not [command for command in run(task(tmp_path, "plain"), pretend)[0] if command == first]
    note = tmp_path / f"runs/{DIRT}-plain-seed0.json"
    note.write_text(json.dumps({"arguments": ["train", "otherwise"]}))
    with pytest.raises(UsageError, match="was trained with other flags: delete it"):
        next(commands(task(tmp_path, "plain")))


def test_results_of_another_protocol_are_not_taken_for_a_rows_own(tmp_path: Path, pretend: Any) -> None:
    folder = tmp_path / f"evaluations/{DIRT}-plain-seed0"
    folder.mkdir(parents=True)
    (folder / "quality-zzz.json").write_text(json.dumps({"kind": "quality", "values": {"FD-net": {"value": -5.0}}}))
    (folder / "memorisation-zzz.json").write_text(
        json.dumps({"kind": "memorisation", "values": {"near-copies": {"value": 1.0, "floor": 0}}})
    )
    results = run(task(tmp_path, "plain"), pretend)[1]
    assert results["plain"]["values"]["FD-net"] > 0
    assert results["plain"]["values"]["near-copies"] == 0.01


def test_a_row_holds_every_seed_and_the_tables_read_it(tmp_path: Path, pretend: Any) -> None:
    (tmp_path / "results").mkdir()
    row, runs = ImageRow(WORLD, DIRT, "plain", 2), {}
    for seed in (0, 1):
        one = task(tmp_path, "plain", seed=seed)
        runs[str(seed)] = run(one, pretend)[1]["plain"]
    body = image_rows.record(row, one, "cifar10", {"training": 30}, runs)
    (tmp_path / "results" / "a.json").write_text(json.dumps(body))
    rows = tables.load(tmp_path / "results")
    assert body["seeds"] == [0, 1]
    text = tables.table(rows, WORLD)
    assert "Frechet distance, net ↓" in text
    assert "1.35 ± 0.00" in text
    assert "blind noise estimate" in tables.detail(rows, WORLD, DIRT)


def test_results_without_a_main_measure_are_refused(tmp_path: Path) -> None:
    body = {"format": 1, "experiment": "cifar10", "world": WORLD, "dirt": DIRT, "method": "plain"}
    body |= dict.fromkeys(("title", "what", "told", "version", "hardware", "torch"), "x")
    body |= {"settings": {}, "values": {}, "floor": {}, "curves": {}, "seeds": [0], "n": 1, "seconds": 1}
    (tmp_path / "a.json").write_text(json.dumps(body))
    with pytest.raises(UsageError, match="no 'main'"):
        tables.load(tmp_path)


# -- images ------------------------------------------------------------------------------------------------


def prepared(folder: Path, name: str, data: Path, **sizes: int) -> dict[str, Any]:
    scale = dataclasses.replace(TINY, **{"resolution": 4, "batch": 1, "validation": 0, "reference": 1, **sizes})
    about = {"data": data.name}
    image_folder.check_claim(folder, about)
    images = None
    if not image_folder.prepared(folder):
        images = image_folder.read_images(ReproduceConfig(name, data=str(data)), scale)
    return image_folder.claim(folder, about, images)


def celeba(folder: Path) -> None:
    """Training images 1, 2, 5 and 6, test image 4."""
    write_celeba(folder)
    for number in range(1, 7):  # large enough for the crop that is usual
        save(folder / "img_align_celeba" / f"{number:06d}.jpg", pixels(150, 150, seed=number))


def test_celeba_is_trained_on_its_split_and_judged_on_another(tmp_path: Path) -> None:
    celeba(tmp_path / "celeba")
    about = prepared(tmp_path / "out", "celeba", tmp_path / "celeba")
    assert (about["training"], about["reference"], about["judged_on"]) == (4, 1, "CelebA, test")
    assert image_rows.read_array(tmp_path / "out" / image_rows.TRAINING).shape == (4, 1, 4, 4)


def test_lsun_has_a_split_too_small_to_judge_by_so_the_last_training_images_are_kept_back(tmp_path: Path) -> None:
    write_lsun(tmp_path / "lsun" / "bedroom_train_lmdb", 9)
    write_lsun(tmp_path / "lsun" / "bedroom_val_lmdb", 2, seed=50)
    enough = prepared(tmp_path / "a", "lsun", tmp_path / "lsun", reference=2)
    assert (enough["training"], enough["judged_on"]) == (9, "LSUN, val")
    few = prepared(tmp_path / "b", "lsun", tmp_path / "lsun", reference=2, validation=1)
    assert (few["training"], few["reference"], few["validation"]) == (6, 2, 1)
    assert "not trained on" in few["judged_on"]
    shutil.rmtree(tmp_path / "lsun")
    assert prepared(tmp_path / "b", "lsun", tmp_path / "lsun") == few  # what is there is not read again
    with pytest.raises(UsageError, match="holds an experiment with another data"):
        prepared(tmp_path / "b", "lsun", tmp_path / "church")


def test_too_few_images_say_how_many_are_needed(tmp_path: Path) -> None:
    celeba(tmp_path / "celeba")
    with pytest.raises(UsageError, match="4 training images: 2 of them are needed to judge and at least 5 to train"):
        prepared(tmp_path / "out", "celeba", tmp_path / "celeba", reference=2, batch=5)


# -- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cifar10"], ["--data PATH"]),
        (["plane", "--data", "x"], ["--data belongs to subspace, cifar10, celeba, lsun"]),
        (["plane", "--scale", "cpu"], ["--scale belongs to cifar10"]),
        (["cifar10", "--data", "digits", "--components", "3"], ["--components belongs to subspace"]),
        (["cifar10", "--data", "digits", "--minutes", "0"], ["--minutes 0.0 must be more than 0"]),
        (["cifar10", "--data", "digits", "--rows", "nothing"], ["matches none of", "cifar10-cpu-clean-plain"]),
        (["cifar10", "--data", "no/such/place", "--rows", "*plain"], ["--data no/such/place"]),
        (["cifar10", "--data", "digits", "--extractor", "a", "--extractor", "a"], ["given twice"]),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce([*arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_slip_claims_and_deletes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "grid"
    line = ["cifar10", "--quick", "--output", str(folder)]
    assert reproduce([*line, "--data", "digitz"]) == 2
    assert reproduce([*line, "--data", "digits", "--extractor", "no.pt"]) == 2
    assert "no.pt" in capsys.readouterr().err
    assert not folder.exists()
    image_folder.claim(folder, {"experiment": "cifar10"}, ({}, {"training": 1}))
    (folder / "runs").mkdir()
    assert reproduce([*line, "--data", "digitz", "--overwrite"]) == 2
    assert (folder / "runs").is_dir()
    (folder / "experiment.json").write_text("{")
    capsys.readouterr()
    assert reproduce([*line, "--data", "digits"]) == 2
    assert "experiment.json cannot be read" in capsys.readouterr().err


def test_extractors_in_another_order_are_another_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / f"{name}.pt"))
    monkeypatch.setattr(image_grid._Grid, "run", lambda grid: None)
    monkeypatch.setattr(image_grid, "finish", lambda folder, config: folder)
    line = ["cifar10", "--quick", "--data", "digits", "--output", str(tmp_path / "grid")]
    first, second = (["--extractor", str(tmp_path / f"{name}.pt")] for name in ("a", "b"))
    assert reproduce([*line, *first, *second]) == 0
    assert reproduce([*line, *first, *second]) == 0
    assert reproduce([*line, *second, *first]) == 2
    assert "another extractors" in capsys.readouterr().err


def test_two_grids_in_one_folder_and_the_clock(
    tmp_path: Path, pretend: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = image_folder.locked(tmp_path)
    with image_folder.locked(tmp_path), pytest.raises(UsageError, match="another grid is at work"):
        second.__enter__()
    with image_folder.locked(tmp_path):
        pass
    for name in ("results", "logs"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(image_grid.subprocess, "Popen", pretended(pretend))
    with pytest.raises(Interrupted, match="out of --minutes") as caught:
        image_grid._Grid("cifar10", {}, [task(tmp_path, "plain")], 1, time.monotonic()).run()
    assert caught.value.status == image_grid.OUT_OF_TIME
    image_grid._Grid("cifar10", {}, [task(tmp_path, "plain")], 1, time.monotonic() + 60).run()
    assert "all done" in capsys.readouterr().out


def pretended(perform: Any, failing: str = "none") -> type:
    """What stands for subprocess.Popen: performs the command at once, or ends with status 3."""

    class Process:
        def __init__(self, line: list[str], **_: Any) -> None:
            self.returncode = 3 if any(failing in word for word in line) else 0
            if self.returncode == 0:
                perform(Command(tuple(line[3:]), ""))

        def poll(self) -> int:
            return self.returncode

        def send_signal(self, number: int) -> None:
            raise ProcessLookupError

        def wait(self, timeout: float) -> int:
            return self.returncode

    return Process


def test_the_rows_are_listed_without_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce(["celeba", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows_of("celeba", "cpu"))
    assert any("(2 seeds)" in line for line in lines)
    assert not list(tmp_path.iterdir())


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, "-m", "experiments.paper", "cifar10", "--quick", "--data", "digits", *arguments]
    return subprocess.Popen(
        [*line, "--output", str(folder), "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=folder.parent,
    )


def test_the_gpu_path_runs_on_a_cpu_stopped_and_gone_on_with(tmp_path: Path) -> None:
    folder, about = tmp_path / "grid", ("--scale", "gpu", "--rows", "*-told")
    process = start(folder, *about)
    place = folder / "runs" / f"{DIRT}-told-seed0"
    deadline = time.monotonic() + 120
    while not (place / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    if process.returncode != 0:  # stopped in time, which a fast machine need not be
        assert process.returncode == 143, out
        assert "finished rows are kept" in out
        process = start(folder, *about)
        out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    (path,) = (folder / "results").glob("*.json")
    row = json.loads(path.read_text())
    assert (row["method"], row["seeds"], row["main"]) == ("told", [0], "FD-pixels")
    assert {"FD-pixels", "precision", "coverage_of_real", "near-copies", "noise"} <= row["values"].keys()
    assert row["curves"]["calls"] == [2, 5]
    assert "--mixed-precision bf16" in row["settings"]["commands"][0]
    assert str(tmp_path) not in path.read_text()
    assert (folder / "index.html").is_file()
    assert list((folder / "figures").glob("*-samples.png"))
    again = start(folder, *about)
    assert "1 results, 1 of them done, 0 runs to go" in again.communicate(timeout=120)[0]
    other = start(folder, "--scale", "cpu", "--rows", "*-told")
    assert "another scale" in other.communicate(timeout=120)[0]
    assert other.returncode == 2


def test_a_row_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, pretend: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("results", "logs"):
        (tmp_path / name).mkdir()
    waiting = [task(tmp_path, "gated"), task(tmp_path, "plain")]
    monkeypatch.setattr(image_grid.subprocess, "Popen", pretended(pretend, "-gated-"))
    with pytest.raises(
        image_grid.RowFailed, match=r"training gated .* status 3 \(see logs/.*gated-seed0.txt.*without a result: gated"
    ):
        image_grid._Grid("cifar10", {}, waiting, 2, None).run()
    assert [path.name for path in (tmp_path / "results").iterdir()] == [f"{WORLD}-{DIRT}-plain.json"]
    assert "failed: training gated" in capsys.readouterr().out
