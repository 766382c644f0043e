"""Which values may stand in one column, which of them is best, and when that is a tie; and how settings differ.

A number without its protocol is no number: values are compared only if extractor (with the digest of its weights),
resize rule, number of images and reference agree (docs/protocols). Everything here is text or taken from the JSON as it
is; nothing is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from robustdiff.report.collecting import Evaluation, Run
from robustdiff.report.numbers import number, spread

Mark = Literal["best", "tie", ""]
Better = Literal["lower", "higher", "neither"]
ARROWS: Mapping[str, str] = {"lower": " ↓", "higher": " ↑", "neither": ""}
_DEFINES = ("k", "subset_size", "subsets")
"""Entries of ``about`` that say which metric it is; values that differ in them are in different columns."""
_MANY = 12
"""Longest list that is spelt out."""
_LONG = 300


class Datum(NamedTuple):
    """One value: its number, where it lies with 95 % confidence (None: unknown), its text and the small print."""

    value: float
    interval: tuple[float, float] | None
    text: str
    small: str = ""


@dataclass(frozen=True)
class Column:
    """One metric under one protocol, a value per line of the table.

    Attributes:
        name: Of the metric.
        better: Which way is good.
        data: Of every line; None: not measured.
        marks: Of every line.
        floors: The different values of the floor, in rising order; none if it was not measured.
    """

    name: str
    better: Better
    data: Sequence[Datum | None]
    marks: Sequence[Mark]
    floors: Sequence[float]

    @property
    def head(self) -> str:
        """Name and direction."""
        return self.name + ARROWS[self.better]

    @property
    def floor(self) -> str:
        """The floor as text."""
        return " to ".join(dict.fromkeys(number(x) for x in (*self.floors[:1], *self.floors[-1:]))) or "-"

    @property
    def sure(self) -> bool:
        """Whether every value's uncertainty is known, so that "no tie" means something."""
        return all(datum is None or datum.interval is not None for datum in self.data)


@dataclass(frozen=True)
class Line:
    """A row of a table: one evaluation. ``run`` is the place of its run on the page."""

    run: int
    title: str
    told: str
    sampled: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Comparison:
    """Evaluations under one protocol, side by side.

    Attributes:
        title: Extractor and numbers of images.
        lines: One per evaluation.
        columns: One per metric.
        protocol: What all lines share, in sentences.
        notes: What the marks mean, in sentences.
        warnings: Of the evaluations, each with its run.
    """

    title: str
    lines: Sequence[Line]
    columns: Sequence[Column]
    protocol: Sequence[str]
    notes: Sequence[str]
    warnings: Sequence[str]

    @property
    def samplers_differ(self) -> bool:
        """Whether every line must say how it was sampled."""
        return len({line.sampled for line in self.lines}) > 1

    def verdicts(self) -> list[tuple[int, str]]:
        """Lines that are best in something, and in what; ties apart, with the names of those it ties with."""
        found: dict[int, dict[tuple[str, ...], list[str]]] = {}
        for column in self.columns:
            level = [i for i, mark in enumerate(column.marks) if mark]
            for i in (i for i in level if column.marks[i] == "best"):
                others = tuple(self.label(j) for j in level if j != i)
                found.setdefault(i, {}).setdefault(others, []).append(column.name + "°" * (not column.sure))
        texts = {}
        for i, groups in found.items():
            clear = [f"is best in {', '.join(names)}" for others, names in groups.items() if not others]
            ties = [f"ties with {', '.join(o)} in {', '.join(names)}" for o, names in groups.items() if o]
            texts[i] = "; ".join([*clear, *ties])
        return sorted(texts.items(), key=lambda item: -sum(map(len, found[item[0]].values())))

    def label(self, line: int) -> str:
        """A line's name, with its sampler if it needs that to be told apart."""
        title = self.lines[line].title
        twins = sum(other.title == title for other in self.lines) > 1
        return f"{title}, {self.lines[line].sampled}" if twins and self.lines[line].sampled else title


# -- what may be compared --------------------------------------------------------------------------------


def compare(runs: Sequence[Run], kind: str) -> list[Comparison]:
    """All evaluations of one kind, grouped so that each group's numbers may stand side by side.

    Args:
        runs: As :func:`robustdiff.report.collecting.collect` gives them.
        kind: One of ``collecting.KINDS``.

    Returns:
        One comparison per protocol, those of many runs and metrics first.
    """
    groups: dict[str, list[tuple[int, Evaluation]]] = {}
    for i, run in enumerate(runs):
        for evaluation in run.evaluations:
            if evaluation.kind == kind:
                groups.setdefault(_key(evaluation), []).append((i, evaluation))
    found = [_comparison(runs, members) for members in groups.values()]
    return sorted(found, key=lambda one: (-len({line.run for line in one.lines}), -len(one.columns)))


