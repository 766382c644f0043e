"""How a file is damaged: bytes, images, JSON, tensors, array headers, pickles; each from a ``random.Random``."""

import json
import os
import random
import struct
import zlib

import numpy as np

from fuzz_files import PNG, array_file, images

EXTREME = (0, 1, -1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


def damaged(r: random.Random, data: bytes, other: bytes, near: int = 64) -> bytes:
    """One to three changes of bytes; half of them among the first ``near``."""
    content = bytearray(data)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        size = len(content)
        start = r.randrange(min(size, near) if r.random() < 0.5 else size) if size else 0
        end = min(size, start + r.choice((1, 2, 4, 8, 16, 100, 1000)))
        match r.randrange(12):
            case 0 | 1:
                for _ in range(r.choice((1, 1, 2, 8))):
                    if content:
                        place = r.randrange(min(len(content), near) if r.random() < 0.5 else len(content))
                        content[place] ^= 1 << r.randrange(8)
            case 2:
                del content[start:]
            case 3:
                content[start:end] = bytes(end - start)
            case 4:
                content[start:end] = b"\xff" * (end - start)
            case 5:
                content[start:start] = content[start:end] * r.choice((1, 2, 50))
            case 6:
                del content[start:end]
            case 7:
                cut = r.randrange(len(other)) if other else 0
                content[start:] = other[cut:]
            case 8:
                cut = r.randrange(len(other)) if other else 0
                content[start:end] = other[cut : cut + end - start]
            case 9 | 10:
                number, width = r.choice(EXTREME), r.choice((2, 4, 4, 8))
                packed = (number % 2 ** (8 * width)).to_bytes(width, r.choice(("little", "big")))
                content[start : start + width] = packed
            case 11:
                content += r.randbytes(r.choice((1, 20, 3000)))
    return bytes(content)


def mended_png(data: bytes) -> bytes:
    """With right checksums, so that what is behind them is reached."""
    content, place = bytearray(data), 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            break
        struct.pack_into(">I", content, end, zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return bytes(content)


def damaged_image(r: random.Random, name: str) -> bytes:
    data = damaged(r, images()[name], r.choice(list(images().values())))
    return mended_png(data) if data.startswith(b"\x89PNG") and r.random() < 0.8 else data


DEEP, LONG = "@deep@", "@long@"

ODD = (
    *(None, True, False, "", "x", "..", "../../x", "/dev/zero", "a" * 10_000, "\ud800", "\0", "\n\n", "2", "nan"),
    *([], {}, [[]], [1, 2, 3], [0.5], ["x"], [None], {"x": 1}, {"": {}}, DEEP, LONG),
    *(0, 1, -1, 2, 3, 7, 100, 0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
    *(2**31 - 1, 2**32 - 1, 2**63, 10**400),
)


def changed(r: random.Random, value: object) -> object:
    """A JSON value with one node replaced, removed, added or doubled."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        value = dict(value)
        key = r.choice(list(value))
        match r.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[r.choice(("x", "", "../x", "step", "num_class_embeds", "a" * 1000, "\n"))] = r.choice(ODD)
            case 2:
                value[f"{key}x"] = value.pop(key)
            case _:
                value[key] = changed(r, value[key])
        return value
    if isinstance(value, list) and value and r.random() < 0.7:
        value = list(value)
        place = r.randrange(len(value))
        match r.randrange(4):
            case 0:
                del value[place]
            case 1:
                value.insert(place, r.choice(ODD))
            case 2:
                value = value * r.choice((2, 1000))
            case _:
                value[place] = changed(r, value[place])
        return value
    return r.choice(ODD)


def json_text(value: object) -> bytes:
    text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{LONG}"', "9" * 5000).encode()


def damaged_json(r: random.Random, data: bytes) -> bytes:
    if r.random() < 0.2:
        return damaged(r, data, PNG, near=len(data))
    value = json.loads(data)
    for _ in range(r.choice((1, 1, 2, 4))):
        value = changed(r, value)
    return json_text(value)


def damaged_tensors(r: random.Random, data: bytes) -> bytes:
    """A safetensors file: its header, a JSON object behind its length, or any byte."""
    if r.random() < 0.4:
        return damaged(r, data, PNG, near=300)
    length = struct.unpack("<Q", data[:8])[0]
    header = damaged_json(r, data[8 : 8 + length])
    return struct.pack("<Q", r.choice((len(header), len(header), len(header), length))) + header + data[8 + length :]


def damaged_file(r: random.Random, name: str, data: bytes) -> bytes:
    if name.endswith(".json"):
        return damaged_json(r, data)
    if name.endswith(".jsonl"):
        lines = data.splitlines(keepends=True)
        place = r.randrange(len(lines))
        lines[place] = damaged_json(r, lines[place]) + r.choice((b"\n", b"\r\n", b"", b"\n\n"))
        return b"".join(lines)
    if name.endswith(".safetensors"):
        return damaged_tensors(r, data)
    return damaged(r, data, PNG)


class Trap:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("caught",)


SHAPES = (
    *((), (0,), (0, 8, 8, 3), (2**31,), (2**40, 2, 2, 3), (2**62, 4), (2**63, 1), (-1, 8, 8), (3, 8, 8, -3)),
    *((1,) * 40, (2, 8, 8), (2, 8, 8, 3), (3, 3, 3, 3), (10**18, 10**18), (1, 2**31 - 1, 1, 3)),
)

TYPES = ("|u1", "|O", "<f8", ">u2", "|S5", "<U3", "|V16", "<M8[ns]", "|b1", "<c16", "<f2", "<i8", "|S0", "|V0")


def array_with(r: random.Random, count: int = 4096) -> bytes:
    """An array file whose header may claim anything."""
    match r.randrange(6):
        case 0:
            return array_file(np.array([Trap(), {}], dtype=object), allow_pickle=True)
        case 1:
            values = np.zeros(r.choice(((2, 8, 8), (2, 8, 8, 3), (2,), (), (2, 8))), np.dtype(r.choice(TYPES)))
            return array_file(values, allow_pickle=True)
        case 2:
            descr: object = [("a", "|u1"), ("b", r.choice(TYPES))]
        case _:
            descr = r.choice(TYPES)
    header = repr({"descr": descr, "fortran_order": r.random() < 0.3, "shape": r.choice(SHAPES)})
    if r.random() < 0.2:
        header = r.choice(
            ("", "{", "{}", "[" * 9000, "__import__('os').mkdir('caught')", header * 2, "{**{}}", "'" * 99)
        )
    version = r.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    packed = header.encode()
    length = struct.pack("<H", len(packed) % 2**16) if version[0] == 1 else struct.pack("<I", len(packed))
    return b"\x93NUMPY" + bytes(version) + length + packed + bytes(count)
