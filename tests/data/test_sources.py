"""What a source is taken for; folders of images, arrays and the digits, read back; damaged and hostile ones."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest

from robustdiff.data.sources.open import open_source
from source_files import (
    Trap,
    fails,
    holds,
    labelled,
    own_cache,  # noqa: F401 - autouse: nothing is left in the cache of the user
    pixels,
    save,
    works_in_workers_and_threads,
    write_celeba,
    write_cifar,
    write_lsun,
)

# -- folders ---------------------------------------------------------------------------------------


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
        ("`split`", "split"),
        ("`config`", "config"),
        ("`image_column`", "image_column"),
        ("`label_column`", "label_column"),
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


# -- arrays ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("labels", [np.zeros(3, int), np.zeros((4, 1, 2), int)])
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
    save(tmp_path / "digits" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_source("./digits").names == ["a.png"]
