"""Batches of CIFAR as every pickle protocol writes them; damaged, incomplete and hostile ones."""

import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from robustdiff.data.sources import cifar
from robustdiff.data.sources.open import open_source
from source_files import (
    PLANES,
    Trap,
    fails,
    holds,
    own_cache,  # noqa: F401 - autouse: nothing is left in the cache of the user
    works_in_workers_and_threads,
    write_cifar,
)


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
    fails("`split` valid", "train, test", source=tmp_path, split="valid")
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
def test_a_hostile_batch_is_refused(tmp_path, protocol):
    trap = Trap(tmp_path / "executed")
    folder = tmp_path / "cifar"
    write_cifar(folder, protocol)
    for changes in ({b"data": trap}, {b"labels": trap}, {b"filenames": [trap] * 3}, {trap: 1}):
        batch = {b"data": PLANES, b"labels": [0, 1, 2], **changes}
        (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
        fails("test_batch is no file of CIFAR", "mkdir", source=folder, split="test")
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
    batch = {b"data": PLANES, b"labels": [0, 1, 2]}
    for changes in ({b"filenames": [nested, b"b", b"c"]}, {b"labels": [0, 1, nested]}):
        (tmp_path / "test_batch").write_bytes(pickle.dumps({**batch, **changes}, protocol=2))
        fails("test_batch is no file of CIFAR (ValueError: damaged)", source=tmp_path, split="test")
    for names in (5, [], [5], ((), [()]), [[[]]]):
        (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
        fails("batches.meta does not name the classes", source=tmp_path)


class Does:
    """Pickled as a call of ``what``, and perhaps with a state."""

    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what


class Held:
    """Pickled by a persistent id."""


class ByHand(pickle.Pickler):
    def persistent_id(self, value):
        return "it" if isinstance(value, Held) else None


def by_hand(value):
    file = io.BytesIO()
    ByHand(file, protocol=2).dump(value)
    return file.getvalue()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


OPEN = b"cnumpy\nndarray\n"
HOSTILE = {
    "os.system": pickle.dumps({b"data": Does(os.system, ("touch executed",))}, protocol=2),
    "eval": pickle.dumps({b"data": Does(eval, ("open('executed', 'w')",))}, protocol=4),
    "getattr": pickle.dumps({b"data": getattr}, protocol=2),
    "a chain of getattr": b"\x80\x02c__builtin__\ngetattr\ncos\npath\n" + text(b"os") + b"\x86R.",
    "a dotted name": b"\x80\x04" + text(b"numpy") + text(b"ndarray.__reduce__") + b"\x93.",
    "another of numpy": b"\x80\x02cnumpy\nload\n.",
    "numpy's own modules": b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
    "another codec": b"\x80\x02c_codecs\nlookup\n.",
    "a persistent id": by_hand({b"data": Held()}),
    "a persistent id as text": b"\x80\x02Pit\n.",
    "a new object": b"\x80\x02" + OPEN + b")\x81.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "an object": b"\x80\x02(" + OPEN + b"o.",
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer beside": b"\x80\x05\x97.",
    "what is above": b"\x80\x02N20.",
    "a list called": b"\x80\x02]N\x85R.",
    "attributes of a list": b"\x80\x02]}" + text(b"append") + b"Nsb.",
    "a far number": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytes without end": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "text without end": b"\x80\x05\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "tuples without end": b"\x80\x02}K\x00" + b"\x85" * 10**6 + b"Ns.",
    "a tuple fetched": b"\x80\x02}K\x00\x85(eq\x01" + b"h\x01h\x01\x86q\x01" * 60 + b"Ns.",
    "a tuple kept in disguise": b"\x80\x02}K\x00\x85Nbq\x01" + b"h\x01h\x01\x86Nbq\x01" * 60 + b"Ns.",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_pickle_that_asks_for_more_than_arrays_is_refused_in_little_memory(tmp_path, monkeypatch, what):
    write_cifar(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(HOSTILE[what])
    tracemalloc.start()
    try:
        fails("data_batch_3 is no file of CIFAR", source=tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * 10**6
    assert not (tmp_path / "executed").exists()


def test_what_stands_for_a_call_keeps_what_it_is_given_and_stays_itself(tmp_path):
    """Neither its class nor a function can be reached: a state with attributes, as of an object with slots, is kept."""
    names = (b"__setstate__", b"__call__", b"__class__", b"name")
    state = b"N}(" + b"".join(text(name) + b"N" for name in names) + b"u\x86"
    for name in (OPEN, b"c_codecs\nencode\n"):
        for called in (b"", b")R"):
            found = cifar.inert(b"\x80\x02" + name + called + state + b"b.")
            assert type(found) is cifar._Call
            assert f"c{found.name}\n".replace(" ", "\n").encode() == name
            assert found.state[1]["name"] is None
    again = cifar.inert(b"\x80\x02" + OPEN + b")R.")
    assert (again.state, again.args) == (None, ())
    array = Does(np.ndarray.__reduce__, (PLANES,))
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": array, b"labels": [0, 1, 2]}, protocol=4))
    fails("data_batch_3 is no file of CIFAR", "getattr", source=tmp_path)


def test_a_name_that_is_listed_again_and_again_is_decoded_once(tmp_path):
    write_cifar(tmp_path)
    batch = {b"data": PLANES, b"labels": [0, 1, 2], b"filenames": [b"x" * 10**6] * 10**4}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=3))
    assert open_source(tmp_path, split="test").names == ["0", "1", "2"]


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
