"""A rectangle of one colour over the picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import any_colour, draws


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
        shape = math.exp(rng.uniform(-0.7, 0.7))
        edges = [
            min(side, max(2, int(side * math.sqrt(strength) * one)))
            for side, one in zip(sides, (shape, 1 / shape), strict=True)
        ]
        rows, columns = (
            slice(at := int(rng.integers(side - edge + 1)), at + edge) for side, edge in zip(sides, edges, strict=True)
        )
        covered = image.clone()
        covered[:, rows, columns] = torch.from_numpy(any_colour(channels, rng)).float()[:, None, None] / 127.5 - 1
        return covered
