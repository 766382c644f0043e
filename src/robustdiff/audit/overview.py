"""A set at a glance: every file in exactly one line, for a terminal, for a page, for scripts.

A file that several kinds were found of counts in the line of the first. So the counts add up to the number of files.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robustdiff.audit import summary
from robustdiff.audit.comparison import DOUBTED, EXPLAINED, FOUND
from robustdiff.audit.detector import registered_detectors
from robustdiff.audit.finding import Finding, Unasked
from robustdiff.audit.result import AuditResult
from robustdiff.audit.statistics import SetStatistics
from robustdiff.utils.errors import DataError
from robustdiff.utils.words import counted, printable

DOUBT, CLEAN, UNCOMPARED, UNREADABLE = "in doubt", "nothing found", "not compared", "not readable"
"""Lines that are no kind of damage."""
EXAMPLES = 3
"""Names in a line."""
SEVERAL = "damage: not looked for, images differ in size: add `resolution` N, the size you would train at"
NONE_READ = "damage: not looked for, no image can be read"


@dataclass(frozen=True)
class Line:
    """Files of one kind.

    Attributes:
        kind: Name of a kind of damage, or one of the lines that are none.
        count: Files that no earlier line counts.
        shown: Files that it was found of, those of earlier lines among them.
        action: What training does about them, in a few words.
        examples: Names of the worst.
        what: What was found.
        probability: Median, of the images found, of being damaged; None where it was decided by a rule of its own.
        told_apart: As in :class:`Finding`.
        apart: By how many deviations they stand apart, if that was measured.
        proof: The sentence that holds if a classifier cannot tell them from damaged copies of the others; or empty.
    """

    kind: str
    count: int
    shown: int
    action: str
    examples: tuple[str, ...] = ()
    what: str = ""
    probability: float | None = None
    told_apart: float | None = None
    apart: float | None = None
    proof: str = ""

    @property
    def sure(self) -> str:
        """How sure it is, in a few words."""
        texts = [] if self.probability is None else [percent(self.probability)]
        if self.told_apart is not None:
            texts.append("just what the others become" if self.proof else "not quite what the others become")
        if self.apart is not None:
            texts.append(f"apart by {self.apart:.1f} deviations")
        return ", ".join(texts) or "-"


@dataclass(frozen=True, eq=False)
class Overview:
    """What was found of all files of a set.

    Attributes:
        statistics: Of every file.
        result: Of every readable image; None if there was no audit.
    """

    statistics: SetStatistics
    result: AuditResult | None = None

    def __post_init__(self) -> None:
        """Refuse what is of other files.

        Raises:
            DataError: If some have come or gone in between.
        """
        if self.result is not None and tuple(self.result.names) != tuple(one.name for one in self.statistics.records):
            raise DataError(f"{self.statistics.data}: files came or went while they were looked at; look again")

    # -- which line a file is in ---------------------------------------------------------------------------

    @property
    def kinds(self) -> list[str]:
        """What was found, in the order of the findings."""
        if self.result is None:
            return []
        said = [one.kind for one in self.result.findings if one.kind in self.result.groups]
        return list(dict.fromkeys([*said, *self.result.groups]))

    @cached_property
    def line_of(self) -> tuple[str, ...]:
        """The line that each readable image counts in."""
        if self.result is None:
            return (UNCOMPARED,) * len(self.statistics.records)
        used = (self.result.min_sigma == 0) & (self.result.weight == 1)
        clean = UNCOMPARED if summary.blind(self.result) else CLEAN
        names = [clean if one else DOUBT for one in used.tolist()]
        for kind in reversed(self.kinds):
            for place in self.result.groups[kind].nonzero().flatten().tolist():
                names[place] = kind
        return tuple(names)

    def worst_first(self, places: Sequence[int], kind: str) -> list[int]:
        """Images of a line by how little they are used for its sake, and how damaged they look; copies side by side."""
        result = self.result
        if result is None:
            return list(places)
        damaged = result.signs.get("damaged", torch.zeros(len(result))).nan_to_num().tolist()
        weight, least = result.weight.tolist(), result.min_sigma.tolist()
        copies = {place: number for number, group in enumerate(result.copies) for place in group}
        together, weighed = all(place in copies for place in places), not self.decided_by_comparison(kind)

        def key(place: int) -> tuple[float, ...]:
            beside, light = copies[place] if together else 0, weight[place] if weighed else 0
            return (beside, light, -least[place], -damaged[place], place)

        return sorted(places, key=key)

    def decided_by_comparison(self, kind: str) -> bool:
        """Whether the images of a kind were found by comparing them with damaged copies."""
        if self.result is None or "damaged" not in self.result.signs or kind not in self.result.groups:
            return False
        shown = self.result.signs["damaged"][self.result.groups[kind]]
        return kind in become() and bool((shown >= FOUND).all())

    @cached_property
    def suspected(self) -> dict[str, list[int]]:
        """Images that look damaged, by a kind that was not believed of the set; they count as clean.

        The likeliest first.
        """
        if self.result is None or not self.result.looks_like:
            return {}
        damaged = self.result.signs["damaged"].tolist()
        found: dict[str, list[int]] = {}
        for place, (line, kind) in enumerate(zip(self.line_of, self.result.looks_like, strict=True)):
            if line == CLEAN and kind not in self.result.groups and damaged[place] >= DOUBTED:
                found.setdefault(kind, []).append(place)
        return {kind: sorted(places, key=lambda place: -damaged[place]) for kind, places in found.items()}

    # -- the lines -----------------------------------------------------------------------------------------

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """In the order in which they are shown; their counts add up to :attr:`files`."""
        counts = Counter(self.line_of)
        lines = [self._line(kind, counts[kind]) for kind in self.kinds]
        if counts[DOUBT] and self.result is not None:
            places = [place for place, name in enumerate(self.line_of) if name == DOUBT]
            probability = None
            if "damaged" in self.result.signs:
                probability = float(self.result.signs["damaged"][places].median())
            done, names = "trained above lower noise levels", self._names(places, DOUBT)
            lines.append(Line(DOUBT, counts[DOUBT], counts[DOUBT], done, names, probability=probability))
        for kind in (CLEAN, UNCOMPARED):
            if counts[kind]:
                done = self._trained_as_clean()
                places = [place for place, name in enumerate(self.line_of) if name == kind]
                lines.append(Line(kind, counts[kind], counts[kind], done, self._names(places, kind)))
        if bad := self.statistics.unreadable:
            names = tuple(name for name, _ in bad[:EXAMPLES])
            reasons = Counter(reason for _, reason in bad)
            what = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
            lines.append(Line(UNREADABLE, len(bad), len(bad), "left out", names, what))
        return tuple(lines)

    @property
    def files(self) -> int:
        """How many there are, readable or not."""
        return len(self.statistics.records) + len(self.statistics.unreadable)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the lines leave open, one sentence each."""
        notes = [line.proof for line in self.lines if line.proof]
        if overlaps := self._overlaps():
            notes.append(f"found of several kinds, and counted in the first: {overlaps}")
        for kind, places in self.suspected.items():
            some = counted(len(places), "image")
            notes.append(f"{some} may be {kind}, not surely enough to act on: counted and trained as clean")
        if not self.statistics.records:
            notes.append(NONE_READ)
        elif self.result is None:
            notes.append(SEVERAL)
        else:
            notes += [self._unasked(why) for why in Unasked if why in self.result.unasked.values()]
        if self.result is not None and summary.none_clean(self.result):
            notes.append(f"none clean: {summary.NONE_CLEAN}")
        return tuple(notes)

    def _unasked(self, why: Unasked) -> str:
        assert self.result is not None, "it was asked"
        return f"not looked for: {summary.not_asked(self.result, why)}: images are trained as they are"

    def _line(self, kind: str, count: int) -> Line:
        result = self.result
        assert result is not None, "kinds are those of a result"
        members = result.groups[kind].nonzero().flatten().tolist()
        of = [one for one in result.findings if one.kind == kind]
        told = next((one.told_apart for one in of if one.told_apart is not None), None)
        compared = self.decided_by_comparison(kind)
        mine = [place for place in members if self.line_of[place] == kind]
        return Line(
            kind,
            count,
            len(members),
            summary.briefly(of, result.regularise),
            self._names(mine or members, kind),
            "; ".join(one.what for one in of),
            float(result.signs["damaged"][members].median()) if compared and members else None,
            told,
            next((one.confidence for one in of if one.confidence is not None), None),
            self._proof(kind, members, of) if told is not None and told < EXPLAINED else "",
        )

    def _proof(self, kind: str, members: Sequence[int], of: Sequence[Finding]) -> str:
        assert self.result is not None, "kinds are those of a result"
        read = self.result.signs.get("strength", torch.empty(0))
        middle = float(read[members].nanmedian()) if len(read) else math.nan
        if kind in become() and not math.isnan(middle):
            what = f"what the others become {become()[kind].format(middle)}"
        else:
            what = of[0].what
        return f"{len(members):,} of {len(self.result):,} images are {what}"

    def _names(self, places: Sequence[int], kind: str) -> tuple[str, ...]:
        return tuple(self.statistics.records[place].name for place in self.worst_first(places, kind)[:EXAMPLES])

    def _trained_as_clean(self) -> str:
        if self.result is None:
            return "not decided"
        gate = self.result.regularise
        return "trained at every noise level" if gate is None else f"regularised below noise level {gate[1]:.3g}"

    def _overlaps(self) -> str:
        if self.result is None:
            return ""
        members: Mapping[str, Tensor] = {kind: self.result.groups[kind] for kind in self.kinds}
        several = torch.stack(list(members.values())).sum(0) > 1 if members else torch.zeros(0)
        sets = Counter(
            tuple(kind for kind in members if bool(members[kind][place]))
            for place in several.nonzero().flatten().tolist()
        )
        return ", ".join(f"{count} {' and '.join(kinds)}" for kinds, count in sets.most_common())

    # -- for people and for scripts ------------------------------------------------------------------------

    def text(self, width: int = 120) -> str:
        """The lines as a table of this many columns, and the notes that :meth:`AuditResult.summary` does not hold."""
        why = None if self.result is None else summary.blind(self.result)
        said = {f"none clean: {summary.NONE_CLEAN}", "" if why is None else self._unasked(why)}
        notes = [note for note in self.notes if note not in said]
        head = ("kind", "images", "how sure", "what training does", "for example")
        rows = [
            (one.kind, f"{one.count:,}", one.sure, one.action, ", ".join(map(printable, one.examples)))
            for one in self.lines
        ]
        rows.append(("all files", f"{self.files:,}", "", "", ""))
        return "\n".join([*_table(head, rows, width), *(f"* {note}" for note in notes)])

    def as_json(self) -> dict[str, Any]:
        """The lines and the notes, JSON-ready."""
        names = ("kind", "count", "shown", "what", "probability", "told_apart", "action", "proof")
        return {
            "files": self.files,
            "lines": [
                {name: getattr(one, name) for name in names} | {"examples": list(one.examples)} for one in self.lines
            ],
            "notes": list(self.notes),
        }


