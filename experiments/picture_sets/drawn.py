"""Drawings in ink: line drawings, line art, glyphs."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from experiments.picture_sets.canvas import (
    FINE,
    LETTERS,
    SIGNS,
    Bytes,
    Points,
    Rng,
    between,
    blob,
    canvas,
    chance,
    font,
    ink_and_paper,
    line,
    polygon,
    reduced,
    smooth,
    tint,
    to_bytes,
    two_colours,
    whole,
)

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def arc(x: float, y: float, radius: float, start: float = 0.0, end: float = 1.0, flat: float = 1.0) -> Points:
    """Part of an ellipse, in turns."""
    turns = np.linspace(start, end, 40) * 2 * math.pi
    return [(x + radius * math.cos(turn), y + flat * radius * math.sin(turn)) for turn in turns]


def closed(points: Points) -> Points:
    """Back to where it started."""
    return [*points, points[0]]


def _branches(rng: Rng, x: float, y: float, turn: float, length: float, depth: int) -> list[Points]:
    """A tree without leaves."""
    end = (x + length * math.cos(turn), y + length * math.sin(turn))
    lines = [[(x, y), end]]
    for side in (-1, 1) if depth else ():
        lines += _branches(rng, *end, turn + side * between(rng, 0.2, 0.7), length * between(rng, 0.6, 0.85), depth - 1)
    return lines


def figure(rng: Rng) -> list[Points]:
    """Lines of some figure, within about [-1, 1]."""
    name = whole(rng, 0, 12)
    if name == 0:  # a scribble
        points = [(between(rng, -1, 1), between(rng, -1, 1)) for _ in range(whole(rng, 4, 9))]
        return [smooth(points, closed=chance(rng, 0.3))]
    if name == 1:  # a face
        eye, height = between(rng, 0.2, 0.45), between(rng, -0.35, -0.1)
        lines = [arc(0, 0, 0.9, flat=between(rng, 0.9, 1.3))]
        lines += [arc(side * eye, height, between(rng, 0.06, 0.16)) for side in (-1, 1)]
        lines += [arc(0, between(rng, 0, 0.3), between(rng, 0.25, 0.5), 0.05, 0.45, between(rng, -0.4, 0.9))]
        return [*lines, [(0, height + 0.1), (between(rng, -0.2, 0.2), 0.25), (0, 0.27)]]
    if name == 2:  # a house
        wide, high = between(rng, 0.5, 0.9), between(rng, 0.3, 0.8)
        door, window = between(rng, -0.8, 0.4) * wide, between(rng, 0.1, 0.2)
        lines = [closed([(-wide, 0.8), (-wide, 0.8 - high), (wide, 0.8 - high), (wide, 0.8)])]
        lines += [[(-wide - 0.1, 0.8 - high), (between(rng, -0.5, 0.5) * wide, -0.9), (wide + 0.1, 0.8 - high)]]
        lines += [[(door, 0.8), (door, 0.8 - high / 1.7), (door + 0.25, 0.8 - high / 1.7), (door + 0.25, 0.8)]]
        return [*lines, closed(polygon(wide * 0.6, 0.8 - high * 0.6, window * 1.4, 4, math.pi / 4))]
    if name == 3:
        return _branches(rng, 0, 1, -math.pi / 2, between(rng, 0.5, 0.7), whole(rng, 3, 5))
    if name == 4:  # a flower
        petals, deep, turn = whole(rng, 4, 9), between(rng, 0.2, 0.45), between(rng, 0, 6)
        turns = np.linspace(0, 2 * math.pi, 150)
        radius = 0.3 + deep * np.cos(petals * turns + turn)
        head = list(zip((radius * np.cos(turns)).tolist(), (radius * np.sin(turns) - 0.35).tolist(), strict=True))
        stem: Points = smooth([(0, 0.1), (between(rng, -0.2, 0.2), 0.5), (between(rng, -0.3, 0.3), 1.0)])
        return [head, arc(0, -0.35, between(rng, 0.06, 0.15)), stem]
    if name == 5:  # a box in space
        x, y, deep = between(rng, 0.3, 0.7), between(rng, 0.3, 0.7), between(rng, 0.2, 0.5)
        front = closed([(-x, -y + deep), (x - deep, -y + deep), (x - deep, y), (-x, y)])
        back: Points = [(px + deep, py - deep) for px, py in front[:4]]
        return [front, [front[0], back[0], back[1], back[2], front[2]], [front[1], back[1]]]
    if name == 6:  # a person
        arms, legs = between(rng, -0.5, 0.5), between(rng, 0.15, 0.5)
        lines = [arc(0, -0.7, between(rng, 0.15, 0.28)), [(0, -0.45), (0, 0.3)]]
        lines += [[(-0.5, -0.1 + arms), (0, -0.25), (0.5, -0.1 - between(rng, -0.5, 0.5))]]
        return [*lines, [(-legs, 1), (0, 0.3), (legs, 1)]]
    if name == 7:  # a spiral
        turns, wide = np.linspace(0, between(rng, 2, 5) * 2 * math.pi, 160), between(rng, 0.6, 1)
        radius = wide * turns / turns[-1]
        return [list(zip((radius * np.cos(turns)).tolist(), (radius * np.sin(turns)).tolist(), strict=True))]
    if name == 8:  # hatching
        step, slant = between(rng, 0.12, 0.3), between(rng, -0.3, 0.3)
        rows = np.arange(-0.9, 0.9, step)
        return [[(-math.sqrt(1 - y * y), y + slant), (math.sqrt(1 - y * y), y - slant)] for y in rows.tolist()]
    if name == 9:  # a fish
        fat = between(rng, 0.3, 0.6)
        upper: Points = smooth([(-0.9, 0), (-0.4, -fat), (0.4, -0.1), (0.9, -0.4)])
        lower: Points = smooth([(-0.9, 0), (-0.4, fat), (0.4, 0.1), (0.9, 0.4)])
        return [upper, lower, [upper[-1], (0.7, 0), lower[-1]], arc(-0.6, -0.1, 0.07), arc(-0.5, 0, 0.3, -0.12, 0.12)]
    if name == 10:  # a ring or an ellipse
        return [arc(0, 0, radius, flat=1) for radius in rng.uniform(0.2, 1, whole(rng, 1, 3)).tolist()]
    if name == 11:  # a polygon or a star
        return [
            closed(
                polygon(
                    0, 0, 1, whole(rng, 3, 7), between(rng, 0, 6), between(rng, 0.3, 0.7) if chance(rng, 0.5) else 1
                )
            )
        ]
    return [closed(blob(rng, 0, 0, between(rng, 0.5, 0.9)))]  # a pebble


def placed(rng: Rng, lines: list[Points], side: float, alone: bool) -> list[Points]:
    """The figure turned, scaled and wavering a little, somewhere in a square of ``side``."""
    scale = side * (between(rng, 0.3, 0.48) if alone else between(rng, 0.12, 0.35))
    x, y = (between(rng, 0.4, 0.6) * side if alone else between(rng, 0.15, 0.85) * side for _ in range(2))
    turn, squeeze = between(rng, -0.35, 0.35), between(rng, 0.75, 1.25)
    waver, phase = between(rng, 0, 0.03), rng.uniform(0, 6, 2)
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    out = []
    for points in lines:
        moved = []
        for px, py in points:
            a = px * squeeze + waver * math.sin(5 * py + float(phase[0]))
            b = py + waver * math.sin(5 * px + float(phase[1]))
            moved.append((x + cos * a - sin * b, y + sin * a + cos * b))
        out.append(moved)
    return out


def line_drawings(rng: Rng, size: int) -> Bytes:
    """Dark strokes of one width or a few on paper."""
    ink, paper = ink_and_paper(rng)
    image, pen = canvas(size, paper)
    width = FINE * between(rng, 0.7, 1.2 + size / 64)
    count = whole(rng, 1, 6)
    for _ in range(count):
        own = width * (between(rng, 0.6, 1.3) if chance(rng, 0.3) else 1)
        for points in placed(rng, figure(rng), size * FINE, count == 1):
            line(pen, points, ink, own)
    return reduced(rng, image, size)


def line_art(rng: Rng, size: int) -> Bytes:
    """Drawings in two colours, pixels wholly of one or of the other."""
    ink, paper = ink_and_paper(rng) if chance(rng, 0.3) else (BLACK, WHITE)
    if chance(rng, 0.3):
        ink, paper = paper, ink
    image = Image.new("1", (size, size), 0)
    pen = ImageDraw.Draw(image)
    width, count = whole(rng, 1, 1 + size // 48), whole(rng, 1, 6)
    for _ in range(count):
        lines, filled = placed(rng, figure(rng), size, count == 1), chance(rng, 0.25)
        for points in lines:
            if filled and len(points) > 4:
                pen.polygon(points, fill=0 if chance(rng, 0.3) else 1, outline=1)
            pen.line(points, fill=1, width=width)
    return two_colours(np.array(image), ink, paper)


def glyphs(rng: Rng, size: int) -> Bytes:
    """One letter or sign, light on dark or dark on light, turned a little."""
    sign = str(rng.choice(list(LETTERS + SIGNS)))
    image = Image.new("L", (size * FINE, size * FINE), 0)
    height, middle = round(size * FINE * between(rng, 0.5, 1.05)), size * FINE / 2
    x, y = (middle + size * FINE * between(rng, -0.06, 0.06) for _ in range(2))
    bold = round(height * between(rng, 0, 0.05)) if chance(rng, 0.5) else 0
    ImageDraw.Draw(image).text((x, y), sign, 255, font=font(height), anchor="mm", stroke_width=bold)
    if chance(rng, 0.85):  # turned, slanted, stretched
        turn, slant, wide, high = (
            between(rng, *ends) for ends in ((-0.25, 0.25), (-0.3, 0.3), (0.85, 1.3), (0.85, 1.2))
        )
        matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        (a, b), (c, d) = (matrix @ np.array([[wide, slant], [0, high]])).tolist()
        move = (a, b, middle - (a + b) * middle, c, d, middle - (c + d) * middle)
        image = image.transform(image.size, Image.Transform.AFFINE, move, Image.Resampling.BILINEAR)
    share = reduced(rng, image, size)[..., None] / 255
    dark, light = ((0, 0, 0), (255, 255, 255)) if chance(rng, 0.8) else ink_and_paper(rng)
    under, over = (dark, light) if chance(rng, 0.5) else (light, dark)
    return to_bytes(tint(under) + share * (tint(over) - tint(under)))
