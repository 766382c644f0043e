"""The image grid: its rows are command lines that the command takes; what is run when; kills; the native formats."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from source_files import pixels, save, write_celeba, write_lsun

from robustdiff import cli
from robustdiff.config import ReproduceConfig, TrainConfig, UsageError
from robustdiff.corruption import Corruption
from robustdiff.planning import build_objective
from robustdiff.process import NoiseProcess
from robustdiff.reproduce import image_grid, image_rows, tables
from robustdiff.reproduce.grid import (
    IMAGE_DIRTS,
    IMAGE_EXPERIMENTS,
    IMAGE_METHODS,
    IMAGE_WORLDS,
    KEY_DIRTS,
    SCALE,
    ImageRow,
)
from robustdiff.reproduce.grid import (
    image_rows as rows_of,
)
from robustdiff.reproduce.image_rows import Command, ImageTask, commands

WORLD = "cifar10-cpu"
DIRT = "gaussian-p0.9-s0.2"
TINY = dataclasses.replace(SCALE["cpu"].quick, samples=20, choosing=14)


# -- rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALE)
@pytest.mark.parametrize("quick", [False, True])
def test_every_training_of_the_grid_is_a_command_line_that_is_accepted(scale: str, quick: bool) -> None:
    process = NoiseProcess(torch.linspace(0.999, 0.001, 10))
    for row in rows_of("cifar10", scale, quick=quick):
        methods = {image_rows.trained_by(row)} | ({row.method} if row.what.tuned else set())
        for method in methods:
            size = SCALE[scale].quick if quick else SCALE[scale]
            config = cli.parse(list(image_rows.train_flags(row, method, size, 3)))
            assert isinstance(config, TrainConfig)
            config.validate()
            build_objective(config, process)
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
            if dirt.kind == "gaussian":
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
    monkeypatch.setattr(image_rows, "_finished", lambda run: (run / "whole").is_file())
    monkeypatch.setattr(image_rows, "list_checkpoints", lambda folder: sorted(folder.glob("step-*")))

    def perform(command: Command) -> None:
        config: Any = cli.parse(list(command.arguments))
        if isinstance(config, TrainConfig):
            run = tmp_path / config.output_dir
            run.mkdir(parents=True, exist_ok=True)
            (run / "whole").touch()
            lines = [{"images": 100, "images_per_second": 50.0}, {"images": 300, "images_per_second": 20.0}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return
        config.validate()
        folder = tmp_path / config.output
        (folder / "drawn").mkdir(parents=True, exist_ok=True)
        if not config.run.endswith(".npy"):
            images = torch.randint(0, 256, (config.n, 1, 8, 8), generator=generator, dtype=torch.uint8)
            np.save(folder / "drawn" / f"ddim-{config.steps}-n{config.n}-0.npy", images.numpy())
        best = {"relabel": 1.2, "label_floor": 0.15}
        error = 1.0 + sum(abs(getattr(config, name) - best[name]) for name in best)
        if config.run.endswith(".npy"):
            error += abs(float(np.load(tmp_path / config.run).std()) - perform.wanted)
        for name in [Path(e).stem for e in config.extractor]:
            values = {f"FD-{name}": {"value": error, "floor": 0.5}, f"KID-{name}": {"value": 0.1, "floor": 0.0}}
            values |= {"precision": {"value": 0.7, "floor": 0.8}, "coverage": {"value": 0.6, "floor": 0.9}}
            result = {"kind": "quality", "values": values, "protocol": {"extractor": {"name": name}}, "hardware": "cpu"}
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
    return ImageTask(rows, seed, TINY, ("some/net.pt", "pixels"), folder)


def test_free_baselines_share_the_plain_run_and_take_the_best_setting(tmp_path: Path, pretend: Any) -> None:
    done, results = run(task(tmp_path, "plain", "relabelled", "label-floor"), pretend)
    assert sum(command.arguments[0] == "train" for command in done) == 1
    assert (results["relabelled"]["chosen"], results["label-floor"]["chosen"]) == (1.2, 0.15)
    judged = [cli.parse(list(c.arguments)) for c in done if c.arguments[0] == "evaluate"]
    choosing = [c for c in judged if "choosing" in c.output]
    assert {c.reference for c in choosing} == {image_rows.VALIDATION}
    assert {c.reference for c in judged if c not in choosing} == {image_rows.REFERENCE}
    assert {c.held_out for c in judged if c not in choosing} == {image_rows.VALIDATION}
    assert not {c.seed for c in choosing} & {c.seed for c in judged if c not in choosing}
    assert results["plain"]["main"] == "FD-net"
    assert results["plain"]["curves"] == {
        "calls": [2, TINY.steps],
        "error_by_calls": [9.0, results["plain"]["values"]["FD-net"]],
    }
    assert results["plain"]["seconds"] == 100 / 50 + 200 / 20
    assert results["label-floor"]["seconds"] == 0  # free


def test_shrinking_is_done_on_images_about_their_mean(tmp_path: Path, pretend: Any) -> None:
    _, results = run(task(tmp_path, "plain"), pretend)
    drawn = image_rows.drawn_images(tmp_path / f"evaluations/{DIRT}-plain-seed0", TINY.samples).double()
    pretend.wanted = 0.8 * float(drawn.std())
    _, results = run(task(tmp_path, "shrunk"), pretend)
    assert results["shrunk"]["chosen"] == 0.8
    shrunk = image_rows.read_array(tmp_path / f"evaluations/{DIRT}-shrunk-seed0/shrunk.npy").double()
    mean = drawn.mean(0)
    torch.testing.assert_close(shrunk, mean + 0.8 * (drawn - mean), atol=0.51, rtol=0)
    assert results["shrunk"]["values"]["image_spread"] < 0.95


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
    filled = tables.fill(f"9.99<!-- {WORLD} {DIRT} plain FD-net --> 9<!-- {WORLD} {DIRT} plain FD-net@2 -->", rows)
    assert filled.startswith("1.35<!--")
    assert "> 9<!--" in filled


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
    return image_grid.prepare(ReproduceConfig(name, data=str(data)), scale, folder)


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
    again = prepared(tmp_path / "b", "lsun", tmp_path / "gone")  # what is there is not read again
    assert again == few


def test_too_few_images_say_how_many_are_needed(tmp_path: Path) -> None:
    celeba(tmp_path / "celeba")
    with pytest.raises(UsageError, match="4 images in train: 2 are needed to judge and at least 5 to train"):
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
    assert cli.main(["reproduce", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_rows_are_listed_without_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", "celeba", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows_of("celeba", "cpu"))
    assert any("(2 seeds)" in line for line in lines)
    assert not list(tmp_path.iterdir())


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "robustdiff", "reproduce", "cifar10", "--quick", "--data", "digits", *arguments]
    return subprocess.Popen(
        [*line, "--output", str(folder), "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder.parent,
    )


@pytest.mark.slow
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

    class Process:
        def __init__(self, line: list[str], **_: Any) -> None:
            self.returncode = 3 if any("-gated-" in word for word in line) else 0
            if self.returncode == 0:
                pretend(Command(tuple(line[3:]), ""))

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(image_grid.subprocess, "Popen", Process)
    with pytest.raises(image_grid.RowFailed, match=r"training gated .* status 3 \(see logs/.*gated-seed0.txt"):
        image_grid._Grid("cifar10", {}, waiting, 2, None).run()
    assert [path.name for path in (tmp_path / "results").iterdir()] == [f"{WORLD}-{DIRT}-plain.json"]
    assert "failed: training gated" in capsys.readouterr().out
