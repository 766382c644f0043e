"""Work done side by side, each piece on its share of the threads, and how long all of it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock

import torch
from tqdm.auto import tqdm

SPOKEN_EVERY = 30.0
"""Seconds between lines on how long it takes, where there is no terminal to draw a bar on."""


class _Over(Exception):
    """Another piece has failed, or a signal has come: this one need not end."""


@dataclass(eq=False)
class Meter:
    """A bar on a terminal, a line now and then elsewhere; several threads may tell it of their work.

    Args:
        total: All work, in network calls; above 0 if any is told.
        shown: Whether there is a terminal.
        check: Called each time; may raise, to stop.
    """

    total: int
    shown: bool
    check: Callable[[], None]
    over: Event = field(default_factory=Event, init=False)
    _bar: tqdm = field(init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)
    _done: int = field(default=0, init=False)
    _started: float = field(default_factory=time.perf_counter, init=False)
    _spoken: float = field(default_factory=time.perf_counter, init=False)

    def __post_init__(self) -> None:
        """Draw the bar."""
        self._bar = tqdm(total=self.total, unit="call", unit_scale=True, disable=not self.shown, leave=False)

    def tell(self, name: str, calls: int) -> None:
        """So many calls of the piece of that name are done.

        Raises:
            Exception: Whatever ``check`` raises; or if other work has ended this.
        """
        with self._lock:
            self._done += calls
            self._bar.set_description(name, refresh=False)
            self._bar.update(calls)
            now = time.perf_counter()
            if not self.shown and now - self._spoken >= SPOKEN_EVERY and 0 < self._done < self.total:
                self._spoken = now
                left = _minutes((now - self._started) / self._done * (self.total - self._done))
                print(f"robustdiff: {name}: {self._done / self.total:.0%}, {left} left", file=sys.stderr)
        if self.over.is_set():
            raise _Over
        self.check()

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


@contextmanager
def metered(total: int, check: Callable[[], None]) -> Iterator[Meter]:
    """A meter for as long as the work takes."""
    meter = Meter(total, sys.stderr.isatty(), check)
    try:
        yield meter
    finally:
        meter.close()


def side_by_side(pieces: Sequence[Callable[[], None]], workers: int, over: Event) -> None:
    """Do all pieces, ``workers`` at a time, each with its share of torch's threads.

    Args:
        pieces: The work, the longest first, so that all end together.
        workers: How many at a time, >= 1; with 1 in the caller's thread.
        over: Set when a piece has failed or the caller is interrupted; pieces look at it and raise.

    Raises:
        Exception: That of the first piece that failed, after the others have ended.
    """
    workers = min(workers, len(pieces))
    if workers <= 1:
        for piece in pieces:
            piece()
        return

    def guarded(piece: Callable[[], None]) -> None:
        if over.is_set():
            raise _Over
        try:
            piece()
        except BaseException:
            over.set()
            raise

    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            running = [pool.submit(guarded, piece) for piece in pieces]
            try:
                for one in as_completed(running):
                    error = one.exception()
                    if error is not None and not isinstance(error, _Over):
                        raise error
            except BaseException:
                over.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
