"""Blind signs of damage in batches of images: blur, and the grid of JPEG.

Pure functions of tensors (B, C, H, W) in [-1, 1], noise may exceed it; one number per image. Each asks one question and
says in its text when it answers wrongly.
"""

from __future__ import annotations

import math

import torch
from scipy.fft import dctn
from torch import Tensor

LEVEL = 2 / 255
"""One step of 8 bit."""
ROUNDING = LEVEL**2 / 12


def _energy(images: Tensor) -> Tensor:
    """Squares of the orthonormal DCT-II of the last two dimensions, float64."""
    return torch.from_numpy(dctn(images.double().numpy(), axes=(-2, -1), norm="ortho")).square()


def sharpness(images: Tensor) -> Tensor:
    """How much finest detail there is beside fine: log10 of the ratio of mean energies, shape (B,), float64.

    Of the two-dimensional DCT: frequencies of at least 3/4 of the highest in either direction, over those from 3/8 to
    3/4. About -1 for photographs at full resolution, -.5 for drawings, near 0 for white noise, below -2 for blurred or
    enlarged pictures. A picture out of focus by intent is no less blurred.

    Args:
        images: At least 4 x 4 pixels.
    """
    height, width = images.shape[2:]
    energy = _energy(images).mean(1)
    frequency = torch.maximum(torch.arange(height)[:, None] / height, torch.arange(width) / width)
    fine, middle = energy[:, frequency >= 0.75], energy[:, (frequency >= 0.375) & (frequency < 0.75)]
    return ((fine.mean(1) + 1e-9) / (middle.mean(1) + 1e-9)).log10()


def jpeg_grid(images: Tensor) -> Tensor:
    """How strongly an image carries the 8 x 8 grid of JPEG: log10, shape (B,), float64; nan below 16 pixels.

    The energy of high frequencies in blocks on the grid over that in blocks off it by half: JPEG sets the former to 0
    and jumps from block to block. About 0 without a grid (-.3 to .2; at 16 x 16 pixels, with one block off the grid,
    -.6 to .5), below -1 for strong compression. Resizing or cropping by other than 8 pixels hides it.
    """
    height, width = images.shape[2:]
    if min(height, width) < 16:
        return torch.full((len(images),), math.nan, dtype=torch.float64)
    grey = images.double().mean(1, keepdim=True)
    on, off = _high_energy(grey), _high_energy(grey[:, :, 4:-4, 4:-4])
    return ((on + 2 * ROUNDING) / (off + 2 * ROUNDING)).log10()


def _high_energy(grey: Tensor) -> Tensor:
    energy = _energy(grey.unfold(2, 8, 8).unfold(3, 8, 8))
    high = torch.arange(8)[:, None] + torch.arange(8) >= 8
    return energy[..., high].flatten(1).mean(1)
