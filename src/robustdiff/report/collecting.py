"""Run folders as ``robustdiff report`` reads them: settings, curves, pictures and evaluations, checked on the way in.

Everything but the folder itself is optional, and one file at least must be there. What is damaged stops the report in
one line that names the file, because a page that leaves a run's number out in silence would mislead; what is only not
known here (a kind of evaluation of a later version, a picture cut off by a crash) is told on the page.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from robustdiff.audit.files import SHEETS
from robustdiff.report.checks import are_numbers, is_count, is_number, wrong_attack
from robustdiff.utils.atomic_io import one_line, read_json
from robustdiff.utils.errors import UsageError

FORMAT = "robustdiff evaluation 1"
KINDS = ("quality", "memorisation", "few-step", "attack")
"""Kinds of evaluation that the page shows."""
BETTER = ("lower", "higher", "neither")
METRICS = (
    "denoising",
    "equivariance",
    "loss",
    "gradient_norm",
    "radius",
    "regularised",
    "learning_rate",
    "images_per_second",
)
"""What the page draws of ``metrics.jsonl``."""
BEST = "best.json"
"""Which evaluation during training was best: no result of its own, the curve of ``during.jsonl`` shows it."""
STAGES = 6
"""Preview grids shown per run: the last, and earlier ones evenly spread."""


@dataclass(frozen=True)
class Picture:
    """A PNG file: where it lies, its bytes, its size in pixels."""

    path: Path
    content: bytes = field(repr=False)
    width: int
    height: int


@dataclass(frozen=True)
class Evaluation:
    """One file of ``evaluation/``: its checked content, and the sheets that it names."""

    path: Path
    kind: str
    body: Mapping[str, Any]
    sheets: Mapping[str, Picture]

    @property
    def values(self) -> Mapping[str, Mapping[str, Any]]:
        """Metrics by name."""
        values: Mapping[str, Mapping[str, Any]] = self.body["values"]
        return values

    @property
    def protocol(self) -> Mapping[str, Any]:
        """What the numbers rest on."""
        protocol: Mapping[str, Any] = self.body["protocol"]
        return protocol

    @property
    def details(self) -> Mapping[str, Any]:
        """Histogram, pairs, curves: by kind."""
        details: Mapping[str, Any] = self.body.get("details") or {}
        return details


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: Where it lies.
        title: Its name on the page, different from every other run's.
        told: What the method knew beside its training data; None if no evaluation says it.
        config: ``config.json``, empty without.
        data: ``data.json``, empty without.
        metrics: Lines of ``metrics.jsonl``.
        during: Lines of ``evaluation/during.jsonl``.
        samples: Preview grids by step, at most :data:`STAGES`, the last one last.
        training: ``evaluation/training.png``.
        found: What ``auto`` or ``robustdiff audit`` found, empty without; found_sheets: its contact sheets, by kind.
        evaluations: Of the kinds in :data:`KINDS`, by file name.
        not_shown: In words, what lies there and is not on the page.
    """

    folder: Path
    title: str
    told: str | None
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    during: Sequence[Mapping[str, Any]]
    samples: Sequence[tuple[int, Picture]]
    training: Picture | None
    found: Mapping[str, Any]
    found_sheets: Mapping[str, Picture]
    evaluations: Sequence[Evaluation]
    not_shown: Sequence[str]


