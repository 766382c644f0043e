"""Every image of a source, decoded by threads, in order; whatever cannot be decoded comes with its reason."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from robustdiff.data import decode
from robustdiff.data.decode import Pixels
from robustdiff.data.file_evidence import FileEvidence, file_evidence
from robustdiff.data.sources.open import Source
from robustdiff.utils.resources import cores, rank

CHUNK = 256
"""Images decoded at a time: bounds what waits in memory beside the array that is being filled."""

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Decoded(Generic[T]):
    """What became of one image of a source.

    Attributes:
        index: Its place in the source.
        name: Its name there.
        value: What the work made of its pixels; None if it cannot be read.
        reason: Why it cannot be read; "" otherwise.
        grey: Whether the file has no colour.
        remarks: Conversions that were applied.
        file: What its file says of itself; None if it cannot be read, or is not in one.
    """

    index: int
    name: str
    value: T | None
    reason: str
    grey: bool
    remarks: list[str]
    file: FileEvidence | None


def decode_all(
    source: Source,
    work: Callable[[Pixels], T],
    *,
    channels: int | None = None,
    resolution: int | None = None,
    indices: Sequence[int] | None = None,
    what: str = "decoding",
) -> Iterator[Decoded[T]]:
    """Decode every image and hand its pixels to ``work`` in the thread that decoded them; nothing is kept.

    Args:
        source: Where images come from.
        work: Takes uint8 pixels, (C, H, W); runs in several threads at once.
        channels: 1 or 3; None leaves each image's own.
        resolution: As in :func:`load_images`.
        indices: Places in the source. Default: all.
        what: Title of the progress bar.

    Yields:
        One :class:`Decoded` per image, in order.
    """

    def worked(image: Image.Image) -> tuple[T, bool, list[str], FileEvidence | None]:
        pixels, grey, remarks = decode.decode(
            image, channels=channels, resolution=resolution, crop=source.crop, value_range=source.value_range
        )
        turned = image.format is not None and decode.turn_of(image) in decode.ON_THEIR_SIDE
        return work(pixels), grey, remarks, file_evidence(image, turned)

    for place, (done, reason) in in_parallel(source, worked, indices, what):
        value, grey, remarks, file = (None, False, [], None) if done is None else done
        yield Decoded(place, source.names[place], value, reason, grey, remarks, file)


def in_parallel(
    source: Source, work: Callable[[Image.Image], T], indices: Sequence[int] | None, what: str, *, whole: bool = True
) -> Iterator[tuple[int, tuple[T | None, str]]]:
    """Work on every image of a source, or on those at ``indices``; ``whole`` as for :func:`decode.guarded`.

    Yields:
        (place, (work(open image), "") or (None, reason)) in order, computed by threads a chunk at a time.
    """
    places = range(len(source.names)) if indices is None else indices
    # Each thread's linear algebra in that thread: if each started threads of its own, all would wait for one another.
    with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
        # Pillow's bomb warning is replaced by the check in decoding.guarded; its remarks on metadata concern nobody.
        warnings.filterwarnings("ignore", module="PIL")
        one = partial(decode.guarded, work, source.read, whole=whole)
        starts = range(0, len(places), CHUNK)
        results = (
            result for start in starts for result in _mapped(one, places[start : start + CHUNK], min(8, cores()))
        )
        yield from zip(places, progress_bar(results, len(places), what), strict=True)


def _mapped(work: Callable[[S], T], items: Sequence[S], threads: int) -> list[T]:
    """``work`` of each item, in order.

    Not an executor's ``map``: it waits for its threads, as the interpreter's end does, and one may hang in a read.
    """
    jobs: SimpleQueue[tuple[Future[T], S]] = SimpleQueue()
    done: list[Future[T]] = []

    def waiting() -> Iterator[tuple[Future[T], S]]:
        with suppress(Empty):
            while True:
                yield jobs.get_nowait()

    def some() -> None:
        for result, item in waiting():
            try:
                result.set_result(work(item))
            except BaseException as error:
                result.set_exception(error)

    for item in items:
        done.append(Future())
        jobs.put((done[-1], item))
    for _ in range(min(threads, len(items))):
        Thread(target=some, daemon=True).start()
    try:
        return [result.result() for result in done]
    finally:
        for _ in waiting():  # after an error nobody wants the rest
            pass


def progress_bar(items: Iterable[T], total: int, what: str, least: int = 1000) -> Iterable[T]:
    """``items``, with a progress bar where it is worth one: more than ``least``, on a terminal, first process."""
    shown = total > least and sys.stderr.isatty() and rank() == 0
    return tqdm(items, what, total, unit="image") if shown else items
