"""The rows in markdown, and what is asked of them beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from experiments.audit_mixtures.damages import DAMAGES
from experiments.audit_mixtures.scores import BINS

Rows = Sequence[dict[str, Any]]

FALSE_ALARMS = 0.005
RECALL = {
    **dict.fromkeys(("noise", "poisson", "camera", "impulse", "jpeg", "blur", "enlarged", "motion"), 0.98),
    **dict.fromkeys(("banding", "blocks", "caption"), 0.9),
}
"""Share to be found, of 64 x 64 pixels in colour, of 1,000 images or more."""
NEVER_SIMULATED = (2, 0.5)
"""So many kinds, of which this share."""
STRENGTH = 0.25
"""Median relative error."""
LOSS, LOSS_OF_FEW, FEW = 0.01, 0.02, 300
"""Share of a clean set that may be lost; of one of fewer images than the third."""


def everything(rows: Rows) -> str:
    """All tables."""
    mixtures = [row for row in rows if row["group"] == "mixture"]
    parts = {
        "What is asked, and what was measured": goals(rows),
        "Mixtures": sets(mixtures),
        "Mixtures of 64 x 64 pixels in colour, by kind": by_kind(judged(rows)),
        "Found, by size": by_size(mixtures),
        "Probability of damage against truth": calibration(mixtures),
        "One kind alone": single([row for row in rows if row["group"] == "single"]),
        "Clean sets": clean([row for row in rows if row["group"] in ("clean", "half")]),
    }
    return "\n".join(f"## {title}\n\n{table}" for title, table in parts.items() if table)


def judged(rows: Rows) -> Rows:
    """Those that goals are set for: mixtures of 64 x 64 pixels in colour, of 1,000 images or more."""
    return [
        row
        for row in rows
        if row["group"] == "mixture" and row["size"] == 64 and row["channels"] == 3 and row["images"] >= 1000
    ]


# -- goals -------------------------------------------------------------------------------------------------


def goals(rows: Rows) -> str:
    """Each goal beside what was measured."""
    lines: list[tuple[str, str, str, bool]] = []
    large = judged(rows)
    if large:
        counts = [(row["false"]["either"], row["images"] - row["damaged"]) for row in large]
        false, lost, of = max(lost / of for lost, of in counts), *map(sum, zip(*counts, strict=True))
        got = f"{false:.2%}; {lost} of {of} of all sets"
        lines.append(("false alarms, worst set", f"<= {FALSE_ALARMS:.1%}", got, false <= FALSE_ALARMS))
    for kind, least in RECALL.items():
        if images := _sum(large, kind, "images"):
            share = _sum(large, kind, "found") / images
            lines.append((f"{_from(kind)} found", f">= {least:.0%}", f"{share:.1%} of {images}", share >= least))
    shares = {
        kind: _sum(large, kind, "found") / images
        for kind, one in DAMAGES.items()
        if not one.known and (images := _sum(large, kind, "images"))
    }
    if shares:
        count, least = NEVER_SIMULATED
        enough = [kind for kind, share in shares.items() if share >= least]
        asked, got = f">= {count} kinds", f"{len(enough)} of {len(shares)} kinds"
        lines.append((f"kinds never simulated, {least:.0%} found", asked, got, len(enough) >= count))
    errors = {kind: median(found) for kind in RECALL if kind != "caption" and (found := _errors(large, kind))}
    if errors:
        worst = max(errors, key=lambda kind: errors[kind])
        got = f"{errors[worst]:.0%}, {worst}"
        lines.append(("strength, median error, worst kind", f"<= {STRENGTH:.0%}", got, errors[worst] <= STRENGTH))
    spared = [row for row in rows if row["group"] in ("clean", "half")]
    for few, most in ((False, LOSS), (True, LOSS_OF_FEW)):
        some = [row for row in spared if (row["images"] < FEW) == few]
        if some:
            worst_row = max(some, key=lambda row: row["false"]["either"] / row["images"])
            loss, of = worst_row["false"]["either"] / worst_row["images"], f"clean sets of {'fewer' if few else FEW}"
            asked = f"<= {most:.0%}"
            over = sum(row["false"]["either"] > most * row["images"] for row in some)
            got = f"{loss:.1%}, {worst_row['name']}; {over} of {len(some)} beyond"
            lines.append((f"{of}{'' if few else ' and more'}: lost, worst", asked, got, loss <= most))
    if spared:
        filled = sum(row["false"]["filled_pixels"] for row in spared)
        lines.append(("clean sets: pixels filled in", "0", f"{filled}", filled == 0))
    body = [(what, asked, got, "yes" if met else "**no**") for what, asked, got, met in lines]
    return _markdown(("goal", "asked", "measured", "met"), body, left=3)


def _from(kind: str) -> str:
    one = DAMAGES[kind]
    if one.judged is None:
        return kind
    return f"{kind} {'to' if one.part(0) == 'judged' else 'from'} {one.judged:g}"


# -- tables --------------------------------------------------------------------------------------------------


def sets(rows: Rows) -> str:
    """A line for each mixture."""
    body = []
    for row in rows:
        spotless, known = row["images"] - row["damaged"], [kind for kind, one in DAMAGES.items() if one.known]
        rest = [kind for kind, one in DAMAGES.items() if not one.known]
        found = sum(_sum([row], kind, "found") for kind in known)
        false = row["false"]
        body.append(
            (
                f"{row['source']} {row['size']} {'RGB' if row['channels'] == 3 else 'grey'}",
                row["images"],
                f"{row['dirty']:.0%}",
                f"{false['found']} + {false['either'] - false['found']} of {spotless}",
                false["filled_pixels"],
                _percent(found, sum(_sum([row], kind, "images") for kind in known)),
                _percent(sum(_sum([row], kind, "named") for kind in known), found),
                _percent(*(sum(_sum([row], kind, what) for kind in rest) for what in ("found", "images"))),
                f"{row['seconds']:.0f}",
                f"{row['peak_mb']:.0f}",
            )
        )
    head = ("set", "images", "damaged", "clean, called damaged + only limited", "filled in", "found", "named right")
    return _markdown((*head, "found, never simulated", "s", "MB"), body)


def by_kind(rows: Rows) -> str:
    """A line for each kind of damage: the audit, and what stands beside it."""
    body = []
    for kind, one in DAMAGES.items():
        images, found = _sum(rows, kind, "images"), _sum(rows, kind, "found")
        if not images:
            continue
        low, high = one.strengths
        errors = _errors(rows, kind)
        body.append(
            (
                f"{kind}, {one.unit} {low:g} to {high:g}",
                images,
                _percent(found, images),
                _percent(_sum(rows, kind, "limited"), images),
                _percent(_sum(rows, kind, "named"), found) if one.known else "-",
                f"{median(errors):.0%}" if errors else "-",
                _percent(_sum(rows, kind, "found", "weak"), _sum(rows, kind, "images", "weak")),
                *(_other(rows, tool, kind) for tool in ("wavelet", "cleanvision")),
            )
        )
    spotless = sum(row["images"] - row["damaged"] for row in rows)
    if spotless:
        false = [_percent(sum(row["false"][what] for row in rows), spotless) for what in ("found", "limited")]
        tools = [
            _percent(sum(row[tool]["false"] for row in rows), spotless) if all(row[tool] for row in rows) else "-"
            for tool in ("wavelet", "cleanvision")
        ]
        body.append(("clean", spotless, *false, "-", "-", "-", *tools))
    head = ("kind", "images", "found", "limited", "named right", "strength, error", "found, weaker")
    return _markdown((*head, "wavelet, told the truth", "cleanvision"), body)


def _other(rows: Rows, tool: str, kind: str) -> str:
    some = [row for row in rows if row[tool]]
    return _percent(*(_sum(some, kind, what, of=tool) for what in ("found", "images")))


def by_size(rows: Rows) -> str:
    """Found of each kind, by size and colour."""
    shapes = sorted({(row["size"], -row["channels"]) for row in rows})
    if not shapes:
        return ""
    body = []
    for kind in DAMAGES:
        cells = []
        for size, channels in shapes:
            some = [row for row in rows if (row["size"], -row["channels"]) == (size, channels)]
            cells.append(_percent(_sum(some, kind, "found"), _sum(some, kind, "images")))
        body.append((_from(kind), *cells))
    return _markdown(("kind", *(f"{size} {'RGB' if c == -3 else 'grey'}" for size, c in shapes)), body)


def calibration(rows: Rows) -> str:
    """How many images of each probability of damage are damaged."""
    told = [row["calibration"] for row in rows if row["calibration"]]
    body = []
    for k, (low, high) in enumerate(pairwise(BINS)):
        images, damaged = (sum(one[k][part] for one in told) for part in (0, 1))
        body.append((f"{low:g} to {high:g}", images, _percent(damaged, images)))
    return _markdown(("probability", "images", "damaged"), body) if told else ""


def single(rows: Rows) -> str:
    """Found, and clean images lost, by kind and share."""
    shares = sorted({row["dirty"] for row in rows})
    body = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = []
        for share in shares:
            some = [row for row in rows if (row["kind"], row["dirty"]) == (kind, share)]
            lost, of = sum(row["false"]["either"] for row in some), sum(row["images"] - row["damaged"] for row in some)
            cells += [
                _percent(*(_sum(some, kind, what) for what in ("found", "images"))),
                _percent(*(_sum(some, kind, what, "weak") for what in ("found", "images"))),
                f"{lost} of {of}" if some else "-",
            ]
        body.append((_from(kind), *cells))
    head = (f"{share:.0%}: {what}" for share in shares for what in ("found", "found, weaker", "clean, lost"))
    return _markdown(("kind", *head), body)


def clean(rows: Rows) -> str:
    """What sets lose in which nothing is damaged."""
    body = []
    for row in rows:
        false = row["false"]
        groups = ", ".join(f"{count} {name}" for name, count in false["groups"].items() if count) or "-"
        cells = (false["found"], false["either"], _percent(false["either"], row["images"]), false["filled_pixels"])
        body.append((row["name"], row["images"], *cells, groups, f"{row['seconds']:.0f}"))
    return _markdown(("set", "images", "found", "lost", "share", "filled in", "groups", "s"), body)


# -- sums ----------------------------------------------------------------------------------------------------


def _sum(rows: Rows, kind: str, what: str, part: str = "judged", of: str = "") -> int:
    kinds = (row[of]["kinds"] if of else row["kinds"] for row in rows)
    return sum(one[kind][part][what] for one in kinds if part in one.get(kind, {}))


def _errors(rows: Rows, kind: str) -> list[float]:
    return [one for row in rows for one in row["kinds"].get(kind, {}).get("judged", {}).get("errors", [])]


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _markdown(head: Iterable[str], body: Sequence[Sequence[object]], left: int = 1) -> str:
    names = list(head)
    if not body:
        return ""
    rule = "|".join([":--"] * left + ["--:"] * (len(names) - left))
    lines = [f"| {' | '.join(names)} |", f"|{rule}|"]
    lines += [f"| {' | '.join(map(str, line))} |" for line in body]
    return "\n".join(lines) + "\n"
