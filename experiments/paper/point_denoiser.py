"""A small network for points of a few dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PointDenoiser(nn.Module):
    """A residual perceptron for points in ``dimension`` coordinates, called like a diffusers model.

    Args:
        dimension: Coordinates of a point.
        width: Hidden units.
        depth: Hidden layers.
        num_timesteps: T of the noise process, to scale the time embedding.
        modulated: The time embedding scales and shifts what each layer reads, and the last layer reads the hidden state
            as it is: with the other layers at rest the network is ``A diag(s(t)) B x_t + b(t)``, the exact denoiser of
            a Gaussian at every noise level. It starts as a network that does not ask ``t`` (Perez et al. 2018, started
            at zero as by Peebles and Xie 2023). Otherwise the embedding is added to what each layer reads.
    """

    def __init__(
        self, dimension: int, width: int = 128, depth: int = 3, num_timesteps: int = 1000, modulated: bool = False
    ) -> None:
        """Draw initial weights from torch's global generator."""
        super().__init__()
        self.num_timesteps = num_timesteps
        frequencies = torch.exp(torch.linspace(0, math.log(1000.0), 16))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(dimension, width)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, dimension)
        self.modulation: nn.Linear | None = None
        if modulated:
            self.modulation = nn.Linear(width, 2 * width * (depth + 1))
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Prediction of the shape of ``x_t``, (B, dimension), at timesteps ``t``, (B,) or ()."""
        phase = (t.to(x_t.dtype).reshape(-1, 1) + 0.5) / self.num_timesteps * self.frequencies
        time = self.time(torch.cat([phase.sin(), phase.cos()], dim=1))
        h = self.first(x_t)
        if self.modulation is None:
            for layer in self.hidden:
                h = h + layer(nn.functional.silu(h + time))
            return self.last(nn.functional.silu(h))
        scales = self.modulation(nn.functional.silu(time)).chunk(2 * len(self.hidden) + 2, dim=1)
        for layer, scale, shift in zip(self.hidden, scales[0::2], scales[1::2], strict=False):
            h = h + layer(nn.functional.silu(h) * (1 + scale) + shift)
        return self.last(h * (1 + scales[-2]) + scales[-1])
