"""Results as tables in markdown, and as one HTML page that needs nothing else.

Reading order: ``results.py`` reads rows and judges numbers. A cell is mean and standard deviation over the seeds.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.paper.results import (
    LINEAR,
    MEASURES,
    YARDSTICKS,
    Row,
    dirt_rank,
    load,
    main_of,
    marks,
    measure,
    method_rank,
    place_of,
)
from experiments.paper.toy_grid import MAIN
from robustdiff.report.numbers import number, spread
from robustdiff.utils.pages import template

__all__ = ["MAIN", "MEASURES", "Row", "detail", "frontier_table", "load", "page", "table"]

# -- tables ----------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A text, its mark ("best", "tie" or ""), and whether it rests on one seed."""

    text: str
    mark: str = ""
    single: bool = False


@dataclass(frozen=True)
class Grid:
    """A table, before it is markdown or HTML. The first ``words`` columns are text, the others numbers."""

    header: list[str]
    rows: list[list[Cell]]
    words: int
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """As a pipe table with its footnotes; ends with a newline."""
        lines = [[_escape(text) for text in self.header]]
        lines.append([":--"] * self.words + ["--:"] * (len(self.header) - self.words))
        for row in self.rows:
            cells = [f"**{_escape(c.text)}**" if c.mark == "best" else _escape(c.text) for c in row]
            cells = [t + " (tie)" * (c.mark == "tie") + " ¹" * c.single for t, c in zip(cells, row, strict=True)]
            lines.append(cells)
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([text, *([" ".join(map(_escape, self.notes))] if self.notes else [])]) + "\n"


def _escape(text: str) -> str:
    return re.sub(r"([|<*])", r"\\\1", " ".join(text.split()))


def _head(key: str) -> str:
    """Name, unit and direction of a measure."""
    name, unit, better = measure(key)
    arrow = {True: " ↑", False: " ↓", "one": "", None: ""}[better]
    return f"{name}{f' ({unit})' if unit else ''}{arrow}"


def _at(rows: Iterable[Row], place: str, dirt: str | None = None, swept: bool = False) -> list[Row]:
    """Rows of a place (and dirt): those of the frontier sweep, or all others."""
    rows = list(rows)
    known = sorted({place_of(row) for row in rows})
    if place not in known:
        raise ValueError(f"no rows of {place!r}: there are {', '.join(known)}")
    found = [row for row in rows if place_of(row) == place and (row.get("family") is not None) == swept]
    if dirt is not None:
        found = [row for row in found if row.get("dirt") == dirt]
    if not found:
        raise ValueError(f"no rows of {' '.join(filter(None, [place, dirt, 'in the sweep' if swept else '']))!r}")
    return sorted(found, key=method_rank)


def _floor(rows: Sequence[Row], key: str) -> Mapping[str, Any] | None:
    """Of the row with most seeds: they are nested, so it is the best known."""
    floors = [row for row in rows if key in row["floor"]]
    return max(floors, key=lambda row: len(row["seeds"]))["floor"][key] if floors else None


def _notes(grid: Sequence[Sequence[Cell]], rows: Sequence[Row], floor: bool) -> list[str]:
    """Footnotes for what the table shows."""
    cells = [cell for line in grid for cell in line]
    notes = ["First row: the floor, real against real with the same n."] if floor else []
    if any(cell.mark for cell in cells):
        notes.append("Bold: best of its column.")
    ties = any(cell.mark == "tie" for cell in cells)
    if ties:
        notes.append("(tie): differs from the best by no more than the larger standard deviation of the two.")
    if any(cell.single for cell in cells):
        notes.append("¹ one seed" + ("; in ties it counts with the largest deviation of its column." if ties else "."))
    told = {row["title"] for row in rows if row.get("method") in YARDSTICKS}
    return notes + [f"Told which data are clean, so not compared: {', '.join(sorted(told))}."] * bool(told)


def _columns(lines: Sequence[tuple[list[Cell], Sequence[Row | None]]], keys: Sequence[str]) -> list[list[Cell]]:
    """Each line's texts, and its cells: key j of row j, marked within the column."""
    grid = [list(texts) for texts, _ in lines]
    for j, key in enumerate(keys):
        here = [line[j] for _, line in lines]
        values = [row["values"].get(key) if row else None for row in here]
        judged = [v if r and r.get("method") not in YARDSTICKS else None for v, r in zip(values, here, strict=True)]
        found = marks(judged, measure(key).higher_is_better)
        for texts, value, mark in zip(grid, values, found, strict=True):
            texts.append(Cell(spread(value), mark, value.get("sd") is None) if value else Cell("-"))
    return grid


