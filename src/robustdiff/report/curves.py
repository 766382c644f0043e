"""Charts over training and over sampler steps, from ``metrics.jsonl``, ``during.jsonl`` and few-step evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from robustdiff.report.charts import Point, Series, line_chart
from robustdiff.report.collecting import METRICS, Run
from robustdiff.report.comparing import ARROWS, Comparison, Line, compare, words
from robustdiff.report.numbers import number

_WORDS: Mapping[str, tuple[str, str]] = {
    "denoising": ("Denoising loss", "comparable between runs on the same data"),
    "equivariance": ("Equivariance term", "before its weight"),
    "loss": ("Loss as trained", "objectives differ in it by definition"),
    "gradient_norm": ("Norm of the gradient", ""),
    "radius": ("Radius", "of the regularised images"),
    "regularised": ("Share of images regularised", ""),
    "learning_rate": ("Learning rate", ""),
    "images_per_second": ("Images per second", ""),
}
_FIRST = 3
"""Of :data:`robustdiff.report.collecting.METRICS`: what is shown unasked."""


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading and its small print; ``run`` if it is of one run only."""

    title: str
    small: str
    svg: Markup
    run: int | None = None


# -- training --------------------------------------------------------------------------------------------


def training(runs: Sequence[Run]) -> list[Chart]:
    """The loss and its terms by images seen, one chart each; none of what no run has, or is zero throughout."""
    return _training(runs, METRICS[:_FIRST])


def more_training(runs: Sequence[Run]) -> list[Chart]:
    """Likewise what is looked at when something is wrong."""
    return _training(runs, METRICS[_FIRST:])


def _training(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    found = []
    for name in names:
        (title, small), series = _WORDS[name], []
        for i, run in enumerate(runs):
            points = [_point(_at(line), line.get(name)) for line in run.metrics]
            if any(point.y for point in points):
                series.append(Series(run.title, i, points))
        if series:
            svg = line_chart(series, label=f"{title} by images seen", x_label="images seen")
            found.append(Chart(title, small, svg))
    return found


def during(runs: Sequence[Run]) -> list[Chart]:
    """One chart per metric of ``evaluation/during.jsonl``, with its floor."""
    series: dict[str, list[Series]] = {}
    floors: dict[str, set[float]] = {}
    better: dict[str, str] = {}
    for i, run in enumerate(runs):
        for name in dict.fromkeys(name for line in run.during for name in line["values"]):
            here = [(_at(line), line["values"].get(name, {})) for line in run.during]
            points = [_point(x, value.get("value")) for x, value in here]
            if any(point.y is not None for point in points):
                series.setdefault(name, []).append(Series(run.title, i, points, dots=True))
            floors.setdefault(name, set()).update(_floors(value for _, value in here))
            better.update((name, value["better"]) for _, value in here if value.get("better"))
    found = []
    for name, lines in series.items():
        svg = line_chart(lines, label=f"{name} by images seen", x_label="images seen", floors=sorted(floors[name]))
        small = "evaluated during training" + (" · dashed: floor" if floors[name] else "")
        found.append(Chart(name + ARROWS[better.get(name, "neither")], small, svg))
    return found


def _at(record: Mapping[str, Any]) -> float:
    """Where on the x axis a line lies: images seen, or steps in a file that does not count images."""
    return float(record.get("images", record.get("step")))


def _point(x: float, y: Any) -> Point:  # noqa: ANN401 - a number or None
    return Point(x, None if y is None else float(y))


def _floors(values: Iterable[Mapping[str, Any]]) -> list[float]:
    return sorted({float(value["floor"]) for value in values if value.get("floor") is not None})


# -- sampler steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Texts: the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class FewSteps:
    """Few-step evaluations under one protocol.

    Attributes:
        comparison: Their protocol and warnings.
        charts: One per metric and scheduler; those of a metric have the same axes.
        tables: The same as numbers, one per metric.
        timesteps: Where each curve's sampler stopped, in words.
    """

    comparison: Comparison
    charts: Sequence[Chart]
    tables: Sequence[Table]
    timesteps: Sequence[tuple[str, str]]


_Curve = tuple[Line, Mapping[str, Any]]


def few_steps(runs: Sequence[Run]) -> list[FewSteps]:
    """Quality by number of sampler steps; one entry per protocol."""
    found = []
    for comparison in compare(runs, "few-step"):
        curves = [(line, curve) for line in comparison.lines for curve in line.evaluation.details.get("curves", [])]
        drawn, tables = [], []
        for name in dict.fromkeys(name for _, curve in curves for name in curve["values"]):
            members = [pair for pair in curves if any(value is not None for value in pair[1]["values"].get(name, []))]
            if members:
                drawn += _step_charts(name, members)
                tables.append(_step_table(name, members))
        found.append(FewSteps(comparison, drawn, tables, _timesteps(curves)))
    return found


def _step_charts(name: str, curves: Sequence[_Curve]) -> list[Chart]:
    judged = [
        value
        for line, _ in curves
        for key, value in line.evaluation.values.items()
        if key == name or key.startswith(f"{name} at ")  # one value per count of steps, or one for all
    ]
    floors, better = _floors(judged), judged[0].get("better", "neither") if judged else "neither"
    span = [float(value) for _, curve in curves for value in curve["values"][name] if value is not None]
    found = []
    for scheduler in dict.fromkeys(curve["scheduler"] for _, curve in curves):
        series = []
        for line, curve in curves:
            if curve["scheduler"] == scheduler:
                pairs = zip(map(float, curve["steps"]), curve["values"][name], strict=True)
                points = [_point(x, y) for x, y in sorted(pairs, key=lambda pair: pair[0])]
                series.append(Series(line.title, line.run, points, dots=True))
        svg = line_chart(
            series,
            label=f"{name} by steps of {scheduler}",
            x_label="sampler steps",
            log_x=True,
            floors=floors,
            span=span,
        )
        found.append(Chart(name + ARROWS[better], scheduler + (" · dashed: floor" if floors else ""), svg))
    return found


def _step_table(name: str, curves: Sequence[_Curve]) -> Table:
    steps = sorted({float(step) for _, curve in curves for step in curve["steps"]})
    rows = []
    for line, curve in curves:
        at = dict(zip(map(float, curve["steps"]), curve["values"][name], strict=True))
        texts = ["-" if (value := at.get(step)) is None else number(value) for step in steps]
        rows.append([f"{line.title}, {curve['scheduler']}", *texts])
    return Table(name, [f"{name} after steps", *(f"{step:g}" for step in steps)], rows)


def _place(timestep: Any) -> str:  # noqa: ANN401 - whatever JSON can hold
    """A timestep; whole ones without the decimals that torch gives them."""
    return str(int(timestep)) if isinstance(timestep, float) and timestep.is_integer() else str(timestep)


def _timesteps(curves: Sequence[_Curve]) -> list[tuple[str, str]]:
    """Once for all runs whose samplers stopped at the same places."""
    found: dict[tuple[str, str], list[str]] = {}
    for line, curve in curves:
        for steps, places in zip(curve["steps"], curve.get("timesteps", []), strict=False):
            text = ", ".join(map(_place, places)) if isinstance(places, list) else words(places)
            found.setdefault((f"{curve['scheduler']}, {words(steps)} steps", text), []).append(line.title)
    names = [name for name, _ in found]
    return [
        (name if names.count(name) == 1 else f"{name} ({', '.join(dict.fromkeys(who))})", text)
        for (name, text), who in found.items()
    ]
