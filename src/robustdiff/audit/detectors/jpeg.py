"""Strong JPEG: the grid of 8 x 8 blocks shows."""

from __future__ import annotations

import math
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustdiff.audit.cosines import cosine_energy
from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import draws, picture, tensor
from robustdiff.audit.survey import Survey

GRIDDED = -0.6
"""Highest mean of a group that is called compressed: photographs as they are lie above."""
ROUNDING = (2 / 255) ** 2 / 12
"""Variance of rounding to 8 bit, pixels being in [-1, 1]."""


@register_detector
class Jpeg(Detector):
    """JPEG compression; its strength is Pillow's quality."""

    name = "jpeg"
    title = "with the 8 x 8 grid of strong JPEG"
    become = "at JPEG quality {:.0f}"
    strengths = (50, 5)
    order = 20

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        return compressed(image, round(strength), draws(generator))

    def detect(self, survey: Survey) -> Tensor | None:
        """Among images too small to be compared with copies: a group with more of a grid than another."""
        return super().detect(survey) if survey.compared else survey.low_group(jpeg_grid, GRIDDED)


def compressed(image: Tensor, quality: int, rng: np.random.Generator) -> Tensor:
    """As it comes out of a JPEG file, (C, H, W), its colours at full, half or quarter resolution."""
    file = BytesIO()
    subsampling = int(rng.integers(3)) if len(image) == 3 else -1
    picture(image).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return tensor(Image.open(file))


def jpeg_grid(images: Tensor) -> Tensor:
    """How strongly an image carries the 8 x 8 grid of JPEG: log10, shape (B,), float64; nan below 16 pixels.

    The energy of high frequencies in blocks on the grid over that in blocks off it by half: JPEG sets the former to 0
    and jumps from block to block. About 0 without a grid (-.3 to .2; at 16 x 16 pixels, with one block off the grid,
    -.6 to .5), below -1 for strong compression. Resizing or cropping by other than 8 pixels hides it.

    Args:
        images: Shape (B, C, H, W) in [-1, 1], noise may exceed it.
    """
    height, width = images.shape[2:]
    if min(height, width) < 16:
        return torch.full((len(images),), math.nan, dtype=torch.float64)
    grey = images.double().mean(1, keepdim=True)
    on, off = _high_energy(grey), _high_energy(grey[:, :, 4:-4, 4:-4])
    return ((on + 2 * ROUNDING) / (off + 2 * ROUNDING)).log10()


def _high_energy(grey: Tensor) -> Tensor:
    energy = cosine_energy(grey.unfold(2, 8, 8).unfold(3, 8, 8))
    high = torch.arange(8)[:, None] + torch.arange(8) >= 8
    return energy[..., high].flatten(1).mean(1)
