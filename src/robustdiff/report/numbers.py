"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(x: float) -> str:
    """Three significant digits, positional between 0.0001 and a million."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    if not 1e-4 <= abs(x) < 1e6:
        return f"{x:.2e}"
    rounded = float(f"{x:.2e}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def spread(value: Mapping[str, Any]) -> str:
    """Mean ± standard deviation, with the decimals that give the larger three digits; the mean alone for one seed."""
    mean, sd = value["mean"], value.get("sd")
    if sd is None:
        return number(mean)
    larger = max(abs(mean), sd)
    if larger == 0 or not 1e-4 <= larger < 1e6:
        return f"{number(mean)} ± {number(sd)}"
    decimals = max(0, 2 - math.floor(math.log10(larger)))
    small = f"{sd:.{decimals}f}" if sd == 0 or round(sd, decimals) else f"{sd:.1g}"
    return f"{number(mean) if mean and abs(mean) >= sd else f'{mean:.{decimals}f}'} ± {small}"
