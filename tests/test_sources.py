"""Every kind of source, written here in its native format and read back; damaged, incomplete and hostile files.

Long, because it mirrors sources.py, formats.py, cifar.py and tables.py: one section per format.
"""

import io
import logging
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import lmdb
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from robustdiff import formats
from robustdiff.sources import DataError, open_source


def pixels(height=6, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def encoded(array, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, form, lossless=True)
    return buffer.getvalue()


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels() if array is None else array))


def decoded(item):
    """(H, W, C) of any item."""
    if isinstance(item, np.ndarray):
        return item
    array = np.asarray(Image.open(item if isinstance(item, Path) else io.BytesIO(item)))
    return array if array.ndim == 3 else array[..., None]


def holds(source, arrays):
    assert len(source.names) == len(arrays)
    for index, array in enumerate(arrays):
        np.testing.assert_array_equal(decoded(source.read(index)), array)


def fails(*words, source, **options):
    """Opening must fail with one line that holds all the words."""
    with pytest.raises(DataError) as caught:
        open_source(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def refused(read, index):
    with pytest.raises(OSError) as caught:
        read(index)
    return str(caught.value)


def read_elsewhere(read, index):
    return decoded(read(index))


def works_in_workers_and_threads(source, arrays):
    """After pickling, in a forked and a spawned process, in a fork of one that is reading, and from threads."""
    holds(type(source)(source.what, source.names, pickle.loads(pickle.dumps(source)).read), arrays)
    tasks = [(source.read, index) for index in range(len(arrays))]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            for array, result in zip(arrays, pool.starmap(read_elsewhere, tasks), strict=True):
                np.testing.assert_array_equal(result, array)
    with ThreadPoolExecutor(4) as pool:
        for index, result in enumerate(pool.map(source.read, list(range(len(arrays))) * 50)):
            np.testing.assert_array_equal(decoded(result), arrays[index % len(arrays)])


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


# -- folders -----------------------------------------------------------------------------------------


def test_a_folder_of_images(tmp_path):
    names = ["B.png", "a/b/1.png", "a.png", ".hidden.png", ".cache/x.png"]
    for seed, name in enumerate(names):
        save(tmp_path / name, pixels(seed=seed))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(tmp_path)
    assert source.names == ["B.png", "a.png", "a/b/1.png"]
    holds(source, [pixels(seed=0), pixels(seed=2), pixels(seed=1)])
    assert sorted(source.skipped) == [("link.png", "broken symbolic link"), ("pipe.png", "not a regular file")]
    assert source.notes == {"side-car files ignored (not images)": 1}
    assert (source.what, source.classes, source.labels, source.crop) == ("folder", (), None, None)
    works_in_workers_and_threads(source, [pixels(seed=0), pixels(seed=2), pixels(seed=1)])


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    save(tmp_path / "photos" / "a.png")
    fails("did you mean", "photos?", source=tmp_path / "fotos")
    assert "mean" not in fails("no such", source=tmp_path / "no" / "where")
    fails("neither a folder", source=tmp_path / "photos" / "a.png")
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    fails("is empty", source=tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    fails("did you mean photos/a.png?", source="photos/b.png")  # not taken for an id


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def refuse(path):  # root may read everything, so the refusal is simulated
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert open_source(tmp_path).skipped == [("locked", "folder not read: Permission denied")]
    fails("no permission", source=tmp_path / "locked")


@pytest.mark.parametrize(
    ("flag", "option"),
    [
        ("--split", "split"),
        ("--dataset-config-name", "config"),
        ("--image-column", "image_column"),
        ("--label-column", "label_column"),
    ],
)
def test_an_option_that_a_source_cannot_use_is_an_error(tmp_path, flag, option):
    save(tmp_path / "folder" / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 5), np.uint8))
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 5), np.uint8))
    write_cifar(tmp_path / "cifar")
    write_celeba(tmp_path / "celeba")
    write_lsun(tmp_path / "lsun" / "bedroom_train_lmdb", 1)
    for source in ("digits", *(tmp_path / name for name in ("folder", "a.npy", "a.npz"))):
        fails(f"{flag} x", source=source, **{option: "x"})
    for name in ("cifar", "celeba", "lsun"):
        fails(f"{flag} x", source=tmp_path / name, **{option: "x"})


