"""What a value of a result file must be before the page computes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ATTACK_CURVES = {
    "by_radius": "radius",
    "by_steps": "steps",
    "by_step_size": "step_size",
    "by_starts": "starts",
    "by_eot": "draws",
}
"""Curves of an attack, and what each runs over."""
ATTACK_TRACES = ("by_evaluation", "by_restart")
"""Lists of an attack: one number per evaluation, per restart."""


def is_number(value: object) -> bool:
    """A number that arithmetic on floats survives (whole numbers in JSON have no bound); not NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def are_numbers(values: Any, count: int | None = None) -> bool:  # noqa: ANN401 - whatever JSON can hold
    """A list of them, of that length if one is given."""
    return isinstance(values, list) and all(map(is_number, values)) and (count is None or len(values) == count)


def is_count(value: object) -> bool:
    """A number, 0 or more."""
    return is_number(value) and value >= 0  # type: ignore[operator]


def wrong_attack(details: Mapping[str, Any]) -> str:
    """What keeps the details of an attack from being drawn, or an empty text."""
    flags = details.get("flags", [])
    if not isinstance(flags, list):
        return "details['flags'] is not a list"
    for i, flag in enumerate(flags):
        if not isinstance(flag, dict) or not isinstance(flag.get("name"), str):
            return f"details['flags'][{i}] has no name"
        if not isinstance(flag.get("raised"), bool):
            return f"details['flags'][{i}] does not say whether it is raised"
        for key in ("value", "limit"):
            if not (flag.get(key) is None or is_number(flag[key])):
                return f"details['flags'][{i}][{key!r}] is not a number"
    for name, over in ATTACK_CURVES.items():
        curve = details.get(name)
        if curve is None:
            continue
        if not isinstance(curve, dict) or not are_numbers(places := curve.get(over)) or not places:
            return f"details[{name!r}] has no list {over!r} of numbers"
        moved = curve.get("displacement")
        if not isinstance(moved, list) or len(moved) != len(places):
            return f"details[{name!r}]['displacement'] is not one number per {over}"
        if not all(value is None or is_number(value) for value in moved):
            return f"details[{name!r}]['displacement'] holds something else than numbers"
    for name in ATTACK_TRACES:
        if not (details.get(name) is None or are_numbers(details[name])):
            return f"details[{name!r}] is not a list of numbers"
    return ""
