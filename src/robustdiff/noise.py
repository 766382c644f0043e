"""Blind noise estimate of one image: how much white noise it carries, from nothing but itself."""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

LEVEL = 2 / 255
"""One step of 8 bit in [-1, 1]."""
PATCHES_PER_DIMENSION = 4
"""Fewest patches, per dimension, from which a covariance is taken; smaller images get smaller patches."""
MAX_PATCHES = 2**14
"""More say nothing new: larger images are looked at every so many pixels."""
DEAD_SHARE = 1 / 8
"""Patches with a larger share of clipped values, or of pixels in constant patches, are left out while enough others
remain."""
NORMAL_MEDIAN = 0.6744897501960817
"""Median of the absolute value of a standard normal number."""


def noise_level(image: ArrayLike | Tensor) -> float:
    """Blind estimate of the standard deviation of white noise in one image.

    Patches of 4 x 4 pixels (3 x 3 or 2 x 2 in small images), all channels jointly, are projected on the eigenvector of
    the smallest eigenvalue of their covariance, the direction in which this image's content varies least. The estimate
    is the median absolute projection, which edges hardly move, over what it would be in pure noise of level 1 with as
    many patches (:func:`_response`). Patches with clipped values or in constant areas are left out while enough
    others remain; the variance of rounding to 8 bit, ``LEVEL ** 2 / 12``, is subtracted.

    What it cannot see. Enlarged, blurred, denoised or JPEG images give too small values: their noise is not white.
    JPEG that stores colour at half resolution hides even strong noise: there, ask about the grey image.
    Noise common to all channels is taken for content, unless the image is grey in truth. Fine grey texture, line
    drawings and pictures of few pixels give too large values: below about 16 x 16 pixels in grey, no single image says
    how noisy it is.

    Args:
        image: Shape (C, H, W): uint8 in 0..255, or floating point in [-1, 1] (clipped values are exactly -1 or 1;
            noise may exceed the range).

    Returns:
        The level in units of [-1, 1], >= 0 (8-bit levels over 127.5); not a number for images too small to say, below
        about 5 x 5 pixels in grey, 8 x 8 in colour.

    Source: smallest eigenvalue: Pyatykh, Hesser & Zheng (2013), Liu, Tanaka & Okutomi (2013), Chen, Zhu & Heng (2015).
    The median projection in place of the eigenvalue, and the calibration for few patches, are ours.
    """
    values = np.asarray(image)
    eight_bit = values.dtype == np.uint8
    low, high, unit = (0.0, 255.0, LEVEL) if eight_bit else (-1.0, 1.0, 1.0)
    values = _independent_channels(values, LEVEL / unit)
    channels, height, width = values.shape
    side = next((p for p in (4, 3, 2) if _enough(_positions(height, width, p), channels * p * p)), 0)
    if not side:
        return math.nan
    patches = _patches(values, side)
    dead = (values == low) | (values == high) | _flat(values, side)
    if dead.any():
        share = _patches(dead, side).mean(axis=1)
        fewest = PATCHES_PER_DIMENSION * patches.shape[1]
        patches = patches[share <= max(DEAD_SHARE, np.partition(share, fewest - 1)[fewest - 1])]
    level = unit * _smallest_projection(patches) / _response(side, channels, len(patches))
    return math.sqrt(max(0.0, level**2 - (LEVEL**2 / 12 if eight_bit else 0.0)))


def _positions(height: int, width: int, side: int) -> int:
    return max(0, height - side + 1) * max(0, width - side + 1)


def _enough(count: int, size: int) -> bool:
    return count >= PATCHES_PER_DIMENSION * size


def _stride(count: int) -> int:
    return math.ceil(math.sqrt(count / MAX_PATCHES))


def _independent_channels(values: NDArray[Any], level: float) -> NDArray[Any]:
    """Without channels that are constant or follow from another: grey or sepia stored as RGB has one, not three.

    Their patches would have no variance at all in many directions, and every noise would seem to be 0.
    """
    channels, height, width = values.shape
    if channels == 1:
        return values
    step = _stride(height * width)
    sample = values[:, ::step, ::step].reshape(channels, -1).astype(np.float32)
    sample -= sample.mean(axis=1, keepdims=True)
    covariance = sample @ sample.T / sample.shape[1]
    variance = covariance.diagonal()
    if np.linalg.eigvalsh(covariance)[-2] <= level**2:
        chosen = np.arange(channels) == variance.argmax()
    else:
        chosen = variance > level**2
    kept: NDArray[Any] = values[chosen]
    return kept


def _patches(values: NDArray[Any], side: int) -> NDArray[np.float32]:
    """Overlapping patches of all channels, at most about MAX_PATCHES: shape (patches, C * side * side)."""
    channels, height, width = values.shape
    step = _stride(_positions(height, width, side))
    windows = sliding_window_view(values, (side, side), axis=(1, 2))[:, ::step, ::step]
    rows: NDArray[Any] = windows.transpose(1, 2, 0, 3, 4).reshape(-1, channels * side * side)
    return rows.astype(np.float32)


def _flat(values: NDArray[Any], side: int) -> NDArray[np.bool_]:
    """Pixels that lie in some constant patch: shape (H, W)."""
    here = values[:, :-1, :-1]
    blocks = (here == values[:, :-1, 1:]) & (here == values[:, 1:, :-1]) & (here == values[:, 1:, 1:])
    equal: NDArray[np.bool_] = blocks.all(axis=0)  # 2 x 2 pixels
    if not equal.any():
        return np.zeros(values.shape[1:], np.bool_)
    for axis in (0, 1):  # every 2 x 2 block of a constant patch is equal
        equal = np.asarray(sliding_window_view(equal, side - 1, axis=axis).all(axis=-1))
    equal = np.pad(equal, side - 1)
    for axis in (0, 1):
        equal = np.asarray(sliding_window_view(equal, side, axis=axis).any(axis=-1))
    return equal


def _smallest_projection(patches: NDArray[np.float32]) -> float:
    """Median absolute projection on the direction of least variance."""
    centred = patches - patches.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return float(np.median(np.abs(centred @ vectors[:, 0])))


_one_table = threading.Lock()


def _response(side: int, channels: int, count: int) -> float:
    """Mean of :func:`_smallest_projection` over images of pure noise of level 1 that have ``count`` patches.

    The smallest of few sample eigenvalues lies far below 1: it is simulated once per kind of patch, on square images of
    eight sizes, and interpolated in ``count ** -0.5`` towards the closed form for infinitely many.
    """
    with _one_table:  # threads that ask for the same table at once wait for one of them
        places, responses = _response_table(side, channels)
    return float(np.interp(count**-0.5, places, responses))


@cache
def _response_table(side: int, channels: int) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(0)
    places, responses = [0.0], [NORMAL_MEDIAN]
    fewest = math.isqrt(PATCHES_PER_DIMENSION * channels * side * side)
    for across in (fewest * np.array([5, 3.5, 2.5, 2, 1.6, 1.3, 1.15, 1])).round().astype(int).tolist():
        draws = max(24, 40_000 // across**2)  # the mean is then known to about one per cent
        shape = (channels, across + side - 1, across + side - 1)
        noise = (generator.standard_normal(shape, dtype=np.float32) for _ in range(draws))
        places.append(1 / across)
        responses.append(float(np.mean([_smallest_projection(_patches(one, side)) for one in noise])))
    return places, responses
