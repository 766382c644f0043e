"""CelebA and LSUN, written in their native layout and read back; incomplete and damaged ones."""

import os

import lmdb
import pytest

from robustdiff.data.sources import celeba_lsun
from robustdiff.data.sources.open import open_source
from source_files import (
    fails,
    holds,
    own_cache,  # noqa: F401 - autouse: nothing is left in the cache of the user
    pixels,
    works_in_workers_and_threads,
    write_celeba,
    write_lsun,
)

# -- CelebA ----------------------------------------------------------------------------------------


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
    fails("`split` val", "train, valid, test", source=tmp_path / opened, split="val")


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


# -- LSUN ------------------------------------------------------------------------------------------


def test_one_database_of_lsun(tmp_path):
    write_lsun(tmp_path / "bedroom_train_lmdb", 3)
    for path in (tmp_path / "bedroom_train_lmdb", tmp_path):
        source = open_source(path)
        holds(source, [pixels(seed=seed) for seed in range(3)])
        assert (source.what, source.names) == ("LSUN, train", ["0000", "0001", "0002"])
        assert (source.classes, source.labels) == ((), None)
        assert open_source(path, split="train").names == source.names
        fails("`split` val", source=path, split="val")
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
    fails("`split` test", "train, val", source=tmp_path, split="test")
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
    assert len(celeba_lsun._environments) >= 1
    child = os.fork()
    if child == 0:
        os._exit(
            0 if not celeba_lsun._environments and len(source.read(0)) and len(celeba_lsun._environments) == 1 else 1
        )
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
