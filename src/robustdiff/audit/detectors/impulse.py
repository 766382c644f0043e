"""Salt and pepper: single pixels that are black or white."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import corrupted


@register_detector
class Impulse(Detector):
    """Black and white pixels; their strength is the share of pixels."""

    name = "impulse"
    title = "with single pixels of black and white"
    become = "with {:.0%} of pixels black or white"
    strengths = (0.01, 0.3)

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        return corrupted(image, generator, "impulse", amount=strength)
