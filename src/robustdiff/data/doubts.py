"""What a set of images is hardly meant to be, in one line each: a sliver of its range, animations that begin alike."""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from robustdiff.data.decode import FIRST_FRAME, Pixels
from robustdiff.data.decode_pool import decode_all
from robustdiff.data.pixel_values import SIXTEEN_BIT
from robustdiff.data.sources.base import Source, listed
from robustdiff.utils.errors import RobustdiffWarning

SLIVER = 64
"""Grey levels of 256: a whole set that spans no more is hardly meant so."""
LOOKED_AT = 4096
"""Pixels of an image that are looked at, about."""
ODD = 1000
"""One of so many may be anything: a dead pixel, a time stamp."""


class Doubts:
    """Looks at the images of a set one by one, and warns at the end."""

    def __init__(self, asked: str, source: Source) -> None:
        """Begin with nothing seen.

        Args:
            asked: What the user calls the set.
            source: What it is.
        """
        self.asked, self.source = asked, source
        self._allowed = max(1, len(source.names) // 10)  # images that span more, in a set that else does not
        self._wide = 0
        self._spans: list[tuple[int, int]] = []
        self._first_frames: Counter[int] = Counter()

    def look(self, image: Pixels, remarks: Sequence[str] = ()) -> None:
        """At one image, uint8 of any shape, and at what was remarked upon."""
        first_frame = FIRST_FRAME in remarks
        if first_frame or self._wide <= self._allowed:
            self._add(*_glance(image, digest=first_frame), first_frame=first_frame)

    def look_through(self, notes: Mapping[str, int], resolution: int | None) -> None:
        """At the images of the source, decoded for that, until nothing more can be learnt.

        Args:
            notes: How many images are converted, by kind of conversion.
            resolution: As in :func:`robustdiff.data.dataset.load_images`.
        """
        animated = notes.get(FIRST_FRAME, 0) > 1
        glance = partial(_glance, digest=animated)
        for decoded in decode_all(self.source, glance, resolution=resolution, what="looking"):
            if decoded.value is not None:
                self._add(*decoded.value, first_frame=FIRST_FRAME in decoded.remarks)
            if not animated and self._wide > self._allowed:
                return

    def _add(self, low: int, high: int, digest: int, *, first_frame: bool) -> None:
        if self._wide <= self._allowed:
            self._spans.append((low, high))
            self._wide += high - low > SLIVER
        if first_frame:
            self._first_frames[digest] += 1

    def _sliver(self, *, anywhere: bool) -> tuple[int, int, int] | None:
        """Darkest and brightest value of nearly all images, and how many they are, if that is a sliver.

        Args:
            anywhere: Whether it may lie anywhere, or only at the dark or the bright end.
        """
        lows, highs = np.array(self._spans).T
        inside = [(lows >= start) & (highs <= start + SLIVER) for start in range(256 - SLIVER)]
        best = max(inside if anywhere else (inside[0], inside[-1]), key=np.count_nonzero)
        count = int(best.sum())
        if count < len(lows) - (self._allowed if count > 1 else 0):
            return None
        return int(lows[best].min()), int(highs[best].max()), count

    def say(
        self, count: int, notes: Mapping[str, int], classes: Sequence[str] = (), labels: Tensor | None = None
    ) -> None:
        """Warn of what is hardly meant so.

        Args:
            count: How many images there are.
            notes: How many were converted, by kind of conversion.
            classes: Names of the classes.
            labels: Each image's place among them.
        """
        if self._spans and self._wide <= self._allowed and self.source.value_range is None:
            sliver = self._sliver(anywhere=SIXTEEN_BIT in notes)
            if sliver is not None:
                low, high, many = sliver
                every = f"all {count} images" if count > 1 else "the only image"
                which = every if many == count else f"{many} of {count} images"
                self._warn(
                    f"the pixels of {which} lie within {low} .. {high} of 0 .. 255: if other values are black and "
                    "white in them, say which with `value_range` LOW:HIGH (0:1 for masks, 0:4095 for 12 bit)"
                )
        alike = sum(many for many in self._first_frames.values() if many > 1)
        if alike:
            self._warn(
                f"{alike} of {sum(self._first_frames.values())} animations begin with the same picture as another, and "
                "only the first is read: write the frames that you want as files of their own"
            )
        if labels is not None and self.source.what == "folder":
            used = torch.bincount(labels, minlength=len(classes)).tolist()
            empty = [name for name, many in zip(classes, used, strict=True) if not many]
            if empty:
                self._warn(f"no image of class {listed(empty)} can be read; the class keeps its number")

    def _warn(self, text: str) -> None:
        warnings.warn(RobustdiffWarning(f"{self.asked}: {text}"), stacklevel=5)


def _glance(image: Pixels, *, digest: bool) -> tuple[int, int, int]:
    """Nearly the darkest and nearly the brightest value of an image, and a digest of all, if that is wanted."""
    step = 1 + image.size // LOOKED_AT
    some = np.sort(image.ravel("K")[:: step + (step % 3 == 0)])  # of all colours
    odd = some.size // ODD
    return int(some[odd]), int(some[-1 - odd]), zlib.crc32(np.ascontiguousarray(image).data) if digest else 0
