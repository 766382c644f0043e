"""Sets that are streamed: the same images as held ones, from workers too; and files that change under way.

Long, because held and streamed sets are compared throughout, from loading to the workers' end.
"""

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import TINY_UNET
from robustdiff.commands import main
from robustdiff.data import dataset
from robustdiff.data.dataset import DataError, ImageDataset, load_images
from robustdiff.training import loop
from robustdiff.training.config import TrainConfig
from robustdiff.training.loader import Batches, RankSampler, iterate_batches
from robustdiff.training.trainer import train
from robustdiff.utils import resources
from robustdiff.utils.errors import UsageError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine colour images of 12 x 10 pixels in two classes: one palette image, one cut short, and a side-car."""
    folder = tmp_path / "photos"
    random = np.random.default_rng(0)
    for i in range(9):
        path = folder / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        (image.convert("P") if i == 2 else image).save(path)
    cut = folder / "odd" / "3.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (folder / "odd" / "notes.txt").write_text("a side-car")
    return folder


def array(folder: Path) -> Path:
    """Five grey images in one file."""
    path = folder / "five.npy"
    np.save(path, np.random.default_rng(1).integers(0, 256, (5, 6, 6), dtype=np.uint8))
    return path


def both(source: Path, **options: int) -> tuple[ImageDataset, ImageDataset]:
    """The set held, and streamed."""
    held, streamed = (load_images(source, max_memory=limit, **options) for limit in (2**30, 0))
    assert not held.streamed
    assert streamed.streamed
    return held, streamed


# -- the same set ------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [None, 8])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_a_streamed_folder_is_the_held_one(photos: Path, resolution: int | None, channels: int | None) -> None:
    held, streamed = both(photos, resolution=resolution, channels=channels)
    assert held.describe() == streamed.describe()
    assert held.skipped == (("odd/3.png", "cut off"),)
    assert held.notes["palette expanded"] == 1
    assert held.names == streamed.names
    assert torch.equal(held.labels, streamed.labels)
    assert len(held) == len(streamed) == 8
    assert held.bytes == streamed.bytes == held.images.numel()
    assert (held.channels, held.size) == (streamed.channels, streamed.size)
    assert streamed.sha256 == dataclasses.replace(streamed, images=held.images).sha256  # not taken over: the same


def test_a_streamed_array_is_the_held_one(tmp_path: Path) -> None:
    held, streamed = both(array(tmp_path))
    assert held.describe() == streamed.describe()
    assert torch.equal(held.images, streamed.images[:])


INDICES = [
    0,
    7,
    -1,
    -8,
    slice(None),
    slice(2, 6),
    slice(1, None, 3),
    slice(3, 3),
    [5, 0, 5],
    [],
    [-1, 2],
    torch.tensor([6, 1]),
    torch.tensor([], dtype=torch.long),
]


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_every_kind_of_index_gives_the_same_images(photos: Path, index: object) -> None:
    held, streamed = both(photos)
    wanted, got = held.x0(index), streamed.x0(index)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)
    assert torch.equal(streamed.images[index], held.images[index])


@pytest.mark.parametrize("index", [8, -9, [0, 8], torch.tensor([8])], ids=repr)
def test_an_index_beyond_the_end_is_an_error_in_both(photos: Path, index: object) -> None:
    for data in both(photos):
        with pytest.raises(IndexError):
            data.x0(index)


def test_a_streamed_set_can_be_pickled_without_its_pixels(photos: Path) -> None:
    held, streamed = both(photos)
    parcel = pickle.dumps(streamed)
    again = pickle.loads(parcel)
    assert again.streamed
    assert again.describe() == streamed.describe()
    assert torch.equal(again.x0([3, 1]), held.x0([3, 1]))
    large = photos.parent / "large"
    large.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(large / "0.png")
    assert len(pickle.dumps(load_images(large, max_memory=0))) < 10_000


# -- memory ------------------------------------------------------------------------------------------


def test_the_limit_is_the_size_of_the_pixels_to_the_byte(tmp_path: Path) -> None:
    """Bad files found while decoding count until then: room is made before they are known."""
    path = array(tmp_path)
    size = 5 * 6 * 6
    assert not load_images(path, max_memory=size).streamed
    assert load_images(path, max_memory=size - 1).streamed
    assert load_images(path, resolution=3, max_memory=5 * 3 * 3).bytes == 5 * 3 * 3
    assert not load_images(path, resolution=3, max_memory=5 * 3 * 3).streamed
    assert load_images(path, channels=3, max_memory=3 * size - 1).streamed
    assert not load_images(path, channels=3, max_memory=3 * size).streamed


@pytest.mark.parametrize(
    ("processes", "free", "streamed"), [(1, 360, False), (1, 359, True), (4, 1440, False), (4, 1439, True)]
)
def test_by_default_half_of_the_free_memory_is_shared(tmp_path, monkeypatch, processes, free, streamed) -> None:
    monkeypatch.setattr("robustdiff.data.dataset.free_memory", lambda: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert load_images(array(tmp_path)).streamed == streamed


@pytest.mark.parametrize(("value", "count"), [(None, 1), ("1", 1), ("4", 4), ("0", 1), ("", 1), ("x", 1), ("-2", 1)])
def test_processes_and_cores_of_this_machine(monkeypatch, value: str | None, count: int) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert resources.processes_here() == count
    for mine, each in ((8, 8 // count), (1, 1), (3, max(1, 3 // count))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, mine=mine: set(range(mine)), raising=False)
        assert resources.cores() == each


def control_group(folder: Path, limit: str, used: int, cache: int = 0, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    # In version 1 the cache of the groups within is counted apart, as their use is not.
    stat = f"inactive_file {cache}\n" if version == 2 else f"inactive_file 1\ntotal_inactive_file {cache}\n"
    (folder / "memory.stat").write_text(f"anon {used - cache}\n{stat}active_file 3\n")


@pytest.mark.parametrize(
    ("limit", "used", "cache", "free"),
    [("max", 5, 0, 1000), ("600", 100, 0, 500), ("600", 500, 450, 550), ("5000", 100, 0, 1000), ("100", 200, 0, 0)],
)
@pytest.mark.parametrize("nested", [False, True])
def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch, limit, used, cache, free, nested) -> None:
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    monkeypatch.setattr(resources, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(resources, "OWN_GROUP", tmp_path / "own")
    assert resources.free_memory() == 1000  # a system without control groups
    (tmp_path / "own").write_text("0::/job/step\n" if nested else "0::/\n")
    assert resources.free_memory() == 1000  # groups that are hidden
    control_group(tmp_path / "groups" / ("job" if nested else ""), limit, used, cache)
    assert resources.free_memory() == free
    if nested:  # the tighter one counts
        control_group(tmp_path / "groups" / "job" / "step", "40", 10)
        assert resources.free_memory() == min(free, 30)


@pytest.mark.parametrize("beside", ["", "0::/\n"])
def test_free_memory_is_that_of_the_container_with_version_1_too(tmp_path, monkeypatch, beside: str) -> None:
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    monkeypatch.setattr(resources, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(resources, "OWN_GROUP", tmp_path / "own")
    root = tmp_path / "groups" / "memory"
    (tmp_path / "own").write_text(f"3:cpu,cpuacct:/other\n7:memory:/job/step\n{beside}")
    control_group(root, "9223372036854771712", 700, version=1)  # how it says that there is no limit
    control_group(root / "other", "10", 1, version=1)
    assert resources.free_memory() == 1000
    control_group(root / "job", "600", 500, 450, version=1)
    assert resources.free_memory() == 550
    control_group(root / "job" / "step", "40", 10, version=1)
    assert resources.free_memory() == 30
    (tmp_path / "own").write_text(f"7:memory:/docker/0123\n{beside}")  # a container sees its own group as the root
    control_group(root, "600", 100, version=1)
    assert resources.free_memory() == 500


def test_free_memory_is_asked_after_the_source_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening an archive takes memory: what is free before it is not free to hold the images."""
    free, original = [2**30], dataset.open_source

    def open_source(*arguments: object, **options: object) -> object:
        free.append(100)
        return original(*arguments, **options)

    monkeypatch.setattr(dataset, "open_source", open_source)
    monkeypatch.setattr(dataset, "free_memory", lambda: free[-1])
    assert load_images(array(tmp_path)).streamed


