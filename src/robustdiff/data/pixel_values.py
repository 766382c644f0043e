"""Pixels of any mode and depth -> 8 bit, by what the file declares: scale, sign, transparency, colour profile."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robustdiff.data.colour_profile import SPACES, to_srgb
from robustdiff.data.tiff_samples import EXTRA_SAMPLES, FLOAT, PHOTOMETRIC, SIGNED, SampledTiff
from robustdiff.utils.errors import DataError

ValueRange: TypeAlias = "tuple[float, float]"
"""The values that are black and white."""

FLOATING = "floating-point pixels: say which values are black and white with `value_range`, as in 0:1"
SIXTEEN_BIT = "16-bit reduced to 8-bit"
UNUSED_ALPHA = ("BMP", "DIB", "TGA")
"""Formats whose writers declare transparency and leave it out: of 0 everywhere, it says nothing."""
SIXTEEN = (";16B", ";16L", ";16N")
"""Ends of Pillow's names of packed pixels of 16 bit."""


def parse_range(text: str) -> ValueRange:
    """``LOW:HIGH``, the values that are black and white.

    Raises:
        DataError: One line, if it is not that.
    """
    low, colon, high = text.partition(":")
    try:
        black, white = float(low), float(high)
        good = bool(colon) and black < white and abs(black) < 1e38 and abs(white) < 1e38
    except ValueError:
        good = False
    if not good:
        raise DataError(f"`value_range` {text!r} is not LOW:HIGH, the values of black and white, such as 0:4095")
    return black, white


class Reader:
    """The pixels of one open image in 8 bit.

    Made before anything is decoded, as Pillow forgets then what a file declares.

    Attributes:
        grey: Whether it has no colour. Of a palette it is known only when :meth:`eight_bit` has been called.
    """

    def __init__(self, image: Image.Image) -> None:
        """Look at what the file declares."""
        self.image = image
        self._packed = packed_as(image)
        self._stream: Any = getattr(image, "fp", None)
        self._tiff: Any = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
        self._opaque = self._alpha_is_none()
        self.grey = is_grey(image)

    def eight_bit(self, value_range: ValueRange | None, remarks: list[str]) -> Image.Image:
        """Mode L or RGB, in sRGB; transparency is composited over white.

        Args:
            value_range: The values that are black and white in files that can hold larger ones; None: what they
                declare.
            remarks: Takes a remark for every conversion.

        Raises:
            OSError: If the file has no values that can be told black and white without being told.
        """
        image, profile = self.image, self.image.info.get("icc_profile")
        deep = image.mode.startswith("I") or image.mode == "F"
        colours = self._packed.endswith(SIXTEEN) and image.format == "PNG"  # of TIFF: see ``tiff_samples.exact``
        wide = colours and (value_range is not None or isinstance(image.info.get("transparency"), tuple))
        alpha: Image.Image | None = None
        floating = image.mode == "F"
        if isinstance(image, SampledTiff):
            deep, floating = image.bits > 8, image.kind == FLOAT
            base, alpha = _of_samples(image, value_range)
        elif deep:
            base, alpha = self._deep(value_range)
        elif wide:
            base, alpha = self._colours_of_16_bit(value_range)
        else:
            base, alpha = self._shallow(value_range, remarks)
        if deep or self._packed.endswith(SIXTEEN):
            remarks.append("floating point reduced to 8-bit" if floating else SIXTEEN_BIT)
        base = to_srgb(base, profile, remarks)
        if alpha is not None:
            remarks.append("alpha composited over white")
            base = base.convert("RGB")
            base.putalpha(alpha)
            base = Image.alpha_composite(Image.new("RGBA", base.size, "white"), base)
        if image.mode in ("P", "PA"):
            self.grey = _colourless(base)
        wanted = "L" if self.grey else "RGB"
        return base if base.mode == wanted else base.convert(wanted)  # which copies even if there is nothing to do

    # -- transparency --------------------------------------------------------------------------------------

    def _alpha_is_none(self) -> bool:
        """Whether what Pillow takes for transparency is not declared as such."""
        if self._tiff is not None:
            return self.image.mode in ("RGBA", "LA", "PA") and EXTRA_SAMPLES not in self._tiff
        if self.image.format == "TGA":
            stream = self._stream
            place = stream.tell()
            stream.seek(17)
            declared = stream.read(1)[0] & 15
            stream.seek(place)
            return not declared
        return False

    def _transparent_value(self) -> Any:  # noqa: ANN401 - a number, a tuple or bytes
        """The value that PNG declares transparent, on the scale of the decoded pixels."""
        value = self.image.info.get("transparency")
        if self.image.format != "PNG" or value is None or isinstance(value, bytes):
            return value
        scale = {"L;2": 85, "L;4": 17, "1": 255}.get(self._packed, 1)
        return value * scale if isinstance(value, int) and self.image.mode in ("1", "L") else value

    # -- values --------------------------------------------------------------------------------------------

    def _deep(self, value_range: ValueRange | None) -> tuple[Image.Image, Image.Image | None]:
        """More than 8 bits without colour: mode L, and alpha."""
        image = self.image
        values = np.asarray(image)
        if image.format == "FITS":
            raise OSError("FITS of more than 8 bits: convert it to PNG first")
        if image.mode == "F" and value_range is None:
            raise OSError(FLOATING)
        transparent = self._transparent_value()
        alpha = None
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(values == transparent, np.uint8(0), np.uint8(255)))
        scaled = _scaled(values, 65535, value_range)
        white_is_zero = self._tiff is not None and self._tiff.get(PHOTOMETRIC) == 0
        if white_is_zero:  # Pillow sees to that up to 8 bits only
            np.subtract(255, scaled, out=scaled)
        return Image.fromarray(scaled), alpha

    def _shallow(self, value_range: ValueRange | None, remarks: list[str]) -> tuple[Image.Image, Image.Image | None]:
        """What Pillow gives in 8 bits or fewer: a mode that has a profile, and alpha."""
        image, mode, image_format = self.image, self.image.mode, self.image.format
        if mode == "1":
            remarks.append("1-bit expanded to 8-bit")
        elif mode in ("P", "PA"):
            remarks.append("palette expanded")
        elif mode not in ("L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX"):
            remarks.append(f"{mode} converted to RGB")
        alpha = None
        if image.has_transparency_data and not self._opaque:
            if "transparency" in image.info:
                image.info["transparency"] = self._transparent_value()
            rgba = image.convert("LA" if mode == "La" else "RGBA").convert("RGBA")
            alpha, image = rgba.getchannel("A"), rgba.convert("RGB")
            if image_format in UNUSED_ALPHA and alpha.getextrema() == (0, 0):
                alpha = None
        elif self._opaque:
            image = image.convert("L" if self.grey else "RGB")
        if image.mode not in SPACES:
            image = image.convert("L" if self.grey else "RGB")
        elif self.grey and image.mode == "RGB":
            image = image.convert("L")
        if value_range is not None and image.mode in ("L", "RGB") and value_range[1] <= 255:
            table = _scaled(np.arange(256), 255, value_range).tolist()
            image = image.point(table * len(image.getbands()))
        return image, alpha

    def _colours_of_16_bit(self, value_range: ValueRange | None) -> tuple[Image.Image, Image.Image | None]:
        """PNG that Pillow would halve in depth: its high bytes, and decoded once more as if they stood last."""
        high = np.asarray(self.image)
        if self.grey:  # with alpha; the four bytes are those of a colour
            pair = np.asarray(self._decoded_as("RGBA"))
            alpha, values = Image.fromarray(pair[..., 2]), (pair[..., :1].astype(np.uint16) << 8) | pair[..., 1:2]
            return Image.fromarray(_scaled(values, 65535, value_range)[..., 0]), alpha
        values = (high[..., :3].astype(np.uint16) << 8) | np.asarray(self._decoded_as(f"{self._packed[:-1]}L"))[..., :3]
        base = Image.fromarray(_scaled(values, 65535, value_range))
        if self.image.mode == "RGBA":
            return base, Image.fromarray(high[..., 3])
        transparent = self.image.info.get("transparency")
        if transparent is None:
            return base, None
        return base, Image.fromarray(np.where((values == transparent).all(-1), np.uint8(0), np.uint8(255)))

    def _decoded_as(self, packed: str) -> Image.Image:
        """The image decoded as if its pixels lay otherwise."""
        self._stream.seek(0)
        second: Any = Image.open(self._stream, formats=[str(self.image.format)])
        second.tile = [tile._replace(args=packed) for tile in second.tile]
        return second  # type: ignore[no-any-return]


