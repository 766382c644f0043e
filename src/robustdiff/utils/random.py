"""Random draws that are pure functions of a generator: one for a batch, or one per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from robustdiff.utils.options import MAX_SEED
from robustdiff.utils.seeds import derive_seed
from robustdiff.utils.tensors import to_device


def place_generators(what: str, seed: int, places: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image: a function of the purpose, the seed and the image's place in its set."""
    return [torch.Generator().manual_seed(derive_seed(what, seed, place) & MAX_SEED) for place in places]


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image, seeded with ``seed + index``."""
    return [torch.Generator().manual_seed(seed + index) for index in indices]


Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, one per image (then no image depends on its neighbours), or torch's own."""


def check_generators(generator: Generators, count: int) -> None:
    """Refuse a sequence of generators that is not one per image.

    Raises:
        ValueError: If there are not ``count`` of them.
    """
    if isinstance(generator, Sequence) and len(generator) != count:
        raise ValueError(f"got {len(generator)} generators for a batch of {count}: pass one, or one per image")


def _draw(function: Callable[..., Tensor], shape: tuple[int, ...], generator: Generators, like: Tensor) -> Tensor:
    """Draw on the generators' own device, then move: a CPU generator gives the same numbers on any device."""
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return to_device(function(shape, generator=generator, device=device, dtype=like.dtype), like.device)
    check_generators(generator, shape[0])
    rows = [function(shape[1:], generator=g, device=g.device, dtype=like.dtype) for g in generator]
    if not rows:
        return torch.empty(shape, device=like.device, dtype=like.dtype)
    return to_device(torch.stack(rows), like.device)


def draw_normal(like: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal numbers of the shape, device and dtype of ``like``, shape (B, ...)."""
    return _draw(torch.randn, tuple(like.shape), generator, like)


def draw_uniform(like: Tensor, generator: Generators = None) -> Tensor:
    """Uniform [0, 1) numbers of the shape, device and dtype of ``like``, shape (B, ...)."""
    return _draw(torch.rand, tuple(like.shape), generator, like)