def _floor_line(floors: Sequence[Mapping[str, Any] | None], words: int) -> list[Cell]:
    blanks = [Cell("")] * (words - 1)
    return [Cell("floor"), *blanks, *(Cell(spread(f), single=f.get("sd") is None) if f else Cell("-") for f in floors)]


def table_grid(rows: Sequence[Row], place: str) -> Grid:
    """Methods by dirt, in the main measure; or the closed forms, if the place is ``linear-gaussian``."""
    found = _at(rows, place)
    if place == LINEAR:
        keys = ("predicted", "measured", "relative_error")
        lines = [[Cell(r["claim"]), Cell(r["title"]), *(_plain(r["values"].get(key)) for key in keys)] for r in found]
        return Grid(["claim", "what", *map(_head, keys)], lines, 2)
    key = main_of(found[0])
    dirts = sorted(dict.fromkeys(row["dirt"] for row in found), key=dirt_rank)
    by_method: dict[str, dict[str, Row]] = {}
    for row in found:
        by_method.setdefault(row["method"], {})[row["dirt"]] = row
    lines_of = []
    for members in by_method.values():
        counts = [str(len(members[dirt]["seeds"])) if dirt in members else "-" for dirt in dirts]
        present = {count for count in counts if count != "-"}
        seeds = present.pop() if len(present) == 1 else "/".join(counts)
        first = next(iter(members.values()))
        lines_of.append(([Cell(first["title"]), Cell(first["told"]), Cell(seeds)], [members.get(d) for d in dirts]))
    floors = [_floor([r for r in found if r["dirt"] == dirt], key) for dirt in dirts]
    grid = [_floor_line(floors, 3), *_columns(lines_of, [key] * len(dirts))]
    header = ["method", "told", "seeds", *(f"{dirt}: {_head(key)}" for dirt in dirts)]
    return Grid(header, grid, 3, _notes(grid, found, True))


def _plain(value: Mapping[str, Any] | None) -> Cell:
    return Cell(spread(value) if value else "-")


def detail_grid(rows: Sequence[Row], place: str, dirt: str) -> Grid:
    """Methods by measure, for one kind of dirt; or every case of one claim of ``linear-gaussian``."""
    if place == LINEAR:
        return _cases(_at(rows, place), dirt)
    found = _at(rows, place, dirt)
    there = dict.fromkeys(key for row in found for key in row["values"])
    keys = [key for key in MEASURES if key in there] + [key for key in there if key not in MEASURES]
    keys.sort(key=lambda key: key != main_of(found[0]))  # the main measure first, the others as they were
    grid = [_floor_line([_floor(found, key) for key in keys], 1)]
    grid += _columns([([Cell(row["title"])], [row] * len(keys)) for row in found], keys)
    return Grid(["method", *map(_head, keys)], grid, 1, _notes(grid, found, True))


def _cases(rows: Sequence[Row], claim: str) -> Grid:
    """Every case of a claim: means over its numbers, and the root mean square of their relative errors."""
    curves = next((row["curves"] for row in rows if row["claim"] == claim), None)
    if curves is None:
        raise ValueError(f"no claim {claim!r}: there are {', '.join(row['claim'] for row in rows)}")
    lines = []
    for case in [key.removesuffix(": predicted") for key in curves if key.endswith(": predicted")]:
        predicted, measured = curves[f"{case}: predicted"], curves.get(f"{case}: measured", [])
        pairs = list(zip(predicted, measured, strict=True))
        error = math.sqrt(sum((b / a - 1) ** 2 for a, b in pairs) / len(pairs)) if all(predicted) else math.nan
        numbers = (sum(predicted) / len(pairs), sum(measured) / len(pairs), error)
        lines.append([Cell(case), Cell(str(len(pairs))), *(Cell(number(x)) for x in numbers)])
    return Grid(["case", "numbers", "predicted, mean", "measured, mean", "relative error, rms"], lines, 1)


