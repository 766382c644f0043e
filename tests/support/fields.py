"""Sets of images whose law is known: Gaussian fields of one spectrum, each with its own contrast and noise."""

from __future__ import annotations

import math
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


def scenes(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """Pictures of things, (N, 3, side, side), float32 in (-1, 1): what a camera sees of shaded, textured bodies.

    Ellipses and boxes of power-law size hide one another; each has a colour, a slope of light and a texture of the
    spectrum 1/f^2.4, strong or faint. Seen at four times the size and averaged: edges are as soft as in photographs.
    """
    generator, large = seeded(seed), 4 * side
    f = torch.fft.fftfreq(large)
    frequency = (f[:, None].square() + f.square()).sqrt().clamp(min=1 / large)
    white = torch.randn(32, large, large, generator=generator)
    textures = torch.fft.ifft2(torch.fft.fft2(white) * frequency.pow(-1.2)).real
    textures = textures / textures.flatten(1).std(1)[:, None, None]
    y, x = torch.meshgrid(*2 * [torch.linspace(0, 1, large)], indexing="ij")
    pictures = []
    for _ in range(count):
        picture = torch.zeros(3, large, large)
        for body in range(7):
            colour, tint = torch.rand(2, 3, 1, 1, generator=generator)
            sx, sy, rough, cx, cy, size, angle, long, kind = torch.rand(9, generator=generator).tolist()
            place = torch.randint(large, (2,), generator=generator).tolist()
            texture = textures[int(32 * kind)].roll(place, (0, 1)) * (0.02 + 0.25 * rough**2)
            light = (sx - 0.5) * (x - 0.5) + (sy - 0.5) * (y - 0.5)
            skin = 1.6 * colour - 0.8 + (0.9 + 0.2 * tint) * (light + texture)
            radius, axis = 0.06 * (size + 1e-3) ** -0.6, 0.5 + long
            c, s = math.cos(math.pi * angle), math.sin(math.pi * angle)
            u, v = ((x - cx) * c + (y - cy) * s) / axis, ((y - cy) * c - (x - cx) * s) * axis
            inside = u.square() + v.square() < radius**2 if kind < 0.6 else torch.maximum(u.abs(), v.abs()) < radius
            picture = skin if body == 0 else torch.where(inside, skin, picture)
        pictures.append(torch.nn.functional.avg_pool2d(picture, 4))
    return torch.stack(pictures).tanh()
