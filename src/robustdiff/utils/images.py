"""Images as numbers and as files: 8 bit and [-1, 1], PNG, grids, thumbnails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def thumbnail(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(3, side, side): small images enlarged by a whole factor, large ones cropped, on mid-grey."""
    factor = max(1, side // max(pixels.shape[1:]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    tops = [max(0, (length - side) // 2) for length in pixels.shape[1:]]
    pixels = pixels[:, tops[0] : tops[0] + side, tops[1] : tops[1] + side]
    picture = np.full((3, side, side), 128, np.uint8)
    top, left = ((side - length) // 2 for length in pixels.shape[1:])
    picture[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return picture


def to_uint8(x0: Tensor) -> Tensor:
    """8-bit image of ``x0`` in [-1, 1], any shape: clipped, then rounded to the nearest of 256 levels."""
    return ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(image: Tensor) -> Tensor:
    """``v / 127.5 - 1`` in float32: 0 is -1, 255 is +1. Any shape; :func:`to_uint8` undoes it exactly."""
    return image.float() / 127.5 - 1


def save_png(image: Tensor, path: str | Path) -> None:
    """Write one image, uint8 of shape (C, H, W) with C = 1 or 3, as PNG."""
    pixels = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path, "PNG")


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """One picture of many, with a one-pixel mid-grey line between them.

    Args:
        images: uint8, shape (N, C, H, W), N >= 1.
        columns: Images per row. Default: about the square root of N.

    Returns:
        uint8, shape (C, rows * (H + 1) - 1, columns * (W + 1) - 1).
    """
    count, channels, height, width = images.shape
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    grid = torch.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = image
    return grid
