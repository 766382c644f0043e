"""What files say of themselves: quality, subsampling and what they carry, against Pillow that wrote them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from robustdiff.data.decode_pool import decode_all
from robustdiff.data.file_evidence import FileEvidence, file_evidence, jpeg_quality
from robustdiff.data.sources.open import Source, open_source

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8))
EXIF = Image.Exif()
EXIF[0x010E] = "a picture"


def stored(image: Image.Image = PICTURE, kind: str = "JPEG", **options: object) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def said(encoded: bytes, **options: object) -> FileEvidence | None:
    """As decoding hands it on."""
    (one,) = decode_all(Source("list", ["a"], lambda index: encoded), lambda pixels: 0, **options)
    assert one.value == 0, one.reason
    return one.file


# -- JPEG ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_every_quality_and_subsampling_is_read_as_it_was_written(subsampling: str) -> None:
    found = [said(stored(quality=q, subsampling=subsampling)) for q in range(1, 101)]
    assert [(one.quality, one.exact) for one in found] == [(q, True) for q in range(1, 101)]
    assert {one.subsampling for one in found} == {subsampling}


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_modes_and_orders_of_jpeg(mode: str, progressive: bool) -> None:
    options = {"keep_rgb": True} if mode == "RGB" else {}
    found = said(stored(PICTURE.convert(mode), quality=63, progressive=progressive, **options))
    assert (found.format, found.mode, found.quality, found.exact) == ("JPEG", mode, 63, True)
    assert found.subsampling == (None if mode == "L" else "4:4:4")


def table(scale: float) -> list[int]:
    """Of an encoder of its own: flatter than the standard one."""
    return [round(scale * (8 + row + column)) for row in range(8) for column in range(8)]


def test_tables_of_other_encoders_have_a_nearest_quality_that_follows_their_strength() -> None:
    found = [said(stored(qtables=[table(scale), table(scale)])) for scale in (4, 2, 1, 0.5, 0.25)]
    assert not any(one.exact for one in found)
    quality = [one.quality for one in found]
    assert quality == sorted(set(quality))
    with Image.open(io.BytesIO(stored(quality=80))) as image:
        brightness, colour = image.quantization[0], image.quantization[1]
    nudged = [brightness[0] + 1, *brightness[1:]]
    assert jpeg_quality(brightness, colour) == (80, True)
    assert jpeg_quality(nudged, colour) == (80, False)
    assert jpeg_quality(brightness, nudged) == (80, False)
    assert jpeg_quality([1] * 64) == (100, True)
    assert jpeg_quality([40 * number for number in brightness])[0] <= 4  # of 16 bit


def test_a_table_that_is_used_for_brightness_and_colour_is_judged_as_one() -> None:
    with Image.open(io.BytesIO(stored(quality=40))) as image:
        brightness = list(image.quantization[0])
    found = said(stored(qtables=[brightness]))
    assert (found.quality, found.exact, found.subsampling) == (40, True, "4:2:0")


@pytest.mark.parametrize(
    ("factors", "due"),
    [
        ((0x12, 0x11, 0x11), "4:4:0"),
        ((0x41, 0x11, 0x11), "4:1:1"),
        ((0x42, 0x11, 0x11), "4:1:0"),
        ((0x22, 0x22, 0x22), "4:4:4"),
        ((0x22, 0x21, 0x21), "4:4:0"),
        ((0x22, 0x11, 0x21), "other"),
        ((0x11, 0x22, 0x22), "other"),
        ((0x22, 0x00, 0x00), "other"),
        ((0x31, 0x11, 0x11), "other"),
    ],
)
def test_sampling_factors_of_other_encoders(factors: tuple[int, int, int], due: str) -> None:
    encoded = bytearray(stored())
    frame = encoded.index(b"\xff\xc0") + 10  # marker, length, depth, height, width, components
    for number, factor in enumerate(factors):
        encoded[frame + 3 * number + 1] = factor
    with Image.open(io.BytesIO(encoded)) as image:  # whose pixels are no longer right
        assert file_evidence(image).subsampling == due


def test_a_file_without_the_table_it_names_has_no_quality() -> None:
    encoded = bytearray(stored())
    encoded[encoded.index(b"\xff\xc0") + 12] = 3
    with Image.open(io.BytesIO(encoded)) as image:
        assert file_evidence(image).quality is None


def test_photographs_with_previews_are_read_as_their_first_picture() -> None:
    found = said(stored(kind="MPO", save_all=True, append_images=[PICTURE.resize((8, 8))], quality=71))
    assert (found.format, found.quality, found.animated) == ("MPO", 71, False)


# -- all formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats_have_no_quality(kind: str) -> None:
    found = said(stored(kind=kind))
    assert (found.format, found.quality, found.subsampling, found.exif) == (kind, None, None, False)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_profiles_and_exif_are_seen(kind: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x829A] = 0.01
    with Image.open(io.BytesIO(stored(exif=exif))) as image:  # of what Pillow makes itself its TIFF has no part
        exif = image.getexif()
    assert said(stored(kind=kind, icc_profile=profile)).profile
    assert not said(stored(kind=kind)).profile
    assert said(stored(kind=kind, exif=exif)).exif
    assert not said(stored(kind=kind, icc_profile=profile)).exif


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_seen(kind: str) -> None:
    other = PICTURE.transpose(Image.Transpose.ROTATE_180)
    assert said(stored(kind=kind, save_all=True, append_images=[other])).animated
    assert not said(stored(kind=kind)).animated


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (PICTURE.convert("RGBA"), {}),
        (PICTURE.convert("LA"), {}),
        (PICTURE, {"transparency": (0, 0, 0)}),
        (PICTURE.convert("P"), {"transparency": 0}),
    ],
)
def test_transparency_of_every_kind_is_seen(image: Image.Image, options: dict[str, object]) -> None:
    assert said(stored(image, "PNG", **options)).alpha
    assert not said(stored(PICTURE.convert("P"), "PNG")).alpha


@pytest.mark.parametrize("turn", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_the_size_is_that_which_is_shown_before_it_is_resized(turn: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    assert said(stored(kind=kind, exif=exif), resolution=8).size == ((40, 24) if turn == 6 else (24, 40))


def test_pixels_without_a_file_say_nothing() -> None:
    source = Source("array", ["a"], lambda index: np.asarray(PICTURE))
    assert [one.file for one in decode_all(source, lambda pixels: 0)] == [None]


def test_what_is_false_is_left_out_of_the_file() -> None:
    assert said(stored(quality=30, exif=EXIF)).as_json() == {
        "format": "JPEG",
        "mode": "RGB",
        "size": [24, 40],
        "quality": 30,
        "exact": True,
        "subsampling": "4:2:0",
        "exif": True,
    }
    assert said(stored(kind="PNG")).as_json() == {"format": "PNG", "mode": "RGB", "size": [24, 40]}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
def test_files_cut_off_or_damaged_anywhere_raise_nothing(kind: str) -> None:
    encoded = stored(kind=kind, exif=EXIF)
    chance = np.random.default_rng(1)
    for end in range(0, min(len(encoded), 900), 7):
        damaged = bytearray(encoded)
        damaged[end] = int(chance.integers(256))
        for some in (encoded[:end], bytes(damaged)):
            try:
                image = Image.open(io.BytesIO(some))
            except Exception:  # not even Pillow knows it: nobody asks
                continue
            with image:
                assert file_evidence(image).format
        for decoded in decode_all(Source("list", ["a", "b"], [encoded[:end], bytes(damaged)].__getitem__), np.shape):
            assert (decoded.value is None) == (decoded.file is None)


def test_a_folder_of_many_kinds(tmp_path: Path) -> None:
    for name, options in {"a.jpg": {"quality": 12}, "b.png": {}, "c.webp": {}}.items():
        PICTURE.save(tmp_path / name, **options)
    found = [one.file for one in decode_all(open_source(tmp_path), np.shape)]
    assert [(one.format, one.quality) for one in found] == [("JPEG", 12), ("PNG", None), ("WEBP", None)]
