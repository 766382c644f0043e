"""One image, a file or bytes or an array -> 8-bit pixels: guarded opening, and every conversion remarked upon.

``sources/`` says where images come from, ``dataset.py`` what must agree between them; ``file_kinds.py`` refuses files,
``intact.py`` finds damaged ones, ``pixel_values.py`` makes 8 bit of what is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from robustdiff.data import file_kinds, intact, tiff_samples
from robustdiff.data.pixel_values import Reader, ValueRange, is_grey

NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""Pillow formats left out: EPS starts an external interpreter, the others have no decoder of their own."""
SIGNED = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PSD", "TIFF", "WEBP"}
"""Formats whose first bytes no other file has by chance."""
EXIF_ORIENTATION = 0x0112
FIRST_FRAME = "first frame of an animation"
DAMAGED = "damaged: its pixels cannot be decoded"
TURNS = {number: Image.Transpose[name] for number, name in enumerate(
    ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), start=2
)}  # fmt: skip

ON_THEIR_SIDE = {turn for number, turn in TURNS.items() if number >= 5}
"""Turns that exchange width and height."""

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


def guarded(
    work: Callable[[Image.Image], T], read: Callable[[int], Item], index: int, *, whole: bool = True
) -> tuple[T | None, str]:
    """(work(open image), "") or (None, reason).

    Args:
        work: Takes an image that is not loaded yet.
        read: Gives the item of a place.
        index: That place.
        whole: Whether to check the file as a whole, and not only its head.
    """
    try:
        with (_open if whole else _open_head)(read(index)) as image:
            if 0 in image.size:
                raise OSError("zero size")
            pixels = image.width * image.height
            limit = min(Image.MAX_IMAGE_PIXELS or pixels, LIMITS.get(image.format or "", pixels))
            if pixels > limit:
                raise OSError(_too_large(limit))
            with _one_large if pixels > LARGE else contextlib.nullcontext():
                return work(image), ""
    except MemoryError:  # this machine's trouble, not the file's
        raise
    except Exception as error:  # decoders of damaged files raise nearly every type there is
        return None, reason(error)


def _too_large(limit: int | None) -> str:
    return f"more than {limit} pixels: make it smaller first, if it is a picture and no decompression bomb"


@contextlib.contextmanager
def _open(item: Item) -> Iterator[Image.Image]:
    """An image whose file is whole; raises at the end if the decoder has left some of it over."""
    if isinstance(item, np.ndarray):
        yield Image.fromarray(item[..., 0] if item.shape[2] == 1 else item)
        return
    with _file(item) as (file, name, head):
        stream = intact.whole(file, head)
        with _identified(stream, name, head) as image:
            intact.check_strips(image, stream)
            if not isinstance(stream, intact.Stream):
                yield image
                return
            if stream.profile:
                image.info["icc_profile"] = stream.profile
            stream.begin_pixels()
            # In few pieces: decoders go slowly where one ends.
            image.decodermaxblock = intact.PIECE  # type: ignore[attr-defined]
            try:
                yield image
            except OSError as error:  # its end is there
                if stream.hold >= 0 and CUT.search(str(error)):
                    raise OSError(intact.PIECE_MISSING) from None
                raise
            intact.check_rows(image, stream)
        stream.check_read()


@contextlib.contextmanager
def _open_head(item: Item) -> Iterator[Image.Image]:
    """An image of which nothing but mode and size will be asked."""
    if isinstance(item, np.ndarray):
        yield Image.fromarray(item[..., 0] if item.shape[2] == 1 else item)
        return
    with _file(item) as (file, name, head):
        is_png = head.startswith(intact.PNG_SIGNATURE)
        with _identified(intact.png(file, pixels=False) if is_png else file, name, head) as image:
            yield image


@contextlib.contextmanager
def _file(item: Path | bytes) -> Iterator[tuple[BinaryIO, str, bytes]]:
    """A file at its start, its name, its first bytes; refused if its kind cannot be read.

    Open, and not a path: Pillow would map files of some formats into memory, and turn them wrongly (TIFF whose
    orientation is 5 to 8).
    """
    with io.BytesIO(item) if isinstance(item, bytes) else item.open("rb") as file:
        name, head = item.name if isinstance(item, Path) else "", file.read(file_kinds.HEAD)
        if not head:
            raise OSError("empty file")
        file_kinds.refuse(name, head)
        file.seek(0)
        yield file, name, head


