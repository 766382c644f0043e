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

from robustdiff.data import png_colour

CUT_OFF = "cut off"
PIECE_MISSING = "damaged: a piece of its pixels is missing or wrong"
CHECKSUM = "damaged: a checksum of its pixels is wrong"

PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
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

    def __init__(self, data: bytes = b"", hold: int = -1, end: int = -1) -> None:
        """Begin at the start.

        Args:
            data: The file; it is not copied.
            hold: A reader that ends up to here has left pixels over; -1: that is not known.
            end: Where the pixels end; the reader gets :data:`PADDING` for what stands there. -1: all is to be read.
        """
        super().__init__(data)
        self.hold, self.end = hold, end
        self.profile: bytes | None = None

    def begin_pixels(self) -> None:
        """What is read from here on comes in parts; before, reading is that of any file, which is faster."""
        if self.end >= 0:
            self.__class__ = _InParts

    def check_read(self) -> None:
        """After decoding: whether it was read to its end.

        Raises:
            OSError: If there was more in it than the rows that it declares.
        """
        if self.tell() <= self.hold:
            raise OSError(PIECE_MISSING)


class _InParts(Stream):
    """A stream whose pixels are read."""

    def read(self, size: int | None = -1) -> bytes:
        """Up to ``hold``; from there up to ``end``, and the padding."""
        place = self.tell()
        if place < self.hold:
            left = self.hold - place
            return super().read(left if size is None or size < 0 else min(size, left))
        rest = super().read(max(self.end - place, 0))
        self.seek(0, io.SEEK_END)
        return rest + PADDING if place <= self.end else b""


def whole(file: BinaryIO, head: bytes) -> BinaryIO:
    """What a decoder is to see of a file: itself, or a :class:`Stream` where all of it has to be looked at.

    Args:
        file: At its start; it is there afterwards.
        head: Its first bytes.

    Raises:
        OSError: If the file is cut off or damaged.
    """
    if head.startswith(PNG_SIGNATURE):
        return png(file, pixels=True)
    if head.startswith(JPEG_SIGNATURE):
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return _jpeg(file.read(size))  # without a size, what is buffered would be joined to the rest: twice the memory
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        _check_webp(file)
    unended = head.startswith(b"qoif") and _end(file, 8) != bytes(7) + b"\x01"
    if unended or (head[4:12] in (b"ftypavif", b"ftypavis") and _end(file, len(ZEROS)) == ZEROS):
        raise OSError(CUT_OFF)
    file.seek(0)
    return file


