"""Pictures that were reduced to few grey levels."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.utils.images import to_uint8

MOST = 16
"""Different values in a channel of an image of few grey levels."""
SPACINGS = torch.linspace(18, 128, 1100)
"""Distances of neighbouring levels that are tried, of 255."""


@register_detector
class Banding(Detector):
    """Values rounded to few levels, evenly spaced; the strength is their number in each channel."""

    name = "banding"
    title = "of few grey levels"
    become = "with {:.0f} grey levels"
    strengths = (12.0, 3.0)

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        steps = (strength - 1) / 2
        return ((image + 1) * steps).round() / steps - 1

    def possible(self, images: Tensor) -> Tensor:
        """Where the values are few and evenly spaced: the colours of a drawing are not."""
        return torch.tensor([_evenly_spaced(image) for image in to_uint8(images)])


def _evenly_spaced(image: Tensor) -> bool:
    """Whether all values of an image, uint8 (C, H, W), lie on one ladder, but for rounding and white, its end."""
    levels = [torch.unique(channel) for channel in image]
    if any(len(one) > MOST for one in levels):
        return False
    every = torch.unique(torch.cat(levels))
    steps = (every[every < 255] - every[0])[:, None] / SPACINGS
    return bool(((steps - steps.round()).abs() * SPACINGS <= 1).all(0).any())
