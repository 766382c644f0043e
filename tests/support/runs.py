"""Short training runs in processes of their own, for the tests that kill, signal and starve them."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from safetensors.torch import load_file

from helpers import TINY_UNET
from robustdiff.commands import main
from robustdiff.training.callbacks import checkpointing

disable_progress_bar()

STEPS, EVERY = 18, 3
"""Optimiser steps of a whole run, and between its checkpoints."""
PARTS = ("model", "ema", "optimizer")
_server = multiprocessing.get_context("forkserver")  # imports once, before anything has touched a GPU, and then forks
_server.set_forkserver_preload(["robustdiff.training.trainer"])
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def write_inputs(folder: Path) -> None:
    """Eight 8 x 8 grey images in ``folder/photos``, and a tiny network's configuration beside them."""
    random = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    (folder / "unet.json").write_text(json.dumps(TINY_UNET))


def command(inputs: Path, output: Path, *more: str, preset: str = "gated", steps: int = STEPS) -> list[str]:
    """``robustdiff train`` on those images: two passes of two images per step, everything random switched on.

    ``--logging-steps`` does not divide ``--checkpointing-steps``: lines of metrics span checkpoints.
    """
    return [
        *("train", str(inputs / "photos"), "--output-dir", str(output), "--images", str(4 * steps)),
        *("--train-batch-size", "2", "--gradient-accumulation-steps", "2", "--random-flip", "--preset", preset),
        *("--corrupt", "impulse:amount=0.1,fraction=0.5", "--model-config-name-or-path", str(inputs / "unet.json")),
        *("--learning-rate", "1e-3", "--ddpm-num-steps", "20", "--ddpm-num-inference-steps", "2"),
        *("--preview-images", "1", "--checkpointing-steps", str(EVERY), "--logging-steps", "2", *more),
    ]


# -- processes ---------------------------------------------------------------------------------------


