"""No wait is for ever: without shared memory, whatever ends a worker, and when a signal comes while images do not.

Long, because each place where a run may hang is made to hang, by the same few stand-ins.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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
from robustdiff.training import loader, loop
from robustdiff.training import run as run_module
from robustdiff.training.callbacks import checkpointing, tracking
from robustdiff.training.callbacks import pipeline as pipeline_callback
from robustdiff.training.callbacks.base import Callback
from robustdiff.training.callbacks.evaluation import EvaluationCallback
from robustdiff.training.callbacks.tracking import TrackerCallback
from robustdiff.training.loop import fit
from robustdiff.training.options import FitOptions
from robustdiff.training.run import TrainingRun
from robustdiff.training.workers import load_ahead
from robustdiff.utils import signals
from robustdiff.utils.errors import DataError, RobustdiffWarning, UsageError
from robustdiff.utils.signals import Interrupted, WaitOver, ends_with_signals, stop_signals
from runs import Run, command, complaint, may_mount, own_mounts, run, small_disk

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

    with pytest.raises(Interrupted, match="stopped at step 0 of 9, in a wait that did not end") as stop:
        fit(Line(), loss, ends_after(0, signal.SIGTERM, never_written), OPTIONS, [AsOfTwo(), saves])
    assert (stop.value.status, stop.value.saved, saves.saved) == (143, False, [])


class Hangs(Callback):
    """In one of its hooks, after sending a signal; how, ``wait`` says."""

    def __init__(self, hook: str, number: int, wait: Callable[[], object]) -> None:
        setattr(self, hook, lambda *_: self.hang())
        self.number, self.wait, self.done = number, wait, 0

    def hang(self) -> None:
        self.done += 1
        if self.done == 1:
            signalled(self.number)
            self.wait()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves, votes and steps have no more patience than the rest."""
    for module in (run_module, loop):
        monkeypatch.setattr(module, "PATIENCE", 0.2)
        monkeypatch.setattr(module, "TOGETHER", 0.2)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_log"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_callback_that_hangs_is_left_and_the_run_is_saved(hook: str, number: int) -> None:
    hangs, saves = Hangs(hook, number, never_written), Saves()
    options = dataclasses.replace(OPTIONS, log_every=1)
    with pytest.warns(RobustdiffWarning, match=f"Hangs.{hook} was left unfinished"), pytest.raises(Interrupted) as stop:
        fit(Line(), loss, [torch.ones(2, 1, 4, 4)], options, [hangs, saves], say=lambda _: None)
    assert (stop.value.status, stop.value.saved) == ({2: 130, 15: 143}[number], True)
    assert [step for step, _, _ in saves.saved] == [0 if hook == "on_start" else 1]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("whole_swap", [True, False])
def test_weights_are_those_of_training_after_an_evaluation_that_is_left(whole_swap: bool) -> None:
    """It had the moving average in their place, and the network as for sampling; also in the middle of the swap."""

    class Evaluates(Hangs):
        def on_step(self, run: TrainingRun) -> None:
            if run.step < 2:  # the average of one step is that step
                return
            with run.averaged() if whole_swap else contextlib.nullcontext():
                if not whole_swap:
                    run.ema.store(run.network.parameters())
                    run.ema.copy_to(run.network.parameters())
                else:
                    run.network.eval()
                self.hang()

    saves, whole, network = Saves(), Saves(), Line()
    options = dataclasses.replace(OPTIONS, ema_max_decay=0.9)
    fit(Line(), loss, [torch.ones(2, 1, 4, 4)], dataclasses.replace(options, steps=2), [whole], say=lambda _: None)
    callbacks = [Evaluates("unused", signal.SIGTERM, never_written), saves]
    with pytest.warns(RobustdiffWarning, match="left unfinished"), pytest.raises(Interrupted):
        fit(network, loss, [torch.ones(2, 1, 4, 4)], options, callbacks, say=lambda _: None)
    assert saves.saved == whole.saved
    assert network.training


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("hook", ["on_setup", "on_sync", "on_checkpoint"])
def test_a_save_that_hangs_is_not_said_to_be_one(hook: str) -> None:
    options = dataclasses.replace(OPTIONS, checkpoint_every=2)
    with pytest.raises(Interrupted, match="of 9, in a wait that did not end") as stop:
        fit(Line(), loss, [torch.ones(2, 1, 4, 4)], options, [Hangs(hook, signal.SIGTERM, never_written)])
    assert (stop.value.status, stop.value.saved) == (143, False)


