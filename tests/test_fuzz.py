"""Damaged and hostile files of every kind that a user can name: 2,350 of them, each a function of (kind, seed).

Whatever a file holds, it is read, or skipped with a reason, or refused in one line (``UsageError``, exit status 2).
Never another exception, output on stderr that is not ours, a process that dies, more than ``SECONDS`` or ``MEMORY``, a
word to the network, a program started, a pickle's function called, or a file written elsewhere. But for LMDB: a damaged
LSUN database may end the process, as the C library trusts its files; such ends are counted as ``died``.

How many of each kind: ``KINDS``. What was found and mended has a test of its own at the end.

Cases run in forked children, so that what kills, stalls or bloats one is known by kind and seed. To see one again::

    python tests/test_fuzz.py image 17

``python tests/test_fuzz.py --all 20000 1000000`` runs as many, with seeds from there on, in proportion to ``KINDS``.
"""

import contextlib
import faulthandler
import io
import json
import logging
import os
import pickle
import random
import resource
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import datasets
import diffusers
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.training_utils import EMAModel
from helpers import TINY_UNET
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from robustdiff import cli, decoding, durable, formats, planning, recording, sampling
from robustdiff.checkpoint import TrainingState, find_checkpoint, load_checkpoint, save_checkpoint
from robustdiff.config import TrainConfig, UsageError
from robustdiff.decoding import DataError
from robustdiff.images import load_images
from robustdiff.networks import PointDenoiser

KINDS = {
    "image": 1000,
    "npy": 150,
    "npz": 200,
    "cifar": 250,
    "celeba": 100,
    "lsun": 100,
    "parquet": 60,
    "saved": 60,
    "dirty": 50,
    "checkpoint": 150,
    "run": 30,
    "pipeline": 100,
    "network": 100,
}
"""Cases of each kind in the test."""
SECONDS, MEMORY = 10, 2 * 2**30
"""Per case; and peak resident memory of a child, in bytes."""
CHILDREN = 2
FOUND = [("saved", 2000055), ("network", 2000142)]
"""Cases that failed once: offsets of an Arrow file that lead beyond its end; a text where a list should be."""
DIES = {"lsun": (-signal.SIGABRT, -signal.SIGBUS, -signal.SIGSEGV)}
"""Kinds that may end the process, and by which signals."""

Files = dict[str, bytes]
"""A folder: content by relative name."""


# -- what is damaged: small files of every format, written by the libraries that own them ---------------


def drawn(mode: str, width: int = 12, height: int = 9) -> Image.Image:
    """Seeded noise over a gradient, of any mode."""
    values = np.random.default_rng(0).integers(0, 64, (height, width, 4)) + np.arange(width)[:, None] * 191 // width
    rgba = Image.fromarray(values.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((values[..., 0] * 200).astype(np.uint16))
    return rgba.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else rgba.convert(mode)


def in_format(form: str, mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    drawn(mode).save(buffer, form, **options)
    return buffer.getvalue()


@cache
def images() -> dict[str, bytes]:
    """Encoded images by name; the suffix is that of the format."""
    found = {}

    def add(suffix: str, form: str, modes: str, **options: object) -> None:
        for mode in modes.split():
            name = f"{len(found):03d}-{mode.replace(';', '')}{suffix}"
            with contextlib.suppress(KeyError):  # a codec that this Pillow was built without
                found[name] = in_format(form, mode, **options)

    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "turned"
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 300, zip=True)
    info.add_itxt("Title", "y", "de", "z", zip=True)

    def frames() -> dict[str, object]:  # anew: saving leaves the encoder's settings in them
        return {"save_all": True, "append_images": [drawn("RGB"), drawn("L")]}

    add(".png", "PNG", "1 L LA P RGB RGBA I;16")
    add(".png", "PNG", "RGB", exif=exif, pnginfo=info, dpi=(72, 72), icc_profile=b"icc" * 50)
    add(".png", "PNG", "P", transparency=3, bits=2)
    add(".png", "PNG", "RGB", **frames())
    add(".jpg", "JPEG", "L RGB CMYK")
    add(".jpg", "JPEG", "RGB", exif=exif, progressive=True, icc_profile=b"icc" * 50, comment=b"comment")
    add(".jpg", "MPO", "RGB", **frames())
    add(".gif", "GIF", "L P RGB RGBA")
    add(".gif", "GIF", "P", **frames())
    add(".bmp", "BMP", "1 L P RGB RGBA")
    add(".dib", "DIB", "RGB")
    add(".tif", "TIFF", "1 L LA P RGB RGBA CMYK YCbCr LAB I;16 I F")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        with contextlib.suppress(OSError, ValueError):
            add(".tif", "TIFF", "L RGB", compression=compression)
    for compression in ("group3", "group4", "tiff_ccitt"):
        add(".tif", "TIFF", "1", compression=compression)
    add(".tif", "TIFF", "RGB", exif=exif)
    add(".tif", "TIFF", "RGB", **frames())
    add(".tif", "TIFF", "RGB", big_tiff=True)
    add(".webp", "WEBP", "RGB RGBA")
    add(".webp", "WEBP", "RGB", lossless=True, exif=exif)
    add(".webp", "WEBP", "RGB", **frames())
    add(".avif", "AVIF", "RGB RGBA")
    add(".ppm", "PPM", "1 L RGB I;16")
    add(".pfm", "PPM", "F")
    found["plain.ppm"] = b"P3\n# comment\n2 2\n255\n1 2 3 4 5 6 7 8 9 10 11 12\n"
    found["plain.pbm"] = b"P1\n3 2\n1 0 1 0 1 0\n"
    found["any.pam"] = b"P7\nWIDTH 2\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n123456"
    add(".ico", "ICO", "RGB RGBA", sizes=[(8, 8), (9, 9)])
    add(".ico", "ICO", "RGBA", sizes=[(8, 8)], bitmap_format="bmp")
    found["any.cur"] = found[next(name for name in reversed(found) if name.endswith(".ico"))].replace(b"\1", b"\2", 1)
    add(".icns", "ICNS", "RGBA")
    add(".tga", "TGA", "1 L LA P RGB RGBA")
    add(".tga", "TGA", "L RGB", compression="tga_rle")
    add(".pcx", "PCX", "1 L P RGB")
    pcx = found[next(name for name in reversed(found) if name.endswith(".pcx"))]
    found["any.dcx"] = struct.pack("<III", 987654321, 12, 0) + pcx
    add(".jp2", "JPEG2000", "L LA RGB RGBA I;16")
    add(".j2k", "JPEG2000", "RGB", irreversible=True, quality_layers=[20])
    add(".dds", "DDS", "L LA RGB RGBA")
    add(".dds", "DDS", "RGBA", pixel_format="DXT5")
    add(".blp", "BLP", "P")
    add(".im", "IM", "1 L P RGB I F CMYK")
    add(".msp", "MSP", "1")
    add(".qoi", "QOI", "RGB RGBA")
    add(".sgi", "SGI", "L RGB RGBA")
    add(".spider", "SPIDER", "F")
    add(".xbm", "XBM", "1")
    found["any.xpm"] = b'/* XPM */\nstatic char * x[] = {\n"2 2 2 1",\n"a c #FF0000",\n"b c #00FF00",\n"ab",\n"ba"};\n'
    found["any.ras"] = struct.pack(">8I", 0x59A66A95, 4, 2, 24, 24, 1, 0, 0) + bytes(24)
    found["rle.ras"] = struct.pack(">8I", 0x59A66A95, 4, 2, 8, 8, 2, 0, 0) + b"\x80\x07\x05"
    cards = ("SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2")
    cards += ("NAXIS1  =                    4", "NAXIS2  =                    3", "END")
    found["any.fits"] = "".join(card.ljust(80) for card in cards).encode().ljust(2880) + bytes(2880)
    found["any.psd"] = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 2, 2, 8, 3) + bytes(12) + b"\0\0" + bytes(12)
    found["any.gbr"] = struct.pack(">5I4sI", 32, 2, 2, 2, 1, b"GIMP", 10) + b"name" + bytes(4)
    found["any.ftc"] = b"FTEX" + struct.pack("<5I", 1, 4, 4, 1, 1) + struct.pack("<2I", 1, 32) + struct.pack("<I", 48)
    found["any.ftc"] += bytes(48)
    frame = struct.pack("<IHH8x", 24, 0xF1FA, 1) + struct.pack("<IH", 8, 13) + b"\0\0"
    found["any.fli"] = struct.pack("<IHHHHHHI", 152, 0xAF11, 1, 4, 3, 8, 3, 5).ljust(128, b"\0") + frame
    found["any.pxr"] = (b"\x80\xe8\0\0".ljust(416, b"\0") + struct.pack("<HH", 2, 2)).ljust(424, b"\0")
    found["any.pxr"] += struct.pack("<HH", 14, 2).ljust(600, b"\0") + bytes(12)
    found["any.p7"] = b"P7 332\n#END_OF_COMMENTS\n2 2 255\n1234"
    found["any.iim"] = b"\x1c\x03\x3c\x00\x02\x01\x00\x1c\x03\x14\x00\x01\x02\x1c\x03\x1e\x00\x01\x02" + bytes(32)
    found["any.mic"] = b"\0\0\0\0\0\0\0\4" + struct.pack(">62i", *([1] * 62)) + bytes(64)
    return found


