"""Pictures that were smeared along a line, as moving cameras do."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import draws

BORDERS = ("reflect", "replicate", "circular")


@register_detector
class MotionBlur(Detector):
    """The mean of copies along a path, straight or bent; its strength is the length in pixels."""

    name = "motion"
    title = "smeared along a line"
    become = "smeared by {:.2g} pixels"
    strengths = (4.0, 13.0)

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        rng = draws(generator)
        length, angle = max(2, round(strength)), rng.uniform(0, math.pi)
        bend = 0.15 * rng.normal() if rng.random() < 0.4 else 0.0
        whole = rng.random() < 0.4
        steps = int(rng.choice([length, 2 * length + 1, 4 * length]))
        reach = min(length + 2, *(side - 1 for side in image.shape[1:]))
        kernel = torch.zeros(2 * reach + 1, 2 * reach + 1)
        for t in torch.linspace(-length / 2, length / 2, steps).tolist():
            across = bend * t * t / length
            y, x = t * math.sin(angle) + across * math.cos(angle), t * math.cos(angle) - across * math.sin(angle)
            y, x = (float(round(one)) if whole else one for one in (y, x))
            i, j = math.floor(y), math.floor(x)
            for a, up in ((i, 1 - y + i), (i + 1, y - i)):
                for b, left in ((j, 1 - x + j), (j + 1, x - j)):
                    if abs(a) <= reach and abs(b) <= reach:
                        kernel[reach + a, reach + b] += up * left
        around = pad(image[None], (reach,) * 4, mode=BORDERS[rng.integers(len(BORDERS))])[0]
        return conv2d(around[:, None], (kernel / kernel.sum())[None, None])[:, 0]
