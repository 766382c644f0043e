"""Damage on purpose, for detectors: the dirt of ``corrupt`` with draws of a generator."""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.data.corruption import Corruption


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
