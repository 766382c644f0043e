"""Files and folders that survive a kill or a power cut: whole or not there, and on the disk when said to be.

Every change follows one order: write aside, fsync the file, rename, fsync the folder. A rename is one instant, so
nobody ever finds half a file; the two fsyncs put the bytes on the disk before the name, and then the name.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
"""A folder that has it is complete."""
_MAX_MANIFEST = 2**20
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""How network and FUSE mounts say that they cannot fsync a folder."""


def fsync_file(path: Path) -> None:
    """Return when the content of ``path`` is on the disk.

    Raises:
        OSError: If the system says that it is not.
    """
    with open(path, "r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Return when the names in ``path`` are on the disk; file systems that cannot do this for folders are let be.

    Raises:
        OSError: If the system can, and failed.
    """
    if os.name == "nt":  # cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(handle)


def read_only(path: Path) -> Path | None:
    """The folder that forbids making or changing ``path``, or None if nothing does."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return None if os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)) else there


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8: whole or not at all, and on the disk on return; replaces what was there.

    Args:
        path: The file; ``.NAME.tmp`` beside it is taken, and may be left by a kill.
        text: Its new content.

    Raises:
        OSError: If it could not be written; what was there is then untouched.
    """
    content, staging = text.encode(), path.with_name(f".{path.name}.tmp")
    try:
        with open(staging, "wb") as file:
            file.write(content)
        fsync_file(staging)
        os.replace(staging, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(staging)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Write strict JSON the way of :func:`write_text`.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON does not know; nothing is written then.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal, in constant memory."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def replace_folder(staging: Path, final: Path) -> None:
    """Put the finished folder ``staging`` in the place of ``final``, and delete what ``final`` was.

    A kill leaves one of these, and nothing else:

    * ``final`` is the old folder, ``staging`` the new one (before);
    * ``final`` is the new folder, and the old one, whole or partly deleted, is ``staging`` or ``.FINAL.old`` (after).

    Linux swaps the two names in one instant on local file systems. Elsewhere two renames follow one another, and a
    kill just between them leaves no ``final``, but both folders whole: the old one is ``.FINAL.old`` beside it, the new
    one ``staging``. Calling this again with a new ``staging`` then mends it.

    Args:
        staging: The new folder; on the same file system as ``final``. What must survive a power cut is on the disk
            already (:func:`fsync_file`, :func:`fsync_folder`).
        final: The folder to replace; may be missing.

    Raises:
        OSError: If it cannot be done; ``final`` is then the old folder or the new one, or missing as told above.
    """
    old = final.with_name(f".{final.name}.old")
    if not os.path.lexists(final):
        os.rename(staging, final)
    elif not _exchange(staging, final):
        remove(old)
        os.rename(final, old)
        try:
            os.rename(staging, final)
        except OSError:
            os.rename(old, final)
            raise
    for parent in {final.parent, staging.parent}:
        fsync_folder(parent)
    remove(staging)
    remove(old)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside ``final`` to be filled, which takes its place at the end; on an error nothing is left.

    Args:
        final: The folder to make or replace, by :func:`replace_folder`.
    """
    unfinished = final.with_name(f".{final.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        replace_folder(unfinished, final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one instant; False where the system cannot (not Linux, an old libc, some network mounts)."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0)


def remove(path: Path) -> None:
    """Delete a file or folder that nobody needs; what resists is left for the next time."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            os.unlink(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path, **about: int) -> None:
    """List every file in ``folder`` with its size and SHA-256 in ``manifest.json``; the last step of filling it.

    Args:
        folder: Its files are on the disk already (:func:`fsync_file`); it has no sub-folders.
        about: Numbers to be compared by :func:`check_manifest`.

    Raises:
        OSError: If a file cannot be read, or the manifest not be written.
    """
    names = sorted(path.name for path in folder.iterdir())
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
    write_json(folder / MANIFEST, {**about, "files": files})


def check_manifest(folder: Path, required: Collection[str], optional: Collection[str] = (), **about: int) -> str:
    """Read every file in ``folder`` and compare it with the manifest.

    Only the names given here are ever opened: a manifest cannot lead out of the folder.

    Args:
        folder: What :func:`write_manifest` has seen.
        required: Names of the files that must be listed and there.
        optional: Names of those that may; neither listed without being there, nor there without being listed.
        about: The numbers it must have been written with.

    Returns:
        "" if all is as it was, else what is wrong with which file, in one line.
    """
    try:
        if not (folder / MANIFEST).is_file():
            return f"{MANIFEST}: missing"
        if (folder / MANIFEST).stat().st_size > _MAX_MANIFEST:
            return f"{MANIFEST}: too large"
        manifest = read_json(folder / MANIFEST)
        here = {*required, *(name for name in optional if os.path.lexists(folder / name))}
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST}: {one_line(error)}"
    for key, value in about.items():
        if manifest.get(key) != value:
            return f"{MANIFEST}: {key} is {manifest.get(key)!r:.40} instead of {value}"
    files = manifest.get("files")
    if not isinstance(files, dict):
        return f"{MANIFEST}: lists no files"
    for name in files:
        if name not in required and name not in optional:
            return f"{MANIFEST}: lists {name!r:.80}, which does not belong there"
        if not (isinstance(files[name], dict) and files[name].keys() >= {"bytes", "sha256"}):
            return f"{MANIFEST}: has no size and sha256 of {name}"
    if unlisted := sorted(here - files.keys()):
        return f"{MANIFEST}: does not list {unlisted[0]}"
    for key in ("bytes", "sha256"):  # sizes first: they cost nothing
        for name, entry in files.items():
            try:
                if not (folder / name).is_file():
                    return f"{name}: missing"
                if key == "bytes" and (size := (folder / name).stat().st_size) != entry["bytes"]:
                    return f"{name}: {size} bytes instead of {entry['bytes']!r:.40}"
                if key == "sha256" and sha256(folder / name) != entry["sha256"]:
                    return f"{name}: sha256 differs"
            except OSError as error:
                return f"{name}: {one_line(error)}"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """An object in strict JSON.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is something else; RecursionError if it is nested absurdly.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    value = json.loads(path.read_bytes(), parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def one_line(error: BaseException) -> str:
    """An exception's text, in one line of bearable length."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
