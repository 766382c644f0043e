"""What counts as an image: kinds that Pillow cannot read, by name and content, each with its remedy; raw files."""

import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageFile

from robustdiff.data.dataset import load_images
from robustdiff.utils.errors import DataError

HEADS = {
    "a.heic": (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "HEIC: pip install pillow-heif"),
    "a.hif": (b"\0\0\0\x18ftypheix\0\0\0\0heixmif1", "HEIC: pip install pillow-heif"),
    "a.jxl": (b"\xff\x0a\xfa\x1f", "JPEG XL: pip install pillow-jxl-plugin"),
    "b.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "JPEG XL: pip install pillow-jxl-plugin"),
    "a.exr": (b"\x76\x2f\x31\x01\2\0\0\0", "OpenEXR: convert"),
    "a.hdr": (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance HDR: convert"),
    "a.dcm": (bytes(128) + b"DICM", "DICOM: convert"),
    "a.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG: convert"),
    "a.psb": (b"8BPS\0\2" + bytes(20), "large Photoshop document: convert"),
    "a.xcf": (b"gimp xcf v011", "GIMP project: convert"),
    "a.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript or Illustrator drawing: convert"),
    "a.ai": (b"%PDF-1.5\n", "PDF: convert"),
    "a.pdf": (b"%PDF-1.7\n", "PDF: convert"),
    "a.emf": (b"\1\0\0\0\x6c\0\0\0" + bytes(32) + b" EMF", "Windows metafile: convert"),
    "a.wmf": (b"\xd7\xcd\xc6\x9a\0\0", "Windows metafile: convert"),
    "a.djvu": (b"AT&TFORM\0\0\1\0DJVUINFO", "DjVu: convert"),
    "a.cdr": (b"RIFF\0\1\0\0CDR9vrsn", "CorelDRAW drawing: convert"),
    "a.jls": (b"\xff\xd8\xff\xf7\0\x0b", "JPEG-LS: convert"),
    "a.mng": (b"\x8aMNG\r\n\x1a\n", "MNG or JNG: convert"),
    "a.dpx": (b"SDPX\0\0\x20\0V1.0", "DPX or Cineon: convert"),
    "a.ktx2": (b"\xabKTX 20\xbb\r\n\x1a\n", "texture: convert"),
    "a.cr2": (b"II*\0\x10\0\0\0CR\2\0", "camera raw file: develop"),
    "a.cr3": (b"\0\0\0\x18ftypcrx \0\0\0\1", "camera raw file: develop"),
    "a.raf": (b"FUJIFILMCCD-RAW 0201", "camera raw file: develop"),
    "a.rw2": (b"IIU\0\x18\0\0\0", "camera raw file: develop"),
    "a.orf": (b"IIRO\x08\0\0\0", "camera raw file: develop"),
}


@pytest.fixture(autouse=True)
def without_plugins(monkeypatch):
    """As on a machine where none is installed."""
    for name in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, name, None)


def photos(folder, count):
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"good{number:02d}.png")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("renamed", ["", ".jpg", ".bin"])
def test_a_known_kind_counts_as_unreadable_and_names_its_remedy(tmp_path, name, renamed):
    head, reason = HEADS[name]
    photos(tmp_path, 4)
    for number in range(3):
        (tmp_path / f"{number}{name}{renamed}").write_bytes(head + bytes(300))
    with pytest.raises(DataError, match="at least 3 of 7 images cannot be read"):
        load_images(tmp_path)
    skipped = load_images(tmp_path, max_bad_fraction=1).skipped
    assert len(skipped) == 3
    assert all(why.startswith(reason) for _, why in skipped)


@pytest.mark.parametrize("name", ["a.kra", "a.ora", "a.afphoto", "a.pct", "a.nii", "a.heic", "a.psp"])
def test_a_kind_that_only_its_name_tells_counts_too(tmp_path, name):
    photos(tmp_path, 4)
    for number in range(3):
        (tmp_path / f"{number}{name}").write_bytes(b"PK\3\4" + bytes(300))
    with pytest.raises(
        DataError, match=r"at least 3 of 7 images cannot be read, for example .*: (convert|pip install)"
    ):
        load_images(tmp_path)