def _of_samples(image: SampledTiff, value_range: ValueRange | None) -> tuple[Image.Image, Image.Image | None]:
    """A TIFF that Pillow has no mode for: mode L, RGB or CMYK, and alpha."""
    if image.kind == FLOAT and value_range is None:
        raise OSError(FLOATING)
    numbers, colours, alpha = image.numbers(), image.colours, None
    full = 2 ** (image.bits - (image.kind == SIGNED)) - 1 if image.bits <= 16 else 65535
    scaled = _scaled(numbers[..., :colours], full, value_range)
    if image.alpha:
        alpha = _scaled(numbers[..., colours], full, value_range if image.kind == FLOAT else None)
        if image.alpha == 1:  # multiplied in
            shares = np.maximum(alpha, 1)[..., None].astype(np.float32) / 255
            scaled = np.clip(np.rint(scaled / shares), 0, 255).astype(np.uint8)
    if image.white_is_zero:
        np.subtract(255, scaled, out=scaled)
    base = Image.fromarray(scaled[..., 0]) if colours == 1 else Image.fromarray(scaled, image.mode)
    return base, None if alpha is None else Image.fromarray(alpha)


def packed_as(image: Image.Image) -> str:
    """Pillow's name of how pixels lie in the file; "" if its decoder needs none, or they are decoded already."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ""
    name = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return name if isinstance(name, str) else ""


def is_grey(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has no colour; of a palette that is not known."""
    grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    return grey or packed_as(image).startswith("LA;")  # 16 bit with alpha, which Pillow makes RGBA of


def _colourless(image: Image.Image) -> bool:
    """Whether all channels of a decoded image are equal."""
    pixels = np.asarray(image)[..., :3]
    return bool((pixels == pixels[..., :1]).all())


def _scaled(values: NDArray[Any], full: int, value_range: ValueRange | None) -> NDArray[np.uint8]:
    """0..255 of values that may reach ``full``: rounded to the nearest.

    Raises:
        OSError: If they lie outside what is declared.
    """
    if value_range is not None and value_range[0] < full:
        low, high = value_range[0], min(value_range[1], full) if values.dtype.kind != "f" else value_range[1]
        if high > low:
            if not np.isfinite(values).all():
                raise OSError("pixels that are no finite numbers: convert the file to 8 bit first")
            shares = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
            return np.clip(np.rint(shares, out=shares), 0, 255, out=shares).astype(np.uint8)
    if values.min() < 0 or values.max() > full:
        raise OSError(f"pixels outside 0..{full}: say which values are black and white with `value_range` LOW:HIGH")
    wide = values.astype(np.uint32)  # in place from here on: there may be 89 million
    wide *= 255
    wide += full // 2
    wide //= full
    return wide.astype(np.uint8)
