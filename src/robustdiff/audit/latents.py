"""Noise levels of an audit, which are of pixels, as the latents of an autoencoder have them.

An encoder does not pass noise on as it is: most answer faint noise with more change of the latents, in units of these,
than there is in the pixels. So a level in pixels says little about latents; but what the encoder does can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from robustdiff.audit.result import AuditResult

POINTS = 5
"""Levels at which an encoder is asked; between them its answer is interpolated."""


def in_latents(
    found: AuditResult,
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    generator: torch.Generator | None = None,
) -> AuditResult:
    """An audit whose levels are of latents, for training there.

    A level c in pixels becomes ``rms(encode(x + c n) - encode(x))``, n standard normal: where the noise that diffusion
    adds to the latents is as strong as what white noise of that level does to them. For noise this is the level of the
    image; for other damage, which is hidden by white noise of level c in pixels, it is a guide.

    Args:
        found: The audit, of pixels.
        encode: Images (B, C, H, W) in [-1, 1] -> latents in the units that the model is trained on (for diffusers'
            ``AutoencoderKL``: ``(latents - shift_factor) * scaling_factor``), without chance of its own.
        images: A few clean ones, of the size that is trained, in [-1, 1].
        generator: Source of n.

    Returns:
        The audit with other ``min_sigma``, ``noise_std`` and ``regularise``; 0 stays 0. Its findings still say pixels.

    Raises:
        ValueError: If the encoder answers with what is not finite.
    """
    levels = torch.cat([found.min_sigma, found.noise_std, torch.tensor(found.regularise or (), dtype=torch.float64)])
    levels = levels[(levels > 0) & levels.isfinite()]
    if not len(levels):
        return found
    ends = float(levels.min()), float(levels.max())
    at = torch.logspace(math.log10(ends[0]), math.log10(ends[1]), POINTS, dtype=torch.float64)
    at = at[:1] if ends[0] == ends[1] else at
    with torch.no_grad():
        plain, noise = encode(images), torch.randn(images.shape, generator=generator).to(images)
        moved = [(encode(images + level * noise) - plain).square().mean().sqrt().double() for level in at.tolist()]
    answers = torch.stack(moved).cpu()
    if not bool((answers.isfinite() & (answers > 0)).all()):
        raise ValueError(f"`encode` answers noise of levels {ends[0]:g} to {ends[1]:g} with nothing, or with nan")
    answers = answers.cummax(0).values

    def of(level: Tensor) -> Tensor:
        known = (level > 0) & level.isfinite()
        return torch.where(known, _between(at, answers, torch.where(known, level, at[0])), level)

    gate = None
    if found.regularise is not None:
        low, high = of(torch.tensor(found.regularise, dtype=torch.float64)).tolist()
        gate = low, high
    return replace(found, min_sigma=of(found.min_sigma), noise_std=of(found.noise_std), regularise=gate)


def _between(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation of log y over log x."""
    if len(x) == 1:
        return y.expand(at.shape).clone()
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    part = ((at / x[right - 1]).log() / (x[right] / x[right - 1]).log()).clamp(0, 1)
    return (y[right - 1].log() * (1 - part) + y[right].log() * part).exp()
