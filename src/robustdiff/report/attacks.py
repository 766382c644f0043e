"""Attacks on the page: displacements side by side, their curves, and the flags that say what not to believe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robustdiff.report.charts import Point, Series, line_chart
from robustdiff.report.checks import ATTACK_CURVES, ATTACK_TRACES
from robustdiff.report.collecting import Run
from robustdiff.report.comparing import Line, compare, count, datum, sampler_words, words
from robustdiff.report.curves import Chart, Table
from robustdiff.reproduce.results import number

_TITLES = {
    "by_radius": ("Displacement by radius", "in units of the noise scale"),
    "by_steps": ("Displacement by steps of PGD", "flat at the right: more steps find no more"),
    "by_step_size": ("Displacement by step size", "of short PGD, in units of the radius"),
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
        tables: Displacements, one row per attack; then the flags that are raised.
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
        tables = [_displacements(lines), *_flags(lines)]
        notes = [
            "In units of the generated spread: independent images are about 1.4 apart; lower is better. Small: 95 % "
            "interval.",
            f"Sampled with {sampler_words(lines[0].evaluation)}." if sampler_words(lines[0].evaluation) else "",
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
    names = dict.fromkeys(name for line in lines for name in line.evaluation.values)
    rows = []
    for name in names:
        cells = [datum(line.evaluation.values.get(name, {})) for line in lines]
        rows.append(
            [
                name,
                *(
                    "-" if cell is None else f"{cell.text} ({cell.small})" if cell.small else cell.text
                    for cell in cells
                ),
            ]
        )
    return Table("displacements", ["attack", *(line.title for line in lines)], rows)


def _raised(line: Line) -> list[dict[str, Any]]:
    return [flag for flag in line.evaluation.details.get("flags", []) if flag["raised"]]


def _verdict(line: Line) -> tuple[str, bool]:
    flags = line.evaluation.details.get("flags", [])
    raised = _raised(line)
    wrong = [flag["name"] for flag in raised if flag.get("invalid", True)]
    if wrong:
        return f"not valid ({', '.join(wrong)})", False
    if not flags:
        return "no flags were computed", False
    weak = f"; a stronger attack may exist ({', '.join(flag['name'] for flag in raised)})" if raised else ""
    return f"none of {len(flags)} flags says that it is invalid{weak}", True


def _flags(lines: Sequence[Line]) -> list[Table]:
    rows = [
        [
            flag["name"],
            line.title,
            "not measured" if flag.get("value") is None else number(float(flag["value"])),
            "-" if flag.get("limit") is None else f"{flag['limit']:g}",
            " · ".join(filter(None, (words(flag.get("raised_when") or ""), words(flag.get("text") or "")))),
        ]
        for line in lines
        for flag in _raised(line)
    ]
    return [Table("flags raised", ["flag raised", "run", "value", "limit", "raised when"], rows)] if rows else []


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