def array_file(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def zipped(members: Files, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # a name that comes twice, on purpose
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def tree(folder: Path) -> Files:
    """The folder as it lies on the disk."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def elsewhere(write: Callable[[Path], object]) -> Files:
    """What ``write`` puts into a new folder, in a child: threads that libraries start must not live in this process."""
    with tempfile.TemporaryDirectory() as name:
        child = os.fork()
        if not child:
            try:
                quiet()
                write(Path(name))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, "a file to be damaged could not be written"
        return tree(Path(name))


PNG = in_format("PNG", "RGB")


@cache
def tables() -> tuple[Files, ...]:
    """Parquet files and saved data sets: bytes, declared images, labels, splits, paths."""

    def write(folder: Path) -> None:
        images = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        plain = datasets.Features({"x": datasets.Value("binary"), "y": datasets.Value("string")})
        declared = datasets.Dataset.from_dict(
            {"image": [{"bytes": PNG, "path": None}] * 3, "label": [0, 1, 1]}, features=images
        )
        bare = datasets.Dataset.from_dict({"x": [PNG] * 3, "y": ["a", "b", "b"]}, features=plain)
        for number, data in enumerate((declared, bare)):
            data.to_parquet(folder / f"{number}/a.parquet")
            data.save_to_disk(folder / f"{number + 10}")
        (folder / "2").mkdir()
        paths = {"image": [{"bytes": None, "path": name} for name in ("a.png", "../b.png")], "label": [0, -1]}
        pq.write_table(pa.Table.from_pydict(paths, images.arrow_schema), folder / "2/a.parquet")
        (folder / "3").mkdir()
        pq.write_table(declared.data.table, folder / "3/train-00000-of-00002.parquet", compression="gzip")
        declared.to_parquet(folder / "3/train-00001-of-00002.parquet")
        datasets.DatasetDict({"train": declared, "test": declared}).save_to_disk(folder / "13")

    written = elsewhere(write)
    tops = sorted({name.split("/")[0] for name in written}, key=int)
    return tuple(
        {name.partition("/")[2]: data for name, data in written.items() if name.startswith(f"{top}/")} for top in tops
    )


@cache
def databases() -> tuple[Files, ...]:
    """LSUN: one small database, one with values that overflow a page, and two categories."""

    def write(folder: Path) -> None:
        for name, count, size in (("0/a_train_lmdb", 3, 0), ("1/a_train_lmdb", 200, 5000), ("2/a_lmdb", 3, 0)):
            (folder / name).mkdir(parents=True)
            with lmdb.open(str(folder / name), map_size=2**24, lock=False) as base, base.begin(write=True) as change:
                for index in range(count):
                    change.put(f"{index:08d}".encode(), PNG + bytes(size if index % 3 == 0 else 0))
        shutil.copytree(folder / "2/a_lmdb", folder / "2/b_lmdb")

    written = elsewhere(write)
    return tuple(
        {name[2:]: data for name, data in written.items() if name.startswith(f"{top}/") and name.endswith("data.mdb")}
        for top in range(3)
    )


def photos() -> Files:
    return {f"photos/{i}.png": in_format("PNG", "L") for i in range(2)}


def network_config() -> dict[str, object]:
    return {"_class_name": "UNet2DModel", "_diffusers_version": "0.32.0", "act_fn": "silu", **TINY_UNET}


def train_command(folder: Path, *more: str) -> list[str]:
    """Two steps on two images, a checkpoint after the first."""
    return [
        *("train", str(folder / "photos"), "--output-dir", str(folder / "run"), "--images", "4", "--resolution", "8"),
        *("--train-batch-size", "2", "--model-config-name-or-path", str(folder / "unet.json")),
        *("--ddpm-num-steps", "20", "--ddpm-num-inference-steps", "2", "--preview-images", "0"),
        *("--checkpointing-steps", "1", "--logging-steps", "1", *more),
    ]


@cache
def runs() -> tuple[Files, Files]:
    """A run folder with its inputs, stopped after the first of two steps; a class-conditional pipeline."""

    def write(folder: Path) -> None:
        put(folder, {**photos(), "unet.json": json.dumps(network_config()).encode()})
        assert cli.main(train_command(folder)) == 0
        shutil.rmtree(folder / "run/checkpoints/step-00000002")
        put(folder, {f"named/{name}/{name}.png": PNG for name in "ab"})
        pipeline = train_command(folder, "--class-conditional")
        pipeline[1], pipeline[3] = str(folder / "named"), str(folder / "conditional")
        assert cli.main(pipeline) == 0
        shutil.rmtree(folder / "conditional/checkpoints")

    written = elsewhere(write)
    first = {name: data for name, data in written.items() if name.startswith(("photos/", "run/", "unet.json"))}
    second = {name.partition("/")[2]: data for name, data in written.items() if name.startswith("conditional/")}
    return first, second


def training_state() -> TrainingState:
    """A small network, its moving average, and an optimiser that has taken a step."""
    torch.manual_seed(0)
    model = PointDenoiser(2, width=4, depth=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model(torch.ones(3, 2), torch.ones(3)).sum().backward()
    optimizer.step()
    return TrainingState(model, optimizer, EMAModel(model.parameters()), {"schedule": schedule})


@cache
def checkpoints() -> Files:
    """Two checkpoints of :func:`training_state`."""

    def write(folder: Path) -> None:
        for step in (1, 2):
            save_checkpoint(folder, step, training_state(), {"images": step, "metrics": {"rows": []}}, keep=2)

    return elsewhere(write)


# -- how it is damaged -----------------------------------------------------------------------------------

EXTREME = (0, 1, -1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


def damaged(r: random.Random, data: bytes, other: bytes, near: int = 64) -> bytes:
    """One to three changes of bytes; half of them among the first ``near``."""
    content = bytearray(data)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        size = len(content)
        start = r.randrange(min(size, near) if r.random() < 0.5 else size) if size else 0
        end = min(size, start + r.choice((1, 2, 4, 8, 16, 100, 1000)))
        match r.randrange(12):
            case 0 | 1:
                for _ in range(r.choice((1, 1, 2, 8))):
                    if content:
                        place = r.randrange(min(len(content), near) if r.random() < 0.5 else len(content))
                        content[place] ^= 1 << r.randrange(8)
            case 2:
                del content[start:]
            case 3:
                content[start:end] = bytes(end - start)
            case 4:
                content[start:end] = b"\xff" * (end - start)
            case 5:
                content[start:start] = content[start:end] * r.choice((1, 2, 50))
            case 6:
                del content[start:end]
            case 7:
                cut = r.randrange(len(other)) if other else 0
                content[start:] = other[cut:]
            case 8:
                cut = r.randrange(len(other)) if other else 0
                content[start:end] = other[cut : cut + end - start]
            case 9 | 10:
                number, width = r.choice(EXTREME), r.choice((2, 4, 4, 8))
                packed = (number % 2 ** (8 * width)).to_bytes(width, r.choice(("little", "big")))
                content[start : start + width] = packed
            case 11:
                content += r.randbytes(r.choice((1, 20, 3000)))
    return bytes(content)


def mended_png(data: bytes) -> bytes:
    """With right checksums, so that what is behind them is reached."""
    content, place = bytearray(data), 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            break
        struct.pack_into(">I", content, end, zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return bytes(content)


def damaged_image(r: random.Random, name: str) -> bytes:
    data = damaged(r, images()[name], r.choice(list(images().values())))
    return mended_png(data) if data.startswith(b"\x89PNG") and r.random() < 0.8 else data


DEEP, LONG = "@deep@", "@long@"
ODD = (
    *(None, True, False, "", "x", "..", "../../x", "/dev/zero", "a" * 10_000, "\ud800", "\0", "\n\n", "2", "nan"),
    *([], {}, [[]], [1, 2, 3], [0.5], ["x"], [None], {"x": 1}, {"": {}}, DEEP, LONG),
    *(0, 1, -1, 2, 3, 7, 100, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
    *(2**31 - 1, 2**32 - 1, 2**63, 10**400),
)


def changed(r: random.Random, value: object) -> object:
    """A JSON value with one node replaced, removed, added or doubled."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        value = dict(value)
        key = r.choice(list(value))
        match r.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[r.choice(("x", "", "../x", "step", "num_class_embeds", "a" * 1000, "\n"))] = r.choice(ODD)
            case 2:
                value[f"{key}x"] = value.pop(key)
            case _:
                value[key] = changed(r, value[key])
        return value
    if isinstance(value, list) and value and r.random() < 0.7:
        value = list(value)
        place = r.randrange(len(value))
        match r.randrange(4):
            case 0:
                del value[place]
            case 1:
                value.insert(place, r.choice(ODD))
            case 2:
                value = value * r.choice((2, 1000))
            case _:
                value[place] = changed(r, value[place])
        return value
    return r.choice(ODD)


def json_text(value: object) -> bytes:
    text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{LONG}"', "9" * 5000).encode()


def damaged_json(r: random.Random, data: bytes) -> bytes:
    if r.random() < 0.2:
        return damaged(r, data, PNG, near=len(data))
    value = json.loads(data)
    for _ in range(r.choice((1, 1, 2, 4))):
        value = changed(r, value)
    return json_text(value)


def damaged_tensors(r: random.Random, data: bytes) -> bytes:
    """A safetensors file: its header, a JSON object behind its length, or any byte."""
    if r.random() < 0.4:
        return damaged(r, data, PNG, near=300)
    length = struct.unpack("<Q", data[:8])[0]
    header = damaged_json(r, data[8 : 8 + length])
    return struct.pack("<Q", r.choice((len(header), len(header), len(header), length))) + header + data[8 + length :]


def damaged_file(r: random.Random, name: str, data: bytes) -> bytes:
    if name.endswith(".json"):
        return damaged_json(r, data)
    if name.endswith(".jsonl"):
        lines = data.splitlines(keepends=True)
        place = r.randrange(len(lines))
        lines[place] = damaged_json(r, lines[place]) + r.choice((b"\n", b"\r\n", b"", b"\n\n"))
        return b"".join(lines)
    if name.endswith(".safetensors"):
        return damaged_tensors(r, data)
    return damaged(r, data, PNG)


class Trap:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("caught",)


SHAPES = (
    *((), (0,), (0, 8, 8, 3), (2**31,), (2**40, 2, 2, 3), (2**62, 4), (2**63, 1), (-1, 8, 8), (3, 8, 8, -3)),
    *((1,) * 40, (2, 8, 8), (2, 8, 8, 3), (3, 3, 3, 3), (10**18, 10**18), (1, 2**31 - 1, 1, 3)),
)
TYPES = ("|u1", "|O", "<f8", ">u2", "|S5", "<U3", "|V16", "<M8[ns]", "|b1", "<c16", "<f2", "<i8", "|S0", "|V0")


def array_with(r: random.Random, count: int = 4096) -> bytes:
    """An array file whose header may claim anything."""
    match r.randrange(6):
        case 0:
            return array_file(np.array([Trap(), {}], dtype=object), allow_pickle=True)
        case 1:
            values = np.zeros(r.choice(((2, 8, 8), (2, 8, 8, 3), (2,), (), (2, 8))), np.dtype(r.choice(TYPES)))
            return array_file(values, allow_pickle=True)
        case 2:
            descr: object = [("a", "|u1"), ("b", r.choice(TYPES))]
        case _:
            descr = r.choice(TYPES)
    header = repr({"descr": descr, "fortran_order": r.random() < 0.3, "shape": r.choice(SHAPES)})
    if r.random() < 0.2:
        header = r.choice(
            ("", "{", "{}", "[" * 9000, "__import__('os').mkdir('caught')", header * 2, "{**{}}", "'" * 99)
        )
    version = r.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    packed = header.encode()
    length = struct.pack("<H", len(packed) % 2**16) if version[0] == 1 else struct.pack("<I", len(packed))
    return b"\x93NUMPY" + bytes(version) + length + packed + bytes(count)


# -- what is read: one function per kind writes its files and reads them -------------------------------------

Case = Callable[[random.Random, Path], str]


def load(r: random.Random, source: Path, sides: tuple[int | None, ...] = (None, 8), **options: str | None) -> str:
    """Through ``load_images``, held or streamed, or through ``robustdiff corrupt``."""
    resolution = r.choice(sides)
    if r.random() < 0.1:
        arguments = ["corrupt", str(source), str(source.parent / "copy"), "--corrupt", "gaussian:sigma=0.1"]
        return command([*arguments, *([] if resolution is None else ["--resolution", str(resolution)])])
    held = r.random() < 0.5
    images = load_images(source, resolution=resolution, max_memory=2**28 if held else 0, **options)
    assert images.x0([0, -1]).add(1).min() >= 0
    json.dumps(images.describe(), allow_nan=False).encode()
    assert not any(set(reason) & set("\n\r") or not reason for _, reason in images.skipped), images.skipped
    return "skipped" if images.skipped else "read"


def image(r: random.Random, folder: Path) -> str:
    name = r.choice(list(images()))
    suffix = Path(r.choice(list(images())) if r.random() < 0.15 else name).suffix
    put(folder / "in", {"good.png": PNG, f"other{suffix}": damaged_image(r, name)})
    return load(r, folder / "in", sides=(8, 8, 8, None))


def npy(r: random.Random, folder: Path) -> str:
    good = array_file(r.choice((rows(2, 8, 8), rows(2, 8, 8, 3), rows(2, 3, 8, 8), rows(2, 8, 8, 3).T.copy().T)))
    data = damaged(r, good, PNG, near=128) if r.random() < 0.5 else array_with(r)
    put(folder, {"a.npy": data})
    return load(r, folder / "a.npy")


def npz(r: random.Random, folder: Path) -> str:
    members = {"images.npy": array_file(rows(2, 8, 8, 3)), "labels.npy": array_file(np.array([0, 1]))}
    compression = r.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    match r.randrange(5):
        case 0:
            data = damaged(r, zipped(members, compression), zipped({"a": PNG}), near=100)
        case 1:  # the table of contents is at the end
            data = damaged(r, zipped(members, compression)[::-1], PNG, near=150)[::-1]
        case 2:
            name = r.choice(list(members))
            data = zipped({**members, name: damaged(r, members[name], PNG, near=128)}, compression)
        case 3:
            name = r.choice((*members, "x.npy", "../x.npy", "a/b.npy", ".npy"))
            members[name] = array_with(r, count=r.choice((0, 384, 4096)))
            data = zipped(members, compression)
        case _:  # much in little, said or not
            shape = r.choice(((1, 2**11, 2**11), (2**22,), (2, 8, 8, 3), (8, 2**12, 2**12), (1, 2**40, 1, 1)))
            header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
            start = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
            data = zipped({"images.npy": start + bytes(2**22)}, zipfile.ZIP_DEFLATED)
            if r.random() < 0.5:
                wrong = struct.pack("<I", r.choice((2**22 + len(start), 2**31, 2**32 - 1)))
                data = data.replace(struct.pack("<I", 2**22 + len(start)), wrong)
    put(folder, {"a.npz": data})
    return load(r, folder / "a.npz")


def cifar(r: random.Random, folder: Path) -> str:
    ten = r.random() < 0.7
    names: object = [b"a", b"b"] if r.random() < 0.5 else ["a", "b"]
    data = rows(2, 3072) if r.random() < 0.8 else rows(*r.choice(((2, 3071), (6144,), (0, 3072), (1, 2, 3072))))
    batch: dict[object, object] = {"data": data, "labels" if ten else "fine_labels": [0, 1], "filenames": ["x", "y"]}
    meta: dict[object, object] = {"label_names" if ten else "fine_label_names": names}
    if r.random() < 0.5:
        odd: tuple[object, ...] = (Trap(), [Trap()], None, -1, 2, 2**70, 1.5, b"", "../x", [[]], data, {1, 2}, print)
        odd += (bytearray(9), 1j, np.float64(1), data.T, data.astype("f4"), np.array([None]), frozenset(), ..., int)
        hit = r.choice((batch, meta))
        hit[r.choice((*hit, "x", b"y", 1, (1, 2)))] = r.choice(odd)
    if r.random() < 0.3:
        batch = {str(key).encode(): value for key, value in batch.items()}
    files = {
        "data_batch_1" if ten else "train": pickle.dumps(batch, r.choice((0, 1, 2, 2, 3, 4, 5))),
        "batches.meta" if ten else "meta": pickle.dumps(meta, r.choice((2, 4))),
    }
    if ten and r.random() < 0.7:
        files |= {f"data_batch_{number}": files["data_batch_1"] for number in range(2, 6)}
    files["test_batch" if ten else "test"] = files["data_batch_1" if ten else "train"]
    if r.random() < 0.6:
        name = r.choice(list(files))
        files[name] = damaged(r, files[name], pickle.dumps(Trap()), near=250)
    put(folder / "in", files)
    return load(r, folder / "in", split=r.choice((None, "test", "all")))


def celeba(r: random.Random, folder: Path) -> str:
    listed = [f"{number:06d}.jpg {number % 3}" for number in range(9)]
    if r.random() < 0.8:
        odd = (
            "",
            " ",
            "x",
            "../000001.jpg 0",
            "a b 0",
            "000001.jpg 3",
            "000001.jpg  0",
            "000001.jpg -1",
            "\0 0",
            "é.jpg 1",
        )
        listed[r.randrange(9)] = r.choice((*odd, "/etc/passwd 0", "000000.jpg 0", "x" * 10_000 + " 0"))
    text = "\n".join(listed).encode()
    if r.random() < 0.5:
        text = damaged(r, text, PNG, near=len(text))
    picture = io.BytesIO()
    drawn("RGB", 178, 218).save(picture, "JPEG")
    files = {f"img_align_celeba/{number:06d}.jpg": picture.getvalue() for number in range(0, 9, 3)}
    name = r.choice(list(files))
    files[name] = damaged(r, files[name], PNG) if r.random() < 0.5 else files[name]
    put(folder / "in", {**files, formats.PARTITION: text})
    return load(r, folder / "in", split=r.choice((None, "all", "valid")))


def lsun(r: random.Random, folder: Path) -> str:
    files = dict(r.choice(databases()))
    name = r.choice(list(files))
    data = files[name]
    if r.random() < 0.5:  # within a page's header and first pointers
        page = 4096 * r.randrange(len(data) // 4096)
        part = data[page : page + 4096]
        data = data[:page] + damaged(r, part, PNG, near=160)[:4096].ljust(4096, b"\0") + data[page + 4096 :]
    else:
        data = damaged(r, data, PNG, near=250)
    files[name] = data
    put(folder / "in", files)
    only = folder / "in" / Path(name).parent if r.random() < 0.5 else folder / "in"
    try:
        return load(r, only, sides=(8,))
    finally:
        formats._after_fork()  # close it: LMDB keeps what it has open


def odd_cell(r: random.Random) -> object:
    name = r.choice(list(images()))
    cells = (None, b"", PNG, PNG[:50], b"\0" * 100, images()[name], damaged_image(r, name))
    paths = (None, "", "a.png", "../b.png", "/dev/zero", "http://x/y.png", "zip://a::b", "\0", ".", "a" * 5000)
    return {"bytes": r.choice(cells), "path": r.choice(paths)} if r.random() < 0.8 else None


def odd_table(r: random.Random) -> pa.Table:
    """A table that is well-formed, with cells that are not."""
    types = {"image": datasets.Image(), "label": datasets.Value("string"), "y": datasets.Value("float32")}
    texts = (None, "", "a", "\0", "\n", "a" * 1000)
    cells = {
        "image": [odd_cell(r) for _ in range(4)],
        "label": [r.choice(texts) for _ in range(4)],
        "y": [float("nan"), None, 1.0, -1.0],
    }
    if r.random() < 0.3:
        types["label"], cells["label"] = datasets.Value("int64"), [r.choice((None, -1, 0, 2**62)) for _ in range(4)]
    return pa.Table.from_pydict(cells, datasets.Features(types).arrow_schema)


def parquet(r: random.Random, folder: Path) -> str:
    files = dict(r.choice([one for one in tables() if not any(name.endswith(".arrow") for name in one)]))
    name = r.choice(list(files))
    if r.random() < 0.4:
        buffer = io.BytesIO()
        pq.write_table(odd_table(r), buffer)
        files[name] = buffer.getvalue()
    elif r.random() < 0.5:  # the table of contents is at the end
        files[name] = damaged(r, files[name][::-1], PNG, near=1500)[::-1]
    else:
        files[name] = damaged(r, files[name], PNG)
    put(folder / "in", {**files, "a.png": PNG} if "a.parquet" in files and r.random() < 0.1 else files)
    put(folder, {"b.png": PNG})
    source = folder / "in" / name if r.random() < 0.5 else folder / "in"
    return load(r, source, label_column=r.choice((None, "label")), image_column=r.choice((None, None, "x", "image")))


def saved(r: random.Random, folder: Path) -> str:
    files = dict(r.choice([one for one in tables() if any(name.endswith(".arrow") for name in one)]))
    name = r.choice(list(files))
    if r.random() < 0.3:
        files = dict(next(one for one in tables() if "state.json" in one))
        name = next(name for name in files if name.endswith(".arrow"))
        buffer = io.BytesIO()
        cells = odd_table(r)
        with pa.ipc.new_stream(buffer, cells.schema) as stream:
            stream.write_table(cells)
        files[name] = buffer.getvalue()
    if r.random() < 0.9:
        files[name] = damaged_file(r, name, files[name])
    put(folder / "in", files)
    return load(r, folder / "in", label_column=r.choice((None, "label")))


def dirty(r: random.Random, folder: Path) -> str:
    put(folder, photos())
    arguments = ["corrupt", str(folder / "photos"), str(folder / "copy"), "--corrupt", "gaussian:sigma=0.1"]
    manifest = {"format": "robustdiff dirty copy 1", "seed": 0, "images": [{"index": 0, "file": "0.png"}]}
    good = json.dumps(manifest).encode()
    put(folder / "copy", {"manifest.json": damaged_json(r, good), "mine.png": PNG})
    status = command([*arguments, "--overwrite"])
    assert status == "read" or (folder / "copy/mine.png").read_bytes() == PNG
    return status


def checkpoint(r: random.Random, folder: Path) -> str:
    files = dict(checkpoints())
    name = r.choice(list(files))
    files[name] = damaged_file(r, name, files[name])
    put(folder, files)
    hit = folder / Path(name).parent
    if not name.endswith("manifest.json") and r.random() < 0.8:
        (hit / "manifest.json").unlink()  # a manifest that agrees lets the file through to where it is parsed
        durable.write_manifest(hit, format=1, step=int(hit.name[5:]))
    state = training_state()
    before = state.model.state_dict()["last.weight"].clone()
    try:
        found = find_checkpoint(folder, r.choice(("latest", hit.name)))
        load_checkpoint(found, state)
    except UsageError:
        assert torch.equal(before, state.model.state_dict()["last.weight"])
        raise
    return "read"


def run(r: random.Random, folder: Path) -> str:
    files = dict(runs()[0])
    wanted = ("config.json", "data.json", "metrics.jsonl", "state.json", "manifest.json", "optimizer.safetensors")
    names = [name for name in files if name.endswith(wanted) and name.count("/") in (1, 3)]
    name = r.choice(names)
    files[name] = damaged_file(r, name, files[name])
    put(folder, files)
    hit = folder / Path(name).parent
    if name.endswith(("state.json", "optimizer.safetensors")):
        (hit / "manifest.json").unlink()
        durable.write_manifest(hit, format=1, step=1)
    flags = (["--resume"], ["--resume"], ["--overwrite", "--dry-run"], ["--resume", "--dry-run"])
    config = folder / "run/config.json"
    before = json.loads(runs()[0]["run/config.json"])["settings"]
    arguments = train_command(folder, *r.choice(flags))
    if name != "run/config.json":  # the folder is another one now
        text = config.read_text().replace(before["data"], str(folder / "photos"))
        config.write_text(text.replace(before["model_config_name_or_path"], str(folder / "unet.json")))
    elif r.random() < 0.5:
        text = config.read_text(errors="replace")
        config.write_text(
            text.replace(before["model_config_name_or_path"], str(folder / "unet.json")), errors="replace"
        )
    return command(arguments)


def pipeline(r: random.Random, folder: Path) -> str:
    if r.random() < 0.3:
        files = dict(runs()[1])
    else:
        start = "run/"
        files = {name.removeprefix(start): data for name, data in runs()[0].items() if name.startswith(start)}
    wanted = (
        "model_index.json",
        "scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    )
    name = r.choice([name for name in files if name.endswith((*wanted, "data.json"))])
    files[name] = damaged_file(r, name, files[name])
    put(folder / "in", files)
    if r.random() < 0.3:
        put(folder, {**photos(), "unet.json": b""})
        arguments = train_command(folder, "--init-from", str(folder / "in"), "--dry-run")
        for flag in ("--model-config-name-or-path", "--ddpm-num-steps"):
            place = arguments.index(flag)
            del arguments[place : place + 2]
        return command(arguments)
    arguments = ["sample", str(folder / "in"), "-n", "1", "--steps", "1", "-o", str(folder / "out")]
    arguments += ["--scheduler", r.choice(("ddim", "ddpm", "dpm", "unipc", "euler"))]
    return command(arguments + (["--class-label", r.choice(("a", "0", "9"))] if r.random() < 0.3 else []))


def network(r: random.Random, folder: Path) -> str:
    put(folder, {**photos(), "unet.json": damaged_json(r, json.dumps(network_config()).encode())})
    if r.random() < 0.2:
        return command(train_command(folder, "--dry-run"))
    data = load_images(folder / "photos", resolution=8)
    config = TrainConfig(str(folder / "photos"), model_config_name_or_path=str(folder / "unet.json"))
    planning.build_pipeline(config, data)
    return "read"


CASES: dict[str, Case] = {
    **{"image": image, "npy": npy, "npz": npz, "cifar": cifar, "celeba": celeba, "lsun": lsun, "parquet": parquet},
    **{"saved": saved, "dirty": dirty, "checkpoint": checkpoint, "run": run, "pipeline": pipeline, "network": network},
}


class Broken(Exception):
    """What no file may lead to."""


def command(arguments: list[str]) -> str:
    status = cli.main(arguments)
    sys.stderr.flush()
    said = Path(os.environ["FUZZ_STDERR"]).read_text(errors="replace").splitlines()
    ours = [line for line in said if line.startswith("robustdiff: ") and not line.startswith("robustdiff: warning: ")]
    if status not in (0, 2) or len(ours) != (status == 2):
        raise Broken(f"exit status {status}, on stderr {said!r:.500}")
    return "refused" if status else "read"


# -- children ----------------------------------------------------------------------------------------------

OURS = ("robustdiff: ", "step ")
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.getaddrinfo")
events: list[str] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Keeps what a case does that it must not."""
    if event in FORBIDDEN or (event == "socket.connect" and not isinstance(arguments[1], str)):
        events.append(f"{event}{arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        here = os.path.abspath(arguments[0]).startswith((os.getcwd(), "/dev/", "/proc/"))
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not here:
            events.append(f"writes {arguments[0]}")


def quiet() -> None:
    """As the command line finds the process: no handlers or filters of the test runner, and nothing from the hub."""
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = lambda *what, **_: print(warnings.formatwarning(*what[:4]), end="", file=sys.stderr)
    diffusers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ["ACCELERATE_USE_CPU"] = "true"


def settle_in(folder: Path) -> None:
    """Make this process a child that runs cases in ``folder``."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    quiet()
    log = os.open("stderr", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    os.environ["FUZZ_STDERR"] = str(folder / "stderr")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    faulthandler.disable()  # pytest's would write where this process no longer does
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    sys.addaudithook(watch)


def problem_of(kind: str, seed: int) -> tuple[str, str]:
    """(outcome, problem) of one case, run in this process, which :func:`settle_in` has prepared."""
    events.clear()
    os.truncate("stderr", 0)
    place = Path.cwd() / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree("cache", ignore_errors=True)
    place.mkdir()
    outcome, problem = "", ""
    try:
        outcome = CASES[kind](random.Random(f"{kind} {seed}"), place)
    except UsageError as error:
        outcome, text = "refused", str(error)
        if not text or len(text.splitlines()) != 1 or len(text) > 2000:
            problem = f"not one line: {text!r:.600}"
    except BaseException as error:
        trace = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in trace if "robustdiff" in f.filename]
        last = f"{Path(trace[-1].filename).name}:{trace[-1].lineno}"
        problem = f"{type(error).__name__} at {ours[-1] if ours else '?'} < {last}: {str(error)!r:.400}"
    sys.stderr.flush()
    said = Path("stderr").read_text(errors="replace").splitlines()
    if not problem and (foreign := [line for line in said if not line.startswith(OURS)]):
        problem = f"on stderr: {foreign!r:.600}"
    if not problem and events:
        problem = events[0]
    if Path("caught").exists():
        os.rmdir("caught")
        problem = "a pickle was executed"
    return outcome, problem


def child(jobs: list[tuple[str, int]], folder: Path, pipe: int) -> None:
    """Run them, and tell of each when it begins and when it has ended."""
    settle_in(folder)
    with open(pipe, "w", buffering=1) as out:
        for kind, seed in jobs:
            print(json.dumps([kind, seed]), file=out)
            outcome, problem = problem_of(kind, seed)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps([kind, seed, outcome, problem, peak]), file=out)
            if peak > MEMORY:
                return


class Child:
    """One forked process and what it has told."""

    def __init__(self, jobs: list[tuple[str, int]], folder: Path) -> None:
        self.jobs, self.done, self.current, self.since, self.rest = jobs, 0, "", time.monotonic(), b""
        self.pipe, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self.pipe)
                child(jobs, folder, writing)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writing)
        os.set_blocking(self.pipe, False)

    def told(self) -> tuple[list[list[object]], bool]:
        """(lines since the last call, whether it has ended)."""
        try:
            data = os.read(self.pipe, 2**16)
        except BlockingIOError:
            return [], False
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines], not data

    def resident(self) -> int:
        """Bytes it holds now."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):  # another system, or it has just ended
            return 0


def hunt(jobs: Iterable[tuple[str, int]], folder: Path) -> tuple[Counter[str], list[str], int, dict[str, float]]:
    """(outcomes by kind, problems, peak memory in bytes, seconds by kind) of all cases."""
    jobs = list(jobs)
    shares = [jobs[number::CHILDREN] for number in range(CHILDREN)]
    outcomes: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    problems: list[str] = []
    peak = number = 0
    running: list[Child] = []
    selector = selectors.DefaultSelector()

    def start(share: list[tuple[str, int]]) -> None:
        nonlocal number
        if share:
            number += 1
            running.append(Child(share, folder / str(number)))
            selector.register(running[-1].pipe, selectors.EVENT_READ)

    for share in shares:
        start(share)
    while running:
        selector.select(0.05)
        for one in list(running):
            lines, ended = one.told()
            for line in lines:
                if len(line) == 2:
                    one.current, one.since = f"{line[0]} {line[1]}", time.monotonic()
                    continue
                kind, seed, outcome, problem, resident = line
                seconds[kind] = seconds.get(kind, 0.0) + time.monotonic() - one.since
                one.done, one.current = one.done + 1, ""
                peak = max(peak, resident)
                if resident > MEMORY:
                    problem = problem or f"{resident / 2**30:.1f} GiB"
                outcomes[f"{kind} {'broken' if problem else outcome}"] += 1
                if problem:
                    problems.append(f"{kind} {seed}: {problem}")
            why = ""
            if one.current and time.monotonic() - one.since > SECONDS:
                why = f"more than {SECONDS} s"
            elif one.resident() > 1.5 * MEMORY:
                why = f"{one.resident() / 2**30:.1f} GiB"
            if why:
                os.kill(one.pid, signal.SIGKILL)
            if why or ended:
                status = os.waitstatus_to_exitcode(os.waitpid(one.pid, 0)[1])
                selector.unregister(one.pipe)
                os.close(one.pipe)
                running.remove(one)
                kind = one.current.partition(" ")[0]
                if one.current and not why and status in DIES.get(kind, ()):
                    outcomes[f"{kind} died"] += 1
                    one.done += 1
                elif one.current:
                    problems.append(f"{one.current}: {why or f'the process ended with {status}'}")
                    outcomes[f"{kind} broken"] += 1
                    one.done += 1
                start(one.jobs[one.done :])
    return outcomes, problems, peak, seconds


def all_cases(total: int, first: int) -> list[tuple[str, int]]:
    """``total`` or a few more cases in the proportions of ``KINDS``."""
    whole = sum(KINDS.values())
    return [(kind, first + i) for kind, count in KINDS.items() for i in range(-(-count * total // whole))]


def prepare() -> None:
    """Write what is damaged, once, before there are children."""
    for build in (images, tables, databases, runs, checkpoints):
        build()


@pytest.mark.filterwarnings("ignore:IM image format is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_no_file_gets_more_than_a_line(tmp_path: Path) -> None:
    prepare()
    outcomes, problems, peak, seconds = hunt([*FOUND, *all_cases(sum(KINDS.values()), 0)], tmp_path)
    print(dict(outcomes), f"{peak / 2**20:.0f} MiB", seconds)
    assert not problems, "\n".join(problems)
    for kind in KINDS:  # some files are good enough, and some are not
        assert outcomes[f"{kind} read"] + outcomes[f"{kind} skipped"] > 0, kind
        assert outcomes[f"{kind} refused"] > 0, kind


# -- what was found --------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two images, a network's configuration, and a run that can go on."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    put(tmp_path, runs()[0])
    saved = json.loads(runs()[0]["run/config.json"])
    saved["settings"].update(data=str(tmp_path / "photos"), model_config_name_or_path=str(tmp_path / "unet.json"))
    (tmp_path / "run/config.json").write_text(json.dumps(saved))
    return tmp_path


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command ends."""
    capfd.readouterr()
    assert cli.main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


