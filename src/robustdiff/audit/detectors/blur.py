"""Blurred and enlarged pictures: they lack the finest detail that the others have."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from robustdiff.audit.cosines import cosine_energy
from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import corrupted, draws
from robustdiff.audit.survey import Survey

OUT_OF_FOCUS = 0.15
"""Share of the copies that are blurred by a disc."""
BLURRED = -1.6
"""Highest mean sharpness of a group that is called blurred: photographs as they are lie above."""


@register_detector
class Blur(Detector):
    """Gaussian, or out of focus, a disc; its strength is the standard deviation along one axis, in pixels."""

    name = "blur"
    title = "without the fine detail of the others"
    become = "blurred by {:.2g} pixels"
    strengths = (0.8, 4.0)
    order = 10

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        if draws(generator).random() < OUT_OF_FOCUS:
            return _out_of_focus(image, 2 * strength)
        return corrupted(image, generator, "blur", radius=strength)

    def detect(self, survey: Survey) -> Tensor | None:
        """Among images too small to be compared with copies: a group that is less sharp than another."""
        return super().detect(survey) if survey.compared else survey.low_group(sharpness, BLURRED)


def _out_of_focus(image: Tensor, radius: float) -> Tensor:
    """The mean over a disc with a soft edge, (C, H, W)."""
    reach = min(math.ceil(radius), *(side - 1 for side in image.shape[1:]))
    steps = torch.arange(-reach, reach + 1.0)
    disc = (radius + 0.5 - torch.hypot(steps[:, None], steps)).clamp(0, 1)
    around = pad(image, (reach,) * 4, mode="reflect")
    return conv2d(around[:, None], (disc / disc.sum())[None, None])[:, 0]


def sharpness(images: Tensor) -> Tensor:
    """How much finest detail there is beside fine: log10 of the ratio of mean energies, shape (B,), float64.

    Of the two-dimensional DCT: frequencies of at least 3/4 of the highest in either direction, over those from 3/8 to
    3/4. About -1 for photographs at full resolution, -.5 for drawings, near 0 for white noise, below -2 for blurred or
    enlarged pictures. A picture out of focus by intent is no less blurred.

    Args:
        images: Shape (B, C, H, W) in [-1, 1], noise may exceed it; at least 4 x 4 pixels.
    """
    height, width = images.shape[2:]
    energy = cosine_energy(images).mean(1)
    frequency = torch.maximum(torch.arange(height)[:, None] / height, torch.arange(width) / width)
    fine, middle = energy[:, frequency >= 0.75], energy[:, (frequency >= 0.375) & (frequency < 0.75)]
    return ((fine.mean(1) + 1e-9) / (middle.mean(1) + 1e-9)).log10()
