"""Stopping when the user, or the system, asks: save first, then go."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit status by signal, as shells count it."""


class Interrupted(Exception):
    """Training was stopped from outside, after saving; the message says how to go on.

    Args:
        message: One line.
        status: Exit status: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, status: int = 130) -> None:
        """Keep the status."""
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Turn Ctrl-C and SIGTERM into a number that the loop reads: 0, or the exit status to end with.

    A second Ctrl-C stops at once. Further SIGTERMs change nothing: who sends them sends SIGKILL when out of patience.
    """
    status = 0

    def handle(number: int, _frame: object) -> None:
        nonlocal status
        if status and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not status:
            again = "; press Ctrl-C again to stop at once without saving" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, f"\nsaving, then stopping{again}\n".encode())
        status = status or STATUS[signal.Signals(number)]

    before: dict[int, object] = {}
    try:
        for number in STATUS:
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the caller's handlers stay in charge
        yield lambda: 0
        return
    try:
        yield lambda: status
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]
