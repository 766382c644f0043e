"""What every kind of picture is made with: canvases drawn finer and reduced, colours, curves, words, random fields."""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import fft
from scipy.interpolate import CubicSpline

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Rng = np.random.Generator
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

FINE = 4
"""Canvas pixels to a pixel, for what is drawn with anti-aliasing."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
SIGNS = "&%$@#?!+=*/<>()[]{}~^"
VOWELS, CONSONANTS = "aaeeeiioou", "bcddfghklllmmnnnpqrrrsssttttvwxyz"


def between(rng: Rng, low: float, high: float) -> float:
    """A number of the uniform distribution."""
    return float(rng.uniform(low, high))


def chance(rng: Rng, share: float) -> bool:
    """True in ``share`` of the calls."""
    return bool(rng.random() < share)


def whole(rng: Rng, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(rng.integers(low, max(low, high) + 1))


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """A colour by hue, saturation and value in [0, 1]; the hue wraps around."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def colour(rng: Rng, saturation: tuple[float, float] = (0.0, 1.0), value: tuple[float, float] = (0.0, 1.0)) -> Colour:
    """Any hue; saturation and value of their ranges."""
    return hsv(rng.random(), between(rng, *saturation), between(rng, *value))


def ink_and_paper(rng: Rng) -> tuple[Colour, Colour]:
    """A dark colour and a light one: mostly black on white, else of any hue."""
    ink = (0, 0, 0) if chance(rng, 0.6) else colour(rng, (0.2, 1), (0.05, 0.4))
    paper = (255, 255, 255) if chance(rng, 0.6) else colour(rng, (0.02, 0.2), (0.88, 1))
    return ink, paper


def two_colours(where: NDArray[np.bool_], ink: Colour, paper: Colour) -> Bytes:
    """Ink where it says so (H, W, or H, W, 1), paper elsewhere."""
    return np.where(where.reshape(*where.shape[:2], 1), np.array(ink, np.uint8), np.array(paper, np.uint8))


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """``share`` of the second colour in the first."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return red, green, blue


def canvas(size: int, background: Colour, fine: int = FINE) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A picture ``fine`` times larger than ``size``, and its pen."""
    image = Image.new("RGB", (size * fine, size * fine), background)
    return image, ImageDraw.Draw(image)


def reduced(rng: Rng, image: Image.Image, size: int) -> Bytes:
    """The canvas at ``size``, by one of the two filters that well-made small pictures come from."""
    method = Image.Resampling.LANCZOS if chance(rng, 0.5) else Image.Resampling.BOX
    return np.array(image.resize((size, size), method))


def box(field: Floats, fine: int) -> Floats:
    """Means over squares of ``fine`` x ``fine``: fields (H, W) or (H, W, C) reduced without rounding."""
    height, width = field.shape[0] // fine, field.shape[1] // fine
    return np.asarray(
        field.reshape(height, fine, width, fine, -1).mean((1, 3)).reshape(height, width, *field.shape[2:])
    )


def to_bytes(field: Floats) -> Bytes:
    """A field in [0, 1] as 8 bit."""
    return np.round(255 * np.clip(field, 0, 1)).astype(np.uint8)


def grid(size: int) -> tuple[Floats, Floats]:
    """X and y of the pixels' centres, in [0, 1]; both (size, size)."""
    place = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(place, place, indexing="ij")
    return x, y


def tint(shade: Colour) -> Floats:
    """A colour as three numbers in [0, 1]."""
    return np.array(shade) / 255


def blend(under: Floats, over: Floats, mask: Floats) -> Floats:
    """``over`` on ``under`` (H, W, 3) where the mask (H, W) says so."""
    return under + mask[..., None] * (over - under)


def fractal(rng: Rng, size: int, exponent: float, stretch: float = 1.0) -> Floats:
    """A random field (size, size) of mean 0 and deviation 1 whose amplitude falls as 1 / f^exponent; does not wrap."""
    side = fft.next_fast_len(size + max(8, size // 3), real=True)
    down, across = fft.fftfreq(side)[:, None] * stretch, fft.rfftfreq(side)[None, :]
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    spectrum = fft.rfft2(rng.standard_normal((side, side))) * frequency**-exponent
    field = fft.irfft2(spectrum, (side, side))[:size, :size]
    return np.asarray((field - field.mean()) / (field.std() + 1e-12))


def profile(rng: Rng, count: int, roughness: float) -> Floats:
    """A skyline: ``count`` heights of about [-1, 1], smooth at roughness 0 and ragged at 1."""
    place, heights = np.linspace(0, 1, count), np.zeros(count)
    for k in range(1, 33):
        heights += (
            k ** (-2.2 + roughness)
            * math.sqrt(2)
            * rng.normal()
            * np.sin(2 * math.pi * (k * place + rng.random()) * 0.7)
        )
    return heights / 1.5


def smooth(points: Points, closed: bool = False, each: int = 12) -> Points:
    """A spline through the points."""
    through = np.array([*points, points[0]] if closed else points)
    curve = CubicSpline(np.arange(len(through)), through, bc_type="periodic" if closed else "natural")
    return [(float(x), float(y)) for x, y in curve(np.linspace(0, len(through) - 1, each * len(through)))]


def blob(rng: Rng, x: float, y: float, radius: float, roughness: float = 0.3, flat: float = 1.0) -> Points:
    """A closed curve around (x, y): a circle at roughness 0."""
    angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    distance = np.ones(64)
    for k in range(2, 7):
        distance += roughness / k * rng.normal() * np.cos(k * angle + between(rng, 0, 2 * math.pi))
    distance = radius * np.maximum(distance, 0.2)
    return list(
        zip((x + distance * np.cos(angle)).tolist(), (y + flat * distance * np.sin(angle)).tolist(), strict=True)
    )


def polygon(x: float, y: float, radius: float, corners: int, turn: float = 0.0, inner: float = 1.0) -> Points:
    """A regular polygon; with ``inner`` below 1 a star of as many points."""
    count = corners if inner == 1 else 2 * corners
    return [
        (
            x + radius * (1 if inner == 1 or k % 2 == 0 else inner) * math.cos(turn + 2 * math.pi * k / count),
            y + radius * (1 if inner == 1 or k % 2 == 0 else inner) * math.sin(turn + 2 * math.pi * k / count),
        )
        for k in range(count)
    ]


def line(pen: ImageDraw.ImageDraw, points: Points, fill: Colour | int, width: float) -> None:
    """A line with round joints and round ends."""
    pen.line(points, fill=fill, width=max(1, round(width)), joint="curve")
    if width >= 3:
        for x, y in (points[0], points[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=fill)


@lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size=size)


def word(rng: Rng) -> str:
    """Something that could be a word."""
    if chance(rng, 0.06):
        return str(whole(rng, 1, 2000))
    letters = ""
    for _ in range(whole(rng, 1, 4)):
        letters += str(rng.choice(list(CONSONANTS))) + str(rng.choice(list(VOWELS)))
    letters = letters[whole(rng, 0, 1) :] + (str(rng.choice(list(CONSONANTS))) if chance(rng, 0.4) else "")
    return letters.capitalize() if chance(rng, 0.15) else letters


def words(rng: Rng, letters: int) -> str:
    """Words of about so many letters together."""
    text = word(rng)
    while len(text) < letters:
        text += str(rng.choice([" ", " ", " ", " ", " ", ", ", ". "])) + word(rng)
    return text[: max(letters, 1)]
