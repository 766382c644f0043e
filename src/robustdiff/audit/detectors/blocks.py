"""A rectangle of one colour over the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import any_colour, draws
from robustdiff.utils.images import to_uint8

SHAPES = (-0.7, -0.35, 0.0, 0.35, 0.7)
"""Logarithms of how much taller a rectangle is than a square of its area: the extremes, and some between."""
FLAT = 2
"""Largest difference within a rectangle, of 255."""


@register_detector
class Blocks(Detector):
    """A rectangle of one colour; its strength is its share of the area."""

    name = "blocks"
    title = "with a rectangle of one colour over them"
    become = "with a rectangle over {:.0%} of them"
    strengths = (0.03, 0.3)
    usual = True

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        rng, (channels, *sides) = draws(generator), image.shape
        edges = _edges(sides, strength, rng.uniform(SHAPES[0], SHAPES[-1]))
        rows, columns = (
            slice(at := int(rng.integers(side - edge + 1)), at + edge) for side, edge in zip(sides, edges, strict=True)
        )
        covered = image.clone()
        covered[:, rows, columns] = torch.from_numpy(any_colour(channels, rng)).float()[:, None, None] / 127.5 - 1
        return covered

    def possible(self, images: Tensor) -> Tensor:
        """Where some rectangle of the least size is flat."""
        pixels, found = to_uint8(images).float(), torch.zeros(len(images), dtype=torch.bool)
        for shape in SHAPES:
            height, width = _edges(images.shape[2:], self.strengths[0], shape)
            high, low = (max_pool2d(max_pool2d(x, (height, 1), 1), (1, width), 1) for x in (pixels, -pixels))
            found |= ((high + low).amax(1) <= FLAT).flatten(1).any(1)
        return found


def _edges(sides: Sequence[int], area: float, shape: float) -> list[int]:
    """Height and width of a rectangle of a share of the area, taller than a square by the exponential of ``shape``."""
    return [
        min(side, max(2, int(side * math.sqrt(area) * math.exp(sign * shape))))
        for side, sign in zip(sides, (1, -1), strict=True)
    ]
