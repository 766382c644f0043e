"""Attacks on the page: displacements side by side, their curves, and the flags that say what not to believe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustdiff.report.charts import Point, Series, line_chart
from robustdiff.report.checks import ATTACK_CURVES, ATTACK_TRACES
from robustdiff.report.collecting import Run
from robustdiff.report.comparing import (
    ARROWS,
    Line,
    compare,
    count,
    datum,
    sampler_words,
    words,
)
from robustdiff.report.curves import Chart, Table
from robustdiff.report.numbers import number

_TITLES = {
    "by_radius": ("Displacement by radius", "in units of the noise scale"),
    "by_steps": ("Displacement by steps of PGD", "flat at the right: more steps find no more"),
    "by_step_size": ("Displacement by step size", "of short PGD, in units of the radius"),
    "by_starts": (
        "Displacement by random starts",
        "of short PGD, the best of them, under the noise that the attacker uses",
    ),
    "by_eot": ("Displacement by draws of the noise (EOT)", "of short PGD, judged on draws that it has not seen"),
    "by_evaluation": ("Best so far, by evaluation", "of the first restart"),
    "by_restart": ("Best so far, by restart", ""),
}


@dataclass(frozen=True)
class Attacks:
    """Attacks with the same threat model.

    Attributes:
        title: The threat model, in words.
        charts: One per curve.
        tables: Displacements, one row per attack; quality before and after, one table per reference; then the flags
            that are raised.
        verdicts: Of each run: its title and whether its result may be believed.
        notes: What all share.
    """

    title: str
    charts: Sequence[Chart]
    tables: Sequence[Table]
    verdicts: Sequence[tuple[int, str, bool]]
    notes: Sequence[str]


def attacks(runs: Sequence[Run]) -> list[Attacks]:
    """One entry per threat model."""
    found = []
    for comparison in compare(runs, "attack"):
        lines = comparison.lines
        qualities, about = _qualities(lines)
        tables = [_displacements(lines), *qualities, *_flags(lines)]
        notes = [
            "In units of the generated spread: independent images are about 1.4 apart; lower is better. Small: 95 % "
            "interval.",
            f"Sampled with {sampler_words(lines[0].evaluation)}." if sampler_words(lines[0].evaluation) else "",
            *about,
        ]
        charts = [chart for name in _TITLES if (chart := _chart(name, lines)) is not None]
        verdicts = [(line.run, line.title, *_verdict(line)) for line in lines]
        found.append(
            Attacks(
                _threat(lines[0]),
                charts,
                tables,
                [(run, f"{title}: {text}", good) for run, title, text, good in verdicts],
                [note for note in notes if note],
            )
        )
    return found


def _threat(line: Line) -> str:
    protocol = line.evaluation.protocol
    about: Any = protocol.get("attack")
    about = about if isinstance(about, dict) else {}
    many = f"{count(protocol['n_generated'])} images" if protocol.get("n_generated") is not None else ""
    at: Any = about.get("at")
    steps = (protocol.get("sampler") or {}).get("steps")
    where = "all sampler steps" if isinstance(at, list) and len(at) == steps else f"sampler steps {words(at)}"
    parts = [
        words(about["objective"]) if about.get("objective") is not None else "",
        f"{words(about.get('norm'))} {words(about['radius'])}" if about.get("radius") is not None else "",
        where if at is not None else "",
        f"the attacker knows {words(about['knows'])}" if about.get("knows") is not None else "",
        many,
    ]
    return " · ".join(filter(None, parts)) or "attack"


def _displacements(lines: Sequence[Line]) -> Table:
    names = dict.fromkeys(n for line in lines for n, value in line.evaluation.values.items() if not _of(value))
    rows = []
    for name in names:
        rows.append([name, *(_cell(line.evaluation.values.get(name, {})) for line in lines)])
    return Table("displacements", ["attack", *(line.title for line in lines)], rows)


def _of(value: Mapping[str, Any]) -> str:
    """Which images a value of quality is of; empty for displacements."""
    return words(about["of"]) if (about := value.get("about") or {}).get("of") is not None else ""


def _qualities(lines: Sequence[Line]) -> tuple[list[Table], list[str]]:
    """Quality before and after, side by side where reference, extractors and numbers of images agree; and notes."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if about := line.evaluation.protocol.get("quality"):
            same = [about.get(name) for name in ("reference", "extractors", "n_generated", "n_real")]
            groups.setdefault(json.dumps(same, sort_keys=True), []).append(line)
    tables, notes = [], []
    for group in groups.values():
        about = group[0].evaluation.protocol["quality"]
        names = dict.fromkeys(n for line in group for n, value in line.evaluation.values.items() if _of(value))
        which = dict.fromkeys(_of(line.evaluation.values[n]) for line in group for n in names)
        metrics = dict.fromkeys(name.removesuffix(f", {one}") for name in names for one in which if name.endswith(one))
        reference = about.get("reference")
        source = words(reference.get("source")) if isinstance(reference, dict) else "images"
        head = f"{count(about.get('n_generated'))} images against {count(about.get('n_real'))} of {source}"
        rows = []
        for metric in metrics:
            values = [line.evaluation.values.get(f"{metric}, {one}", {}) for line in group for one in which]
            floors = [float(value["floor"]) for value in values if value.get("floor") is not None]
            floor = " to ".join(dict.fromkeys(number(x) for x in (min(floors), max(floors)))) if floors else "-"
            arrow = ARROWS[values[0].get("better", "neither")]
            rows.append([metric + arrow, *(_cell(value) for value in values), floor])
        header = [head, *(f"{line.title}: {one}" for line in group for one in which), "floor"]
        tables.append(Table("quality", header, rows))
        floors_are = about.get("floors")
        if isinstance(floors_are, dict):
            told = "; ".join(dict.fromkeys(words(text) for text in floors_are.values()))
            notes.append(f"Quality ({head}): floor: {told}. So few images raise a Frechet distance: read it beside it.")
    return tables, notes