NESTED = b"[" * 100_000 + b"]" * 100_000


def test_json_that_is_nested_without_end(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "copy").mkdir()
    (here / "copy/manifest.json").write_bytes(NESTED)
    corrupt = ("corrupt", str(here / "photos"), str(here / "copy"), "--corrupt", "gaussian:sigma=0.1", "--overwrite")
    assert "not a dirty copy" in refused(capfd, *corrupt)
    (here / "data.json").write_bytes(b'{"data": {"classes": ' + NESTED + b"}}")
    assert sampling._class_names(str(here)) == []
    (here / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + NESTED + b"\n")
    assert recording.Lines(here / "metrics.jsonl", 5)._kept == ['{"step": 1}\n']
    (here / "run/data.json").write_bytes(NESTED)
    assert "data.json" in refused(capfd, *train_command(here, "--resume", "--dry-run"))
    (here / "run/config.json").write_bytes(NESTED)
    assert "holds no run" in refused(capfd, *train_command(here, "--dry-run"))
    (here / "unet.json").write_bytes(NESTED)
    shutil.rmtree(here / "run")
    assert "not a UNet2DModel" in refused(capfd, *train_command(here, "--dry-run"))


def test_metrics_that_are_no_text_end_before_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    assert recording.Lines(tmp_path / "metrics.jsonl", 5)._kept == ['{"step": 1}\n']


