"""What all figures share: size and style of the sheet, scales, frames, legends outside of the data, legible labels.

Reading order: ``figures.py`` says what is drawn; this file says how a sheet of panels looks. matplotlib is imported
when something is drawn; its global state, settings included, is left as it was.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robustdiff.utils.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

Array = NDArray[np.float64]

MAX_BYTES = 200_000
LABEL = 30
"""Characters of a line along the vertical axis."""
WIDTH = 9.0
"""Inches; with text of 10 pt and more, this is what makes 9 pt at 830 pixels (8.6 inches of 96)."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B4C9A", "#000000")
"""Okabe and Ito's palette; the yellow, which does not show on white, is exchanged for a violet."""
MARKERS = "osD^vPX*<>hp"
DASHES = ("-", "--", "-.", ":")
GREY = "#767676"
FLOOR: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1.3}
"""How a floor, or any line of reference, looks."""
_STYLE: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "figure.titlesize": 12.5,
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


@contextmanager
def sheet(
    path: Path, titles: Sequence[str], title: str = "", *, height: float | None = None, columns: int = 3
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with one panel per title; written to ``path`` at the end, as sharply as :data:`MAX_BYTES` allows.

    Args:
        path: The PNG to write; its folder is made.
        titles: One per panel; at least one.
        title: Of the whole figure, or empty.
        height: Of a row of panels, inches; None: so that square panels fill their columns.
        columns: The most panels in a row; four go two by two.

    Raises:
        ValueError: If there is no panel.
        UsageError: If matplotlib is missing.
    """
    if not titles:
        raise ValueError(f"{path.name}: nothing to draw")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("matplotlib is not installed: pip install matplotlib") from None
    columns = min(2 if len(titles) == 4 else 9, columns, len(titles))
    height = {1: 5.5, 2: 3.9}.get(columns, 3.2) if height is None else height
    rows = math.ceil(len(titles) / columns)
    width = WIDTH if columns > 1 else 0.8 * WIDTH
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # what the user has set does not change our figures
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height * rows + (0.35 if title else 0)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spare in panels[len(titles) :]:
            spare.remove()
        for axes, text in zip(panels, titles, strict=False):
            axes.set_title(text)
        if title:
            figure.suptitle(title)
        yield figure, panels[: len(titles)]
        if not figure.legends:
            legend(figure, panels[: len(titles)])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(figure))


def _png(figure: Figure) -> bytes:
    """The figure at the highest resolution that stays below :data:`MAX_BYTES`; if need be with 128 colours."""
    from PIL import Image

    for _ in range(2):  # the layout of equal axes beside a colour bar settles in the second pass
        figure.draw_without_rendering()
    for dpi in (150, 120, 100, 80, 60):
        figure.savefig(full := io.BytesIO(), format="png", dpi=dpi, metadata={"Software": None})
        if len(full.getvalue()) < MAX_BYTES:
            return full.getvalue()
        image = Image.open(full).convert("RGB").quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        image.save(fewer := io.BytesIO(), format="png", optimize=True)
        if len(fewer.getvalue()) < MAX_BYTES:
            break
    return fewer.getvalue()


def array(x: Tensor, name: str, shape: Sequence[int | None]) -> Array:
    """The tensor's numbers, if it has this shape (None: any size but 0).

    Raises:
        ValueError: If not; it names ``name``.
    """
    wanted = f"({', '.join('any' if size is None else str(size) for size in shape)})"
    fits = x.ndim == len(shape) and all(a > 0 if b is None else a == b for a, b in zip(x.shape, shape, strict=True))
    if not fits:
        raise ValueError(f"{name} has shape {tuple(x.shape)} instead of {wanted}")
    numbers: Array = x.detach().cpu().double().numpy()
    return numbers


def lines(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_name: str) -> dict[str, tuple[Array, Array]]:
    """The curves in ascending order of x.

    Raises:
        ValueError: If x and y differ in length, are empty, or x is not positive.
    """
    sorted_curves = {}
    for name, (x, y) in curves.items():
        across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if across.shape != up.shape or across.ndim != 1 or not len(across):
            raise ValueError(f"curve {name!r} has {len(x)} {x_name} and {len(y)} values")
        if not (across > 0).all():
            raise ValueError(f"curve {name!r}: {x_name} must be positive")
        order = np.argsort(across)
        sorted_curves[name] = (across[order], up[order])
    return sorted_curves


def draw_lines(axes: Axes, curves: Mapping[str, tuple[Array, Array]]) -> None:
    """One line each, with its own colour, marker and dash."""
    for look, (name, (x, y)) in enumerate(curves.items()):
        again = look // len(COLOURS)  # of a colour: with another dash and another marker
        style: dict[str, Any] = {"color": COLOURS[look % len(COLOURS)], "linestyle": DASHES[(look + again) % 4]}
        dots: dict[str, Any] = {"marker": MARKERS[look % len(MARKERS)], "markersize": 5.5} if len(x) <= 30 else {}
        axes.plot(x, y, label=name, **style, **dots)


def frame(axes: Axes, low: Array, high: Array, names: tuple[str, str] = ("x1", "x2")) -> None:
    """Limits, equal scales, names with their unit."""
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axes.set_xlabel(f"{names[0]} (data units)")
    axes.set_ylabel(f"{names[1]} (data units)")
    axes.label_outer()


def label_error(axes: Axes, measure: str) -> None:
    """What stands at the vertical axis, on as many lines as it takes to stay within the panel."""
    axes.set_ylabel(textwrap.fill(measure, LABEL))


def note(axes: Axes, text: str) -> None:
    """A remark in the corner of a panel, on white."""
    if text:
        box = {"facecolor": "white", "edgecolor": GREY, "alpha": 0.9, "boxstyle": "round,pad=0.25"}
        axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=10, bbox=box, zorder=6)


def scale(axes: Axes, which: str, values: Sequence[float], log: bool | None = None) -> None:
    """Limits just beyond the values; logarithmic if told, or if positive values span more than a factor of 4.

    Args:
        axes: The panel.
        which: "x" or "y".
        values: Everything drawn along this axis; what is not finite is left out.
        log: True, False, or None to decide by the values.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    finite = [v for v in values if math.isfinite(v)] or [1.0]
    low, high = min(finite), max(finite)
    set_limits, axis = (axes.set_xlim, axes.xaxis) if which == "x" else (axes.set_ylim, axes.yaxis)
    if log is None:
        log = low > 0 and high / low > 4
    if not log or low <= 0:
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        set_limits(low - margin, high + margin)
        axis.set_major_locator(MaxNLocator(6))
        return
    if which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high / low < (200 if which == "x" else 2000) else (1.0,), numticks=20)
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    margin = max(high / low, 1.5) ** 0.07
    set_limits(low / margin, high * margin)


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels; a name that several panels share appears once.

    :func:`sheet` draws it if nobody has.
    """
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    if entries:
        longest = max(map(len, entries))
        columns = max(1, min(len(entries), int(figure.get_figwidth() * 13 / (longest + 7))))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def label_points(
    axes: Axes, labels: Sequence[tuple[str, tuple[float, float], str]], others: Array, joined: Sequence[Array]
) -> None:
    """Write beside each point, where it covers the least: other labels, points, lines' corners, the frame.

    Args:
        axes: Its limits and place on the sheet are final.
        labels: (text, point, colour).
        others: Points not to be covered, shape (k, 2), data units.
        joined: Corners of lines better not covered, each of shape (k, 2), data units.
    """
    from matplotlib.transforms import Bbox

    dots = axes.transData.transform(others)
    half = 4.5 * axes.figure.dpi / 72
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in dots]
    inside = axes.get_window_extent()
    thread = []  # lines as strings of small boxes
    for corners in map(axes.transData.transform, joined):
        for start, end in itertools.pairwise(corners):
            for x, y in np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / half)):
                thread.append(Bbox.from_extents(x - half / 3, y - half / 3, x + half / 3, y + half / 3))
    # Close by before farther off; right and left before above and below, the diagonals last.
    turns = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]
    places = [(distance * x, distance * y) for distance in (7, 12, 18, 26) for x, y in turns]
    for text, point, colour in labels:
        costs = []
        for number, (dx, dy) in enumerate(places):
            label = _beside(axes, text, point, colour, dx, dy)
            box = _text_box(label)
            label.remove()
            covered = sum(_overlap(box, other) for other in taken) / (box.width * box.height)
            covered += 0.5 * sum(_overlap(box, other) for other in thread) / (box.width * box.height)
            out = 1 - _overlap(box, inside) / (box.width * box.height)
            costs.append((covered + 3 * out + 0.004 * number, dx, dy))
        _, dx, dy = min(costs)
        taken.append(_text_box(_beside(axes, text, point, colour, dx, dy)))


def _beside(axes: Axes, text: str, point: tuple[float, float], colour: str, dx: float, dy: float) -> Any:  # noqa: ANN401
    """A label ``dx`` and ``dy`` typographic points away from a point."""
    across = {-1: "right", 0: "center", 1: "left"}[int(np.sign(dx))]
    along = {-1: "top", 0: "center", 1: "bottom"}[int(np.sign(dy))]
    # A hair leads to the point from farther off.
    hair = (
        {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        if max(abs(dx), abs(dy)) > 12
        else None
    )
    return axes.annotate(
        text,
        point,
        (dx, dy),
        textcoords="offset points",
        ha=across,
        va=along,
        color=colour,
        fontsize=10,
        zorder=5,
        arrowprops=hair,
    )


def _text_box(label: Any) -> Any:  # noqa: ANN401
    """Where its text stands, in pixels, a little wider; a hair to its point does not count."""
    from matplotlib.text import Text

    label.update_positions(label.figure.canvas.get_renderer())
    return Text.get_window_extent(label).padded(1.5)


def _overlap(a: Any, b: Any) -> float:  # noqa: ANN401
    """Area that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0) * max(height, 0))


def reach(points: Array, centre: Array) -> float:
    """Half the side of the square around ``centre`` that holds 98 % of the points; what is not finite is far away."""
    far = np.abs(points - centre).max(1)
    return float(np.quantile(np.where(np.isfinite(far), far, np.finfo(np.float64).max / 4), 0.98))


def home_style(count: int) -> dict[str, Any]:
    """How the place where the clean law lives looks: crosses for a few modes, small dots for a line."""
    few = count <= 64
    style = {
        "marker": "P" if few else ".",
        "markersize": 7 if few else 3,
        "markeredgecolor": "white" if few else "none",
    }
    return {**style, "linestyle": "", "color": COLOURS[1] if few else "black", "label": "where clean data live"}
