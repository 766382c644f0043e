"""Kinds of image files that Pillow cannot read, or reads wrongly: known by name and content, each with its remedy.

They count as images that cannot be read. A format whose plug-in for Pillow is installed is read with it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

HEAD = 512
"""Bytes at the start of a file that tell its kind."""
RAW_SUFFIXES = (
    ".3fr .ari .arw .bay .cr2 .cr3 .crw .dcr .dng .erf .fff .gpr .iiq .k25 .kdc .mef .mos .mrw .nef .nrw .orf .pef "
    ".ptx .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f"
)
NEW_SUBFILE_TYPE, SUB_IFDS, DNG_VERSION = 254, 330, 50706
"""Tags of TIFF: whether a picture is a small version of another one; pictures below it; the mark of DNG."""
CONVERT = "convert it to PNG first"


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: For people.
        suffixes: Of its names, between spaces.
        starts: What the start of its content matches; empty if only its name tells.
        remedy: What to do with such a file.
        plugin: Module that teaches Pillow to read it; empty if there is none.
        teach: Called with that module, where importing it is not enough.
    """

    name: str
    suffixes: str
    starts: bytes
    remedy: str = CONVERT
    plugin: str = ""
    teach: Callable[[Any], object] = bool

    def readable(self) -> bool:
        """Whether Pillow can read it now: its plug-in, if there is one, is imported here."""
        if not self.plugin:
            return False
        try:
            self.teach(importlib.import_module(self.plugin))
        except ImportError:
            return False
        return True


KINDS = (
    Kind(
        "HEIC",
        ".heic .heics .heif .heifs .hif",
        rb"....ftyp(hei[cxms]|hev[cmsx]|(mif1|msf1)(?!.{,40}avi[fs]))",
        "pip install pillow-heif",
        "pillow_heif",
        lambda module: module.register_heif_opener(),
    ),
    Kind(
        "JPEG XL", ".jxl", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "pip install pillow-jxl-plugin", plugin="pillow_jxl"
    ),
    Kind("OpenEXR", ".exr", rb"\x76\x2f\x31\x01"),
    Kind("Radiance HDR", ".hdr .rgbe", rb"#\?R(ADIANCE|GBE)"),
    Kind("JPEG XR", ".jxr .wdp .hdp", rb"II\xbc\x01"),
    Kind("PostScript or Illustrator drawing", ".eps .epsf .epsi .ps .ai", rb"%!PS|\xc5\xd0\xd3\xc6"),
    Kind("PDF", "", rb"(\xef\xbb\xbf)?%PDF-"),  # what is only called so is no picture
    Kind("Windows metafile", ".wmf .emf .wmz .emz", rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF"),
    Kind("DjVu", ".djvu .djv", rb"AT&TFORM....DJV"),
    Kind("CorelDRAW drawing", ".cdr", rb"RIFF....CDR"),
    Kind("PICT", ".pict .pct", b""),
    Kind("JPEG-LS", ".jls", rb"\xff\xd8\xff\xf7"),
    Kind("MNG or JNG", ".mng .jng", rb"[\x8a\x8b][MJ]NG\r\n"),
    Kind("Amiga picture", ".iff .ilbm .lbm", rb"FORM....(ILBM|PBM )"),
    Kind("DPX or Cineon", ".dpx .cin", rb"SDPX|XPDS|\x80\x2a\x5f\xd7|\xd7\x5f\x2a\x80"),
    Kind("texture", ".ktx .ktx2 .pvr .astc .basis", rb"\xabKTX \d\d\xbb"),
    Kind("volume", ".nii .nrrd .mha .mrc .czi .lif .nd2 .oib .oir .vsi", rb"NRRD000|ZISRAWFILE"),
    Kind(
        "painting program's project",
        ".kra .ora .afphoto .afdesign .pdn .psp .pspimage .clip .procreate .sketch .mdp",
        rb"PDN3|Paint Shop Pro Image File|CSFCHUNK",
    ),
    Kind("BPG", ".bpg", rb"BPG\xfb"),
    Kind("FLIF", ".flif", rb"FLIF[1-8A-C]"),
    Kind("DICOM", ".dcm .dicom", rb".{128}DICM"),
    Kind(
        "SVG", ".svg .svgz", rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.{,200}-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg"
    ),
    Kind("GIMP project", ".xcf", rb"gimp xcf"),
    Kind("large Photoshop document", ".psb", rb"8BPS\0\x02"),
    Kind(
        "camera raw file",
        RAW_SUFFIXES,
        rb"II\*\0.{4}CR|IIRO|IIRS|IIU\0|MMOR|FUJIFILMCCD-RAW|FOVb|\0MRM|....ftypcrx |II\x1a\0\0\0HEAPCCDR",
        "develop it to PNG, TIFF or JPEG first: what can be read of it is a thumbnail",
    ),
)
"""The first that a file's content matches, else the first that its name fits."""

RAW = KINDS[-1]
_BY_SUFFIX: Mapping[str, Kind] = {suffix: kind for kind in KINDS for suffix in kind.suffixes.split()}


_ANY = re.compile(b"|".join(b"(?:" + kind.starts + b")" for kind in KINDS if kind.starts), re.DOTALL)


def known(name: str) -> bool:
    """Whether a file is called as one of these kinds."""
    return os.path.splitext(name)[1].lower() in _BY_SUFFIX


def recognised(head: bytes) -> bool:
    """Whether the first bytes of a file are those of one of these kinds."""
    return _by_content(head) is not None


def _by_content(head: bytes) -> Kind | None:
    if not _ANY.match(head):
        return None
    return next((kind for kind in KINDS if kind.starts and re.match(kind.starts, head, re.DOTALL)), None)


def refuse(name: str, head: bytes) -> None:
    """Refuse a file of a kind that cannot be read here; import the plug-in of one that can.

    Args:
        name: Of the file; "" if it has none.
        head: Its first :data:`HEAD` bytes.

    Raises:
        OSError: With the kind and the remedy.
    """
    kind = _by_content(head)
    if kind is None:
        named = _BY_SUFFIX.get(os.path.splitext(name)[1].lower())
        # What calls itself so and is none of it may still be a picture; of raw files the name alone tells.
        kind = named if named is RAW else None
    if kind is not None and not kind.readable():
        raise OSError(f"{kind.name}: {kind.remedy}")


def refuse_name(name: str) -> None:
    """Refuse a file that nobody knows by its content, if its name tells of a kind that cannot be read here.

    Raises:
        OSError: With the kind and the remedy.
    """
    kind = _BY_SUFFIX.get(os.path.splitext(name)[1].lower())
    if kind is not None and not kind.readable():
        raise OSError(f"{kind.name}: {kind.remedy}")


def refuse_thumbnail(image: Image.Image) -> None:
    """Refuse a TIFF whose first picture is a small version of another one, as raw files of most cameras are.

    Raises:
        OSError: With the kind and the remedy.
    """
    tags: Any = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return
    reduced = int(tags.get(NEW_SUBFILE_TYPE, 0) or 0) & 1
    if DNG_VERSION in tags or (reduced and SUB_IFDS in tags):
        raise OSError(f"{RAW.name}: {RAW.remedy}")
