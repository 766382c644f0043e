"""What the simulators of damage share: the dirt of ``corrupt``, draws of a generator, pictures of Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustdiff.data.corruption import Corruption
from robustdiff.utils.images import from_uint8, to_uint8


def corrupted(image: Tensor, generator: torch.Generator, kind: str, **parameters: float) -> Tensor:
    """The image with one kind of dirt.

    Args:
        image: Shape (C, H, W), in [-1, 1].
        generator: Decides the draws.
        kind: One that ``corrupt`` knows.
        parameters: Its settings, by name.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    return Corruption(kind, dict(parameters)).apply(image, seed, 0)


def draws(generator: torch.Generator) -> np.random.Generator:
    """NumPy's draws, from the state of a generator."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def picture(image: Tensor) -> Image.Image:
    """As Pillow has it: (C, H, W) in [-1, 1], C 1 or 3."""
    pixels: NDArray[Any] = to_uint8(image[None])[0].permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if image.shape[0] == 1 else pixels)


def tensor(picture: Image.Image) -> Tensor:
    """The way back."""
    pixels = np.array(picture)
    return from_uint8(torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1))


def any_colour(channels: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Of what is drawn over pictures, in [0, 255], shape (C,): mostly black, white or mid grey."""
    if rng.random() < 0.6:
        return np.full(channels, float(rng.choice([0, 255, 127, 128])))
    return rng.integers(256, size=1 if rng.random() < 0.5 else channels) * np.ones(channels)
