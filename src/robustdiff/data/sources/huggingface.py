"""Tables of encoded images in Hugging Face's formats: parquet, ``save_to_disk``, the hub.

``base.py`` defines what a source is, ``open.py`` decides when this reader is called.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from robustdiff.data.decode import Item
from robustdiff.data.sources import labels
from robustdiff.data.sources.base import (
    Source,
    choose_splits,
    listed,
    missing,
    numbers,
    short_reason,
)
from robustdiff.utils.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

MAX_SPLITS = 100
"""Of a saved data set; ``datasets`` opens them all."""


def table(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """A table of encoded images, read through Hugging Face's ``datasets``, which maps its rows from disk.

    Args:
        source: A Path: a ``.parquet`` file, a folder of them (splits follow from their names) or a folder written by
            ``save_to_disk``. Text: an id ``owner/name`` on the hub.
        split: Which split. Default: see :func:`choose_splits`.
        config: Which configuration of the data set.
        image_column: Default: the only column of images; if none is declared, the only one of bytes.
        label_column: Default: the only column of class labels; if none is declared, the only one of
            :data:`labels.LABEL_COLUMNS` that holds whole numbers or text. Labels with a gap (-1 or null) count as none.

    Parquet files are first written out as Arrow files to the cache of ``datasets`` (``HF_DATASETS_CACHE``), or, if that
    cannot be written to, to a temporary folder that is removed when the program ends.

    Raises:
        DataError: In one line, if the table or an option cannot be used.
    """
    try:
        import datasets
    except ImportError:
        raise missing("datasets") from None
    saved = isinstance(source, Path) and ((source / "state.json").exists() or (source / "dataset_dict.json").exists())
    if config is not None and (saved or (isinstance(source, Path) and source.is_file())):
        raise DataError("this data set has no configurations: leave `config` out")
    try:
        with _quiet(datasets):
            data = _load(datasets, source, saved, config)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # pyarrow, datasets, the hub: each has types of its own
        if isinstance(source, Path):
            hint = "is a file damaged, or `config` missing or wrong?"
        else:
            hint = "check the id, the network, and `config` if it has several configurations"
        raise DataError(f"cannot be read as a data set ({short_reason(error)}); {hint}") from None
    if isinstance(data, dict):
        chosen = choose_splits(list(data), split)
        suffix = f", {split or ''.join(chosen)}"
        parts = [data[name] for name in chosen]
    else:
        chosen = choose_splits([str(data.split)] if saved and data.split else [], split)
        suffix, parts = "", [data]
    try:
        rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except ValueError:
        raise DataError(f"the splits {listed(chosen)} have different columns: choose one with `split`") from None
    if len(rows) == 0:
        raise DataError("the table is empty")
    column = _image_column(datasets, rows, image_column)
    classes, places, why = _labels(datasets, rows, label_column)
    roots: tuple[Path, ...]
    if isinstance(source, Path):
        roots = (source if source.is_dir() else source.parent,)
        what = "saved data set" if saved else "parquet table"
    else:
        import huggingface_hub.constants as hub

        roots = (Path(hub.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE))
        what = "data set from the hub"
    images = rows.select_columns([column]).with_format(None)
    if isinstance(images.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    read = TableRows(images, column, roots)
    return Source(what + suffix, numbers(len(rows)), read, classes=classes, labels=places, unlabelled=why)


@dataclass(frozen=True, eq=False)
class TableRows:
    """Reads the encoded images of one column; a row may name a file, but only one inside ``roots``."""

    rows: Dataset
    column: str
    roots: tuple[Path, ...]

    def __call__(self, index: int) -> Item:
        """The bytes of one image, or its path.

        Raises:
            OSError: If the row holds neither.
        """
        value: Any = self.rows[index][self.column]
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return bytes(data)
        if not path:
            raise OSError("the row holds no image")
        for root in map(Path.resolve, self.roots):
            file: Path = (root / path).resolve()
            if file.is_relative_to(root) and file.is_file():
                return file
        raise OSError("the row holds no image, only a path outside the data set")


def _load(datasets: ModuleType, source: str | Path, saved: bool, config: str | None) -> Dataset | DatasetDict:
    if saved:
        index = Path(source) / "dataset_dict.json"
        if index.is_file() and len(json.loads(index.read_bytes())["splits"]) > MAX_SPLITS:
            raise ValueError(f"dataset_dict.json lists more than {MAX_SPLITS} splits")
        data = datasets.load_from_disk(str(source))
        for part in data.values() if isinstance(data, dict) else [data]:
            part.data.validate(full=True)  # Arrow trusts mapped files: a damaged offset would end the process later
        return data
    cache = _cache(datasets)
    if isinstance(source, str):
        return datasets.load_dataset(source, config, cache_dir=cache)
    if source.is_file():
        # A path may look like a pattern: it is escaped as fsspec's glob wants it.
        file = re.sub(r"([*?\[])", r"[\1]", os.path.abspath(source))
        return datasets.load_dataset("parquet", data_files={"train": file}, cache_dir=cache)["train"]
    return datasets.load_dataset(
        os.path.abspath(source), config, cache_dir=cache, verification_mode="no_checks"
    )  # unchecked: some shards of a data set are a data set


def _cache(datasets: ModuleType) -> str | None:
    """None for the library's own cache, or a temporary folder if nothing can be written there."""
    try:
        os.makedirs(datasets.config.HF_DATASETS_CACHE, exist_ok=True)
        with tempfile.TemporaryFile(dir=datasets.config.HF_DATASETS_CACHE):
            return None
    except OSError:
        folder, owner = tempfile.mkdtemp(prefix="robustdiff-"), os.getpid()

        def remove() -> None:
            if os.getpid() == owner:  # a forked child must not take it away
                shutil.rmtree(folder, ignore_errors=True)

        atexit.register(remove)
        return folder


@contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """No progress bar and no log line: what goes wrong is told in the exception."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else a server is told of files on the disk too
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if not bars:
            datasets.enable_progress_bars()


def _is_bytes(datasets: ModuleType, feature: object) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _is_bytes(datasets, feature["bytes"])
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "binary_view")


def _image_column(datasets: ModuleType, rows: Dataset, asked: str | None) -> str:
    features = rows.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    usable = images + [name for name, feature in features.items() if _is_bytes(datasets, feature)]
    if asked is not None:
        if asked in usable:
            return asked
        raise DataError(f"`image_column` {asked}: no such column of images; there is {listed(usable)}")
    candidates: list[str] = images or usable
    if not candidates:
        raise DataError(f"no column holds images or bytes; the columns are {listed(list(features))}")
    if len(candidates) > 1:
        raise DataError(f"several columns hold images: choose one of {listed(candidates)} with `image_column`")
    return candidates[0]


def _labels(datasets: ModuleType, rows: Dataset, asked: str | None) -> labels.Labels:
    """Names of the classes, each row's place among them; or why there are none."""
    features = rows.features
    declared = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    simple = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value)
        and re.fullmatch(r"u?int\d+|float\d+|bool|(large_)?string", feature.dtype)
    ]
    if asked is not None and asked not in declared + simple:
        raise DataError(f"`label_column` {asked}: no such column of labels; there is {listed(declared + simple)}")
    candidates = [asked] if asked else declared or [name for name in simple if name.lower() in labels.LABEL_COLUMNS]
    if len(candidates) != 1:
        several = f"columns {listed(candidates)} may hold them" if candidates else "no column is declared or called so"
        return (), None, f"{several}: name one with `label_column`; there is {listed(declared + simple)}"
    column, feature = candidates[0], features[candidates[0]]
    values = rows.select_columns([column]).with_format(None)[:][column]
    classes, places, why = labels.from_values(values, f"column {column}")
    if why and asked:
        raise DataError(f"`label_column` {asked}: {why}")
    if places is None:
        return (), None, why
    gaps = [number for number, place in enumerate(places) if place is None]
    if gaps:
        why = f"{len(gaps)} of {len(values)} rows have no label (the first is row {gaps[0]}, counted from 0)"
        if asked:
            raise DataError(f"`label_column` {asked}: {why}")
        return (), None, f"column {column}: {why}: fill them in, or leave these rows out"
    if not isinstance(feature, datasets.ClassLabel):
        return classes, places, ""
    if not 0 <= min(values) <= max(values) < len(feature.names):
        raise DataError(f"column {column} has labels outside its {len(feature.names)} classes")
    return tuple(feature.names), values, ""
