"""TIFF of kinds that Pillow knows no mode for, or reads wrongly: their samples as numbers.

Pillow still undoes the compression: the strips or tiles of a picture, in whatever it is written, are also those of a
grey picture of bytes. What the bytes mean, the tags say.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from robustdiff.data.intact import CUT_OFF

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, ORIENTATION, SAMPLES, ROWS, STRIP_SIZES, PLANAR, PREDICTOR = 273, 274, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES, EXTRA_SAMPLES, SAMPLE_FORMAT, PROFILE = 322, 323, 324, 325, 338, 339, 34675
"""Tags of TIFF."""
STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
LOSSLESS, JPEG, JPEG_TABLES = {1, 5, 8, 32773, 32946, 34925, 50000}, 7, 347
"""Compressions of bytes: none, LZW, deflate (two numbers), PackBits, LZMA, Zstandard; and that of grey pictures."""
COLOURS = {0: 1, 1: 1, 2: 3, 5: 4}
"""Samples of a colour by photometric interpretation: white is zero, black is zero, RGB, CMYK."""
OTHER_COLOURS = {
    3: "a palette of other than 1 to 8 bits",
    4: "a mask",
    6: "YCbCr colours in planes or of more than 8 bits",
    8: "CIELab colours in planes or of more than 8 bits",
    9: "ICCLab colours",
    10: "ITULab colours",
    32803: "the raw values behind a colour filter",
    32844: "logarithmic luminance",
    32845: "logarithmic colours",
    34892: "the raw values of a camera",
}
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
KINDS = {UNSIGNED: "whole numbers", SIGNED: "signed whole numbers", FLOAT: "floating point values"}
"""Of samples, by sample format."""
MOST_SAMPLES = 6
GROUP = 2**22
"""Bytes that are decoded at a time."""


class SampledTiff(ImageFile.ImageFile):
    """The first picture of a TIFF, as numbers.

    Attributes:
        colours: Samples of each pixel that are its colour.
        kind: Of its samples: :data:`UNSIGNED`, :data:`SIGNED`, :data:`FLOAT`.
        bits: Of each sample.
        alpha: Value of ``ExtraSamples`` if the sample after the colour is transparency: 1 multiplied in, 2 not; else 0.
    """

    format = "TIFF"
    format_description = "TIFF of numbers"

    def _open(self) -> None:
        assert self.fp is not None
        head = self.fp.read(8)
        head += self.fp.read(8) if head[2] == 43 else b""
        self.tag_v2 = TiffImagePlugin.ImageFileDirectory_v2(head)
        self.fp.seek(self.tag_v2.next)
        self.tag_v2.load(self.fp)
        get = self.tag_v2.get
        self._size = int(self.tag_v2[WIDTH]), int(self.tag_v2[HEIGHT])
        self.is_animated = self.tag_v2.next != 0
        self.samples = int(get(SAMPLES, 1))
        photometric, formats, bits = get(PHOTOMETRIC, 0), get(SAMPLE_FORMAT, (UNSIGNED,)), get(BITS, (1,))
        if len({*bits}) != 1 or len({*formats}) != 1:
            raise OSError(refusal("samples of different kinds"))
        self.kind, self.bits, extra = int(formats[0]), int(bits[0]), get(EXTRA_SAMPLES, ())
        self.kind = UNSIGNED if self.kind == 4 else self.kind  # undefined
        self.planar = get(PLANAR, 1) == 2 and self.samples > 1
        self._check(photometric)
        self.colours = COLOURS[photometric]
        self.alpha = int(extra[0]) if extra and extra[0] in (1, 2) and self.samples > self.colours else 0
        self._mode = {1: "L", 3: "RGB", 4: "CMYK"}[self.colours]
        self.white_is_zero = photometric == 0
        if PROFILE in self.tag_v2:
            self.info["icc_profile"] = self.tag_v2[PROFILE]

    def _check(self, photometric: int) -> None:
        """Refuse what is not read here either.

        Raises:
            OSError: With what it is.
        """
        kinds = {UNSIGNED: (*range(1, 17), 32), SIGNED: (8, 16, 32), FLOAT: (16, 32, 64)}
        predictor, compression = self.tag_v2.get(PREDICTOR, 1), self.tag_v2.get(COMPRESSION, 1)
        if photometric not in COLOURS:
            raise OSError(refusal(OTHER_COLOURS.get(photometric, f"unknown colours ({photometric})")))
        if self.bits not in kinds.get(self.kind, ()):
            raise OSError(refusal(f"{self.bits}-bit {KINDS.get(self.kind, 'complex numbers')}"))
        if not COLOURS[photometric] <= self.samples <= MOST_SAMPLES:
            raise OSError(refusal(f"{self.samples} samples a pixel"))
        grey = compression == JPEG and self.planar and (self.kind, self.bits) == (UNSIGNED, 8)
        if compression not in LOSSLESS and not grey:
            raise OSError(refusal(f"{self.bits}-bit {KINDS[self.kind]}, compressed by method {compression}"))
        good = {1: True, 2: self.kind != FLOAT and self.bits in (8, 16, 32), 3: self.kind == FLOAT}
        if not good.get(predictor, False):
            raise OSError(refusal(f"{self.bits}-bit {KINDS[self.kind]} with predictor {predictor}"))

    def load(self) -> Any:  # noqa: ANN401 - as in Pillow
        """Nothing: :meth:`numbers` decodes."""
        return None

    def getexif(self) -> Image.Exif:
        """Which side is up; Pillow's own asks for its own class."""
        exif = Image.Exif()
        exif[ORIENTATION] = self.tag_v2.get(ORIENTATION, 1)
        return exif

    def numbers(self) -> NDArray[Any]:
        """The samples as they are, (H, W, S).

        Raises:
            OSError: If the file is cut off or damaged.
        """
        width, height = self._size
        planes, each = (self.samples, 1) if self.planar else (1, self.samples)
        tiled = TILES in self.tag_v2
        across, down = (self._one(TILE_WIDTH), self._one(TILE_HEIGHT)) if tiled else (width, self._one(ROWS, height))
        down = down if tiled else min(down, height)
        starts = self.tag_v2[TILES if tiled else STRIPS]
        sizes = self.tag_v2.get(TILE_SIZES if tiled else STRIP_SIZES, ())
        row = -(-across * each * self.bits // 8)  # bytes of a row of a strip or tile
        columns, rows = -(-width // across), -(-height // down)
        out = np.empty((height, width, self.samples), self._dtype().newbyteorder("="))
        for plane in range(planes):
            first = plane * columns * rows
            heights = [down if tiled else min(down, height - y * down) for y in range(rows) for _ in range(columns)]
            chunks = ((starts[i], sizes[i] if i < len(sizes) else None, tall) for i, tall in enumerate(heights, first))
            for number, block in enumerate(self._blocks(chunks, row, down)):
                y, x = number // columns * down, number % columns * across
                here = out[y : y + down, x : x + across, plane : plane + each]
                here[...] = self._values(block, each)[: here.shape[0], : here.shape[1]]
        return out

    def _one(self, tag: int, default: int | None = None) -> int:
        value = self.tag_v2.get(tag, default)
        if not isinstance(value, int) or value < 1:
            raise OSError("damaged: the sizes of its parts make no sense")
        return value

    def _dtype(self) -> np.dtype[Any]:
        """Of a sample, in the order of the file."""
        code = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}[self.kind]
        size = next(size for size in (8, 16, 32, 64) if size >= self.bits)
        return np.dtype(f"{'<' if self.tag_v2.prefix == b'II' else '>'}{code}{size // 8}")

    def _blocks(
        self, chunks: Iterator[tuple[int, int | None, int]], row: int, down: int
    ) -> Iterator[NDArray[np.uint8]]:
        """The bytes of strips or tiles, (rows, bytes of a row): several are decoded at a time.

        Args:
            chunks: Place in the file, size there, rows.
            row: Bytes of a row, decoded.
            down: Rows of all but the last.
        """
        file = self.fp
        assert file is not None
        raw, many = self.tag_v2.get(COMPRESSION, 1) == 1, max(1, GROUP // (row * down))
        while group := list(itertools.islice(chunks, many)):
            parts = []
            for start, size, tall in group:
                wanted = tall * row if raw or size is None else size
                file.seek(start)
                parts.append(file.read(wanted))
                if len(parts[-1]) < wanted:
                    raise OSError(CUT_OFF)
            tall = sum(tall for _, _, tall in group)
            yield from np.split(self._decoded(parts, row, tall, down), range(down, tall, down))

    def _decoded(self, parts: Sequence[bytes], width: int, height: int, rows: int) -> NDArray[np.uint8]:
        """The bytes of strips: Pillow is given them as a grey picture of 8 bit, ``rows`` in each strip."""
        sizes = [len(part) for part in parts]
        starts = [8 + place for place in itertools.accumulate(sizes, initial=0)]
        tags: dict[int, Any] = {
            WIDTH: [width],
            HEIGHT: [height],
            BITS: [8],
            PHOTOMETRIC: [1],
            STRIPS: starts[:-1],
            SAMPLES: [1],
        }
        tags |= {ROWS: [rows], STRIP_SIZES: sizes}
        kept = {tag: self.tag_v2[tag] for tag in (COMPRESSION, FILL_ORDER, JPEG_TABLES) if tag in self.tag_v2}
        tags |= {tag: value if isinstance(value, bytes) else [value] for tag, value in kept.items()}
        after = starts[-1] + 2 + 12 * len(tags) + 4
        table, rest = struct.pack("<H", len(tags)), b""
        for tag, values in sorted(tags.items()):
            code, packed = (7, values) if isinstance(values, bytes) else (4, struct.pack(f"<{len(values)}I", *values))
            if len(packed) > 4:
                packed, rest = struct.pack("<I", after + len(rest)), rest + packed
            table += struct.pack("<HHI", tag, code, len(values)) + packed.ljust(4, b"\0")
        file = io.BytesIO(b"".join([b"II*\0", struct.pack("<I", starts[-1]), *parts, table, bytes(4), rest]))
        with Image.open(file, formats=["TIFF"]) as image:
            return np.asarray(image)

    def _values(self, block: NDArray[np.uint8], each: int) -> NDArray[Any]:
        """The samples of a strip or tile, (rows, columns, ``each``)."""
        rows, predictor, dtype = len(block), self.tag_v2.get(PREDICTOR, 1), self._dtype()
        if predictor == 3:  # differences of bytes, the first bytes of all samples first
            block = np.cumsum(block.reshape(rows, -1, each), axis=1, dtype=np.uint8)
            split = block.reshape(rows, dtype.itemsize, -1).swapaxes(1, 2)
            return np.ascontiguousarray(split).view(dtype.newbyteorder(">"))[..., 0].reshape(rows, -1, each)
        if self.bits in (8, 16, 32, 64):
            values = np.ascontiguousarray(block).view(dtype).reshape(rows, -1, each)
            return np.cumsum(values, axis=1, dtype=dtype.newbyteorder("=")) if predictor == 2 else values
        count = block.shape[1] * 8 // self.bits // each * each
        bits = np.unpackbits(block, axis=1)[:, : count * self.bits].reshape(rows, -1, each, self.bits)
        return bits @ (1 << np.arange(self.bits - 1, -1, -1, dtype=dtype.newbyteorder("=")))


def refusal(what: str) -> str:
    """Why a TIFF cannot be read, and the remedy."""
    return f"a TIFF of {what} cannot be read: convert it to 8 or 16 bit"


def misread(image: Image.Image) -> bool:
    """Whether Pillow has opened a TIFF but would read it wrongly, or would not know what its numbers mean.

    It is right about 1 to 4 whole numbers a pixel, of up to 8 bits or of 16, without a sign, that stand together.
    """
    tags: Any = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return False
    samples, bits, formats = tags.get(SAMPLES, 1), tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, (UNSIGNED,))
    photometric, planar, raw = tags.get(PHOTOMETRIC, 0), tags.get(PLANAR, 1) == 2, tags.get(COMPRESSION, 1) == 1
    # How the pixels of a plane lie is then the first letter of a name to Pillow.
    lost = planar and (samples > 1 or (raw and ({*bits} != {8} or photometric == 0)))
    known = {*bits} <= {*range(1, 9), 16} and {*formats} <= {UNSIGNED, 4}
    return bool((lost and samples == 1) or (photometric in COLOURS and (lost or samples > 4 or not known)))


def exact(image: Image.Image) -> Image.Image:
    """The image, or, of a TIFF of colours of 16 bit that Pillow would halve in depth, its numbers."""
    tags: Any = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None or isinstance(image, SampledTiff):
        return image
    halved = tags.get(SAMPLES, 1) > 1 and 16 in tags.get(BITS, ()) and tags.get(COMPRESSION, 1) in LOSSLESS
    if not halved:
        return image
    file: Any = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    return SampledTiff(file)
