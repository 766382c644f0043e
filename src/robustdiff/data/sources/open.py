"""Where images come from: one word or path -> :class:`Source`, whatever lies there.

``celeba_lsun.py``, ``cifar.py`` and ``huggingface.py`` read published formats; ``data/dataset.py`` decodes the items.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from robustdiff.data import decode
from robustdiff.data.decode import Item, Pixels
from robustdiff.data.pixel_values import parse_range
from robustdiff.data.sources import celeba_lsun, folder, labels
from robustdiff.data.sources.base import Rows, Source, eight_bit, numbers, short_reason
from robustdiff.data.sources.cifar import cifar, is_cifar
from robustdiff.data.sources.huggingface import table
from robustdiff.utils.errors import DataError, NoSuchSplit

__all__ = ["DataError", "Item", "Source", "open_source"]

LABEL_KEYS = ("labels", "label", "y")
"""Names under which an ``.npz`` file may hold labels."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
WAYS = "a folder, an .npy, .npz or .parquet file, OWNER/NAME of a data set on the hub, or the word digits"


def open_source(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    value_range: str | None = None,
) -> Source:
    """Find out what ``source`` is, and what images it has; nothing is decoded yet.

    The first that applies:

    1. the word ``digits``: scikit-learn's handwriting (``./digits`` is a folder of that name);
    2. a file: ``.npy`` (mapped from disk), ``.npz`` or ``.parquet``;
    3. a folder with ``dataset_dict.json``, or with ``state.json`` and ``dataset_info.json``: written by the
       ``save_to_disk`` of Hugging Face's ``datasets``;
    4. a folder with ``data.mdb``, or with folders ``*_lmdb`` that hold one: LSUN;
    5. a folder with ``batches.meta`` and a batch: CIFAR-10; with pickles ``meta`` and ``train`` or ``test``:
       CIFAR-100;
    6. a folder ``img_align_celeba``, or one that has it, with ``list_eval_partition.txt`` in, beside or one level
       around ``img_align_celeba``, or in a folder ``Eval`` there: CelebA;
    7. a folder with ``.parquet`` files at any depth: a table (images beside them are an error: either may be meant);
    8. any other folder: images, searched recursively, in the order of the relative paths, hidden files ignored;
    9. text of the form OWNER/NAME, if nothing of that name and no folder OWNER exists: a data set on the hub.

    Args:
        source: Word, path or id.
        split: Name of a split, or ``all``. Default: ``train``, or the only one there is.
        config: Configuration of a table that has several.
        image_column: Column of a table; see :func:`robustdiff.data.sources.huggingface.table`.
        label_column: Column of a table, or of ``metadata.jsonl`` or ``metadata.csv`` in a folder of images.
        value_range: ``LOW:HIGH``, the values of black and white where files can hold larger ones than are used.
            Default: what each file declares.

    Parquet files and data sets from the hub are written out by ``datasets`` to its cache (``HF_DATASETS_CACHE``), or,
    where that cannot be written to, to a temporary folder that is removed when the program ends.

    Raises:
        DataError: In one line, if the source or an option cannot be used. Callers put the source's name before it.
    """
    options = {"split": split, "config": config, "image_column": image_column, "label_column": label_column}
    told = None if value_range is None else parse_range(value_range)
    try:
        return replace(_open(source, options), value_range=told)
    except PermissionError:
        raise DataError("no permission to read it") from None