def collect(folders: Iterable[str | Path]) -> list[Run]:
    """Read run folders.

    Args:
        folders: Written by ``robustdiff train``, ``evaluate`` or ``audit``; one named twice counts once.

    Returns:
        One :class:`Run` per folder, in the given order.

    Raises:
        UsageError: In one line that names the folder or the file and says what to do.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        paths.setdefault(Path(folder).resolve(), Path(folder))
    if not paths:
        raise UsageError("`folders` is empty: name at least one run folder")
    runs = [_read(folder) for folder in paths.values()]
    titles = _titles(runs)
    return [Run(**{**vars(run), "title": title}) for run, title in zip(runs, titles, strict=True)]


def _titles(runs: Sequence[Run]) -> list[str]:
    """Every run's title; where two are the same, with as much of the folder's path as tells them apart."""
    found = []
    for run in runs:
        rivals = [other for other in runs if other is not run and other.title == run.title]
        parts, depth = run.folder.resolve().parts, 1
        while any(other.folder.resolve().parts[-depth:] == parts[-depth:] for other in rivals):
            depth += 1
        tail = "/".join(parts[-depth:]).replace("//", "/")
        found.append(run.title if not rivals else tail if tail.endswith(run.title) else f"{run.title} ({tail})")
    return found


def _read(folder: Path) -> Run:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name run folders, as `robustdiff train` makes them")
    config, data = (_json(folder / name) for name in ("config.json", "data.json"))
    metrics = _lines(folder / "metrics.jsonl", _wrong_metrics)
    during = _lines(folder / "evaluation" / "during.jsonl", _wrong_during)
    missing: list[str] = []
    evaluations = []
    for path in sorted((folder / "evaluation").glob("*.json")):
        if path.name == BEST:
            continue
        if (evaluation := _evaluation(path, missing)) is not None:
            evaluations.append(evaluation)
    samples = _samples(folder / "samples", missing)
    training = _optional_picture(folder / "evaluation" / "training.png", missing)
    found = _found(folder, data)
    sheets = {kind: _optional_picture(folder / f"found-{kind}.png", missing) for kind in SHEETS if found}
    if not (config or data or metrics or during or evaluations or samples or training or found or missing):
        raise UsageError(f"{folder} holds nothing to report: no training run, evaluation or audit; name a run folder")
    titles = dict.fromkeys(evaluation.body["title"] for evaluation in evaluations)
    told = dict.fromkeys(text for evaluation in evaluations if (text := evaluation.body.get("told")))
    return Run(
        folder=folder,
        title=next(iter(titles)) if len(titles) == 1 else folder.resolve().name or str(folder.resolve()),
        told="; ".join(told) or None,
        config=config,
        data=data,
        metrics=metrics,
        during=during,
        samples=samples,
        training=training,
        found=found,
        found_sheets={kind: picture for kind, picture in sheets.items() if picture is not None},
        evaluations=evaluations,
        not_shown=missing,
    )


def _found(folder: Path, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was found in the training images, by a run or an audit; empty without."""
    audit = folder / "found.json"
    found, where = (data["auto"], folder / "data.json") if data.get("auto") is not None else (_json(audit), audit)
    if found and (reason := _wrong_found(found)):
        raise UsageError(f"{where}, what was found: {reason}; mend or delete it")
    return found or {}


def _wrong_found(found: object) -> str:
    if not isinstance(found, dict) or not all(is_count(found.get(name)) for name in ("count", "clean")):
        return "it has no counts of images"
    if not isinstance(found.get("findings"), list):
        return "it has no list of findings"
    for one in found["findings"]:
        if not isinstance(one, dict) or not is_count(one.get("count")):
            return "a finding has no count of images"
        if not all(isinstance(one.get(name), str) for name in ("part", "what", "action")):
            return "a finding is not told in words"
    return ""


# -- JSON ------------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    """An object, or an empty one if the file is not there."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}; mend or delete it") from None