# -- files that change under way ---------------------------------------------------------------------


def vanish(path: Path) -> None:
    path.unlink()


def become_text(path: Path) -> None:
    path.write_text("no image any more")


def be_cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def change_size(path: Path) -> None:
    Image.new("RGB", (10, 12)).save(path)


def change_pixels(path: Path) -> None:
    with Image.open(path) as image:
        changed = np.asarray(image.convert("RGB")).copy()
    changed[3, 4, 1] ^= 1
    Image.fromarray(changed).save(path)


CHANGES = [vanish, become_text, be_cut_short, change_size, change_pixels]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes_is_named_in_one_line(photos: Path, change: Callable[[Path], None]) -> None:
    streamed = load_images(photos, max_memory=0)
    place = streamed.names.index("odd/5.png")
    change(photos / "odd" / "5.png")
    for index in (place, [0, place], torch.tensor([place])):
        with pytest.raises(
            DataError, match=r"^odd/5\.png changed since the run began: \w[^\n]*; restore it .* `resume`"
        ):
            streamed.x0(index)
    streamed.x0([i for i in range(len(streamed)) if i != place])  # the others are as they were


def test_a_file_that_is_written_again_with_the_same_pixels_has_not_changed(photos: Path) -> None:
    held, streamed = both(photos)
    path = photos / "odd" / "5.png"
    with Image.open(path) as image:
        image.load()
    image.save(path, compress_level=0)
    assert torch.equal(streamed.x0(slice(None)), held.x0(slice(None)))


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> TrainConfig:
    """A streamed run of a few steps with two workers."""
    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET))
    return TrainConfig(
        str(photos),
        output_dir=str(tmp_path / "run"),
        images="64",
        resolution=8,
        train_batch_size=2,
        gradient_accumulation_steps=2,
        model_config_name_or_path=str(tmp_path / "unet.json"),
        ddpm_num_steps=20,
        preview_images=0,
        logging_steps=1,
        checkpointing_steps=4,
        max_memory_gib=0.0,
        dataloader_num_workers=2,
    )


