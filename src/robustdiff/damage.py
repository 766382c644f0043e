"""Blind signs of damage in batches of images: blur, the grid of JPEG, lost and impulsive pixels, and their repair.

Pure functions of tensors (B, C, H, W) in [-1, 1], noise may exceed it; one number per image. Each asks one question and
says in its text when it answers wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

LEVEL = 2 / 255
"""One step of 8 bit."""
ROUNDING = LEVEL**2 / 12


@cache
def _dct(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix, float64, (size, size)."""
    k, x = torch.arange(size).double()[:, None], torch.arange(size).double()
    matrix = (2 / size) ** 0.5 * torch.cos(math.pi * (2 * x + 1) * k / (2 * size))
    matrix[0] /= 2**0.5
    dct: Tensor = matrix
    return dct


def sharpness(images: Tensor) -> Tensor:
    """How much finest detail there is beside fine: log10 of the ratio of mean energies, shape (B,), float64.

    Of the two-dimensional DCT: frequencies of at least 3/4 of the highest in either direction, over those from 3/8 to
    3/4. About -1 for photographs at full resolution, -.5 for drawings, near 0 for white noise, below -2 for blurred or
    enlarged pictures. A picture out of focus by intent is no less blurred.

    Args:
        images: At least 4 x 4 pixels.
    """
    height, width = images.shape[2:]
    energy = (_dct(height) @ images.double() @ _dct(width).T).square().mean(1)
    frequency = torch.maximum(torch.arange(height)[:, None] / height, torch.arange(width) / width)
    fine, middle = energy[:, frequency >= 0.75], energy[:, (frequency >= 0.375) & (frequency < 0.75)]
    return ((fine.mean(1) + 1e-9) / (middle.mean(1) + 1e-9)).log10()


def jpeg_grid(images: Tensor) -> Tensor:
    """How strongly an image carries the 8 x 8 grid of JPEG: log10, shape (B,), float64; nan below 16 pixels.

    The energy of high frequencies in blocks on the grid over that in blocks off it by half: JPEG sets the former to 0
    and jumps from block to block. About 0 without a grid (-.3 to .2; at 16 x 16 pixels, with one block off the grid,
    -.6 to .5), below -1 for strong compression. Resizing or cropping by other than 8 pixels hides it.
    """
    height, width = images.shape[2:]
    if min(height, width) < 16:
        return torch.full((len(images),), math.nan, dtype=torch.float64)
    grey = images.double().mean(1, keepdim=True)
    on, off = _high_energy(grey), _high_energy(grey[:, :, 4:-4, 4:-4])
    return ((on + 2 * ROUNDING) / (off + 2 * ROUNDING)).log10()


def _high_energy(grey: Tensor) -> Tensor:
    blocks = grey.unfold(2, 8, 8).unfold(3, 8, 8)
    energy = (_dct(8) @ blocks @ _dct(8).T).square()
    high = torch.arange(8)[:, None] + torch.arange(8) >= 8
    return energy[..., high].flatten(1).mean(1)


# -- lost pixels -----------------------------------------------------------------------------------------

STEPS = 511
"""Half steps of 8 bit from -1 to 1: mid grey, 0, lies between two of the whole ones."""
SPIKE, EXTREME_SPIKE, LEAST = 8.0, 2.0, 0.005
"""How much commoner than its neighbours a value is, or black or white, and its share of all pixels, to be suspected."""
SPIKY, DRAWING = 3.0, 8
"""How much commoner than its neighbours a value of a drawing is, and how many such values it has."""
COMPANY, ALSO_HERE = 0.35, 5.0
"""Of the way from independence to flat areas; how much commoner than its neighbours, in the image itself."""
HOLED, LONE, APART = 0.02, 0.01, 0.3
"""Least share of an image's pixels that are of the value, or black or white and alone; what alone means."""


def grey_histogram(images: Tensor) -> Tensor:
    """Counts of pixels whose channels are all the same value, by half steps of 8 bit, int64, shape (511,)."""
    same = (images == images[:, :1]).all(1) & (images[:, 0].abs() <= 1)
    place = ((images[:, 0][same].double() + 1) * 255).round().long()
    return torch.bincount(place.clamp(0, STEPS - 1), minlength=STEPS)


