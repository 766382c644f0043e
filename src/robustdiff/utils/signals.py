"""Stopping when the user, or the system, asks: save first, then go; nothing that hangs outlasts it."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit status by signal, as shells count it."""
PATIENCE = 3.0
"""Seconds after a signal within which a wait may still end by itself."""
TOGETHER = 20.0
"""The same, for what other processes wait for, and for what must not be cut short; launchers kill after 30."""
GRACE = 5.0
"""Seconds after which what has been told to end is taken for stuck, and the process ends."""
TWICE = 0.5
"""Seconds within which a second Ctrl-C is the first once more: a process that starts may tell its parent's pipe."""
_TURN, _OVER = 254, 255
"""To the thread, beside the numbers of signals: another wait; the end."""


class Interrupted(Exception):
    """Training was stopped from outside; the message says how to go on.

    Args:
        message: One line.
        status: Exit status: 130 for Ctrl-C, 143 for SIGTERM.
        saved: Whether everything up to here was.
    """

    def __init__(self, message: str, status: int = 130, saved: bool = True) -> None:
        """Keep the status."""
        super().__init__(message)
        self.status, self.saved = status, saved


class WaitOver(BaseException):
    """A signal has ended a wait, see :func:`ends_with_signals`; no error of what was waited for.

    Args:
        status: Exit status that the signal asks for.
    """

    def __init__(self, status: int) -> None:
        """Keep the status."""
        super().__init__()
        self.status = status


@dataclass
class _Wait:
    """Something that may take so many seconds after a signal; then, if it may be left, an exception ends it."""

    patience: float
    may_leave: bool = True
    rung: bool = False


class _Stop:
    """What the handlers know, and tell the loop.

    A thread watches beside it: Python's handlers are not called while the main thread waits for a network, a disk or a
    device in the code of a library.
    """

    def __init__(self) -> None:
        self.status = 0
        self._waits = [_Wait(math.inf, may_leave=False)]  # the innermost last
        self._since = time.monotonic()
        self._last_words: LastWords | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __call__(self) -> int:
        return self.status

    def start(self) -> None:
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        self._writer.setblocking(True)
        self._writer.send(bytes([_OVER]))
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def handle(self, number: int, _frame: object) -> None:
        first = not self.status
        if first:
            self.status = STATUS[signal.Signals(number)]
            again = "; press Ctrl-C again to stop at once without saving" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, f"\nsaving, then stopping{again}\n".encode())
        if self._waits[-1].rung:
            self._leave(len(self._waits) - 1)
            raise WaitOver(self.status)
        if number == signal.SIGINT and not first:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def waiting(self, wait: _Wait, last_words: LastWords | None = None) -> Iterator[None]:
        depth, before = len(self._waits), self._last_words
        try:
            self._since, self._last_words = time.monotonic(), last_words or before
            self._waits.append(wait)
            self._wake()
            yield
        finally:
            self._last_words = before
            self._leave(depth)

    def _leave(self, depth: int) -> None:
        self._since = time.monotonic()
        del self._waits[depth:]
        self._wake()

    def _wake(self) -> None:
        if self.status:
            with contextlib.suppress(BlockingIOError):  # it has enough to read
                self._writer.send(bytes([_TURN]))

    def _watch(self) -> None:
        """In the thread: end what outlasts a signal, first by an exception, then by ending the process."""
        status, asked, at_once = 0, math.inf, math.inf
        while True:
            wait = self._waits[-1]
            last = wait.rung or not wait.may_leave
            due = max(self._since, asked) + wait.patience + (GRACE if last else 0)
            due = math.inf if last and self._last_words is None else due
            left = min(due, at_once) - time.monotonic()
            if select.select([self._reader], [], [], None if left == math.inf else max(0.0, left))[0]:
                for number in self._reader.recv(64):
                    if number == _OVER:
                        return
                    if number in STATUS and not status:
                        status, asked = STATUS[signal.Signals(number)], time.monotonic()
                    elif number == signal.SIGINT and time.monotonic() - asked > TWICE and self._last_words is not None:
                        at_once = min(at_once, time.monotonic() + GRACE)
            elif wait is self._waits[-1] and not last:
                wait.rung = True
                # only a handler can raise in the main thread, and only a signal ends what the system waits for
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            elif wait is self._waits[-1] and self._last_words is not None:
                _end(self._last_words(status if at_once == math.inf else 130))


def _end(stop: Interrupted) -> None:
    """End the process though its main thread does not."""
    # In a thread: whoever should read it may be what is waited for.
    words = threading.Thread(target=sys.excepthook, args=(Interrupted, stop, None), daemon=True)
    words.start()
    words.join(1)
    for child in multiprocessing.active_children():  # may hang too
        child.kill()
    os._exit(stop.status)


LastWords = Callable[[int], Interrupted]
"""What to say where the process ends by itself, with so much as its status."""


_active: list[_Stop] = []
"""Those whose handlers are in charge, the last one first."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Turn Ctrl-C and SIGTERM into a number that the loop reads: 0, or the exit status to end with.

    A second Ctrl-C stops at once. Further SIGTERMs change nothing: who sends them sends SIGKILL when out of patience.
    """
    stop = _Stop()
    before: dict[int, object] = {}
    try:
        for number in STATUS:
            before[number] = signal.signal(number, stop.handle)
    except ValueError:  # not the main thread: the caller's handlers stay in charge
        yield stop
        return
    stop.start()
    _active.append(stop)
    try:
        yield stop
    finally:
        _active.remove(stop)
        stop.close()  # first: it may be about to send a signal
        for each, handler in before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]


@contextlib.contextmanager
def ends_with_signals(patience: float = PATIENCE) -> Iterator[None]:
    """Something that may wait for ever, for images or a network, and must not outlast a signal.

    Works inside of :func:`stop_signals`, in the main thread; elsewhere it does nothing.

    Args:
        patience: Seconds after a signal that it has to end by itself.

    Raises:
        WaitOver: If it does not.
    """
    with _waiting(_Wait(patience), None):
        yield


@contextlib.contextmanager
def ends_at_last(patience: float, last_words: LastWords) -> Iterator[None]:
    """Something that must not outlast a signal, whatever it hangs in: if need be, the process ends.

    Works where :func:`ends_with_signals` does.

    Args:
        patience: Seconds after a signal that what is inside may take where it is no wait of its own.
        last_words: What is handed to ``sys.excepthook`` then; the process ends with its status.
    """
    with _waiting(_Wait(patience, may_leave=False), last_words):
        yield


@contextlib.contextmanager
def _waiting(wait: _Wait, last_words: LastWords | None) -> Iterator[None]:
    here = _active and threading.current_thread() is threading.main_thread()
    with _active[-1].waiting(wait, last_words) if here else contextlib.nullcontext():
        yield
