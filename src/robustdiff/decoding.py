"""One image file -> 8-bit pixels: guarded opening, and every conversion remarked upon.

Reading order: ``images.py`` decides which files to read and what must agree between them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""Pillow formats left out: EPS starts an external interpreter, the others have no decoder of their own."""
EXIF_ORIENTATION = 0x0112
TURNS = {number: Image.Transpose[name] for number, name in enumerate(
    ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), start=2
)}  # fmt: skip

T = TypeVar("T")
Pixels = NDArray[np.uint8]


def guarded(work: Callable[[ImageFile], T], folder: Path, name: str) -> tuple[T | None, str]:
    """(work(open image), "") or (None, reason)."""
    try:
        with _open(folder / name) as image:
            if 0 in image.size:
                raise OSError("zero size")
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            return work(image), ""
    except MemoryError:  # this machine's trouble, not the file's
        raise
    except Exception as error:  # decoders of damaged files raise nearly every type there is
        return None, reason(error)


def _open(path: Path) -> ImageFile:
    if path.stat().st_size == 0:
        raise OSError("empty file")
    Image.init()
    own = Image.registered_extensions().get(path.suffix.lower())
    # Formats without a signature would claim any binary file: they are tried only where the suffix asks for them.
    formats = [name for name, (_, accept) in Image.OPEN.items() if name not in NOT_DECODED and (accept or name == own)]
    return Image.open(path, formats=formats)


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


def header(image: ImageFile) -> tuple[str, tuple[int, ...]]:
    """Mode and (longer, shorter) side: which of them is the width, EXIF may still exchange."""
    return image.mode, tuple(sorted(image.size, reverse=True))


def decode(image: ImageFile, *, channels: int, resolution: int | None) -> tuple[Pixels, bool, list[str]]:
    """((C, H, W), grey by mode, remarks)."""
    remarks = []
    if getattr(image, "is_animated", False):
        remarks.append("first frame of an animation")
    if image.mode.startswith("I") or any(code in str(image.tile) for code in (";16B", ";16L", ";16N")):
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
    return fit(eight_bit, channels, resolution, remarks), grey, remarks


def _eight_bit(image: Image.Image, remarks: list[str]) -> Image.Image:
    """Mode L or RGB; alpha is composited over white."""
    mode = image.mode
    if mode == "F":
        raise OSError("floating-point pixels (mode F): convert the file to 8 bit first")
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise OSError("32-bit integer pixels outside 0..65535: convert the file to 8 bit first")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
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