class Run:
    """``robustdiff ARGUMENTS`` in a process, and a process group, of its own; its output goes to the file ``log``."""

    def __init__(self, arguments: Sequence[str], log: Path, before: Callable[[], object] | None = None) -> None:
        """Start it; ``before`` (picklable) is called there first."""
        self.log = log
        self._process = _server.Process(target=_run, args=(list(arguments), str(log), before))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def wait(self, seconds: float = 120) -> int:
        """Its exit status; minus the signal's number if one ended it."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.text}")
        return int(self._process.exitcode or 0)

    def alive(self, seconds: float = 0) -> bool:
        """Whether it still runs after waiting for it so long."""
        self._process.join(seconds)
        return self._process.is_alive()

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text() if self.log.exists() else ""


def run(arguments: Sequence[str], log: Path, before: Callable[[], object] | None = None) -> tuple[int, str]:
    """Exit status and output of a whole run."""
    it = Run(arguments, log, before)
    return it.wait(), it.text


def _run(arguments: list[str], log: str, before: Callable[[], object] | None) -> None:
    os.setpgid(0, 0)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # workers start as from a command typed by hand
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if before is not None:
        before()
    sys.exit(main.main(arguments))


class DieAt:
    """Kill -9 by the process itself, just before its ``operation``-th change to the file system."""

    def __init__(self, operation: int) -> None:
        """From 0; a number never reached prints how many there were."""
        self.operation = operation

    def __call__(self) -> None:
        """Start to count."""
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            swaps = event == "ctypes.dlsym" and arguments[1] == "renameat2"
            if writes or swaps or event in _CHANGES:
                if count == self.operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(hook)
        train = main.COMMANDS["train"]

        def told(config: Any, say: Any) -> int:
            status = train.run(config, say)
            print(f"operations: {count}")
            return status

        main.COMMANDS["train"] = dataclasses.replace(train, run=told)


class LimitFiles:
    """No file may grow beyond ``size`` bytes from the ``saves``-th checkpoint on: a full disk where none is at hand."""

    def __init__(self, saves: int, size: int) -> None:
        """Count checkpoints from 0."""
        self.saves, self.size = saves, size

    def __call__(self) -> None:
        """Watch the saves."""
        original, done = checkpointing.save_checkpoint, []

        def save(*arguments: Any) -> Path:
            if len(done) == self.saves:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
            done.append(1)
            return original(*arguments)

        checkpointing.save_checkpoint = save


_libc = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if value is None else os.fsencode(value) for value in (source, target, kind, options)]
    if _libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def own_mounts() -> None:
    """From now on, what this process mounts is seen by nobody else and goes with it.

    Raises:
        OSError: If it is not permitted.
    """
    if sys.platform != "linux" or _libc.unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "no mounts here")
    _mount("none", Path("/"), None, _RECURSIVE | _PRIVATE)


def may_mount() -> bool:
    """Whether :func:`own_mounts` works here."""
    it = _server.Process(target=own_mounts)
    it.start()
    it.join()
    return it.exitcode == 0


def small_disk(folder: Path, size: int, again: bool = False) -> None:
    """Mount an empty disk of ``size`` bytes at ``folder``, or give the one there another size."""
    _mount("tmpfs", folder, "tmpfs", _REMOUNT if again else 0, f"size={size}")


class ReadOnly:
    """Makes ``folder`` read-only for a process."""

    def __init__(self, folder: Path) -> None:
        """Which folder."""
        self.folder = folder

    def __call__(self) -> None:
        """Mount it over itself."""
        own_mounts()
        _mount(str(self.folder), self.folder, None, _BIND)
        _mount(str(self.folder), self.folder, None, _BIND | _REMOUNT | _READ_ONLY)


class SmallDisk:
    """The command on a disk of ``size`` bytes, and where it is full once more with space: with what it says to add."""

    def __init__(self, disk: Path, size: int, saved: Path) -> None:
        """``disk`` is seen by that process only: what is on it is copied to ``saved``."""
        self.disk, self.size, self.saved = disk, size, saved

    def __call__(self) -> None:
        """Mount the disk, and change ``main.main``."""
        own_mounts()
        small_disk(self.disk, self.size)
        once = main.main

        def twice(arguments: list[str]) -> int:
            status = once(arguments)
            print(f"-- status {status}; more space --", flush=True)
            small_disk(self.disk, 2**26, again=True)
            if status:
                there = list((self.disk / "run" / "checkpoints").glob("step-*/manifest.json"))
                status = once([*arguments, "--resume" if there else "--overwrite"])
            shutil.copytree(self.disk, self.saved)
            return status

        main.main = twice


# -- results -----------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without the speed."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        assert 0 < line.pop("images_per_second") < float("inf")
    return found


def checkpoint(folder: Path, step: int = STEPS) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / "checkpoints" / f"step-{step:08d}"


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Network, average and optimiser of a checkpoint."""
    files = {part: load_file(checkpoint(folder, step) / f"{part}.safetensors") for part in PARTS}
    return {f"{part}/{name}": value for part, values in files.items() for name, value in values.items()}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, f"{len(differing)} of {len(a)} tensors differ: {differing[:3]}"


def assert_same_run(folder: Path, whole: Path, step: int = STEPS) -> None:
    """``folder`` is what ``whole``, which nothing interrupted, is: weights, metrics, pipeline, and no rubbish."""
    assert_same_tensors(tensors(folder, step), tensors(whole, step))
    assert lines(folder) == lines(whole)
    rubbish = [str(path) for path in folder.rglob("*") if path.name.startswith(".")]
    assert not rubbish
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    here, there = ({path.name for path in (f / "checkpoints").iterdir()} for f in (folder, whole))
    assert here == there
    pipeline = DiffusionPipeline.from_pretrained(folder)
    average = load_file(checkpoint(folder, step) / "ema.safetensors")
    assert_same_tensors(dict(pipeline.unet.state_dict()), average)
    for picture in (whole / "samples").iterdir():
        assert (folder / "samples" / picture.name).read_bytes() == picture.read_bytes()


def started_at(text: str) -> int:
    """The step a run went on from, by what it printed; 0 if it started anew."""
    match = re.search(r"going on from .*: step (\d+) of", text)
    return int(match[1]) if match else 0


def complaint(text: str) -> str:
    """What a run said at its end, checked to be one line without a stack trace."""
    assert "Traceback" not in text, text
    found = [line for line in text.splitlines() if line.startswith("robustdiff: ") and ": warning:" not in line]
    assert len(found) == 1, text
    return found[0]