@pytest.mark.parametrize("name", ["config.json", "data.json"])
@pytest.mark.parametrize("content", ["3", '{"settings": [], "plan": 3, "data": "x"}', '{"settings": 1, "data": []}'])
def test_a_run_whose_records_hold_other_things(
    here: Path, capfd: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    (here / "run" / name).write_text(content)
    assert "no readable config.json and data.json" in refused(capfd, *train_command(here, "--resume", "--dry-run"))


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 2**32 - 1},
        {"layers_per_block": 0},
        {"block_out_channels": [2**31 - 1, 8]},
        {"block_out_channels": [60_000, 60_000]},
        {"block_out_channels": []},
        {"block_out_channels": None},
        {"norm_num_groups": 0},
        {"norm_eps": "x"},
        {"act_fn": "\ud800"},
        {"up_block_types": ["UpBlock2D"] * 1000},
        {"dropout": 2},
    ],
    ids=str,
)
def test_a_network_that_cannot_be_built(
    here: Path, capfd: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    (here / "unet.json").write_text(json.dumps({**network_config(), **change}))
    shutil.rmtree(here / "run")
    assert "unet.json: not a UNet2DModel" in (line := refused(capfd, *train_command(here, "--dry-run")))
    assert len(line) < 600


def test_a_network_configuration_that_is_empty(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """diffusers would make 114 million parameters of it."""
    (here / "unet.json").write_text("{}")
    shutil.rmtree(here / "run")
    assert "block_out_channels" in refused(capfd, *train_command(here, "--dry-run"))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/config.json", {"layers_per_block": 2**32 - 1}),
        ("unet/config.json", {"norm_eps": "x"}),
        ("unet/config.json", {"sample_size": "x"}),
        ("unet/config.json", {"sample_size": 7}),
        ("unet/config.json", {"sample_size": 2**31 - 1}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 2**31 - 1}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
        ("scheduler/scheduler_config.json", {"clip_sample_range": {}}),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilo"}),
        ("scheduler/scheduler_config.json", {"beta_start": 0.0, "beta_end": 0.0}),
        ("model_index.json", {"scheduler": ["antigravity", "DDPMScheduler"]}),
        ("model_index.json", {"schedulerx": ["diffusers", "DDPMScheduler"]}),
    ],
    ids=str,
)
def test_a_pipeline_that_cannot_run(
    here: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    change: dict[str, object],
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asks the network"))
    path = here / "run" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    sample = ("sample", str(here / "run"), "-n", "1", "--steps", "1", "-o", str(here / "out"))
    assert f"{here / 'run'} cannot be" in refused(capfd, *sample)
    assert "antigravity" not in sys.modules


def test_a_pipeline_without_some_of_its_weights(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = here / "run/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("conv_in.weight")
    save_file(weights, path)
    sample = ("sample", str(here / "run"), "-n", "1", "--steps", "1", "-o", str(here / "out"))
    assert f"{here / 'run'} cannot be" in refused(capfd, *sample)


@pytest.mark.parametrize("saved", [3, {"rows": 3}, {"rows": [[1.0]]}, {"rows": [["x"] * 6]}, {"skipped": "x"}], ids=str)
def test_a_checkpoint_whose_metrics_are_something_else(
    here: Path, capfd: pytest.CaptureFixture[str], saved: object
) -> None:
    folder = here / "run/checkpoints/step-00000001"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "metrics": saved}))
    (folder / "manifest.json").unlink()
    durable.write_manifest(folder, format=1, step=1)
    assert "damaged" in refused(capfd, *train_command(here, "--resume"))