def _lines(path: Path, wrong: Callable[[object], str]) -> list[dict[str, Any]]:
    """One object per line; a last line without its end was cut off, or is being written, and is left out."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().decode().split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}; mend or delete it") from None
    found: list[dict[str, Any]] = []
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {i} is not JSON ({one_line(error)}): mend or delete it") from None
        if reason := wrong(record):
            raise UsageError(f"{path}, line {i}: {reason}; mend or delete it")
        found.append(record)
    return found


def _wrong_metrics(record: object) -> str:
    if not isinstance(record, dict):
        return "not a JSON object"
    if not is_count(record.get("images", record.get("step"))):
        return "it has no count of images"
    bad = [name for name in METRICS if not (record.get(name) is None or is_number(record[name]))]
    return f"{bad[0]!r:.40} is not a number" if bad else ""


def _wrong_during(record: object) -> str:
    if not isinstance(record, dict):
        return "not a JSON object"
    if not is_count(record.get("images", record.get("step"))):
        return "it has no count of images"
    return _wrong_values(record.get("values"))


def _evaluation(path: Path, missing: list[str]) -> Evaluation | None:
    """The file, or None and a word in ``missing`` if the page does not know what it is."""
    body = _json(path)
    if body.get("format") != FORMAT:
        missing.append(f"{path.name} (format {body.get('format')!r:.60}, not {FORMAT!r})")
        return None
    if body.get("kind") not in KINDS:
        missing.append(f"{path.name} (kind {body.get('kind')!r:.60})")
        return None
    if reason := _wrong(body):
        raise UsageError(f"{path} is not an evaluation: {reason}; delete it and evaluate again")
    sheets = {}
    for name, file in body.get("sheets", {}).items():
        if (picture := _optional_picture(path.parent / file, missing, needed=True)) is not None:
            sheets[name] = picture
    return Evaluation(path, body["kind"], body, sheets)


def _wrong(body: Mapping[str, Any]) -> str:
    """What keeps this from being an evaluation that can be shown, or an empty text."""
    if not isinstance(body.get("title"), str) or not body["title"].strip():
        return "it has no title"
    if not isinstance(body.get("told"), (str, type(None))):
        return "'told' is not a text"
    protocol = body.get("protocol")
    if not isinstance(protocol, dict):
        return "it has no protocol"
    for name in ("extractor", "generated", "reference", "training", "sampler", "attack", "quality"):
        if not isinstance(protocol.get(name), (dict, type(None))):
            return f"protocol[{name!r}] is not an object"
    for name, kind, text in (
        ("details", dict, "an object"),
        ("sheets", dict, "an object"),
        ("warnings", list, "a list"),
    ):
        if not isinstance(body.get(name, kind()), kind):
            return f"{name!r} is not {text}"
    if not all(isinstance(text, str) for text in body.get("warnings", [])):
        return "a warning is not a text"
    for name, file in body.get("sheets", {}).items():
        # The page embeds what is named here: nothing outside this folder may slip in.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+", file) or file in (".", ".."):
            return f"sheets[{name!r:.40}] is not the name of a file beside it"
    details = body.get("details", {})
    wrong = _wrong_values(body.get("values")) or _wrong_details(details)
    return wrong or (wrong_attack(details) if body["kind"] == "attack" else "")


def _wrong_values(values: object) -> str:
    if not isinstance(values, dict):
        return "it has no values"
    for name, value in values.items():
        where = f"values[{name!r:.60}]"
        if not isinstance(value, dict):
            return f"{where} is not an object"
        for key in ("value", "floor"):
            if not (value.get(key) is None or is_number(value[key])):
                return f"{where}[{key!r}] is not a number"
        if value.get("better", "neither") not in BETTER:
            return f"{where}['better'] is {value['better']!r:.40}, not one of {', '.join(BETTER)}"
        interval = value.get("interval")
        if interval is not None and not (are_numbers(interval, 2) and interval[0] <= interval[1]):
            return f"{where}['interval'] is not two numbers, the lower one first"
        if not isinstance(about := value.get("about", {}), dict):
            return f"{where}['about'] is not an object"
        error = about.get("standard_error")
        if error is not None and not (is_number(error) and error >= 0):
            return f"{where}['about']['standard_error'] is not a number >= 0"
    return ""


def _wrong_details(details: Mapping[str, Any]) -> str:
    """Only what is drawn is looked at."""
    histogram = details.get("histogram")
    if histogram is not None:
        edges: Any = histogram.get("edges") if isinstance(histogram, dict) else None
        if not are_numbers(edges) or len(edges) < 2 or any(b <= a for a, b in pairwise(edges)):
            return "details['histogram'] has no rising edges"
        for name in ("generated", "null"):
            counts = histogram.get(name)
            if (counts is None and name == "null") or (are_numbers(counts, len(edges) - 1) and min(counts) >= 0):
                continue
            return f"details['histogram'][{name!r}] is not one count per bin"
    for name in ("pairs", "copied"):
        rows = details.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 for row in rows):
            return f"details[{name!r}] is not a list of triples"
    curves = details.get("curves", [])
    if not isinstance(curves, list):
        return "details['curves'] is not a list"
    for i, curve in enumerate(curves):
        where = f"details['curves'][{i}]"
        if not isinstance(curve, dict) or not isinstance(curve.get("scheduler"), str):
            return f"{where} has no scheduler"
        if not are_numbers(steps := curve.get("steps")) or not steps or min(steps) <= 0:
            return f"{where} has no counts of steps"
        if not isinstance(curve.get("values"), dict):
            return f"{where} has no values"
        for name, column in curve["values"].items():
            good = isinstance(column, list) and len(column) == len(steps)
            if not good or not all(value is None or is_number(value) for value in column):
                return f"{where}['values'][{name!r:.60}] is not one number per count of steps"
        if not isinstance(curve.get("timesteps", []), list):
            return f"{where}['timesteps'] is not a list"
    return ""


# -- pictures --------------------------------------------------------------------------------------------


def _optional_picture(path: Path, missing: list[str], needed: bool = False) -> Picture | None:
    """The picture; None if it is not there, or with a word in ``missing`` if it is needed or damaged."""
    if not path.exists():
        if needed:
            missing.append(f"{path.name} (the file is missing)")
        return None
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            image.load()  # to the last byte: a browser shows half a picture without a word
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        missing.append(f"{path.name} (not a whole PNG: {one_line(error)})")
        return None
    return Picture(path, content, width, height)


def _samples(folder: Path, missing: list[str]) -> list[tuple[int, Picture]]:
    """The last preview grid, and earlier ones evenly spread, by step."""
    steps = sorted((int(found[1]), path) for path in folder.glob("*.png") if (found := _STEP.fullmatch(path.name)))
    if len(steps) > STAGES:
        steps = [steps[round(i * (len(steps) - 1) / (STAGES - 1))] for i in range(STAGES)]
    pictures = [(step, _optional_picture(path, missing)) for step, path in steps]
    return [(step, picture) for step, picture in pictures if picture is not None]


_STEP = re.compile(r"step-(\d{1,18})\.png", re.ASCII)
