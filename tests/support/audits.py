"""An audit made by hand: what each kind of line, page and table is made of, without the time to look."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from robustdiff.audit.files import AUDIT_FORMAT
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.overview import Overview
from robustdiff.audit.result import AuditResult
from robustdiff.audit.statistics import ImageRecord, SetStatistics

COUNT = 12
JPEG, NOISE, ALIKE = [0, 1, 2, 3], [4, 5, 6], [3, 7]
DOUBTED, SUSPECTED = 8, 9
BAD = (("broken.png", "cut off"), ("text.png", "not an image"))


def at(places: list[int], count: int = COUNT) -> torch.Tensor:
    members = torch.zeros(count, dtype=torch.bool)
    members[places] = True
    return members


def statistics(names: tuple[str, ...], unreadable: tuple[tuple[str, str], ...] = BAD) -> SetStatistics:
    records = tuple(
        ImageRecord(place, name, (32, 48), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), None, f"{place:064x}")
        for place, name in enumerate(names)
    )
    return SetStatistics("photos", "folder", records, unreadable, {}, (), (), torch.empty(0))


def result(**changes: object) -> AuditResult:
    """Twelve: four compressed, three noisy, two alike of which one is compressed, one in doubt, one suspected."""
    damaged = torch.tensor([0.99, 0.98, 0.97, 0.93, 0.95, 0.94, 0.92, 0.1, 0.8, 0.75, 0.02, 0.01]).double()
    strength = torch.tensor([12, 14, 16, 18, 0.1, 0.2, 0.3, math.nan, 30, 2, math.nan, math.nan]).double()
    least = torch.zeros(COUNT).double()
    least[JPEG], least[NOISE], least[DOUBTED] = 0.4, 0.2, 0.1
    weight = torch.ones(COUNT).double()
    weight[ALIKE] = 0.5
    made = replace(
        AuditResult.of_clean(COUNT),
        min_sigma=least,
        noise_std=torch.where(at(NOISE), 0.2, 0.0).double(),
        weight=weight,
        findings=(
            Finding(
                "jpeg",
                4,
                "what the others become at JPEG quality 15",
                Action.TRAINED_WHERE_HIDDEN,
                0.4,
                told_apart=0.56,
            ),
            Finding("noise", 3, "white noise, levels about 0.2", Action.TRAINED_ABOVE, 0.2, told_apart=0.9),
            Finding("duplicates", 2, "1 picture more than once", Action.COUNTED_ONCE),
        ),
        groups={"jpeg": at(JPEG), "noise": at(NOISE), "duplicates": at(ALIKE)},
        copies=((3, 7),),
        signs={"damaged": damaged, "strength": strength},
        looks_like=("jpeg",) * 4 + ("noise",) * 3 + ("blur", "jpeg", "blur", "jpeg", "noise"),
    )
    return replace(made, **changes)


def overview(found: AuditResult | None = None) -> Overview:
    found = result() if found is None else found
    return Overview(statistics(tuple(found.names)), found)


def save(found: AuditResult, folder: Path, source: Path) -> None:
    """What an export reads of an audit's folder."""
    found.save(folder / "found.json")
    (folder / "audit.json").write_text(json.dumps({"format": AUDIT_FORMAT, "source": str(source)}))