def _key(evaluation: Evaluation) -> str:
    """Equal for evaluations whose values may be compared."""
    protocol = evaluation.protocol
    extractor, reference, training = (protocol.get(name) or {} for name in ("extractor", "reference", "training"))
    same = [
        # The name may be a path on one machine: where there are weights, their digest says which they are.
        extractor.get("sha256") or extractor.get("name"),
        [extractor.get(name) for name in ("kind", "resize", "settings")],
        [protocol.get(name) for name in ("n_generated", "n_real")],
        [reference.get("sha256") or reference.get("source"), reference.get("split")],
        (training.get("sha256") or training.get("source")) if evaluation.kind == "memorisation" else None,
        [protocol.get("attack"), sampler_words(evaluation)] if evaluation.kind == "attack" else None,
    ]
    return json.dumps(same, sort_keys=True)


def _comparison(runs: Sequence[Run], members: Sequence[tuple[int, Evaluation]]) -> Comparison:
    lines = [Line(i, runs[i].title, e.body.get("told") or "", sampler_words(e), e) for i, e in members]
    keys: dict[tuple[str, str], str] = {}
    for line in lines:
        for name, value in line.evaluation.values.items():
            keys.setdefault((name, _definition(value)), name)
    columns = []
    for (name, definition), _ in keys.items():
        rivals = sum(other == name for other, _ in keys)
        found = [
            value if _definition(value := line.evaluation.values.get(name, {})) == definition else {} for line in lines
        ]
        columns.append(_column(f"{name} ({definition})" if rivals > 1 else name, found))
    warnings = [f"{line.title}: {text}" for line in lines for text in line.evaluation.body.get("warnings", [])]
    return Comparison(
        _title(lines[0].evaluation), lines, columns, _protocol(lines), _notes(columns), list(dict.fromkeys(warnings))
    )


def _definition(value: Mapping[str, Any]) -> str:
    about = value.get("about") or {}
    return ", ".join(
        f"{name.replace('_', ' ')} {words(about[name])}" for name in _DEFINES if about.get(name) is not None
    )


def _column(name: str, values: Sequence[Mapping[str, Any]]) -> Column:
    data = [datum(value) for value in values]
    directions = {value.get("better", "neither") for value in values if value}
    better: Better = directions.pop() if len(directions) == 1 else "neither"
    floors = sorted({float(value["floor"]) for value in values if value.get("floor") is not None})
    return Column(name, better, data, marks(data, better), floors)


def datum(value: Mapping[str, Any]) -> Datum | None:
    """A value of the JSON as it is shown; a standard error stands for an interval of 1.96 times its size.

    Args:
        value: An entry of ``values``, checked; empty for none.
    """
    if value.get("value") is None:
        return None
    mean = float(value["value"])
    error = (value.get("about") or {}).get("standard_error")
    if (interval := value.get("interval")) is not None:
        low, high = map(float, interval)
        return Datum(mean, (low, high), number(mean), f"{number(low)} to {number(high)}")
    if error is not None:
        text, _, small = spread({"mean": mean, "sd": float(error)}).partition(" ± ")
        return Datum(mean, (mean - 1.96 * error, mean + 1.96 * error), text, f"± {small}")
    return Datum(mean, None, number(mean))


def marks(data: Sequence[Datum | None], better: Better) -> list[Mark]:
    """Mark "best", "tie" or "" for each value of a column.

    A tie with the best is a value whose interval meets the best one's, a value without an interval counting as a point.
    A column with one value, or of no judged metric, has no marks.
    """
    judged = [value for value in data if value is not None]
    if better == "neither" or len(judged) < 2:
        return [""] * len(data)
    best = (min if better == "lower" else max)(judged, key=lambda value: value.value)

    def mark(value: Datum | None) -> Mark:
        if value is None:
            return ""
        if value.value == best.value:
            return "best"
        (a, b), (c, d) = (x.interval or (x.value, x.value) for x in (value, best))
        return "tie" if a <= d and c <= b else ""

    return [mark(value) for value in data]


# -- words -----------------------------------------------------------------------------------------------


def sampler_words(evaluation: Evaluation) -> str:
    """How the judged images were drawn; empty if the evaluation does not know."""
    sampler = evaluation.protocol.get("sampler") or {}
    parts = [
        words(sampler["scheduler"]) if sampler.get("scheduler") is not None else "",
        f"{words(sampler['steps'])} steps" if sampler.get("steps") is not None else "",
        "moving average" if sampler.get("ema") is True else "raw weights" if sampler.get("ema") is False else "",
        f"seed {words(sampler['seed'])}" if sampler.get("seed") is not None else "",
    ]
    return ", ".join(filter(None, parts))


