"""Whether the file of an image is whole, by what its format itself can tell: checksums, end markers, rows.

Decoders are lenient: the rest of a broken download becomes black or grey rows. Here that is an error. And what has
nothing to do with the pixels, text and other metadata, is kept from the decoder: it costs no picture.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from PIL import Image

CUT_OFF = "cut off"
PIECE_MISSING = "damaged: a piece of its pixels is missing or wrong"
CHECKSUM = "damaged: a checksum of its pixels is wrong"

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"tRNS", b"eXIf", b"acTL", b"fcTL")
"""Chunks that are not critical and say how the picture looks; all others are metadata."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps to the right and down, of the passes of an interlaced PNG."""
LARGEST_PROFILE = 2**24
"""Bytes of a colour profile in PNG: a larger one is ignored."""
PIECE = 2**20
"""Bytes that are inflated at a time: a file of a megabyte may swell to a gigabyte."""
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""The first marker after the pixels of a JPEG that is no restart."""
PADDING = b"\xfe" * 16
"""Put where a JPEG ends: the decoder looks ahead that far, and as pixels it is enough for a block or two."""
SPARE = 32
"""Bytes that may be left in a JPEG when all its rows are there: some cameras write a few too many."""
ZEROS = bytes(64)
"""Compressed pixels hold so many zeros only where a picture is flat, and if its code for that is zeros."""


class Stream(io.BytesIO):
    """A file in memory whose reader may stop before the end, and then has found all rows too early."""

    def __init__(self, data: bytes, hold: int = -1, profile: bytes | None = None) -> None:
        """Begin at the start.

        Args:
            data: What the decoder is to see.
            hold: A reader that ends up to here has left pixels over; -1: that is not known.
            profile: Colour profile that was taken out.
        """
        super().__init__(data)
        self.hold, self.profile = hold, profile

    def read(self, size: int | None = -1) -> bytes:
        """As any file, but in two parts, before and after ``hold``."""
        left = self.hold - self.tell()
        if left > 0:
            size = left if size is None or size < 0 else min(size, left)
        return super().read(size)

    def check_read(self) -> None:
        """After decoding: whether it was read to its end.

        Raises:
            OSError: If there was more in it than the rows that it declares.
        """
        if self.tell() <= self.hold:
            raise OSError(PIECE_MISSING)


def whole(data: bytes) -> Stream:
    """What a decoder is to see of a file.

    Raises:
        OSError: If the file is cut off or damaged.
    """
    if data.startswith(PNG_SIGNATURE):
        return png(io.BytesIO(data), pixels=True)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_webp(data)
    unended = data.startswith(b"qoif") and not data.endswith(bytes(7) + b"\x01")
    if unended or (data[4:12] in (b"ftypavif", b"ftypavis") and data.endswith(ZEROS)):
        raise OSError(CUT_OFF)
    return Stream(data)


def png(file: BinaryIO, *, pixels: bool) -> Stream:
    """A PNG without its metadata.

    Args:
        file: At its start.
        pixels: Whether to read and check its pixels; else only what stands before them.

    Raises:
        OSError: If a checksum is wrong, or the end is missing.
    """
    parts, profile = [file.read(len(PNG_SIGNATURE))], None
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IDAT" and not pixels:
            return Stream(b"".join([*parts, head]), profile=profile)
        critical = not kind[0] & 32
        if not (critical or kind in PNG_KEPT or kind == b"iCCP"):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        body, checksum = file.read(length), file.read(4)
        if len(checksum) < 4:
            raise OSError(CUT_OFF)
        good = zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(checksum, "big")
        if not good and (critical or kind == b"tRNS"):
            raise OSError(CHECKSUM)
        if kind == b"iCCP":
            profile = _profile(body)
        elif good:
            parts += [head, body, checksum]
        if kind == b"IEND":
            return Stream(b"".join(parts), profile=profile)
    raise OSError(CUT_OFF)


def check_rows(image: Image.Image, data: bytes) -> None:
    """Of a decoded PNG: whether its pixels were all there; decoders stop where the compressed ones end.

    They are counted only where the last row is empty, or rows are not in order.

    Raises:
        OSError: If some were missing.
    """
    if image.format != "PNG":
        return
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not interlaced and last.getbbox(alpha_only=False) is not None:
        return
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    steps = ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in steps)
    due = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    found = 0
    with contextlib.suppress(zlib.error):  # it ends too early
        for piece in _inflated(_pixel_chunks(data)):
            found += len(piece)
            if found >= due:
                return
    raise OSError(CUT_OFF)


def _inflated(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """A zlib stream in pieces of at most :data:`PIECE` bytes, whatever it swells to, and its checksum at the end.

    Raises:
        zlib.error: If it is damaged, or not all there.
    """
    unpacker = zlib.decompressobj()
    for part in parts:
        rest: bytes | memoryview = part
        while len(rest) and not unpacker.eof:
            yield unpacker.decompress(rest, PIECE)
            rest = unpacker.unconsumed_tail
    if not unpacker.eof:
        raise zlib.error("cut off")


def _pixel_chunks(data: bytes) -> Iterator[bytes]:
    place = len(PNG_SIGNATURE)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"IDAT":
            yield data[place + 8 : place + 8 + length]
        place += length + 12


def _profile(body: bytes) -> bytes | None:
    """What a chunk ``iCCP`` holds: a name, a zero, the method 0, a zlib stream."""
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(body[body.index(b"\0") + 2 :], LARGEST_PROFILE)
    except (zlib.error, ValueError):  # metadata cost no picture
        return None
    return profile if unpacker.eof else None


def _jpeg(data: bytes) -> Stream:
    """A JPEG; one of a single scan such that the decoder notices when rows are missing, or left over."""
    place, frame, interval, flat = 2, b"", 0, True
    while data[place : place + 1] == b"\xff":
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place + 4 : place + 2 + length]
        if marker == 0xFF:  # fill
            place += 1
            continue
        place += 2 + length
        if marker in (0xC0, 0xC1):
            frame = segment
        elif marker == 0xC4:
            flat = flat and not any(_first_symbols(segment))
        elif marker == 0xDD:
            interval = int.from_bytes(segment[:2], "big")
        elif marker == 0xDA:
            break
    else:
        return Stream(data)  # no pixels at all: the decoder says so
    if len(frame) < 6 or segment[:1] != frame[5:6]:  # progressive, or a scan for each colour: read to the end marker
        return Stream(data)
    marker_after = SCAN_END.search(data, place)  # of the end, or of a remark before it
    if marker_after is None or data.find(b"\xff\xd9", marker_after.start()) < 0:
        raise OSError(CUT_OFF)
    end = marker_after.start()
    if ZEROS in data[place:end] and not flat:
        raise OSError(PIECE_MISSING)
    if interval:
        _check_restarts(data[place:end], frame, interval)
    return Stream(data[:end] + PADDING, hold=max(place, len(data[:end].rstrip(b"\0\xff")) - SPARE))


def _first_symbols(tables: bytes) -> Iterator[int]:
    """Of Huffman tables: what a code of zeros stands for; 0 is what flat parts of a picture consist of."""
    while len(tables) > 17:
        yield tables[17]
        tables = tables[17 + sum(tables[1:17]) :]


def _check_restarts(scan: bytes, frame: bytes, interval: int) -> None:
    """Restart markers count from 0 to 7 and over again, one after each ``interval`` blocks."""
    height, width, count = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5]
    sampling = frame[7::3][:count] if count > 1 else b"\x11"
    across, down = 8 * max(one >> 4 for one in sampling), 8 * max(one & 15 for one in sampling)
    if not (across and down):
        return
    blocks = math.ceil(width / across) * math.ceil(height / down)
    expected = math.ceil(blocks / interval) - 1
    found = [mark[0] & 7 for mark in re.findall(rb"\xff([\xd0-\xd7])", scan)]
    if found[:expected] != [number % 8 for number in range(expected)]:
        raise OSError(PIECE_MISSING)


def _check_webp(data: bytes) -> None:
    """Chunks follow one another to the end."""
    place, end = 12, 8 + int.from_bytes(data[4:8], "little")
    if end > len(data) + 1:  # some writers leave out the last byte, which makes the length even
        raise OSError(CUT_OFF)
    while place + 8 <= end:
        if not data[place : place + 4].strip(b"\0"):
            raise OSError(CUT_OFF)
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + length + length % 2


def check_strips(image: Image.Image, data: memoryview) -> None:
    """Of a TIFF with deflated pixels: the checksum of each strip or tile, which its decoder passes over.

    Raises:
        OSError: If one is wrong.
    """
    tags: Any = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None or tags.get(259) not in (8, 32946):
        return
    for starts, sizes in ((273, 279), (324, 325)):
        for start, size in zip(tags.get(starts, ()), tags.get(sizes, ()), strict=False):
            try:
                for _ in _inflated([data[start : start + size]]):
                    pass
            except zlib.error:
                raise OSError(CHECKSUM) from None
