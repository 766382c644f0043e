"""One image, a file or bytes or an array -> 8-bit pixels: guarded opening, and every conversion remarked upon.

``sources/`` says where images come from, ``dataset.py`` what must agree between them.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""Pillow formats left out: EPS starts an external interpreter, the others have no decoder of their own."""
EXIF_ORIENTATION = 0x0112
TURNS = {number: Image.Transpose[name] for number, name in enumerate(
    ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), start=2
)}  # fmt: skip

with contextlib.suppress(OSError, AttributeError):  # a Pillow whose libtiff is out of reach
    # libtiff writes on stderr what is wrong with a damaged file; whoever skips it has the reason.
    _set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler  # type: ignore[attr-defined]
    _set_handler.argtypes, _set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    _set_handler(None)

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors, which the reasons tell, go to stderr

LIMITS = {"JPEG2000": 2**25}
"""Pixels allowed of formats whose decoders take more than 30 bytes for each; Pillow's own limit holds for all."""
LARGE = 2**24
"""Pixels above which images are decoded one at a time: several threads at once could fill the memory."""
_one_large = threading.Lock()

T = TypeVar("T")
Pixels = NDArray[np.uint8]
Item: TypeAlias = "Path | bytes | Pixels"
"""What a source hands out: a file, an encoded image, or pixels of shape (H, W, C) with C = 1 or 3."""


def guarded(work: Callable[[Image.Image], T], read: Callable[[int], Item], index: int) -> tuple[T | None, str]:
    """(work(open image), "") or (None, reason)."""
    try:
        with _open(read(index)) as image:
            if 0 in image.size:
                raise OSError("zero size")
            pixels = image.width * image.height
            limit = min(Image.MAX_IMAGE_PIXELS or pixels, LIMITS.get(image.format or "", pixels))
            if pixels > limit:
                raise OSError(f"more than {limit} pixels: may be a decompression bomb")
            with _one_large if pixels > LARGE else contextlib.nullcontext():
                return work(image), ""
    except MemoryError:  # this machine's trouble, not the file's
        raise
    except Exception as error:  # decoders of damaged files raise nearly every type there is
        return None, reason(error)


@contextlib.contextmanager
def _open(item: Item) -> Iterator[Image.Image]:
    if isinstance(item, np.ndarray):
        yield Image.fromarray(item[..., 0] if item.shape[2] == 1 else item)
        return
    if not (len(item) if isinstance(item, bytes) else item.stat().st_size):
        raise OSError("empty file")
    Image.init()
    own = None if isinstance(item, bytes) else Image.registered_extensions().get(item.suffix.lower())
    # Formats without a signature would claim any binary file: they are tried only where the suffix asks for them.
    formats = [name for name, (_, accept) in Image.OPEN.items() if name not in NOT_DECODED and (accept or name == own)]
    with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item, formats=formats) as image:
        yield image


def reason(error: Exception) -> str:
    """Why a file could not be read, without its path and without numbers, so that reasons can be counted."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels: may be a decompression bomb"
    if isinstance(error, OSError) and error.strerror:  # without the path that str(error) carries
        return error.strerror.lower()
    text = " ".join(str(error).split()) or type(error).__name__
    return "truncated" if "truncated" in text.lower() else text  # without byte counts, so that reasons can be counted


def is_image_name(name: str) -> bool:
    """Whether the suffix is that of a format tried here."""
    kind = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    return kind in Image.OPEN and kind not in NOT_DECODED


def is_grey(mode: str) -> bool:
    """Whether a Pillow mode has no colour."""
    return mode in ("1", "L", "LA", "La", "I") or mode.startswith("I;16")


def header(image: Image.Image, *, crop: int | None) -> tuple[str, tuple[int, ...]]:
    """Mode and (longer, shorter) side: which of them is the width, EXIF may still exchange."""
    return image.mode, (crop, crop) if crop else tuple(sorted(image.size, reverse=True))


def decode(
    image: Image.Image, *, channels: int | None, resolution: int | None, crop: int | None
) -> tuple[Pixels, bool, list[str]]:
    """((C, H, W), grey by mode, remarks).

    Args:
        image: Opened, not yet loaded.
        channels: 1 or 3; None leaves them as they are.
        resolution: Side in pixels; None leaves the size alone.
        crop: Side in pixels of the centre square that is cut out before anything else; None = all.
    """
    remarks = []
    if getattr(image, "is_animated", False):
        remarks.append("first frame of an animation")
    tile = str(getattr(image, "tile", ""))
    if image.mode.startswith("I") or any(code in tile for code in (";16B", ";16L", ";16N")):
        remarks.append("16-bit reduced to 8-bit")  # Pillow itself reduces colour, so its mode does not tell
    grey = is_grey(image.mode)
    image.load()  # a truncated file fails here
    try:  # after load: Pillow turns TIFF files itself and then clears the tag
        turn = TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # unreadable metadata are no reason to lose the picture
        turn = None
    eight_bit = _eight_bit(image, remarks)
    if turn is not None:
        remarks.append("EXIF rotation applied")
        eight_bit = eight_bit.transpose(turn)
    if crop is not None:
        if min(eight_bit.size) < crop:
            raise OSError(f"smaller than the centre crop of {crop} pixels")
        left, top = (eight_bit.width - crop) // 2, (eight_bit.height - crop) // 2
        eight_bit = eight_bit.crop((left, top, left + crop, top + crop))
    return fit(eight_bit, channels or (1 if grey else 3), resolution, remarks), grey, remarks


def _eight_bit(image: Image.Image, remarks: list[str]) -> Image.Image:
    """Mode L or RGB; alpha is composited over white."""
    mode = image.mode
    if mode == "F":
        raise OSError("floating-point pixels (mode F): convert the file to 8 bit first")
    if mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise OSError("32-bit integer pixels outside 0..65535: convert the file to 8 bit first")
        values = values.astype(np.uint32)  # in place from here on: there may be 89 million
        values *= 255
        values += 32767
        values //= 65535
        return Image.fromarray(values.astype(np.uint8))
    if mode == "1":
        remarks.append("1-bit expanded to 8-bit")
    elif mode in ("P", "PA"):
        remarks.append("palette expanded")
    elif mode not in ("L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX"):
        remarks.append(f"{mode} converted to RGB")
    if image.has_transparency_data:
        remarks.append("alpha composited over white")
        rgba = image.convert("LA" if mode == "La" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    return image.convert("L" if is_grey(mode) else "RGB")


def fit(image: Image.Image, channels: int, resolution: int | None, remarks: list[str]) -> Pixels:
    """The image, mode L or RGB, in the wanted channels and size: (C, H, W)."""
    wanted = "L" if channels == 1 else "RGB"
    if image.mode != wanted:
        remarks.append("grey expanded to RGB" if wanted == "RGB" else "colour reduced to grey")
        image = image.convert(wanted)
    if resolution is not None and image.size != (resolution, resolution):
        if image.width != image.height:
            remarks.append("cropped to a square")
        if min(image.size) != resolution:
            remarks.append("enlarged" if min(image.size) < resolution else "reduced")
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
