"""Files that are damaged in ways that decoders pass over, and good ones that look strange: all that a format can tell.

A broken download or a power cut leaves zeros at the end, or a piece out; what decoders make of it is half a picture.
"""

import io
import random
import struct
import tracemalloc
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from scipy.ndimage import gaussian_filter

from robustdiff.audit.statistics import image_statistics
from robustdiff.data import decode, intact
from robustdiff.data.dataset import load_images
from robustdiff.data.sources.open import open_source

REASONS = {
    "cut off",
    "damaged: a checksum of its pixels is wrong",
    "damaged: a piece of its pixels is missing or wrong",
    "damaged: its pixels cannot be decoded",
    "not an image",
}


def photo(seed=0, side=128, mode="RGB"):
    """Something of all scales, as photographs are."""
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    smooth = sum(gaussian_filter(noise, (width, width, 0)) * width for width in (0.5, 2, 8))
    return Image.fromarray(np.clip(smooth * 40 + 128, 0, 255).astype(np.uint8)).convert(mode)


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tell(data):
    """((C, H, W) or None, reason)."""
    work = partial(decode.decode, channels=None, resolution=None, crop=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done, reason = decode.guarded(work, lambda _: data, 0)
    return (None if done is None else done[0]), reason


def zeroed(data, chance):
    cut = int(len(data) * chance.uniform(0.3, 0.95))
    return data[:cut] + bytes(len(data) - cut)


def without_a_piece(data, chance):
    size = max(300, len(data) // 10)
    start = int(len(data) * chance.uniform(0.3, 0.8))
    return data[:start] + data[start + size :]


def with_zeros_inside(data, chance):
    size = max(300, len(data) // 10)
    start = int(len(data) * chance.uniform(0.3, 0.8))
    return data[:start] + bytes(size) + data[start + size :]


def cut(data, chance):
    return data[: int(len(data) * chance.uniform(0.3, 0.95))]


def without_end(data, _):
    return data[:-2]


DAMAGES = (zeroed, without_a_piece, with_zeros_inside, cut)
KINDS = {
    "png": ("PNG", {}, (*DAMAGES, without_end)),
    "jpeg": ("JPEG", {"quality": 90}, (*DAMAGES, without_end)),
    "optimised jpeg": ("JPEG", {"quality": 95, "optimize": True}, (*DAMAGES, without_end)),
    "jpeg with restarts": ("JPEG", {"restart_marker_blocks": 3}, (*DAMAGES, without_end)),
    "jpeg of full colour": ("JPEG", {"quality": 75, "subsampling": 0}, (*DAMAGES, without_end)),
    "progressive jpeg": ("JPEG", {"progressive": True}, (zeroed, cut, without_end)),
    "gif": ("GIF", {}, (zeroed, without_a_piece, cut)),
    "tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}, DAMAGES),
    "webp": ("WEBP", {}, (without_a_piece, cut, without_end)),
    "qoi": ("QOI", {}, (zeroed, cut, without_end)),
    "avif": ("AVIF", {"speed": 10}, (zeroed, without_a_piece, cut)),
    "jpeg 2000": ("JPEG2000", {}, (zeroed, without_a_piece, cut)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_told_in_plain_words(kind):
    form, options, damages = KINDS[kind]
    passed = []
    for seed in range(6):
        good = saved(photo(seed), form, **options)
        assert tell(good)[1] == ""
        for damage in damages:
            reason = tell(damage(good, random.Random(seed)))[1]
            if reason == "":
                passed.append((damage.__name__, seed))
            else:
                assert reason in REASONS
    # Of a JPEG with a piece missing, what is left may by chance be as long as a whole one.
    assert len(passed) <= ("jpeg" in kind), passed


def test_damaged_files_are_not_called_clean(tmp_path):
    chance = random.Random(0)
    for number in range(40):
        form, suffix = ("PNG", "png") if number % 2 else ("JPEG", "jpg")
        data = saved(photo(number, 64), form)
        if number < 12:
            data = (zeroed if number < 8 else without_a_piece)(data, chance)
        (tmp_path / f"{number:02d}.{suffix}").write_bytes(data)
    loaded = load_images(tmp_path, max_bad_fraction=1)
    assert len(loaded) <= 29
    statistics = image_statistics(open_source(tmp_path), data=str(tmp_path), resolution=None, memory=0)
    assert len(statistics.unreadable) == len(loaded.skipped) >= 11


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_a_png_of_too_few_rows_is_cut_off(mode):
    """Every checksum is right: it was written so."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    data = saved(photo(0, 64).quantize(200) if mode == "P" else photo(0, 64, mode), "PNG")
    start = data.index(b"IDAT") - 4
    rows = zlib.decompress(data[start + 8 : data.rindex(b"IEND") - 8])
    row = len(rows) // 64
    for count in (64, 63, 32, 1):
        pixels = chunk(b"IDAT", zlib.compress(rows[: count * row]))
        assert tell(data[:start] + pixels + chunk(b"IEND", b""))[1] == ("" if count == 64 else "cut off")


@pytest.mark.parametrize("missing", [0, 1, 500])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 5), (16, 16), (17, 9)])
def test_an_interlaced_png_has_all_of_its_passes(width, height, missing):
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    grey = np.random.default_rng(0).integers(1, 256, (height, width)).astype(np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in grey[y::dy, x::dx] if row.size)
    if missing >= len(raw):
        return
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw[: len(raw) - missing])), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    pixels, reason = tell(data)
    assert reason == ("cut off" if missing else "")
    if not missing:
        np.testing.assert_array_equal(pixels[0], grey)


# -- good files stay good ----------------------------------------------------------------------------

GOOD = {
    "baseline": {},
    "optimised": {"optimize": True},
    "restarts in blocks": {"restart_marker_blocks": 3},
    "restarts in rows": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_good_jpegs_are_read_as_before(name, mode):
    """Flat ones too, whose pixels are zeros in the file, with bytes after their end, of odd sizes."""
    flat, half = Image.new(mode, (90, 41), "white"), photo(0, 90, mode)
    half.paste(flat, (0, 45))
    for image in (photo(1, 65, mode), flat, half):
        for quality in (5, 75, 100):
            data = saved(image, "JPEG", quality=quality, **GOOD[name])
            for tail in (b"", b"\0\0\0trailer", bytes(500), data):
                pixels, reason = tell(data + tail)
                assert reason == ""
                if mode != "CMYK":
                    expected = np.asarray(Image.open(io.BytesIO(data)))
                    np.testing.assert_array_equal(pixels, np.atleast_3d(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "TIFF", "AVIF", "QOI"])
def test_good_flat_files_are_read(form):
    half = photo(0, 90)
    half.paste((255, 255, 255), (0, 45, 90, 90))
    for image in (Image.new("RGB", (90, 41), "white"), Image.new("RGB", (300, 300)), half):
        assert tell(saved(image, form))[1] == ""


# -- metadata cost no picture ------------------------------------------------------------------------


def with_chunks(data, *chunks, good=True):
    """A PNG with chunks before its pixels."""
    more = b""
    for kind, body in chunks:
        check = zlib.crc32(kind + body) if good else 0
        more += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
    return data[:33] + more + data[33:]


LONG = zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 10))
METADATA = {
    "compressed text": [(b"zTXt", b"a\0\0" + LONG)],
    "much compressed text": [(b"zTXt", b"a%d\0\0" % i + zlib.compress(b"x" * 1_000_000)) for i in range(70)],
    "international text": [(b"iTXt", b"a\0\1\0\0\0" + LONG)],
    "damaged text": [(b"zTXt", b"a\0\0no zlib")],
    "short chunks": [(b"pHYs", b"1"), (b"gAMA", b""), (b"cHRM", b"12"), (b"tIME", b"")],
    "damaged profile": [(b"iCCP", b"a\0\0no zlib")],
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("good", [True, False], ids=["right checksum", "wrong checksum"])
def test_metadata_cost_no_picture(tmp_path, name, good):
    image = photo(0, 16)
    (tmp_path / "a.png").write_bytes(with_chunks(saved(image, "PNG"), *METADATA[name], good=good))
    loaded = load_images(tmp_path)
    np.testing.assert_array_equal(loaded.images[0].numpy().transpose(1, 2, 0), np.asarray(image))
    assert loaded.skipped == ()


def test_a_wrong_checksum_of_what_is_transparent_is_damage():
    image = Image.new("RGB", (8, 8), "red")
    good = saved(image, "PNG", transparency=(255, 0, 0))
    place = good.index(b"tRNS") + 4 + 6
    bad = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
    assert tell(good)[1] == ""
    assert tell(bad) == (None, "damaged: a checksum of its pixels is wrong")


def swollen(kind: str, count: int) -> bytes:
    """A picture of 8 x 8 whose compressed pixels swell to ``count`` MiB of zeros."""
    packer = zlib.compressobj()
    body = b"".join([*(packer.compress(bytes(2**20)) for _ in range(count)), packer.flush()])
    file = io.BytesIO()
    if kind == "png":

        def chunk(name: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
        return intact.PNG_SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    Image.new("L", (8, 8)).save(file, "TIFF", compression="tiff_adobe_deflate")
    data = bytearray(file.getvalue())
    for number, value in ((273, len(data)), (279, len(body))):  # where the strip is, and its size
        entry = max(data.find(struct.pack("<HHI", number, size, 1)) for size in (3, 4))
        assert entry > 0
        data[entry : entry + 12] = struct.pack("<HHII", number, 4, 1, value)
    return bytes(data) + body


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_what_swells_without_end_takes_no_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"small.{kind}"
    path.write_bytes(swollen(kind, 64))
    tracemalloc.start()
    try:
        load_images(str(path.parent))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_remark_between_the_pixels_of_a_jpeg_and_its_end_is_no_damage(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG")
    data, remark = file.getvalue(), b"\xff\xfe\x00\x3cby hand" + bytes(range(52))
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b.jpg").write_bytes(data[:-2] + remark + data[-2:])
    one, other = load_images(str(tmp_path)).images
    assert bool((one == other).all())


@pytest.mark.parametrize("zeros", [1, 40, 700, 20_000])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_zeros_before_the_end_of_a_jpeg_are_no_damage_where_all_rows_are_there(zeros, options, mode):
    data = saved(photo(1, mode=mode), "JPEG", quality=90, **options)
    pixels, why = tell(data[:-2] + bytes(zeros) + data[-2:])
    assert why == ""
    np.testing.assert_array_equal(pixels, tell(data)[0])
    for share in (0.5, 0.9):
        cut = int(len(data) * share)
        if not options.get("progressive"):  # of which only the picture tells
            assert tell(data[:cut] + bytes(len(data) - cut - 2) + data[-2:])[1] in REASONS


# -- memory and time of good files -------------------------------------------------------------------


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8))


def opened_at(path):
    """The most bytes of Python's memory that reading a good file took, its pixels not counted."""
    tracemalloc.start()
    try:
        _, why = decode.guarded(lambda image: image.load() and None, lambda _: path, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert why == ""
    return peak


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.bmp", {}), ("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"}), ("a.tif", {"compression": "tiff_deflate"})],
)
def test_formats_that_are_not_checked_as_a_whole_are_not_read_into_memory(tmp_path, name, options):
    small, large = noise(40, 40), noise(1200, 1200)
    more = {"save_all": True, "append_images": [large] * 2} if name == "a.tif" else {}
    (small if more else large).save(tmp_path / name, **more, **options)
    size = (tmp_path / name).stat().st_size
    assert size > 4_000_000
    assert opened_at(tmp_path / name) < 600_000


@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.jpg", {"quality": 98}), ("a.jpg", {"progressive": True})]
)
def test_formats_that_are_checked_are_in_memory_once(tmp_path, name, options):
    noise(2400, 2400).save(tmp_path / name, **options)
    size = (tmp_path / name).stat().st_size
    assert size > 1_000_000
    assert opened_at(tmp_path / name) < 1.2 * size + 2 * intact.PIECE + 300_000  # and what is handed over
