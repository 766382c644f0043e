"""CIFAR-10 and CIFAR-100 as published for Python: pickles, of which only the plain data are taken.

``base.py`` defines what a source is, ``open.py`` decides when this reader is called.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robustdiff.data.decode import Pixels
from robustdiff.data.sources.base import (
    PLAIN,
    Rows,
    Source,
    choose_splits,
    numbers,
    short_reason,
)
from robustdiff.utils.errors import DataError

CIFAR10 = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CIFAR100 = {"train": ["train"], "test": ["test"]}
"""Files by split."""
Inert = Any
"""What :func:`inert` makes of a pickle: numbers, text, bytes, lists, dictionaries, tuples and :class:`_Call`."""
_NAMES = {"numpy ndarray", "numpy dtype", "_codecs encode", "__builtin__ bytes"}
_NAMES |= {
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray _reconstruct", "numeric _frombuffer")
}
"""What arrays and bytes are pickled as calls of."""
_PUSH = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "EMPTY_LIST", "EMPTY_DICT", "GLOBAL"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING", "STACK_GLOBAL"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "REDUCE"),
}
"""Instructions that leave something on the stack that is no tuple."""
_KNOWN = _PUSH | {
    *("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "BINGET", "LONG_BINGET", "PROTO", "FRAME", "MARK"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD", "STOP"),
}
"""All that plain data need."""
_MOST_TUPLES = 100
"""That are no arguments of a call; a file of CIFAR has four."""


@dataclass(eq=False)
class _Call:
    """What a pickle names or asks to be called: kept, never done."""

    name: str
    args: Any = None
    state: Any = None

    def __call__(self, *args: Inert) -> Inert:
        return _Call(self.name, args)

    def __setstate__(self, state: Inert) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Imports nothing: every name that it admits stands for a :class:`_Call`."""

    def find_class(self, module: str, name: str, /) -> Inert:
        if f"{module} {name}" not in _NAMES:
            raise pickle.UnpicklingError(f"it names {f'{module}.{name}'!r:.80}, which images have no need of")
        return _Call(f"{module} {name}")


def _check(data: bytes) -> None:
    """Refuse a pickle with other instructions, or that could take time or memory out of proportion to its size.

    Keys are hashed, and the hash of a tuple visits all that is in it: tuples may neither be used twice nor be many.
    """
    again: dict[Any, bool] = {}  # whether what was kept under this number may be used again
    before, tuples = "", 0
    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(again) if arg is None else arg
            if number > len(data):  # the unpickler makes room for as many
                raise ValueError("damaged")
            again[number] = before in _PUSH
            continue
        if name not in _KNOWN:
            raise ValueError(f"instruction {name}, which plain data do not need")
        tuples += name.startswith("TUPLE") - (name == "REDUCE" and before.startswith("TUPLE"))
        if (name.endswith("BINGET") and not again.get(arg)) or tuples > _MOST_TUPLES:
            raise ValueError("damaged")
        before = name


def inert(data: bytes) -> Inert:
    """The plain data of a pickle of protocol 2 to 5; what it names is not imported, what it calls is not called.

    Raises:
        Exception: Of any type, on a damaged file, or one that names or does what plain data have no need of.
    """
    _check(data)
    return _Reader(io.BytesIO(data), encoding="bytes").load()


def _text(value: Inert) -> str:
    """Text, and bytes in either form; what is neither becomes empty: printing nested values could take for ever."""
    if isinstance(value, _Call) and value.name == "_codecs encode" and value.args:  # how protocol 2 writes bytes
        value = value.args[0]
    value = value.decode("latin-1") if isinstance(value, bytes) else value
    return value if isinstance(value, str) else ""


def _array(value: Inert) -> Pixels:
    """The uint8 array (N, 3072) that inert calls of numpy describe."""
    if value.name.endswith(" _frombuffer"):
        data, dtype, shape, order = value.args
        fortran = order != "C"
    else:
        _, shape, dtype, fortran, data = value.state
    if dtype.name != "numpy dtype" or _text(dtype.args[0]) != "u1" or fortran or shape[1:] != (3072,):
        raise ValueError("needs rows of 3072 uint8 in C order")
    content = _text(data).encode("latin-1") if isinstance(data, _Call) else data
    return np.frombuffer(content, np.uint8).reshape(shape)


def cifar(folder: Path, split: str | None) -> Source:
    """CIFAR-10 or CIFAR-100 (fine labels), the "python version", whose files are pickles: see :func:`inert`.

    Raises:
        DataError: In one line, if a file is missing or damaged.

    Source: Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html
    """
    ten = (folder / "batches.meta").exists()
    files = CIFAR10 if ten else CIFAR100
    key, meta = ("labels", ("batches.meta", "label_names")) if ten else ("fine_labels", ("meta", "fine_label_names"))

    def read(name: str, *keys: str) -> list[Any]:
        if not (folder / name).is_file():
            raise DataError(f"the file {name} is missing")
        try:
            content = inert((folder / name).read_bytes())
            content = {_text(name): value for name, value in content.items()}
            return [content[key] for key in keys[:2]] + [content.get(key) for key in keys[2:]]
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # damaged files raise many types
            raise DataError(f"{name} is no file of CIFAR ({type(error).__name__}: {short_reason(error)})") from None

    def texts(values: Inert) -> list[str]:
        values = values if isinstance(values, list) else []
        own = {id(value): value for value in values}  # one that is listed again and again is decoded once
        own = {key: _text(value) for key, value in own.items()}
        return [own[id(value)] for value in values]

    classes = tuple(texts(read(meta[0], meta[1], meta[1])[0]))
    if not all(classes) or not classes:
        raise DataError(f"{meta[0]} does not name the classes")
    arrays: list[Pixels] = []
    labels: list[int] = []
    names: list[str] = []
    for name in (name for part in choose_splits(list(files), split) for name in files[part]):
        data, own_labels, filenames = read(name, "data", key, "filenames")
        try:
            arrays.append(_array(data))
        except Exception as error:
            raise DataError(f"{name} holds no images of CIFAR ({short_reason(error)})") from None
        own_labels = own_labels if isinstance(own_labels, list) else []
        good = all(isinstance(label, int) and 0 <= label < len(classes) for label in own_labels)
        if len(own_labels) != len(arrays[-1]) or not good:
            raise DataError(f"{name} does not give each of its {len(arrays[-1])} images one of {len(classes)} classes")
        labels += own_labels
        names += texts(filenames)
    planes = np.concatenate(arrays).reshape(-1, 3, 32, 32)
    if len(names) != len(labels) or len(set(names)) != len(names) or not all(map(PLAIN.fullmatch, names)):
        names = list(numbers(len(labels)))
    rows = Rows(planes.transpose(0, 2, 3, 1))
    what = f"CIFAR-{10 if ten else 100} batches, {split or 'train'}"
    return Source(what, names, rows, classes=classes, labels=labels)


def is_cifar(folder: Path) -> bool:
    """Whether the folder has the names of CIFAR, and ``meta``, so common a name, also begins like a pickle."""
    batches = [name for names in CIFAR10.values() for name in names]
    if (folder / "batches.meta").is_file():
        return any((folder / name).is_file() for name in batches)
    if not (folder / "meta").is_file() or not any((folder / name).is_file() for name in CIFAR100):
        return False
    with (folder / "meta").open("rb") as file:
        return file.read(1) == b"\x80"
