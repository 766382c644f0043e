"""Pixels as the file declares them, in every format and depth: scale, sign, transparency, turns, colour profiles.

Long, because all of them need files written by hand: one section per claim.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from robustdiff.commands import main
from robustdiff.data.dataset import load_images
from robustdiff.utils.errors import DataError, RobustdiffWarning

RAMP = np.linspace(0, 1, 48).reshape(6, 8)
"""Shares of full scale."""
GREY = np.round(RAMP * 255).astype(int)


def tiff(path, data, bits, *, photometric=1, kind=1, samples=1, extra=(), orientation=1, size=(8, 6), order="<"):
    """An uncompressed TIFF of one strip, written by hand: Pillow writes few of the kinds that there are."""
    entries = [(256, 4, [size[0]]), (257, 4, [size[1]]), (258, 3, [bits] * samples), (259, 3, [1])]
    entries += [(262, 3, [photometric]), (273, 4, [8]), (274, 3, [orientation]), (277, 3, [samples])]
    entries += [(278, 4, [size[1]]), (279, 4, [len(data)]), (339, 3, [kind] * samples)]
    entries += [(338, 3, list(extra))] if extra else []
    entries.sort()
    start = 8 + len(data)
    after = start + 2 + 12 * len(entries) + 4
    table, rest = struct.pack(order + "H", len(entries)), b""
    for tag, code, values in entries:
        packed = struct.pack(order + {3: "H", 4: "I"}[code] * len(values), *values)
        if len(packed) > 4:
            packed, rest = struct.pack(order + "I", after + len(rest)), rest + packed
        table += struct.pack(order + "HHI", tag, code, len(values)) + packed.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(mark + struct.pack(order + "I", start) + data + table + bytes(4) + rest)


def png(path, rows, depth, colour, *chunks):
    """A PNG written by hand, from rows of bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width = len(rows[0]) * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = [chunk(b"IHDR", header), *(chunk(*one) for one in chunks), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def twelve_bits(values):
    """Two numbers in three bytes."""
    first, second = values.reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def read(folder, **options):
    """The only image of a folder, (C, H, W), and what was remarked upon."""
    loaded = load_images(folder, **options)
    assert loaded.skipped == ()
    assert len(loaded) == 1
    return loaded.images[0].numpy().astype(int), loaded.notes


# -- scale and sign ----------------------------------------------------------------------------------

DEPTHS = {
    "8 bit": (8, 1, 1, lambda share: np.round(share * 255).astype("<u1").tobytes()),
    "8 bit, white is zero": (8, 0, 1, lambda share: (255 - np.round(share * 255)).astype("<u1").tobytes()),
    "8 bit, signed": (8, 1, 2, lambda share: np.round(share * 127).astype("<i1").tobytes()),
    "12 bit": (12, 1, 1, lambda share: twelve_bits(np.round(share * 4095).astype(int))),
    "16 bit": (16, 1, 1, lambda share: np.round(share * 65535).astype("<u2").tobytes()),
    "16 bit, white is zero": (16, 0, 1, lambda share: (65535 - np.round(share * 65535)).astype("<u2").tobytes()),
    "16 bit, signed": (16, 1, 2, lambda share: np.round(share * 32767).astype("<i2").tobytes()),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_full_scale_and_sign_are_those_of_the_file(tmp_path, name):
    bits, photometric, kind, pack = DEPTHS[name]
    tiff(tmp_path / "a.tif", pack(RAMP), bits, photometric=photometric, kind=kind)
    image, _ = read(tmp_path)
    assert image.shape == (1, 6, 8)
    assert (image[0, 0, 0], image[0, -1, -1]) == (0, 255)
    assert abs(image[0] - GREY).max() <= 1


@pytest.mark.parametrize("maxval", [1, 15, 255, 1023, 65535])
def test_the_largest_value_of_a_netpbm_file_is_white(tmp_path, maxval):
    values = np.round(RAMP * maxval)
    body = values.astype("u1" if maxval < 256 else ">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(b"P5 8 6 %d\n" % maxval + body)
    np.testing.assert_allclose(read(tmp_path)[0][0], values / maxval * 255, atol=1)


@pytest.mark.parametrize(("kind", "pack"), [(8, "<i1"), (16, "<i2")])
def test_values_below_zero_are_refused_unless_told(tmp_path, kind, pack):
    values = np.round(RAMP * 100 - 50)
    tiff(tmp_path / "a.tif", values.astype(pack).tobytes(), kind, kind=2)
    with pytest.raises(DataError, match="`value_range`"):
        load_images(tmp_path)
    image, _ = read(tmp_path, value_range="-50:50")
    assert abs(image[0] - GREY).max() <= 3


def test_an_array_of_true_and_false_is_black_and_white(tmp_path):
    mask = np.random.default_rng(0).random((5, 6, 8)) < 0.5
    np.save(tmp_path / "a.npy", mask)
    np.savez(tmp_path / "a.npz", images=mask)
    for name in ("a.npy", "a.npz"):
        for memory in (None, 0):
            loaded = load_images(tmp_path / name, max_memory=memory)
            np.testing.assert_array_equal(loaded.images[range(5)][:, 0].numpy(), mask * 255)


# -- a sliver of the range ---------------------------------------------------------------------------


def write_12_in_16(folder):
    tiff(folder / "a.tif", np.round(RAMP * 4095).astype("<u2").tobytes(), 16)


def write_12_in_16_colour(folder):
    values = np.stack([RAMP, RAMP / 2, RAMP / 4], -1) * 4095
    tiff(folder / "a.tif", np.round(values).astype("<u2").tobytes(), 16, photometric=2, samples=3)


def write_12_in_16_colour_big_endian(folder):
    values = np.stack([RAMP, RAMP / 2, RAMP / 4], -1) * 4095
    png(folder / "a.png", [row.astype(">u2").tobytes() for row in np.round(values)], 16, 2)


def write_8_in_32(folder):
    Image.fromarray(np.round(RAMP * 255).astype(np.int32)).save(folder / "a.tif")


def write_zero_and_one(folder):
    np.save(folder / "a.npy", (RAMP[None] > 0.5).astype(np.uint8))


SLIVERS = {
    "12 in 16": (write_12_in_16, "0:4095"),
    "12 in 16, compressed colour": (write_12_in_16_colour_big_endian, "0:4095"),
    "12 in 16, colour": (write_12_in_16_colour, "0:4095"),
    "8 in 32": (write_8_in_32, "0:255"),
    "0 and 1": (write_zero_and_one, "0:1"),
}


@pytest.mark.parametrize("name", SLIVERS)
def test_a_set_that_spans_a_sliver_of_its_range_is_told_and_mended(tmp_path, name):
    write, value_range = SLIVERS[name]
    write(tmp_path)
    source = next(tmp_path.glob("*.npy"), tmp_path)
    with pytest.warns(RobustdiffWarning, match="`value_range`"):
        dark = load_images(source)
    assert dark.images.max() <= 16
    mended, _ = read(source, value_range=value_range)
    expected = 255 * (RAMP > 0.5) if name == "0 and 1" else GREY
    assert abs(mended[0] - expected).max() <= 1
    if "colour" in name:
        assert abs(mended[2] - RAMP * 255 / 4).max() <= 1  # with all of its bits
    streamed = load_images(source, value_range=value_range, max_memory=0)
    assert (streamed.images[0].numpy() == mended).all()


def test_every_command_says_so_and_takes_the_flag(tmp_path, capfd):
    (tmp_path / "photos").mkdir()
    write_12_in_16(tmp_path / "photos")
    flag = ("--value-range", "0:4095")
    commands = {"audit": (), "corrupt": (str(tmp_path / "copy"), "--corrupt", "blur", "--overwrite")}
    for command, more in commands.items():
        arguments = [command, str(tmp_path / "photos"), *more]
        assert main.main(arguments) == 0
        assert "--value-range LOW:HIGH" in capfd.readouterr().err
        assert main.main([*arguments, *flag]) == 0
        assert capfd.readouterr().err == ""
    assert abs(read(tmp_path / "copy")[0][0] - GREY).max() <= 40  # blurred


def test_a_set_of_its_whole_range_is_not_told_anything(tmp_path, recwarn):
    tiff(tmp_path / "a.tif", np.round(RAMP * 65535).astype("<u2").tobytes(), 16)
    read(tmp_path)
    Image.new("L", (8, 6), 128).save(tmp_path / "a.tif")  # neither dark nor bright, and nothing more is in it
    read(tmp_path)
    assert len(recwarn) == 0


ENDS = {
    "white": (lambda share: 255 + 0 * share, 255, 255),
    "254 and 255": (lambda share: 254 + (share > 0.5), 254, 255),
    "black": (lambda share: 0 * share, 0, 0),
    "dark": (lambda share: 60 * share, 0, 60),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("odd", ["none", "an image", "a pixel of each"])
def test_a_set_at_either_end_is_told_whatever_one_image_or_pixel_is(tmp_path, name, odd):
    values, low, high = ENDS[name]
    share = np.random.default_rng(0).random((12, 64, 64))
    pixels = np.round(values(share)).astype(np.uint8)
    if odd == "an image":
        pixels[3] = share[3] * 255
    if odd == "a pixel of each":
        pixels[:, 8, 10] = 255 - pixels[:, 8, 10]  # one of the half that is looked at
    np.save(tmp_path / "a.npy", pixels)
    many = "11 of 12 images" if odd == "an image" else "all 12 images"
    with pytest.warns(RobustdiffWarning, match=rf"the pixels of {many} lie within {low} .. {high} of .*`value_range`"):
        load_images(tmp_path / "a.npy")


def test_bright_values_are_mended(tmp_path):
    np.save(tmp_path / "a.npy", (254 + (RAMP[None] > 0.5)).astype(np.uint8))
    assert (read(tmp_path / "a.npy", value_range="254:255")[0][0] == 255 * (RAMP > 0.5)).all()


def test_a_set_that_is_half_dark_is_not_told_anything(tmp_path, recwarn):
    share = np.random.default_rng(0).random((12, 64, 64))
    share[::2] /= 5
    np.save(tmp_path / "a.npy", (share * 255).astype(np.uint8))
    load_images(tmp_path / "a.npy")
    assert len(recwarn) == 0


def test_files_that_cannot_hold_more_keep_their_scale(tmp_path):
    write_12_in_16(tmp_path)
    Image.fromarray(GREY.astype(np.uint8)).save(tmp_path / "b.png")
    loaded = load_images(tmp_path, value_range="0:4095")
    assert (loaded.images[0].int() - loaded.images[1].int()).abs().max() <= 1


def test_floating_point_is_read_when_told(tmp_path):
    Image.fromarray((RAMP * 2 - 1).astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"floating-point .* `value_range`"):
        load_images(tmp_path)
    assert abs(read(tmp_path, value_range="-1:1")[0][0] - GREY).max() <= 1


@pytest.mark.parametrize("text", ["", "5", "1:0", "a:b", "0:nan", "0:inf", "3:3"])
def test_a_range_that_is_none_is_one_line(tmp_path, text):
    write_12_in_16(tmp_path)
    with pytest.raises(DataError, match=r"`value_range` .* LOW:HIGH"):
        load_images(tmp_path, value_range=text)


# -- turns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_a_tiff_is_turned_as_from_a_table(tmp_path, mode, orientation):
    """Pillow maps uncompressed files that it opens by their path, and scrambles those that lie on their side."""
    width = {"L": 1, "RGBA": 4, "CMYK": 4, "I;16": 2}[mode]
    data = np.random.default_rng(0).integers(0, 256, 6 * 8 * width).astype(np.uint8)
    kind = {"L": {}, "RGBA": {"photometric": 2, "samples": 4, "extra": (2,)}, "I;16": {}}
    more = kind.get(mode, {"photometric": 5, "samples": 4})
    tiff(tmp_path / "a.tif", data.tobytes(), 16 if mode == "I;16" else 8, orientation=orientation, **more)
    with Image.open(io.BytesIO((tmp_path / "a.tif").read_bytes())) as upright:
        assert upright.mode == mode
    tiff(tmp_path / "b.tif", data.tobytes(), 16 if mode == "I;16" else 8, **more)
    loaded = load_images(tmp_path, resolution=6)
    turn = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1)}
    turn |= {6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}
    turned, plain = (image.numpy().transpose(1, 2, 0) for image in loaded.images)
    np.testing.assert_array_equal(turned, turn[orientation](plain))


# -- transparency ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "order"), [(8, "<"), (16, "<"), (16, ">")])
@pytest.mark.parametrize("extra", [(), (0,), (2,)])
def test_a_fourth_band_is_transparency_only_where_declared(tmp_path, bits, order, extra):
    full = 2**bits - 1
    pixels = np.stack([RAMP * full, RAMP * 0, RAMP * 0 + full, RAMP * 0], -1)  # the fourth: infrared, all dark
    data = np.round(pixels).astype(f"{order}u{bits // 8}").tobytes()
    tiff(tmp_path / "a.tif", data, bits, photometric=2, samples=4, extra=extra, order=order)
    image, notes = read(tmp_path)
    if extra == (2,):
        assert (image == 255).all()
        assert notes["alpha composited over white"] == 1
    else:
        assert abs(image[0] - GREY).max() <= 1
        assert (image[1] == 0).all()
        assert "alpha composited over white" not in notes


@pytest.mark.parametrize("declared", [0, 8])
@pytest.mark.parametrize("compression", [None, "tga_rle"])
def test_a_tga_has_the_transparency_that_it_declares(tmp_path, declared, compression):
    pixels = np.zeros((6, 8, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[0, 0] = (255, 255, 255, 255 * (declared > 0))
    Image.fromarray(pixels).save(tmp_path / "a.tga", compression=compression)
    data = bytearray((tmp_path / "a.tga").read_bytes())
    data[17] = data[17] & 0xF0 | declared
    (tmp_path / "a.tga").write_bytes(bytes(data))
    image, _ = read(tmp_path)
    assert (image.reshape(3, -1)[:, 1:] == ([[255]] * 3 if declared else [[200], [0], [0]])).all()


@pytest.mark.parametrize("form", ["tga", "bmp"])
def test_transparency_of_nothing_but_zeros_says_nothing(tmp_path, form):
    pixels = np.zeros((6, 8, 4), np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(tmp_path / f"a.{form}")
    if form == "bmp":  # Pillow declares none
        masks = struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
        head = struct.pack("<IiiHHIIiiII", 108, 8, 6, 1, 32, 3, pixels.nbytes, 0, 0, 0, 0) + masks + bytes(52)
        whole = struct.pack("<2sIHHI", b"BM", 122 + pixels.nbytes, 0, 0, 122) + head + pixels.tobytes()
        (tmp_path / "a.bmp").write_bytes(whole)
    with Image.open(tmp_path / f"a.{form}") as image:
        assert image.mode == "RGBA"
    image, _ = read(tmp_path)
    assert (image.reshape(3, -1) == [[200], [0], [0]]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_value_that_png_declares_transparent(tmp_path, depth):
    full = 2**depth - 1
    row = {1: b"\x40", 2: b"\x3f", 4: b"\x0f", 8: b"\x00\xff", 16: b"\x00\x00\xff\xff"}[depth]
    png(tmp_path / "a.png", [row], depth, 0, (b"tRNS", struct.pack(">H", 0)))
    image, notes = read(tmp_path)
    assert image.min() == 255, f"black is transparent, so that all is white; full scale {full}"
    assert notes["alpha composited over white"] == 1
    png(tmp_path / "a.png", [row], depth, 0, (b"tRNS", struct.pack(">H", full)))
    assert read(tmp_path)[0].min() == 0


@pytest.mark.parametrize("value_range", [None, "0:4095"])
def test_a_colour_of_16_bit_that_png_declares_transparent(tmp_path, value_range):
    full = 65535 if value_range is None else 4095
    pixels = np.array([[(full, 0, 0), (full - 1, 0, 0), (0, full, 0)]])
    png(tmp_path / "a.png", [pixels[0].astype(">u2").tobytes()], 16, 2, (b"tRNS", struct.pack(">HHH", full, 0, 0)))
    image, notes = read(tmp_path, value_range=value_range)
    assert image.transpose(1, 2, 0)[0].tolist() == [[255, 255, 255], [255, 0, 0], [0, 255, 0]]
    assert notes["alpha composited over white"] == 1


def test_grey_of_16_bit_with_alpha_takes_a_range(tmp_path):
    pair = np.stack([RAMP * 4095, np.where(RAMP < 0.5, 65535, 0)], -1)
    png(tmp_path / "a.png", [row.astype(">u2").tobytes() for row in np.round(pair)], 16, 4)
    image, _ = read(tmp_path, value_range="0:4095")
    assert image.shape[0] == 1
    assert abs(image[0] - np.where(RAMP < 0.5, GREY, 255)).max() <= 1


# -- what has no colour ------------------------------------------------------------------------------


def test_a_palette_of_greys_and_16_bit_grey_with_alpha_are_grey(tmp_path):
    Image.fromarray(GREY.astype(np.uint8)).save(tmp_path / "a.png")
    palette = Image.fromarray((GREY // 16).astype(np.uint8)).convert("P")
    palette.putpalette([value for grey in range(16) for value in [grey * 17] * 3] + [9, 200, 3])  # the last is unused
    palette.save(tmp_path / "b.png")
    pair = np.stack([RAMP, RAMP * 0 + 1], -1) * 65535
    png(tmp_path / "c.png", [row.astype(">u2").tobytes() for row in np.round(pair)], 16, 4)
    loaded = load_images(tmp_path)
    assert loaded.channels == 1
    assert abs(loaded.images[2, 0].numpy() - GREY).max() <= 1
    palette.putpalette([value for grey in range(16) for value in [grey * 17] * 2 + [0]])
    palette.save(tmp_path / "b.png")
    assert load_images(tmp_path).channels == 3


# -- colour profiles ---------------------------------------------------------------------------------


def s15(*values):
    """Numbers as profiles hold them."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


D50 = s15(0.9642, 1.0, 0.8249)


def icc(kind, tags):
    """A profile of a class, a colour space and a connection space."""
    place, index, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        index += name + struct.pack(">II", place + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    head = b"\0\0\0\0lcms\x02\x10\0\0" + kind + bytes(12) + b"acsp" + bytes(28) + D50
    whole = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body
    return struct.pack(">I", len(whole)) + whole[4:]


def matrix_profile(red, green, blue, gamma=2.2):
    """An RGB profile of three primaries (XYZ, D50) and one exponent."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + D50}
    for name, primary in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue)):
        tags[name] = b"XYZ \0\0\0\0" + s15(*primary)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(80)
    tags[b"cprt"] = b"text\0\0\0\0x\0\0\0"
    return icc(b"mntrRGB XYZ ", tags)


P3 = matrix_profile((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def coloured(path, colour=(200, 60, 50), profile=P3, **options):
    """An image of one colour of sRGB, saved in the colours of a profile."""
    image = Image.new("RGB", (16, 16), colour)
    to = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    image = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), to, outputMode="RGB")
    image.save(path, icc_profile=profile, **options)
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("jpg", {"quality": 100, "subsampling": 0}), ("tif", {}), ("webp", {"lossless": True})],
)
def test_colours_of_another_profile_become_srgb(tmp_path, suffix, options):
    stored = coloured(tmp_path / f"a.{suffix}", **options)
    assert max(abs(a - b) for a, b in zip(stored, (200, 60, 50), strict=True)) > 8
    image, notes = read(tmp_path)
    assert abs(image[:, 8, 8] - (200, 60, 50)).max() <= 2
    assert notes["colours converted to sRGB by the embedded profile"] == 1
    streamed = load_images(tmp_path, max_memory=0)
    assert (streamed.images[0].numpy() == image).all()


def table_profile(corners):
    """A CMYK profile that says the colour (L*, a*, b* + 128) of every corner, C varying slowest."""
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    table += straight * 4 + bytes(np.asarray(corners, np.uint8)) + straight * 3
    tags = {b"A2B0": table, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": b"XYZ \0\0\0\0" + D50}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(80)
    return icc(b"prtrCMYKLab ", tags)


@pytest.mark.parametrize("form", ["jpg", "tif"])
def test_cmyk_is_converted_by_its_profile(tmp_path, form):
    corners = np.zeros((2, 2, 2, 2, 3))
    corners[...] = (60, 100, 150)
    corners[0, 0, 0, 0] = (255, 128, 128)
    corners[1, 0, 0, 0] = (128, 200, 100)  # this printer's cyan is no cyan
    profile = table_profile(corners)
    for name, ink in (("a", (0, 0, 0, 0)), ("b", (255, 0, 0, 0))):
        Image.new("CMYK", (16, 16), ink).save(tmp_path / f"{name}.{form}", icc_profile=profile, quality=100)
    loaded = load_images(tmp_path)
    lab = Image.new("LAB", (1, 1), (128, 200, 100))
    to = ImageCms.profileToProfile(lab, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert loaded.images[0].min() >= 253
    assert abs(loaded.images[1][:, 8, 8].numpy().astype(int) - to.getpixel((0, 0))).max() <= 6
    assert loaded.notes["colours converted to sRGB by the embedded profile"] == 2


@pytest.mark.parametrize("form", ["P", "RGBA"])
def test_palettes_and_transparent_images_have_profiles_too(tmp_path, form):
    stored = coloured(tmp_path / "a.png")
    image = Image.new("RGB", (16, 16), stored)
    image = image.quantize(4) if form == "P" else image.convert("RGBA")
    image.save(tmp_path / "a.png", icc_profile=P3)
    assert abs(read(tmp_path)[0][:, 8, 8] - (200, 60, 50)).max() <= 2


def test_images_in_srgb_are_left_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=SRGB)
    image, notes = read(tmp_path)
    np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1))
    assert notes == {}


@pytest.mark.parametrize("profile", [b"no profile", P3[:200], b"\0" * 500])
def test_a_profile_that_is_none_costs_no_picture(tmp_path, profile):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    image, notes = read(tmp_path)
    np.testing.assert_array_equal(image, pixels.transpose(2, 0, 1))
    assert notes == {"colour profile that does not fit ignored": 1}


def test_a_profile_of_another_kind_of_colours_is_ignored(tmp_path):
    Image.fromarray(GREY.astype(np.uint8)).save(tmp_path / "a.png", icc_profile=P3)
    image, notes = read(tmp_path)
    np.testing.assert_array_equal(image[0], GREY)
    assert notes == {"colour profile that does not fit ignored": 1}


def test_lab_is_read(tmp_path):
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), (200, 60, 50)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    lab.save(tmp_path / "a.tif")
    assert abs(read(tmp_path)[0][:, 4, 4] - (200, 60, 50)).max() <= 3


def test_a_large_profile_in_png_is_used(tmp_path):
    """Pillow refuses more than a megabyte; a profile may be padded."""
    big = P3 + np.random.default_rng(0).bytes(2_000_000)
    big = struct.pack(">I", len(big)) + big[4:]
    stored = coloured(tmp_path / "b.png")
    (tmp_path / "b.png").unlink()
    row = bytes(stored) * 4
    png(tmp_path / "a.png", [row] * 4, 8, 2, (b"iCCP", b"big\0\0" + zlib.compress(big)))
    assert abs(read(tmp_path)[0][:, 1, 1] - (200, 60, 50)).max() <= 2


# -- colours of PNG without a profile ----------------------------------------------------------------

CONVERTED = {"colours converted to sRGB by the embedded profile": 1}
IGNORED = {"colour profile that does not fit ignored": 1}
SRGB_POINTS = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_POINTS = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
STORED, SHOWN = (185, 71, 58), (200, 60, 50)
"""One colour in Display P3 and in sRGB."""


def chrm(*points):
    return b"cHRM", struct.pack(">8I", *points)


def gama(value):
    return b"gAMA", struct.pack(">I", value)


def shown(linear):
    """Light, 0 to 1, as a value of sRGB."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


DECLARED = {
    "Display P3, coded": ([(b"cICP", b"\x0c\x0d\0\1")], STORED, SHOWN, CONVERTED),
    "Display P3, chromaticities": ([gama(45455), chrm(*P3_POINTS)], STORED, SHOWN, CONVERTED),
    "chromaticities alone": ([chrm(*P3_POINTS)], STORED, SHOWN, CONVERTED),
    "the code rules": ([(b"sRGB", b"\0"), (b"cICP", b"\x0c\x0d\0\1")], STORED, SHOWN, CONVERTED),
    "linear light": ([gama(100000)], (60, 120, 20), shown(np.array([60, 120, 20]) / 255), CONVERTED),
    "linear light, coded": ([(b"cICP", b"\1\x08\0\1")], (60, 120, 20), shown(np.array([60, 120, 20]) / 255), CONVERTED),
    "sRGB, coded": ([(b"cICP", b"\1\x0d\0\1")], STORED, STORED, {}),
    "sRGB": ([(b"sRGB", b"\0"), gama(45455), chrm(*P3_POINTS)], STORED, STORED, {}),
    "the usual": ([gama(45455), chrm(*SRGB_POINTS)], STORED, STORED, {}),
    "the usual curve": ([gama(45454)], STORED, STORED, {}),
    "HDR": ([(b"cICP", b"\x09\x10\0\1")], STORED, STORED, IGNORED),
    "no colours": ([chrm(*[0] * 8)], STORED, STORED, IGNORED),
    "colours on a line": ([chrm(31270, 32900, *[30000] * 6)], STORED, STORED, IGNORED),
    "absurd": ([chrm(31270, 1, *SRGB_POINTS[2:]), gama(1)], STORED, STORED, IGNORED),
}


@pytest.mark.parametrize("name", DECLARED)
def test_colours_that_png_declares_without_a_profile(tmp_path, name):
    chunks, stored, expected, notes = DECLARED[name]
    png(tmp_path / "a.png", [bytes(stored) * 4] * 4, 8, 2, *chunks)
    image, found = read(tmp_path)
    assert found == notes
    np.testing.assert_allclose(image[:, 2, 2], expected, atol=2 if notes == CONVERTED else 0)
    assert (load_images(tmp_path, max_memory=0).images[0].numpy() == image).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_of_linear_light(tmp_path, depth):
    values = np.arange(10, 256, 5)  # where the curve is steeper, ImageCms is some levels off
    row = (values * (257 if depth == 16 else 1)).astype(">u2" if depth == 16 else "u1").tobytes()
    png(tmp_path / "a.png", [row], depth, 0, gama(100000))
    image, notes = read(tmp_path)
    assert image.shape[0] == 1
    np.testing.assert_allclose(image[0, 0], shown(values / 255), atol=2)
    assert notes["colours converted to sRGB by the embedded profile"] == 1


def test_a_code_goes_before_a_profile(tmp_path):
    profile = (b"iCCP", b"p\0\0" + zlib.compress(SRGB))
    png(tmp_path / "a.png", [bytes(STORED) * 4] * 4, 8, 2, profile, (b"cICP", b"\x0c\x0d\0\1"))
    np.testing.assert_allclose(read(tmp_path)[0][:, 2, 2], SHOWN, atol=2)


def test_a_profile_goes_before_chromaticities(tmp_path):
    profile = (b"iCCP", b"p\0\0" + zlib.compress(SRGB))
    png(tmp_path / "a.png", [bytes(STORED) * 4] * 4, 8, 2, profile, gama(100000), chrm(*P3_POINTS))
    assert read(tmp_path)[0][:, 2, 2].tolist() == list(STORED)


def test_damaged_chunks_of_colour_cost_nothing(tmp_path):
    png(tmp_path / "a.png", [bytes(STORED) * 4] * 4, 8, 2, gama(100000))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data.replace(struct.pack(">I", 100000), struct.pack(">I", 100001)))
    assert read(tmp_path)[0][:, 2, 2].tolist() == list(STORED)
