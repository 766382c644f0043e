"""Salt and pepper: single pixels that are black or white."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import corrupted, draws

WHOLE = 0.7
"""Share of the coloured copies in which all channels of a pixel are lost at once."""


@register_detector
class Impulse(Detector):
    """Black and white pixels, in all channels or in one; their strength is the share of pixels, or of values."""

    name = "impulse"
    title = "with single pixels of black and white"
    become = "with {:.0%} of pixels black or white"
    strengths = (0.01, 0.3)

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        if len(image) == 1 or draws(generator).random() < WHOLE:
            return corrupted(image, generator, "impulse", amount=strength)
        return torch.cat([corrupted(channel[None], generator, "impulse", amount=strength) for channel in image])
