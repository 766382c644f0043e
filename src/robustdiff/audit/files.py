"""The folder of an audit: written whole or not at all, replaced only if it holds one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from robustdiff.audit.statistics import SetStatistics
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import DataError
from robustdiff.utils.images import image_grid, save_png

AUDIT_FORMAT = "robustdiff audit 1"
SHEETS = ("noisy", "holed", "soft", "odd", "copies", "far")
AUDIT_FILES = ("audit.json", "worst.png", "found.json", "clean.txt", "noise.csv", *(f"found-{s}.png" for s in SHEETS))
"""What an audit's folder may hold; from the third on, what ``search.py`` writes."""


def check_output(data: str, folder: str | Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder before the work rather than after it.

    Raises:
        DataError: If it lies in the data, or holds something that may not be replaced.
    """
    path, images = Path(folder).expanduser().absolute(), Path(data).expanduser()
    if data and images.is_dir() and images.resolve() in (path.resolve(), *path.resolve().parents):
        raise DataError(f"--output {folder}: lies in {data}, whose images it would join; choose another folder")
    if there := atomic_io.read_only(path.parent):  # where it is made ready
        raise DataError(f"--output {folder}: {there} is read-only; choose another folder")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise DataError(f"--output {folder}: exists and is not a folder; choose another")
    held = {entry.name for entry in path.iterdir()}
    if held and not overwrite:
        raise DataError(f"--output {folder}: not empty; choose another folder, or replace an audit with --overwrite")
    if not (held <= set(AUDIT_FILES) and (not held or _is_audit(path / "audit.json"))):
        raise DataError(f"--output {folder}: not an audit, so --overwrite spares it; remove it yourself")


def _is_audit(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["format"] == AUDIT_FORMAT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def write_audit(
    audit: SetStatistics, folder: str | Path, *, overwrite: bool = False, also: Callable[[Path], object] | None = None
) -> None:
    """Write ``audit.json`` and, where noise could be estimated, ``worst.png``, the contact sheet of the noisiest.

    Both go to a temporary folder beside the destination, renamed at the end: a report is never half there.

    Args:
        audit: What was found.
        folder: A new or empty folder, not in the data.
        overwrite: Replace an audit that it holds.
        also: Writes further files of :data:`AUDIT_FILES` into the folder that it is given.

    Raises:
        DataError: As :func:`check_output`.
    """
    check_output(audit.data, folder, overwrite=overwrite)
    path = Path(folder).expanduser().absolute()
    head = {
        "format": AUDIT_FORMAT,
        "source": audit.data,
        "kind": audit.what,
        "units": "mean and std in [0, 1]; noise: blind estimate of sigma, pixels in [-1, 1]; size: height, width",
        "summary": audit.summary(),
        "worst": [audit.records[place].name for place in audit.worst],
        "unreadable": [{"name": name, "reason": reason} for name, reason in audit.unreadable],
    }
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        with (unfinished / "audit.json").open("w", encoding="utf-8") as file:
            file.write(json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + ',\n "images": [')
            lines = (json.dumps(record.as_json(), allow_nan=False) for record in audit.records)
            file.writelines(("\n  " if number == 0 else ",\n  ") + line for number, line in enumerate(lines))
            file.write("\n ]\n}\n")  # one line per image: a person may search it
        if audit.worst:
            save_png(image_grid(audit.thumbnails, columns=5), unfinished / "worst.png")
        if also is not None:
            also(unfinished)
        atomic_io.replace_folder(unfinished, path)  # which is empty, or an audit that may be replaced
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
