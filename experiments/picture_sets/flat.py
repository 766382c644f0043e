"""Flat colours, anti-aliased: logos, cartoons, maps."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from experiments.picture_sets.canvas import (
    FINE,
    Bytes,
    Colour,
    Points,
    Rng,
    between,
    blob,
    canvas,
    chance,
    colour,
    font,
    fractal,
    hsv,
    line,
    mixed,
    polygon,
    reduced,
    smooth,
    whole,
    word,
)
from experiments.picture_sets.drawn import arc, closed

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def _emblem(rng: Rng, pen: ImageDraw.ImageDraw, side: float, inks: list[Colour], paper: Colour) -> None:
    """One mark in the middle of a square."""
    middle, radius, turn = side / 2, side * between(rng, 0.25, 0.44), between(rng, 0, 2 * math.pi)
    ink, second = inks[0], inks[-1]
    name = whole(rng, 0, 6)
    if name == 0:  # rings
        inside = radius
        for k in range(whole(rng, 2, 5)):
            pen.ellipse(
                (middle - inside, middle - inside, middle + inside, middle + inside),
                fill=paper if k % 2 else inks[k // 2 % len(inks)],
            )
            inside *= between(rng, 0.45, 0.85)
    elif name == 1:  # blades around the middle
        blades, long, wide = whole(rng, 3, 9), between(rng, 0.2, 0.7), between(rng, 0.1, 0.25)
        for k in range(blades):
            a = turn + 2 * math.pi * k / blades
            x, y = middle + radius * 0.6 * math.cos(a), middle + radius * 0.6 * math.sin(a)
            petal = [
                (
                    x + radius * (long * c * math.cos(a) - wide * s * math.sin(a)),
                    y + radius * (long * c * math.sin(a) + wide * s * math.cos(a)),
                )
                for c, s in arc(0, 0, 1)
            ]
            pen.polygon(petal, fill=inks[k % len(inks)])
    elif name == 2:  # a crescent
        x, y = middle + radius * 0.5 * math.cos(turn), middle + radius * 0.5 * math.sin(turn)
        pen.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=ink)
        inner = radius * between(rng, 0.5, 0.9)
        pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=paper)
        if chance(rng, 0.6):
            pen.polygon(polygon(x, y, inner * 0.5, 5, turn, 0.4), fill=second)
    elif name == 3:  # a polygon in a polygon
        corners = whole(rng, 3, 8)
        pen.polygon(polygon(middle, middle, radius * 1.1, corners, turn), fill=ink)
        pen.polygon(
            polygon(
                middle,
                middle,
                radius * between(rng, 0.4, 0.85),
                corners,
                turn,
                between(rng, 0.4, 0.8) if chance(rng, 0.5) else 1,
            ),
            fill=second if second != ink else paper,
        )
    elif name == 4:  # bars
        bars, wide = whole(rng, 2, 5), 2 * radius
        for k in range(bars):
            x, high = middle - radius + wide * k / bars, radius * between(rng, 0.4, 2)
            pen.rounded_rectangle(
                (x, middle + radius - high, x + wide / bars * 0.75, middle + radius),
                radius * between(rng, 0, 0.1),
                fill=inks[k % len(inks)],
            )
    elif name == 5:  # a swoosh
        start, bend = middle - radius, between(rng, 0.25, 0.7) * side * (1 if chance(rng, 0.7) else -1)
        upper = smooth([(start, middle + bend / 3), (middle, middle - bend), (middle + radius, middle)])
        lower = smooth(
            [(start, middle + bend / 3), (middle, middle - bend * between(rng, 0.2, 0.7)), (middle + radius, middle)]
        )
        pen.polygon(upper + lower[::-1], fill=ink)
        pen.ellipse((start, middle + radius * 0.3, start + radius * 0.6, middle + radius * 0.9), fill=second)
    else:  # quarters of a disc
        for k in range(4):
            gap = radius * between(rng, 0, 0.1)
            x, y = middle + (gap if k in (0, 3) else -gap), middle + (gap if k < 2 else -gap)
            pen.pieslice(
                (x - radius, y - radius, x + radius, y + radius), 90 * k, 90 * (k + 1), fill=inks[k % len(inks)]
            )


def logos(rng: Rng, size: int) -> Bytes:
    """A mark of flat shapes in two to four colours, with or without letters."""
    hue, step = rng.random(), between(rng, 0.08, 0.5)
    inks = [hsv(hue + k * step, between(rng, 0.5, 1), between(rng, 0.35, 0.95)) for k in range(whole(rng, 1, 3))]
    paper = WHITE if chance(rng, 0.6) else colour(rng, (0, 0.9), (0.05, 1))
    image, pen = canvas(size, paper)
    side, name = size * FINE, whole(rng, 0, 3)
    badge = paper
    if chance(rng, 0.35):  # on a badge
        edge, badge = side * between(rng, 0.03, 0.1), inks.pop() if len(inks) > 1 else colour(rng, (0.5, 1), (0.2, 0.9))
        pen.rounded_rectangle((edge, edge, side - edge, side - edge), side * between(rng, 0.02, 0.5), fill=badge)
    if name:
        _emblem(rng, pen, side, inks, badge)
    if name == 0 or chance(rng, 0.35):
        letters = word(rng).upper()[: whole(rng, 1, 3) if name == 0 else 3 if size < 48 else 6]
        height = side * (between(rng, 0.8, 1) / (0.4 + 0.6 * len(letters)) if name == 0 else between(rng, 0.14, 0.2))
        height = max(height, 8 * FINE)
        ink = inks[-1] if name == 0 else (BLACK if sum(badge) > 380 else WHITE)
        place = (side / 2, side / 2 if name == 0 else side * 0.86)
        bold = round(height * between(rng, 0, 0.05))
        pen.text(place, letters, ink, font=font(round(height)), anchor="mm", stroke_width=bold)
    return reduced(rng, image, size)


def _shade(
    rng: Rng, image: Image.Image, outline: Points, low: Colour, high: Colour, border: Colour, width: float
) -> None:
    """A shape filled with a gradient of two colours or, in two steps, as cells are painted; and its outline."""
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    turn = between(rng, 0, 2 * math.pi)
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, right - left), np.linspace(-0.5, 0.5, bottom - top))
    share = np.clip(0.5 + (x * math.cos(turn) + y * math.sin(turn)) * between(rng, 0.6, 1.4), 0, 1)
    if chance(rng, 0.5):
        share = np.where(share > between(rng, 0.3, 0.7), 1.0, 0.0)
    filled = np.array(low) + share[..., None] * (np.array(high) - np.array(low))
    image.paste(Image.fromarray(np.round(filled).astype(np.uint8)), (left, top), mask.crop((left, top, right, bottom)))
    if width:
        line(ImageDraw.Draw(image), closed(outline), border, width)


def cartoons(rng: Rng, size: int) -> Bytes:
    """Flat areas and gradients with outlines: creatures, clouds, hills, sun."""
    side = float(size * FINE)
    sky, border = colour(rng, (0.1, 0.7), (0.6, 1)), colour(rng, (0, 0.8), (0, 0.2))
    image, pen = canvas(size, sky)
    width = FINE * between(rng, 0.6, 0.8 + size / 48) if chance(rng, 0.85) else 0.0

    def shape(outline: Points, base: Colour) -> None:
        _shade(
            rng,
            image,
            outline,
            mixed(base, BLACK, between(rng, 0, 0.35)),
            mixed(base, WHITE, between(rng, 0, 0.35)),
            border,
            width,
        )

    if chance(rng, 0.6):
        shape([(-side, -side), (2 * side, -side), (2 * side, 2 * side), (-side, 2 * side)], sky)
    if chance(rng, 0.4):
        shape(
            blob(rng, between(rng, 0, side), between(rng, 0, side / 3), side * between(rng, 0.08, 0.16), 0),
            hsv(0.13, 0.7, 1),
        )
    for _ in range(whole(rng, 0, 2)):
        shape(
            blob(rng, between(rng, 0, side), between(rng, 0, side / 2), side * between(rng, 0.1, 0.2), 0.35, 0.5), WHITE
        )
    for k in range(whole(rng, 0, 2)):
        shape(
            blob(rng, between(rng, 0, side), side * (1.1 + 0.15 * k), side * between(rng, 0.4, 0.7), 0.2, 0.6),
            colour(rng, (0.4, 0.9), (0.4, 0.9)),
        )
    for _ in range(whole(rng, 1, 3)):  # creatures
        x, y, radius = between(rng, 0.2, 0.8) * side, between(rng, 0.35, 0.75) * side, side * between(rng, 0.12, 0.3)
        skin, flat = colour(rng, (0.3, 1), (0.5, 1)), between(rng, 0.7, 1.3)
        for limb in (-1, 1) if chance(rng, 0.7) else ():  # ears or feet
            shape(
                blob(
                    rng,
                    x + limb * radius * between(rng, 0.5, 0.8),
                    y + radius * flat * (0.9 if chance(rng, 0.5) else -0.9),
                    radius * between(rng, 0.25, 0.45),
                    0.2,
                    between(rng, 0.6, 1.6),
                ),
                skin,
            )
        shape(blob(rng, x, y, radius, between(rng, 0, 0.25), flat), skin)
        eye = radius * between(rng, 0.15, 0.3)
        for limb in (-1, 1):
            ex, ey = x + limb * radius * 0.35, y - radius * 0.25
            pen.ellipse((ex - eye, ey - eye, ex + eye, ey + eye), fill=WHITE, outline=border, width=round(width / 2))
            pen.ellipse((ex - eye / 2, ey - eye / 2, ex + eye / 2, ey + eye / 2), fill=border)
        line(pen, arc(x, y + radius * 0.15, radius * between(rng, 0.2, 0.5), 0.05, 0.45), border, width or FINE)
    return reduced(rng, image, size)


def maps(rng: Rng, size: int) -> Bytes:
    """Areas, roads, rivers, buildings, contours and labels, in a style of its own."""
    side, hue, dark = size * FINE, rng.random(), chance(rng, 0.15)
    land = hsv(hue, between(rng, 0.02, 0.15), 0.2 if dark else between(rng, 0.88, 0.97))
    water, park = (
        hsv(h, between(rng, 0.2, 0.6), 0.3 if dark else between(rng, 0.75, 0.95))
        for h in (between(rng, 0.52, 0.62), between(rng, 0.22, 0.38))
    )
    image, pen = canvas(size, land)
    unit = FINE * between(rng, 0.7, 1.1)
    for ground in (park, park, mixed(land, BLACK, 0.08), water):
        for _ in range(whole(rng, 0, 2)):
            pen.polygon(
                blob(rng, between(rng, 0, side), between(rng, 0, side), side * between(rng, 0.1, 0.35), 0.5),
                fill=ground,
            )
    if chance(rng, 0.3):  # contours
        height = np.floor(ndimage.zoom(fractal(rng, size // 2, 2.2), 2 * FINE, order=1) * between(rng, 2, 5))
        height = height[:side, :side]
        edge = np.zeros((side, side), bool)
        edge[: len(height), : len(height)] = ndimage.grey_dilation(height, (3, 3)) != ndimage.grey_erosion(
            height, (3, 3)
        )
        image.paste(hsv(0.07, 0.5, 0.65), (0, 0), Image.fromarray(edge))
    turn, step = between(rng, -0.5, 0.5), between(rng, 9, 24) * FINE

    def across(place: float, way: float) -> Points:
        """A line over the whole map, ``place`` from its middle."""
        x, y = side / 2 - place * math.sin(way), side / 2 + place * math.cos(way)
        return [
            (x - 2 * side * math.cos(way), y - 2 * side * math.sin(way)),
            (x + 2 * side * math.cos(way), y + 2 * side * math.sin(way)),
        ]

    def winding() -> Points:
        way, place = between(rng, 0, math.pi), between(rng, -0.4, 0.4) * side
        wide, long = between(rng, 0.02, 0.15) * side, [-0.9, -0.5, -0.2, 0.2, 0.5, 0.9]
        return smooth(
            [
                (
                    side / 2 + t * side * math.cos(way) - (place + wide * n) * math.sin(way),
                    side / 2 + t * side * math.sin(way) + (place + wide * n) * math.cos(way),
                )
                for t, n in zip(long, rng.normal(size=6).tolist(), strict=True)
            ]
        )

    for _ in range(whole(rng, 0, 2)):
        line(pen, winding(), water, unit * between(rng, 1.5, 6))
    roads: list[tuple[Points, Colour, float]] = []
    if chance(rng, 0.75):  # streets
        for way in (turn, turn + math.pi / 2):
            for k in range(-9, 10):
                if chance(rng, 0.8):
                    roads.append(
                        (
                            across(k * step + between(rng, -0.2, 0.2) * step, way),
                            mixed(land, WHITE, 0.2) if dark else WHITE,
                            1.6,
                        )
                    )
    main = hsv(between(rng, 0, 0.16), between(rng, 0.3, 0.8), 0.6 if dark else 0.97)
    roads += [(winding(), main, between(rng, 2, 3.5)) for _ in range(whole(rng, 0, 2))]
    for points, fill, wide in roads:
        line(pen, points, mixed(fill, BLACK, 0.35), unit * (wide + 1))
    for points, fill, wide in roads:
        line(pen, points, fill, unit * wide)
    for _ in range(whole(rng, 0, size // 6) if chance(rng, 0.5) else 0):  # buildings
        x, y, long = between(rng, 0, side), between(rng, 0, side), unit * between(rng, 2, 5)
        pen.polygon(
            polygon(x, y, long, 4, turn + math.pi / 4), fill=mixed(land, BLACK, 0.2), outline=mixed(land, BLACK, 0.4)
        )
    if chance(rng, 0.5):  # a railway
        track = winding()
        line(pen, track, (90, 90, 90), unit)
    ink, halo = ((230, 230, 230), land) if dark else (colour(rng, (0, 0.8), (0, 0.4)), WHITE)
    for _ in range(whole(rng, 0 if size < 48 else 1, 1 + size // 32)):
        height = FINE * whole(rng, 7, 9 + size // 32)
        place = (between(rng, 0.2, 0.8) * side, between(rng, 0.1, 0.9) * side)
        pen.text(
            place, word(rng).capitalize(), ink, font=font(height), anchor="mm", stroke_width=FINE, stroke_fill=halo
        )
    return reduced(rng, image, size)