def suspected(histogram: Tensor, pixels: int) -> list[float]:
    """Values so common that they may stand for lost pixels, in [-1, 1]: spikes in the histogram of all images.

    Where many values are spikes, as in drawings or pictures of few bits, one must stand out of the others, and black
    and white, which are then at home there, are not suspected.

    Args:
        histogram: Sum of :func:`grey_histogram`.
        pixels: Pixels that were counted from.
    """
    share = histogram.double() / max(1, pixels)
    usual = torch.zeros_like(share)
    for place in share.nonzero().flatten().tolist():
        near = torch.cat([share[max(0, place - 8) : place], share[place + 1 : place + 9]])
        usual[place] = near[near > 0].median() if bool((near > 0).any()) else 0.0
    spiky = share[(share > SPIKY * usual) & (share > LEAST / 5)]
    drawing = len(spiky) >= DRAWING
    least = SPIKE * float(spiky.median()) if drawing else LEAST
    found = []
    for place in (share >= max(least, LEAST)).nonzero().flatten().tolist():
        extreme = place in (0, STEPS - 1)
        if not (extreme and drawing) and share[place] >= (EXTREME_SPIKE if extreme else SPIKE) * usual[place]:
            found.append(place / 255 - 1)
    return found


def holes(images: Tensor, values: Sequence[float]) -> Tensor:
    """Lost pixels, bool, shape (B, H, W): those of a suspected value that lie scattered over their image.

    An image is believed to have holes of a value if at least :data:`HOLED` of its pixels have it and these keep no
    company: the chance that the pixel to the right or below has it too is less than :data:`COMPANY` of the way from
    their share of the image, that of independence, to 1, that of flat areas. The value must be a spike in the image's
    own histogram, too. Black and white are common in pictures: there at least :data:`LONE` of the pixels must differ
    from all of their neighbours by :data:`APART`, and from the median of their 3 x 3 neighbourhood by three times the
    neighbours' spread; lost are then those that differ from that median.

    Lost blocks of more than 2 x 2 pixels keep company, and are not found; nor are black and white ones in drawings.

    Args:
        images: Shape (B, C, H, W).
        values: Of :func:`suspected`.
    """
    found = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool)
    if not values:
        return found
    around = pad(images.double().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    nine = around.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)[:, 0]
    median, others = nine.median(-1).values, nine[..., [0, 1, 2, 3, 5, 6, 7, 8]]
    for value in values:
        here = ((images - value).abs() < LEVEL / 4).all(1)
        if abs(value) == 1:
            ranked = others.sort(-1).values
            spread = (ranked[..., 5] - ranked[..., 2]) / 1.35  # of about the quartiles, as a standard deviation
            far = (3 * spread).clamp(min=APART)
            lone = here & ((others - value).abs() > APART).all(-1) & ((median - value).abs() > far)
            found |= here & ((median - value).abs() > APART) & (lone.flatten(1).double().mean(1) >= LONE)[:, None, None]
            continue
        share = here.flatten(1).double().mean(1)
        pairs = (here[:, 1:] & here[:, :-1]).flatten(1).sum(1) + (here[:, :, 1:] & here[:, :, :-1]).flatten(1).sum(1)
        first = here[:, :-1].flatten(1).sum(1) + here[:, :, :-1].flatten(1).sum(1)
        company = pairs / first.clamp(min=1)
        away = (images - value).abs()
        near = ((away > LEVEL * 3 / 4) & (away < LEVEL * 9 / 2)).all(1).flatten(1).double().mean(1) / 8
        believed = (share >= HOLED) & (company < share + COMPANY * (1 - share)) & (share >= ALSO_HERE * near)
        found |= here & believed[:, None, None]
    return found


def fill(images: Tensor, lost: Tensor, rounds: int = 60) -> Tensor:
    """Lost pixels from their neighbours: the discrete harmonic function, by ``rounds`` averages of the four nearest.

    Args:
        images: Shape (B, C, H, W).
        lost: bool, shape (B, H, W).
        rounds: Enough for scattered pixels; wide gaps stay flat.
    """
    if not bool(lost.any()):
        return images
    hole, known = lost[:, None], (~lost[:, None]).to(images.dtype)
    mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
    filled = torch.where(hole, mean, images)
    for _ in range(rounds):
        p = pad(filled, (1, 1, 1, 1), mode="replicate")
        near = (p[:, :, 1:-1, :-2] + p[:, :, 1:-1, 2:] + p[:, :, :-2, 1:-1] + p[:, :, 2:, 1:-1]) / 4
        filled = torch.where(hole, near, filled)
    return filled
