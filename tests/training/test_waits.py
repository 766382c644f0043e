"""No wait is for ever: without shared memory, whatever ends a worker, and when a signal comes while images do not."""

from __future__ import annotations

import errno
import faulthandler
import functools
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from robustdiff.losses.denoising import LossOutput
from robustdiff.training import loop
from robustdiff.training.callbacks import tracking
from robustdiff.training.callbacks.base import Callback
from robustdiff.training.callbacks.tracking import TrackerCallback
from robustdiff.training.loop import fit
from robustdiff.training.options import FitOptions
from robustdiff.training.run import TrainingRun
from robustdiff.training.workers import load_ahead
from robustdiff.utils.errors import DataError, RobustdiffWarning, UsageError
from robustdiff.utils.signals import Interrupted, WaitOver, ends_with_signals, stop_signals
from runs import Run, command, may_mount, own_mounts, run, small_disk

SHARES = [range(4 * i, 4 * i + 4) for i in range(12)]


def plain(counters: range) -> tuple[Tensor, Tensor | None]:
    """Images that tell which they are, and a mask for some batches only."""
    images = torch.tensor([float(counter) for counter in counters])[:, None, None, None].expand(-1, 1, 64, 64).clone()
    return images, images[:, 0] > 10 if counters[0] >= 20 else None


def check(loaded: list[tuple[range, tuple[Tensor, Tensor | None]]]) -> None:
    assert [counters for counters, _ in loaded] == SHARES
    for counters, (images, filled) in loaded:
        expected, mask = plain(counters)
        assert torch.equal(images, expected)
        assert (filled is None) == (mask is None)
        assert filled is None or torch.equal(filled, mask)


# -- shared memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_their_order_in_shared_memory(workers: int) -> None:
    loaded = list(load_ahead(plain, SHARES, workers))
    check(loaded)
    assert all(images.is_shared() for _, (images, _) in loaded)


def test_where_shared_memory_is_full_batches_come_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second time; the tests of the command below fill a real one."""
    original, calls = Tensor.share_memory_, []

    def sometimes(self: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) % 2:
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)")
        return original(self)

    monkeypatch.setattr(Tensor, "share_memory_", sometimes)
    loaded = list(load_ahead(plain, SHARES, 1))
    check(loaded)
    assert {images.is_shared() for _, (images, _) in loaded} == {True, False}


class SmallShm:
    """Gives a process that much shared memory, in bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> None:
        own_mounts()
        small_disk(Path("/dev/shm"), self.size)


@pytest.mark.slow
@pytest.mark.parametrize("kib", [4, 32, 48, 64])
def test_a_streamed_run_with_workers_needs_no_shared_memory(inputs: Path, tmp_path: Path, kib: int) -> None:
    """32 x 32 RGB in batches of 64 would take 768 KiB each."""
    if not may_mount():
        pytest.skip("needs the right to mount")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8))
    arguments = [
        *("train", str(tmp_path / "data.npy"), "--output-dir", str(tmp_path / "run"), "--max-memory-gib", "0"),
        *("--dataloader-num-workers", "2", "--images", "512", "--preset", "plain", "--preview-images", "0"),
        *("--model-config-name-or-path", str(inputs / "unet.json")),
    ]
    status, text = run(arguments, tmp_path / "log", SmallShm(kib * 1024))
    assert status == 0, text
    assert "Traceback" not in text


# -- what becomes of a worker ------------------------------------------------------------------------


def then(do: Callable[[], object], counters: range) -> tuple[Tensor, Tensor | None]:
    if counters[0] >= 12:
        do()
    return plain(counters)


