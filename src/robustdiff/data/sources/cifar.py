"""CIFAR-10 and CIFAR-100 as published for Python: pickles, of which only the plain data are taken.

Reading order: ``formats.py`` defines what a source is, ``sources.py`` decides when this reader is called.
"""

from __future__ import annotations

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


@dataclass(eq=False)
class _Call:
    """What a pickle names or asks to be called: kept, never done."""

    name: str
    args: Any = None
    state: Any = None


def inert(data: bytes) -> Inert:
    """The plain data of a pickle of protocol 2 to 5; what it names is not imported, what it calls is not called.

    Raises:
        Exception: Of any type, on a damaged file or an instruction that plain data have no need of.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    left = len(data)  # characters to encode: a file that has one text encoded again and again could fill the memory

    def pop(start: int) -> list[Any]:
        taken = stack[start:]
        del stack[start:]
        return taken

    def top(kind: type) -> Inert:
        if not isinstance(stack[-1], kind):
            raise ValueError("damaged")
        return stack[-1]

    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(arg)
            case "BINSTRING" | "SHORT_BINSTRING":  # Python 2's str
                stack.append(arg.encode("latin-1"))
            case "BYTEARRAY8":
                stack.append(bytes(arg))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(-int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(pop(marks.pop())))
            case "APPEND" | "APPENDS":
                values = pop(-1 if opcode.name == "APPEND" else marks.pop())
                top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                pairs = pop(-2 if opcode.name == "SETITEM" else marks.pop())
                if any(isinstance(key, tuple) for key in pairs[::2]):  # hashing nested ones could take for ever
                    raise ValueError("damaged")
                top(dict).update(zip(pairs[::2], pairs[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if arg is None else arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_Call(arg))
            case "STACK_GLOBAL":
                stack.append(_Call(" ".join(pop(-2))))
            case "REDUCE":
                args = pop(-1)[0]
                function = top(_Call).name
                if function == "_codecs encode":  # how protocol 2 writes bytes
                    left -= len(args[0])
                    if left < 0:
                        raise ValueError("damaged")
                    stack[-1] = args[0].encode("latin-1")
                else:
                    stack[-1] = _Call(function, args)
            case "BUILD":
                state = pop(-1)[0]
                top(_Call).state = state
            case "STOP":
                return stack[-1]
            case other:
                raise ValueError(f"instruction {other}, which plain data do not need")
    raise ValueError("damaged")  # not reached: genops itself insists on STOP


def _array(value: Inert) -> Pixels:
    """The uint8 array (N, 3072) that inert calls of numpy describe."""
    if value.name.endswith(" _frombuffer"):
        data, dtype, shape, order = value.args
        fortran = order != "C"
    else:
        _, shape, dtype, fortran, data = value.state
    if dtype.name != "numpy dtype" or dtype.args[0] not in ("u1", b"u1") or fortran or shape[1:] != (3072,):
        raise ValueError("needs rows of 3072 uint8 in C order")
    return np.frombuffer(data, np.uint8).reshape(shape)


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
            content = {k.decode("latin-1") if isinstance(k, bytes) else k: value for k, value in content.items()}
            return [content[key] for key in keys[:2]] + [content.get(key) for key in keys[2:]]
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # damaged files raise many types
            raise DataError(f"{name} is no file of CIFAR ({type(error).__name__}: {short_reason(error)})") from None

    def texts(values: Inert) -> list[str]:
        """What is no text becomes empty, which is no name: printing nested values could take for ever."""
        values = values if isinstance(values, list) else []
        values = [value.decode("latin-1") if isinstance(value, bytes) else value for value in values]
        return [value if isinstance(value, str) else "" for value in values]

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
