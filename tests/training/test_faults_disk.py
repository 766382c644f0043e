"""Full and read-only disks, memory, clocks, lost workers, and what is not finite.

Long, because its sections share the run that nothing interrupts, with which all others are compared.
"""

import dataclasses
import errno
import itertools
import json
import os
import resource
import shutil
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from robustdiff.commands import main
from robustdiff.data.dataset import load_images
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.training.callbacks import checkpointing, pipeline
from robustdiff.training.checkpoint import list_checkpoints, verify
from robustdiff.training.loader import Batches
from runs import (
    EVERY,
    STEPS,
    LimitFiles,
    ReadOnly,
    Run,
    SmallDisk,
    assert_same_run,
    assert_same_tensors,
    checkpoint,
    command,
    complaint,
    lines,
    may_mount,
    run,
    started_at,
    tensors,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]


def finish(inputs: Path, whole: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> int:
    """Resume, and compare; returns the step gone on from."""
    capfd.readouterr()
    assert main.main(command(inputs, folder, "--resume")) == 0
    assert_same_run(folder, whole)
    return started_at(capfd.readouterr().out)


def good_steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints") if not verify(path)]


# -- disks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4_096, 81_100, 120_000])
def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(inputs, whole, tmp_path, capfd, size) -> None:
    """At the third save; by size the network does not fit, or only just, or the optimiser does not."""
    folder = tmp_path / "run"
    status, text = run(command(inputs, folder), tmp_path / "log", LimitFiles(2, size))
    assert status == 2, text
    message = complaint(text)
    assert "no space left" in message
    assert "--resume" in message
    assert good_steps(folder) == [EVERY, 2 * EVERY]
    assert not list((folder / "checkpoints").glob(".*"))  # a full disk needs the room
    DiffusionPipeline.from_pretrained(folder)
    assert finish(inputs, whole, folder, capfd) == 2 * EVERY


@pytest.mark.parametrize("kib", [4, 100, 400, 600, 850, 1000])
def test_a_small_disk_is_one_line_and_with_more_space_the_run_goes_on(inputs, whole, tmp_path, kib) -> None:
    """A real file system, filled by the run itself; where none may be mounted, a limit on the size of files."""
    log, disk, saved = tmp_path / "log", tmp_path / "disk", tmp_path / "saved"
    disk.mkdir()
    if may_mount():
        before, arguments = SmallDisk(disk, kib * 1024, saved), command(inputs, disk / "run")
        status, text = run(arguments, log, before)
        full, mark, rest = text.partition("-- status 2; more space --\n")
        assert mark, text
    else:
        arguments = command(inputs, saved / "run")
        mark, full = "", run(arguments, log, LimitFiles(kib // 400, 4_096))[1]
        more = "--resume" if (saved / "run" / "checkpoints" / f"step-{EVERY:08d}").exists() else "--overwrite"
        status, rest = run([*arguments, more], log)
    assert "no space left" in complaint(full)
    assert status == 0, rest
    assert started_at(rest) == (2 * EVERY if kib > 800 else EVERY if kib >= 400 else 0)
    assert_same_run(saved / "run", whole)


def test_a_read_only_output_is_one_line_before_anything_starts(inputs, whole, tmp_path, monkeypatch, capfd) -> None:
    """A read-only mount where one is permitted, else what the system would answer (permissions do not bind root)."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(checkpoint(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    mounts = may_mount()
    original = os.access
    for output, more in ((folder, "--resume"), (folder, "--overwrite"), (folder / "new" / "run", "--no-random-flip")):
        arguments = command(inputs, output, more)
        if mounts:
            status, text = run(arguments, tmp_path / "log", ReadOnly(folder))
        else:
            with monkeypatch.context() as patch:
                patch.setattr(os, "access", lambda path, mode: Path(path) != folder and original(path, mode))
                status, text = main.main(arguments), capfd.readouterr().err
        assert status == 2
        assert "--output-dir" in complaint(text)
        assert "read-only" in complaint(text)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_disk_that_becomes_read_only_is_one_line_that_names_the_file(inputs, whole, tmp_path, monkeypatch, capfd):
    folder, original = tmp_path / "run", os.mkdir

    def mkdir(path, *arguments, **more):
        if Path(path).name == ".step-00000006.tmp":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        original(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        assert main.main(command(inputs, folder)) == 2
    assert "step-00000006" in complaint(capfd.readouterr().err)
    assert finish(inputs, whole, folder, capfd) == EVERY


def test_an_output_on_another_file_system_than_data_and_temporary_files(inputs, whole, tmp_path, monkeypatch, capfd):
    """Nothing is renamed across file systems: here every rename out of the output folder's device would fail."""
    folder = tmp_path / "run"
    here = os.fspath(folder)
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def move(a, b, *more, original=original, **named):
            if os.fspath(a).startswith(here) != os.fspath(b).startswith(here):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), os.fspath(a))
            original(a, b, *more, **named)

        monkeypatch.setattr(os, name, move)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: pytest.fail("a temporary folder"))
    assert main.main(command(inputs, folder)) == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize("tick", [-1.0, 0.0])