def _open(source: str | Path, options: dict[str, str | None]) -> Source:
    if source == "digits":
        _unused("the built-in digits", options)
        return _digits()
    path = Path(source).expanduser()
    split, columns = options["split"], {k: v for k, v in options.items() if k != "split"}
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or all(
            (path / name).is_file() for name in ("state.json", "dataset_info.json")
        ):
            return _table(path, options)
        if databases := celeba_lsun.lsun_parts(path):
            _unused("LSUN", columns)
            return celeba_lsun.lsun(databases, split)
        if is_cifar(path):
            _unused("a folder of CIFAR batches", columns)
            return cifar(path, split)
        if parts := celeba_lsun.celeba_parts(path):
            _unused("CelebA", columns)
            return celeba_lsun.celeba(*parts, split)
        return _folder(path, options)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in (".npy", ".npz"):
        _unused(f"an {suffix} file", options)
        return _npy(path) if suffix == ".npy" else _npz(path)
    if path.is_file() and suffix == ".parquet":
        return _table(path, options)
    if os.path.exists(path):
        raise DataError("neither a folder nor an .npy, .npz or .parquet file; for an image, give the folder it is in")
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not os.path.exists(source.partition("/")[0]):
        return _table(source, options)
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f" (did you mean {path.parent / near[0]}?)" if near else ""
    raise DataError(f"no such file or folder{hint}; give {WAYS}")


def _unused(what: str, options: dict[str, str | None]) -> None:
    for name, value in options.items():
        if value is not None:
            kind = NoSuchSplit if name == "split" else DataError
            raise kind(f"{what} cannot use `{name}` {value}: leave it out")


def _table(source: str | Path, options: dict[str, str | None]) -> Source:
    return table(source, **options)


# -- a folder ----------------------------------------------------------------------------------------


def _folder(path: Path, options: dict[str, str | None]) -> Source:
    found = folder.scan(path)
    images = [name for name in found.names if decode.is_image_name(name)]
    if images:
        found.take_metadata_tables()
    tables = [name for name in found.names if name.lower().endswith(".parquet")]
    if tables:
        if not images:
            return _table(path, options)
        raise DataError(
            f"holds both tables ({tables[0]}) and images ({images[0]}): give a folder that holds only one kind, or the "
            ".parquet file itself"
        )
    _unused("a folder of images", {name: value for name, value in options.items() if name != "label_column"})
    return folder.images(path, found, options["label_column"])


# -- arrays ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MappedRows:
    """Reads an array mapped from an ``.npy`` file; pickled as the path alone."""

    path: Path
    array: NDArray[Any]

    def __call__(self, index: int) -> Pixels:
        """One image (H, W, C)."""
        return eight_bit(self.array[index])

    def __reduce__(self) -> tuple[Any, ...]:
        """Map the file again where it is unpickled."""
        return _mapped_rows, (self.path,)


def _mapped_rows(path: Path) -> MappedRows:
    with path.open("rb") as file:  # numpy's own arithmetic on absurd shapes overflows
        shape, dtype, size = _header(file, path.stat().st_size)
    _channels_last(np.broadcast_to(np.zeros((), dtype), shape))
    if math.prod(shape) > size:  # of a byte each
        raise ValueError("cut off")
    return MappedRows(path, _channels_last(np.load(path, mmap_mode="r", allow_pickle=False)))


def _npy(path: Path) -> Source:
    try:
        rows = _mapped_rows(path)
    except (DataError, MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files raise many types
        raise _unreadable(error) from None
    why = "an .npy file has no room for them: save an .npz file with the arrays images and labels"
    return Source("array", numbers(len(rows.array)), rows, unlabelled=why)


def _npz(path: Path) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            headers = {name.removesuffix(".npy"): _member_header(archive, name) for name in members}
            key, label_key = _keys(headers)
            shape, dtype, _ = headers[key]
            _channels_last(np.broadcast_to(np.zeros((), dtype), shape))  # refused before anything is read
            _check_size(key, *headers[key])
            array = _channels_last(_read(archive, key))
            told = None
            if label_key is not None and not headers[label_key][1].hasobject:
                _check_size(label_key, *headers[label_key])
                told = _read(archive, label_key)
    except (DataError, MemoryError, PermissionError):
        raise
    except Exception as error:  # damaged files raise many types
        raise _unreadable(error) from None
    if told is not None:
        classes, places, why = labels.from_array(told, f"array {label_key}")
    else:
        others = {name: header for name, header in headers.items() if name != key}
        classes, places, why = (), None, _no_label_array(others, shape[0])
    return Source("array", numbers(len(array)), Rows(array), classes=classes, labels=places, unlabelled=why)


def _no_label_array(others: dict[str, Header], count: int) -> str:
    named = next((name for name in others if name in LABEL_KEYS), None)
    if named and others[named][1].hasobject:
        return f"array {named} holds Python objects, which are not opened: save {named}.astype(str)"
    shape = f"array {named} has shape {others[named][0]} and type {others[named][1]}; " if named else ""
    return f"{shape}add an array labels of {count} whole numbers or texts, or of one row for each image (one-hot)"


Header = tuple[tuple[int, ...], np.dtype[Any], int]
"""Shape, dtype, and bytes that the archive says are there after the header."""


def _member_header(archive: zipfile.ZipFile, name: str) -> Header:
    with archive.open(name) as file:
        return _header(file, archive.getinfo(name).file_size)


def _header(file: IO[bytes], size: int) -> Header:
    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"array format {version}")
    shape, _, dtype = readers[version](file)
    return shape, dtype, size - file.tell()


