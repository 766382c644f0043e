"""Worker processes that load images ahead, and what is said when one fails.

Not torch's ``DataLoader``: where shared memory is small, as in containers, its workers drop what they cannot hand over,
and its reader waits for ever.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper

from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError

LoadedBatch = tuple[Tensor, Tensor | None]
"""Images in [-1, 1], (B, C, H, W); which of their pixels were filled in, bool, (B, H, W), or None if none were."""
Load = Callable[[range], LoadedBatch]
AHEAD = 2
"""Batches under way per worker."""


def load_ahead(
    load: Load, shares: Iterable[range], workers: int, pin: bool = False
) -> Generator[tuple[range, LoadedBatch], None, None]:
    """What ``load`` gives for each of ``shares``, in their order, made by processes; close it to end them.

    Args:
        load: Called there.
        shares: What it is called with.
        workers: How many processes, >= 1; started once.
        pin: Put tensors into pinned memory, for faster copies to a GPU.

    Raises:
        UsageError: If they cannot be started, or one is lost.
        MemoryError: If the system has killed one.
        Exception: Whatever ``load`` raises there.
    """
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    started: list[_Worker] = []

    def ask(counters: range) -> LoadedBatch:
        worker = idle.get()
        try:
            images, filled = worker.ask(counters)
        finally:
            idle.put(worker)
        return (images.pin_memory(), None if filled is None else filled.pin_memory()) if pin else (images, filled)

    threads = _threads(workers, pin)
    try:
        for _ in range(workers):  # before there are threads: a fork would copy what they hold
            started.append(_Worker(load))
            idle.put(started[-1])
        coming: deque[tuple[range, Future[LoadedBatch]]] = deque()
        for counters in shares:
            coming.append((counters, threads.submit(ask, counters)))
            if len(coming) == AHEAD * workers:
                counters, loaded = coming.popleft()
                yield counters, loaded.result()
        for counters, loaded in coming:
            yield counters, loaded.result()
    finally:  # not left to the collector: the interpreter's end would wait for ever
        for worker in started:
            worker.process.kill()  # also one that hangs in a read
        threads.shutdown(cancel_futures=True)
        for worker in started:
            worker.process.join()


def _threads(count: int, pin: bool) -> ThreadPoolExecutor:
    """Each waits for one worker at a time."""
    if not pin:
        return ThreadPoolExecutor(count)
    return ThreadPoolExecutor(count, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))


class _Worker:
    """One process, and the pipe to it."""

    def __init__(self, load: Load) -> None:
        """Start it."""
        try:
            self.pipe, end = multiprocessing.Pipe()
            self.process = multiprocessing.Process(target=_serve, args=(load, end, self.pipe), daemon=True)
            self.process.start()
        except OSError as error:  # too many processes, open files ...
            message = f"a worker process that loads images cannot be started ({error.strerror or error})"
            raise UsageError(f"{message}: lower `dataloader_num_workers`") from None
        end.close()  # the worker's is then the only one: the pipe ends when it does

    def ask(self, counters: range) -> LoadedBatch:
        """What it loads."""
        try:
            self.pipe.send(counters)
            answer: Any = ForkingPickler.loads(self.pipe.recv_bytes())
        except (EOFError, OSError, RuntimeError) as error:  # the last one if a handle cannot be received
            raise self._lost(error) from None
        if isinstance(answer, ExceptionWrapper):
            answer.reraise()  # type: ignore[no-untyped-call]
        if isinstance(answer, Exception):
            raise answer
        images, filled = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in answer)
        return images, filled

    def _lost(self, error: Exception) -> Exception:
        self.process.join(5)
        status = self.process.exitcode
        if status == -signal.SIGKILL:
            return MemoryError("a worker process that loads images was killed")
        how = f"status {status}" if status is not None else atomic_io.one_line(error)
        how = signal.Signals(-status).name if status is not None and status < 0 else how
        return UsageError(
            f"a worker process that loads images was lost ({how}): go on with `resume`, and lower "
            "`dataloader_num_workers` if it happens again"
        )


def _serve(load: Load, pipe: Connection, other_end: Connection) -> None:
    """What a worker does, until the pipe ends because nobody is there any more."""
    other_end.close()  # a fork has it too
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the parent has yet to save
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while True:
            pipe.send_bytes(_answer(load, pipe.recv()))
    except (EOFError, ConnectionError):
        return


def _answer(load: Load, counters: range) -> Any:  # noqa: ANN401 - pickled bytes
    try:
        images, filled = load(counters)
        return _packed(images, filled)
    except (UsageError, MemoryError, OSError) as error:
        return ForkingPickler.dumps(error)
    except Exception:  # with its stack trace, which does not survive the way otherwise
        where = "in a worker process that loads images"
        return ForkingPickler.dumps(ExceptionWrapper(where=where))  # type: ignore[no-untyped-call]


def _packed(*tensors: Tensor | None) -> Any:  # noqa: ANN401 - pickled bytes
    """In shared memory, or where it is full or there is none, through the pipe."""
    try:
        for tensor in tensors:
            if tensor is not None:
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        return ForkingPickler.dumps(tensors)
    except (OSError, RuntimeError):
        return ForkingPickler.dumps([None if tensor is None else tensor.numpy() for tensor in tensors])