@pytest.mark.usefixtures("hurried")
def test_a_loss_that_hangs_is_left_and_the_step_before_is_saved() -> None:
    calls, saves = [], Saves()

    def hanging(*arguments: object, **known: object) -> LossOutput:
        calls.append(1)
        if len(calls) == 6:  # the second pass of the third step
            signalled(signal.SIGTERM)
            never_written()
        return loss(*arguments, **known)

    with pytest.raises(Interrupted, match="step 2 of 9") as stop:
        fit(Line(), hanging, [torch.ones(2, 1, 4, 4)], OPTIONS, [saves], say=lambda _: None)
    assert (stop.value.status, stop.value.saved) == (143, True)
    assert [step for step, _, _ in saves.saved] == [2]


@pytest.mark.usefixtures("hurried")
def test_a_vote_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class AsOfTwo(Callback):
        def on_start(self, run: TrainingRun) -> None:
            monkeypatch.setattr(type(run.accelerator), "num_processes", 2)

    def vote(*_: object) -> int:
        signalled(signal.SIGTERM)
        never_written()
        return 0

    monkeypatch.setattr(loop, "agree", vote)
    with pytest.raises(Interrupted, match="in a wait that did not end") as stop:
        fit(Line(), loss, [torch.ones(2, 1, 4, 4)], OPTIONS, [AsOfTwo()], say=lambda _: None)
    assert (stop.value.status, stop.value.saved) == (143, False)


def test_an_evaluation_that_was_left_is_made_up_for(tmp_path: Path) -> None:
    """At the step the run goes on from, and only if its line is not there."""

    class Noted(EvaluationCallback):
        def __init__(self, every: int) -> None:
            self.folder, self.every, self.metric, self.steps_done = tmp_path, every, "fd", []

        def on_step(self, run: TrainingRun) -> None:
            if run.step % self.every == 0:
                self.steps_done.append(run.step)

    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "during.jsonl").write_text('{"step": 4, "values": {}}\n')
    run = TrainingRun(Line(), loss, OPTIONS, say=lambda _: None)
    for step, every, expected in ((0, 2, []), (4, 4, []), (6, 2, [6]), (6, 4, [])):
        run.step, noted = step, Noted(every)
        noted.on_start(run)
        assert noted.steps_done == expected


# -- waits that Python cannot end ----------------------------------------------------------------------


def deaf() -> None:
    """As in a library: no signal ends the wait, and Python's handlers are not called."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


class Deaf:
    """What hangs, in a command of its own."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self) -> None:
        signals.GRACE, signals.TWICE = 0.3, 0.05
        for module in (run_module, loop):
            module.PATIENCE, module.TOGETHER = 0.3, 600 if self.where == "long save" else 0.3
        hang = lambda *_, **__: (print("hangs", flush=True), deaf())  # noqa: E731
        if self.where.endswith("save"):
            checkpointing.save_checkpoint = hang
        elif self.where == "fsync":
            os.fsync = hang
        elif self.where == "update":
            TrainingRun.update = hang
        elif self.where == "preview":
            pipeline_callback.sample = hang
        elif self.where == "images":
            loader.Batches.draw = lambda *a, _once=loader.Batches.draw, **k: (_once if a[1][0] < 8 else hang)(*a, **k)


@pytest.mark.parametrize(
    ("where", "numbers", "status"),
    [
        ("update", [signal.SIGTERM], 143),
        ("save", [signal.SIGTERM], 143),
        pytest.param("fsync", [signal.SIGINT], 130, marks=pytest.mark.slow),  # already before the first step
        pytest.param("images", [signal.SIGTERM], 143, marks=pytest.mark.slow),
        pytest.param("preview", [signal.SIGTERM], 143, marks=pytest.mark.slow),
        ("long save", [signal.SIGINT, signal.SIGINT], 130),
        pytest.param("long save", [signal.SIGTERM, signal.SIGINT], 130, marks=pytest.mark.slow),
    ],
)
def test_the_process_ends_where_its_main_thread_does_not(inputs, tmp_path, where, numbers, status) -> None:
    it = Run(command(inputs, tmp_path / "run"), tmp_path / "log", Deaf(where))
    deadline = time.monotonic() + 60
    while "hangs" not in it.text:
        assert time.monotonic() < deadline, it.text
        time.sleep(0.01)
    for number in numbers:
        os.kill(it.pid, number)
        time.sleep(0.2)
    assert it.wait(20) == status, it.text
    line = complaint(it.text)
    assert "nothing since the last checkpoint was saved; go on with the same command and --resume" in line


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