def flags(config: TrainConfig) -> list[str]:
    """The command line of a configuration."""
    result = ["train", config.data]
    for field in dataclasses.fields(config)[1:]:
        value = getattr(config, field.name)
        if value != field.default:
            result += ["--" + field.name.replace("_", "-"), *([] if value is True else [str(value)])]
    return result


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("change", [vanish, change_size], ids=lambda change: change.__name__)
def test_training_ends_in_one_line_that_names_the_file(config, monkeypatch, capfd, photos, change, workers) -> None:
    """In workers too, whose exceptions the loader would wrap in a stack trace; and --resume goes on after mending."""
    path = photos / "odd" / "5.png"
    kept = path.read_bytes()

    def late(*arguments: object) -> Iterator:
        change(path)  # after everything was decoded once, before the first step
        return iterate_batches(*arguments[:3])

    with monkeypatch.context() as patch:
        patch.setattr(loop, "iterate_batches", lambda *arguments, **_: late(*arguments))
        assert main.main(flags(dataclasses.replace(config, dataloader_num_workers=workers))) == 2
    error = capfd.readouterr().err
    (line,) = (line for line in error.splitlines() if not line.startswith("step "))
    assert line.startswith("robustdiff: odd/5.png changed since the run began: ")
    assert multiprocessing.active_children() == []
    path.write_bytes(kept)
    assert main.main([*flags(config), "--overwrite"]) == 0


def test_a_worker_that_the_system_kills_is_one_line_about_memory(config, monkeypatch, capfd) -> None:
    def deadly(self: Batches, counters: range) -> torch.Tensor:
        if multiprocessing.parent_process() is not None and counters[0] >= 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, counters)

    original = Batches.load
    monkeypatch.setattr(Batches, "load", deadly)
    assert main.main(flags(config)) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(error) == 1, error
    assert error[0].startswith("robustdiff: out of memory")
    assert "--dataloader-num-workers" in error[0]


