"""Words written over the picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.simulate import any_colour, draws, picture, tensor

LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:/-.")
LEAST, TRIES = 8.0, 20
"""Height of letters in pixels, and how often another word, or colour, is tried that fits."""
STANDS_OUT = 50
"""Least distance of the colour from what is under it, of 255."""


@register_detector
class Caption(Detector):
    """A word, or a date, in one colour; its strength is the height of letters, of the picture's."""

    name = "caption"
    title = "with words over them"
    become = "with words over them"
    strengths = (0.1, 0.25)
    usual = True

    def simulate(self, image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """See :meth:`Detector.simulate`."""
        drawn, rng = picture(image), draws(generator)
        plain = rng.random() < 0.3
        for _ in range(TRIES):
            word = "".join(rng.choice(LETTERS, int(rng.integers(4, 12))))
            font = (
                ImageFont.load_default_imagefont()
                if plain
                else ImageFont.load_default(max(LEAST, strength * drawn.height))
            )
            _, _, right, bottom = (int(edge) for edge in font.getbbox(word))
            if right < drawn.width and bottom < drawn.height:
                break
        x, y = (int(rng.integers(max(1, room))) for room in (drawn.width - right, drawn.height - bottom))
        under = np.asarray(drawn)[y : y + bottom + 1, x : x + right + 1].mean()
        for _ in range(TRIES):
            colour = any_colour(len(image), rng)
            if abs(colour.mean() - under) > STANDS_OUT:
                break
        fill = tuple(int(one) for one in colour) if len(image) == 3 else int(colour[0])
        ImageDraw.Draw(drawn).text((x, y), word, fill=fill, font=font)
        return tensor(drawn)
