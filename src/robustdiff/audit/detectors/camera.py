"""Noise of cameras: neighbouring pixels share it, since sensors see one colour each and files are compressed."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector


@register_detector
class CameraNoise(Detector):
    """Correlated noise; its strength is its standard deviation, pixels being in [-1, 1]."""

    name = "camera"
    title = "with noise that neighbouring pixels share"
    become = "with camera noise of level {:.2g}"
    strengths = (0.04, 0.3)

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        channels, height, width = image.shape
        white = torch.randn(channels, height + 1, width + 1, generator=generator)
        shared = (white[:, 1:, 1:] + white[:, 1:, :-1] + white[:, :-1, 1:] + white[:, :-1, :-1]) / 2
        return image + strength * shared
