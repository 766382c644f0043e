"""Parquet files, saved data sets and data sets from the hub, read back; damaged and hostile ones."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch

from robustdiff.commands import main
from robustdiff.data.dataset import load_images
from robustdiff.data.sources.open import open_source
from source_files import (
    IMAGES,
    ROWS,
    columns,
    fails,
    holds,
    labelled,
    own_cache,  # noqa: F401 - autouse: nothing is left in the cache of the user
    refused,
    save,
    works_in_workers_and_threads,
    write_lsun,
)


def test_a_parquet_file(tmp_path, capfd):
    labelled().to_parquet(tmp_path / "a[1]*.parquet")
    capfd.readouterr()
    source = open_source(tmp_path / "a[1]*.parquet")
    holds(source, IMAGES)
    assert isinstance(source.read(0), bytes)
    assert (source.what, source.names, source.crop) == ("parquet table", ("0", "1", "2", "3", "4"), None)
    assert (source.classes, source.labels) == (("cat", "ant"), [0, 1, 1, 0, 1])
    fails("no splits", "`split`", source=tmp_path / "a[1]*.parquet", split="train")
    fails("no configurations", "`config`", source=tmp_path / "a[1]*.parquet", config="x")
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
    fails("`split` valid", "train, test", source=tmp_path, split="valid")
    fails("`config`", source=tmp_path, config="x")
    works_in_workers_and_threads(everything, IMAGES)


def test_tables_and_images_in_one_folder_are_an_error(tmp_path):
    labelled().to_parquet(tmp_path / "a.parquet")
    save(tmp_path / "deep" / "b.png")
    fails("a.parquet", "deep/b.png", source=tmp_path)


def test_splits_with_different_columns_and_empty_tables(tmp_path):
    both = datasets.DatasetDict(train=labelled(), test=columns(label=(datasets.Value("string"), list("abcab"))))
    both.save_to_disk(tmp_path / "both")
    fails("different columns", "`split`", source=tmp_path / "both", split="all")
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
    fails("image, mask", "`image_column`", source=path)
    holds(open_source(path, image_column="mask"), IMAGES[::-1])
    holds(open_source(path, image_column="raw"), IMAGES)
    fails("`image_column` x", "image, mask, raw", source=path, image_column="x")
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
        fails("`label_column` label", source=tmp_path / "a.parquet", label_column="label")
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
    fails("`label_column` x", "fine, coarse", source=tmp_path / "a.parquet", label_column="x")
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
        "import os, sys, pathlib\nfrom robustdiff.data.sources.open import open_source\n"
        "source = open_source(sys.argv[1])\n"
        "print(len(source.read(4)), len(list(pathlib.Path(sys.argv[2]).rglob('*.arrow'))))\n"
        "if os.fork() == 0:\n    sys.exit()\n"  # runs the child's exit handlers
        "os.wait()\nprint(len(list(pathlib.Path(sys.argv[2]).rglob('*.arrow'))))\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    environment.pop("HF_DATASETS_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-u", "-c", script, tmp_path / "a.parquet", tmp_path / "temporary"],
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
    fails("network", "`config`", source="owner/name")
    assert capfd.readouterr() == ("", "")


def test_missing_packages(tmp_path, monkeypatch):
    labelled().to_parquet(tmp_path / "a.parquet")
    write_lsun(tmp_path / "bedroom_train_lmdb", 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    fails("datasets is not installed", "pip install 'robustdiff[data]'", source=tmp_path / "a.parquet")
    fails("lmdb is not installed", "pip install 'robustdiff[data]'", source=tmp_path / "bedroom_train_lmdb")


def test_corrupt_takes_the_column_it_is_told(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    columns(mask=(datasets.Image(), ROWS[::-1])).to_parquet(path)
    arguments = ["corrupt", str(path), str(tmp_path / "dirty"), "--corrupt", "gaussian:sigma=0.2,fraction=0"]
    assert main.main(arguments) == 2
    assert "--image-column" in capsys.readouterr().err
    assert main.main([*arguments, "--image-column", "mask"]) == 0
    assert torch.equal(load_images(tmp_path / "dirty").images, load_images(path, image_column="mask").images)
    assert main.main([*arguments, "--overwrite", "--image-column", ""]) == 2
    assert "--image-column is empty" in capsys.readouterr().err
