"""TIFF of every depth, sign, layout and compression: read right, or refused by what it is; never wrong pixels."""

import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image

from robustdiff.data.dataset import load_images
from robustdiff.utils.errors import DataError

HEIGHT, WIDTH = 21, 19
RAW, LZW, JPEG, DEFLATE, PACKBITS = 1, 5, 7, 8, 32773
NAMES = {LZW: "tiff_lzw", DEFLATE: "tiff_adobe_deflate", PACKBITS: "packbits"}


def compressed(rows, compression):
    """Rows of bytes as one strip."""
    if compression == RAW:
        return rows.tobytes()
    file = io.BytesIO()
    if compression == JPEG:
        Image.fromarray(rows).save(file, "JPEG", quality=100)
        return file.getvalue()
    Image.fromarray(rows).save(file, "TIFF", compression=NAMES[compression])
    with Image.open(file) as image:
        (start,), (size,) = image.tag_v2[273], image.tag_v2[279]
        return file.getvalue()[start : start + size]


def packed(values, bits, order):
    """Numbers (rows, columns) as rows of bytes."""
    if bits % 8 == 0:
        return np.frombuffer(values.astype(values.dtype.newbyteorder(order)).tobytes(), np.uint8).reshape(
            len(values), -1
        )
    ones = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(ones.astype(np.uint8).reshape(len(values), -1), axis=1)


