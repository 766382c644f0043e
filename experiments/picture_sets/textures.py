"""Random textures and what is seen from above or measured: dead leaves, 1/f noise, satellite images, spectrograms."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from experiments.picture_sets.canvas import (
    FINE,
    Bytes,
    Floats,
    Rng,
    between,
    blend,
    box,
    canvas,
    chance,
    colour,
    fractal,
    grid,
    hsv,
    profile,
    reduced,
    tint,
    to_bytes,
    whole,
)

MAPS = {
    "grey": ((0, 0, 0), (255, 255, 255)),
    "paper": ((255, 255, 255), (0, 0, 0)),
    "viridis": ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)),
    "magma": ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)),
    "jet": ((0, 0, 128), (0, 0, 255), (0, 255, 255), (255, 255, 0), (255, 0, 0), (128, 0, 0)),
    "hot": ((0, 0, 0), (255, 0, 0), (255, 255, 0), (255, 255, 255)),
}
"""Colour maps by a few of their colours."""


def dead_leaves(rng: Rng, size: int) -> Bytes:
    """Occluding disks of flat colours whose radii follow a power law.

    Source: Lee, Mumford & Huang (2001), occlusion models for natural images: density of the radius as r^-3.
    """
    side = size * FINE
    image, pen = canvas(size, colour(rng))
    low, high = between(rng, 0.015, 0.05) * side, between(rng, 0.2, 0.5) * side
    hue, spread = rng.random(), between(rng, 0.05, 0.6)
    saturation = (between(rng, 0, 0.3), between(rng, 0.3, 1))
    values = between(rng, 0, 0.4), between(rng, 0.6, 1)
    count = min(900, round(3 * (side / low) ** 2 / (2 * math.pi * math.log(high / low))))
    radii = (low**-2 - rng.random(count) * (low**-2 - high**-2)) ** -0.5
    flat = between(rng, 0.6, 1) if chance(rng, 0.3) else 1.0
    for radius in radii.tolist():
        x, y = rng.uniform(-radius, side + radius, 2).tolist()
        fill = hsv(hue + spread * between(rng, -1, 1), between(rng, *saturation), between(rng, *values))
        pen.ellipse((x - radius, y - flat * radius, x + radius, y + flat * radius), fill=fill)
    return reduced(rng, image, size)


def pink_noise(rng: Rng, size: int) -> Bytes:
    """Textures whose amplitude falls as 1 / f^a, a from 1 to 2; the channels follow each other."""
    exponent, stretch = between(rng, 1, 2), between(rng, 1, 2.5) if chance(rng, 0.3) else 1.0
    base = fractal(rng, size, exponent, stretch)
    own = between(rng, 0, 0.5)
    field = np.stack([base + own * fractal(rng, size, exponent, stretch) for _ in range(3)], 2)
    mean = tint(colour(rng, (0, 0.5), (0.35, 0.75)))
    picture = mean + between(rng, 0.08, 0.22) * rng.uniform(0.7, 1.1, 3) * field
    return to_bytes(picture.swapaxes(0, 1) if chance(rng, 0.5) else picture)


def _parcels(rng: Rng, x: Floats, y: Floats, cuts: int) -> Floats:
    """The plane cut again and again by lines, mostly square to each other: a number for each pixel's parcel."""
    turn = between(rng, 0, math.pi)
    label = np.zeros(x.shape)
    for k in range(cuts):
        way = turn + math.pi / 2 * whole(rng, 0, 1) + rng.normal() * 0.08
        cut = x * math.cos(way) + y * math.sin(way)
        part = label == label[whole(rng, 0, len(x) - 1), whole(rng, 0, len(x) - 1)]
        inside = cut[part]
        label[part & (cut > inside.min() + between(rng, 0.3, 0.7) * (inside.max() - inside.min()))] = k + 1
    return label


