"""Which figures an experiment has: networks and rows from disk to ``figures.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.paper import figures
from experiments.paper.errors import dimension, free_choices, training_for, training_set
from experiments.paper.figures import Frontier, Point
from experiments.paper.plots import sheet
from experiments.paper.toy_grid import DIRTS, FRONTIER, MAIN, METHODS
from experiments.paper.toy_training import Denoiser, draw
from experiments.paper.worlds import LinearGaussian, Mixture, Plane, Subspace, World
from robustdiff.utils.images import image_grid

Rows = Mapping[str, Mapping[str, Any]]
"""Results by the name of the row, ``world-dirt-method``."""
Networks = Callable[[str, str, str], Denoiser | None]
"""(world, dirt, method) -> the first seed's network, or None if it was not trained."""
FIELD_LEVEL = 0.1
"""Noise level sigma/alpha of the score fields: below that of the dirt, where a denoiser decides what is detail."""
CONTRAST = ("plain", "invariance", "gated-low")
"""Fields and trajectories; of the experiment ``invariance``: the methods at m = 0.5."""
SIDE_BY_SIDE = ("plain", "invariance", "adversarial-shift", "gated-low", "label-floor")
AGAINST_OUTLIERS = ("plain", "adversarial-shift", "gated-low", "label-floor", "pseudo-huber")
MEASURE = {
    "w2": "Wasserstein-2 (data units)",
    "frechet": "Frechet distance (squared pixels)",
}


@dataclass(frozen=True)
class View:
    """Two axes in which a world is looked at.

    Attributes:
        names: Of the axes.
        flat: Points (n, d) -> (n, 2).
        lifted: (n, 2) -> points (n, d) of the slice shown.
        support: Where the clean law lives, (m, 2).
    """

    names: tuple[str, str]
    flat: Callable[[Tensor], Tensor]
    lifted: Callable[[Tensor], Tensor]
    support: Tensor


def view(world: World) -> View | None:
    """How to look at a world; None for images."""
    if isinstance(world, Plane):
        axes = torch.stack([world.basis[:, 0], world.normal], 1).float()
        line = torch.linspace(-world.half_width, world.half_width, 120)[:, None] * torch.tensor([1.0, 0.0])
        return View(("along the plane", "above the plane"), lambda x: x @ axes, lambda y: y @ axes.T, line)
    if isinstance(world, Mixture):
        return View(("x1", "x2"), lambda x: x, lambda y: y, world.centres.float())
    if isinstance(world, LinearGaussian):
        angle = torch.linspace(0, 2 * math.pi, 73)
        ellipse = 2 * torch.stack([angle.cos(), angle.sin()], 1) * world.variances.float().sqrt()
        return View(("x1", "x2"), lambda x: x, lambda y: y, ellipse)
    return None


def networks_of(
    name: str, world: World, dirt: str, methods: Sequence[str], rows: Rows, networks: Networks
) -> dict[str, tuple[Denoiser, Callable[[Tensor], Tensor]]]:
    """Title -> (denoiser, change of its draws) of those methods that were trained, free ones included."""
    found: dict[str, tuple[Denoiser, Callable[[Tensor], Tensor]]] = {}
    for method in methods:
        row = rows.get(f"{name}-{dirt}-{method}")
        what = METHODS.get(method)
        if row is None:
            continue
        network = networks(name, dirt, what.base if what is not None and what.free else method)
        if network is None:
            continue
        if what is not None and what.free:
            found[row["title"]] = free_choices(what.free, network)[row["runs"]["0"]["chosen"]]
        else:
            found[row["title"]] = (network, lambda x: x)
    return found


def fields(path: Path, world: World, panels: Mapping[str, Denoiser], data: Tensor, title: str) -> Path:
    """Score fields at ``FIELD_LEVEL`` in data units, the exact one of the clean law first."""
    looked = view(world)
    assert looked is not None
    line = torch.linspace(-1.0, 1.0, 17)
    grid = torch.cartesian_prod(line, line)
    y = looked.lifted(grid)
    drawn = {}
    if isinstance(world, Plane | Mixture | LinearGaussian):
        drawn["exact, clean law"] = looked.flat(world.score(y, 1.0, FIELD_LEVEL).float())
    for name, denoiser in panels.items():
        t = denoiser.schedule.timestep_at(torch.tensor([FIELD_LEVEL]))[0]
        alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
        with torch.no_grad():
            drawn[name] = looked.flat(-denoiser.eps_hat(alpha * y, t) * alpha / sigma)
    return figures.draw_fields(path, drawn, grid, looked.flat(data[:400]), looked.support, title)


