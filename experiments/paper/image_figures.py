"""Figures of the image grid: what the networks draw, beside what they saw; error against network calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.paper import plots
from experiments.paper.figures import draw_few_step
from experiments.paper.image_rows import REFERENCE, TRAINING, drawn_images, read_array
from experiments.paper.results import Row, main_of, measure
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.utils.images import from_uint8, image_grid, to_uint8

SHOWN, COLUMNS = 24, 6
"""Images of each panel, and how many stand in a line."""


def draw_images(folder: Path, rows: Sequence[Row], dirts: Sequence[str]) -> list[Path]:
    """Samples and few-step curves of the first seed, for each kind of dirt that has rows.

    Args:
        folder: Of the experiment.
        rows: Its results.
        dirts: Kinds of dirt to draw.
    """
    drawn = []
    for dirt in dirts:
        here = [row for row in rows if row["dirt"] == dirt and 0 in row["seeds"]]
        if not here:
            continue
        panels = {"clean, held out": read_array(folder / REFERENCE)[:SHOWN]}
        if here[0]["dirt_spec"]:
            panels["training images"] = dirty_images(folder, here[0]["dirt_spec"])
        for row in here:
            evaluation = folder / "evaluations" / f"{dirt}-{row['method']}-seed0"
            shrunk = evaluation / "shrunk.npy"
            found = read_array(shrunk) if shrunk.is_file() else None
            if found is None and (evaluation / "drawn").is_dir():
                found = drawn_images(evaluation)
            if found is not None:
                panels[row["title"]] = found[:SHOWN]
        world = here[0]["world"]
        drawn.append(draw_samples(folder / "figures" / f"{world}-{dirt}-samples.png", panels))
        curves = [row for row in here if row["curves"]]
        if len(curves) > 1:
            key = main_of(curves[0])
            lines = {row["title"]: (row["curves"]["calls"], row["curves"]["error_by_calls"]) for row in curves}
            floor = curves[0]["floor"].get(key, {}).get("mean")
            path = folder / "figures" / f"{world}-{dirt}-few-step.png"
            drawn.append(draw_few_step(path, lines, floor, measure(key).name, f"Few-step sampling: {world}, {dirt}"))
    return drawn


def dirty_images(folder: Path, specs: Sequence[str], seed: int = 0) -> Tensor:
    """The first training images with the dirt that a run of that seed saw, uint8."""
    corruptions = [Corruption.parse(spec) for spec in specs]
    x0 = from_uint8(read_array(folder / TRAINING)[:SHOWN])
    dirty = [corrupt(image, corruptions, seed, index)[0] for index, image in enumerate(x0)]
    return to_uint8(torch.stack(dirty))


def draw_samples(path: Path, panels: dict[str, Tensor]) -> Path:
    """One panel of images for each name.

    Args:
        path: The PNG to write.
        panels: Name -> images, uint8, (N, C, H, W).

    Returns:
        ``path``.
    """
    with plots.sheet(path, list(panels), height=2.4, columns=3) as (_, axes):
        for one, images in zip(axes, panels.values(), strict=True):
            grid = image_grid(images, COLUMNS).permute(1, 2, 0).numpy()
            one.imshow(grid[..., 0] if grid.shape[2] == 1 else grid, cmap="gray", vmin=0, vmax=255)
            one.set_xticks([])
            one.set_yticks([])
            one.grid(False)
            one.spines[:].set_visible(False)
    return path
