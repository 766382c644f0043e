"""Small pictures that were enlarged."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import draws, picture, tensor

SHRUNK = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
ENLARGED = (Image.Resampling.NEAREST, *SHRUNK[1:])


@register_detector
class Enlarged(Detector):
    """Enlargement of a smaller picture; its strength is the factor."""

    name = "enlarged"
    title = "enlarged from fewer pixels"
    become = "enlarged {:.2g} times"
    strengths = (1.8, 5.0)

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        whole, rng = picture(image), draws(generator)
        small = (max(4, int(whole.width / strength)), max(4, int(whole.height / strength)))
        shrunk = whole.resize(small, SHRUNK[rng.integers(len(SHRUNK))])
        return tensor(shrunk.resize(whole.size, ENLARGED[rng.integers(len(ENLARGED))]))