def _identified(stream: BinaryIO, name: str, head: bytes) -> Image.Image:
    image: Image.Image | None = None
    try:
        image = Image.open(stream, formats=_formats(name, head))
    except UnidentifiedImageError:
        if not _signed(head):
            file_kinds.refuse_name(name)
            raise
        if not head.startswith(tiff_samples.STARTS):
            raise OSError(DAMAGED) from None
    if image is None or tiff_samples.misread(image):
        stream.seek(0)
        try:
            image = tiff_samples.SampledTiff(stream)
        except (SyntaxError, ValueError):  # what Pillow makes of all that may be wrong in a head
            raise OSError(DAMAGED) from None
    file_kinds.refuse_thumbnail(image)
    return image


def _formats(name: str, head: bytes) -> list[str]:
    """Which formats a file may be of."""
    Image.init()
    for start, one in ((intact.JPEG_SIGNATURE, "JPEG"), (intact.PNG_SIGNATURE, "PNG")):
        if head.startswith(start):
            return [one]
    own = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    # Formats without a signature would claim any binary file: they are tried only where the suffix asks for them.
    return [one for one, (_, accept) in Image.OPEN.items() if one not in NOT_DECODED and (accept or one == own)]


def _signed(head: bytes) -> bool:
    """Whether a file begins as an image."""
    accepts = (Image.OPEN[one][1] for one in SIGNED if one in Image.OPEN)
    return any(accept is not None and bool(accept(head[:16])) for accept in accepts)


CUT = re.compile(r"truncated|not enough (image )?data|unexpected end", re.IGNORECASE)
BROKEN = re.compile(
    r"decoder error|broken data|data stream|cannot load this image|buffer overrun|could not create decoder|next frame|"
    r"failed to decode|codec configuration|encoding error|bad header checksum|broken png",
    re.IGNORECASE,
)
"""What decoders say of files that are cut off, and of damaged ones."""


def reason(error: Exception) -> str:
    """Why a file could not be read, without its path and without numbers, so that reasons can be counted."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(Image.MAX_IMAGE_PIXELS)
    if isinstance(error, OSError) and error.strerror:  # without the path that str(error) carries
        return error.strerror.lower()
    text = " ".join(str(error).split()) or type(error).__name__
    return intact.CUT_OFF if CUT.search(text) else DAMAGED if BROKEN.search(text) else text


def is_image_name(name: str) -> bool:
    """Whether the suffix is that of a format tried here, or of a kind of image that is refused."""
    kind = Image.registered_extensions().get(PurePosixPath(name).suffix.lower())
    return (kind in Image.OPEN and kind not in NOT_DECODED) or file_kinds.known(name)


def is_image(item: Item) -> bool:
    """Whether a file that cannot be read is one of an image, by its name or its content."""
    if not isinstance(item, Path) or is_image_name(item.name):
        return True
    try:
        with item.open("rb") as file:
            head = file.read(file_kinds.HEAD)
            return file_kinds.recognised(head) or _signed(head)
    except OSError:
        return False


def header(image: Image.Image, *, crop: int | None) -> tuple[bool, tuple[int, ...]]:
    """Whether it has no colour, and (longer, shorter) side: which of them is the width, EXIF may still exchange."""
    return is_grey(image), (crop, crop) if crop else tuple(sorted(image.size, reverse=True))


def decode(
    image: Image.Image,
    *,
    channels: int | None,
    resolution: int | None,
    crop: int | None,
    value_range: ValueRange | None = None,
) -> tuple[Pixels, bool, list[str]]:
    """((C, H, W), grey, remarks).

    Args:
        image: Opened, not yet loaded.
        channels: 1 or 3; None leaves them as they are.
        resolution: Side in pixels; None leaves the size alone.
        crop: Side in pixels of the centre square that is cut out before anything else; None = all.
        value_range: Values of black and white; None: as the file declares.
    """
    remarks = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photograph and a smaller copy of it
        remarks.append(FIRST_FRAME)
    if value_range is not None:
        image = tiff_samples.exact(image)
    reader = Reader(image)
    image.load()  # a truncated file fails here
    turn = turn_of(image)  # after load: Pillow turns TIFF files itself and then clears the tag
    eight_bit = reader.eight_bit(value_range, remarks)
    if turn is not None:
        remarks.append("EXIF rotation applied")
        eight_bit = eight_bit.transpose(turn)
    if crop is not None:
        if min(eight_bit.size) < crop:
            raise OSError(f"smaller than the centre crop of {crop} pixels")
        eight_bit = _centre(eight_bit, crop)
    return fit(eight_bit, channels or (1 if reader.grey else 3), resolution, remarks), reader.grey, remarks


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How an image is to be turned before it is shown, as its metadata say; None: as it is."""
    try:
        return TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # unreadable metadata are no reason to lose the picture
        return None


def _centre(image: Image.Image, side: int) -> Image.Image:
    """The centre square, its pixels copied."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


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
        else:
            image = _centre(image, resolution)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
