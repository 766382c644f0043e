"""Every figure: a PNG of sane size, below 200 kB, that shows its data, refuses what does not fit."""

import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.paper import figures as figures
from experiments.paper import plot_set as gallery
from experiments.paper import plots as drawing
from experiments.paper.errors import training_set
from experiments.paper.figures import Frontier, Point
from experiments.paper.point_denoiser import PointDenoiser
from experiments.paper.toy_grid import METHODS, Training
from experiments.paper.toy_training import Denoiser, schedule_for
from experiments.paper.worlds import Subspace
from helpers import normal
from robustdiff.utils.images import image_grid

ANGLES = torch.arange(8) * math.pi / 4
RING = torch.stack([ANGLES.cos(), ANGLES.sin()], 1).double()
AXIS = torch.linspace(-2, 2, 9, dtype=torch.float64)
GRID = torch.cartesian_prod(AXIS, AXIS)
CALLS = [1000, 200, 100, 50, 20, 10, 5]
V = torch.arange(1, 9, dtype=torch.float64) ** -1.5


def walk(scale: float, n: int = 20, steps: int = 12) -> torch.Tensor:
    """Paths from noise to ``scale`` times the ring."""
    start, end = normal(n, 2), scale * RING[torch.arange(n) % 8]
    return start + torch.linspace(0, 1, steps, dtype=torch.float64)[:, None, None] * (end - start)


def frontier(shift: float = 0.0, strengths: int = 4) -> Frontier:
    points = [Point(f"m {i}", 0.03 + 0.01 * i, 0.3 / (1 + i) + shift) for i in range(strengths)]
    other = [Point(f"m {i}", 0.03 + 0.02 * i, 0.3 / (1 + 0.3 * i) + shift) for i in range(strengths)]
    return Frontier({"gated": points, "constant": other}, {"plain": Point("", 0.03, 0.3 + shift)}, 0.02, 0.02)


DRAW: dict[str, Callable[[Path, float], Path]] = {
    "fields": lambda p, x: figures.draw_fields(
        p, {"plain": -GRID, "robust": x * GRID.flip(1)}, GRID, normal(50, 2), RING, "level 0.3"
    ),
    "fields-alone": lambda p, x: figures.draw_fields(p, {"plain": x * GRID.flip(1) - GRID}, GRID),
    "trajectories": lambda p, x: figures.draw_trajectories(p, {"plain": walk(1.0), "robust": walk(x)}, RING, "ring"),
    "densities": lambda p, x: figures.draw_densities(p, {"a": normal(500, 2), "b": x * normal(500, 2, seed=1)}, 2.0),
    "frontier": lambda p, x: figures.draw_frontier(p, {"inlier": frontier(), "outliers": frontier(x)}, "W2"),
    "few-step": lambda p, x: figures.draw_few_step(p, {"plain": (CALLS, [x + 0.1 * i for i in range(7)])}, 0.02, "W2"),
    "jacobian": lambda p, x: figures.draw_jacobian(p, {"plain": ([0.1, 1, 10], [1, 0.5, x])}, {"gate": 0.2}),
    "spectrum": lambda p, x: figures.draw_spectrum(p, V, {"gated": V / (1 + x)}, {"gated": V / 1.6}),
}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_is_a_light_png_that_depends_on_its_data(name: str, tmp_path: Path) -> None:
    path = DRAW[name](tmp_path / "new" / "a.png", 0.5)
    content = path.read_bytes()
    assert path == tmp_path / "new" / "a.png"
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 700 <= width <= 1400
    assert 350 <= height <= 1500
    assert 5_000 < len(content) < drawing.MAX_BYTES == 200_000
    assert pixels(path).mean() > 200  # light
    assert (pixels(path)[[0, -1]] == 255).all()  # nothing is cut off at the upper and lower edge
    again, other = DRAW[name](tmp_path / "b.png", 0.5), DRAW[name](tmp_path / "c.png", 0.7)
    assert again.read_bytes() == content
    assert other.read_bytes() != content


def test_every_text_is_at_least_9_points_when_shown_830_pixels_wide(tmp_path: Path) -> None:
    from matplotlib.text import Text

    sizes = []
    for titles in (["one"], ["one", "two"], list("abcdef")):
        with drawing.sheet(tmp_path / "a.png", titles, "title") as (figure, panels):
            for axes in panels:
                axes.plot([1, 2], label="x")
                drawing.note(axes, "a note")
                drawing.label_points(axes, [("label", (0, 1), "k")], np.array([[0.0, 1.0]]), [])
        scale = 830 / 96 / figure.get_figwidth()
        sizes += [text.get_fontsize() * scale for text in figure.findobj(Text) if text.get_text()]
    assert len(sizes) > 30
    assert min(sizes) >= 9


