"""Extractors as functions of images that are no 8-bit numbers, so that gradients flow through them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustdiff.evaluation.extractors import Extractor, reason_of
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import from_uint8

CLOSE = 1e-2
"""Largest relative difference from the features of the same images in 8 bit."""
SCALES = (127.5, 0.5)
"""Of ``x + 1``, x in [-1, 1]: what extractors take floats for, 0 to 255 or 0 to 1."""


def differentiable(extractor: Extractor, probe: Tensor) -> Callable[[Tensor], Tensor]:
    """The extractor on images in [-1, 1], shape (B, C, H, W), floating point.

    Which scale it takes floats in is found out: its features must be those of the same images in 8 bit.

    Args:
        extractor: What :func:`~robustdiff.evaluation.extractors.open_extractor` gave.
        probe: A few real images to find out with, uint8 (b, C, H, W), not all alike.

    Raises:
        UsageError: If neither scale gives these features, or no gradient comes through.
    """
    probe = probe.to(extractor.device)
    with torch.no_grad():
        expected = extractor.model(probe).float()
    reasons = []
    for scale in SCALES:

        def run(images: Tensor, scale: float = scale) -> Tensor:
            return extractor.model((images + 1) * scale)

        try:
            with torch.enable_grad():
                images = from_uint8(probe).requires_grad_()
                found = run(images)
                if not found.requires_grad:
                    raise ValueError("no gradient comes through")
                (slope,) = torch.autograd.grad(found.square().sum(), images)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # as many as there are extractors
            reasons.append(reason_of(error))
            continue
        if not (found.detach() - expected).norm() <= CLOSE * expected.norm():
            reasons.append("other features than of the same images in 8 bit")
        elif not (bool(slope.isfinite().all()) and bool(slope.any())):
            reasons.append("the gradient is 0 or not finite")
        else:
            return run
    told = "; ".join(f"in 0 to {2 * scale:g}: {why}" for scale, why in zip(SCALES, reasons, strict=True))
    raise UsageError(
        f"`extractor` {extractor.name} is not differentiable ({told}): name pixels first, or a module that is"
    )