def become() -> dict[str, str]:
    """What others become at a strength, which is put into the braces, by the names of kinds that can be simulated."""
    return {kind.name: kind.become for kind in registered_detectors() if kind.strengths}


def percent(probability: float) -> str:
    """Rounded towards a half, as nothing is certain."""
    return f"{min(max(round(100 * probability), 1), 99)} %"


def reason(overview: Overview, place: int, kind: str) -> str:
    """Why an image is shown with a kind, in a sentence."""
    result = overview.result
    assert result is not None, "kinds are those of a result"
    found = kind in result.groups and bool(result.groups[kind][place])
    damaged = float(result.signs["damaged"][place]) if "damaged" in result.signs else 0.0
    read = float(result.signs["strength"][place]) if "strength" in result.signs else math.nan
    if found and not overview.decided_by_comparison(kind):
        alike = next((group for group in result.copies if place in group), ())
        others = [printable(result.names[other]) for other in alike if other != place][:EXAMPLES]
        return f"like {', '.join(others)}" if others else next(o.what for o in result.findings if o.kind == kind)
    strength = "" if math.isnan(read) else f" {become()[kind].format(read)}"
    if found:
        return f"looks like the others{strength}"
    if kind in overview.suspected and damaged >= DOUBTED:
        return f"may be what the others become{strength}; of this set it is not believed"
    if damaged >= DOUBTED:
        return f"may be what the others become{strength}; {percent(FOUND)} would count"
    return f"found clean, nearest to {kind}; {percent(FOUND)} would count"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns of text, wrapped to a width; the second is of numbers."""
    natural = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    room = max(width - natural[0] - natural[1] - 8, 45)  # two blanks between columns
    widths = natural[:2]
    for number, share in ((2, 0.25), (3, 0.5), (4, 1.0)):  # of what is left
        widths.append(min(natural[number], max(15, int(share * room))))
        room -= widths[-1]
    lines = []
    for row in (head, *rows):
        cells = [textwrap.wrap(cell, w, break_on_hyphens=False) or [""] for cell, w in zip(row, widths, strict=True)]
        for depth in range(max(map(len, cells))):
            parts = [cell[depth] if depth < len(cell) else "" for cell in cells]
            parts[1] = parts[1].rjust(widths[1])
            lines.append("  ".join(part.ljust(w) for part, w in zip(parts, widths, strict=True)).rstrip())
    return lines