def tiff_with(path, tags):
    """A small grey TIFF with more tags."""
    pixels = bytes(range(48))
    entries = [(256, 4, 8), (257, 4, 6), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 6), (279, 4, 48)]
    entries = sorted([*entries, *tags])
    body = b"".join(struct.pack("<HHII", tag, code, 1, value) for tag, code, value in entries)
    path.write_bytes(b"II*\0" + struct.pack("<I", 56) + pixels + struct.pack("<H", len(entries)) + body + bytes(4))


REDUCED = (254, 4, 1)
RAW_TAGS = {"dng": [(50706, 4, 0x0401)], "nef": [REDUCED, (330, 4, 8)]}


@pytest.mark.parametrize("kind", RAW_TAGS)
@pytest.mark.parametrize("suffix", ["", ".tif"])
def test_a_raw_file_is_not_trained_as_its_thumbnail(tmp_path, kind, suffix):
    photos(tmp_path, 4)
    tiff_with(tmp_path / f"a.{kind}{suffix}", RAW_TAGS[kind])
    ((name, reason),) = load_images(tmp_path).skipped
    assert name == f"a.{kind}{suffix}"
    assert reason.startswith("camera raw file: develop it")


@pytest.mark.parametrize("suffix", ["nef", "arw", "pef", "srw", "dcr"])
def test_a_raw_file_is_refused_by_its_name(tmp_path, suffix):
    photos(tmp_path, 4)
    tiff_with(tmp_path / f"a.{suffix}", [])
    assert dict(load_images(tmp_path).skipped)[f"a.{suffix}"].startswith("camera raw file")


def test_a_tiff_that_has_smaller_copies_below_it_is_read(tmp_path):
    tiff_with(tmp_path / "a.tif", [(330, 4, 8)])
    tiff_with(tmp_path / "b.tif", [REDUCED])
    assert len(load_images(tmp_path)) == 2


def test_a_plugin_that_is_installed_is_used(tmp_path, monkeypatch):
    class Plugin(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._mode, self._size = "L", (8, 6)
            self.tile = [("raw", (0, 0, 8, 6), 32, ("L", 0, 1))]

    def register_heif_opener():
        Image.register_open("HEIF", Plugin, lambda prefix: prefix[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    (tmp_path / "a.heic").write_bytes(HEADS["a.heic"][0].ljust(32, b"\0") + bytes(range(48)))
    loaded = load_images(tmp_path)
    assert loaded.skipped == ()
    assert loaded.images.flatten().tolist() == list(range(48))


def test_other_files_still_count_for_nothing(tmp_path):
    photos(tmp_path, 4)
    for number in range(9):
        (tmp_path / f"{number}.docx").write_bytes(b"PK\3\4" + bytes(100))
        (tmp_path / f"{number}.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    assert len(load_images(tmp_path, max_bad_fraction=0)) == 4


def test_a_damaged_file_is_an_image_all_the_same(tmp_path):
    photos(tmp_path, 4)
    for name in ("a", "b.png"):
        (tmp_path / name).write_bytes((tmp_path / "good00.png").read_bytes()[:30])
    with pytest.raises(DataError, match="at least 2 of 6 images"):
        load_images(tmp_path)


def test_a_picture_of_too_many_pixels_says_what_to_do(tmp_path, monkeypatch):
    photos(tmp_path, 4)
    Image.new("L", (40, 40)).save(tmp_path / "large.png")
    Image.new("L", (60, 60)).save(tmp_path / "larger.png")  # more than twice as many: Pillow's own error
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    reasons = {reason for _, reason in load_images(tmp_path, max_bad_fraction=1).skipped}
    assert reasons == {"more than 1500 pixels: make it smaller first, if it is a picture and no decompression bomb"}