def test_a_rich_figure_stays_below_the_limit(tmp_path: Path) -> None:
    clouds = {f"method {i}": normal(20_000, 2, seed=i) for i in range(6)}  # every cell of every histogram differs
    assert figures.draw_densities(tmp_path / "a.png", clouds, 2.0).stat().st_size < 200_000
    axis = torch.linspace(-2, 2, 25, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    fields = {f"method {i}": normal(*grid.shape, seed=i) for i in range(3)}
    assert figures.draw_fields(tmp_path / "b.png", fields, grid).stat().st_size < 200_000


def test_panels_share_their_limits_which_the_tamest_panel_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    framed, notes = [], []
    frame, note = drawing.frame, drawing.note
    monkeypatch.setattr(drawing, "frame", lambda *a: (framed.append((*a[1], *a[2])), frame(*a)))
    monkeypatch.setattr(drawing, "note", lambda axes, text: (notes.append(text), note(axes, text)))
    gone = walk(1.0)
    gone[-1, :5] = math.inf
    gone[-1, 5:8] = math.nan
    paths = {"plain": walk(1.0), "diverged": walk(500.0), "not finite": gone}
    figures.draw_trajectories(tmp_path / "a.png", paths, RING)
    assert len(set(framed)) == 1
    assert 1 < framed[0][2] <= 2.5
    assert notes == ["", "20 of 20 ends outside", "8 of 20 ends outside"]


def test_densities_say_what_lies_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = []
    monkeypatch.setattr(drawing, "note", lambda axes, text: notes.append(text))
    x = torch.zeros(100, 2)
    x[:7] = 5.0
    x[7] = math.nan
    figures.draw_densities(tmp_path / "a.png", {"a": x, "b": torch.zeros(10, 2)}, 1.0)
    assert notes == ["8 % outside", ""]


def test_labels_of_a_frontier_do_not_cover_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list = []
    text_box = drawing._text_box
    monkeypatch.setattr(drawing, "_text_box", lambda label: boxes.append((label, text_box(label))) or boxes[-1][1])
    figures.draw_frontier(tmp_path / "a.png", {"inlier": frontier(), "outliers": frontier(0.01)}, "W2")
    for panel in {label.axes for label, _ in boxes if label.axes}:  # a label that was tried and taken away has none
        written = [box for label, box in boxes if label.axes is panel and label in panel.texts]
        assert len(written) == 8
        for i, a in enumerate(written):
            for b in written[:i]:
                shared = drawing._overlap(a, b)
                assert shared < 0.1 * a.width * a.height


def test_frontier_panels_share_their_limits_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (True, False):
        seen: list = []
        scale = drawing.scale
        with monkeypatch.context() as patch:
            patch.setattr(
                drawing, "scale", lambda a, w, v, s=seen, f=scale, **k: (f(a, w, v, **k), s.append((a, w)))[0]
            )
            panels = {"inlier": frontier(), "outliers": frontier(0.5)}
            figures.draw_frontier(tmp_path / "a.png", panels, "W2", share=share)
        heights = {axes.get_ylim() for axes, which in seen if which == "y"}
        assert len(heights) == (1 if share else 2)


def test_lines_of_many_methods_are_told_apart_and_a_long_measure_is_not_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels: list = []
    draw = drawing.draw_lines
    monkeypatch.setattr(drawing, "draw_lines", lambda axes, curves: (panels.append(axes), draw(axes, curves))[1])
    curves = {f"method {i}": ([5, 10, 20], [1 + i, 2 + i, 3 + i]) for i in range(16)}
    path = figures.draw_few_step(tmp_path / "a.png", curves, 0.5, "Frechet distance, squeezenet10_imagenet (squares)")
    assert (pixels(path)[[0, -1]] == 255).all()
    looks = [(line.get_color(), line.get_linestyle()) for line in panels[0].lines[:16]]
    assert len(set(looks)) == 16
    assert len({(line.get_color(), line.get_marker()) for line in panels[0].lines[:16]}) == 16


@pytest.mark.parametrize("name", ["frontier", "few-step"])
def test_the_floor_is_in_the_one_legend(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list = []
    monkeypatch.setattr(drawing, "_png", lambda figure: drawn.append(figure) or b"")
    DRAW[name](tmp_path / "a.png", 0.5)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()].count(figures.FLOOR_NAME) == 1


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "field": (lambda p: figures.draw_fields(p, {"plain": -GRID[1:]}, GRID), "field 'plain' has 80 arrows, the grid 81"),
    "field-3d": (lambda p: figures.draw_fields(p, {"plain": normal(81, 3)}, GRID), r"\(81, 3\) instead of \(any, 2\)"),
    "data": (lambda p: figures.draw_fields(p, {"plain": -GRID}, GRID, normal(5, 3)), "data has shape"),
    "no-field": (lambda p: figures.draw_fields(p, {}, GRID), "nothing to draw"),
    "paths": (lambda p: figures.draw_trajectories(p, {"plain": walk(1.0)[0]}, RING), "paths 'plain' has shape"),
    "one-step": (lambda p: figures.draw_trajectories(p, {"plain": walk(1.0)[:1]}, RING), "a single step"),
    "support": (lambda p: figures.draw_trajectories(p, {"plain": walk(1.0)}, RING[:0]), "support has shape"),
    "samples": (lambda p: figures.draw_densities(p, {"a": normal(5, 4)}, 1.0), "samples 'a' has shape"),
    "limit": (lambda p: figures.draw_densities(p, {"a": normal(5, 2)}, 0.0), "limit is 0.0"),
    "frontier": (lambda p: figures.draw_frontier(p, {"inlier": Frontier({})}), "frontier 'inlier' has no points"),
    "frontier-nan": (
        lambda p: figures.draw_frontier(p, {"inlier": Frontier({"f": [Point("m 1", 1.0, math.nan)]})}),
        "the point 'm 1' is not finite",
    ),
    "calls": (lambda p: figures.draw_few_step(p, {"plain": ([1, 2], [1.0])}, None, "W2"), "2 calls and 1 values"),
    "zero-calls": (lambda p: figures.draw_few_step(p, {"plain": ([0], [1.0])}, None, "W2"), "calls must be positive"),
    "levels": (lambda p: figures.draw_jacobian(p, {"plain": ([], [])}), "0 levels and 0 values"),
    "predicted": (lambda p: figures.draw_spectrum(p, V, {"a": V[1:]}, {}), r"predicted 'a' has shape \(7,\) instead"),
    "variance": (lambda p: figures.draw_spectrum(p, V, {}, {"a": 0 * V}), "positive and finite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    draw, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_settings_alone_and_does_not_follow_them(tmp_path: Path) -> None:
    import matplotlib

    before = DRAW["few-step"](tmp_path / "a.png", 0.5).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 5, "savefig.dpi": 30}):
        mine = dict(matplotlib.rcParams)
        assert DRAW["few-step"](tmp_path / "b.png", 0.5).read_bytes() == before
        assert dict(matplotlib.rcParams) == mine


