"""Charts of the report: round ticks, curves where the numbers are, nothing lost that would be seen."""

from __future__ import annotations

import re

import pytest

from report_page import Page
from robustdiff.report import charts
from robustdiff.report.charts import Dot, Point, Series


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 47, [0, 20, 40]),
        (-3, 3, [-2, 0, 2]),
        (0.1, 0.1, [0.1]),
        (1.0, 1.0 + 1e-15, [1.0]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.03, 1.2, [0.05, 0.1, 0.2, 0.5, 1]), (1, 1e6, [10.0**p for p in range(7)]), (3, 31, [5, 10, 20])],
)
def test_logarithmic_ticks(low, high, expected):
    assert charts.log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (0.05, "0.05"), (1000, "1000"), (20_000, "20k"), (1.5e6, "1.5M"), (2e9, "2G"), (-3e4, "-30k")],
)
def test_short_labels(x, text):
    assert charts.short(x) == text


def test_curves_lie_where_the_numbers_say_and_break_at_gaps():
    points = [Point(0, 1.0), Point(10, 3.0), Point(20, None), Point(30, 2.0), Point(40, 1.0)]
    page = Page(charts.line_chart([Series("a", 0, points)], label="l", x_label="x"))
    (path,) = [d for d in page.all("d")]
    pieces = re.findall(r"([ML])([\d.]+) ([\d.]+)", path)
    assert [kind for kind, _, _ in pieces] == ["M", "L", "M", "L"]
    xs, ys = ([float(piece[i]) for piece in pieces] for i in (1, 2))
    assert (xs[1] - xs[0]) * 3 == pytest.approx(xs[2] - xs[0], abs=0.3)
    assert ys[0] == ys[3] > ys[2] > ys[1]
    assert ys[0] - ys[2] == pytest.approx(ys[2] - ys[1], abs=0.2)


def test_a_span_of_more_than_a_decade_is_logarithmic():
    points = [Point(i, 10.0**-i) for i in range(4)]
    page = Page(charts.line_chart([Series("a", 0, points, dots=True)], label="l", x_label="x"))
    ys = [float(y) for y in page.all("cy")]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2) == pytest.approx(ys[3] - ys[2], abs=0.2)


def test_a_chart_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        charts.line_chart([Series("a", 0, [Point(0, None)])], label="l", x_label="x")


def test_a_long_curve_keeps_its_spikes_its_gaps_and_its_ends():
    points = [Point(i, 1.0 + (i == 7777) * 50 - (i == 3333) * 0.5) for i in range(20_000)]
    points[5000] = Point(5000, None)
    kept = charts.thin(points)
    assert len(kept) <= 4 * charts.BUCKETS + 1
    assert {points[0], points[7777], points[3333], points[5000], points[-1]} <= set(kept)
    assert [point.x for point in kept] == sorted(point.x for point in kept)
    assert charts.thin(points[:50]) == points[:50]


def test_dots_whiskers_and_bars_lie_on_one_scale():
    dots = [Dot("a", 0, 1.0, (0.5, 1.5), "1.00"), Dot("b", 9, 2.0, None, "2.00")]
    page = Page(charts.dot_plot(dots, label="l", floors=[0.5]))
    a, b = (float(x) for x in page.all("cx"))
    (whisker,) = [t for tag, t in page.tags if t.get("class") == "whisker"]
    bars = [t for tag, t in page.tags if t.get("class") == "bar"]
    assert float(whisker["x1"]) == pytest.approx(a - (b - a) / 2, abs=0.2)
    assert [bar["x1"] for bar in bars] == [whisker["x1"]] * 2
    assert [t["class"] for tag, t in page.tags if tag == "g"] == ["run run-0", "run run-1 again"]


def test_a_histogram_shows_shares_so_that_unequal_counts_compare():
    page = Page(charts.histogram([0, 1, 2], [10, 30], [100, 300], run=0, label="l", x_label="x"))
    generated, null = page.all("d")
    assert generated == null
    assert len(list(Page(charts.histogram([0, 1], [0], None, run=0, label="l", x_label="x")).all("d"))) == 1
