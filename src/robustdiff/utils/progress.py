"""How far a long piece of work is: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

EVERY = 10.0
"""Seconds between lines."""


@contextmanager
def progress(what: str, total: int, unit: str, *, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """Tell people how far it is, on standard error.

    Args:
        what: The work.
        total: Pieces there are.
        unit: What a piece is called.
        shown: Whether anything is said: one of several processes speaks.

    Yields:
        What is to be told of pieces that were done since the last call.
    """
    terminal = sys.stderr.isatty()
    lines = _Lines(what, total, unit)
    with tqdm(total=total, unit=unit, desc=what, disable=not (shown and terminal), leave=False) as bar:
        yield lines if shown and not terminal else bar.update


class _Lines:
    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done, self.said = 0, time.monotonic()

    def __call__(self, pieces: int) -> None:
        self.done += pieces
        if time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            print(f"{self.what}: {self.done} of {self.total} {self.unit}s", file=sys.stderr, flush=True)
