"""Images in a folder: which files count, and what class they are of.

The classes are the folders of the first level, or what ``metadata.jsonl``, ``.csv`` or ``.parquet`` say, as
``datasets`` reads them: a row per image, with its ``file_name`` relative to the metadata file.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from robustdiff.data.sources import labels
from robustdiff.data.sources.base import Files, Source, listed, missing, short_reason
from robustdiff.utils.errors import DataError, RobustdiffWarning

SIDE_CARS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".xml", ".yaml", ".yml", ".html", ".db", ".ini")
"""Suffixes of files that commonly lie beside images; they are counted, neither opened nor named."""
METADATA, METADATA_TABLE = ("metadata.jsonl", "metadata.csv"), "metadata.parquet"
SYSTEM = re.compile(
    r"@eaDir|@tmp|@sharebin|@SynoResource|@__thumb|@Recycle|@Recently-Snapshot|#recycle|#snapshot|\$RECYCLE\.BIN|"
    r"RECYCLER|RECYCLED|FOUND\.\d{3}|System Volume Information|Network Trash Folder|Temporary Items|"
    r"TheVolumeSettingsFolder|lost\+found|__MACOSX|__pycache__|_gsdata_",
    re.IGNORECASE,
)
"""Folders that operating systems, network disks and archives put everywhere; what is in them is nobody's image."""
DELIMITERS = ",;\t|"
"""What may stand between the columns of a CSV file; if none of these does, spaces do."""
WHOLE = re.compile(r"\s*(0|[+-]?[1-9]\d*)\s*")
"""A number in the only way that numbers are written: 00 and 01 are names."""
SAMPLE = re.compile(r"\d{6,}\.png")
"""Names that `robustdiff sample` gives to images."""
NO_CLASSES = (
    "sort its images into one folder per class, or name the class of each in metadata.csv, columns file_name and label "
    "(another column with `label_column`)"
)


@dataclass(frozen=True)
class Found:
    """What is in a folder; all names are relative POSIX paths.

    Attributes:
        names: Of the files to try, sorted.
        skipped: (name, reason) of what is skipped at sight.
        metadata: Of files that say something of the images.
        notes: Counts of what was ignored.
        links: Folders of the first level that are not read, as links to folders that are: (name, that folder).
    """

    names: list[str]
    skipped: list[tuple[str, str]]
    metadata: list[str]
    notes: dict[str, int] = field(default_factory=dict)
    links: list[tuple[str, str]] = field(default_factory=list)

    def take_metadata_tables(self) -> None:
        """Parquet files of that name are metadata beside images, and the images themselves elsewhere."""
        tables = [name for name in self.names if PurePosixPath(name).name == METADATA_TABLE]
        self.metadata.extend(tables)
        self.names[:] = [name for name in self.names if name not in tables]


def images(folder: Path, found: Found, label_column: str | None) -> Source:
    """The images of a folder.

    Args:
        folder: Where they are.
        found: What :func:`scan` said.
        label_column: Column of the metadata that holds the labels. Default: the only one of
            :data:`labels.LABEL_COLUMNS`; the folders of the first level if there is none.

    Raises:
        DataError: If there is no such column.
    """
    names, notes = list(found.names), dict(found.notes)
    if "grid.png" in names and len(names) > 1 and all(SAMPLE.fullmatch(name) for name in names if name != "grid.png"):
        names.remove("grid.png")  # `robustdiff sample` writes it beside the images
        notes["grid.png ignored (an overview of the samples)"] = 1
    classes, places, why = _told(folder, found.metadata, names, label_column, notes)
    if places is None:
        for link, where in found.links:
            text = f"{folder}: {link} is a link to {where}, whose images are read once: there is no class {link}"
            warnings.warn(RobustdiffWarning(text), stacklevel=6)
    files = Files(folder, names)
    return Source("folder", names, files, found.skipped, classes, places, notes=notes, unlabelled=why)


# -- which files -------------------------------------------------------------------------------------


def scan(folder: Path) -> Found:
    """Look through a folder; hidden files and the folders of systems are ignored.

    Links are followed, but a folder inside is read only where it is: a link to it is skipped. A folder elsewhere is
    read once for each first-level folder that links to it.

    Raises:
        DataError: If the folder is empty; PermissionError if it cannot be listed.
    """
    found = Found([], [], [])
    ignored: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    root = os.path.realpath(folder)

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        name = Path(error.filename).relative_to(folder).as_posix()
        found.skipped.append((name, f"folder not read: {error.strerror}"))

    for directory, subfolders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        here = Path(directory).relative_to(folder)
        place = (here.parts[0] if here.parts else "", os.path.realpath(directory))
        own = _own_place(root, place[1])
        if place in seen or own not in (None, here):
            above = os.path.realpath(Path(directory).parent)
            if os.path.commonpath((above, place[1])) != place[1]:  # a link back up has nothing of its own
                where = own.as_posix() if own is not None and own != here else "a folder"
                found.skipped.append((here.as_posix(), f"a link to {where}, which is read as itself"))
                if len(here.parts) == 1:
                    found.links.append((here.as_posix(), where))
            subfolders.clear()
            continue
        seen.add(place)
        system = [name for name in subfolders if SYSTEM.fullmatch(name)]
        if system:
            ignored["system folders ignored"] += len(system)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in system)
        for path in (Path(directory, file) for file in files if not file.startswith(".")):
            name = path.relative_to(folder).as_posix()
            if path.suffix.lower() in SIDE_CARS:
                ignored["side-car files ignored (not images)"] += 1
                if path.name in METADATA:
                    found.metadata.append(name)
            elif path.is_file():
                found.names.append(name)
            else:  # opening a pipe would wait for ever
                reason = "broken symbolic link" if path.is_symlink() else "not a regular file"
                found.skipped.append((name, reason))
    if not (found.names or found.skipped or ignored):
        raise DataError("the folder is empty (hidden files are ignored)")
    found.names.sort()
    found.notes.update(ignored)
    return found