def _keys(headers: dict[str, Header]) -> tuple[str, str | None]:
    """Names of the images and of the labels.

    Raises:
        DataError: Unless one array is named images, or stands alone but for its labels.
    """
    for key in ["images"] if "images" in headers else headers:
        shape, _, _ = headers[key]
        others = {name: header for name, header in headers.items() if name != key}
        named = [
            name
            for name, (other, dtype, _) in others.items()
            if name in LABEL_KEYS and labels.may_be(other, dtype, shape)
        ]
        if key == "images" or not others or (len(shape) >= 3 and list(others) == named and len(named) == 1):
            return key, named[0] if len(named) == 1 else None
    raise DataError(f"needs an array named images, or a single array; it has {', '.join(headers) or 'none'}")


def _check_size(key: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> None:
    import psutil  # accelerate needs it too

    claimed = math.prod(shape) * dtype.itemsize
    if claimed > psutil.virtual_memory().total:
        raise DataError(f"array {key} claims {claimed / 2**30:.0f} GiB, more than the memory of this machine")
    if claimed != size:
        raise ValueError(f"array {key} of shape {shape} does not have its {claimed} bytes")


def _read(archive: zipfile.ZipFile, key: str) -> NDArray[Any]:
    with archive.open(f"{key}.npy") as file:
        member: IO[bytes] = file
        return np.asarray(npy.read_array(member, allow_pickle=False))


def _unreadable(error: Exception) -> DataError:
    return DataError(f"cannot be read as an array ({short_reason(error)}); save uint8 images with numpy.save")


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(np.asarray(digits.images) * (255 / 16)).astype(np.uint8)[..., None]
    classes = tuple(map(str, range(10)))
    return Source("digits", numbers(len(images)), Rows(images), classes=classes, labels=digits.target.tolist())


def _channels_last(array: NDArray[Any]) -> NDArray[Any]:
    """View of shape (N, H, W, C).

    Raises:
        DataError: If it is neither uint8 nor bool, is empty, or its axes cannot be told apart.
    """
    if array.dtype.hasobject:
        raise ValueError("Python objects, which could run code")
    if array.dtype not in (np.uint8, np.bool_):
        how = "x.astype(numpy.uint8) if the values are whole numbers in 0..255"
        if np.issubdtype(array.dtype, np.floating):
            how = "numpy.uint8(numpy.round(s)) with s = 127.5 * (x + 1) for x in [-1, 1], 255 * x for x in [0, 1]"
        raise DataError(f"holds {array.dtype}, needs uint8; convert it with {how}")
    if array.size == 0:
        raise DataError(f"holds no image, its shape is {array.shape}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):  # else it may as well be one image (H, W, C)
        return array[..., None]
    if array.ndim == 4:
        last, first = array.shape[3] in (1, 3), array.shape[1] in (1, 3)
        if last != first:
            return array if last else array.transpose(0, 2, 3, 1)
    layouts = "(N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3"
    raise DataError(f"shape {array.shape} is ambiguous or unknown; needs {layouts}")