def test_names_in_messages_are_no_longer_than_file_names(tmp_path: Path) -> None:
    put(tmp_path, {"img_align_celeba/0.jpg": PNG, formats.PARTITION: b"x" * 10_000 + b" 0\n0.jpg 0\n"})
    with pytest.raises(DataError, match="line 1 of") as caught:
        load_images(tmp_path, split="all")
    assert len(str(caught.value)) < 600
    data = bytearray(zipped({"images.npy": array_file(np.zeros((2, 30, 30), np.uint8) + 200)}))
    struct.pack_into("<H", data, 26, 900)  # the length of the member's name
    (tmp_path / "a.npz").write_bytes(bytes(data))
    with pytest.raises(DataError, match="cannot be read as an array") as caught:
        load_images(tmp_path / "a.npz")
    assert len(str(caught.value)) < 600


def test_pillows_log_stays_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(in_format("TIFF", "RGB"))
    place = data.index(struct.pack("<HHIH", 277, 3, 1, 3))  # samples per pixel
    struct.pack_into("<H", data, place + 8, 2**16 - 1)
    put(tmp_path, {"good.png": PNG, "bad.tif": bytes(data)})
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # without those of pytest, as in a program that sets none
    try:
        assert len(load_images(tmp_path).skipped) == 1
    finally:
        root.handlers = handlers
    assert capfd.readouterr() == ("", "")


