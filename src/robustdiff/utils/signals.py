"""Stopping when the user, or the system, asks: save first, then go."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit status by signal, as shells count it."""
PATIENCE = 3.0
"""Seconds after a signal within which a wait may still end by itself."""


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
    """A signal has ended a wait, see :func:`ends_with_signals`; no error of what was waited for."""


class _Stop:
    """What the handlers know, and tell the loop."""

    def __init__(self) -> None:
        self.status = 0
        self._patience: float | None = None  # of a wait that goes on
        self._timer: threading.Timer | None = None
        self._over = False

    def __call__(self) -> int:
        return self.status

    def handle(self, number: int, _frame: object) -> None:
        if self._over and self._patience is not None:
            self._over = False
            raise WaitOver
        if self.status and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.status:
            again = "; press Ctrl-C again to stop at once without saving" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, f"\nsaving, then stopping{again}\n".encode())
            self.status = STATUS[signal.Signals(number)]
            self._arm()

    @contextlib.contextmanager
    def waiting(self, patience: float) -> Iterator[None]:
        self._patience = patience
        try:
            self._arm()
            yield
        finally:
            self._patience = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer.join()
                self._timer, self._over = None, False

    def _arm(self) -> None:
        if self.status and self._patience is not None and self._timer is None:
            self._timer = threading.Timer(self._patience, self._ring)
            self._timer.daemon = True
            self._timer.start()

    def _ring(self) -> None:
        self._over = True
        # an exception can only be raised by a handler, and only a signal ends what the system is waiting for
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


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
    _active.append(stop)
    try:
        yield stop
    finally:
        _active.remove(stop)
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
    if not _active or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _active[-1].waiting(patience):
        yield
