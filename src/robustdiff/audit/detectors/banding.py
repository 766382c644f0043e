"""Pictures that were reduced to few grey levels."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector


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
