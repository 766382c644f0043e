"""The page: what ``collecting`` read and ``comparing`` judged, in the order in which a reader asks.

Which run is best, and is that a tie; what do its images look like; does it copy; was it trained for long enough; how
few steps does it need; what differed; what the numbers rest on.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from robustdiff import __version__
from robustdiff.report import attacks, charts, curves
from robustdiff.report.charts import Dot
from robustdiff.report.collecting import Evaluation, Picture, Run
from robustdiff.report.comparing import Comparison, compare, count, settings, words
from robustdiff.report.curves import Chart
from robustdiff.report.numbers import number
from robustdiff.utils.pages import template

_SHEETS = {
    "nearest": "generated images and their nearest real ones",
    "pairs": "the closest pairs: generated, training image",
    "attacked": "undisturbed images, and the same ones attacked",
}
_FOUND = {
    "noisy": "the noisiest",
    "holed": "lost pixels",
    "soft": "blurred or compressed",
    "odd": "used less often, the least first",
    "copies": "more than once, group after group",
    "far": "farthest from the others in features",
}
_CARD, _WIDE = 288, 440
"""Pixels of a picture's place on the page; a smaller one is enlarged, with sharp squares if it is much smaller."""


@dataclass(frozen=True)
class Figure:
    """A picture with its heading and its small print."""

    title: str
    small: str
    uri: str
    width: int
    height: int
    enlarged: bool
    run: int | None = None


def render(runs: Sequence[Run], title: str | None = None, *, beside: Path | None = None) -> str:
    """One HTML page that needs nothing else.

    Args:
        runs: As :func:`robustdiff.report.collecting.collect` gives them; at least one.
        title: Its heading. Default: the names of the runs.
        beside: The folder that the page will lie in: links to files are relative to it. Default: the working folder.

    Returns:
        The page; safe to be written as UTF-8, whatever the names of files hold.
    """
    here = (beside or Path()).resolve()

    def place(path: Path) -> str:
        """From the page to a file; in full where no relative path leads there."""
        try:
            return Path(os.path.relpath(path.resolve(), here)).as_posix()
        except ValueError:  # another drive
            return path.resolve().as_uri()

    def link(path: Path) -> str:
        return quote(os.fsencode(place(path)), safe="/" if not place(path).startswith("file:") else "/:%")

    rows = settings(runs)
    text = template("robustdiff.report", "page.html.jinja", breaks=_breaks).render(
        title=title or _title(runs),
        version=__version__,
        runs=runs,
        run_class=charts.run_class,
        place=place,
        link=link,
        colours=charts.COLOURS,
        words=words,
        facts=[_facts(run) for run in runs],
        quality=[_with_dots(comparison, "floor") for comparison in compare(runs, "quality")],
        without_quality=[
            r.title for r in runs if not (_only_audit(r) or any(e.kind == "quality" for e in r.evaluations))
        ],
        samples=_samples(runs),
        found=[(i, *_found(run)) for i, run in enumerate(runs) if run.found],
        found_sheets=_found_sheets(runs),
        stages=[(run.title, i, _stages(run)) for i, run in enumerate(runs) if len(run.samples) > 1],
        nearest=_sheets(runs, "quality"),
        copying=[_with_dots(comparison, "null") for comparison in compare(runs, "memorisation")],
        similarities=_similarities(runs),
        pairs=_sheets(runs, "memorisation"),
        copies=_copies(runs),
        training=curves.during(runs) + curves.training(runs),
        more_training=curves.more_training(runs),
        few=curves.few_steps(runs),
        few_sheets=_sheets(runs, "few-step"),
        attacks=attacks.attacks(runs),
        attack_sheets=_sheets(runs, "attack"),
        different=[row for row in rows if row.differs],
        settings=rows,
        files=[(run, [_evaluation(evaluation) for evaluation in run.evaluations]) for run in runs],
    )
    return text.lstrip().encode(errors="backslashreplace").decode()


def _breaks(text: str) -> Markup:
    """Lets a long name break where its parts meet; ``objective(strength=...)`` has no spaces."""
    return Markup("<wbr>").join(re.findall(r"[^(,=_/:-]*[(,=_/:-]|[^(,=_/:-]+", text))


