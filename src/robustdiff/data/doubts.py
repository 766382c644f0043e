"""What a set of images is hardly meant to be, told in one line each: nearly black, animations that begin alike."""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from robustdiff.data.decode import FIRST_FRAME, Pixels
from robustdiff.data.pixel_values import SIXTEEN_BIT
from robustdiff.data.sources.base import Source, listed
from robustdiff.utils.errors import RobustdiffWarning

SLIVER = 64
"""Grey levels of 256: a whole set that spans no more is hardly meant so."""


class Doubts:
    """Looks at the images of a set one by one, and warns at the end.

    Attributes:
        low: The darkest value so far.
        high: The brightest value so far; looked for until the two are far enough apart.
    """

    def __init__(self, asked: str, source: Source) -> None:
        """Begin with nothing seen.

        Args:
            asked: What the user calls the set.
            source: What it is.
        """
        self.asked, self.source = asked, source
        self.low, self.high = 255, 0
        self._first_frames: Counter[int] = Counter()

    def look(self, image: Pixels, remarks: Sequence[str] = ()) -> None:
        """At one image, uint8 of any shape, and at what was remarked upon."""
        if self.high - self.low <= SLIVER:
            self.low, self.high = min(self.low, int(image.min())), max(self.high, int(image.max()))
        if FIRST_FRAME in remarks:
            self._first_frames[zlib.crc32(np.ascontiguousarray(image).data)] += 1

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
        # 8-bit pixels that are all alike hold no more.
        dark = self.low < self.high <= SLIVER or (SIXTEEN_BIT in notes and self.high - self.low <= SLIVER)
        if dark and self.source.value_range is None:
            self._warn(
                f"the pixels of all {count} images lie within {self.low} .. {self.high} of 0 .. 255: if other values "
                "are black and white in them, say which with `value_range` LOW:HIGH (0:1 for masks, 0:4095 for 12 bit)"
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