def _cell(value: Mapping[str, Any]) -> str:
    cell = datum(value)
    return "-" if cell is None else f"{cell.text} ({cell.small})" if cell.small else cell.text


def _raised(line: Line) -> list[dict[str, Any]]:
    return [flag for flag in line.evaluation.details.get("flags", []) if flag["raised"]]


def _measured(flag: Mapping[str, Any]) -> bool:
    return bool(flag.get("measured", True))


def _verdict(line: Line) -> tuple[str, bool]:
    flags = line.evaluation.details.get("flags", [])
    raised = [flag for flag in _raised(line) if _measured(flag)]
    wrong = [flag["name"] for flag in raised if flag.get("invalid", True)]
    if wrong:
        return f"not valid ({', '.join(wrong)})", False
    unknown = [flag["name"] for flag in flags if not _measured(flag)]
    if unknown:
        return f"not known to be valid ({', '.join(unknown)} not measured)", False
    if not flags:
        return "no flags were computed", False
    weak = f"; a stronger attack may exist ({', '.join(flag['name'] for flag in raised)})" if raised else ""
    return f"none of {len(flags)} flags says that it is invalid{weak}", True


def _flags(lines: Sequence[Line]) -> list[Table]:
    rows = [
        [
            flag["name"],
            line.title,
            ("no number" if _measured(flag) else "not measured")
            if flag.get("value") is None
            else number(float(flag["value"])),
            "-" if flag.get("limit") is None else f"{flag['limit']:g}",
            " · ".join(filter(None, (words(flag.get("raised_when") or ""), words(flag.get("text") or "")))),
        ]
        for line in lines
        for flag in _raised(line)
    ]
    header = ["flag raised, or not measured", "run", "value", "limit", "raised when"]
    return [Table("flags raised", header, rows)] if rows else []


def _chart(name: str, lines: Sequence[Line]) -> Chart | None:
    series = []
    for line in lines:
        details = line.evaluation.details
        if name in ATTACK_TRACES:
            values = details.get(name) or []
            points = [Point(float(i), float(value)) for i, value in enumerate(values, 1)]
        else:
            curve = details.get(name) or {}
            pairs = zip(curve.get(ATTACK_CURVES[name], []), curve.get("displacement", []), strict=True)
            points = [Point(float(x), None if y is None else float(y)) for x, y in sorted(pairs, key=lambda p: p[0])]
        if len(points) > 1 and any(point.y is not None for point in points):
            series.append(Series(line.title, line.run, points, dots=name not in ATTACK_TRACES))
    if not series:
        return None
    title, small = _TITLES[name]
    x_label = {"by_evaluation": "evaluations", "by_restart": "restarts"}.get(name) or ATTACK_CURVES[name].replace(
        "_", " "
    )
    svg = line_chart(series, label=f"{title} of {len(series)} runs", x_label=x_label, log_x=name in ATTACK_CURVES)
    return Chart(title, small, svg)
