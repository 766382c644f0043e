"""Clean pictures of many unusual kinds, made with random numbers: none of them may be called damaged.

    python -m experiments.picture_sets --output FOLDER --size 64    # a sheet of 8 x 8 pictures for each kind

Clean by construction: no sensor noise, no JPEG, no blur beyond what anti-aliasing or a good lens gives, 8 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import numpy as np

from experiments.picture_sets import drawn, flat, printed, rendered, screens, textures
from experiments.picture_sets.canvas import Bytes, Rng

Artist = Callable[[Rng, int], Bytes]
Screen = Callable[[Rng, Bytes], Bytes]

_ARTISTS: dict[str, tuple[Artist, Screen | None]] = {
    "line_drawings": (drawn.line_drawings, None),
    "line_art": (drawn.line_art, None),
    "pixel_art": (screens.pixel_art, None),
    "pixel_art_2x": (screens.pixel_art_2x, None),
    "modules": (screens.modules, None),
    "glyphs": (drawn.glyphs, None),
    "screenshots": (screens.screenshots, None),
    "text": (screens.text, None),
    "maps": (flat.maps, None),
    "xray": (rendered.xray, None),
    "satellite": (textures.satellite, None),
    "night": (rendered.night, None),
    "halftone": (printed.smooth_scenes, printed.halftone),
    "ordered_dither": (printed.smooth_scenes, printed.ordered_dither),
    "error_diffusion": (printed.smooth_scenes, printed.error_diffusion),
    "dead_leaves": (textures.dead_leaves, None),
    "pink_noise": (textures.pink_noise, None),
    "logos": (flat.logos, None),
    "spectrograms": (textures.spectrograms, None),
    "scenes": (rendered.scenes, None),
    "cartoons": (flat.cartoons, None),
    "fog": (rendered.fog, None),
}
"""Who draws each kind in colour, and what screens it after it is grey or not."""

KINDS: tuple[str, ...] = tuple(_ARTISTS)
"""Names of the kinds."""


def pictures(kind: str, count: int, size: int, channels: int = 3, seed: int = 0) -> Bytes:
    """Clean pictures of a kind; the i-th depends on the other arguments and on i, not on ``count``.

    Args:
        kind: one of KINDS.
        count: how many.
        size: height and width in pixels, 32 to 128 or thereabouts.
        channels: 3, or 1 for grey.
        seed: another seed, other pictures.

    Returns:
        uint8, (count, channels, size, size).

    Raises:
        ValueError: if there is no such kind, or channels are neither 1 nor 3.
    """
    if kind not in _ARTISTS:
        raise ValueError(f"no pictures of kind {kind!r}; there are {', '.join(KINDS)}")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: pictures have 1 or 3")
    artist, screen = _ARTISTS[kind]
    made = np.empty((count, channels, size, size), np.uint8)
    for index in range(count):
        rng = np.random.default_rng([crc32(kind.encode()), size, channels, seed, index])
        picture = artist(rng, size)
        if channels == 1:
            picture = np.round(picture @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
        made[index] = (screen(rng, picture) if screen else picture).transpose(2, 0, 1)
    return made