def parts(values, bits, order, planar, compression, tile, rows, predictor):
    """Strips or tiles of numbers (H, W, S)."""
    planes = np.split(values, values.shape[2], axis=2) if planar else [values]
    for plane in planes:
        down, across = tile or (rows, plane.shape[1])
        for y, x in itertools.product(range(0, len(plane), down), range(0, plane.shape[1], across)):
            part = plane[y : y + down, x : x + across]
            if tile:
                part = np.pad(part, ((0, down - part.shape[0]), (0, across - part.shape[1]), (0, 0)))
            if predictor == 2:
                part = np.diff(part, axis=1, prepend=part[:, :1] * 0).astype(values.dtype)
            flat = part.reshape(len(part), -1)
            lines = packed(flat, bits, order)
            if predictor == 3:
                lines = packed(flat, bits, ">").reshape(len(part), -1, bits // 8).swapaxes(1, 2)
                lines = lines.reshape(len(part), -1, part.shape[2])
                lines = np.diff(lines, axis=1, prepend=lines[:, :1] * 0).astype(np.uint8).reshape(len(part), -1)
            yield compressed(np.ascontiguousarray(lines), compression)


def write(
    path, values, bits, photometric, *, order="<", planar=False, compression=RAW, extra=(), tile=None, rows=5, more=()
):
    """A TIFF of numbers (H, W, S), signed or floating point as they are."""
    predictor = dict(more).get(317, 1)
    data = list(parts(values, bits, order, planar, compression, tile, rows, predictor))
    starts = [8 + place for place in itertools.accumulate(map(len, data), initial=0)]
    samples = values.shape[2]
    tags = {256: [values.shape[1]], 257: [values.shape[0]], 258: [bits] * samples, 259: [compression]}
    tags |= {262: [photometric], 277: [samples], 284: [2 if planar else 1]}
    tags |= {339: [{"u": 1, "i": 2, "f": 3, "c": 6}[values.dtype.kind]] * samples}
    tags |= {338: list(extra)} if extra else {}
    sizes = [len(one) for one in data]
    tags |= {322: [tile[1]], 323: [tile[0]], 324: starts[:-1], 325: sizes} if tile else {}
    tags |= {} if tile else {273: starts[:-1], 278: [rows], 279: sizes}
    tags |= {tag: [value] for tag, value in more}
    after, table, rest = starts[-1] + 2 + 12 * len(tags) + 4, struct.pack(order + "H", len(tags)), b""
    for tag, numbers in sorted(tags.items()):
        code = "I" if tag in (273, 279, 324, 325) else "H"
        field = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(field) > 4:
            field, rest = struct.pack(order + "I", after + len(rest)), rest + field
        table += struct.pack(order + "HHI", tag, 4 if code == "I" else 3, len(numbers)) + field.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(mark + struct.pack(order + "I", starts[-1]) + b"".join(data) + table + bytes(4) + rest)


def shares(samples, seed=0):
    """Random shares of full scale, (H, W, S)."""
    return np.random.default_rng(seed).random((HEIGHT, WIDTH, samples))


def whole(share, bits, signed=False):
    size = next(size for size in (8, 16, 32) if size >= bits)
    full = 2 ** (min(bits, 16) - signed) - 1
    return np.round(share * full).astype(f"{'i' if signed else 'u'}{size // 8}")


def read(folder, **options):
    """The only image, (H, W, C)."""
    loaded = load_images(folder, **options)
    assert loaded.skipped == ()
    return loaded.images[0].numpy().transpose(1, 2, 0).astype(int)


def expected(share, photometric):
    """The 8-bit colours of shares of full scale."""
    if photometric == 5:
        return 255 * (1 - share[..., :3]) * (1 - share[..., 3:4])
    return 255 * (1 - share[..., :1]) if photometric == 0 else 255 * share[..., : 3 if photometric == 2 else 1]


LAYOUTS = {
    "strips": {},
    "planes": {"planar": True},
    "planes, one strip each, big-endian": {"planar": True, "rows": HEIGHT, "order": ">"},
    "tiles in planes, deflated": {"planar": True, "tile": (16, 16), "compression": DEFLATE},
    "LZW with predictor, big-endian": {"compression": LZW, "order": ">", "more": ((317, 2),)},
    "tiles, PackBits": {"tile": (16, 32), "compression": PACKBITS},
    "deflated tiles with predictor": {"tile": (16, 16), "compression": DEFLATE, "more": ((317, 2),)},
}
COLOURS = {"RGB": (2, 3), "CMYK": (5, 4), "grey": (1, 1), "white is zero": (0, 1), "infrared": (2, 4), "pair": (1, 2)}


DEPTHS = [4, 8, 10, 12, 16, 32, -8, -16]
PREDICTED = [layout for layout, options in LAYOUTS.items() if "more" in options]


@pytest.mark.parametrize(
    ("layout", "bits"),
    [(layout, bits) for layout in LAYOUTS for bits in DEPTHS if bits % 8 == 0 or layout not in PREDICTED],
)
def test_whole_numbers_of_every_depth_and_layout(tmp_path, bits, layout):
    for place, (photometric, samples) in enumerate(COLOURS.values()):
        share = shares(samples, place)
        write(tmp_path / "a.tif", whole(share, abs(bits), bits < 0), abs(bits), photometric, **LAYOUTS[layout])
        # Four-bit palettes of ink round away more.
        np.testing.assert_allclose(read(tmp_path), expected(share, photometric), atol=20 if bits == 4 else 4)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("predictor", [1, 3])
@pytest.mark.parametrize("order", "<>")
def test_floating_point_of_every_depth(tmp_path, bits, predictor, order):
    for photometric, samples in ((1, 1), (0, 1), (2, 3)):
        share = shares(samples)
        values = (share * 2 - 1).astype(f"f{bits // 8}")
        layout = {"order": order, "compression": DEFLATE, "more": ((317, predictor),)}
        write(tmp_path / "a.tif", values, bits, photometric, **layout)
        with pytest.raises(DataError, match=r"floating-point .* `value_range`"):
            load_images(tmp_path)
        np.testing.assert_allclose(read(tmp_path, value_range="-1:1"), expected(share, photometric), atol=1)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("photometric", "colours"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_transparency_in_planes_and_beside_grey(tmp_path, planar, bits, photometric, colours, alpha):
    share = shares(colours + 2)
    share[..., colours] = np.maximum(share[..., colours], 0.2)
    opacity = share[..., colours : colours + 1]
    stored = share.copy()
    if alpha == 1:
        stored[..., :colours] *= opacity
    write(tmp_path / "a.tif", whole(stored, bits), bits, photometric, planar=planar, extra=(alpha, 0))
    colour = expected(share, photometric)
    np.testing.assert_allclose(read(tmp_path), colour * opacity + 255 * (1 - opacity) if alpha else colour, atol=2)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("compression", [RAW, LZW])
@pytest.mark.parametrize("alpha", [0, 1])
def test_a_range_that_is_told_holds_for_every_layout(tmp_path, planar, compression, alpha):
    for photometric, colours in ((2, 3), (5, 4), (1, 1)):
        share = shares(colours + alpha)
        stored = np.round(share * 4095).astype(np.uint16)
        stored[..., colours:] = 65535
        extra = (1,) * alpha
        layout = {"planar": planar, "compression": compression, "extra": extra, "more": ((274, 3),)}
        write(tmp_path / "a.tif", stored, 16, photometric, **layout)
        turned = np.rot90(expected(share, photometric), 2)
        np.testing.assert_allclose(read(tmp_path, value_range="0:4095"), turned, atol=2)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turns(tmp_path, orientation):
    share = shares(3)
    write(tmp_path / "a.tif", whole(share, 16), 16, 2, planar=True, more=((274, orientation),))
    turned = np.rot90(expected(share, 2), {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    np.testing.assert_allclose(read(tmp_path), turned, atol=1)


@pytest.mark.parametrize(("bits", "photometric"), [(4, 0), (8, 0), (4, 1), (16, 1), (16, 0)])
def test_one_plane_is_a_plane_too(tmp_path, bits, photometric):
    """Pillow takes the first letter of what it calls the pixels."""
    share = shares(1)
    write(tmp_path / "a.tif", whole(share, bits), bits, photometric, more=((284, 2),))
    np.testing.assert_allclose(read(tmp_path), expected(share, photometric), atol=10 if bits == 4 else 1)


@pytest.mark.parametrize("samples", [3, 4])
def test_planes_of_jpeg(tmp_path, samples):
    smooth = np.linspace(0, 1, HEIGHT * WIDTH * samples).reshape(samples, HEIGHT, WIDTH).transpose(1, 2, 0)
    write(tmp_path / "a.tif", whole(smooth, 8), 8, 2, planar=True, rows=HEIGHT, compression=JPEG)
    np.testing.assert_allclose(read(tmp_path), expected(smooth, 2), atol=3)


# -- what cannot be read -----------------------------------------------------------------------------

REFUSED = {
    "64-bit whole numbers": (np.zeros((4, 4, 1), np.uint64), 64, 1, {}),
    "complex numbers": (np.zeros((4, 4, 1), np.complex64), 64, 1, {}),
    "7 samples a pixel": (np.zeros((4, 4, 7), np.uint16), 16, 1, {}),
    "raw values behind a colour filter": (np.zeros((4, 4, 1), np.uint16), 16, 32803, {}),
    "logarithmic": (np.zeros((4, 4, 1), np.uint16), 16, 32844, {}),
    "CIELab": (np.zeros((4, 4, 3), np.uint16), 16, 8, {}),
    "a palette": (np.zeros((4, 4, 1), np.uint16), 16, 3, {}),
    "32-bit floating point values with predictor 2": (np.zeros((4, 4, 1), np.float32), 32, 2 - 1, {317: 2}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_kind_that_cannot_be_read_is_named_with_the_remedy(tmp_path, what):
    values, bits, photometric, more = REFUSED[what]
    write(tmp_path / "a.tif", values, bits, photometric, more=tuple(more.items()))
    with pytest.raises(DataError, match=rf"a TIFF of .*{what}.* cannot be read: convert it to 8 or 16 bit"):
        load_images(tmp_path, value_range="0:1")


def test_a_strip_that_ends_beyond_the_file_is_cut_off(tmp_path):
    """Though what is there of it may be enough to decode."""
    options = {"compression": LZW, "rows": HEIGHT, "more": ((279, 10**6),)}
    write(tmp_path / "a.tif", whole(shares(1), 12), 12, 1, **options)
    with pytest.raises(DataError, match="cut off"):
        load_images(tmp_path)


@pytest.mark.parametrize("compression", [RAW, LZW, DEFLATE])
def test_planes_that_are_cut_off_or_damaged_are_bad(tmp_path, compression):
    write(tmp_path / "a.tif", whole(shares(3), 16), 16, 2, planar=True, compression=compression, rows=HEIGHT)
    good = (tmp_path / "a.tif").read_bytes()
    with Image.open(tmp_path / "a.tif") as image:
        starts = image.tag_v2[273]
    places = struct.pack("<3I", *starts)
    assert good.count(places) == 1
    cut_off = good.replace(places, struct.pack("<3I", *starts[:2], len(good) - 9))
    damaged = good[: starts[1] + 300] + bytes(100) + good[starts[1] + 400 :]
    for bad in (cut_off,) if compression == RAW else (cut_off, damaged):
        (tmp_path / "a.tif").write_bytes(bad)
        with pytest.raises(DataError, match=r"cut off|damaged"):
            load_images(tmp_path)