def test_matplotlib_is_imported_only_when_something_is_drawn() -> None:
    code = "import sys, experiments.paper.figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- which figures an experiment has ---------------------------------------------------------------------


def test_figures_of_the_subspace_show_draws_of_its_law_and_the_exact_score(tmp_path: Path, monkeypatch) -> None:
    short = Training(points=60, samples=50, calls=10)
    world = Subspace(0.4 * normal(30, 1, 4, 4, seed=1, dtype=torch.float32), 3, 0.3)
    shown: list[torch.Tensor] = []

    def grid(images: torch.Tensor, columns: int) -> torch.Tensor:
        shown.append(images)
        return image_grid(images, columns)

    monkeypatch.setattr(gallery, "training_for", lambda world, quick: short)
    monkeypatch.setattr(gallery, "image_grid", grid)
    curves = {"calls": [10, 5], "error_by_calls": [0.1, 0.2], "jacobian_levels": [0.1, 1.0], "jacobian": [0.9, 0.4]}
    kinds = {"clean": ("ideal", "plain"), "inlier": ("plain", "label-floor"), "outliers": ("plain",)}
    rows = {
        f"subspace-{dirt}-{method}": {
            "title": METHODS[method].title, "runs": {"0": {"chosen": 0.15}}, "floor": {"frechet": {"mean": 0.01}},
            "values": {"frechet": {"mean": 0.02}}, "curves": curves if dirt == "clean" else {},
        }
        for dirt, methods in kinds.items()
        for method in methods
    }  # fmt: skip
    network = Denoiser(PointDenoiser(16, 8, 1, modulated=True).requires_grad_(False), schedule_for("v_prediction"))
    asked = []

    def networks(name: str, dirt: str, method: str) -> Denoiser:
        asked.append((name, dirt, method))
        return network

    drawn = gallery.draw_all(tmp_path, {"subspace": world}, rows, networks, False)
    wanted = ["subspace-inlier-images", "subspace-clean-few-step", "subspace-clean-jacobian"]
    assert [path.stem for path in drawn] == wanted  # a row alone, and the exact score beside it, are no sheet of images
    assert all(path.stat().st_size > 5000 for path in drawn)
    assert ("subspace", "inlier", "plain") in asked
    assert not any(method in ("ideal", "label-floor") for _, _, method in asked)  # that have no network of their own
    x0, hit = training_set(world, "inlier", short, 0)
    assert hit[:36].any()
    pixels_of = ((x0[:36].reshape(36, 1, 4, 4).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(shown[0], pixels_of)  # dirt included
    assert [len(each) for each in shown] == [36, 36, 36]