class Odd(Exception):
    """Cannot be pickled."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(lambda: (one, two))


def dies_of(number: int) -> None:
    faulthandler.disable()  # pytest's, which would print its stack
    os.kill(os.getpid(), number)


def raises(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("do", "kind", "message"),
    [
        (lambda: dies_of(signal.SIGKILL), MemoryError, "killed"),
        (lambda: dies_of(signal.SIGSEGV), UsageError, r"lost \(SIGSEGV\).*`dataloader_num_workers`"),
        (lambda: dies_of(signal.SIGBUS), UsageError, r"lost \(SIGBUS\).*`dataloader_num_workers`"),
        (lambda: os._exit(3), UsageError, r"lost \(status 3\).*`resume`"),
        (lambda: raises(DataError("x.png changed")), DataError, "^x.png changed$"),
        (lambda: raises(MemoryError()), MemoryError, "^$"),
        (lambda: raises(FileNotFoundError(2, "gone", "x.png")), FileNotFoundError, "x.png"),
        (lambda: raises(ZeroDivisionError("a bug")), ZeroDivisionError, r"(?s)Traceback.*a bug"),
        (lambda: raises(Odd(1, 2)), RuntimeError, r"(?s)Traceback.*Odd"),
    ],
)
def test_whatever_happens_to_a_worker_is_an_error_here(do, kind: type[Exception], message: str) -> None:
    loading = load_ahead(functools.partial(then, do), SHARES, 2)
    with pytest.raises(kind, match=message):
        list(loading)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("fails_at", [0, 1])
def test_workers_that_cannot_be_started_are_one_line(monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    original, calls = multiprocessing.Process.start, []

    def start(self: multiprocessing.Process) -> None:
        calls.append(1)
        if len(calls) > fails_at:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        original(self)

    monkeypatch.setattr(multiprocessing.Process, "start", start)
    with pytest.raises(UsageError, match=r"cannot be started \(Resource temp.*`dataloader_num_workers`"):
        next(load_ahead(plain, SHARES, 2))
    assert multiprocessing.active_children() == []


def test_too_many_open_files_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in shared memory are handed over as open files."""
    original = BaseProcess.join
    monkeypatch.setattr(BaseProcess, "join", lambda self, timeout=0.1: original(self, min(timeout, 0.1)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    loading = load_ahead(plain, SHARES, 1)
    next(loading)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, hard))
        with pytest.raises(UsageError, match=r"lost \(Too many open files\).*`dataloader_num_workers`"):
            list(loading)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(inputs: Path, tmp_path: Path) -> None:
    it = Run(command(inputs, tmp_path / "run", "--dataloader-num-workers", "3", steps=10_000), tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(it.pid).children()
    assert len(workers) == 3
    os.kill(it.pid, signal.SIGKILL)
    it.wait()
    assert psutil.wait_procs(workers, timeout=10)[1] == []


# -- signals -----------------------------------------------------------------------------------------


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.w * x


def loss(model: Line, x0: Tensor, **_: object) -> LossOutput:
    total = (model(x0, torch.zeros(len(x0))) - x0).square().flatten(1).mean(1)
    zero = torch.zeros(len(x0))
    return LossOutput(total, total, zero, zero, zero, torch.zeros(len(x0), dtype=torch.long))


class Saves(Callback):
    """Writes down what would be saved."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, int, float]] = []

    def on_checkpoint(self, run: TrainingRun) -> None:
        self.saved.append((run.step, run.images, float(run.network.w.detach())))


def signalled(number: int, after: float = 0.1) -> threading.Timer:
    timer = threading.Timer(after, os.kill, (os.getpid(), number))
    timer.start()
    return timer


def ends_after(batches: int, number: int, wait: Callable[[], object]) -> Iterator[Tensor]:
    for _ in range(batches):
        yield torch.ones(2, 1, 4, 4)
    signalled(number)
    wait()
    yield torch.ones(2, 1, 4, 4)


def never_written() -> None:
    reader, _ = os.pipe()
    os.read(reader, 1)


OPTIONS = FitOptions(steps=9, batch_size=2, gradient_accumulation_steps=2, learning_rate=0.1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PATIENCE", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("batches", [0, 4, 5], ids=["at once", "between steps", "within a step"])
@pytest.mark.parametrize("wait", [never_written, threading.Event().wait], ids=["read", "lock"])
def test_a_signal_ends_a_wait_for_images_and_saves_the_step_before(number, status, batches, wait) -> None:
    whole, saves = Saves(), Saves()
    if batches >= 2:
        few = FitOptions(steps=batches // 2, batch_size=2, gradient_accumulation_steps=2, learning_rate=0.1)
        fit(Line(), loss, [torch.ones(2, 1, 4, 4)], few, [whole], say=lambda _: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"stopped at step {batches // 2} of 9") as stop:
        fit(Line(), loss, ends_after(batches, number, wait), OPTIONS, [saves], say=lambda _: None)
    assert (stop.value.status, stop.value.saved) == (status, True)
    assert saves.saved == (whole.saved or [(0, 0, 0.5)])
    assert signal.getsignal(signal.SIGTERM) is before


def test_images_that_come_in_time_are_still_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PATIENCE", 30.0)
    saves = Saves()
    data = ends_after(5, signal.SIGTERM, lambda: time.sleep(0.3))
    with pytest.raises(Interrupted, match="stopped at step 3 of 9"):
        fit(Line(), loss, data, OPTIONS, [saves], say=lambda _: None)
    assert [step for step, _, _ in saves.saved] == [3]


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_hangs_is_not_waited_for_after_a_signal() -> None:
    with stop_signals() as asked:
        loading = load_ahead(functools.partial(then, lambda: os.kill(os.getpid(), signal.SIGSTOP)), SHARES, 2)
        signalled(signal.SIGTERM)
        with pytest.raises(WaitOver), ends_with_signals(0.2):
            list(loading)
        assert asked() == 143
    assert multiprocessing.active_children() == []


def test_one_of_several_processes_leaves_without_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it could not; those that wait for it then notice."""
    monkeypatch.setattr(loop, "TOGETHER", 0.2)
    saves = Saves()

    class AsOfTwo(Callback):
        def on_start(self, run: TrainingRun) -> None:
            monkeypatch.setattr(type(run.accelerator), "num_processes", 2)

        on_setup = on_start

    with pytest.raises(Interrupted, match="stopped at step 0 of 9, waiting for images") as stop:
        fit(Line(), loss, ends_after(0, signal.SIGTERM, never_written), OPTIONS, [AsOfTwo(), saves])
    assert (stop.value.status, stop.value.saved, saves.saved) == (143, False, [])


def test_a_tracker_that_does_not_answer_is_given_up_at_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ends_with_signals", functools.partial(ends_with_signals, 0.2))
    tracker = TrackerCallback("wandb", {})
    with stop_signals() as asked:
        signalled(signal.SIGTERM)
        with pytest.warns(RobustdiffWarning, match="did not answer"):
            tracker._try(never_written)
        assert asked() == 143


def test_a_wait_that_ends_leaves_no_alarm_behind() -> None:
    with stop_signals() as asked:
        with ends_with_signals(0.1):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert asked() == 143
    with ends_with_signals(0.1):  # nobody listens: nothing happens
        pass