def trajectories(path: Path, world: World, panels: Mapping[str, Denoiser], calls: int, title: str) -> Path:
    """States x_t of the sampler from the same 40 starts."""
    looked = view(world)
    assert looked is not None
    drawn = {}
    for name, denoiser in panels.items():
        states: list[Tensor] = []
        end = draw(denoiser, 40, dimension(world), calls, 0, lambda x, _, states=states: states.append(x))
        kept = [*states[:: max(1, calls // 50)], end]
        drawn[name] = torch.stack([looked.flat(x) for x in kept])
    return figures.draw_trajectories(path, drawn, looked.support, title, looked.names)


def draw_all(
    folder: Path,
    worlds: Mapping[str, World],
    rows: Rows,
    networks: Networks,
    quick: bool,
) -> list[Path]:
    """Every figure that the rows and networks at hand suffice for.

    Args:
        folder: Where to put the PNGs.
        worlds: The experiment's worlds by name.
        rows: Results.
        networks: Trained networks.
        quick: For the number of network calls.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    for name, world in worlds.items():
        calls = training_for(world, quick).calls
        for dirt in DIRTS:
            only_contrast = f"{name}-clean-invariance-m0.5" in rows
            methods = SIDE_BY_SIDE if dirt != "outliers" else AGAINST_OUTLIERS
            if only_contrast:
                methods = ("plain", "invariance-m0.5", "equivariance-m0.5")
            panels = networks_of(name, world, dirt, methods, rows, networks)
            if len(panels) < 2:
                continue
            x0, _ = training_set(world, dirt, training_for(world, quick), 0)
            if isinstance(world, Subspace):
                drawn.append(_images(folder / f"{name}-{dirt}-images.png", world, x0, panels, calls))
                continue
            contrast = methods if only_contrast else CONTRAST
            three = {t: pair[0] for t, pair in networks_of(name, world, dirt, contrast, rows, networks).items()}
            where = f"{name}, {dirt}"
            if dirt != "outliers":
                title = f"Score at sigma/alpha = {FIELD_LEVEL:g}: {where}"
                drawn.append(fields(folder / f"{name}-{dirt}-fields.png", world, three, x0, title))
                title = f"Sampling trajectories: {where}"
                drawn.append(trajectories(folder / f"{name}-{dirt}-trajectories.png", world, three, calls, title))
            looked = view(world)
            assert looked is not None
            clouds = {"training data": looked.flat(x0[:4000])}
            for title, (denoiser, change) in panels.items():
                clouds[title] = looked.flat(change(draw(denoiser, 4000, dimension(world), calls, 0)))
            drawn.append(figures.draw_densities(folder / f"{name}-{dirt}-densities.png", clouds, 1.3))
        drawn += curves(folder, name, rows)
        drawn += frontier(folder, name, rows)
    return drawn


def curves(folder: Path, name: str, rows: Rows) -> list[Path]:
    """Few-step curves and Jacobians of a world, one figure for each kind of dirt."""
    drawn = []
    for dirt in DIRTS:
        here = [row for key, row in rows.items() if key.startswith(f"{name}-{dirt}-") and row["curves"]]
        if len(here) < 2:
            continue
        lines = {row["title"]: (row["curves"]["calls"], row["curves"]["error_by_calls"]) for row in here}
        floor = here[0]["floor"][MAIN[name]]["mean"]
        path = folder / f"{name}-{dirt}-few-step.png"
        title = f"Few-step sampling: {name}, {dirt}"
        drawn.append(figures.draw_few_step(path, lines, floor, MEASURE[MAIN[name]], title))
        norms = {row["title"]: (row["curves"]["jacobian_levels"], row["curves"]["jacobian"]) for row in here}
        marks = {"noise of the dirt": 0.2} if dirt == "inlier" else {}
        path = folder / f"{name}-{dirt}-jacobian.png"
        title = f"Jacobian of the denoiser along trajectories: {name}, {dirt}"
        drawn.append(figures.draw_jacobian(path, norms, marks, title))
    return drawn


def frontier(folder: Path, name: str, rows: Rows) -> list[Path]:
    """Error on dirty data against price on clean data, a panel for each kind of dirt."""
    panels = {}
    for dirt in DIRTS:
        if dirt == "clean":
            continue

        def error(method: str, dirt: str = dirt) -> float | None:
            row = rows.get(f"{name}-{dirt}-{method}")
            return None if row is None else float(row["values"][MAIN[name]]["mean"])

        families: dict[str, list[Point]] = {}
        for method, what in FRONTIER.items():
            price, found = error(method, "clean"), error(method)
            if price is not None and found is not None:
                edge = f", c = {what.settings['high']:g}" if what.family == "gated" else ""
                point = Point(f"m {what.settings['m']:g}", price, found)
                families.setdefault(f"{what.family}{edge}", []).append(point)
        marks = {}
        for method in ("plain", "adversarial-shift", "relabelled", "label-floor", "clean-subset"):
            price, found = error("plain" if method == "clean-subset" else method, "clean"), error(method)
            if price is not None and found is not None:
                marks[METHODS[method].title] = Point("", price, found)
        if families:
            floor = next(row for row in rows.values() if row["world"] == name)["floor"][MAIN[name]]["mean"]
            panels[f"{name}, {dirt}"] = Frontier(families, marks, floor, floor)
    if not panels:
        return []
    path = folder / f"{name}-frontier.png"
    return [figures.draw_frontier(path, panels, MEASURE[MAIN[name]], share=False)]


def _images(
    path: Path,
    world: Subspace,
    x0: Tensor,
    panels: Mapping[str, tuple[Denoiser, Callable[[Tensor], Tensor]]],
    calls: int,
    side: int = 6,
) -> Path:
    """The first ``side`` x ``side`` training images and samples, unselected, clipped to [-1, 1]."""
    shown = {"training images": x0[: side * side]}
    for title, (denoiser, change) in panels.items():
        shown[title] = change(draw(denoiser, 256, dimension(world), calls, 0))[: side * side]
    with sheet(path, list(shown)) as (_, axes):
        for axis, images in zip(axes, shown.values(), strict=True):
            pixels = ((images.reshape(-1, *world.shape).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            axis.imshow(image_grid(pixels, columns=side)[0].numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set_axis_off()
    return path
