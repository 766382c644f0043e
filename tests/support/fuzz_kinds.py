"""What is read: one function per kind of file writes a folder, damages it and reads it."""

import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fuzz_damage import (
    Trap,
    array_with,
    damaged,
    damaged_file,
    damaged_image,
    damaged_json,
)
from fuzz_files import (
    PNG,
    array_file,
    checkpoints,
    databases,
    drawn,
    images,
    network_config,
    photos,
    put,
    rows,
    runs,
    tables,
    train_command,
    training_state,
    zipped,
)
from robustdiff.commands import main
from robustdiff.data.dataset import load_images
from robustdiff.data.sources import celeba_lsun
from robustdiff.training import setup
from robustdiff.training.checkpoint import find_checkpoint, load_checkpoint
from robustdiff.training.config import TrainConfig
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError

Case = Callable[[random.Random, Path], str]


class Broken(Exception):
    """What no file may lead to."""


def command(arguments: list[str]) -> str:
    status = main.main(arguments)
    sys.stderr.flush()
    said = Path(os.environ["FUZZ_STDERR"]).read_text(errors="replace").splitlines()
    ours = [line for line in said if line.startswith("robustdiff: ") and not line.startswith("robustdiff: warning: ")]
    if status not in (0, 2) or len(ours) != (status == 2):
        raise Broken(f"exit status {status}, on stderr {said!r:.500}")
    return "refused" if status else "read"


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
    put(folder / "in", {**files, celeba_lsun.PARTITION: text})
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
        celeba_lsun._after_fork()  # close it: LMDB keeps what it has open


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
        atomic_io.write_manifest(hit, format=1, step=int(hit.name[5:]))
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
        atomic_io.write_manifest(hit, format=1, step=1)
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
    setup.build_pipeline(config, data)
    return "read"


CASES: dict[str, Case] = {
    **{"image": image, "npy": npy, "npz": npz, "cifar": cifar, "celeba": celeba, "lsun": lsun, "parquet": parquet},
    **{"saved": saved, "dirty": dirty, "checkpoint": checkpoint, "run": run, "pipeline": pipeline, "network": network},
}
