"""Damage as people's pictures have it, made by other means than the audit's own simulators make theirs.

Each kind takes a picture, float64 (H, W, C) in [0, 255], C 1 or 3, a strength in the unit of the audit's detector of
that kind, and a generator. :func:`damaged` draws the strength, and rounds everything to 8 bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Picture = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Rng = np.random.Generator
Apply = Callable[[Picture, float, Rng], Picture]

HALF = 127.5
"""Grey levels of one unit, pixels being in [-1, 1]."""
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold")
WORDS = ("SAMPLE", "Draft", "www.example.org", "(c) 2019", "Photo: A. Meyer", "2004-11-23", "do not copy", "Preview")
LEAST_LETTERS = 8
"""Height in pixels of the smallest letters that can be read."""
BAYER = ((0, (0, 0)), (1, (0, 1)), (1, (1, 0)), (2, (1, 1)))
"""Which colour a sensor's pixel sees: channel, and where in each square of two by two."""
CAMERA_QUALITY = 92


def to_bytes(picture: Picture) -> Bytes:
    """Clipped and rounded."""
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def _drawn(picture: Picture) -> Image.Image:
    pixels = to_bytes(picture)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _back(image: Image.Image) -> Picture:
    pixels = np.asarray(image, np.float64)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _compressed(picture: Picture, quality: int) -> Picture:
    file = BytesIO()
    image = _drawn(picture)
    image.save(file, "JPEG", quality=quality, **({"subsampling": "4:2:0"} if image.mode == "RGB" else {}))
    return _back(Image.open(file))


def _colour(channels: int, rng: Rng) -> Picture:
    """Black, white, or any."""
    if rng.random() < 0.5:
        return np.full(channels, float(rng.choice([0, 255])))
    return rng.uniform(0, 255, channels)


# -- kinds that the audit simulates ----------------------------------------------------------------------


def noise(picture: Picture, strength: float, rng: Rng) -> Picture:
    """White noise of this standard deviation."""
    return picture + rng.normal(0, strength * HALF, picture.shape)