# -- arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(11, 6, 8), (11, 6, 8, 1), (11, 1, 6, 8), (11, 6, 8, 3), (11, 3, 6, 8)])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_of_every_layout(tmp_path, shape, kind):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    (np.save if kind == "npy" else np.savez)(tmp_path / f"a.{kind}", array)
    source = open_source(tmp_path / f"a.{kind}")
    expected = array[..., None] if len(shape) == 3 else array.transpose(0, 2, 3, 1) if shape[1] in (1, 3) else array
    holds(source, expected)
    assert (source.names[0], source.names[10], source.labels) == ("00", "10", None)
    works_in_workers_and_threads(source, expected)


def test_a_mapped_array_is_pickled_as_its_path(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((100, 64, 64), np.uint8))
    assert len(pickle.dumps(open_source(tmp_path / "a.npy").read)) < 1000


@pytest.mark.parametrize("key", ["labels", "label", "y"])
@pytest.mark.parametrize("images", ["images", "x"])
def test_labels_of_an_archive(tmp_path, key, images):
    np.savez_compressed(
        tmp_path / "a.npz", **{key: np.array([7, -2, 10, 7])}, **{images: np.zeros((4, 5, 6), np.uint8)}
    )
    source = open_source(tmp_path / "a.npz")
    assert (source.classes, source.labels) == (("-2", "7", "10"), [1, 0, 2, 1])


@pytest.mark.parametrize("labels", [np.zeros(3, int), np.zeros(4), np.zeros((4, 1), int)])
def test_what_cannot_be_labels_is_none(tmp_path, labels):
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 5, 6), np.uint8), labels=labels)
    assert open_source(tmp_path / "a.npz").labels is None
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 5, 6), np.uint8), labels=labels)
    fails("named images", "x, labels", source=tmp_path / "a.npz")


def write_npz(path, shape, descr="|u1", data=b""):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + data)


def test_an_archive_is_refused_by_its_header_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("read"))
    path = tmp_path / "a.npz"
    write_npz(path, (2**40, 64, 64))
    fails("GiB", "memory of this machine", source=path)
    write_npz(path, (4, 64, 64), data=bytes(100))
    fails("cannot be read as an array", "16384 bytes", source=path)
    write_npz(path, (2, 4, 4), "<f4", bytes(128))
    fails("float32", "127.5", source=path)
    write_npz(path, (10, 10), data=bytes(100))
    fails("(10, 10)", source=path)
    write_npz(path, (-4, 4, 4), data=bytes(100))
    fails("cannot be read as an array", source=path)


def test_arrays_are_never_unpickled(tmp_path):
    trap = np.array([Trap(tmp_path / "executed")], object)
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=trap)
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 4, 5), np.uint8), labels=trap)
    (tmp_path / "c.npy").write_bytes(b"\x80\x04nonsense")
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04nonsense")
    for name in ("a.npy", "a.npz", "c.npy", "c.npz"):
        fails("cannot be read as an array", source=tmp_path / name)
    assert open_source(tmp_path / "b.npz").labels is None
    assert not (tmp_path / "executed").exists()