def _own_place(root: str, real: str) -> Path | None:
    """Where a folder stands inside another one, if it is looked at there."""
    inside = Path(os.path.relpath(real, root)) if os.path.commonpath((root, real)) == root else None
    hidden = inside is not None and any(part.startswith(".") or SYSTEM.fullmatch(part) for part in inside.parts)
    return None if hidden else inside


# -- which class -------------------------------------------------------------------------------------


def first_level(names: Sequence[str], others: Sequence[str]) -> labels.Labels:
    """Labels by the folders of the first level.

    Args:
        names: Of all images.
        others: Of images that cannot be read: a class that has no others keeps its number.
    """
    stray = next((name for name in names if "/" not in name), None)
    if stray is not None:
        inside = any("/" in name for name in names)
        return (
            (),
            None,
            f"{stray} lies beside the folders of the classes: move it into one of them, or away"
            if inside
            else NO_CLASSES,
        )
    classes = tuple(sorted({name.partition("/")[0] for name in (*names, *others) if "/" in name}))
    number = {name: place for place, name in enumerate(classes)}
    return classes, [number[name.partition("/")[0]] for name in names], ""


def _told(
    folder: Path, files: Sequence[str], names: Sequence[str], asked: str | None, notes: dict[str, int]
) -> labels.Labels:
    """Labels by what metadata files say of the images; of those that they leave out, by folders if there are several.

    Args:
        folder: Where everything is.
        files: The metadata files.
        names: Of the images.
        asked: The column of labels.
        notes: Takes how many labels are those of folders.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    why = ""
    for file in files:
        try:
            for row in _rows(folder / file):
                if isinstance(name := row.get("file_name"), str):
                    rows[(PurePosixPath(file).parent / name).as_posix()] = row
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            why = f"{file} cannot be read as a table ({short_reason(error)})"
    columns = list(dict.fromkeys(column for row in rows.values() for column in row if column != "file_name"))
    column = asked or labels.label_column(columns)
    if asked is not None and asked not in columns:
        where = why or "there is no metadata with file_name"
        if rows:
            where = f"the columns of {files[0]} are {listed(columns)}"
        raise DataError(f"`label_column` {asked}: no such column; {where}. Else {NO_CLASSES}")
    if column is None:
        if columns:
            why = f"{files[0]} has the columns {listed(columns)}: name that of the labels with `label_column`"
        return (), None, why
    values = [rows[name].get(column) if name in rows else None for name in names]
    if all(isinstance(value, str) and WHOLE.fullmatch(value) for value in values if value not in ("", None)):
        values = [int(value) if value else None for value in values]  # CSV has no types
    folders = _folders(files, names)
    gaps = [place for place, value in enumerate(values) if value in ("", None) and folders[place]]
    if gaps and len({one for one in folders if one}) > 1:
        for place in gaps:
            values[place] = folders[place]
        notes["labels of folders (metadata has none)"] = len(gaps)
    return labels.from_values(values, f"column {column} of {files[0]}")


def _folders(files: Sequence[str], names: Sequence[str]) -> list[str]:
    """The first folder of each name below that of the metadata that may speak of it; "" if there is none."""
    above = sorted({PurePosixPath(file).parent.parts for file in files} | {()}, key=len, reverse=True)
    parts = [PurePosixPath(name).parts for name in names]
    below = (one[len(next(base for base in above if one[: len(base)] == base)) :] for one in parts)
    return [one[0] if len(one) > 1 else "" for one in below]


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise missing("datasets") from None
        yield from parquet.read_table(path).to_pylist()
        return
    text = _text(path.read_bytes())
    if path.suffix == ".csv":
        head = text.partition("\n")[0]
        between = max(DELIMITERS, key=head.count) if any(one in head for one in DELIMITERS) else " "
        for cells in csv.DictReader(io.StringIO(text, newline=""), delimiter=between, skipinitialspace=True):
            yield {key.strip(): value.strip() for key, value in cells.items() if isinstance(value, str) and key}
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield row


def _text(data: bytes) -> str:
    """Text in the encodings that spreadsheets write: UTF-8 or -16 with a mark, else UTF-8, else that of Windows."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
