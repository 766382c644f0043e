"""Folders and arrays of every kind to 8-bit images; damaged files; dirty copies and their manifest.

Long, because image sets, decoding and dirty copies share its fixtures: one section per claim.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from robustdiff.data import dataset as module
from robustdiff.data import decode, decode_pool, image_folder
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import DataError, load_images
from robustdiff.data.image_folder import write_dirty_copy
from robustdiff.utils.errors import RobustdiffWarning
from robustdiff.utils.images import save_png

REDUCE = "more than 1000 pixels: make it smaller first, if it is a picture and no decompression bomb"


def pixels(height=6, width=8, channels=3, seed=0, low=0, high=256):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.uint8)


def save(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels() if array is None else array).save(path, **options)
    return path


def only(folder, **options):
    """The single image of a folder, (C, H, W) as numpy, and the notes."""
    loaded = load_images(folder, **options)
    assert loaded.skipped == ()
    assert len(loaded) == 1
    return loaded.images[0].numpy(), loaded.notes


def fails(*words, source, **options):
    """Loading must fail with one line that holds all the words."""
    with pytest.raises(DataError) as caught:
        load_images(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# -- folders -----------------------------------------------------------------------------------------


def test_a_folder_is_read_recursively_in_the_order_of_the_names(tmp_path):
    names = ["B.png", "a/z.bmp", "a.png", "a/b/1.webp", "c.tiff", "d.tga", "no_suffix", ".hidden.png", ".cache/x.png"]
    for seed, name in enumerate(names):
        form = "PNG" if name == "no_suffix" else None
        save(tmp_path / name, pixels(seed=seed), format=form, **({"lossless": True} if "webp" in name else {}))
    loaded = load_images(tmp_path)
    assert loaded.names == ("B.png", "a.png", "a/b/1.webp", "a/z.bmp", "c.tiff", "d.tga", "no_suffix")
    for name, image in zip(loaded.names, loaded.images, strict=True):
        expected = pixels(seed=names.index(name)).transpose(2, 0, 1)
        np.testing.assert_array_equal(image.numpy(), expected)
    assert (len(loaded), loaded.channels, loaded.size, loaded.bytes) == (7, 3, (6, 8), 7 * 3 * 6 * 8)
    assert loaded.notes == {}


def test_x0_is_in_minus_one_to_one(tmp_path):
    save(tmp_path / "a.png", np.array([[0, 255], [51, 204]], np.uint8))
    save(tmp_path / "b.png", np.array([[255, 255], [255, 255]], np.uint8))
    loaded = load_images(tmp_path)
    x0 = loaded.x0(0)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, torch.tensor([[[-1.0, 1.0], [-0.6, 0.6]]]), rtol=0, atol=1e-7)
    assert torch.equal(loaded.x0([1, 0])[1], x0)


def test_the_description_is_json_and_its_digest_is_that_of_the_pixels(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    described = json.loads(json.dumps(load_images(tmp_path).describe()))
    assert described == {
        "source": str(tmp_path),
        "kind": "folder",
        "count": 1,
        "size": [6, 8],
        "channels": 3,
        "classes": {},
        "labels_sha256": None,
        "skipped": [{"name": "b.png", "reason": "empty file"}],
        "conversions": {},
        "sha256": hashlib.sha256(pixels().transpose(2, 0, 1).tobytes()).hexdigest(),
    }


def test_classes_are_the_folders_of_the_first_level(tmp_path):
    for name in ("cat/1.png", "cat/deep/2.png", "ant/3.png"):
        save(tmp_path / name)
    loaded = load_images(tmp_path)
    assert loaded.classes == ("ant", "cat")
    assert loaded.labels.tolist() == [0, 1, 1]
    save(tmp_path / "loose.png")
    assert (load_images(tmp_path).classes, load_images(tmp_path).labels) == ((), None)


def test_more_files_than_a_chunk_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_pool, "CHUNK", 3)
    for number in range(10):
        save(tmp_path / f"{number}.png", np.full((2, 2), number, np.uint8))
    (tmp_path / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    loaded = load_images(tmp_path)
    assert loaded.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]


# -- conversions -------------------------------------------------------------------------------------


def test_sixteen_bit_grey_is_rounded(tmp_path):
    values = np.array([[0, 257, 300], [32768, 65535, 65406]], np.uint16)
    save(tmp_path / "a.png", values)
    image, notes = only(tmp_path)
    np.testing.assert_array_equal(image[0], np.round(values / 257))
    assert notes == {"16-bit reduced to 8-bit": 1}


@pytest.mark.parametrize("high", [65535, 65536])
def test_wide_integers_are_read_within_sixteen_bits_and_refused_beyond(tmp_path, high):
    save(tmp_path / "a.png", pixels(2, 2, 1))
    save(tmp_path / "b.tiff", np.array([[0, 257], [514, high]], np.int32))
    loaded = load_images(tmp_path)
    if high == 65535:
        assert loaded.images[1].tolist() == [[[0, 1], [2, 255]]]
        assert loaded.notes == {"16-bit reduced to 8-bit": 1}
    else:
        assert loaded.skipped[0][0] == "b.tiff"
        assert "0..65535" in loaded.skipped[0][1]


def test_sixteen_bit_colour_is_counted(tmp_path):
    # Pillow cannot write it: a hand-made PNG.
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\x00" + struct.pack(">6H", 0x0100, 0x8000, 0xFFFF, 0, 0x1234, 0x00FF)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    image, notes = only(tmp_path)
    np.testing.assert_allclose(image[:, 0].T, [[1, 128, 255], [0, 18, 0]], atol=1)
    assert notes == {"16-bit reduced to 8-bit": 1}


def test_floating_point_pixels_are_skipped_with_a_reason(tmp_path):
    save(tmp_path / "a.png", pixels(2, 2, 1))
    save(tmp_path / "f.tiff", np.zeros((2, 2), np.float32))
    ((name, reason),) = load_images(tmp_path).skipped
    assert name == "f.tiff"
    assert "floating-point" in reason


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    array, notes = only(tmp_path)
    assert array[:, 0].T.tolist() == [[10, 20, 30], [200, 100, 50]]
    assert notes == {"palette expanded": 1}
    image.save(tmp_path / "a.png", transparency=0)
    array, notes = only(tmp_path)
    assert array[:, 0].T.tolist() == [[255, 255, 255], [200, 100, 50]]
    assert notes == {"palette expanded": 1, "alpha composited over white": 1}


def test_alpha_is_composited_over_white(tmp_path):
    save(tmp_path / "a.png", np.array([[[100, 0, 50, 255], [9, 9, 9, 0], [0, 0, 0, 51]]], np.uint8))
    array, notes = only(tmp_path)
    np.testing.assert_array_equal(array[:, 0].T, [[100, 0, 50], [255, 255, 255], [204, 204, 204]])
    assert notes == {"alpha composited over white": 1}


def test_grey_with_alpha_stays_grey(tmp_path):
    grey = Image.fromarray(np.array([[100, 9, 0]], np.uint8))
    grey.putalpha(Image.fromarray(np.array([[255, 0, 51]], np.uint8)))
    assert grey.mode == "LA"
    grey.save(tmp_path / "a.png")
    array, notes = only(tmp_path)
    assert array.tolist() == [[[100, 255, 204]]]
    assert notes == {"alpha composited over white": 1}


def test_one_bit_and_cmyk(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "a.png")
    array, notes = only(tmp_path)
    assert array.tolist() == [[[0, 255]]]
    assert notes == {"1-bit expanded to 8-bit": 1}

    (tmp_path / "a.png").unlink()
    cmyk = Image.fromarray(pixels()).convert("CMYK")
    cmyk.save(tmp_path / "a.jpg", quality=95)
    array, notes = only(tmp_path)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(array, expected)
    assert notes == {"CMYK converted to RGB": 1}


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, suffix):
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (255, 0)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    array, notes = only(tmp_path, channels=3)
    assert (array == 255).all()
    assert notes["first frame of an animation"] == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    image = Image.fromarray(pixels())
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    array, notes = only(tmp_path)
    image.info["exif"] = exif.tobytes()
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    assert (expected.shape == (3, 8, 6)) == (orientation >= 5)
    np.testing.assert_array_equal(array, expected)
    if suffix == "png":
        assert notes == ({} if orientation == 1 else {"EXIF rotation applied": 1})


def test_a_rotated_photograph_and_broken_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", exif=exif)
    assert load_images(tmp_path).size == (8, 6)
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00nonsense that is not TIFF")
    array, notes = only(tmp_path)
    assert array.shape == (3, 6, 8)
    assert notes == {}


def test_channels_follow_the_modes_unless_told(tmp_path):
    save(tmp_path / "grey.png", pixels(channels=1))
    assert load_images(tmp_path).channels == 1
    array, notes = only(tmp_path, channels=3)
    assert (array == pixels(channels=1)).all()
    assert notes == {"grey expanded to RGB": 1}
    save(tmp_path / "rgb.png", pixels(seed=1))
    both = load_images(tmp_path)
    assert both.channels == 3
    assert both.notes == {"grey expanded to RGB": 1}
    grey = load_images(tmp_path, channels=1)
    assert grey.notes == {"colour reduced to grey": 1}
    np.testing.assert_array_equal(grey.images[1, 0].numpy(), np.asarray(Image.fromarray(pixels(seed=1)).convert("L")))


def test_an_unreadable_colour_file_does_not_make_a_grey_set_colour(tmp_path):
    save(tmp_path / "grey.png", pixels(channels=1))
    truncate(save(tmp_path / "rgb.png", pixels(seed=1)))
    loaded = load_images(tmp_path)
    assert loaded.channels == 1
    assert loaded.notes == {}
    np.testing.assert_array_equal(loaded.images[0, 0].numpy(), pixels(channels=1))


# -- sizes -------------------------------------------------------------------------------------------


def test_mixed_sizes_need_a_resolution(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.png", pixels(20, 30, seed=number))
    save(tmp_path / "small.png", pixels(10, 8))
    save(tmp_path / "tall.png", pixels(40, 20))
    fails("3 different sizes", "30 x 20, 4 times", "`resolution` N", source=tmp_path)
    loaded = load_images(tmp_path, resolution=10)
    assert loaded.size == (10, 10)
    assert loaded.notes == {"cropped to a square": 6, "reduced": 5, "enlarged": 1}


def test_one_odd_size_or_rotation_is_found_as_well(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png", pixels(4, 6, seed=number))
    save(tmp_path / "odd.png", pixels(4, 5))
    fails("2 different sizes", "6 x 4, 3 times", source=tmp_path)
    save(tmp_path / "odd.png", pixels(6, 4))
    fails("2 different sizes", "6 x 4, 3 times", source=tmp_path)


def test_a_truncated_file_of_another_size_does_not_count(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png", pixels(seed=number))
    truncate(save(tmp_path / "odd.png", pixels(30, 30)))
    assert load_images(tmp_path).size == (6, 8)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (31, 20), (20, 20)])
def test_the_shorter_side_is_resized_and_the_centre_cropped(tmp_path, height, width):
    array = np.zeros((height, width), np.uint8)
    array[(height - 20) // 2 : (height - 20) // 2 + 20, (width - 20) // 2 : (width - 20) // 2 + 20] = pixels(20, 20, 1)
    save(tmp_path / "a.png", array)
    cropped = only(tmp_path, resolution=20)[0][0]
    if (height - 20) % 2 == 0:
        np.testing.assert_array_equal(cropped, pixels(20, 20, 1))
    expected = Image.fromarray(array).resize(
        (10, 10),
        Image.Resampling.LANCZOS,
        box=((width - 20) / 2, (height - 20) / 2, (width + 20) / 2, (height + 20) / 2),
    )
    np.testing.assert_array_equal(only(tmp_path, resolution=10)[0][0], np.asarray(expected))


def test_reducing_is_antialiased(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    save(tmp_path / "a.png", stripes)
    reduced = only(tmp_path, resolution=8)[0]
    assert abs(reduced.astype(int) - 127.5).max() < 10


@pytest.mark.parametrize("shape", [(64, 65), (65, 64), (64, 64), (64, 99), (67, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_where_the_shorter_side_fits_pixels_are_copied(tmp_path, shape, channels):
    noise = pixels(*shape, channels)
    save(tmp_path / "a.png", noise)
    copied, notes = only(tmp_path, resolution=64)
    top, left = ((side - 64) // 2 for side in shape)
    expected = np.atleast_3d(noise)[top : top + 64, left : left + 64].transpose(2, 0, 1)
    np.testing.assert_array_equal(copied, expected)
    assert "reduced" not in notes


def test_animations_that_begin_alike_are_told(tmp_path, recwarn):
    title = Image.fromarray(pixels(seed=0))
    for number in range(3):
        frames = [Image.fromarray(pixels(seed=number + 1))]
        title.save(tmp_path / f"{number}.png", save_all=True, append_images=frames)
    save(tmp_path / "still.png", pixels(seed=9))
    with pytest.warns(RobustdiffWarning, match="3 of 3 animations begin with the same picture"):
        load_images(tmp_path)
    for number in range(2):
        frames = [Image.fromarray(pixels(seed=number + 1))]
        Image.fromarray(pixels(seed=number + 5)).save(tmp_path / f"{number}.png", save_all=True, append_images=frames)
    recwarn.clear()
    load_images(tmp_path)
    assert len(recwarn) == 0


# -- files that cannot be read -----------------------------------------------------------------------


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def test_every_bad_file_is_skipped_and_named_with_its_reason(tmp_path, monkeypatch):
    for number in range(3):
        save(tmp_path / f"good{number}.png", pixels(seed=number))
    noise = pixels(64, 64)
    truncate(save(tmp_path / "truncated.jpg", noise))
    truncate(save(tmp_path / "truncated.png", noise))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "data.bin").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "zeros.bin").write_bytes(bytes(5000))
    save(tmp_path / "no_signature.bin", noise, format="TGA")  # any binary file might pass for a TGA
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    save(tmp_path / "bomb.png", pixels(70, 70, 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4500)
    save(tmp_path / "locked.png")
    real_open = module.decode._open

    def guarded_open(path):  # root may read everything, so the refusal is simulated
        if path.name == "locked.png":
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path)

    monkeypatch.setattr(module.decode, "_open", guarded_open)
    loaded = load_images(tmp_path, max_bad_fraction=1)
    reasons = dict(loaded.skipped)
    assert loaded.names == ("good0.png", "good1.png", "good2.png")
    assert [name for name, _ in loaded.skipped] == sorted(reasons)
    assert "4500 pixels" in reasons.pop("bomb.png")
    assert reasons == {
        "truncated.jpg": "cut off",
        "truncated.png": "cut off",
        "empty.png": "empty file",
        "text.png": "not an image",
        "data.bin": "not an image",
        "zeros.bin": "not an image",
        "no_signature.bin": "not an image",
        "page.eps": "PostScript or Illustrator drawing: convert it to PNG first",
        "link.png": "broken symbolic link",
        "pipe.png": "not a regular file",
        "locked.png": "permission denied",
    }


def test_a_bomb_neither_warns_nor_loads(tmp_path, monkeypatch, recwarn):
    save(tmp_path / "good.png")
    save(tmp_path / "bomb.png", pixels(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow alone would warn, and read it
    loaded = load_images(tmp_path)
    assert loaded.names == ("good.png",)
    assert "bomb" in dict(loaded.skipped)["bomb.png"]
    assert len(recwarn) == 0


def test_formats_that_take_much_memory_have_a_limit_of_their_own(tmp_path, monkeypatch):
    save(tmp_path / "good.png", pixels(40, 40))
    Image.fromarray(pixels(40, 40)).save(tmp_path / "small.jp2")
    assert load_images(tmp_path).names == ("good.png", "small.jp2")
    monkeypatch.setitem(decode.LIMITS, "JPEG2000", 1000)
    loaded = load_images(tmp_path)
    assert loaded.names == ("good.png",)
    assert loaded.skipped == (("small.jp2", REDUCE),)


def test_side_cars_are_counted_and_not_named(tmp_path):
    save(tmp_path / "a.png")
    for name in ("a.txt", "a.json", "labels.csv", "README.md", "Thumbs.db", ".DS_Store"):
        (tmp_path / name).write_text("x")
    loaded = load_images(tmp_path, max_bad_fraction=0)
    assert loaded.skipped == ()
    assert loaded.notes == {"side-car files ignored (not images)": 5}


def test_too_many_bad_files_are_an_error(tmp_path):
    for number in range(8):
        save(tmp_path / f"{number}.png", pixels(seed=number))
    (tmp_path / "notes.doc").write_text("no image, and not counted as one")
    (tmp_path / "x0.png").write_bytes(b"")
    assert len(load_images(tmp_path)) == 8  # one bad file never stops a small folder
    fails("at least 1 of 9 images", "x0.png (empty file)", "`max_bad_fraction`", source=tmp_path, max_bad_fraction=0)
    truncate(save(tmp_path / "x1.png", pixels(64, 64)))  # found out only when its pixels are decoded
    words = ("at least 2 of 10 images", "robustdiff audit", "`max_bad_fraction`", "0.01")
    fails(*words, source=tmp_path, resolution=6)
    assert len(load_images(tmp_path, resolution=6, max_bad_fraction=0.2)) == 8
    assert len(load_images(tmp_path, max_bad_fraction=0.2)) == 8


def test_linked_folders_are_followed_once(tmp_path):
    save(tmp_path / "data" / "a.png")
    save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    assert load_images(tmp_path / "data").names == ("a.png", "link/b.png")


def test_a_folder_inside_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert load_images(tmp_path).skipped == (("locked", "folder not read: Permission denied"),)
    fails("permission", source=tmp_path / "locked")


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"resolution": 0}, "`resolution`"),
        ({"channels": 2}, "`channels`"),
        ({"max_bad_fraction": 2}, "`max_bad_fraction`"),
    ],
)
def test_impossible_options_name_their_flag(tmp_path, option, flag):
    fails(flag, source=save(tmp_path / "a.png").parent, **option)


def test_sources_that_cannot_be_used(tmp_path):
    save(tmp_path / "photos" / "a.png")
    fails("fotos", "did you mean", "photos?", source=tmp_path / "fotos")
    assert "mean" not in fails("no such", source=tmp_path / "no" / "where")
    fails("neither a folder", source=tmp_path / "photos" / "a.png")
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    fails("is empty", source=tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("x")
    (tmp_path / "empty" / "b.pdf").write_text("x")
    fails("no readable image", "1 x not an image", "1 x side-car", source=tmp_path / "empty")
    truncate(save(tmp_path / "bad" / "a.png", pixels(64, 64)))
    fails("no readable image", "a.png", source=tmp_path / "bad")


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    save(tmp_path / "a.png")

    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(module.np, "empty", refuse)
    fails("memory", "`resolution`", source=tmp_path)


# -- arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6, 8), (5, 6, 8, 1), (5, 1, 6, 8), (5, 6, 8, 3), (5, 3, 6, 8)])
@pytest.mark.parametrize("kind", ["npy", "npz", "named"])
def test_arrays_of_every_layout(tmp_path, shape, kind):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / ("a.npy" if kind == "npy" else "a.npz")
    if kind == "npy":
        np.save(path, array)
    elif kind == "npz":
        np.savez_compressed(path, anything=array)
    else:
        np.savez(path, images=array, labels=np.arange(5))
    loaded = load_images(path)
    expected = array[:, None] if len(shape) == 3 else array if shape[1] in (1, 3) else array.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(loaded.images.numpy(), expected)
    assert loaded.names == ("0", "1", "2", "3", "4")


def test_arrays_are_converted_like_files(tmp_path):
    array = pixels(3 * 20, 30).reshape(3, 20, 30, 3)
    np.save(tmp_path / "a.npy", array)
    for number, image in enumerate(array):
        save(tmp_path / "folder" / f"{number}.png", image)
    for options in ({"resolution": 10}, {"channels": 1}, {"resolution": 20, "channels": 1}):
        from_array, from_folder = (load_images(tmp_path / name, **options) for name in ("a.npy", "folder"))
        assert torch.equal(from_array.images, from_folder.images)
        assert from_array.notes == from_folder.notes


def test_the_set_does_not_change_with_the_file(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 5), np.uint8))
    loaded = load_images(tmp_path / "a.npy")
    np.load(tmp_path / "a.npy", mmap_mode="r+")[:] = 9
    assert loaded.images.max() == 0


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 4, 4), np.float32), ["float32", "uint8", "127.5"]),
        (np.zeros((2, 4, 4), np.int64), ["int64", "astype"]),
        (np.zeros((4, 4), np.uint8), ["(4, 4)"]),
        (np.zeros((32, 32, 3), np.uint8), ["(32, 32, 3)", "ambiguous"]),
        (np.zeros((5, 3, 7, 3), np.uint8), ["ambiguous"]),
        (np.zeros((5, 8, 8, 4), np.uint8), ["(5, 8, 8, 4)"]),
        (np.zeros((0, 8, 8), np.uint8), ["no image"]),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    fails(*words, source=tmp_path / "a.npy")


def test_pickles_are_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    np.save(tmp_path / "a.npy", np.array([Trap()], object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=np.array([Trap()], object))
    (tmp_path / "b.npy").write_bytes(b"\x80\x04nonsense")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04nonsense")
    for name in ("a.npy", "a.npz", "b.npy", "b.npz"):
        fails("cannot be read as an array", source=tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_an_archive_of_several_arrays_needs_the_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4), np.uint8), z=np.zeros(2))
    fails("named images", "x, z", source=tmp_path / "a.npz")


def test_digits():
    from sklearn.datasets import load_digits

    loaded = load_images("digits")
    assert (len(loaded), loaded.channels, loaded.size, loaded.names[7]) == (1797, 1, (8, 8), "0007")
    np.testing.assert_allclose(loaded.images[:, 0].numpy() / 255, load_digits().images / 16, atol=0.5 / 255)


def test_a_folder_called_digits_can_be_reached(tmp_path, monkeypatch):
    save(tmp_path / "digits" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert load_images("./digits").names == ("a.png",)


# -- dirty copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_png(image, tmp_path / "a.png")
    assert torch.equal(load_images(tmp_path).images[0], image)


def source_folder(tmp_path, count=12):
    for number in range(count):
        save(tmp_path / "clean" / f"{number % 3}" / f"{number:02d}.png", pixels(seed=number))
    return load_images(tmp_path / "clean")


CORRUPTIONS = [Corruption.parse(spec) for spec in ("gaussian:sigma=0.4,fraction=0.6", "impulse:fraction=0.3")]


def test_a_dirty_copy_holds_what_its_manifest_says(tmp_path):
    clean = source_folder(tmp_path)
    manifest = write_dirty_copy(clean, tmp_path / "out" / "dirty", CORRUPTIONS, seed=3)
    folder = tmp_path / "out" / "dirty"
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert manifest["seed"] == 3
    assert "clipped" in manifest["written"]
    assert "[-1, 1]" in manifest["range"]
    assert manifest["clean"]["sha256"] == clean.describe()["sha256"]
    corruptions = [Corruption.parse(spec) for spec in manifest["corruptions"]]  # from the manifest alone
    seen = set()
    for entry in manifest["images"]:
        index = entry["index"]
        assert entry["source"] == clean.names[index]
        assert entry["corruptions"] == [p for p, c in enumerate(corruptions) if c.hits(manifest["seed"], index, p)]
        expected, kinds = corrupt(clean.x0(index), corruptions, 3, index)
        assert [corruptions[place].kind for place in entry["corruptions"]] == list(kinds)
        written = np.asarray(Image.open(folder / entry["file"])).transpose(2, 0, 1)
        exact = (np.clip(expected.double().numpy(), -1, 1) + 1) * 127.5
        np.testing.assert_allclose(written, exact, rtol=0, atol=0.5001)  # clipped, and rounded to the nearest
        assert (written == clean.images[index].numpy()).all() == (not kinds)
        seen.add(kinds)
    assert len(seen) == 4
    assert len(list(folder.rglob("*"))) == len(clean) + 3 + 1  # images, three folders, the manifest
    assert [p.name for p in folder.parent.iterdir()] == ["dirty"]
    assert load_images(folder).names == tuple(entry["file"] for entry in manifest["images"])


def test_names_that_collide_keep_their_suffix(tmp_path):
    for seed, name in enumerate(("a.bmp", "a.jpg", "a.png", "a.png.bmp", "B/c.png", "b/C.bmp")):
        save(tmp_path / "clean" / name, pixels(seed=seed))
    clean = load_images(tmp_path / "clean")
    manifest = write_dirty_copy(clean, tmp_path / "dirty", [], seed=0)
    files = [entry["file"] for entry in manifest["images"]]
    assert len({file.casefold() for file in files}) == len(clean)
    assert dict(zip(clean.names, files, strict=True)) == {
        "B/c.png": "B/c.png",
        "a.bmp": "a.bmp.png",
        "a.jpg": "a.jpg.png",
        "a.png": "a.png",
        "a.png.bmp": "a.png.png",
        "b/C.bmp": "b/C.bmp.png",
    }
    for entry in manifest["images"]:
        written = np.asarray(Image.open(tmp_path / "dirty" / entry["file"])).transpose(2, 0, 1)
        np.testing.assert_array_equal(written, clean.images[entry["index"]].numpy())


@pytest.mark.parametrize("stem", ["x" * 252, "é" * 126])
def test_names_as_long_as_they_can_be_are_copied(tmp_path, stem):
    for seed, suffix in enumerate(("", ".im", ".ps")):
        save(tmp_path / "clean" / f"{stem}{suffix}", pixels(seed=seed), format="PNG")
    save(tmp_path / "clean" / "a.png", pixels(seed=9))
    clean = load_images(tmp_path / "clean")
    assert len(clean) == 4
    write_dirty_copy(clean, tmp_path / "dirty", [], seed=0)
    copied = load_images(tmp_path / "dirty")
    assert sorted(image.sum().item() for image in copied.images) == sorted(i.sum().item() for i in clean.images)


def test_a_name_cannot_lead_out_of_the_destination(tmp_path):
    clean = source_folder(tmp_path, 1)
    for name in ("../a.png", "/tmp/a.png"):
        wrong = module.ImageDataset("x", clean.images, (name,), (), {})
        with pytest.raises(DataError, match="outside"):
            write_dirty_copy(wrong, tmp_path / "dirty", [], 0)
    assert not (tmp_path / "dirty").exists()


def test_nothing_that_is_there_is_overwritten_unasked(tmp_path):
    clean = source_folder(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for overwrite, words in ((False, "`overwrite`"), (True, "not a dirty copy")):
        with pytest.raises(DataError, match=words):
            write_dirty_copy(clean, tmp_path / "clean", CORRUPTIONS, 0, overwrite=overwrite)
    with pytest.raises(DataError, match="not a folder"):
        write_dirty_copy(clean, tmp_path / "file", CORRUPTIONS, 0, overwrite=True)
    with pytest.raises(DataError, match="lies inside"):
        write_dirty_copy(clean, tmp_path / "clean" / "0" / "00.png", CORRUPTIONS, 0, overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before

    (tmp_path / "dirty").mkdir()  # an empty folder is welcome
    write_dirty_copy(clean, tmp_path / "dirty", CORRUPTIONS, 0)
    with pytest.raises(DataError, match="`overwrite`"):
        write_dirty_copy(clean, tmp_path / "dirty", CORRUPTIONS, 1)
    (tmp_path / "dirty" / "old.png").write_bytes(b"")
    assert write_dirty_copy(clean, tmp_path / "dirty", CORRUPTIONS, 1, overwrite=True)["seed"] == 1
    assert not (tmp_path / "dirty" / "old.png").exists()


def test_an_interruption_leaves_nothing_half_done(tmp_path, monkeypatch):
    clean = source_folder(tmp_path)
    write_dirty_copy(clean, tmp_path / "dirty", CORRUPTIONS, 0)
    before = (tmp_path / "dirty" / "manifest.json").read_bytes()
    calls = []

    def interrupted(image, path):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        save_png(image, path)

    monkeypatch.setattr(image_folder, "save_png", interrupted)
    for name in ("dirty", "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            write_dirty_copy(clean, tmp_path / name, CORRUPTIONS, 1, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "dirty"]
    assert (tmp_path / "dirty" / "manifest.json").read_bytes() == before
