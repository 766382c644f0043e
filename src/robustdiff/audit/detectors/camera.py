"""Noise of cameras and films: neighbouring pixels share it.

Sensors see one colour in each pixel and interpolate the others, pictures are shrunk and smoothed, files compressed;
grain is grey and strongest in the middle tones. So what is simulated is any of these.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.detectors.jpeg import compressed
from robustdiff.audit.simulate import draws

SITES = (((0, 0),), ((0, 1), (1, 0)), ((1, 1),))
"""Where in each square of 2 x 2 pixels a sensor sees red, green and blue."""
NEAR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])
SOFT = (0.45, 1.0)
"""Standard deviations in pixels of the smoothing."""
FINEST, COARSEST = 97, 88
"""Quality of JPEG in half of the pictures."""


@register_detector
class CameraNoise(Detector):
    """Correlated noise; its strength is its standard deviation, pixels being in [-1, 1]."""

    name = "camera"
    title = "with noise that neighbouring pixels share"
    become = "with camera noise of level {:.2g}"
    strengths = (0.05, 0.3)
    faint = True

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        rng, height, width = draws(generator), *image.shape[1:]
        white = torch.from_numpy(rng.standard_normal((3, height, width), dtype=np.float32))
        way = rng.random()
        if way < 0.5:
            noise = _interpolated(white, int(rng.integers(2)), int(rng.integers(2)))
        else:
            common = rng.choice([0.0, rng.random(), 1.0])
            noise = _softened(math.sqrt(common) * white[:1] + math.sqrt(1 - common) * white, rng.uniform(*SOFT))
        if len(image) == 1:
            noise = noise.mean(0, keepdim=True)
        tone = (image.mean(0) + 1) / 2
        shape = (torch.ones_like(tone), 4 * tone * (1 - tone), 0.5 + tone)[int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
        noisy = image + strength * noise / noise.std() * shape
        return noisy if rng.random() < 0.5 else compressed(noisy, int(rng.integers(COARSEST, FINEST + 1)), rng)


def _interpolated(white: Tensor, down: int, right: int) -> Tensor:
    """Each colour from its own sites, (3, H, W), the grid moved by 0 or 1 pixels."""
    seen = torch.zeros_like(white)
    for channel, sites in enumerate(SITES):
        for row, column in sites:
            seen[channel, (row + down) % 2 :: 2, (column + right) % 2 :: 2] = 1
    both = pad(torch.stack([white * seen, seen]), (1, 1, 1, 1), mode="reflect")
    sums, weights = conv2d(both.flatten(0, 1)[:, None], NEAR[None, None])[:, 0].view(2, *white.shape)
    return torch.where(seen > 0, white, sums / weights)


def _softened(noise: Tensor, sigma: float) -> Tensor:
    """Smoothed by a Gaussian, (3, H, W)."""
    kernel = torch.exp(-torch.arange(-3.0, 4.0).square() / 2 / sigma**2)
    around = pad(noise, (3, 3, 3, 3), mode="reflect")[:, None]
    return conv2d(conv2d(around, kernel.view(1, 1, 1, 7)), kernel.view(1, 1, 7, 1))[:, 0]
