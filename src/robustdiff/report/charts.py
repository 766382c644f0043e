"""Charts as inline SVG: lines, dots with intervals, histograms.

Text and strokes have classes only, so that the page's style sheet gives them the colours of light or dark. A chart is
drawn for about the width of a phone and scaled by the page. Coordinates are rounded to a tenth
of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT, NARROW = 400, 230, 320
"""Of curves and histograms; the width of dot plots."""
COLOURS = 8
"""Runs with colours of their own; later ones repeat them, with dashes."""
BUCKETS = 200
"""A longer curve keeps the extremes of this many pieces: what is left out would be narrower than the stroke."""
_LETTER, _NAME = 6.2, 7.2
"""Width of a letter, about: of labels on axes, of names."""


class Point(NamedTuple):
    """Of a curve; None: a gap."""

    x: float
    y: float | None


@dataclass(frozen=True)
class Series:
    """A curve: its name, its run (the colour), its points in rising x, and whether they are marked."""

    name: str
    run: int
    points: Sequence[Point]
    dots: bool = False


class Dot(NamedTuple):
    """A value of a dot plot: name, run, value, interval, text."""

    name: str
    run: int
    value: float
    interval: tuple[float, float] | None
    text: str


def run_class(run: int) -> str:
    """The class that colours what belongs to a run."""
    return f"run run-{run % COLOURS}{' again' if run >= COLOURS else ''}"


# -- scales ----------------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about ``count``, from ``low`` to ``high`` inclusive."""
    span = high - low
    if not (span > 0 and math.isfinite(span)) or span <= 1e-12 * max(abs(low), abs(high)):
        return [low]
    raw = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high`` (> 0); over less than two decades also their twos and fives."""
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, max(1, round(decades / 6)))
    return [x for p in powers for f in factors if low * 0.999 <= (x := f * 10.0**p) <= high * 1.001]


def short(x: float) -> str:
    """A tick's label: 0.05, 250, 10k, 1.5M, 1e-06."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(x) < 1e12:
            return f"{x / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{0.0 if abs(x) < 1e-300 else x:.4g}"


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about ``4 BUCKETS`` points: of each piece the first, the least, the largest and a gap."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    kept: list[Point] = []
    size = len(points) / BUCKETS
    for i in range(BUCKETS):
        piece = points[round(i * size) : round((i + 1) * size)]
        places = [j for j, point in enumerate(piece) if point.y is not None]
        gap = [j for j, point in enumerate(piece) if point.y is None][:1]

        def height(j: int, piece: Sequence[Point] = piece) -> float:
            return piece[j].y or 0.0

        chosen = {*gap, *(f(places, key=height) for f in (min, max) if places), *places[:1]}
        kept += [piece[j] for j in sorted(chosen)]
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


class _Axis:
    """Maps values to pixels, linearly or by logarithms."""

    def __init__(self, low: float, high: float, log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        if low == high:  # one value only: in the middle
            pad = abs(low) * 0.1 or 1.0
            low, high = (low / 1.5, high * 1.5) if log else (low - pad, high + pad)
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        f: Callable[[float], float] = math.log if self.log else float
        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)


# -- charts ----------------------------------------------------------------------------------------------


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    log_x: bool = False,
    floors: Sequence[float] = (),
    span: Sequence[float] = (),
) -> Markup:
    """Curves over one another; the y axis is logarithmic if they are positive and span more than a decade.

    Args:
        series: At least one with a value.
        label: What it shows, in words, for those who cannot see it.
        x_label: Under the x axis.
        log_x: Logarithmic x axis, ticked at the points themselves.
        floors: Dashed lines across.
        span: Values that the y axis must have room for, too.

    Raises:
        ValueError: If there is nothing to draw.
    """
    ys = [point.y for one in series for point in one.points if point.y is not None]
    if not ys:
        raise ValueError("a chart needs at least one value")
    xs = sorted({point.x for one in series for point in one.points})
    log_x = log_x and xs[0] > 0
    low, high = min([*ys, *floors, *span]), max([*ys, *floors, *span])
    log_y = low > 0 and 10 < high / low < 1e30
    bottom = HEIGHT - 38
    y = _Axis(*_padded(low, high, log_y), log_y, bottom, 10)
    y_ticks = y.ticks(5)
    left = 12 + _LETTER * max(len(short(tick)) for tick in y_ticks) if y_ticks else 12
    x = _Axis(xs[0] if log_x else min(0.0, xs[0]), xs[-1], log_x, left, WIDTH - 14)
    parts = [_line(left, y(tick), WIDTH - 14, y(tick), "grid") for tick in y_ticks]
    parts += [_text(left - 6, y(tick) + 4, short(tick), "end") for tick in y_ticks]
    parts += _x_axis(x, xs if log_x else x.ticks(5), bottom)
    parts.append(_text((left + WIDTH - 14) / 2, HEIGHT - 4, x_label, "middle"))
    parts += [_line(left, y(floor), WIDTH - 14, y(floor), "floor", f"floor: {floor:.6g}") for floor in floors]
    for one in series:
        parts.append(_curve(one, x, y))
    return _svg(HEIGHT, label, parts)


