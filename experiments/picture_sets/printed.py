"""Smooth scenes as printers and old screens show them: halftone, ordered dither, error diffusion."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from experiments.picture_sets.canvas import (
    Bytes,
    Rng,
    between,
    blend,
    chance,
    colour,
    fractal,
    grid,
    ink_and_paper,
    tint,
    to_bytes,
    two_colours,
    whole,
)
from experiments.picture_sets.rendered import ball, scenes


def smooth_scenes(rng: Rng, size: int) -> Bytes:
    """Gradients, balls, soft textures and landscapes: what a printer's screen is laid over."""
    form, one, other = whole(rng, 0, 4), colour(rng, (0, 1), (0, 0.5)), colour(rng, (0, 0.8), (0.6, 1))
    if form == 0:
        return scenes(rng, size)
    x, y = grid(size)
    turn = between(rng, 0, 2 * math.pi)
    share = 0.5 + ((x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)) * between(rng, 0.7, 1.2)
    if form == 1:
        share = np.hypot(x - rng.random(), y - rng.random()) * between(rng, 0.8, 1.4)
    elif form == 2:
        share = 0.5 + between(rng, 0.15, 0.3) * fractal(rng, size, between(rng, 1.8, 2.6))
    picture = tint(one) + np.clip(share, 0, 1)[..., None] * (tint(other) - tint(one))
    for _ in range(whole(rng, 1, 5) if form >= 3 else 0):
        mask, bright = ball(
            size, rng.random(), rng.random(), between(rng, 0.1, 0.4), (between(rng, -0.7, 0.7), -0.6, 0.5)
        )
        picture = blend(picture, tint(colour(rng, (0, 0.8), (0.5, 1))) * (0.1 + 0.9 * bright)[..., None], mask)
    return to_bytes(
        (picture - picture.min()) / max(float(np.ptp(picture)), 0.2) * between(rng, 0.8, 1) + between(rng, 0, 0.1)
    )


def _printed(rng: Rng, picture: Bytes, dots: Bytes) -> Bytes:
    """Dots of 0 and 255 as they are, or those of one channel in some ink on some paper."""
    if dots.shape[2] > 1 or picture.shape[2] == 1:
        return dots
    ink, paper = ink_and_paper(rng)
    return two_colours(dots < 128, ink, paper)


def _plates(rng: Rng, picture: Bytes) -> Bytes:
    """What is screened: each channel by itself, or for one ink their mean."""
    if picture.shape[2] == 1 or chance(rng, 0.35):
        return picture
    return np.asarray(np.round(picture.mean(2, keepdims=True)), dtype=np.uint8)


def halftone(rng: Rng, picture: Bytes) -> Bytes:
    """Clustered dots at 45 degrees; with an ink for each channel, two of the three screens stand at 15 and 75."""
    plates, (x, y) = _plates(rng, picture), np.meshgrid(np.arange(picture.shape[1]), np.arange(picture.shape[0]))
    period, phase = between(rng, 3.5, 5.5 + len(picture) / 64), rng.uniform(0, 6, 2)
    dots = []
    for k, turn in enumerate((45, 15, 75)[: plates.shape[2]]):
        cos, sin = (
            2 * math.pi / period * value for value in (math.cos(math.radians(turn)), math.sin(math.radians(turn)))
        )
        screen = np.cos(cos * x + sin * y + phase[0]) + np.cos(cos * y - sin * x + phase[1])
        rank = np.argsort(np.argsort(screen, axis=None)).reshape(screen.shape) / screen.size  # every shade its share
        dots.append(np.where(plates[..., k] / 255 > rank, 255, 0))
    return _printed(rng, picture, np.stack(dots, 2).astype(np.uint8))


def ordered_dither(rng: Rng, picture: Bytes) -> Bytes:
    """Bayer's thresholds of 4 x 4 or 8 x 8, two levels a channel or four.

    Source: Bayer (1973), an optimum method for two-level rendition of continuous-tone pictures.
    """
    plates, matrix = _plates(rng, picture), np.zeros((1, 1))
    for _ in range(whole(rng, 2, 3)):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    height, width = picture.shape[:2]
    threshold = np.tile((matrix + 0.5) / matrix.size, (height // len(matrix) + 1, width // len(matrix) + 1))
    steps = 3 if chance(rng, 0.15) and plates.shape[2] == picture.shape[2] else 1
    dots = np.floor(plates / 255 * steps + threshold[:height, :width, None] * 0.999).clip(0, steps) * (255 // steps)
    return _printed(rng, picture, dots.astype(np.uint8))


def error_diffusion(rng: Rng, picture: Bytes) -> Bytes:
    """The error of every pixel spread over its neighbours, as Floyd and Steinberg do, by Pillow."""
    plates = _plates(rng, picture)
    dots = [np.array(Image.fromarray(plates[..., k]).convert("1").convert("L")) for k in range(plates.shape[2])]
    return _printed(rng, picture, np.stack(dots, 2))