def _title(runs: Sequence[Run]) -> str:
    names = [run.title for run in runs]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more runs"


def _facts(run: Run) -> str:
    """What a run is, in one line: data, objective, how far it is."""
    flags, plan, data = (_part(run.config, "settings"), _part(run.config, "plan"), _part(run.data, "data"))
    texts = []
    default = flags.get("objective") or ""
    if flags.get("auto") is True:
        default = "auto"
    elif "preset" in flags and default == "robust":
        default = "gated"
    objective = words(flags.get("preset") or default)
    if objective != run.title:
        texts.append(objective)
    if data.get("source") is not None:
        many = f", {count(data['count'])} images" if data.get("count") is not None else ""
        texts.append(f"{words(data['source'])}{many}")
    if run.data.get("corrupt"):
        texts.append(f"dirt: {words(run.data['corrupt'])}")
    seen = run.metrics[-1].get("images") if run.metrics else None
    if seen is not None:
        planned = f" of {count(plan['images'])}" if plan.get("images") is not None else ""
        texts.append(f"{count(seen)}{planned} images seen")
    return " · ".join(filter(None, texts))


def _part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = value.get(name)
    return part if isinstance(part, dict) else {}


# -- comparisons -----------------------------------------------------------------------------------------


def _with_dots(comparison: Comparison, yardstick: str) -> tuple[Comparison, list[Chart]]:
    """The comparison, and one dot plot per metric that more than one line has."""
    found = []
    for column in comparison.columns:
        dots = [
            Dot(comparison.label(i), comparison.lines[i].run, datum.value, datum.interval, datum.text)
            for i, datum in enumerate(column.data)
            if datum is not None
        ]
        if len(dots) > 1:
            small = {"lower": "lower is better", "higher": "higher is better", "neither": ""}[column.better]
            small = " · ".join(filter(None, [small, f"bar: {yardstick} {column.floor}" if column.floors else ""]))
            svg = charts.dot_plot(dots, label=f"{column.name} of {len(dots)} runs", floors=column.floors)
            found.append(Chart(column.name, small, svg))
    return comparison, found


# -- pictures --------------------------------------------------------------------------------------------


def _figure(picture: Picture, title: str, small: str, run: int | None = None, place: int = _CARD) -> Figure:
    uri = f"data:image/png;base64,{base64.b64encode(picture.content).decode('ascii')}"
    return Figure(title, small, uri, picture.width, picture.height, picture.width < 0.7 * place, run)


def _samples(runs: Sequence[Run]) -> list[Figure]:
    """Training images, once if all runs have the same ones, and every run's last preview."""
    sheets = {i: run.training for i, run in enumerate(runs) if run.training is not None}
    found = []
    if len({picture.content for picture in sheets.values()}) == 1:
        who = ", ".join(runs[i].title for i in sheets) if len(sheets) < len(runs) else "what the runs learn from"
        found.append(_figure(next(iter(sheets.values())), "training images", who if len(runs) > 1 else ""))
        sheets = {}
    for i, run in enumerate(runs):
        if i in sheets:
            found.append(_figure(sheets[i], f"{run.title}: training images", "", i))
        if run.samples:
            step, picture = run.samples[-1]
            found.append(_figure(picture, run.title, f"step {step:,}{_drawn(run)}", i))
    return found


def _drawn(run: Run) -> str:
    """How the previews of a run are drawn."""
    flags = _part(run.config, "settings")
    seed = f", seed {words(flags['seed'])}" if flags.get("seed") is not None else ""
    steps = flags.get("ddpm_num_inference_steps")
    return f"{seed}{f', {words(steps)} sampler steps' if steps is not None else ''}"


def _stages(run: Run) -> list[Figure]:
    return [_figure(picture, f"step {step:,}", "") for step, picture in run.samples]


def _only_audit(run: Run) -> bool:
    """Whether a folder holds an audit and no run."""
    return bool(run.found) and not (run.config or run.data or run.evaluations)