def test_a_table_on_the_disk_asks_no_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` counts what it loads, on a server."""
    asked: list[object] = []

    def getaddrinfo(*what: object, **_: object) -> list[object]:
        asked.append(what[0])
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    put(here / "table", next(one for one in tables() if "a.parquet" in one))
    for source in (here / "table/a.parquet", here / "table"):
        assert len(load_images(source, label_column="label")) == 3
    assert not asked


def test_a_saved_data_set_of_too_many_splits(tmp_path: Path) -> None:
    """``datasets`` opens them one by one, for minutes."""
    put(tmp_path, next(one for one in tables() if "dataset_dict.json" in one))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"] * 3000}))
    with pytest.raises(DataError, match="more than 100 splits"):
        load_images(tmp_path)


@pytest.mark.parametrize("shape", [(2**62, 8), (2**63, 2**63, 1), (2**40, 2, 2, 3), (2**62, -8, 3)])
def test_an_array_file_of_absurd_shape_is_refused_quietly(tmp_path: Path, shape: tuple[int, ...]) -> None:
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(100))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(DataError):
            load_images(tmp_path / "a.npy")
    assert not said


def test_a_damaged_tiff_is_skipped_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libtiff would write its own lines on stderr."""
    data = bytearray(in_format("TIFF", "L", compression="tiff_lzw"))
    data[8:40] = b"\xff" * 32
    put(tmp_path, {"good.png": PNG, "bad.tif": bytes(data)})
    assert [name for name, _ in load_images(tmp_path).skipped] == ["bad.tif"]
    assert capfd.readouterr() == ("", "")


def test_remarks_on_metadata_are_passed_over_when_streamed_too(tmp_path: Path) -> None:
    data = bytearray(in_format("TIFF", "RGB", description="x" * 50))
    place = data.index(struct.pack("<HHI", 270, 2, 51))
    struct.pack_into("<I", data, place + 4, 2**20)
    put(tmp_path, {"a.tif": bytes(data)})
    images = load_images(tmp_path, max_memory=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.x0(0).shape == (3, 9, 12)


def test_16_bit_images_are_reduced_in_little_memory() -> None:
    """Eight bytes per number took 1.8 GiB and 18 s for the largest image that is allowed."""
    large = Image.fromarray(np.full((1000, 1000), 40_000, np.uint16))
    tracemalloc.start()
    try:
        pixels, _, _ = decoding.decode(large, channels=1, resolution=None, crop=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pixels.min() == pixels.max() == round(40_000 / 257)
    assert peak < 10 * large.width * large.height


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse such names")
def test_class_names_that_are_no_text(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in (b"a\xff", b"b"):
        (here / "named" / os.fsdecode(name)).mkdir(parents=True)
        (here / "named" / os.fsdecode(name) / "1.png").write_bytes(PNG)
    arguments = train_command(here, "--class-conditional")
    arguments[1], arguments[3] = str(here / "named"), str(here / "new")
    with pytest.MonkeyPatch.context() as patch:  # a terminal that takes text only
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict"))
        assert cli.main(arguments) == 0
    assert r"a\udcff" in (here / "new/README.md").read_text("utf-8")


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        prepare()
        if arguments[0] == "--all":
            began = time.monotonic()
            outcomes, problems, peak, seconds = hunt(all_cases(int(arguments[1]), int(arguments[2])), Path(name))
            print("\n".join(problems), dict(sorted(outcomes.items())), f"{peak / 2**20:.0f} MiB", seconds, sep="\n")
            print(f"{time.monotonic() - began:.0f} s, {len(problems)} problems")
            return
        outcomes, problems, peak, _ = hunt([(arguments[0], int(seed)) for seed in arguments[1:]], Path(name))
        print(*outcomes.items(), *problems, f"{peak / 2**20:.0f} MiB", sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
