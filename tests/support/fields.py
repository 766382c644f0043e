"""Sets of images whose law is known: Gaussian fields of one spectrum, each with its own contrast and noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers import seeded

Load = Callable[[range], Tensor]


def loader(images: Tensor) -> Load:
    """Images by place."""
    return lambda places: images[list(places)]


def spectrum(size: int, power: float = 2.0, floor: float = 0.0) -> Tensor:
    """A power law, weakest first, of mean 0.1: variances of pixels in [-1, 1]."""
    values = torch.arange(size, 0, -1).double().pow(-power) + floor
    return values * 0.1 / values.mean()


def gaussian_set(
    count: int, side: int, sigma: Tensor, values: Tensor, seed: int = 0, contrast: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Images of one block each, (N, 1, side, side), float64; their contrasts, (N,); the basis, (D, D), as columns.

    ``x = B sqrt(s values) z + sigma n`` with a random orthonormal B and log-normal s, whose logarithm has deviation
    ``contrast``.
    """
    generator = seeded(seed)
    size = side * side
    z, n = (torch.randn(count, size, generator=generator).double() for _ in range(2))
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    s = (contrast * torch.randn(count, generator=generator).double()).exp()
    x = (z * (s[:, None] * values).sqrt()) @ basis.T + sigma[:, None] * n
    return x.reshape(count, 1, side, side), s, basis


def natural(count: int, side: int = 16, seed: int = 0) -> Tensor:
    """Pictures of nothing, (N, 1, side, side), float32: fields of the spectrum 1/f^2 with random contrast, and an edge.

    All lie in (-1, 1).
    """
    generator = seeded(seed)
    f = torch.fft.fftfreq(4 * side)
    frequency = (f[:, None].square() + f.square()).sqrt().clamp(min=1 / (4 * side))
    white = torch.randn(count, 4 * side, 4 * side, generator=generator)
    fields = torch.fft.ifft2(torch.fft.fft2(white) * frequency.pow(-1.5)).real[:, :side, :side]
    fields = fields / fields.flatten(1).std(1).mean()
    angle, shift, jump, contrast = torch.rand(4, count, 1, 1, generator=generator)
    grid = torch.linspace(-1, 1, side)
    line = (2 * torch.pi * angle).cos() * grid[:, None] + (2 * torch.pi * angle).sin() * grid - (shift - 0.5)
    x = 0.35 * (0.4 + contrast) * (fields + 1.5 * jump * line.sign())
    return x.tanh()[:, None]
