"""Energies of the discrete cosine transform, which blur and JPEG change."""

from __future__ import annotations

import torch
from scipy.fft import dctn
from torch import Tensor


def cosine_energy(images: Tensor) -> Tensor:
    """Squares of the orthonormal DCT-II of the last two dimensions, float64, of the same shape."""
    return torch.from_numpy(dctn(images.double().numpy(), axes=(-2, -1), norm="ortho")).square()
