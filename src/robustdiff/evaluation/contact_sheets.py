"""Pictures beside the numbers: generated images with their nearest real ones, and the closest pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from robustdiff.evaluation.features import Images
from robustdiff.utils.atomic_io import fsync_file
from robustdiff.utils.images import image_grid, save_png

NEAREST = 4
"""Real images shown beside each generated one."""
ROWS = 10
PAIRS_IN_A_ROW = 4
GAP = 16
"""Pixels between images that do not belong together."""
MOST = 2**11
"""Longest side of a sheet, pixels: small images are enlarged up to it, by whole factors."""


def _save(blocks: Sequence[Tensor], columns: Sequence[int], path: Path) -> None:
    """Blocks of images side by side, wide gaps between them; whole or not at all.

    Enlarged by repeating pixels, so that 8 x 8 images can be looked at. Blocks have equally many rows.
    """
    side, width = max(blocks[0].shape[-2:]), sum(columns) * blocks[0].shape[-1]
    factor = max(1, min(64 // side, MOST // width))
    grids: list[Tensor] = []
    for images, count in zip(blocks, columns, strict=True):
        if grids:
            grids.append(torch.full((*grids[0].shape[:2], GAP), 128, dtype=torch.uint8))
        grids.append(image_grid(images.repeat_interleave(factor, -1).repeat_interleave(factor, -2), count))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    save_png(torch.cat(grids, -1), part)
    fsync_file(part)
    part.replace(path)


def nearest_sheet(generated: Images, reference: Images, shown: Sequence[int], nearest: Tensor, path: Path) -> None:
    """Write rows of a generated image and its nearest real ones, the nearest first.

    Args:
        generated: uint8 (n, C, H, W).
        reference: uint8 (m, C, H, W), the same size.
        shown: Generated images, one a row.
        nearest: Indices into the reference, shape (rows, k), of each of them.
        path: PNG to write.
    """
    k = nearest.shape[1]
    _save([_picked(generated, shown), _picked(reference, nearest.flatten().tolist())], [1, k], path)


def pairs_sheet(generated: Images, training: Images, pairs: Sequence[tuple[int, int, float]], path: Path) -> None:
    """Write the closest pairs, generated image and training image side by side, four pairs in a row.

    Args:
        generated: uint8 (n, C, H, W).
        training: uint8 (N, C, H, W), the same size.
        pairs: (generated index, training index, ratio), at least one.
        path: PNG to write.
    """
    blocks = []
    rows = -(-len(pairs) // PAIRS_IN_A_ROW)
    for place in range(min(PAIRS_IN_A_ROW, len(pairs))):
        here = pairs[place::PAIRS_IN_A_ROW]
        images = [image for g, t, _ in here for image in (generated[g : g + 1], training[t : t + 1])]
        empty = torch.full_like(images[0], 128)
        blocks.append(torch.cat([*images, *[empty] * (2 * (rows - len(here)))]))
    _save(blocks, [2] * len(blocks), path)


def attacked_sheet(clean: Images, attacked: Images, path: Path) -> None:
    """Write images as they would be on the left and as an attack leaves them on the right, the first 64 of each.

    Args:
        clean: uint8 (n, C, H, W).
        attacked: uint8 (n, C, H, W), the same size.
        path: PNG to write.
    """
    columns = min(8, len(clean))
    rows = min(8, len(clean) // columns)
    _save([clean[: rows * columns], attacked[: rows * columns]], [columns, columns], path)


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` places of ``count``, evenly spread: the first ones of a folder are of one class."""
    shown = min(count, most)
    return [place * count // shown for place in range(shown)]


def overview(images: Images, path: Path) -> None:
    """Write 49 images, evenly spread, seven in a row, for a look at what was trained on.

    Args:
        images: uint8 (N, C, H, W), N >= 1.
        path: PNG to write.
    """
    _save([_picked(images, spread(len(images), 49))], [7], path)


def _picked(images: Images, indices: Sequence[int]) -> Tensor:
    return torch.cat([images[i : i + 1] for i in indices])