def test_a_clock_that_goes_backwards_or_stands_still_changes_nothing(
    inputs, whole, tmp_path, monkeypatch, tick
) -> None:
    folder, clock = tmp_path / "run", itertools.count()
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: 2e9 + tick * next(clock))
    assert main.main(command(inputs, folder, "--logging-steps", "2")) == 0
    assert_same_run(folder, whole)


def test_the_newest_checkpoint_is_that_of_the_highest_step(inputs, whole, tmp_path, capfd) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in checkpoint(folder).rglob("*"):
        os.utime(path, (1, 1))
    os.utime(checkpoint(folder), (1, 1))
    assert finish(inputs, whole, folder, capfd) == STEPS


@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_samples_that_find_the_disk_full_leave_what_was_there(whole: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out" / name
    arguments = ["sample", str(whole), "--steps", "10", "--output", str(output), "--overwrite"]
    assert run([*arguments, "-n", "2"], tmp_path / "log")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    status, text = run([*arguments, "-n", "40"], tmp_path / "log", limit)
    assert status == 2, text
    assert "no space left" in complaint(text)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert list((tmp_path / "out").iterdir()) == [output]


def test_an_old_pipeline_that_resists_deletion_does_not_stop_the_run(inputs, whole, tmp_path, monkeypatch, capfd):
    """On NFS a file that another process reads is renamed when it is deleted, and its folder cannot be removed."""
    folder, original, resisted = tmp_path / "run", shutil.rmtree, []

    def rmtree(path, *arguments, ignore_errors=False, **more):
        if Path(path).parent.name != ".pipeline.tmp" and Path(path).name != ".pipeline.tmp":
            original(path, *arguments, ignore_errors=ignore_errors, **more)
        elif Path(path).exists():
            resisted.append(path)
            if not ignore_errors:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        assert main.main(command(inputs, folder)) == 0, capfd.readouterr().err
    assert any(Path(path).name == "unet" for path in resisted)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert_same_tensors(dict(pipeline.unet.state_dict()), load_file(checkpoint(folder) / "ema.safetensors"))
    assert finish(inputs, whole, folder, capfd) == STEPS  # once nobody reads them, the old files go


# -- memory and workers ------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, change, first: int = 0) -> None:
    """Let ``change(terms, step, part)`` act on what the objective returns; the two timed passes before are let be."""
    original, calls = EquivarianceLoss.__call__, itertools.count(2 * first - 2)

    def call(self, *arguments, **draws):
        terms, number = original(self, *arguments, **draws), next(calls)
        return terms if number < 2 * first else change(terms, *divmod(number, 2))

    monkeypatch.setattr(EquivarianceLoss, "__call__", call)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_in_a_step_names_the_batch_size(inputs, whole, tmp_path, monkeypatch, capfd, error) -> None:
    folder = tmp_path / "run"

    def fail(terms, step, _part):
        if step == 4:
            raise error
        return terms

    with monkeypatch.context() as patch:
        broken(patch, fail)
        assert main.main(command(inputs, folder)) == 2
    assert "--train-batch-size" in complaint(capfd.readouterr().err)
    assert finish(inputs, whole, folder, capfd) == EVERY


def test_out_of_memory_in_a_preview_names_its_batch_size_after_saving(inputs, whole, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sample", fail)
        assert main.main(command(inputs, folder)) == 2
    message = complaint(capfd.readouterr().err)
    for word in ("--eval-batch-size", "--preview-images", "--resume", f"step {EVERY}"):
        assert word in message
    assert "--train-batch-size" not in message
    assert finish(inputs, whole, folder, capfd) == EVERY


def test_a_half_written_preview_is_drawn_again_on_resuming(inputs, whole, tmp_path, monkeypatch, capfd) -> None:
    def save(_image, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        assert main.main(command(inputs, folder)) == 2
    assert "no space left" in complaint(capfd.readouterr().err)
    assert finish(inputs, whole, folder, capfd) == EVERY


def test_a_lost_worker_is_one_line_and_the_run_goes_on_with_resume(inputs, whole, tmp_path, capfd) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    it = Run(command(inputs, folder, "--dataloader-num-workers", "2"), log)
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(it.pid).children()
    assert len(workers) == 2
    workers[0].kill()
    assert it.wait() == 2, it.text
    assert "--dataloader-num-workers" in complaint(it.text)
    safe = good_steps(folder)
    assert finish(inputs, whole, folder, capfd) if safe else True


# -- what is not finite ------------------------------------------------------------------------------


def poison(terms, how: str):
    """The second image's loss not finite, or every loss finite and the gradient not."""
    total = terms.total
    factor, more = (1 + 0 * (total - total).sqrt(), 0.0) if how == "gradient" else (1, float(how))
    total = total * factor + torch.tensor([0.0, more])
    return dataclasses.replace(terms, total=total)


BAD = 4
"""The step that is not finite, counted from 0; in its second pass."""


@pytest.mark.parametrize("how", ["nan", "inf", "-inf", "gradient"])
def test_what_is_not_finite_stops_the_run_and_is_written_down(inputs, whole, tmp_path, monkeypatch, capfd, how) -> None:
    folder = tmp_path / "run"
    arguments = command(inputs, folder, "--checkpointing-steps", "2")
    with monkeypatch.context() as patch:
        broken(patch, lambda terms, step, part: poison(terms, how) if (step, part) == (BAD, 1) else terms)
        assert main.main(arguments) == 1
        message = complaint(capfd.readouterr().err)
        record = json.loads((folder / "nonfinite.jsonl").read_text())
        for word in (f"step {BAD},", f"after {4 * BAD} images", "step-00000004", str(folder / "nonfinite.jsonl")):
            assert word in message
        data = load_images(str(inputs / "photos"))
        indices = [Batches(data, (), 0, True).index(counter) for counter in range(4 * BAD, 4 * BAD + 4)]
        assert record["step"] == BAD
        assert record["images"] == 4 * BAD
        assert record["indices"] == indices
        assert record["names"] == [data.names[index] for index in indices]
        bad = [] if how == "gradient" else [3]
        assert [i for i, loss in enumerate(record["losses"]) if loss is None] == bad
        assert record["what"] == ("gradient" if how == "gradient" else "loss")
        levels = [record["noise_to_signal"][i] for i in bad or range(4)]
        assert f"sigma/alpha = {min(levels):.3g}" in message
        assert f"{max(levels):.3g}" in message
        assert good_steps(folder) == [2, 4]
        assert all(value.isfinite().all() for value in tensors(folder, 4).values())
    with monkeypatch.context() as patch:  # the same again: the same record, once
        broken(patch, lambda terms, step, part: poison(terms, how) if (step, part) == (BAD, 1) else terms, first=4)
        assert main.main([*arguments, "--resume"]) == 1
    assert [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()] == [record]
    assert main.main([*arguments, "--resume"]) == 0
    assert_same_tensors(tensors(folder), tensors(whole))


@pytest.mark.parametrize("how", ["inf", "gradient"])
def test_a_skipped_step_is_a_step_without_its_update(inputs, tmp_path, monkeypatch, capfd, how) -> None:
    folder, reference = tmp_path / "run", tmp_path / "reference"
    with monkeypatch.context() as patch:
        original, steps = torch.optim.AdamW.step, itertools.count()

        def step(self, *arguments):
            return None if next(steps) == BAD else original(self, *arguments)

        patch.setattr(torch.optim.AdamW, "step", step)
        assert main.main(command(inputs, reference, "--logging-steps", "1")) == 0
    with monkeypatch.context() as patch:
        broken(patch, lambda terms, step, part: poison(terms, how) if (step, part) == (BAD, 1) else terms)
        arguments = command(inputs, folder, "--logging-steps", "1", "--on-nonfinite", "skip")
        assert main.main(arguments) == 0
    assert f"skipped a step: the {'loss' if how == 'inf' else 'gradient'} is not finite" in capfd.readouterr().out
    assert_same_tensors(tensors(folder), tensors(reference))
    for line, other in zip(lines(folder), lines(reference), strict=True):
        skipped = line.pop("skipped", 0)
        assert skipped == (line["step"] > BAD)
        assert line == other if line["step"] != BAD + 1 else line["loss"] is None
    assert json.loads((folder / "nonfinite.jsonl").read_text())["step"] == BAD


def test_ten_skipped_steps_in_a_row_stop_the_run_across_a_checkpoint_and_a_resume(inputs, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    arguments = command(inputs, folder, "--on-nonfinite", "skip", "--logging-steps", "100")

    def nine_good_one_bad(terms, step, part):  # a row of nine, and the tenth is good
        return poison(terms, "nan") if step != 3 and part else terms

    with monkeypatch.context() as patch:
        broken(patch, nine_good_one_bad)
        original = checkpointing.save_checkpoint

        def save(place, step, *more):
            result = original(place, step, *more)
            if step == 9:
                raise KeyboardInterrupt
            return result

        patch.setattr(checkpointing, "save_checkpoint", save)
        assert main.main(arguments) == 130  # after the steps 4 to 8 of the row
    before = tensors(folder, 9)
    record = json.loads((checkpoint(folder, 9) / "state.json").read_text())["metrics"]
    assert (record["skipped"], record["streak"]) == (8, 5)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        broken(patch, nine_good_one_bad, first=9)
        assert main.main([*arguments, "--resume"]) == 1
    message = complaint(capfd.readouterr().err)
    assert "step 13," in message
    assert "10 steps in a row" in message
    assert "skip" not in message.split("try a lower")[1]
    steps = [json.loads(line)["step"] for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, *range(4, 14)]
    assert max(good_steps(folder)) == 12
    after = tensors(folder, 12)
    for name in before:
        if not name.startswith("ema/"):  # the average still moves towards the weights
            assert torch.equal(before[name], after[name])


def test_a_row_of_bad_steps_deletes_no_checkpoint_from_before_it(inputs, tmp_path, monkeypatch, capfd) -> None:
    """Weights that lead to ten bad steps in a row may be spoilt: the one to go back to is from before the row."""
    folder = tmp_path / "run"
    arguments = command(inputs, folder, "--on-nonfinite", "skip", "--checkpoints-total-limit", "1")
    with monkeypatch.context() as patch:
        broken(patch, lambda terms, step, part: poison(terms, "nan") if step >= 8 else terms)
        assert main.main(arguments) == 1
    message = complaint(capfd.readouterr().err)
    assert "step 17," in message
    assert f"last good checkpoint: {checkpoint(folder, 6)};" in message
    assert good_steps(folder) == [6, 9, 12, 15]


def test_the_checkpoint_just_before_a_row_of_bad_steps_is_the_one_named(inputs, tmp_path, monkeypatch, capfd) -> None:
    folder = tmp_path / "run"
    broken(monkeypatch, lambda terms, step, part: poison(terms, "nan") if step >= 6 else terms)
    assert main.main(command(inputs, folder, "--on-nonfinite", "skip")) == 1
    assert f"last good checkpoint: {checkpoint(folder, 6)};" in complaint(capfd.readouterr().err)


def test_after_a_row_of_bad_steps_superfluous_checkpoints_go(inputs, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    broken(monkeypatch, lambda terms, step, part: poison(terms, "nan") if 4 <= step < 13 else terms)
    assert main.main(command(inputs, folder, "--on-nonfinite", "skip")) == 0
    assert good_steps(folder) == [STEPS - EVERY, STEPS]


def test_skipped_steps_that_are_not_in_a_row_never_stop_it(inputs, tmp_path, monkeypatch) -> None:
    broken(monkeypatch, lambda terms, step, part: poison(terms, "nan") if step != 9 else terms)
    assert main.main(command(inputs, tmp_path / "run", "--on-nonfinite", "skip")) == 0
    assert lines(tmp_path / "run")[-1]["skipped"] == STEPS - 1
