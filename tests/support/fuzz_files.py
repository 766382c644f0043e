"""Small files of every format that robustdiff reads, written by the libraries that own them."""

import contextlib
import io
import json
import logging
import os
import shutil
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import diffusers
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers.training_utils import EMAModel
from PIL import Image, PngImagePlugin

from experiments.paper.point_denoiser import PointDenoiser
from helpers import TINY_UNET
from robustdiff.commands import main
from robustdiff.training.checkpoint import TrainingState, save_checkpoint
from robustdiff.utils.errors import RobustdiffWarning

Files = dict[str, bytes]
"""A folder: content by relative name."""


# -- images ----------------------------------------------------------------------------------------


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


PNG = in_format("PNG", "RGB")


# -- arrays ----------------------------------------------------------------------------------------


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


# -- folders ---------------------------------------------------------------------------------------


def tree(folder: Path) -> Files:
    """The folder as it lies on the disk."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def quiet() -> None:
    """As the command line finds the process: no handlers or filters of the test runner, and nothing from the hub."""
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)

    def shown(message: Warning | str, category: type[Warning], *where: Any, **_: object) -> None:
        if not issubclass(category, RobustdiffWarning) or "\n" in str(
            message
        ):  # ours, of one line, say what they should
            print(warnings.formatwarning(message, category, *where[:2]), end="", file=sys.stderr)

    warnings.showwarning = shown
    diffusers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ["ACCELERATE_USE_CPU"] = "true"


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


# -- runs and checkpoints --------------------------------------------------------------------------


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
        assert main.main(train_command(folder)) == 0
        shutil.rmtree(folder / "run/checkpoints/step-00000002")
        put(folder, {f"named/{name}/{name}.png": PNG for name in "ab"})
        pipeline = train_command(folder, "--class-conditional")
        pipeline[1], pipeline[3] = str(folder / "named"), str(folder / "conditional")
        assert main.main(pipeline) == 0
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