def dot_plot(dots: Sequence[Dot], *, label: str, floors: Sequence[float] = ()) -> Markup:
    """One line per value: its name and text, and under them a dot with its interval; the bar: the floor.

    Args:
        dots: At least one.
        label: What it shows, in words.
        floors: Their least and largest are drawn.
    """
    row, left, right = 36, 6, NARROW - 6
    ends = [end for dot in dots for end in (dot.interval or (dot.value, dot.value))]
    x = _Axis(*_padded(min([*ends, *floors]), max([*ends, *floors]), False), False, left, right)
    at = dict.fromkeys([*floors[:1], *floors[-1:]])
    bottom = row * len(dots) + 6
    parts = _x_axis(x, x.ticks(5), bottom)
    for i, dot in enumerate(dots):
        y, ends = row * i + 25, list(dot.interval or ())
        parts += [_line(x(floor), y - 8, x(floor), y + 6, "bar", f"floor: {floor:.6g}") for floor in at]
        parts.append(_text(left, y - 11, _cut(dot.name, right - left - 8 - _NAME * len(dot.text)), "start name"))
        parts.append(_text(right, y - 11, dot.text, "end name"))
        parts.append(_line(left, y, right, y, "track"))
        marks = [_line(x(ends[0]), y, x(ends[1]), y, "whisker")] if ends else []
        marks.append(Markup('<circle cx="{}" cy="{}" r="4.5"/>').format(_px(x(dot.value)), _px(y)))
        parts.append(
            Markup('<g class="{}"><title>{}</title>{}</g>').format(
                run_class(dot.run), f"{dot.name}: {dot.text}", Markup("").join(marks)
            )
        )
    return _svg(bottom + 22, label, parts, NARROW)


def histogram(
    edges: Sequence[float], counts: Sequence[float], null: Sequence[float] | None, *, run: int, label: str, x_label: str
) -> Markup:
    """Shares per bin as a filled outline, and the null's as a dashed one: their counts need not be equal.

    Args:
        edges: Rising, one more than bins.
        counts: Per bin.
        null: Likewise, or None.
        run: Its colour.
        label: What it shows, in words.
        x_label: Under the x axis.
    """
    columns = [[c / (sum(column) or 1) for c in column] for column in (counts, null) if column is not None]
    bottom, left, right = HEIGHT - 38, 46, WIDTH - 14
    x = _Axis(edges[0], edges[-1], False, left, right)
    y = _Axis(0, max(max(column) for column in columns) * 1.05 or 1, False, bottom, 10)
    parts = [_line(left, y(tick), right, y(tick), "grid") for tick in y.ticks(4)]
    parts += [_text(left - 6, y(tick) + 4, f"{100 * tick:.3g} %", "end") for tick in y.ticks(4)]
    parts += _x_axis(x, x.ticks(5), bottom)
    parts.append(_text((left + right) / 2, HEIGHT - 4, x_label, "middle"))
    for column, kind in zip(columns, (f"area {run_class(run)}", "null"), strict=False):
        corners = [(edges[0], 0.0)]
        for a, b, share in zip(edges[:-1], edges[1:], column, strict=True):
            corners += [(a, share), (b, share)]
        path = "L".join(f"{_px(x(a))} {_px(y(b))}" for a, b in [*corners, (edges[-1], 0.0)])
        parts.append(Markup('<path class="{}" d="M{}"/>').format(kind, path))
    return _svg(HEIGHT, label, parts)


# -- pieces ----------------------------------------------------------------------------------------------


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """A little room, so that no curve lies on the frame; not below 0 for what is not."""
    if log:
        room = (high / low) ** 0.04
        return low / room, high * room
    room = (high - low) * 0.06
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _x_axis(x: _Axis, places: Iterable[float], bottom: float) -> list[Markup]:
    """The base line and its labels, those left out that would touch one another."""
    parts, free = [_line(x.start, bottom, x.end, bottom, "axis")], -math.inf
    for place in places:
        text = short(place)
        half = _LETTER * len(text) / 2
        at = min(max(x(place), half), x.end + 12 - half)
        if at - half > free:
            parts += [_line(x(place), bottom, x(place), bottom + 4, "axis"), _text(at, bottom + 17, text, "middle")]
            free = at + half + 4
    return parts


def _curve(one: Series, x: _Axis, y: _Axis) -> Markup:
    """Lines between the gaps; a point between two gaps is a dot."""
    parts, dots, pen = [], [], "M"
    points = thin(one.points)
    for i, point in enumerate(points):
        if point.y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{_px(x(point.x))} {_px(y(point.y))}")
        alone = pen == "M" and (i + 1 == len(points) or points[i + 1].y is None)
        if one.dots or alone:
            dots.append(
                Markup('<circle cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
                    _px(x(point.x)), _px(y(point.y)), f"{one.name}: {point.y:.4g} at {short(point.x)}"
                )
            )
        pen = "L"
    path = Markup('<path d="{}"/>').format("".join(parts))
    return Markup('<g class="{}"><title>{}</title>{}{}</g>').format(
        f"curve {run_class(one.run)}", one.name, path, Markup("").join(dots)
    )


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _cut(text: str, width: float) -> str:
    letters = max(4, int(width / _NAME))
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, title: str = "") -> Markup:
    inner = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}">{}</line>').format(
        kind, _px(x1), _px(y1), _px(x2), _px(y2), inner
    )


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, _px(x), _px(y), text)


def _svg(height: float, label: str, parts: Sequence[Markup], width: int = WIDTH) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        width, _px(height), escape(label)
    )
    return head + Markup("").join(parts) + Markup("</svg>")
