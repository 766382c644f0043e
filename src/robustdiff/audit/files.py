"""The folder of an audit: written whole or not at all, replaced only if it holds one; lists and contact sheets."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from robustdiff.audit.file_rows import file_rows, write_csv, write_parquet
from robustdiff.audit.gallery import render
from robustdiff.audit.overview import Overview
from robustdiff.audit.result import AuditResult
from robustdiff.audit.statistics import WORST, SetStatistics
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import DataError
from robustdiff.utils.images import image_grid, save_png, thumbnail

AUDIT_FORMAT = "robustdiff audit 1"
SHEETS = ("noisy", "holed", "soft", "odd", "copies", "far")
EVERY_FILE = ("index.html", "images.csv", "images.parquet")
"""What :func:`write_overview` writes."""
FOUND_FILES = ("found.json", "clean.txt", "noise.csv", *(f"found-{sheet}.png" for sheet in SHEETS))
"""What :func:`write_found` writes."""
AUDIT_FILES = ("audit.json", "worst.png", *EVERY_FILE, *FOUND_FILES)
"""What an audit's folder may hold."""
EXPORTS = ("export-", ".export-")
"""How the names of folders begin that are made of an audit and replaced with it."""


def check_output(data: str, folder: str | Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder before the work rather than after it.

    Raises:
        DataError: If it lies in the data, or holds something that may not be replaced.
    """
    path = Path(folder).expanduser().absolute()
    check_outside(data, folder)
    if there := atomic_io.read_only(path.parent):  # where it is made ready
        raise DataError(f"`output` {folder}: {there} is read-only; choose another folder")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise DataError(f"`output` {folder}: exists and is not a folder; choose another")
    held = {entry.name for entry in path.iterdir() if not entry.name.startswith(EXPORTS)}
    if held and not overwrite:
        raise DataError(f"`output` {folder}: not empty; choose another folder, or replace an audit with `overwrite`")
    if not (held <= set(AUDIT_FILES) and (not held or source_of(path) is not None)):
        raise DataError(f"`output` {folder}: not an audit, so `overwrite` spares it; remove it yourself")


def check_outside(data: str, folder: str | Path) -> None:
    """Refuse an output folder in the data.

    Raises:
        DataError: If it lies there.
    """
    path, images = Path(folder).expanduser().absolute(), Path(data).expanduser()
    if data and images.is_dir() and images.resolve() in (path.resolve(), *path.resolve().parents):
        raise DataError(f"`output` {folder}: lies in {data}, whose images it would join; choose another folder")


def source_of(folder: Path) -> str | None:
    """What the audit in a folder is of, as it was given; None if the folder holds none."""
    try:
        about = atomic_io.read_json(folder / "audit.json")
    except (OSError, ValueError, RecursionError):
        return None
    return str(about.get("source", "")) if about.get("format") == AUDIT_FORMAT else None


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
    with atomic_io.new_folder(path) as unfinished:  # path is empty, or an audit that may be replaced
        with (unfinished / "audit.json").open("w", encoding="utf-8") as file:
            file.write(json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + ',\n "images": [')
            lines = (json.dumps(record.as_json(), allow_nan=False) for record in audit.records)
            file.writelines(("\n  " if number == 0 else ",\n  ") + line for number, line in enumerate(lines))
            file.write("\n ]\n}\n")  # one line per image: a person may search it
        if audit.worst:
            save_png(image_grid(audit.thumbnails, columns=5), unfinished / "worst.png")
        if also is not None:
            also(unfinished)


def write_overview(overview: Overview, pixels: Callable[[Sequence[int]], Tensor], folder: Path) -> None:
    """Write every file of a set into an existing folder, as a page and as a table.

    ``index.html`` (:mod:`robustdiff.audit.gallery`), ``images.csv`` and, with pyarrow, ``images.parquet``.

    Args:
        overview: What was found.
        pixels: As for :func:`write_sheets`; asked only if there was an audit.
        folder: Where to.
    """
    rows = file_rows(overview)
    atomic_io.write_text(folder / "index.html", render(overview, pixels))
    write_csv(rows, folder / "images.csv")
    write_parquet(rows, folder / "images.parquet")
    if overview.result is not None:
        write_found(overview.result, pixels, folder)


def write_found(result: AuditResult, pixels: Callable[[Sequence[int]], Tensor], folder: Path) -> None:
    """Write what was found into an existing folder.

    ``found.json`` (every image), ``clean.txt`` (names of those usable at every noise level), ``noise.csv``
    (``NAME,SIGMA`` of the noisy ones, as ``noise_levels`` takes it) and the contact sheets.

    Args:
        result: What was found.
        pixels: As for :func:`write_sheets`.
        folder: Where to.
    """
    names = result.names
    result.save(folder / "found.json")
    atomic_io.write_text(folder / "clean.txt", "".join(f"{names[i]}\n" for i in result.clean.nonzero().flatten()))
    with (folder / "noise.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "sigma"])
        noisy = result.noise_std.nonzero().flatten().tolist()
        writer.writerows([names[place], f"{result.noise_std[place].item():.6g}"] for place in noisy)
    write_sheets(result, pixels, folder)


def write_sheets(result: AuditResult, pixels: Callable[[Sequence[int]], Tensor], folder: Path) -> None:
    """Write those contact sheets of :data:`SHEETS` that have images, ``found-SHEET.png``, into an existing folder.

    Kinds from elsewhere are in ``soft`` or ``odd``, by what is done about their images.

    Args:
        result: What was found.
        pixels: Images by place, uint8, (B, C, H, W).
        folder: Where to.
    """
    for sheet, places in _shown(result).items():
        images = pixels(places.tolist())
        side = min(128, max(64, *images.shape[2:]))
        small = [torch.from_numpy(thumbnail(image.numpy(), side)) for image in images]
        save_png(image_grid(torch.stack(small), columns=5), folder / f"found-{sheet}.png")


def _shown(result: AuditResult) -> Mapping[str, Tensor]:
    """Places of the images of each contact sheet, the noisiest first, the lightest first, or in order."""
    soft = (result.min_sigma > result.noise_std) & ~result.has_missing
    places = {
        "noisy": result.sigma.argsort(descending=True)[: int((result.noise_std > 0).sum())],
        "holed": result.has_missing.nonzero().flatten(),
        "soft": soft.nonzero().flatten(),
        "odd": result.weight.argsort(stable=True)[: int((result.weight < 1).sum())],
    }
    if "distance" in result.signs:
        places["far"] = result.signs["distance"].argsort(descending=True)
    if result.copies:  # whole groups, as many as fit, the largest first
        places["copies"] = torch.tensor([place for group in result.copies for place in group])
    return {sheet: where[:WORST] for sheet, where in places.items() if len(where)}
