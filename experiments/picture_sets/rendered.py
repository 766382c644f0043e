"""Scenes with light: photographs of a kind, night, fog, x-rays."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.special import expit

from experiments.picture_sets.canvas import (
    Bytes,
    Colour,
    Floats,
    Points,
    Rng,
    between,
    blend,
    blob,
    box,
    chance,
    colour,
    fractal,
    grid,
    hsv,
    polygon,
    profile,
    smooth,
    tint,
    to_bytes,
    whole,
)

FINE = 3
"""Rendered pixels to a pixel."""


def _mask(side: int, outline: Points) -> Floats:
    """1 inside the outline, 0 outside."""
    image = Image.new("L", (side, side), 0)
    ImageDraw.Draw(image).polygon(outline, fill=1)
    return np.asarray(image, dtype=np.float64)


def _turned(rng: Rng, field: Floats) -> Floats:
    """The same field another way round."""
    field = field[:: 1 if chance(rng, 0.5) else -1, :: 1 if chance(rng, 0.5) else -1]
    return field.T if chance(rng, 0.5) else field


def _sky(rng: Rng, side: int, top: Colour, low: Colour) -> Floats:
    """A gradient from the top down."""
    _, y = grid(side)
    return tint(top) + (y ** between(rng, 0.6, 1.5))[..., None] * (tint(low) - tint(top))


def ball(side: int, x: float, y: float, radius: float, light: tuple[float, float, float]) -> tuple[Floats, Floats]:
    """Where a ball is, and how bright its surface is in the light."""
    across, down = grid(side)
    u, v = (across - x) / radius, (down - y) / radius
    deep = 1 - u * u - v * v
    bright = u * light[0] + v * light[1] + np.sqrt(np.maximum(deep, 0)) * light[2]
    return (deep > 0).astype(float), np.clip(bright, 0, 1)


def _tree(rng: Rng, side: int, x: float, foot: float, high: float) -> tuple[Floats, Floats]:
    """Masks of a trunk and of a crown."""
    trunk = _mask(
        side,
        [
            (side * (x - high * 0.04), side * foot),
            (side * x, side * (foot - high)),
            (side * (x + high * 0.04), side * foot),
        ],
    )
    if chance(rng, 0.5):
        wide = high * between(rng, 0.2, 0.35)
        crown = _mask(
            side,
            [
                (side * (x - wide), side * (foot - high * 0.15)),
                (side * x, side * (foot - high)),
                (side * (x + wide), side * (foot - high * 0.15)),
            ],
        )
    else:
        crown = _mask(side, blob(rng, side * x, side * (foot - high * 0.65), side * high * between(rng, 0.3, 0.4), 0.4))
    return trunk, crown


def _animal(rng: Rng, side: int, x: float, foot: float, high: float) -> tuple[Floats, Floats]:
    """Where an animal on four legs is, and its coat: plain, striped or spotted, darker below."""
    way, long, thin = (1 if chance(rng, 0.5) else -1), high * between(rng, 0.4, 0.6), high * between(rng, 0.04, 0.08)
    back = foot - high * between(rng, 0.5, 0.65)
    mask = _mask(side, blob(rng, side * x, side * back, side * long, 0.15, between(rng, 0.45, 0.65)))
    nose, top = x + way * long * between(rng, 0.85, 1.1), back - high * between(rng, 0.1, 0.4)
    head = high * between(rng, 0.14, 0.22)
    parts = [blob(rng, nose, top, head, 0.2)]
    parts += [polygon(nose + ear * head * 0.7, top - head, head * 0.6, 3, 0.5 * ear) for ear in (-1, 1)]
    for k in (-0.75, -0.5, 0.5, 0.75):
        leg, ends = x + k * long, x + k * long + between(rng, -0.05, 0.05) * high
        parts.append([(leg - thin, back), (leg + thin, back), (ends + thin, foot), (ends - thin, foot)])
    for part in parts:
        mask = np.maximum(mask, _mask(side, [(side * u, side * v) for u, v in part]))
    across, down = grid(side)
    coat, pattern = np.ones((side, side)), whole(rng, 0, 2)
    if pattern == 1:
        coat -= between(rng, 0.3, 0.8) * (np.sin(across * between(rng, 25, 60) + 1.5 * fractal(rng, side, 1.8)) > 0.2)
    elif pattern == 2:
        coat -= between(rng, 0.3, 0.8) * (fractal(rng, side, 1.5) > 0.6)
    return mask, coat * np.clip(1.1 - (down - back) / high, 0.35, 1.2)


def scenes(rng: Rng, size: int) -> Bytes:
    """Landscapes, still lifes and faces of stone with light, shadow and texture, as a good lens shows them."""
    side = size * FINE
    x, y = grid(side)
    texture, rough = fractal(rng, side, 1.1), fractal(rng, side, 1.0)
    light = (between(rng, -0.7, 0.7), -0.55, between(rng, 0.4, 0.8))
    indoors = chance(rng, 0.35)
    if indoors:
        wall = colour(rng, (0, 0.5), (0.25, 0.85))
        picture = (
            _sky(rng, side, wall, hsv(rng.random(), 0.2, between(rng, 0.2, 0.9))) * (1 + 0.04 * texture)[..., None]
        )
        picture *= (1 - 0.5 * np.hypot(x - rng.random(), y - rng.random()))[..., None]
        horizon = between(rng, 0.5, 0.8)
        layers = [(np.full(side, horizon), colour(rng, (0.1, 0.6), (0.2, 0.8)), between(rng, 0.05, 0.25))]
    else:
        top = hsv(between(rng, 0.52, 0.65), between(rng, 0.1, 0.7), between(rng, 0.5, 0.95))
        picture = _sky(rng, side, top, hsv(between(rng, 0, 0.6), between(rng, 0, 0.3), between(rng, 0.7, 1)))
        clouds = np.clip(
            (fractal(rng, side, 1.6, between(rng, 1, 2)) - between(rng, 0, 1.5)) * between(rng, 0.4, 1), 0, 1
        )
        picture = blend(picture, np.full(3, between(rng, 0.8, 1)), clouds)
        horizon = between(rng, 0.3, 0.7)
        layers = []
        for k in range(whole(rng, 1, 4)):
            edge = horizon + 0.13 * k + between(rng, 0.02, 0.12) * profile(rng, side, between(rng, 0, 0.8))
            layers.append(
                (
                    edge,
                    hsv(between(rng, 0.05, 0.45), between(rng, 0.1, 0.6), between(rng, 0.2, 0.65)),
                    between(rng, 0.1, 0.4),
                )
            )
    for edge, shade, strength in layers:
        here = (y > edge).astype(float)
        ground = tint(shade) * (1 + strength * _turned(rng, texture) + 0.08 * rough)[..., None]
        picture = blend(picture, np.clip(ground, 0, 1), here)
    for _ in range(whole(rng, 1, 4)):  # things that stand there, the nearer the lower
        px, foot, high = rng.random(), between(rng, horizon + 0.05, 1), between(rng, 0.15, 0.5)
        shadow = np.exp(-(((x - px + light[0] * high * 0.5) / (high * 0.6)) ** 2) - ((y - foot) / (high * 0.12)) ** 2)
        picture *= (1 - between(rng, 0.3, 0.6) * shadow)[..., None]
        body, form = tint(colour(rng, (0.1, 0.9), (0.3, 0.95))), whole(rng, 0, 4)
        grain = (1 + between(rng, 0.03, 0.2) * _turned(rng, rough))[..., None]
        if form == 0 or (indoors and form == 1):
            mask, lit = ball(side, px, foot - high / 2, high / 2, light)
            shine = lit ** whole(rng, 8, 40) * between(rng, 0, 0.7)
            picture = blend(picture, body * grain * (0.2 + 0.8 * lit)[..., None] + shine[..., None], mask)
        elif form == 1:
            trunk, crown = _tree(rng, side, px, foot, high)
            picture = blend(picture, tint(hsv(0.08, 0.5, 0.3)) * grain, trunk)
            leaf = tint(hsv(between(rng, 0.15, 0.4), between(rng, 0.3, 0.7), between(rng, 0.2, 0.5)))
            picture = blend(picture, leaf * np.clip(1 + 0.45 * rough + (x - px) * light[0], 0.1, 2)[..., None], crown)
        elif form == 4:
            mask, coat = _animal(rng, side, px, foot, high * 1.3)
            fur = tint(hsv(between(rng, 0.02, 0.13), between(rng, 0, 0.7), between(rng, 0.2, 0.95)))
            picture = blend(picture, fur * (1 + 0.2 * rough)[..., None] * coat[..., None], mask)
        else:  # a block or a house with two sides in the light
            wide, turn = high * between(rng, 0.3, 0.7), between(rng, 0.2, 0.8)
            corner, left, right = px - wide + 2 * wide * turn, px - wide, px + wide
            lift, top_edge = between(rng, 0, 0.05), foot - high * between(rng, 0.6, 1)
            for a, b, bright in ((left, corner, between(rng, 0.7, 1)), (corner, right, between(rng, 0.3, 0.6))):
                ends = [
                    (a, foot - lift * (a != corner)),
                    (b, foot - lift * (b != corner)),
                    (b, top_edge + lift * (b != corner)),
                    (a, top_edge + lift * (a != corner)),
                ]
                mask = _mask(side, [(side * u, side * v) for u, v in ends])
                picture = blend(picture, body * grain * bright, mask)
            if form == 3:
                roof = _mask(
                    side,
                    [
                        (side * (left - 0.01), side * (top_edge + lift)),
                        (side * corner, side * (top_edge - high * 0.3)),
                        (side * (right + 0.01), side * (top_edge + lift)),
                    ],
                )
                picture = blend(picture, tint(hsv(between(rng, 0, 0.1), 0.5, between(rng, 0.3, 0.6))) * grain, roof)
    picture = ndimage.gaussian_filter(box(np.clip(picture, 0, 1), FINE), (*2 * (between(rng, 0.2, 0.45),), 0))
    return to_bytes(picture ** between(rng, 0.75, 1.2) * between(rng, 0.85, 1.05))


def night(rng: Rng, size: int) -> Bytes:
    """Dark scenes: skylines, hills and streets with few lights and their glow, stars, a moon."""
    side = size * FINE
    x, y = grid(side)
    dark = hsv(between(rng, 0.55, 0.8), between(rng, 0.2, 0.9), between(rng, 0, 0.15))
    picture = _sky(rng, side, dark, hsv(rng.random(), between(rng, 0.2, 0.8), between(rng, 0.02, 0.3)))
    lights: list[tuple[float, float, float, float, Floats]] = []  # x, y, radius, brightness, colour
    for _ in range(whole(rng, 0, 3 + size // 4) if chance(rng, 0.5) else 0):  # stars
        lights.append((rng.random(), between(rng, 0, 0.6), 0.5 / size, between(rng, 0.1, 0.9), np.ones(3)))
    if chance(rng, 0.35):
        lights.append(
            (
                rng.random(),
                between(rng, 0.05, 0.4),
                between(rng, 0.03, 0.08),
                1.0,
                tint(hsv(0.13, between(rng, 0, 0.3), 1)),
            )
        )
    horizon = between(rng, 0.55, 0.9)
    ground = np.clip(tint(dark) * between(rng, 0.2, 0.9), 0, 1)
    if chance(rng, 0.6):  # a skyline, some windows lit
        left = 0.0
        while left < 1:
            wide, top = between(rng, 0.05, 0.2), horizon - between(rng, 0.03, 0.45)
            house = ((x >= left) & (x < left + wide) & (y > top)).astype(float)
            picture = blend(picture, ground * between(rng, 0.3, 1.5), house)
            step, lamp = between(rng, 2.5, 5) / size, tint(hsv(between(rng, 0.08, 0.16), between(rng, 0.2, 0.7), 1))
            for px in np.arange(left + step / 2, left + wide - step / 2, step).tolist():
                for py in np.arange(top + step / 2, horizon, step).tolist():
                    if chance(rng, 0.12):
                        inside = (np.abs(x - px - step / 4) < step / 4) & (np.abs(y - py) < step / 3)
                        picture[inside] = lamp * between(rng, 0.4, 0.9)
            left += wide + (between(rng, 0, 0.1) if chance(rng, 0.4) else 0)
    else:
        for k in range(whole(rng, 1, 3)):
            edge = horizon + 0.1 * k - 0.1 + between(rng, 0.03, 0.2) * profile(rng, side, between(rng, 0, 0.7))
            picture = blend(picture, ground * (1 - 0.25 * k), (y > edge).astype(float))
    for _ in range(whole(rng, 1, 6)):
        lamp = tint(hsv(rng.random() if chance(rng, 0.3) else between(rng, 0.07, 0.15), between(rng, 0.1, 0.8), 1))
        lights.append(
            (rng.random(), between(rng, horizon - 0.15, 1), between(rng, 0.6, 2.5) / size, between(rng, 0.5, 1), lamp)
        )
    for px, py, radius, bright, lamp in lights:
        distance = np.hypot(x - px, y - py)
        lit = np.clip((radius - distance) * side + 0.5, 0, 1)
        glow = between(rng, 0.05, 0.35) * (radius**2 / (radius**2 + distance**2)) ** between(rng, 0.7, 1.3)
        if radius * size < 0.6:
            lit, glow = np.exp(-((distance * size / 0.7) ** 2)), 0 * glow
        picture = picture + bright * (lit + glow)[..., None] * lamp
    if chance(rng, 0.3):  # wet ground mirrors it
        row = round(side * (horizon + 1) / 2)
        below = picture[2 * row - side : row][::-1] if 2 * row > side else picture[:0]
        wave = ndimage.gaussian_filter1d(below, FINE * between(rng, 1, 3), axis=0) if len(below) else below
        picture[side - len(wave) :] = 0.5 * picture[side - len(wave) :] + 0.5 * wave
    return to_bytes(box(np.clip(picture, 0, 1), FINE))


def fog(rng: Rng, size: int) -> Bytes:
    """Layers of hills, trees and houses that fade into haze."""
    side = size * FINE
    _, y = grid(side)
    haze = tint(hsv(between(rng, 0.5, 0.7), between(rng, 0, 0.15), between(rng, 0.5, 0.92)))
    far = np.clip(haze + between(rng, -0.08, 0.08), 0, 1)
    picture = haze + y[..., None] * (far - haze) + 0.012 * fractal(rng, side, 1.9)[..., None]
    grain = fractal(rng, side, 1.2)
    near, count, start = tint(colour(rng, (0, 0.4), (0.1, 0.4))), whole(rng, 2, 5), between(rng, 0.2, 0.6)
    clear = between(rng, 0.15, 0.5)
    for k in range(count):
        share = clear * ((k + 1) / count) ** between(rng, 1, 2)
        edge = start + (0.95 - start) * k / count + between(rng, 0.03, 0.12) * profile(rng, side, between(rng, 0, 0.8))
        body = haze + share * (near - haze)
        mask = (y > edge).astype(float)
        for _ in range(whole(rng, 0, 5)):
            px = rng.random()
            foot = float(edge[min(side - 1, int(px * side))]) + 0.02
            if chance(rng, 0.75):
                trunk, crown = _tree(rng, side, px, foot, between(rng, 0.08, 0.35))
                mask = np.maximum(mask, np.maximum(trunk, crown))
            else:
                mask = np.maximum(
                    mask, _mask(side, polygon(side * px, side * foot, side * between(rng, 0.05, 0.12), 4, math.pi / 4))
                )
        sink = np.clip(1 - (y - edge) * between(rng, 0.5, 2), 0.2, 1)  # the foot of a hill lies in more haze
        picture = blend(picture, body * (1 + 0.03 * share * _turned(rng, grain))[..., None], mask * sink)
    picture = ndimage.gaussian_filter(box(picture, FINE), (0.3, 0.3, 0))
    return to_bytes(picture)


def _bone(x: Floats, y: Floats, points: Points, wide: float, hollow: float) -> Floats:
    """A soft tube around a curve, brighter at its walls."""
    distance = np.full(x.shape, np.inf)
    for px, py in points:
        distance = np.minimum(distance, (x - px) ** 2 + (y - py) ** 2)
    across = np.sqrt(distance) / wide
    return np.asarray((1 - hollow * np.exp(-((across / 0.7) ** 2))) * expit(-((across - 1) * 7)))


def xray(rng: Rng, size: int) -> Bytes:
    """Chests, limbs, skulls and teeth through x-rays: soft, of low contrast, dark at the borders."""
    x, y = grid(size)
    form, turn = whole(rng, 0, 3), between(rng, -0.15, 0.15)
    cos, sin = math.cos(turn), math.sin(turn)
    x, y = 0.5 + cos * (x - 0.5) - sin * (y - 0.5), 0.5 + sin * (x - 0.5) + cos * (y - 0.5)
    dense = np.zeros((size, size))
    if form == 0:  # a chest: body, spine, ribs, lungs, heart
        wide, high = between(rng, 0.42, 0.5), between(rng, 0.5, 0.65)
        dense += 0.5 * expit(-(((np.abs(x - 0.5) / wide) ** 4 + (np.abs(y - 0.55) / high) ** 4 - 1) * 5))
        for way in (-1, 1):
            lung = ((x - 0.5 - way * 0.22) / between(rng, 0.13, 0.18)) ** 2 + (
                (y - 0.5) / between(rng, 0.26, 0.36)
            ) ** 2
            dense -= between(rng, 0.25, 0.38) * expit(-((lung - 1) * 4))
            for k in range(whole(rng, 5, 8)):
                top = 0.18 + 0.085 * k + between(rng, -0.01, 0.01)
                rib = smooth(
                    [(0.5 + way * 0.03, top), (0.5 + way * 0.22, top + 0.0), (0.5 + way * 0.38, top + 0.13)], each=16
                )
                dense += between(rng, 0.05, 0.11) * _bone(x, y, rib, between(rng, 0.014, 0.022), 0.4)
            collar = smooth([(0.5 + way * 0.04, 0.2), (0.5 + way * 0.2, 0.14), (0.5 + way * 0.38, 0.12)], each=16)
            dense += 0.14 * _bone(x, y, collar, 0.025, 0.4)
        dense += (
            between(rng, 0.12, 0.2)
            * np.exp(-(((x - 0.5) / 0.05) ** 2))
            * (1 + 0.12 * np.sin(y * 2 * math.pi * between(rng, 9, 14)))
        )
        heart = ((x - between(rng, 0.53, 0.6)) / 0.14) ** 2 + ((y - between(rng, 0.58, 0.68)) / 0.15) ** 2
        dense += between(rng, 0.15, 0.25) * expit(-((heart - 1) * 3))
    elif form == 1:  # limbs or a hand
        count = whole(rng, 1, 5)
        for k in range(count):
            start = (0.5 + 0.13 * (k - (count - 1) / 2) * between(rng, 0.4, 0.8), 1.05)
            end = (0.5 + 0.22 * (k - (count - 1) / 2) * between(rng, 0.9, 1.1), between(rng, -0.05, 0.25))
            wide, parts = between(rng, 0.25, 0.4) / (count + 3), whole(rng, 1, 3)
            middle = (0.5 * (start[0] + end[0]) + between(rng, -0.03, 0.03), 0.5 * (start[1] + end[1]))
            curve = smooth([start, middle, end], each=24)
            dense += between(rng, 0.15, 0.25) * _bone(x, y, curve, wide * between(rng, 1.8, 2.6), 0)
            for part in range(parts):
                piece = curve[part * len(curve) // parts + 2 : (part + 1) * len(curve) // parts - 2]
                dense += between(rng, 0.3, 0.5) * _bone(x, y, piece, wide, between(rng, 0.2, 0.6))
                for px, py in (piece[0], piece[-1]):
                    dense += 0.15 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (wide * 1.2) ** 2)
    elif form == 2:  # a skull
        round_ = np.hypot((x - 0.5) / between(rng, 0.33, 0.4), (y - 0.42) / between(rng, 0.34, 0.4))
        dense += 0.3 * expit(-((round_ - 1) * 18)) + between(rng, 0.2, 0.35) * np.exp(-(((round_ - 0.95) / 0.07) ** 2))
        jaw = smooth([(0.25, 0.55), (0.33, 0.85), (0.5, between(rng, 0.9, 0.97)), (0.67, 0.85), (0.75, 0.55)], each=16)
        dense += 0.3 * _bone(x, y, jaw, between(rng, 0.04, 0.07), 0.3)
        for way in (-1, 1):
            eye = np.hypot(x - 0.5 - way * between(rng, 0.13, 0.16), (y - 0.5) * between(rng, 0.9, 1.2))
            dense += between(rng, 0.1, 0.2) * np.exp(-(((eye - 0.085) / 0.02) ** 2)) - 0.12 / (
                1 + np.exp((eye - 0.08) * 80)
            )
        for k in range(-4, 5):
            dense += 0.2 * np.exp(-(((x - 0.5 - 0.035 * k) / 0.013) ** 2) - ((y - 0.76) / 0.05) ** 2)
    else:  # teeth
        count = whole(rng, 3, 6)
        dense += 0.15 + 0.08 * np.abs(y - 0.5)
        for row in (-1, 1):
            for k in range(count):
                px, wide = (k + 0.5 + between(rng, -0.08, 0.08)) / count, 0.36 / count
                slant, ends = between(rng, -0.1, 0.1), (0.5 + row * 0.09, 0.5 + row * between(rng, 0.3, 0.42))
                tooth: Points = [(px + slant * (t - 0.5), t) for t in np.linspace(*ends, 20).tolist()]
                dense += 0.28 * _bone(x, y, tooth, wide, between(rng, 0.1, 0.4))
                crown = ((x - px) / wide) ** 4 + ((y - 0.5 - row * 0.14) / 0.11) ** 4
                dense += between(rng, 0.15, 0.3) * expit(-((crown - 1) * 4))
                if chance(rng, 0.15):
                    dense += 0.4 * expit(-((np.hypot(x - px, y - 0.5 - row * 0.1) - wide / 2) * 150))
    dense += 0.015 * fractal(rng, size, 2.0)
    border = between(rng, 0.02, 0.1)
    frame = np.maximum(np.abs(grid(size)[0] - 0.5), np.abs(grid(size)[1] - 0.5))
    dense *= expit(-((frame - 0.5 + border) * size / between(rng, 1, 5)))
    grey = between(rng, 0.02, 0.08) + between(rng, 0.55, 0.85) * (1 - np.exp(-1.5 * np.maximum(dense, 0)))
    tone = np.array([0.97, 1.0, 1.03]) if chance(rng, 0.2) else np.ones(3)
    return to_bytes(grey[..., None] * tone)
