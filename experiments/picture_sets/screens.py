"""What is made of whole pixels and letters: pixel art, codes of modules, screenshots, pages of text."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from experiments.picture_sets.canvas import (
    FINE,
    Bytes,
    Colour,
    Rng,
    between,
    canvas,
    chance,
    colour,
    font,
    hsv,
    ink_and_paper,
    mixed,
    polygon,
    reduced,
    two_colours,
    whole,
    word,
    words,
)

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def _sprite(rng: Rng, side: int) -> tuple[Bytes, Bytes]:
    """A symmetric figure of few colours with an outline: its colours (h, w, 3), and where it is (h, w)."""
    half, height = max(3, side // 2 - 1), max(5, round(side * between(rng, 0.7, 1.1)))
    y, x = np.mgrid[0:height, 0:half]
    grain = [ndimage.gaussian_filter(rng.standard_normal(x.shape), side / 20) for _ in range(2)]
    lumps, pattern = (field / (field.std() + 1e-9) for field in grain)
    inside = (x / half) ** 2 + ((y - height / 2) / (height / 2)) ** 2 + between(rng, 0.2, 0.5) * lumps < 0.9
    inside[:, 0] |= abs(y[:, 0] - height / 2) < height * 0.35
    body = ndimage.median_filter(inside.astype(np.uint8), 3) if chance(rng, 0.6) else inside.astype(np.uint8)
    body = np.pad(np.concatenate([body[:, ::-1], body], 1), 1)
    hue, step = rng.random(), between(rng, -0.4, 0.4)
    ramp = [hsv(hue + k * step / 3, between(rng, 0.4, 1), 0.35 + 0.2 * k) for k in range(whole(rng, 2, 4))]
    rows = np.linspace(0, len(ramp) - 0.01, len(body)).astype(int)[::-1]
    index = np.clip(rows[:, None] + (np.pad(pattern, ((1, 1), (0, 1))) > 0.4), 0, len(ramp) - 1)
    index = np.concatenate([index[:, ::-1], index], 1)
    colours = np.array(ramp, np.uint8)[index]
    around = ndimage.binary_dilation(body, iterations=1) & ~body.astype(bool)
    colours[around] = colour(rng, (0, 0.8), (0, 0.2))
    eye, middle = max(1, half // 3), half + 1
    row = max(1, round(len(body) * between(rng, 0.25, 0.45)))
    if chance(rng, 0.8):
        for column in (middle - 1 - eye, middle + eye):
            colours[row, column], colours[row + 1, column] = WHITE, BLACK
            body[row : row + 2, column] = 1
    return colours, (body.astype(bool) | around).astype(np.uint8)


def pixel_art(rng: Rng, size: int) -> Bytes:
    """Sprites of games on flat ground, on tiles or in a landscape, one pixel a dot."""
    ground = colour(rng, (0, 0.8), (0, 1))
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = ground
    scene = whole(rng, 0, 3)
    if scene == 1:  # tiles of a pattern
        side = whole(rng, 4, 8) if size < 64 else whole(rng, 6, 16)
        shades = np.array([mixed(ground, colour(rng), share) for share in (0, 0.15, 0.3)], np.uint8)
        tile = shades[np.minimum(rng.integers(0, 6, (side, side)) // 2 * (rng.random((side, side)) < 0.4), 2)]
        tile[0, :], tile[:, 0] = (shades[2], shades[2]) if chance(rng, 0.5) else (tile[0, :], tile[:, 0])
        picture[:] = np.tile(tile, (size // side + 1, size // side + 1, 1))[:size, :size]
    elif scene >= 2:  # bands of sky, platforms of bricks
        bands, steps = whole(rng, 2, 6), colour(rng, (0.2, 0.9), (0.1, 1))
        for row in range(size):
            picture[row] = mixed(ground, steps, (row * bands // size) / bands)
        for _ in range(whole(rng, 2, size // 4)):
            picture[whole(rng, 0, size // 2), whole(rng, 0, size - 1)] = mixed(steps, WHITE, 0.7)
        brick, base = whole(rng, 2, 4), colour(rng, (0.3, 0.9), (0.3, 0.8))
        for _ in range(whole(rng, 1, 4)):
            top, left, long = whole(rng, size // 2, size - 3), whole(rng, -8, size - 8), whole(rng, 8, size)
            high, left = whole(rng, 4, 12), max(left, 0)
            part = picture[top : top + high, left : left + long]
            part[:] = base
            part[::brick] = mixed(base, BLACK, 0.5)
            for row in range(0, len(part), brick):
                part[row : row + brick, row // brick % 2 * brick :: 2 * brick] = mixed(base, BLACK, 0.5)
            part[0] = mixed(base, WHITE, 0.4)
    side = whole(rng, 8, max(9, min(24, size // 2))) if chance(rng, 0.7) else max(8, min(round(size * 0.8), 48))
    count = 1 if side > size // 2 else whole(rng, 1, max(1, (size // side) ** 2 // 2))
    same = _sprite(rng, side) if chance(rng, 0.3) else None
    for _ in range(count):
        colours, where = same or _sprite(rng, side)
        top, left = (whole(rng, 0, max(0, size - length)) for length in where.shape)
        part = picture[top : top + where.shape[0], left : left + where.shape[1]]
        seen = where[: part.shape[0], : part.shape[1]].astype(bool)
        part[seen] = colours[: part.shape[0], : part.shape[1]][seen]
    return picture


def pixel_art_2x(rng: Rng, size: int) -> Bytes:
    """Pixel art as screens show it: two by two pixels a dot."""
    return pixel_art(rng, (size + 1) // 2).repeat(2, 0).repeat(2, 1)[:size, :size]


def _finder(side: int) -> Bytes:
    """Square in square: 7 of a QR code, 9 and more of an Aztec code."""
    place = np.abs(np.arange(side) - side // 2)
    rings = np.maximum(place[:, None], place[None, :])
    dark = (rings % 2 == side // 2 % 2) if side != 7 else (rings == 3) | (rings < 2)
    return np.asarray(dark, dtype=np.uint8)


def modules(rng: Rng, size: int) -> Bytes:
    """Codes of dark and light squares of 2 or 4 pixels with their finder patterns, whole or a part of one."""
    dot = 2 if chance(rng, 0.5) else 4
    quiet = whole(rng, 1, 3) if size // dot >= 23 else 0
    side = size // dot - 2 * quiet
    part = side < 15 or chance(rng, 0.2)
    side = side + whole(rng, 10, 20) if part else side
    code = (rng.random((side, side)) < between(rng, 0.42, 0.58)).astype(np.uint8)
    form = whole(rng, 0, 3)
    if form <= 1:  # QR
        code[6, :] = code[:, 6] = (np.arange(side) + 1) % 2
        for top, left in ((0, 0), (0, side - 7), (side - 7, 0)):
            code[max(top - 1, 0) : top + 8, max(left - 1, 0) : left + 8] = 0
            code[top : top + 7, left : left + 7] = _finder(7)
        if side >= 23:
            code[side - 9 : side - 4, side - 9 : side - 4] = _finder(5)
    elif form == 2:  # Data Matrix
        code[0, :], code[:, -1] = np.arange(side) % 2 == 0, np.arange(side)[::-1] % 2 == 0
        code[:, 0], code[-1, :] = 1, 1
    else:  # Aztec
        wide = 9 if side >= 13 else 5
        start = (side - wide) // 2
        code[start : start + wide, start : start + wide] = _finder(wide)
    if chance(rng, 0.5):
        code = np.rot90(code, whole(rng, 1, 3))
    ink, paper = ink_and_paper(rng) if chance(rng, 0.25) else (BLACK, WHITE)
    if chance(rng, 0.1):
        ink, paper = paper, ink
    dots = np.pad(code, quiet).repeat(dot, 0).repeat(dot, 1)
    if part:
        top, left = (whole(rng, 0, len(dots) - size) for _ in range(2))
        dots = dots[top : top + size, left : left + size]
    dots = np.pad(dots, (0, size - len(dots)))
    return two_colours(dots > 0, ink, paper)


def _icon(rng: Rng, side: int, under: Colour) -> Image.Image:
    """A small sign, anti-aliased."""
    image, pen = canvas(side, under)
    fine, shade = side * FINE - 1, colour(rng, (0.4, 1), (0.3, 0.95))
    form = whole(rng, 0, 3)
    if form == 0:
        pen.ellipse((0, 0, fine, fine), fill=shade)
    elif form == 1:
        pen.rounded_rectangle((0, 0, fine, fine), fine * between(rng, 0.1, 0.4), fill=shade)
    else:
        corners, inner = whole(rng, 3, 6), 0.5 if form == 3 else 1
        pen.polygon(polygon(fine / 2, fine / 2, fine / 2, corners, between(rng, 0, 6), inner), fill=shade)
    if chance(rng, 0.5):
        pen.rectangle((fine * 0.35, fine * 0.35, fine * 0.65, fine * 0.65), fill=mixed(shade, WHITE, 0.8))
    return image.resize((side, side), Image.Resampling.BOX)


def _window(rng: Rng, image: Image.Image, left: int, top: int, right: int, bottom: int) -> None:
    """A window: border, title bar, and within it a list, a form, a terminal, a grid of icons or a chart."""
    pen = ImageDraw.Draw(image)
    dark = chance(rng, 0.3)
    body = hsv(rng.random(), between(rng, 0, 0.1), between(rng, 0.08, 0.2) if dark else between(rng, 0.9, 1))
    ink = mixed(body, WHITE if dark else BLACK, between(rng, 0.7, 1))
    accent, edge = colour(rng, (0.4, 1), (0.4, 0.9)), mixed(body, WHITE if dark else BLACK, between(rng, 0.2, 0.7))
    letters = font(whole(rng, 8, 12)) if chance(rng, 0.8) else ImageFont.load_default_imagefont()
    row, bar = whole(rng, 10, 15), whole(rng, 7, 13)
    pen.rectangle((left, top, right, bottom), fill=body, outline=edge)
    pen.rectangle((left, top, right, top + bar), fill=accent if chance(rng, 0.6) else mixed(body, BLACK, 0.15))
    for k in range(3):
        button = right - 3 - 6 * (k + 1)
        if button > left:
            pen.rectangle((button, top + 3, button + 3, top + 6), fill=mixed(accent, WHITE, 0.7), outline=edge)
    pen.text((left + 3, top), word(rng), mixed(accent, WHITE, 0.9), font=letters)
    top, left, right, bottom = top + bar + 2, left + 3, right - 3, bottom - 3
    form, wide = whole(rng, 0, 4), max(right - left, 8)
    if form == 4 and bottom - top > 10:  # a chart
        bars = whole(rng, 3, 8)
        pen.line((left, bottom, right, bottom), fill=ink)
        for k in range(bars):
            x = left + k * wide // bars
            high = between(rng, 0.1, 0.95) * (bottom - top)
            pen.rectangle((x + 1, round(bottom - high), x + max(2, wide // bars - 2), bottom - 1), fill=accent)
        return
    while top + 8 < bottom:
        if form == 0 and chance(rng, 0.3):  # a row that is chosen
            pen.rectangle((left, top, right, min(top + row - 2, bottom)), fill=mixed(accent, body, 0.4))
        if form == 1 and chance(rng, 0.5):  # a button or a field
            long = round(wide * between(rng, 0.3, 0.8))
            fill = accent if chance(rng, 0.5) else mixed(body, WHITE, 0.5)
            pen.rectangle((left, top, left + long, min(top + row - 2, bottom)), fill=fill, outline=edge)
            pen.text(
                (left + 3, top),
                word(rng)[: max(1, long // 7)],
                mixed(fill, BLACK if sum(fill) > 380 else WHITE, 0.9),
                font=letters,
            )
        elif form == 3:  # icons
            side = min(whole(rng, 7, 14), bottom - top)
            for x in range(left, right - 14, 18):
                image.paste(_icon(rng, side, body), (x, top))
            top += 8
        else:
            shift = 12 if form == 2 and chance(rng, 0.5) else 0
            if form == 0 and chance(rng, 0.6):
                image.paste(_icon(rng, min(8, bottom - top), body), (left, top + 1))
                shift = 11
            length = round(max(1, (wide - shift) / 6) * between(rng, 0.3, 0.95))
            pen.text((left + shift, top), words(rng, length), ink if chance(rng, 0.8) else accent, font=letters)
        top += row
    pen.line((right + 1, top - 2 * row, right + 1, bottom), fill=edge)


def screenshots(rng: Rng, size: int) -> Bytes:
    """Windows on a desktop, drawn pixel by pixel as a screen shows them; small pictures show a part."""
    side = max(72, round(size * between(rng, 1, 1.3)))
    desk, other = colour(rng, (0, 0.8), (0.1, 0.9)), colour(rng, (0, 0.8), (0.1, 0.9))
    image = Image.new("RGB", (side, side), desk)
    pen = ImageDraw.Draw(image)
    if chance(rng, 0.3):
        for y in range(side):
            pen.line((0, y, side, y), fill=mixed(desk, other, y / side))
    for k in range(whole(rng, 1, 2 + side // 64)):
        left, top = (whole(rng, -8, side // 4 + (side // 4 if k else 0)) for _ in range(2))
        right, bottom = (min(side + 4, start + whole(rng, 45, max(46, side - 4))) for start in (left, top))
        _window(rng, image, left, top, right, bottom)
    if chance(rng, 0.4):
        pen.rectangle((0, side - 9, side, side), fill=mixed(desk, BLACK, 0.6))
        for x in range(2, side // 2, 11):
            image.paste(_icon(rng, 7, mixed(desk, BLACK, 0.6)), (x, side - 8))
    part = image
    for _ in range(8):  # not where there is nothing
        left, top = (whole(rng, 0, side - size) for _ in range(2))
        part = image.crop((left, top, left + size, top + size))
        if np.asarray(part).std((0, 1)).max() > 20:
            break
    return np.array(part)


def text(rng: Rng, size: int) -> Bytes:
    """Lines of small letters on paper, as a renderer sets them or slightly turned, where there is room in columns."""
    ink, paper = ink_and_paper(rng)
    if chance(rng, 0.1):
        ink, paper = paper, ink
    fine = 1 if chance(rng, 0.5) else FINE
    image, pen = canvas(size, paper, fine)
    letter = between(rng, 6, 9 + size / 24)
    margin, gap = between(rng, 0, 0.08) * size, between(rng, 1.1, 1.6) * letter
    columns = whole(rng, 1, 2) if size >= 96 and letter < 10 else 1
    wide = (size - margin * (columns + 1)) / columns
    for column in range(columns):
        left, top = margin + column * (wide + margin), margin - (gap * rng.random() if chance(rng, 0.4) else 0)
        if chance(rng, 0.3):  # a heading
            pen.text(
                (left * fine, top * fine), words(rng, round(wide / letter)), ink, font=font(round(letter * 1.3 * fine))
            )
            top += gap * 1.7
        while top < size - margin * 0.5:
            last = chance(rng, 0.15)
            length = round(wide / (0.52 * letter) * (between(rng, 0.2, 0.8) if last else 1))
            pen.text((left * fine, top * fine), words(rng, length), ink, font=font(round(letter * fine)))
            top += gap * (1.5 if last and chance(rng, 0.5) else 1)
        if margin > 2:  # no line runs into the next column
            right = left + wide
            pen.rectangle(((right + 1) * fine, 0, (right + margin) * fine - 1, size * fine), fill=paper)
    if fine == FINE and chance(rng, 0.4):
        image = image.rotate(between(rng, -6, 6), Image.Resampling.BICUBIC, fillcolor=paper)
    return np.array(image) if fine == 1 else reduced(rng, image, size)