def satellite(rng: Rng, size: int) -> Bytes:
    """Fields with furrows, roads, woods, water and roofs with their shadows, from above."""
    fine = 2
    side = size * fine
    x, y = grid(side)
    label = _parcels(rng, x, y, whole(rng, 4, 14)).astype(int)
    count, palette = int(label.max()) + 1, between(rng, 0.08, 0.3)
    shades = np.array(
        [
            tint(hsv(palette + rng.normal() * 0.06, between(rng, 0.15, 0.55), between(rng, 0.25, 0.7)))
            for _ in range(count)
        ]
    )
    turn, period = rng.uniform(0, math.pi, count), rng.uniform(2.2, 6, count) / size
    depth = np.where(rng.random(count) < 0.6, rng.uniform(0.01, 0.08, count), 0)
    place = x * np.cos(turn)[label] + y * np.sin(turn)[label]
    furrows = depth[label] * np.sin(2 * math.pi * place / period[label])
    earth, fine_grain = fractal(rng, side, 1.3), fractal(rng, side, 1.0)
    picture = shades[label] * (1 + 0.10 * earth + 0.05 * fine_grain)[..., None] + furrows[..., None]
    wooded = ndimage.gaussian_filter(fractal(rng, side, 1.7), fine)
    if chance(rng, 0.7):  # woods: crowns lit from one side
        crowns = ndimage.gaussian_filter(rng.standard_normal((side, side)), fine * between(rng, 0.6, 1.1))
        light = ndimage.sobel(crowns, 1) + ndimage.sobel(crowns, 0)
        wood = tint(hsv(between(rng, 0.22, 0.38), between(rng, 0.3, 0.6), between(rng, 0.2, 0.4)))
        canopy = wood * np.clip(1 + 0.35 * light / light.std(), 0.2, 2)[..., None]
        picture = blend(picture, canopy, (wooded > between(rng, 0.2, 1.3)).astype(float))
    if chance(rng, 0.3):  # water
        lake = tint(hsv(between(rng, 0.45, 0.62), between(rng, 0.3, 0.6), between(rng, 0.15, 0.4)))
        picture = blend(picture, lake * (1 + 0.03 * earth)[..., None], (wooded < -between(rng, 0.8, 1.6)).astype(float))
    for _ in range(whole(rng, 0, 3)):  # roads
        way, bend = between(rng, 0, math.pi), between(rng, 0, 0.15)
        along, cut = x * math.cos(way) + y * math.sin(way), y * math.cos(way) - x * math.sin(way)
        middle = bend * np.sin(5 * along + between(rng, 0, 6)) + between(rng, -0.5, 0.8)
        road = tint(hsv(0.1, between(rng, 0, 0.25), between(rng, 0.4, 0.85))) * (1 + 0.04 * earth)[..., None]
        picture = blend(picture, road, (np.abs(cut - middle) < between(rng, 0.6, 2) / size).astype(float))
    town = whole(rng, 5, 12 + size // 4) if chance(rng, 0.6) else whole(rng, 0, 3)
    way, (east, south), spread = between(rng, 0, math.pi), rng.uniform(0.2, 0.8, 2), between(rng, 0.08, 0.3)
    along, cut = x * math.cos(way) + y * math.sin(way), y * math.cos(way) - x * math.sin(way)
    for _ in range(town):
        px, py = east + spread * rng.normal(), south + spread * rng.normal()
        u, v = along - (px * math.cos(way) + py * math.sin(way)), cut - (py * math.cos(way) - px * math.sin(way))
        long, wide, shadow = between(rng, 2, 5) / size, between(rng, 1.2, 2.5) / size, 1.2 / size
        inside = (np.abs(u - shadow) < long) & (np.abs(v - shadow) < wide)
        picture[inside] *= 0.45
        roof = tint(hsv(between(rng, 0, 0.09), between(rng, 0, 0.6), between(rng, 0.4, 0.9)))
        ridge = np.where(v > 0, 1.0, 0.75)[..., None]
        picture = np.where(((np.abs(u) < long) & (np.abs(v) < wide))[..., None], roof * ridge, picture)
    return to_bytes(box(picture * between(rng, 0.8, 1.2), fine))


def spectrograms(rng: Rng, size: int) -> Bytes:
    """Voices, birds and engines over time: harmonics under formants, hisses, clicks, on a soft background."""
    time, pitch = grid(size)
    pitch = 1 - pitch
    power = 0.12 + 0.05 * fractal(rng, size, 2.0) + between(rng, 0, 0.15) * (1 - pitch)
    now = time[0]
    for _ in range(whole(rng, 2, 6)):  # sounds one after another
        start, long = between(rng, -0.1, 0.9), between(rng, 0.1, 0.6)
        sound = 1 / (1 + np.exp(-(now - start) * size / 1.5)) / (1 + np.exp((now - start - long) * size / 2.5))
        form = whole(rng, 0, 5)
        if form == 0:  # a hiss
            middle, wide = between(rng, 0.4, 0.9), between(rng, 0.1, 0.3)
            power += (
                between(rng, 0.2, 0.5)
                * sound
                * np.exp(-(((pitch - middle) / wide) ** 2))
                * (1 + 0.15 * fractal(rng, size, 1.6))
            )
            continue
        bend = profile(rng, size, 0.1) * between(rng, 0.02, 0.15)
        if form == 1:  # a whistle
            height, harmonics, wide = between(rng, 0.2, 0.8) + 2 * bend, 2, between(rng, 0.9, 1.6) / size
        else:
            height, harmonics, wide = between(rng, 4, 12) / size * (1 + bend), size // 4, between(rng, 0.8, 1.3) / size
        lines = np.zeros((size, size))
        for k in range(1, harmonics + 1):
            steep = np.sqrt(1 + np.gradient(k * height * np.ones(size), 1 / size) ** 2)
            lines += np.exp(-(((pitch - k * height) / (wide * steep)) ** 2))
        formants = 0.25 * np.exp(-3 * pitch)
        for middle in rng.uniform(0.05, 0.8, whole(rng, 2, 4)).tolist():
            formants = formants + np.exp(-(((pitch - middle - bend) / between(rng, 0.05, 0.12)) ** 2))
        power += between(rng, 0.4, 0.8) * sound * lines * (formants if form > 1 else 1)
    for _ in range(whole(rng, 0, 2)):  # clicks
        power += (
            between(rng, 0.1, 0.3)
            * np.exp(-(((time - rng.random()) * size / between(rng, 0.8, 1.5)) ** 2))
            * (1 - 0.5 * pitch)
        )
    colours = np.array(MAPS[str(rng.choice(list(MAPS)))]) / 255
    value = np.clip(power * between(rng, 0.7, 1.1), 0, 1)
    return to_bytes(np.stack([np.interp(value, np.linspace(0, 1, len(colours)), colours[:, k]) for k in range(3)], 2))
