"""What the files of a set say of themselves, for people: how JPEGs were compressed, and what else files carry."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.result import AuditResult
from robustdiff.data.file_evidence import FileEvidence
from robustdiff.utils.words import counted

LOW = 30
"""JPEG files of a quality below this are told to people: their blocks show at any size."""
CARRIED = {
    "animated": "animated",
    "alpha": "with transparency",
    "profile": "with a colour profile",
    "exif": "with EXIF data",
}
"""What files may carry, and how it is said."""
QUALITY = "jpeg_quality"
"""Name of the sign of every image, and of what is found by it."""


class InFile(Protocol):
    """An image that may be in a file."""

    @property
    def name(self) -> str:
        """Its name in the source."""

    @property
    def file(self) -> FileEvidence | None:
        """What that file says of itself."""


def file_summary(files: Sequence[FileEvidence]) -> dict[str, Any]:
    """How many files of each kind there are, and how JPEGs were compressed; JSON-ready.

    Args:
        files: What each says of itself.
    """
    quality = [file.quality for file in files if file.quality is not None]
    jpeg: dict[str, Any] = {"count": len(quality)}
    if quality:
        jpeg |= {
            "quality": {"least": min(quality), "median": math.floor(np.median(quality)), "most": max(quality)},
            "low": sum(one < LOW for one in quality),
            "nearest": sum(file.quality is not None and not file.exact for file in files),
            "subsampling": dict(Counter(file.subsampling for file in files if file.subsampling).most_common()),
        }
    carried = {key: sum(getattr(file, key) for file in files) for key in CARRIED}
    return {"formats": dict(Counter(file.format for file in files).most_common()), "jpeg": jpeg, **carried}


def file_lines(found: Mapping[str, Any]) -> list[str]:
    """The same for a terminal: at most two lines, and none of files that have nothing to say.

    Args:
        found: What :func:`file_summary` made.
    """
    lines, jpeg = [], found["jpeg"]
    if jpeg["count"]:
        quality = jpeg["quality"]
        same = quality["least"] == quality["most"]
        span = f"{quality['least']}" if same else f"{quality['least']} to {quality['most']}, median {quality['median']}"
        parts = [f"JPEG: {counted(jpeg['count'], 'file')}, quality {span}"]
        if jpeg["low"]:
            parts.append(f"{jpeg['low']} below {LOW}")
        if jpeg["nearest"]:
            parts.append(f"{jpeg['nearest']} with tables of their own, judged by the nearest quality")
        shared = {kind: count for kind, count in jpeg["subsampling"].items() if kind != "4:4:4"}
        if shared:
            which = ", ".join(kind if len(shared) == 1 else f"{kind}: {count}" for kind, count in shared.items())
            parts.append(f"{sum(shared.values())} with halved colour ({which})")
        lines.append("; ".join(parts))
    carried = [f"{found[key]} {words}" for key, words in CARRIED.items() if found[key]]
    return [*lines, f"files: {', '.join(carried)}"] if carried else lines


def with_jpeg_quality(result: AuditResult, images: Sequence[InFile]) -> AuditResult:
    """The result with the JPEG quality that files say, as a sign of every image, and who is below :data:`LOW`.

    Nothing that training depends on changes.

    Args:
        result: Of the same images, or some of them.
        images: In any order; names pair them.
    """
    said = {image.name: image.file.quality for image in images if image.file is not None}
    quality = torch.tensor([said.get(name) or math.nan for name in result.names], dtype=torch.float64)
    if bool(quality.isnan().all()):
        return result
    result = replace(result, signs={**result.signs, QUALITY: quality})
    low = quality < LOW
    if not bool(low.any()):
        return result
    finding = Finding(QUALITY, int(low.sum()), f"of JPEG quality below {LOW}, as their files say", Action.REPORTED)
    return replace(result, groups={**result.groups, QUALITY: low}, findings=(*result.findings, finding))
