"""What a source of images is, and CelebA and LSUN as they are published.

``cifar.py`` and ``huggingface.py`` read more formats, ``open.py`` decides who reads a path.
"""

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robustdiff.data.sources.base import (
    PARTITION,
    PLAIN,
    Files,
    Source,
    by_name,
    choose_splits,
    missing,
    short_reason,
)
from robustdiff.utils.errors import DataError

if TYPE_CHECKING:
    from lmdb import Environment


# -- CelebA ------------------------------------------------------------------------------------------


def celeba_parts(folder: Path) -> tuple[Path, Path] | None:
    """The folder of aligned images and the list of splits, if ``folder`` is CelebA or its ``img_align_celeba``."""
    folder = Path(os.path.abspath(folder))
    images = folder if folder.name == "img_align_celeba" else folder / "img_align_celeba"
    if not images.is_dir() and (folder / "Img" / "img_align_celeba").is_dir():  # as in the published archive
        images = folder / "Img" / "img_align_celeba"
    places = (images, images.parent, images.parent.parent, images.parent / "Eval", images.parent.parent / "Eval")
    lists = [place / PARTITION for place in places if (place / PARTITION).is_file()]
    return (images, lists[0]) if images.is_dir() and lists else None


def celeba(images: Path, partition: Path, split: str | None) -> Source:
    """CelebA, aligned and cropped (218 x 178), of which the field uses the centre 140 x 140.

    Source: Liu et al. (2015), https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html; crop: Song & Ermon (2019), Song et al.
    (2021).
    """
    splits = ("train", "valid", "test")
    wanted = choose_splits(splits, split)
    with os.scandir(images) as entries:
        there = {entry.name for entry in entries if entry.is_file()}
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    try:
        lines = partition.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{PARTITION} is no text file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, part = line.strip().rpartition(" ")
        if part not in ("0", "1", "2") or not PLAIN.fullmatch(name.strip()):
            raise DataError(f"line {number} of {PARTITION} is not a file name and 0, 1 or 2")
        if splits[int(part)] not in wanted:
            continue
        if name.strip() in there:
            names.append(name.strip())
        else:
            skipped.append((name.strip(), f"listed in {PARTITION} but missing"))
    if not names:
        raise DataError(f"none of the images that {PARTITION} lists for this split is in the folder {images.name}")
    return Source(f"CelebA, {split or 'train'}", names, Files(images, names), skipped, crop=140)


# -- LSUN --------------------------------------------------------------------------------------------

_environments: dict[str, Environment] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    """LMDB must not go on in a forked child: close what the parent opened, and open anew when asked."""
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    for environment in _environments.values():
        environment.close()
    _environments.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _environment(folder: str) -> Environment:
    """The open database; opened once per process, as LMDB demands."""
    import lmdb

    with _lock:
        if folder not in _environments:
            opened = lmdb.open(folder, readonly=True, lock=False, readahead=False, create=False)
            needed = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
            if needed > os.path.getsize(os.path.join(folder, "data.mdb")):  # reading on would kill the process
                opened.close()
                raise OSError("cut off")
            _environments[folder] = opened
        return _environments[folder]


@dataclass(frozen=True, eq=False)
class LmdbValues:
    """Reads values of several LMDB databases, one after the other; ``ends``: number of keys up to each one's last."""

    folders: tuple[str, ...]
    ends: tuple[int, ...]
    keys: Sequence[bytes]

    def __call__(self, index: int) -> bytes:
        """One encoded image."""
        with _environment(self.folders[bisect_right(self.ends, index)]).begin() as transaction:
            value = transaction.get(self.keys[index])
        if value is None:
            raise OSError("no longer in the database")
        return bytes(value)


def lsun_parts(folder: Path) -> list[Path]:
    """The folder itself if it is an LMDB database, else those named ``*_lmdb`` in it that are."""
    if (folder / "data.mdb").is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob("*_lmdb/data.mdb") if path.is_file())


def lsun(databases: Sequence[Path], split: str | None) -> Source:
    """LSUN: folders ``CATEGORY_SPLIT_lmdb`` (a name without split counts as train); several categories are classes.

    Raises:
        DataError: In one line, if ``lmdb`` is not installed, or a database or the split cannot be used.

    Source: Yu et al. (2015), https://github.com/fyu/lsun
    """
    try:
        import lmdb
    except ImportError:
        raise missing("lmdb") from None
    folders = [os.path.realpath(path) for path in databases]
    parts = [re.fullmatch(r"(?:(.+?)_)??(?:(train|val|test)_)?lmdb", Path(path).name) for path in folders]
    split_of = [(part and part[2]) or "train" for part in parts]
    splits = [name for name in ("train", "val", "test") if name in split_of]
    chosen = choose_splits(splits, split)
    keys: list[bytes] = []
    names: list[str] = []
    categories: list[str] = []
    ends: list[int] = []
    used = [number for number, name in enumerate(split_of) if name in chosen]
    for number in used:
        folder, part = folders[number], parts[number]
        try:
            with _environment(folder).begin() as transaction:
                own = [bytes(key) for key in transaction.cursor().iternext(keys=True, values=False)]
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{Path(folder).name} cannot be read as an LMDB database ({short_reason(error)})") from None
        prefix = f"{Path(folder).name}/" if len(used) > 1 else ""
        texts = ((key, key.decode("ascii", "replace")) for key in own)
        names += [prefix + (text if PLAIN.fullmatch(text) else key.hex()) for key, text in texts]
        categories += [(part and part[1]) or ""] * len(own)
        keys += own
        ends.append(len(keys))
    if not keys:
        raise DataError("the database is empty")
    classes, labels = by_name(categories) if len(used) > 1 and all(categories) else ((), None)
    read = LmdbValues(tuple(folders[number] for number in used), tuple(ends), keys)
    return Source(f"LSUN, {split or ', '.join(chosen)}", names, read, classes=classes, labels=labels)