def _end(file: BinaryIO, count: int) -> bytes:
    """The last bytes of a file, which may have fewer."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - count, 0))
    return file.read()


def png(file: BinaryIO, *, pixels: bool) -> Stream:
    """A PNG without its metadata.

    Args:
        file: At its start.
        pixels: Whether to read and check its pixels; else only what stands before them.

    Raises:
        OSError: If a checksum is wrong, or the end is missing.
    """
    stream, colours, colour_type = Stream(file.read(len(PNG_SIGNATURE))), dict[bytes, bytes](), 0
    stream.seek(0, io.SEEK_END)
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IDAT" and not pixels:
            stream.write(head)
            stream.seek(0)
            return stream
        critical = not kind[0] & 32
        if kind in png_colour.CHUNKS and length <= 32:
            body, told = file.read(length), file.read(4)
            if zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(told, "big"):
                colours[kind] = body
            continue
        if not (critical or kind in PNG_KEPT or kind == b"iCCP"):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        start, checksum = stream.tell(), zlib.crc32(kind)
        stream.write(head)
        for begun in range(0, length, PIECE):
            piece = file.read(min(PIECE, length - begun))
            checksum = zlib.crc32(piece, checksum)
            stream.write(piece)
        told = file.read(4)
        if len(told) < 4:
            raise OSError(CUT_OFF)
        stream.write(told)
        good = checksum == int.from_bytes(told, "big")
        if not good and (critical or kind == b"tRNS"):
            raise OSError(CHECKSUM)
        if kind == b"iCCP":
            stream.profile = _profile(stream.getvalue()[start + 8 : -4])
        if kind == b"IHDR":
            colour_type = stream.getbuffer()[start + 17]
        if kind == b"iCCP" or not good:
            stream.seek(start)
            stream.truncate()
        if kind == b"IEND":
            if colours and (b"cICP" in colours or stream.profile is None):
                stream.profile = png_colour.profile(colours, grey=colour_type in (0, 4))
            stream.seek(0)
            return stream
    raise OSError(CUT_OFF)


def check_rows(image: Image.Image, file: BinaryIO) -> None:
    """Of a decoded PNG: whether its pixels were all there; decoders stop where the compressed ones end.

    They are counted only where the last row is empty, or rows are not in order.

    Raises:
        OSError: If some were missing.
    """
    if image.format != "PNG" or not isinstance(file, Stream):
        return
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", file.getbuffer(), 16)
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not interlaced and last.getbbox(alpha_only=False) is not None:
        return
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    steps = ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in steps)
    due = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    found = 0
    with contextlib.suppress(zlib.error):  # it ends too early
        for piece in _inflated(_pixel_chunks(file.getbuffer())):
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


def _pixel_chunks(data: memoryview) -> Iterator[memoryview]:
    place = len(PNG_SIGNATURE)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if bytes(data[place + 4 : place + 8]) == b"IDAT":
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
    place, frame, interval, flat, segment = 2, b"", 0, True, b""
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        start, place = place + 4, place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1):
            frame = data[start:place]
        elif marker == 0xC4:
            flat = flat and not any(_first_symbols(data[start:place]))
        elif marker == 0xDD:
            interval = int.from_bytes(data[start : start + 2], "big")
        elif marker == 0xDA:
            segment = data[start:place]
            break
    else:
        return Stream(data)  # no pixels at all: the decoder says so
    if len(frame) < 6 or segment[:1] != frame[5:6]:  # progressive, or a scan for each colour: read to the end marker
        return Stream(data)
    marker_after = SCAN_END.search(data, place)  # of the end, or of a remark before it
    if marker_after is None or data.find(b"\xff\xd9", marker_after.start()) < 0:
        raise OSError(CUT_OFF)
    end = marker_after.start()
    if not flat and data[end - 1] == 0:  # pixels end in a byte that ones fill up: the zeros are none
        end = min(end, end - _trailing(data, place, end, b"\0") + 2)
    if not flat and data.find(ZEROS, place, end) >= 0:
        raise OSError(PIECE_MISSING)
    if interval:
        _check_restarts(data[place:end], frame, interval)
    return Stream(data, max(place, end - _trailing(data, place, end, b"\0\xff") - SPARE), end)


def _trailing(data: bytes, start: int, end: int, which: bytes) -> int:
    """How many of the last bytes of a part are among some; the part is copied only if nearly all are."""
    for size in (4096, end - start):
        tail = data[max(start, end - size) : end]
        count = len(tail) - len(tail.rstrip(which))
        if count < len(tail):
            break
    return count


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


def _check_webp(file: BinaryIO) -> None:
    """Chunks follow one another to the end."""
    size = file.seek(0, io.SEEK_END)
    file.seek(4)
    place, end = 12, 8 + int.from_bytes(file.read(4), "little")
    if end > size + 1:  # some writers leave out the last byte, which makes the length even
        raise OSError(CUT_OFF)
    while place + 8 <= end:
        file.seek(place)
        head = file.read(8)
        if not head[:4].strip(b"\0"):
            raise OSError(CUT_OFF)
        length = int.from_bytes(head[4:], "little")
        place += 8 + length + length % 2


def check_strips(image: Image.Image, file: BinaryIO) -> None:
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
                file.seek(start)
                for _ in _inflated([file.read(size)]):
                    pass
            except zlib.error:
                raise OSError(CHECKSUM) from None