def test_digits(tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    source = open_source("digits")
    holds(source, np.round(load_digits().images[..., None] * (255 / 16)))
    assert (source.names[7], source.classes[9]) == ("0007", "9")
    assert source.labels == load_digits().target.tolist()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    fails("pip install 'robustdiff[digits]'", source="digits")
    save(tmp_path / "digits" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_source("./digits").names == ["a.png"]


# -- tables ------------------------------------------------------------------------------------------

IMAGES = [pixels(seed=seed, channels=1 if seed == 2 else 3) for seed in range(5)]
ROWS = [{"bytes": encoded(image), "path": None} for image in IMAGES]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test sees or leaves anything in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def columns(**features):
    """A table of the five images with further columns: name=(feature, values)."""
    data = {"image": ROWS, **{name: values for name, (_, values) in features.items()}}
    kinds = {"image": datasets.Image(), **{name: feature for name, (feature, _) in features.items()}}
    return datasets.Dataset.from_dict(data, datasets.Features(kinds))


def labelled(values=(0, 1, 1, 0, 1)):
    return columns(label=(datasets.ClassLabel(names=["cat", "ant"]), list(values)))


def test_a_parquet_file(tmp_path, capfd):
    labelled().to_parquet(tmp_path / "a[1]*.parquet")
    capfd.readouterr()
    source = open_source(tmp_path / "a[1]*.parquet")
    holds(source, IMAGES)
    assert isinstance(source.read(0), bytes)
    assert (source.what, source.names, source.crop) == ("parquet table", ("0", "1", "2", "3", "4"), None)
    assert (source.classes, source.labels) == (("cat", "ant"), [0, 1, 1, 0, 1])
    fails("no splits", "--split", source=tmp_path / "a[1]*.parquet", split="train")
    fails("no configurations", "--dataset-config-name", source=tmp_path / "a[1]*.parquet", config="x")
    works_in_workers_and_threads(source, IMAGES)
    assert capfd.readouterr().err == ""  # no progress bar
    assert not datasets.are_progress_bars_disabled()


def test_a_folder_of_parquet_files_with_splits(tmp_path):
    labelled().select([0, 1]).to_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    labelled().select([2]).to_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    labelled().select([3, 4]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    splits = "dataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 99"
    (tmp_path / "labels.csv").write_text("side,car")
    (tmp_path / "README.md").write_text(f"---\n{splits}\n---\nSome shards of a larger data set.")
    source = open_source(str(tmp_path))
    holds(source, IMAGES[:3])
    assert (source.what, source.labels) == ("parquet table, train", [0, 1, 1])
    holds(open_source(tmp_path, split="test"), IMAGES[3:])
    everything = open_source(tmp_path, split="all")
    holds(everything, IMAGES)
    assert (everything.what, everything.labels) == ("parquet table, all", [0, 1, 1, 0, 1])
    fails("--split valid", "train, test", source=tmp_path, split="valid")
    fails("--dataset-config-name", source=tmp_path, config="x")
    works_in_workers_and_threads(everything, IMAGES)


def test_tables_and_images_in_one_folder_are_an_error(tmp_path):
    labelled().to_parquet(tmp_path / "a.parquet")
    save(tmp_path / "deep" / "b.png")
    fails("a.parquet", "deep/b.png", source=tmp_path)


def test_splits_with_different_columns_and_empty_tables(tmp_path):
    both = datasets.DatasetDict(train=labelled(), test=columns(label=(datasets.Value("string"), list("abcab"))))
    both.save_to_disk(tmp_path / "both")
    fails("different columns", "--split", source=tmp_path / "both", split="all")
    labelled().select([]).to_parquet(tmp_path / "a.parquet")
    fails("no data", source=tmp_path / "a.parquet")


def test_a_saved_data_set(tmp_path):
    labelled().select([4, 2, 0]).save_to_disk(tmp_path / "one")
    source = open_source(tmp_path / "one")
    holds(source, [IMAGES[4], IMAGES[2], IMAGES[0]])
    assert (source.what, source.labels) == ("saved data set", [1, 1, 0])
    fails("no splits", source=tmp_path / "one", split="train")
    fails("no configurations", source=tmp_path / "one", config="x")
    halves = datasets.DatasetDict(validation=labelled().select([0, 1]), other=labelled().select([2, 3, 4]))
    halves.save_to_disk(tmp_path / "several")
    fails("no split train", "validation, other", source=tmp_path / "several")
    source = open_source(tmp_path / "several", split="other")
    holds(source, IMAGES[2:])
    works_in_workers_and_threads(source, IMAGES[2:])


def test_the_column_of_images(tmp_path):
    path = tmp_path / "a.parquet"
    binary = [row["bytes"] for row in ROWS]
    datasets.Dataset.from_dict({"n": range(5), "content": binary}).to_parquet(path)
    holds(open_source(path), IMAGES)
    datasets.Dataset.from_dict({"img": ROWS}).to_parquet(path)  # a struct, not declared as images
    holds(open_source(path), IMAGES)
    columns(mask=(datasets.Image(), ROWS[::-1]), raw=(datasets.Value("binary"), binary)).to_parquet(path)
    fails("image, mask", "--image-column", source=path)
    holds(open_source(path, image_column="mask"), IMAGES[::-1])
    holds(open_source(path, image_column="raw"), IMAGES)
    fails("--image-column x", "image, mask, raw", source=path, image_column="x")
    columns(raw=(datasets.Value("binary"), [b"thumbnail"] * 5)).to_parquet(path)
    holds(open_source(path), IMAGES)  # what is declared as images goes first
    datasets.Dataset.from_dict({"n": range(5), "text": list("abcde")}).to_parquet(path)
    fails("n, text", source=path)


@pytest.mark.parametrize(
    ("feature", "values", "classes", "labels"),
    [
        (datasets.Value("int64"), [7, 10, 7, 9, 9], ("7", "9", "10"), [0, 2, 0, 1, 1]),
        (datasets.Value("string"), list("babca"), ("a", "b", "c"), [1, 0, 1, 2, 0]),
        (datasets.ClassLabel(names=["cat", "ant"]), [-1, 0, 1, 0, 0], (), None),
        (datasets.Value("int64"), [None, 0, 1, 0, 0], (), None),
        (datasets.Value("float32"), [0.5] * 5, (), None),
    ],
)
def test_the_column_of_labels(tmp_path, feature, values, classes, labels):
    columns(label=(feature, values), caption=(datasets.Value("string"), list("abcde"))).to_parquet(
        tmp_path / "a.parquet"
    )
    source = open_source(tmp_path / "a.parquet")
    assert (source.classes, source.labels) == (classes, labels)
    if labels is None:
        fails("--label-column label", source=tmp_path / "a.parquet", label_column="label")
    else:
        assert open_source(tmp_path / "a.parquet", label_column="label").labels == labels
    assert open_source(tmp_path / "a.parquet", label_column="caption").labels == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("label", [-2, 2])
def test_labels_outside_the_classes(tmp_path, label):
    table = labelled().data.table
    labels = pyarrow.array([0, 1, label, 0, 1])
    wrong = table.set_column(1, "label", labels).replace_schema_metadata(table.schema.metadata)
    pyarrow.parquet.write_table(wrong, tmp_path / "a.parquet")
    fails("class", source=tmp_path / "a.parquet")


def test_several_columns_of_labels_and_none(tmp_path):
    first, second = (datasets.ClassLabel(names=[*"abcde"][:count]) for count in (5, 2))
    columns(fine=(first, range(5)), coarse=(second, [0, 0, 0, 1, 1])).to_parquet(tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").labels is None
    assert open_source(tmp_path / "a.parquet", label_column="coarse").labels == [0, 0, 0, 1, 1]
    fails("--label-column x", "fine, coarse", source=tmp_path / "a.parquet", label_column="x")
    columns(caption=(datasets.Value("string"), list("abcde"))).to_parquet(tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").labels is None


def test_a_row_may_name_only_files_of_its_data_set(tmp_path):
    save(tmp_path / "secret.png")
    save(tmp_path / "set" / "images" / "in.png", IMAGES[0])
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    inside = str(tmp_path / "set" / "images" / "in.png")
    outside = [str(tmp_path / "secret.png"), "../secret.png", "link.png", "https://example.org/a.png", "images"]
    rows = [{"bytes": None, "path": path} for path in (inside, "images/in.png", *outside)]
    rows += [{"bytes": None, "path": None}, {"bytes": b"", "path": None}, None]
    struct = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    table = datasets.Dataset.from_dict({"image": rows}, struct)
    table.save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert source.read(0) == source.read(1) == Path(os.path.realpath(inside))
    for index in range(2, 7):
        assert "outside the data set" in refused(source.read, index)
    assert "no image" in refused(source.read, 7)
    assert source.read(8) == b""
    assert "no image" in refused(source.read, 9)


@pytest.mark.parametrize("damage", ["nonsense", "truncated", "empty"])
def test_damaged_tables_are_one_line_and_nothing_else(tmp_path, damage, capfd, caplog):
    labelled().to_parquet(tmp_path / "train.parquet")
    whole = (tmp_path / "train.parquet").read_bytes()
    data = {"nonsense": b"PAR1" + bytes(500), "truncated": whole[: len(whole) * 2 // 3], "empty": b""}[damage]
    (tmp_path / "train.parquet").write_bytes(data)
    capfd.readouterr()
    logging.getLogger("datasets").propagate = True
    level = logging.getLogger("datasets").level
    for source in (tmp_path / "train.parquet", tmp_path):
        fails("cannot be read as a data set", "damaged", source=source)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.getLogger("datasets").level == level


def test_a_damaged_saved_data_set(tmp_path):
    labelled().save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"nonsense")
    fails("cannot be read as a data set", source=tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("nonsense")
    fails("cannot be read as a data set", source=tmp_path / "saved")


def test_a_cache_that_cannot_be_written_to_is_replaced_for_the_time_of_the_program(tmp_path):
    labelled().to_parquet(tmp_path / "a.parquet")
    (tmp_path / "home").write_text("no folder")
    (tmp_path / "temporary").mkdir()
    script = (
        "import os, sys, pathlib\nfrom robustdiff.sources import open_source\n"
        "source = open_source(sys.argv[1])\n"
        "print(len(source.read(4)), len(list(pathlib.Path(sys.argv[2]).rglob('*.arrow'))))\n"
        "if os.fork() == 0:\n    sys.exit()\n"  # runs the child's exit handlers
        "os.wait()\nprint(len(list(pathlib.Path(sys.argv[2]).rglob('*.arrow'))))\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    environment.pop("HF_DATASETS_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.parquet", tmp_path / "temporary"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [str(len(ROWS[4]["bytes"])), "1", "1"], result.stderr
    assert result.stderr == ""
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_data_set_from_the_hub(monkeypatch, tmp_path):
    calls = []

    def load(path, name=None, **options):
        calls.append((path, name, options.get("trust_remote_code")))
        return datasets.DatasetDict(train=labelled(), test=labelled().select([1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    source = open_source("owner/name")
    holds(source, IMAGES)
    assert (source.what, source.labels) == ("data set from the hub, train", [0, 1, 1, 0, 1])
    holds(open_source("owner/name", split="test", config="small"), IMAGES[1:2])
    assert calls == [("owner/name", None, None), ("owner/name", "small", None)]
    for text in ("owner/name/more", "/owner/name", "./name", "../name", "name", "owner/.name", "ow ner/name"):
        fails("no such file", source=text)
    fails("no such file", source=Path("owner/name"))
    assert len(calls) == 2
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: labelled().select([]))
    fails("the table is empty", source="owner/name")
    save(tmp_path / "owner" / "name" / "a.png")
    assert open_source("owner/name").what == "folder"


def test_the_hub_out_of_reach(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    fails("network", "--dataset-config-name", source="owner/name")
    assert capfd.readouterr() == ("", "")


def test_missing_packages(tmp_path, monkeypatch):
    labelled().to_parquet(tmp_path / "a.parquet")
    write_lsun(tmp_path / "bedroom_train_lmdb", 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    fails("datasets is not installed", "pip install 'robustdiff[data]'", source=tmp_path / "a.parquet")
    fails("lmdb is not installed", "pip install 'robustdiff[data]'", source=tmp_path / "bedroom_train_lmdb")


# -- CIFAR -------------------------------------------------------------------------------------------

PLANES = np.random.default_rng(5).integers(0, 256, (3, 3072)).astype(np.uint8)


def write_cifar(folder, protocol=2, changes=()):
    """Batch n (1 .. 5, 6 = test) has n-th pixels; keys are bytes, as Python 3 finds them in the published files."""
    folder.mkdir(exist_ok=True)
    meta = {b"label_names": [b"airplane", b"automobile", b"bird"], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    for number in range(1, 7):
        names = [f"{number}_{row}.png".encode() for row in range(3)]
        batch = {b"batch_label": b"x", b"labels": [2, 0, 1], b"data": PLANES + np.uint8(number), b"filenames": names}
        name = "test_batch" if number == 6 else f"data_batch_{number}"
        (folder / name).write_bytes(pickle.dumps({**batch, **dict(changes)}, protocol=protocol))


def cifar_pixels(*batches):
    planes = np.concatenate([PLANES + np.uint8(number) for number in batches])
    # Spelt out: a row holds 1024 red values, then green, then blue, each row by row.
    return [np.stack([row[:1024], row[1024:2048], row[2048:]], 1).reshape(32, 32, 3) for row in planes]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar10(tmp_path, protocol):
    write_cifar(tmp_path, protocol)
    source = open_source(tmp_path)
    holds(source, cifar_pixels(1, 2, 3, 4, 5))
    assert (source.what, source.names[4]) == ("CIFAR-10 batches, train", "2_1.png")
    assert (source.classes, source.labels) == (("airplane", "automobile", "bird"), [2, 0, 1] * 5)
    holds(open_source(tmp_path, split="test"), cifar_pixels(6))
    holds(open_source(tmp_path, split="all"), cifar_pixels(1, 2, 3, 4, 5, 6))
    fails("--split valid", "train, test", source=tmp_path, split="valid")
    works_in_workers_and_threads(source, cifar_pixels(1, 2, 3, 4, 5))


def python2_pickle(data, labels, names):
    """A batch with the instructions that Python 2 wrote, memo and all."""

    def text(value):
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value

    def integer(value):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85"
        + text(b"b") + b"\x87Rq\x07(K\x01" + integer(len(data)) + integer(3072) + b"\x86"
        + b"cnumpy\ndtype\nq\x08" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(data.tobytes()) + b"tb"
    )  # fmt: skip
    items = text(b"batch_label") + b"q\x01" + text(b"training batch 1 of 5")
    items += text(b"labels") + b"]q\x02(" + b"".join(map(integer, labels)) + b"e" + text(b"data") + array
    items += text(b"filenames") + b"](" + b"".join(map(text, names)) + b"e"
    return b"\x80\x02}q\x00(" + items + b"u."


def test_cifar10_as_python_2_wrote_it(tmp_path):
    write_cifar(tmp_path)
    names = [b"a_s_1.png", b"b_s_2.png", b"c_s_3.png"]
    written = python2_pickle(PLANES + np.uint8(6), [0, 1, 2], names)
    assert pickle.loads(written, encoding="bytes")[b"filenames"] == names  # the test's own file is sound
    (tmp_path / "test_batch").write_bytes(written)
    meta = b"\x80\x02}q\x01(U\x0blabel_namesq\x02]q\x03(U\x01aU\x01bU\x01ceu."
    (tmp_path / "batches.meta").write_bytes(meta)
    source = open_source(tmp_path, split="test")
    holds(source, cifar_pixels(6))
    assert (source.names, source.labels, source.classes) == (
        ["a_s_1.png", "b_s_2.png", "c_s_3.png"],
        [0, 1, 2],
        ("a", "b", "c"),
    )


def test_cifar100(tmp_path):
    for seed, name in enumerate(("train", "test")):
        batch = {b"data": PLANES + np.uint8(seed), b"fine_labels": [1, 0, 1], b"coarse_labels": [0, 0, 0]}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"fine_label_names": [b"apple", b"bee"], b"coarse_label_names": [b"x"]}
    (tmp_path / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    source = open_source(tmp_path, split="test")
    holds(source, cifar_pixels(1))
    assert (source.what, source.classes, source.labels) == ("CIFAR-100 batches, test", ("apple", "bee"), [1, 0, 1])
    assert source.names == ["0", "1", "2"]
    (tmp_path / "meta").write_text("some file of this common name")
    assert open_source(tmp_path).what == "folder"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_batch_is_refused_or_inert(tmp_path, protocol):
    trap = Trap(tmp_path / "executed")
    folder = tmp_path / "cifar"
    write_cifar(folder, protocol)
    for changes, outcome in (
        ({b"data": trap}, "holds no images"),
        ({b"labels": trap}, "does not give each"),
        ({b"filenames": [trap] * 3}, None),
        ({trap: 1}, None),
    ):
        batch = {b"data": PLANES, b"labels": [0, 1, 2], **changes}
        (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
        if outcome:
            fails("test_batch", outcome, source=folder, split="test")
        else:
            assert open_source(folder, split="test").names == ["0", "1", "2"]
    (folder / "batches.meta").write_bytes(pickle.dumps(trap, protocol=protocol))
    fails("batches.meta is no file of CIFAR", source=folder)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(trap, protocol=protocol))
    assert (tmp_path / "executed").exists()  # the trap was armed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({b"data": PLANES[:, :3000]}, ["data_batch_1", "3072"]),
        ({b"data": PLANES.astype(np.float32)}, ["data_batch_1", "3072 uint8"]),
        ({b"data": np.asfortranarray(PLANES)}, ["data_batch_1", "C order"]),
        ({b"labels": [0, 1]}, ["data_batch_1", "3 images"]),
        ({b"labels": [0, 1, 3]}, ["data_batch_1", "3 classes"]),
        ({b"labels": None}, ["data_batch_1", "3 classes"]),
    ],
)
def test_batches_that_cannot_be_used(tmp_path, changes, words):
    write_cifar(tmp_path, changes=changes)
    fails(*words, source=tmp_path)


def test_a_batch_that_grows_when_read_is_refused(tmp_path):
    write_cifar(tmp_path)
    deep = b"K\x00\x85q\x01" + b"h\x01h\x01\x86q\x01" * 60  # 2 ** 60 leaves, if anyone visits them
    key = b"\x80\x02}(" + deep + b"K\x00u."
    text = b"c_codecs\nencode\nq\x02X\x10\x27\x00\x00" + b"x" * 10000 + b"\x85q\x01R" + b"h\x02h\x01R" * 20
    for data in (key, b"\x80\x02" + text + b"."):
        (tmp_path / "data_batch_3").write_bytes(data)
        fails("data_batch_3 is no file of CIFAR (ValueError: damaged)", source=tmp_path)
    nested = (0,)
    for _ in range(60):
        nested = (nested, nested)
    batch = {b"data": PLANES, b"labels": [0, 1, 2], b"filenames": [nested, b"b", b"c"]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    assert open_source(tmp_path, split="test").names == ["0", "1", "2"]
    (tmp_path / "test_batch").write_bytes(pickle.dumps({**batch, b"labels": [0, 1, nested]}, protocol=2))
    fails("does not give each", source=tmp_path, split="test")
    for names in (5, [], [5], [nested], nested):
        (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
        fails("batches.meta does not name the classes", source=tmp_path)


def test_incomplete_and_damaged_batches(tmp_path):
    write_cifar(tmp_path)
    whole = (tmp_path / "data_batch_3").read_bytes()
    for data in (
        b"",
        b"nonsense",
        whole[:-1],
        whole[:5000],
        b"\x80\x02.",
        b"\x80\x02N.",
        b"\x80\x02t.",
        b"cos\nsystem\n.",
    ):
        (tmp_path / "data_batch_3").write_bytes(data)
        fails("data_batch_3 is no file of CIFAR", source=tmp_path)
    (tmp_path / "data_batch_3").unlink()
    fails("data_batch_3 is missing", source=tmp_path)
    holds(open_source(tmp_path, split="test"), cifar_pixels(6))


@pytest.mark.parametrize("name", [b"../../x.png", b"/etc/x.png", b"", b".hidden"])
def test_names_in_a_batch_cannot_lead_elsewhere(tmp_path, name):
    write_cifar(tmp_path)
    batch = {b"data": PLANES, b"labels": [0, 1, 2], b"filenames": [b"a", b"b", name]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    assert open_source(tmp_path, split="test").names == ["0", "1", "2"]


# -- CelebA ------------------------------------------------------------------------------------------


def write_celeba(folder, partition=None, images="img_align_celeba"):
    for number in range(1, 6):
        save(folder / images / f"{number:06d}.jpg", pixels(seed=number))
    lines = [f"{number:06d}.jpg {part}" for number, part in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 0), (6, 0))]
    path = folder / (partition or "list_eval_partition.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("partition", "images", "opened"),
    [
        ("list_eval_partition.txt", "img_align_celeba", "."),
        ("list_eval_partition.txt", "img_align_celeba", "img_align_celeba"),
        ("list_eval_partition.txt", "x/img_align_celeba", "x"),
        ("list_eval_partition.txt", "x/img_align_celeba", "x/img_align_celeba"),
        ("img_align_celeba/list_eval_partition.txt", "img_align_celeba", "img_align_celeba"),
        ("Eval/list_eval_partition.txt", "Img/img_align_celeba", "."),
    ],
)
def test_celeba(tmp_path, partition, images, opened):
    write_celeba(tmp_path, partition, images)
    source = open_source(tmp_path / opened)
    assert (source.what, source.crop, source.labels) == ("CelebA, train", 140, None)
    assert source.names == ["000001.jpg", "000002.jpg", "000005.jpg"]
    holds(source, [pixels(seed=number) for number in (1, 2, 5)])
    ((name, reason),) = source.skipped
    assert name == "000006.jpg"
    assert "missing" in reason
    assert open_source(tmp_path / opened, split="valid").names == ["000003.jpg"]
    assert open_source(tmp_path / opened, split="test").names == ["000004.jpg"]
    assert open_source(tmp_path / opened, split="test").skipped == []
    assert len(open_source(tmp_path / opened, split="all").names) == 5
    fails("--split val", "train, valid, test", source=tmp_path / opened, split="val")


def test_celeba_from_inside_its_folder(tmp_path, monkeypatch):
    write_celeba(tmp_path)
    monkeypatch.chdir(tmp_path / "img_align_celeba")
    assert open_source(".").what == "CelebA, train"


def test_a_list_of_celeba_that_cannot_be_used(tmp_path):
    write_celeba(tmp_path)
    path = tmp_path / "list_eval_partition.txt"
    for line in ("000002.jpg 3", "000002.jpg", "../000002.jpg 0", "img/a.jpg 0"):
        path.write_text(f"000001.jpg 0\n{line}\n")
        fails("line 2 of list_eval_partition.txt", source=tmp_path)
    path.write_text("999999.jpg 0\n")
    fails("none of the images", source=tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    fails("no text file", source=tmp_path)
    path.unlink()
    assert open_source(tmp_path).what == "folder"


# -- LSUN --------------------------------------------------------------------------------------------


def write_lsun(folder, count, seed=0, keys=None):
    folder.mkdir(parents=True)
    keys = keys or [f"{number:04x}".encode() for number in range(count)]
    environment = lmdb.open(str(folder), map_size=2**24)
    with environment.begin(write=True) as transaction:
        for number, key in enumerate(keys):
            transaction.put(key, encoded(pixels(seed=seed + number), "WEBP"))
    environment.close()


def test_one_database_of_lsun(tmp_path):
    write_lsun(tmp_path / "bedroom_train_lmdb", 3)
    for path in (tmp_path / "bedroom_train_lmdb", tmp_path):
        source = open_source(path)
        holds(source, [pixels(seed=seed) for seed in range(3)])
        assert (source.what, source.names) == ("LSUN, train", ["0000", "0001", "0002"])
        assert (source.classes, source.labels) == ((), None)
        assert open_source(path, split="train").names == source.names
        fails("--split val", source=path, split="val")
    works_in_workers_and_threads(source, [pixels(seed=seed) for seed in range(3)])


def test_several_databases_of_lsun_are_classes_and_splits(tmp_path):
    write_lsun(tmp_path / "church_outdoor_train_lmdb", 2, seed=10)
    write_lsun(tmp_path / "bedroom_train_lmdb", 3, seed=20)
    write_lsun(tmp_path / "bedroom_val_lmdb", 1, seed=30)
    source = open_source(tmp_path)
    arrays = [pixels(seed=seed) for seed in (20, 21, 22, 10, 11)]
    holds(source, arrays)
    assert (source.names[0], source.names[3]) == ("bedroom_train_lmdb/0000", "church_outdoor_train_lmdb/0000")
    assert (source.classes, source.labels) == (("bedroom", "church_outdoor"), [0, 0, 0, 1, 1])
    holds(open_source(tmp_path, split="val"), [pixels(seed=30)])
    everything = open_source(tmp_path, split="all")
    assert everything.labels == [0, 0, 0, 0, 1, 1]
    holds(everything, [pixels(seed=seed) for seed in (20, 21, 22, 30, 10, 11)])
    fails("--split test", "train, val", source=tmp_path, split="test")
    works_in_workers_and_threads(source, arrays)


def test_a_database_without_split_in_its_name_counts_as_train(tmp_path):
    write_lsun(tmp_path / "cat_lmdb", 2)
    write_lsun(tmp_path / "test_lmdb", 1, seed=5)
    assert len(open_source(tmp_path).names) == 2
    holds(open_source(tmp_path, split="test"), [pixels(seed=5)])
    assert open_source(tmp_path, split="all").labels is None  # the test images have no category


def test_keys_that_are_no_names(tmp_path):
    write_lsun(tmp_path / "bedroom_train_lmdb", 3, keys=[b"../x", b"\xff\x00", b"ok"])
    source = open_source(tmp_path)
    assert source.names == [b"../x".hex(), "ok", "ff00"]
    holds(source, [pixels(seed=0), pixels(seed=2), pixels(seed=1)])


def test_a_database_is_never_written_to(tmp_path):
    write_lsun(tmp_path / "bedroom_train_lmdb", 1)
    (tmp_path / "bedroom_train_lmdb" / "lock.mdb").unlink()
    open_source(tmp_path).read(0)
    assert [path.name for path in (tmp_path / "bedroom_train_lmdb").iterdir()] == ["data.mdb"]


def test_a_forked_child_opens_the_database_anew(tmp_path):
    write_lsun(tmp_path / "bedroom_train_lmdb", 1)
    source = open_source(tmp_path)
    assert len(formats._environments) >= 1
    child = os.fork()
    if child == 0:
        os._exit(0 if not formats._environments and len(source.read(0)) and len(formats._environments) == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    holds(source, [pixels()])


@pytest.mark.parametrize("damage", ["nonsense", "truncated early", "truncated late", "empty", "no keys"])
def test_damaged_databases(tmp_path, damage):
    folder = tmp_path / "bedroom_train_lmdb"
    if damage == "no keys":
        folder.mkdir()
        lmdb.open(str(folder)).close()
        fails("the database is empty", source=tmp_path)
        return
    write_lsun(folder, 200)
    whole = (folder / "data.mdb").read_bytes()
    end = {"truncated early": 20000, "truncated late": len(whole) - 8192, "empty": 0}.get(damage, 0)
    data = bytes(range(256)) * 100 if damage == "nonsense" else whole[:end]
    (folder / "data.mdb").write_bytes(data)
    fails("bedroom_train_lmdb cannot be read as an LMDB database", source=tmp_path)


def test_the_order_in_which_layouts_are_recognised(tmp_path):
    save(tmp_path / "a.png")
    assert open_source(tmp_path).what == "folder"
    write_celeba(tmp_path)
    assert open_source(tmp_path).what == "CelebA, train"
    write_cifar(tmp_path)
    assert open_source(tmp_path).what == "CIFAR-10 batches, train"
    write_lsun(tmp_path / "cat_train_lmdb", 1)
    assert open_source(tmp_path).what == "LSUN, train"
    labelled().save_to_disk(tmp_path)
    assert open_source(tmp_path).what == "saved data set"
