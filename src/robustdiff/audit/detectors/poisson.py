"""Noise of few photons: it grows with brightness."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector


@register_detector
class PoissonNoise(Detector):
    """Poisson noise; its strength is its standard deviation at mid grey, pixels being in [-1, 1]."""

    name = "poisson"
    title = "with noise that grows with brightness"
    become = "with photon noise of level {:.2g}"
    strengths = (0.04, 0.4)

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        peak = 2 / strength**2
        return torch.poisson((image + 1) / 2 * peak, generator=generator) / peak * 2 - 1