def _found(run: Run) -> tuple[str, list[tuple[str, str, str, str]]]:
    """What was found in a run's training images: in short, and finding by finding."""
    found = run.found
    short = f"{found['clean']:,} of {found['count']:,} images are trained at every noise level"
    if "too-few" in found.get("unasked", {}).values():
        short = f"{found['count']:,} images, too few to compare: {', '.join(found['unasked'])} were not looked for"
    elif not found["findings"]:
        short = f"{found['count']:,} images, none of which stands apart: plain training"
    return short, [(one["part"], f"{one['count']:,}", one["what"], one["action"]) for one in found["findings"]]


def _found_sheets(runs: Sequence[Run]) -> list[Figure]:
    return [
        _figure(picture, f"{run.title}: {_FOUND.get(kind, kind)}", picture.path.name, i, _WIDE)
        for i, run in enumerate(runs)
        for kind, picture in run.found_sheets.items()
    ]


def _sheets(runs: Sequence[Run], kind: str) -> list[Figure]:
    found = []
    for i, run in enumerate(runs):
        for evaluation in run.evaluations:
            for name, picture in evaluation.sheets.items():
                if evaluation.kind == kind:
                    found.append(
                        _figure(picture, f"{run.title}: {_SHEETS.get(name, name)}", picture.path.name, i, _WIDE)
                    )
    return found


# -- memorisation ----------------------------------------------------------------------------------------


def _similarities(runs: Sequence[Run]) -> list[Chart]:
    found = []
    for i, run in enumerate(runs):
        for evaluation in run.evaluations:
            if (shape := evaluation.details.get("histogram")) is None:
                continue
            null = shape.get("null")
            extractor = evaluation.protocol.get("extractor") or {}
            name = words(extractor["name"]) if extractor.get("name") is not None else ""
            svg = charts.histogram(
                *(shape["edges"], shape["generated"], null),
                run=i,
                label=f"{run.title}: similarity to the nearest training image",
                x_label="cosine similarity to the nearest training image",
            )
            found.append(Chart(run.title, f"features: {name}" if name else "", svg, i))
    return found


def _copies(runs: Sequence[Run]) -> list[tuple[str, str, Sequence[str], list[list[str]]]]:
    """Tables of the closest pairs and the most copied images: run, caption, header, rows."""
    found: list[tuple[str, str, Sequence[str], list[list[str]]]] = []
    for run in runs:
        for evaluation in run.evaluations:
            for name, caption, header in (
                ("pairs", "the closest pairs", ("generated", "training image", "distance ratio")),
                ("copied", "training images copied most often", ("training image", "name", "times")),
            ):
                rows = [[_entry(value) for value in row] for row in evaluation.details.get(name, [])]
                if rows:
                    found.append((run.title, f"{run.title}: {caption}", header, rows))
    return found


def _entry(value: Any) -> str:  # noqa: ANN401 - whatever JSON can hold
    return number(value) if isinstance(value, float) else words(value)


# -- files -----------------------------------------------------------------------------------------------


def _evaluation(evaluation: Evaluation) -> tuple[Path, str, list[tuple[str, str]]]:
    """A file of ``evaluation/``: its path, its kind, and all that it says beside the details."""
    body = evaluation.body
    texts = []
    for name, value in evaluation.values.items():
        more = [
            words(value.get("value")),
            f"floor {words(value['floor'])}" if value.get("floor") is not None else "",
            "95 % interval {} to {}".format(*value["interval"]) if value.get("interval") is not None else "",
            words(value["about"]) if value.get("about") else "",
        ]
        texts.append((name, "; ".join(filter(None, more))))
    texts += [
        (name.replace("_", " "), words(value, full=True))
        for name, value in evaluation.protocol.items()
        if value is not None
    ]
    cost = [f"{words(body['seconds'])} s" if body.get("seconds") is not None else ""]
    cost += [words(body[name]) for name in ("hardware", "date") if body.get(name) is not None]
    cost += [
        f"{t} {words(body[n])}" for n, t in (("torch", "torch"), ("version", "robustdiff")) if body.get(n) is not None
    ]
    texts.append(("made", ", ".join(filter(None, cost)) or "not told"))
    return evaluation.path, evaluation.kind, texts