def poisson(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Counted photons, so many that the standard deviation at mid grey is the strength."""
    per_level = HALF / (strength * HALF) ** 2
    return rng.poisson(picture * per_level) / per_level


def camera(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Noise of a Bayer sensor, its colours interpolated, and JPEG; the strength is the noise that comes out.

    Interpolation is linear, so that noise and picture can be taken apart; the picture is spared, as it would be behind
    good optics, for else fine detail would be lost, which is another kind of damage.
    """
    sensor = rng.normal(0, strength * HALF / _gain(picture.shape[2]), (*picture.shape[:2], 3))
    return _seen(picture, sensor)


def _seen(picture: Picture, sensor: Picture) -> Picture:
    noise = _demosaiced(sensor)
    return _compressed(picture + (noise if picture.shape[2] == 3 else noise.mean(2, keepdims=True)), CAMERA_QUALITY)


def _demosaiced(picture: Picture) -> Picture:
    """What a sensor that sees one colour in each pixel makes of it, interpolated linearly."""
    height, width, _ = picture.shape
    cross = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
    square = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
    seen = np.zeros_like(picture)
    for channel, (row, column) in BAYER:
        seen[row:height:2, column:width:2, channel] = picture[row:height:2, column:width:2, channel]
    kernels = (square, cross, square)
    return np.stack([ndimage.convolve(seen[..., c], kernels[c], mode="mirror") for c in range(3)], 2)


@cache
def _gain(channels: int) -> float:
    """Noise that comes out of :func:`camera` over that of its sensor, measured on mid grey; JPEG takes more of less."""
    sensor = np.random.default_rng(0).normal(0, 0.15 * HALF, (256, 256, 3))
    return float(_seen(np.full((256, 256, channels), HALF), sensor).std() / sensor.std())


def impulse(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Salt and pepper: this share of pixels is black or white, in all channels or, every other time, in one or more."""
    height, width, channels = picture.shape
    if channels == 1 or rng.random() < 0.5:
        hit, share = rng.random((height, width, 1)), strength
    else:
        hit, share = rng.random((height, width, channels)), 1 - (1 - strength) ** (1 / channels)
    return np.where(hit < share / 2, 0.0, np.where(hit < share, 255.0, picture))


def holes(picture: Picture, strength: float, rng: Rng) -> Picture:
    """This share of pixels was lost, and is black."""
    return np.where(rng.random((*picture.shape[:2], 1)) < strength, 0.0, picture)


def blur(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Gaussian blur of this standard deviation in pixels."""
    return ndimage.gaussian_filter(picture, (strength, strength, 0), mode="mirror")


def motion(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Smeared along a line of this many pixels, at any angle."""
    reach = math.ceil(strength / 2)
    along = np.clip((strength + 1) / 2 - np.abs(np.arange(-reach, reach + 1)), 0, 1)
    line = np.zeros((2 * reach + 1,) * 2)
    line[reach] = along
    kernel = ndimage.rotate(line, rng.uniform(0, 180), reshape=False, order=1)
    return ndimage.convolve(picture, (kernel / kernel.sum())[..., None], mode="mirror")


def enlarged(picture: Picture, strength: float, rng: Rng) -> Picture:
    """A part of the picture, or all of it made smaller, enlarged by this factor."""
    whole = _drawn(picture)
    method = rng.choice([Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    width, height = whole.width / strength, whole.height / strength
    if rng.random() < 0.5:
        left, top = rng.uniform(0, whole.width - width), rng.uniform(0, whole.height - height)
        return _back(whole.resize(whole.size, method, box=(left, top, left + width, top + height)))
    small = whole.resize((max(2, round(width)), max(2, round(height))), Image.Resampling.HAMMING)
    return _back(small.resize(whole.size, method))


def jpeg(picture: Picture, strength: float, rng: Rng) -> Picture:
    """JPEG of this quality, colours at half the resolution as most programs have it."""
    return _compressed(picture, round(strength))


def banding(picture: Picture, strength: float, rng: Rng) -> Picture:
    """So many levels in each channel, as "posterise" makes them: of equal width, black and white among them."""
    levels = round(strength)
    return np.floor(picture * levels / 256) * 255 / (levels - 1)


def blocks(picture: Picture, strength: float, rng: Rng) -> Picture:
    """One or two rectangles, each of a colour, over this share of the picture together."""
    covered, (height, width, channels) = picture.copy(), picture.shape
    count = int(rng.integers(1, 3))
    taken = np.zeros((height, width), bool)
    for _ in range(count):
        area, shape = strength * height * width / count, math.exp(rng.uniform(-0.6, 0.6))
        rows = min(height, max(1, round(math.sqrt(area) * shape)))
        columns = min(width, max(1, round(area / rows)))
        for _ in range(100):  # they seldom lie on each other
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            here = (slice(top, top + rows), slice(left, left + columns))
            if not taken[here].any():
                break
        covered[here], taken[here] = _colour(channels, rng), True
    return covered


def caption(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Words in one colour, often outlined, that may run off the edge; the strength is the size of letters."""
    image = _drawn(picture)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(str(folder / f"{rng.choice(FONTS)}.ttf"), strength * image.height)
    word = str(rng.choice(WORDS))
    left, top, right, bottom = font.getbbox(word)
    x = rng.uniform(0, max(1.0, image.width - right))
    y = rng.uniform(-top, max(1.0, image.height - bottom))
    under = picture[max(0, int(y + top)) : int(y + bottom) + 1, int(x + left) : int(x + right) + 1].mean()
    ink = 255 if under < HALF else 0
    colour = _colour(picture.shape[2], rng)
    if abs(colour.mean() - under) < 70:  # nobody writes what nobody can read
        colour = np.full(picture.shape[2], float(ink))
    fill = tuple(map(int, colour)) if image.mode == "RGB" else int(colour[0])
    outline = 1 if strength * image.height >= 12 and rng.random() < 0.3 else 0
    edge = (255 - ink,) * 3 if image.mode == "RGB" else 255 - ink
    ImageDraw.Draw(image).text((x, y), word, fill=fill, font=font, stroke_width=outline, stroke_fill=edge)
    return _back(image)


# -- kinds that it does not ------------------------------------------------------------------------------


def grain(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Grain of film: soft, grey, strongest in the middle tones, where its standard deviation is the strength."""
    soft = ndimage.gaussian_filter(rng.normal(size=picture.shape[:2]), 0.8, mode="wrap")
    tone = picture.mean(2) / 255
    return picture + (strength * HALF * soft / soft.std() * 4 * tone * (1 - tone))[..., None]


def halftone(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Printed in dots that are so many pixels apart, each channel at its own angle."""
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]]
    screened = np.empty_like(picture)
    for channel in range(picture.shape[2]):
        angle = rng.uniform(0, math.pi)
        u = (rows * math.cos(angle) + columns * math.sin(angle)) * 2 * math.pi / strength
        v = (columns * math.cos(angle) - rows * math.sin(angle)) * 2 * math.pi / strength
        threshold = HALF * (1 + (np.cos(u) + np.cos(v)) / 2)
        screened[..., channel] = np.clip(HALF + 3 * (picture[..., channel] - threshold), 0, 255)
    return screened


def rain(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Thin bright streaks, nearly parallel, over this share of the picture."""
    height, width, _ = picture.shape
    fine, slant = 4, rng.uniform(-0.4, 0.4)
    mask = Image.new("L", (width * fine, height * fine))
    while np.asarray(mask, bool).mean() < strength:
        long, x, y = rng.uniform(0.1, 0.3) * height, rng.uniform(0, width), rng.uniform(-0.2, 1) * height
        ends = [fine * one for one in (x, y, x + long * (slant + rng.normal(0, 0.03)), y + long)]
        ImageDraw.Draw(mask).line(ends, fill=int(rng.integers(150, 230)), width=round(rng.uniform(2, 4)))
    cover = _back(mask.resize((width, height), Image.Resampling.BOX)) / 255
    return picture + cover * (235 - picture)


def moire(picture: Picture, strength: float, rng: Rng) -> Picture:
    """The stripes of a screen that was photographed, of this amplitude."""
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]]
    stripes = np.zeros(picture.shape[:2])
    for _ in range(2):
        angle, period = rng.uniform(0, math.pi), math.exp(rng.uniform(math.log(2.5), math.log(9)))
        phase = 2 * math.pi * ((rows * math.cos(angle) + columns * math.sin(angle)) / period + rng.random())
        stripes += np.sin(phase) / 2
    tint = 1 + (rng.uniform(-0.4, 0.4, picture.shape[2]) if picture.shape[2] == 3 else 0)
    return picture + strength * HALF * stripes[..., None] * tint


def chroma(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Noise of colour, not of brightness, soft as cameras have it, of this standard deviation."""
    shades = ndimage.gaussian_filter(rng.normal(size=picture.shape), (0.7, 0.7, 0), mode="wrap")
    shades -= shades.mean(2, keepdims=True)
    return picture + strength * HALF * shades / shades.std()


def fringe(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Red and blue shifted against each other by so many pixels: edges have colours."""
    angle = rng.uniform(0, 2 * math.pi)
    step = strength / 2 * np.array([math.sin(angle), math.cos(angle)])
    shifted = picture.copy()
    shifted[..., 0] = ndimage.shift(picture[..., 0], step, order=1, mode="mirror")
    shifted[..., 2] = ndimage.shift(picture[..., 2], -step, order=1, mode="mirror")
    return shifted


def ghost(picture: Picture, strength: float, rng: Rng) -> Picture:
    """Exposed twice: itself once more, some pixels aside, with this share of the light."""
    angle, far = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.15) * min(picture.shape[:2])
    step = far * np.array([math.sin(angle), math.cos(angle)])
    return (1 - strength) * picture + strength * ndimage.shift(picture, (*step, 0), order=1, mode="mirror")


def haze(picture: Picture, strength: float, rng: Rng) -> Picture:
    """A white veil, thicker at one side, that takes this share of the contrast on average."""
    ramp = np.linspace(-1, 1, picture.shape[0])[:, None, None] * rng.uniform(-0.3, 0.3)
    veil = np.clip(strength + ramp, 0, 1)
    return picture * (1 - veil) + 225 * veil


# -- all of them -----------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """A kind of damage.

    Attributes:
        apply: Makes it.
        strengths: Those that are drawn, logarithmically even.
        judged: From which on, or, where less is more, up to which it must be found; None: all of them.
        right: Names of the audit's kinds that are right for it, none where it has no such kind. Single pixels of black
            and white are right as either of two: both are mended alike.
        unit: Of the strength.
        colour: Whether it needs colours.
    """

    apply: Apply
    strengths: tuple[float, float]
    judged: float | None
    right: tuple[str, ...]
    unit: str
    colour: bool = False

    @property
    def known(self) -> bool:
        """Whether the audit simulates it."""
        return bool(self.right)

    def part(self, strength: float) -> str:
        """``judged`` at a strength at which it must be found, ``weak`` at one at which it may be."""
        less_is_more = self.unit in ("quality", "levels")
        if self.judged is None or (strength <= self.judged if less_is_more else strength >= self.judged):
            return "judged"
        return "weak"


DAMAGES: dict[str, Damage] = {
    "noise": Damage(noise, (0.03, 0.4), 0.05, ("noise",), "std"),
    "poisson": Damage(poisson, (0.04, 0.35), 0.05, ("poisson",), "std at mid grey"),
    "camera": Damage(camera, (0.03, 0.25), 0.05, ("camera",), "std"),
    "impulse": Damage(impulse, (0.01, 0.25), 0.02, ("impulse", "holes"), "share of pixels"),
    "holes": Damage(holes, (0.05, 0.5), None, ("holes", "impulse"), "share of pixels"),
    "blur": Damage(blur, (0.8, 4.0), 1.2, ("blur",), "std in pixels"),
    "motion": Damage(motion, (3.0, 13.0), 5.0, ("motion",), "pixels"),
    "enlarged": Damage(enlarged, (1.5, 5.0), 2.0, ("enlarged",), "factor"),
    "jpeg": Damage(jpeg, (5, 60), 30, ("jpeg",), "quality"),
    "banding": Damage(banding, (4, 24), 8, ("banding",), "levels"),
    "blocks": Damage(blocks, (0.03, 0.3), None, ("blocks",), "share of the area"),
    "caption": Damage(caption, (0.13, 0.25), None, ("caption",), "height of letters"),
    "grain": Damage(grain, (0.1, 0.3), None, (), "std"),
    "halftone": Damage(halftone, (2.5, 6.0), None, (), "pixels"),
    "rain": Damage(rain, (0.05, 0.2), None, (), "share of the area"),
    "moire": Damage(moire, (0.1, 0.4), None, (), "amplitude"),
    "chroma": Damage(chroma, (0.08, 0.3), None, (), "std", colour=True),
    "fringe": Damage(fringe, (1.5, 4.0), None, (), "pixels", colour=True),
    "ghost": Damage(ghost, (0.25, 0.5), None, (), "share of the light"),
    "haze": Damage(haze, (0.3, 0.7), None, (), "share of the contrast"),
}


def kinds(channels: int, known: bool | None = None) -> tuple[str, ...]:
    """Names of the kinds that pictures of so many channels can have, all or those that are known or not."""
    return tuple(
        name
        for name, one in DAMAGES.items()
        if (channels == 3 or not one.colour) and (known is None or one.known == known)
    )


def damaged(image: Bytes, kind: str, rng: Rng) -> tuple[Bytes, float]:
    """A picture, uint8 (C, H, W), with a kind of damage, and its strength, drawn for it."""
    one = DAMAGES[kind]
    strength = math.exp(rng.uniform(*np.log(one.strengths)))
    if kind == "caption":  # no letters that cannot be read
        strength = max(strength, LEAST_LETTERS / image.shape[1])
    if one.unit in ("quality", "levels"):
        strength = float(round(strength))
    done = one.apply(image.transpose(1, 2, 0).astype(np.float64), strength, rng)
    return to_bytes(done).transpose(2, 0, 1), strength


def protocol() -> dict[str, Any]:
    """What was drawn, for the results."""
    return {name: {"strengths": one.strengths, "judged": one.judged, "unit": one.unit} for name, one in DAMAGES.items()}
