"""Blind noise estimate of one image, or of many: how much white noise each carries, from nothing but itself."""

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
AT_ONCE = 2**21
"""Bytes that the patches of a batch take at most, or those of one image."""


def noise_std(image: ArrayLike | Tensor) -> float:
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
    return float(noise_stds(np.asarray(image)[None])[0])


def noise_stds(images: ArrayLike | Tensor) -> NDArray[np.float64]:
    """:func:`noise_std` of many images at once, which for small ones takes a fraction of the time.

    Args:
        images: Shape (B, C, H, W), as for :func:`noise_std`.

    Returns:
        Shape (B,).
    """
    values = np.asarray(images)
    eight_bit = values.dtype == np.uint8
    chosen = _independent_channels(values, LEVEL / (LEVEL if eight_bit else 1.0))
    levels = np.full(len(values), math.nan)
    for kind in np.unique(chosen, axis=0):
        places = (chosen == kind).all(axis=1).nonzero()[0]
        channels, height, width = int(kind.sum()), *values.shape[2:]
        side = next((p for p in (4, 3, 2) if _enough(_positions(height, width, p), channels * p * p)), 0)
        if not side:
            continue
        positions = _positions(height, width, side)
        size = 4 * channels * side**2 * -(-positions // _stride(positions) ** 2)
        for some in np.array_split(places, min(len(places), -(-len(places) * size // AT_ONCE))):
            levels[some] = _levels(values[some][:, kind], side)
    return levels


def _levels(values: NDArray[Any], side: int) -> NDArray[np.float64]:
    """Estimates of images whose channels are independent, (B, C, H, W) -> (B,)."""
    eight_bit = values.dtype == np.uint8
    low, high, unit = (0.0, 255.0, LEVEL) if eight_bit else (-1.0, 1.0, 1.0)
    patches = _patches(values, side)
    dead = (values == low) | (values == high) | _flat(values, side)[:, None]
    share = _patches(dead, side).mean(axis=2) if dead.any() else np.zeros(patches.shape[:2], np.float32)
    fewest = PATCHES_PER_DIMENSION * patches.shape[2]
    least = np.partition(share, fewest - 1, axis=1)[:, fewest - 1]
    kept = share <= np.maximum(DEAD_SHARE, least)[:, None]
    if len(values) == 1:
        patches, kept = patches[:, kept[0]], kept[:, kept[0]]
    level = unit * _smallest_projection(patches, kept) / _response(side, values.shape[1], kept.sum(axis=1))
    return np.sqrt(np.maximum(0.0, level**2 - (LEVEL**2 / 12 if eight_bit else 0.0)))


def _positions(height: int, width: int, side: int) -> int:
    return max(0, height - side + 1) * max(0, width - side + 1)


def _enough(count: int, size: int) -> bool:
    return count >= PATCHES_PER_DIMENSION * size


def _stride(count: int) -> int:
    return math.ceil(math.sqrt(count / MAX_PATCHES))


def _independent_channels(values: NDArray[Any], level: float) -> NDArray[np.bool_]:
    """All channels but those that are constant or follow from another: grey or sepia stored as RGB has one, not three.

    Their patches would have no variance at all in many directions, and every noise would seem to be 0.

    Args:
        values: Shape (B, C, H, W).
        level: One step of 8 bit.

    Returns:
        Shape (B, C).
    """
    count, channels, height, width = values.shape
    if channels == 1:
        return np.ones((count, 1), np.bool_)
    step = _stride(height * width)
    sample = values[:, :, ::step, ::step].reshape(count, channels, -1).astype(np.float32)
    sample -= sample.mean(axis=2, keepdims=True)
    covariance = sample @ sample.transpose(0, 2, 1) / sample.shape[2]
    variance = covariance.diagonal(axis1=1, axis2=2)
    alone = np.arange(channels) == variance.argmax(axis=1)[:, None]
    followed = np.linalg.eigvalsh(covariance)[:, -2] <= level**2
    chosen: NDArray[np.bool_] = np.where(followed[:, None], alone, variance > level**2)
    return chosen


def _patches(values: NDArray[Any], side: int) -> NDArray[np.float32]:
    """Overlapping patches of all channels, at most about MAX_PATCHES: shape (B, patches, C * side * side)."""
    count, channels, height, width = values.shape
    step = _stride(_positions(height, width, side))
    windows = sliding_window_view(values, (side, side), axis=(2, 3))[:, :, ::step, ::step]
    rows: NDArray[Any] = windows.transpose(0, 2, 3, 1, 4, 5).reshape(count, -1, channels * side * side)
    return rows.astype(np.float32)


def _flat(values: NDArray[Any], side: int) -> NDArray[np.bool_]:
    """Pixels that lie in some constant patch: shape (B, H, W)."""
    here = values[:, :, :-1, :-1]
    blocks = (here == values[:, :, :-1, 1:]) & (here == values[:, :, 1:, :-1]) & (here == values[:, :, 1:, 1:])
    equal: NDArray[np.bool_] = blocks.all(axis=1)  # 2 x 2 pixels
    if not equal.any():
        return np.zeros((len(values), *values.shape[2:]), np.bool_)
    for axis in (1, 2):  # every 2 x 2 block of a constant patch is equal
        equal = np.asarray(sliding_window_view(equal, side - 1, axis=axis).all(axis=-1))
    equal = np.pad(equal, ((0, 0), (side - 1, side - 1), (side - 1, side - 1)))
    for axis in (1, 2):
        equal = np.asarray(sliding_window_view(equal, side, axis=axis).any(axis=-1))
    return equal


def _smallest_projection(patches: NDArray[np.float32], kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Median absolute projection on the direction of least variance, of the patches kept: (B, P, D), (B, P) -> (B,)."""
    count = kept.sum(axis=1)
    if kept.all():
        centred = patches - patches.mean(axis=1, keepdims=True)
    else:
        total = (patches * kept[..., None]).sum(axis=1, keepdims=True)
        centred = (patches - total / count[:, None, None].astype(np.float32)) * kept[..., None]
    _, vectors = np.linalg.eigh(centred.transpose(0, 2, 1) @ centred)
    projection = np.abs(centred @ vectors[:, :, :1])[..., 0]
    ranked = np.sort(np.where(kept, projection, np.inf), axis=1)
    here, rows = (count - 1) // 2, np.arange(len(count))
    median: NDArray[np.float64] = (ranked[rows, here].astype(np.float64) + ranked[rows, count // 2]) / 2
    return median


_one_table = threading.Lock()


def _response(side: int, channels: int, count: NDArray[Any]) -> NDArray[np.float64]:
    """Mean of :func:`_smallest_projection` over images of pure noise of level 1 that have ``count`` patches, (B,).

    The smallest of few sample eigenvalues lies far below 1: it is simulated once per kind of patch, on square images of
    eight sizes, and interpolated in ``count ** -0.5`` towards the closed form for infinitely many.
    """
    with _one_table:  # threads that ask for the same table at once wait for one of them
        places, responses = _response_table(side, channels)
    expected: NDArray[np.float64] = np.interp(count.astype(np.float64) ** -0.5, places, responses)
    return expected


@cache
def _response_table(side: int, channels: int) -> tuple[list[float], list[float]]:
    generator = np.random.default_rng(0)
    places, responses = [0.0], [NORMAL_MEDIAN]
    fewest = math.isqrt(PATCHES_PER_DIMENSION * channels * side * side)
    for across in (fewest * np.array([5, 3.5, 2.5, 2, 1.6, 1.3, 1.15, 1])).round().astype(int).tolist():
        draws = max(24, 40_000 // across**2)  # the mean is then known to about one per cent
        shape = (channels, across + side - 1, across + side - 1)
        noise = (generator.standard_normal((1, *shape), dtype=np.float32) for _ in range(draws))
        every = np.ones((1, across**2), np.bool_)
        places.append(1 / across)
        responses.append(float(np.mean([_smallest_projection(_patches(one, side), every) for one in noise])))
    return places, responses