def frontier_grid(rows: Sequence[Row], place: str, dirt: str) -> Grid:
    """The sweep of strengths, and the other methods beside it: price on clean data against error on dirty data."""
    dirty = _at(rows, place, dirt, swept=True) + _at(rows, place, dirt)
    key = main_of(dirty[0])
    clean = {row["method"]: row for row in rows if place_of(row) == place and row["dirt"] == "clean"}
    # On clean data, training on the clean part is plain training.
    partner = {row["method"]: clean.get("plain" if row["method"] in YARDSTICKS else row["method"]) for row in dirty}
    pairs = [(on_clean, row) for row in dirty if (on_clean := partner[row["method"]])]
    at = [tuple(row["values"][key]["mean"] for row in pair) for pair in pairs]
    rivals = [x for x, (_, row) in zip(at, pairs, strict=True) if row["method"] not in YARDSTICKS]
    lines = []
    for here, pair in zip(at, pairs, strict=True):
        row = pair[1]
        beaten = any(rival != here and rival[0] <= here[0] and rival[1] <= here[1] for rival in rivals)
        mark = "" if beaten or row["method"] in YARDSTICKS else "best"
        cells = [Cell(spread(v := r["values"][key]), single=v.get("sd") is None) for r in pair]
        lines.append([Cell(row["family"] or "-"), Cell(row["title"], mark), *cells])
    floors = [_floor([pair[i] for pair in pairs], key) for i in (0, 1)]
    grid = [_floor_line(floors, 2), *lines]
    notes = [note for note in _notes(grid, [], True) if not note.startswith("Bold")]
    notes = [*notes, "Bold: no other row is at least as good in both columns."]
    return Grid(["family", "method", f"clean: {_head(key)}", f"{dirt}: {_head(key)}"], grid, 2, notes)


def table(rows: Sequence[Row], world: str) -> str:
    """Methods by dirt, in the world's main measure, in markdown.

    Args:
        rows: As :func:`load` gives them.
        world: A world, ``invariance-WORLD``, or ``linear-gaussian``.

    Raises:
        ValueError: If there are no such rows.
    """
    return table_grid(rows, world).markdown()


def detail(rows: Sequence[Row], world: str, dirt: str) -> str:
    """Every measure for one kind of dirt, in markdown; see :func:`table`."""
    return detail_grid(rows, world, dirt).markdown()


def frontier_table(rows: Sequence[Row], world: str, dirt: str) -> str:
    """The sweep of strengths: error on clean data beside error on dirty data, in markdown; see :func:`table`."""
    return frontier_grid(rows, world, dirt).markdown()


# -- page ------------------------------------------------------------------------------------------------


def page(
    rows: Sequence[Row], figures: Sequence[Path], title: str, notes: Sequence[str] = (), results: str = "results"
) -> str:
    """One HTML file with everything in it: tables, figures, and behind each number what it rests on.

    Args:
        rows: As :func:`load` gives them.
        figures: PNG files; their names, with spaces for dashes, are their captions.
        title: Of the page.
        notes: Paragraphs below the title.
        results: Where the JSON files lie, relative to the page.

    Raises:
        OSError: If a figure cannot be read.
    """
    pictures = [(path.stem.replace("-", " "), base64.b64encode(path.read_bytes()).decode("ascii")) for path in figures]
    places = [_section(rows, place) for place in dict.fromkeys(map(place_of, rows))]
    return template("experiments.paper", "page.html.jinja").render(
        title=title, notes=notes, places=places, figures=pictures, results=results
    )


def _section(rows: Sequence[Row], place: str) -> dict[str, Any]:
    """What the page shows of one place: the table, the details in fold-outs, and what every row rests on."""
    here = [row for row in rows if place_of(row) == place]
    if place == LINEAR:
        cases = [(f"{row['claim']}: every case", detail_grid(rows, place, row["claim"])) for row in here]
        return {"name": place, "main": table_grid(rows, place), "details": cases, "rows": [_row(row) for row in here]}
    dirts = sorted({row["dirt"] for row in here}, key=dirt_rank)
    plain = {row.get("dirt") for row in here if row.get("family") is None}
    swept = {row.get("dirt") for row in here if row.get("family") is not None}
    has_clean = "clean" in plain | swept
    tables = [(f"{dirt}: every measure", detail_grid(rows, place, dirt)) for dirt in dirts if dirt in plain]
    tables += [
        (f"{dirt}: the frontier", frontier_grid(rows, place, dirt))
        for dirt in dirts
        if dirt in plain & swept and dirt != "clean" and has_clean
    ]
    return {
        "name": place,
        "main": table_grid(rows, place) if None in {row.get("family") for row in here} else None,
        "details": tables,
        "rows": [_row(row) for row in here],
    }


def _row(row: Row) -> dict[str, Any]:
    """The row, and its values and floors as texts."""
    texts = {group: {key: spread(value) for key, value in row[group].items()} for group in ("values", "floor")}
    return {**row, "texts": texts}
