"""What an image file says of itself, beside its pixels: how it was compressed, how large it was, what it carries.

Read from the head that is open anyway; nothing is decoded for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Table = tuple[int, ...]

# fmt: off
_BRIGHTNESS = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)
_COLOUR = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99,
) + 32 * (99,)
# fmt: on
LARGEST = 255
"""Of a table of 8 bit, which libjpeg keeps to on request: tables are compared as if all did."""
SUBSAMPLING = {
    (1, 1): "4:4:4",
    (2, 1): "4:2:2",
    (2, 2): "4:2:0",
    (1, 2): "4:4:0",
    (4, 1): "4:1:1",
    (4, 2): "4:1:0",
}
"""By how many pixels, across and down, share one colour."""


@dataclass(frozen=True, slots=True)
class FileEvidence:
    """What a file says.

    Attributes:
        format: Pillow's name of it: ``JPEG``, ``PNG``.
        mode: Pillow's name of how it holds pixels: ``RGB``, ``CMYK``, ``P``.
        size: (H, W) in pixels as it is shown, before anything is cropped or resized.
        quality: Of a JPEG, 1 to 100, by its quantisation tables as libjpeg scales them; None of others.
        exact: Whether the tables are those of that quality; if not, they are nearest to them.
        subsampling: Of a JPEG with colour: ``4:4:4``, ``4:2:2``, ``4:2:0``, ``4:4:0``, ``4:1:1``, ``4:1:0``, ``other``.
        animated: Whether it has more frames than the one that is read.
        alpha: Whether it can hold transparency.
        profile: Whether it has a colour profile.
        exif: Whether it has EXIF data.
    """

    format: str
    mode: str
    size: tuple[int, int]
    quality: int | None = None
    exact: bool = False
    subsampling: str | None = None
    animated: bool = False
    alpha: bool = False
    profile: bool = False
    exif: bool = False

    def as_json(self) -> dict[str, Any]:
        """For ``audit.json``: what is false or unknown is left out."""
        said = {key: value for key, value in asdict(self).items() if value not in (None, False)}
        return said | {"size": list(self.size)} | ({} if self.quality is None else {"exact": self.exact})


def file_evidence(image: Image.Image, turned: bool = False) -> FileEvidence | None:
    """What the file behind an image says; None if there is no file behind it.

    Args:
        image: Opened by Pillow, loaded or not.
        turned: Whether it is shown with width and height exchanged.
    """
    if not image.format:
        return None
    width, height = reversed(image.size) if turned else image.size
    layers = getattr(image, "layer", None) or ()  # of JPEG: (component, across, down, number of its table) each
    quality, exact = _quality_of(getattr(image, "quantization", None) or {}, layers)
    return FileEvidence(
        format=image.format,
        mode=image.mode,
        size=(height, width),
        quality=quality,
        exact=exact,
        subsampling=_subsampling(layers),
        animated=image.format != "MPO" and bool(getattr(image, "is_animated", False)),  # a photograph and its previews
        alpha=image.has_transparency_data,
        profile=bool(image.info.get("icc_profile")),
        exif=bool(image.info.get("exif")) or EXIF_TAG in getattr(image, "tag_v2", ()),
    )


EXIF_TAG = 34665
"""Where TIFF has EXIF data."""


def jpeg_quality(brightness: Sequence[int], colour: Sequence[int] | None = None) -> tuple[int, bool]:
    """The quality that libjpeg scales its standard tables to these for, and whether exactly so.

    The nearest is that whose table of the brightness has the nearest numbers, as ratios.

    Args:
        brightness: Quantisation table in natural order, 64 numbers.
        colour: That of the colours, if there are any.
    """
    return _scaled_by(tuple(brightness), None if colour is None else tuple(colour))


@lru_cache(maxsize=1024)
def _scaled_by(brightness: Table, colour: Table | None) -> tuple[int, bool]:
    asked = np.minimum(brightness, LARGEST)
    away = np.abs(np.log(np.maximum(asked, 1) / _scaled(_BRIGHTNESS))).sum(1)
    best = int(away.argmin())
    same = away[best] == 0
    if colour is not None:
        same &= bool((np.minimum(colour, LARGEST) == _scaled(_COLOUR)[best]).all())
    return best + 1, bool(same)


@lru_cache
def _scaled(table: Table) -> NDArray[np.int64]:
    """A standard table at each quality from 1 on, shape (100, 64), as libjpeg's ``jpeg_add_quant_table`` makes it."""
    quality = np.arange(1, 101)
    per_cent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return ((np.array(table) * per_cent[:, None] + 50) // 100).clip(1, LARGEST)


def _quality_of(tables: Mapping[int, Sequence[int]], layers: Sequence[Sequence[int]]) -> tuple[int | None, bool]:
    """Quality and whether it is exact, by the tables of brightness and first colour; no quality without the former."""
    numbers = dict.fromkeys(layer[3] for layer in layers[:2])  # one where the colours have no table of their own
    used = [tables.get(number) for number in numbers]
    if not used or any(table is None or len(table) != 64 for table in used):
        return None, False
    brightness, *colours = (table for table in used if table is not None)
    return jpeg_quality(brightness, *colours)


def _subsampling(layers: Sequence[Sequence[int]]) -> str | None:
    """Of brightness and two colours, and perhaps black; None if there are fewer."""
    if len(layers) < 3:
        return None
    (across, down), *colours = (tuple(layer[1:3]) for layer in layers[:3])
    if colours[0] != colours[1] or 0 in colours[0] or across % colours[0][0] or down % colours[0][1]:
        return "other"
    return SUBSAMPLING.get((across // colours[0][0], down // colours[0][1]), "other")
