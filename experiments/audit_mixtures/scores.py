"""What an audit said about a set beside the truth, as counts that can be added up over sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from experiments.audit_mixtures.damages import DAMAGES, Bytes
from experiments.audit_mixtures.sets import Truth
from robustdiff.audit.result import AuditResult
from robustdiff.utils.images import from_uint8

BINS = (0.5, 0.7, 0.9, 0.97, 1.0)
"""Edges of the probabilities of damage whose truth is counted."""
EXAMPLES = 50
"""Images at most whose places are kept: damage that was missed, with kind and strength, and false alarms."""
COPIES = "duplicates"
"""The group of images that are like another: no damage, and in folders of photographs often true."""


def score(result: AuditResult, truth: Truth, images: Bytes, *, copies_are_false: bool) -> dict[str, Any]:
    """Counts, JSON-ready.

    An image is *found* if it is in any group, *limited* if it is not trained like a clean one: at some noise levels
    only, or less often. Neither says anything of copies, unless it is known that there are none.

    Args:
        result: What the audit said.
        truth: What was done.
        images: uint8 (N, C, H, W).
        copies_are_false: Whether no two pictures of the set are alike.
    """
    copied = result.groups.get(COPIES, torch.zeros(len(result), dtype=torch.bool)).numpy()
    others = {name: members.numpy() for name, members in result.groups.items() if name != COPIES}
    found = np.any([*others.values(), np.zeros(len(result), bool)], axis=0)
    lighter = (result.weight < 1).numpy() & (~copied | copies_are_false)
    limited = (result.min_sigma > 0).numpy() | lighter | (result.regularise is not None)
    read = result.signs.get("strength", torch.full((len(result),), torch.nan)).numpy()
    clean, lost = truth.clean, found | limited | (copied & copies_are_false)
    false = {
        "found": int((found & clean).sum()),
        "limited": int((limited & clean).sum()),
        "either": int((lost & clean).sum()),
        "copies": int((copied & clean).sum()),
        "groups": {name: int((members.numpy() & clean).sum()) for name, members in result.groups.items()},
        "filled_pixels": _filled(result, images, clean),
    }
    kinds: dict[str, dict[str, Any]] = {}
    missed: list[tuple[int, str, float, float | None]] = []
    for place, (kind, part) in enumerate(zip(truth.kind, truth.part, strict=True)):
        if not kind:
            continue
        new = {"images": 0, "found": 0, "limited": 0, "named": 0, "as": {}, "errors": []}
        tally = kinds.setdefault(kind, {}).setdefault(part, new)
        tally["images"] += 1
        tally["found"] += int(found[place])
        tally["limited"] += int(limited[place])
        groups = [name for name, members in others.items() if members[place]]
        for name in groups:
            tally["as"][name] = tally["as"].get(name, 0) + 1
        if part == "judged" and not found[place]:
            missed.append((place, kind, round(float(truth.strength[place]), 3), _said(result, place)))
        if any(name in groups for name in DAMAGES[kind].right):
            tally["named"] += 1
            if np.isfinite(read[place]):
                tally["errors"].append(round(abs(float(read[place] / truth.strength[place]) - 1), 3))
    return {
        "images": len(result),
        "damaged": int((~clean).sum()),
        "regularised": result.regularise is not None,
        "false": false,
        "kinds": {kind: kinds[kind] for kind in DAMAGES if kind in kinds},
        "calibration": _calibration(result, clean),
        "missed": missed[:EXAMPLES],
        "alarms": [(place, _said(result, place)) for place in np.flatnonzero(lost & clean).tolist()[:EXAMPLES]],
    }


def _said(result: AuditResult, place: int) -> float | None:
    """The probability that an image is damaged, if the audit compared the set with copies of itself."""
    return round(float(result.signs["damaged"][place]), 3) if "damaged" in result.signs else None


def _calibration(result: AuditResult, clean: np.ndarray) -> list[list[int]] | None:
    """Images whose probability of damage is in each bin, and how many of them are damaged."""
    if "damaged" not in result.signs:
        return None
    told = np.digitize(result.signs["damaged"].numpy(), BINS[:-1])
    return [[int((told == k).sum()), int(((told == k) & ~clean).sum())] for k in range(1, len(BINS))]


def _filled(result: AuditResult, images: Bytes, clean: np.ndarray) -> int:
    """Pixels of clean images that were taken for lost, and filled in."""
    count = 0
    for place in np.flatnonzero(clean & result.has_missing.numpy()).tolist():
        _, lost = result.repaired(from_uint8(torch.from_numpy(images[place : place + 1])), [place])
        count += 0 if lost is None else int(lost.sum())
    return count
