"""Every file of a set in a row, unreadable ones too: for spreadsheets, data frames and scripts."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustdiff.audit.overview import CLEAN, DOUBT, UNCOMPARED, UNREADABLE, Overview

FORMAT = "robustdiff audit report 1"
DECISIONS = {CLEAN: "clean", DOUBT: "in-doubt", UNCOMPARED: "not-compared", UNREADABLE: "unreadable"}
"""Of files that no kind of damage was found of; of the others, the word of :class:`Action`."""
FIRST = ("name", "decision", "kind", "groups", "probability", "strength", "min_sigma", "weight", "noise_std")
"""Columns that come first; ``probability`` is the sign ``damaged``."""
LAST = ("width", "height", "channels", "mean", "std", "noise_estimate", "sha256", "flags", "reason")
"""Columns of every file, which need no audit."""


def file_rows(overview: Overview) -> list[dict[str, Any]]:
    """One row for each file, of the same columns: readable ones in their order, then the others; None for no value.

    ``kind`` is the line of the overview that counts it, ``groups`` names every kind that was found of it. Numbers are
    those of :meth:`AuditResult.to_rows` and :class:`ImageRecord`; ``reason`` says why a file cannot be read.
    """
    result = overview.result
    done: dict[str, str] = {}
    for one in result.findings if result is not None else ():
        words = [action.value for action in (one.action, one.otherwise) if action is not None]
        done[one.kind] = ";".join(dict.fromkeys(filter(None, [*done.get(one.kind, "").split(";"), *words])))
    found = result.to_rows() if result is not None else [{"groups": ()}] * len(overview.statistics.records)
    rows = []
    for record, kind, known in zip(overview.statistics.records, overview.line_of, found, strict=True):
        height, width = record.size
        rows.append(
            {
                **{key: _value(value) for key, value in known.items()},
                "probability": _value(known.get("damaged")),
                "name": record.name,
                "decision": DECISIONS.get(kind, done.get(kind, "")),
                "kind": kind,
                "width": width,
                "height": height,
                "channels": len(record.mean),
                "mean": list(record.mean),
                "std": list(record.std),
                "noise_estimate": record.noise,
                "sha256": record.sha256,
                "flags": list(record.flags),
            }
        )
    for name, why in overview.statistics.unreadable:
        rows.append({"name": name, "decision": DECISIONS[UNREADABLE], "kind": UNREADABLE, "groups": [], "reason": why})
    others = [key for row in rows for key in row if key not in (*FIRST, *LAST, "damaged")]
    columns = dict.fromkeys([*FIRST, *others, *LAST])
    return [{key: row.get(key) for key in columns} for row in rows]


def _value(value: Any) -> Any:  # noqa: ANN401 - whatever a row holds
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def report(overview: Overview) -> dict[str, Any]:
    """Everything of an audit, JSON-ready; ``images`` are :func:`file_rows`."""
    result, names = overview.result, [record.name for record in overview.statistics.records]
    copies = [] if result is None else [[names[place] for place in group] for group in result.copies]
    return {
        "format": FORMAT,
        "source": overview.statistics.data,
        **overview.as_json(),
        "found": None if result is None else {**result.describe(), "copies": copies},
        "statistics": overview.statistics.summary(),
        "images": file_rows(overview),
    }


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line for each file after the names of the columns; several values in a cell are parted by ``;``."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else FIRST)
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, list):
        return ";".join(str(_cell(one)) for one in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The same with its types, where pyarrow is installed; otherwise nothing."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:  # csv holds as much
        return
    columns = {}
    for key in rows[0] if rows else ():
        values = [_text(row[key]) for row in rows]
        empty = all(value is None for value in values)
        columns[key] = pyarrow.array(values, pyarrow.float64() if empty else None)
    parquet.write_table(pyarrow.table(columns), path)


def _text(value: Any) -> Any:  # noqa: ANN401
    """Names may hold bytes that are no text."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