def words(value: Any, full: bool = False) -> str:  # noqa: ANN401 - whatever JSON can hold
    """A value of the JSON in words: numbers as they are; long lists counted and long texts cut, unless ``full``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        if len(value) > _MANY and not full:
            return f"{len(value)} entries"
        return ", ".join(words(item, full) for item in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {words(item, full)}" for key, item in value.items()) or "none"
    text = str(value)
    return text if full or len(text) <= _LONG else f"{text[:_LONG]}…"


def count(value: Any) -> str:  # noqa: ANN401 - whatever JSON can hold
    """A count, by thousands; what is no count as it is."""
    return f"{value:,}" if isinstance(value, int) and abs(value) < 10**15 else words(value)


def _title(evaluation: Evaluation) -> str:
    protocol, extractor = evaluation.protocol, evaluation.protocol.get("extractor") or {}
    counts = [protocol.get(name) for name in ("n_generated", "n_real")]
    texts = [words(extractor["name"]) if extractor.get("name") is not None else ""]
    if counts[0] is not None:
        texts.append(
            f"{count(counts[0])} generated" + (f" against {count(counts[1])} real" if counts[1] is not None else "")
        )
    return " · ".join(filter(None, texts)) or evaluation.kind


def _short(digest: object) -> str:
    return f"sha256 {str(digest)[:12]}…" if digest else ""


def _images(about: Mapping[str, Any] | None) -> str:
    about = about or {}
    split = f"split {words(about['split'])}" if about.get("split") is not None else ""
    source = words(about["source"]) if about.get("source") is not None else "images"
    small = ", ".join(filter(None, [split, _short(about.get("sha256"))]))
    return f"{source} ({small})" if small else source


def _protocol(lines: Sequence[Line]) -> list[str]:
    protocol = lines[0].evaluation.protocol
    notes = []
    if extractor := protocol.get("extractor"):
        features = f"{words(extractor['features'])} features" if extractor.get("features") is not None else ""
        resize = f"resize: {words(extractor['resize'])}" if extractor.get("resize") is not None else ""
        kind = words(extractor["kind"]) if extractor.get("kind") not in (None, extractor.get("name")) else ""
        small = ", ".join(filter(None, [kind, features, resize, _short(extractor.get("sha256"))]))
        notes.append(f"Extractor: {words(extractor.get('name'))}{f' ({small})' if small else ''}.")
    if protocol.get("reference"):
        notes.append(f"Real images: {_images(protocol['reference'])}.")
    if protocol.get("training") and lines[0].evaluation.kind == "memorisation":
        notes.append(f"Training images: {_images(protocol['training'])}.")
    samplers = {line.sampled for line in lines}
    if len(samplers) == 1 and lines[0].sampled:
        notes.append(f"Sampled with {lines[0].sampled}.")
    floors = dict.fromkeys(words(text) for line in lines if (text := line.evaluation.protocol.get("floor")))
    if floors:
        notes.append(f"Floor: {'; '.join(floors)}.")
    return notes


def _notes(columns: Sequence[Column]) -> list[str]:
    notes = []
    if any("best" in column.marks for column in columns):
        notes.append("Bold: best of its column.")
    if any("tie" in column.marks for column in columns):
        notes.append("(tie): its 95 % interval meets the best one's.")
    found = [value for column in columns for value in column.data if value]
    if any(value.small.startswith("±") for value in found):
        notes.append("±: standard error; the interval is 1.96 times as wide on either side.")
    if any(value.small and not value.small.startswith("±") for value in found):
        notes.append("Small: 95 % interval.")
    if any(not column.sure and "best" in column.marks for column in columns):
        notes.append("°: no interval is known for some value, so a small lead may be chance.")
    return notes


# -- settings --------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One setting of every run, as text; None where a run does not have it."""

    where: str
    name: str
    values: Sequence[str | None]

    @property
    def differs(self) -> bool:
        """Whether two runs disagree."""
        return len(set(self.values)) > 1


_PLACES = {"settings": "flag", "plan": "plan", "versions": "version", "data": "data", "": "other"}
_NOT_SETTINGS = {("flag", "output_dir")}  # differs always, and is said already


def settings(runs: Sequence[Run]) -> list[Setting]:
    """Every entry of ``config.json`` and ``data.json``, by run; what is null or not there is None.

    Null and not there are the same: a flag of a later version was not set in an earlier one either.
    """
    flat = [_flat(run) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    return [Setting(*key, [values.get(key) for values in flat]) for key in keys if key not in _NOT_SETTINGS]


def _flat(run: Run) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for group, value in run.config.items():
        place = _PLACES.get(group, "other")
        entries: Iterable[tuple[str, Any]] = value.items() if isinstance(value, dict) else [(group, value)]
        found.update({(place, name): words(item) for name, item in entries if item is not None})
    for group, value in run.data.items():
        entries = value.items() if isinstance(value, dict) else [(group, value)]
        found.update({("data", name): words(item) for name, item in entries if item is not None})
    return found
