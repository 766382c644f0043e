"""Figures of the experiments: one PNG each, below 200 kB, readable at a glance and at half a page's width.

Panels of one figure share their limits; colours are told apart by every eye and go with a marker or dash; legends stand
outside of the data. Shown 830 pixels wide or wider, no text is smaller than 9 pt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.paper import plots
from experiments.paper.plots import COLOURS, DASHES, FLOOR, GREY, MARKERS, array

if TYPE_CHECKING:
    from torch import Tensor

FLOOR_NAME = "floor (real against real)"


class Point(NamedTuple):
    """One trained model, or one free baseline, on a frontier."""

    label: str
    """Short: the strength."""
    price: float
    """Its error after training on clean data."""
    error: float
    """Its error after training on dirty data."""


@dataclass(frozen=True)
class Frontier:
    """One panel of :func:`draw_frontier`.

    Args:
        families: Name -> points in order of strength, joined by a line.
        marks: Name -> a single point: plain, the free baselines, plain on the clean subset.
        floor_clean: The measure's floor (real against real) for the clean axis, drawn as a line; None: not drawn.
        floor_dirty: The same for the dirty axis.
    """

    families: Mapping[str, Sequence[Point]]
    marks: Mapping[str, Point] = field(default_factory=dict)
    floor_clean: float | None = None
    floor_dirty: float | None = None

    @property
    def points(self) -> list[Point]:
        """Every point of the panel."""
        return [*(point for members in self.families.values() for point in members), *self.marks.values()]


def draw_fields(
    path: Path,
    fields: Mapping[str, Tensor],
    grid: Tensor,
    data: Tensor | None = None,
    support: Tensor | None = None,
    title: str = "",
) -> Path:
    """Score fields at one noise level, side by side: arrows, coloured by their length.

    Drawn lengths are square roots of lengths, on one scale in all panels, and end at the 98 % quantile: true ones would
    show the few largest arrows only.

    Args:
        path: The PNG to write.
        fields: Panel title -> score at the points of ``grid``, shape (G*G, 2).
        grid: Where, shape (G*G, 2), data units.
        data: Training points, shape (n, 2), or None.
        support: Where the clean law lives, shape (m, 2): centres of modes, or a line; or None.
        title: Of the whole figure; name the noise level.

    Returns:
        ``path``.

    Raises:
        ValueError: If shapes do not match.
    """
    where = array(grid, "grid", (None, 2))
    scores = {name: array(x, f"field {name!r}", (None, 2)) for name, x in fields.items()}
    for name, score in scores.items():
        if len(score) != len(where):
            raise ValueError(f"field {name!r} has {len(score)} arrows, the grid {len(where)} points")
    points = None if data is None else array(data, "data", (None, 2))
    home = None if support is None else array(support, "support", (None, 2))
    low, high = where.min(0), where.max(0)
    with plots.sheet(path, list(scores), title) as (figure, panels):
        from matplotlib.colors import PowerNorm

        lengths = {name: np.maximum(np.hypot(*score.T), 1e-12) for name, score in scores.items()}
        longest = max(float(np.nanquantile(np.concatenate(list(lengths.values())), 0.98)), 1e-12)
        cell = float((high - low).max()) / max(math.sqrt(len(where)) - 1, 1)
        arrows: Any = None
        for axes, (name, score) in zip(panels, scores.items(), strict=True):
            if points is not None:
                axes.plot(*points.T, ".", color="#B0B0B0", markersize=2.5, label="training data", zorder=1)
            if home is not None:
                axes.plot(*home.T, **plots.home_style(len(home)), zorder=4)
            drawn = (
                score / lengths[name][:, None] * np.sqrt(np.minimum(lengths[name] / longest, 1))[:, None] * cell * 1.25
            )
            arrows = axes.quiver(
                *where.T, *drawn.T, lengths[name], cmap="viridis_r", norm=PowerNorm(0.5, 0, longest), pivot="mid",
                angles="xy", scale_units="xy", scale=1, width=0.0055, headwidth=3.6, headlength=4, minlength=0.4,
            )  # fmt: skip
            plots.frame(axes, low - cell / 2, high + cell / 2)
        figure.colorbar(
            arrows, ax=panels, label="score length (1 / data unit)", extend="max", shrink=0.85, aspect=26, pad=0.01
        )
    return path


def draw_trajectories(
    path: Path, paths: Mapping[str, Tensor], support: Tensor, title: str = "", axes: tuple[str, str] = ("x1", "x2")
) -> Path:
    """Sampling trajectories, side by side: faint where they start, strong where they end, the end marked.

    The frame is that of the panel that stays closest to the data; a panel says how many ends lie outside of it.

    Args:
        path: The PNG to write.
        paths: Panel title -> points along the trajectories, shape (S, n, 2), first the noise, last the sample.
            What has diverged may be infinite or NaN.
        support: Where the clean law lives, shape (m, 2).
        title: Of the whole figure.
        axes: Names of the two axes; data units.

    Returns:
        ``path``.

    Raises:
        ValueError: If shapes do not match.
    """
    home = array(support, "support", (None, 2))
    tracks = {name: array(x, f"paths {name!r}", (None, None, 2)) for name, x in paths.items()}
    for name, track in tracks.items():
        if len(track) < 2:
            raise ValueError(f"paths {name!r} has a single step: nothing to draw")
    centre = (home.min(0) + home.max(0)) / 2
    size = float(np.abs(home - centre).max())
    # Data, most starts, and the ends of the tamest panel; starts of a sampler with large noise need not fit.
    starts = min(max(plots.reach(track[0], centre) for track in tracks.values()), 2.5 * size)
    half = max(1.2 * size, starts, min(1.1 * plots.reach(track[-1], centre) for track in tracks.values()))
    with plots.sheet(path, list(tracks), title) as (_, panels):
        from matplotlib.collections import LineCollection
        from matplotlib.colors import to_rgb

        for panel, track in zip(panels, tracks.values(), strict=True):
            steps, count = track.shape[0] - 1, track.shape[1]
            segments = np.stack([track[:-1], track[1:]], 2).reshape(-1, 2, 2)
            alpha = np.repeat(np.linspace(0.06, 0.75, steps), count)
            shown = np.isfinite(segments).all((1, 2)) & (np.abs(segments - centre) < 20 * half).all((1, 2))
            colours = np.column_stack([np.tile(to_rgb(COLOURS[0]), (len(alpha), 1)), alpha])[shown]
            panel.add_collection(LineCollection(list(segments[shown]), colors=colours, linewidths=0.9))
            panel.plot(*home.T, **plots.home_style(len(home)), zorder=3)
            panel.plot(*track[0].T, "o", color=GREY, alpha=0.35, markersize=2.5, label="start")
            panel.plot(
                *track[-1].T, "o", color=COLOURS[1], markersize=4.5, markeredgecolor="white", markeredgewidth=0.5,
                label="end", zorder=4,
            )  # fmt: skip
            plots.frame(panel, centre - half, centre + half, axes)
            outside = int((~(np.abs(track[-1] - centre) <= half).all(1)).sum())
            plots.note(panel, f"{outside} of {count} ends outside" if outside else "")
    return path


def draw_densities(path: Path, samples: Mapping[str, Tensor], limit: float) -> Path:
    """Two-dimensional histograms, side by side, on one scale of colour (square root, so that rare samples show).

    Args:
        path: The PNG to write.
        samples: Panel title -> samples, shape (n, 2); n may differ.
        limit: The frame is [-limit, limit] in both directions; a panel says which share lies outside.

    Returns:
        ``path``.

    Raises:
        ValueError: If a shape or the limit is not as it should be.
    """
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"limit is {limit}: give a positive number")
    clouds = {name: array(x, f"samples {name!r}", (None, 2)) for name, x in samples.items()}
    bins = 72
    edges = np.linspace(-limit, limit, bins + 1)
    shares = {}
    for name, x in clouds.items():
        inside = x[np.isfinite(x).all(1)]
        shares[name] = np.histogram2d(inside[:, 0], inside[:, 1], bins=(edges, edges))[0] / len(x)
    # The highest peak may be one cell of a collapsed panel: it saturates, the others stay visible.
    top = max(float(np.median([share.max() for share in shares.values()])), 1e-9)
    with plots.sheet(path, list(clouds)) as (figure, panels):
        from matplotlib.colors import PowerNorm

        picture: Any = None
        for axes, share in zip(panels, shares.values(), strict=True):
            axes.grid(False)
            picture = axes.imshow(
                share.T * 1000, origin="lower", extent=(-limit, limit, -limit, limit), cmap="Blues",
                norm=PowerNorm(0.5, 0, top * 1000), interpolation="nearest",
            )  # fmt: skip
            plots.frame(axes, np.full(2, -limit), np.full(2, limit))
            outside = 1 - share.sum()
            plots.note(axes, f"{100 * outside:.2g} % outside" if outside > 5e-5 else "")
        saturated = any(share.max() > top for share in shares.values())
        figure.colorbar(
            picture, ax=panels, label="share of the samples per cell (1/1000)", shrink=0.85, aspect=26, pad=0.01,
            extend="max" if saturated else "neither",
        )  # fmt: skip
    return path


def draw_frontier(
    path: Path, panels: Mapping[str, Frontier], measure: str = "error", title: str = "", share: bool = True
) -> Path:
    """What robustness costs on clean data against what it gains on dirty data; lower left is better.

    Args:
        path: The PNG to write.
        panels: Panel title -> :class:`Frontier`. A family or mark has one colour and marker in all panels.
        measure: Name and unit of the error, for the axes.
        title: Of the whole figure.
        share: Same limits in all panels; False where panels show different measures.

    Returns:
        ``path``.

    Raises:
        ValueError: If a panel is empty, or a number is not finite.
    """
    for name, panel in panels.items():
        if not panel.points:
            raise ValueError(f"frontier {name!r} has no points")
        if wrong := [p.label for p in panel.points if not (math.isfinite(p.price) and math.isfinite(p.error))]:
            raise ValueError(f"frontier {name!r}: the point {wrong[0]!r} is not finite")
    families = list(dict.fromkeys(family for panel in panels.values() for family in panel.families))
    marks = list(dict.fromkeys(mark for panel in panels.values() for mark in panel.marks))
    # Two panels side by side, unless there is much to label: then one above the other.
    crowded = any(sum(map(len, panel.families.values())) > 10 for panel in panels.values())
    with plots.sheet(path, list(panels), title, height=4.3, columns=1 if crowded else 2) as (figure, all_axes):
        for axes, panel in zip(all_axes, panels.values(), strict=True):
            for name, members in panel.families.items():
                look = families.index(name)
                axes.plot(
                    [p.price for p in members], [p.error for p in members], color=COLOURS[look % len(COLOURS)],
                    marker=MARKERS[look % 4], linestyle=DASHES[look % 4], markersize=6, label=name, zorder=3,
                )  # fmt: skip
            for name, point in panel.marks.items():
                look = marks.index(name)
                axes.plot(
                    point.price, point.error, MARKERS[(look + 4) % len(MARKERS)], markersize=9, zorder=4, label=name,
                    color="#E0E0E0" if look % 2 else "#303030", markeredgecolor="black", markeredgewidth=0.8,
                )  # fmt: skip
            for floor, line in ((panel.floor_clean, axes.axvline), (panel.floor_dirty, axes.axhline)):
                if floor is not None:
                    line(floor, **FLOOR, label=FLOOR_NAME)
        for axes, panel in zip(all_axes, panels.values(), strict=True):
            group = list(panels.values()) if share else [panel]
            plots.scale(
                axes, "x", [v for p in group for v in (*(q.price for q in p.points), p.floor_clean or math.nan)]
            )
            plots.scale(
                axes, "y", [v for p in group for v in (*(q.error for q in p.points), p.floor_dirty or math.nan)]
            )
            axes.set_xlabel(f"{measure},\ntrained on clean data")
            axes.set_ylabel(f"{measure},\ntrained on dirty data")
        plots.legend(figure, all_axes)
        figure.draw_without_rendering()  # the layout is known from here on; labels are placed in pixels
        figure.set_layout_engine("none")
        for axes, panel in zip(all_axes, panels.values(), strict=True):
            labels = [
                (p.label, (p.price, p.error), COLOURS[families.index(name) % len(COLOURS)])
                for name, members in panel.families.items()
                for p in members
            ]
            joined = [np.array([(p.price, p.error) for p in members]) for members in panel.families.values()]
            plots.label_points(axes, labels, np.array([(p.price, p.error) for p in panel.points]), joined)
    return path


def draw_few_step(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    floor: float | None,
    measure: str,
    title: str = "",
) -> Path:
    """Error against network calls, calls on a logarithmic axis.

    Args:
        path: The PNG to write.
        curves: Name -> (network calls, errors), equally long.
        floor: The measure's floor, real against real; None: not drawn.
        measure: Name and unit of the error.
        title: Of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: If lengths do not match, or calls are not positive.
    """
    series = plots.lines(curves, "calls")
    with plots.sheet(path, [title], height=3.9, columns=1) as (_, (axes,)):
        plots.draw_lines(axes, series)
        if floor is not None:
            axes.axhline(floor, **FLOOR, label=FLOOR_NAME)
        calls = sorted({float(x) for line in series.values() for x in line[0]})
        plots.scale(axes, "x", calls, log=True)
        # Ticks at the calls that were made, unless they would overlap.
        apart = [x for before, x in zip([0.0, *calls], calls, strict=False) if x > 1.25 * before]
        axes.set_xticks(apart, [f"{x:g}" for x in apart])
        plots.scale(axes, "y", [y for line in series.values() for y in line[1]] + ([] if floor is None else [floor]))
        axes.set_xlabel("network calls per sample")
        plots.label_error(axes, measure)
    return path


def draw_jacobian(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    marks: Mapping[str, float] | None = None,
    title: str = "",
) -> Path:
    """Norm of the Jacobian of the denoised image along trajectories, against the noise level.

    Args:
        path: The PNG to write.
        curves: Name -> (levels sigma/alpha, mean norms), equally long.
        marks: Name -> noise level to mark by a vertical line: a gate's end, the noise of the dirt.
        title: Of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: If lengths do not match, or levels are not positive.
    """
    series = plots.lines(curves, "levels")
    with plots.sheet(path, [title], height=3.9, columns=1) as (_, (axes,)):
        plots.draw_lines(axes, series)
        for number, (name, level) in enumerate((marks or {}).items()):
            axes.axvline(
                level, color=GREY, linestyle=DASHES[(number + 1) % 4], linewidth=1.4, label=f"{name}: {level:g}"
            )
        levels = [x for line in series.values() for x in line[0]]
        plots.scale(axes, "x", [*levels, *(marks or {}).values()], log=True)
        plots.scale(axes, "y", [y for line in series.values() for y in line[1]], log=False)
        axes.set_xlabel("noise level sigma / alpha")
        axes.set_ylabel("norm of the Jacobian of x0_hat")
    return path


def draw_spectrum(
    path: Path, v: Tensor, predicted: Mapping[str, Tensor], measured: Mapping[str, Tensor], title: str = ""
) -> Path:
    """Generated variance per direction against the true one: the theory as lines, the measurement as markers.

    Args:
        path: The PNG to write.
        v: True variances, shape (d,), positive.
        predicted: Name -> generated variance by the closed form, shape (d,), positive.
        measured: Name -> generated variance as measured; a name shared with ``predicted`` shares its colour.
        title: Of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: If shapes do not match, or a variance is not positive.
    """
    true = array(v, "v", (None,))
    series = [{n: array(x, f"{kind} {n!r}", true.shape) for n, x in group.items()}
              for kind, group in (("predicted", predicted), ("measured", measured))]  # fmt: skip
    if not all((x > 0).all() and np.isfinite(x).all() for x in [true, *series[0].values(), *series[1].values()]):
        raise ValueError("variances must be positive and finite")
    order, names = np.argsort(true), list(dict.fromkeys([*predicted, *measured]))
    with plots.sheet(path, [title], height=4.3, columns=1) as (_, (axes,)):
        ends = [true.min(), true.max()]
        axes.plot(ends, ends, **FLOOR, label="as the data")
        for group, kind in zip(series, ("predicted", "measured"), strict=True):
            for name, x in group.items():
                look = names.index(name)
                style = {"linestyle": DASHES[look % 4]} if kind == "predicted" else {"linestyle": "", "markersize": 6}
                axes.plot(
                    true[order], x[order], color=COLOURS[look % len(COLOURS)], label=f"{name}, {kind}",
                    marker="" if kind == "predicted" else MARKERS[look % 4], **style,
                )  # fmt: skip
        plots.scale(axes, "x", true.tolist(), log=True)
        plots.scale(axes, "y", [y for group in series for x in group.values() for y in x.tolist()] + ends, log=True)
        axes.set_xlabel("variance of the data along a direction (squared data units)")
        axes.set_ylabel("generated variance")
    return path