def test_an_error_of_the_program_in_a_worker_keeps_its_stack_trace(config, monkeypatch) -> None:
    def broken(self: Batches, counters: range) -> torch.Tensor:
        if multiprocessing.parent_process() is not None:
            raise ZeroDivisionError("a bug")
        return original(self, counters)

    original = Batches.load
    monkeypatch.setattr(Batches, "load", broken)
    with pytest.raises(ZeroDivisionError, match=r"(?s)Traceback.*a bug"):
        main.main(flags(config))
    assert multiprocessing.active_children() == []


# -- workers -----------------------------------------------------------------------------------------


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every process that is started."""
    count: list[int] = []
    original = BaseProcess.start

    def start(self: BaseProcess) -> None:
        original(self)
        count.append(self.pid or 0)

    monkeypatch.setattr(BaseProcess, "start", start)
    return count


def test_workers_start_once_however_often_the_data_is_passed_over(config: TrainConfig, starts: list[int]) -> None:
    """Sixteen steps of four images, of which there are eight: eight passes, four checkpoints."""
    train(config)
    assert len(set(starts)) == 2
    assert len(starts) == 2
    assert multiprocessing.active_children() == []


def test_held_sets_start_no_workers_unless_told(config: TrainConfig, starts: list[int]) -> None:
    train(dataclasses.replace(config, max_memory_gib=1.0, dataloader_num_workers=None, images="8"))
    assert starts == []


def test_tensors_from_workers_come_in_shared_memory(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as pickled bytes through the pipe: what the pipe carries stays small however large the images are."""
    sent: list[int] = []
    receive = Connection.recv_bytes
    batches = Batches(load_images(photos, resolution=64, max_memory=0), (), seed=0, random_flip=False)

    def counted(self: Connection, maxlength: int | None = None) -> bytes:
        data = receive(self, maxlength)
        sent.append(len(data))
        return data

    monkeypatch.setattr(Connection, "recv_bytes", counted)
    got = [batch.x0 for batch in iterate_batches(batches, RankSampler(0, 3, 4, 4, 0, 1), 1)]
    assert all(images.is_shared() for images in got)
    assert got[0].numel() * got[0].element_size() > 100_000
    assert sent
    assert max(sent) < 5_000


def test_closing_the_feed_ends_the_workers(photos: Path, starts: list[int]) -> None:
    batches = Batches(load_images(photos, max_memory=0), (), seed=0, random_flip=False)
    loading = iterate_batches(batches, RankSampler(0, 1000, 4, 4, 0, 1), 2)
    next(loading)
    assert len(starts) == 2
    loading.close()
    assert multiprocessing.active_children() == []


# -- shares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
@pytest.mark.parametrize("first_step", [0, 1, 6, 7])
@pytest.mark.parametrize("size", [1, 3])
def test_shares_hold_every_counter_once(processes: int, accumulation: int, first_step: int, size: int) -> None:
    steps, batch = 7, size * accumulation * processes
    shares = [list(RankSampler(first_step, steps, batch, size, rank, processes)) for rank in range(processes)]
    for rank, mine in enumerate(shares):
        assert len(mine) == len(RankSampler(first_step, steps, batch, size, rank, processes))
        assert len(mine) == (steps - first_step) * accumulation
        assert all(len(counters) == size for counters in mine)
    seen = [counter for mine in shares for counters in mine for counter in counters]
    assert sorted(seen) == list(range(first_step * batch, steps * batch))
    # what the processes do at the same time makes up one piece of the batch, in the order of their numbers
    for number, parts in enumerate(zip(*shares, strict=True)):
        together = [counter for part in parts for counter in part]
        first = first_step * batch + number * size * processes
        assert together == list(range(first, first + size * processes))


def test_the_users_errors_survive_the_way_from_a_worker() -> None:
    """What workers hand over as a value must survive pickling: type and text."""
    for error in (DataError("x.png changed"), UsageError("one line")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
