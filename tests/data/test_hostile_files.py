"""Hostile files that once led to more than a line: what ``test_fuzz.py`` found, each mended and named."""

import io
import json
import logging
import os
import shutil
import socket
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from fuzz_files import (
    PNG,
    array_file,
    in_format,
    network_config,
    put,
    runs,
    tables,
    train_command,
    zipped,
)
from robustdiff.commands import main
from robustdiff.data import decode
from robustdiff.data.dataset import load_images
from robustdiff.data.sources import celeba_lsun
from robustdiff.diffusion import sample_files
from robustdiff.training import metrics
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import DataError


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
    assert main.main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


NESTED = b"[" * 100_000 + b"]" * 100_000


def test_json_that_is_nested_without_end(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "copy").mkdir()
    (here / "copy/manifest.json").write_bytes(NESTED)
    corrupt = ("corrupt", str(here / "photos"), str(here / "copy"), "--corrupt", "gaussian:sigma=0.1", "--overwrite")
    assert "not a dirty copy" in refused(capfd, *corrupt)
    (here / "data.json").write_bytes(b'{"data": {"classes": ' + NESTED + b"}}")
    assert sample_files.class_names(str(here)) == []
    (here / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + NESTED + b"\n")
    assert metrics.JsonlLog(here / "metrics.jsonl", 5).kept == ('{"step": 1}\n',)
    (here / "run/data.json").write_bytes(NESTED)
    assert "data.json" in refused(capfd, *train_command(here, "--resume", "--dry-run"))
    (here / "run/config.json").write_bytes(NESTED)
    assert "holds no run" in refused(capfd, *train_command(here, "--dry-run"))
    (here / "unet.json").write_bytes(NESTED)
    shutil.rmtree(here / "run")
    assert "not a UNet2DModel" in refused(capfd, *train_command(here, "--dry-run"))


def test_metrics_that_are_no_text_end_before_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    assert metrics.JsonlLog(tmp_path / "metrics.jsonl", 5).kept == ('{"step": 1}\n',)


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
    atomic_io.write_manifest(folder, format=1, step=1)
    assert "damaged" in refused(capfd, *train_command(here, "--resume"))


def test_names_in_messages_are_no_longer_than_file_names(tmp_path: Path) -> None:
    put(tmp_path, {"img_align_celeba/0.jpg": PNG, celeba_lsun.PARTITION: b"x" * 10_000 + b" 0\n0.jpg 0\n"})
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
        pixels, _, _ = decode.decode(large, channels=1, resolution=None, crop=None)
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
        assert main.main(arguments) == 0
    assert r"a\udcff" in (here / "new/README.md").read_text("utf-8")
