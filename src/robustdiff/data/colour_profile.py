"""Colours by the profile that a file embeds -> sRGB, in which everything here is computed."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK", "LAB": "Lab "}
"""Colour space of a profile that fits a mode."""
SAME = 2
"""Levels of 256 by which a profile may differ from sRGB and count as such: encoders round in their own ways."""
CONVERTED = "colours converted to sRGB by the embedded profile"
UNUSABLE = "colour profile that does not fit ignored"


def to_srgb(image: Image.Image, profile: bytes | None, remarks: list[str]) -> Image.Image:
    """The same colours in sRGB.

    Args:
        image: Mode L, RGB, CMYK or LAB.
        profile: ICC profile as embedded; None or empty: sRGB is assumed, as everywhere.
        remarks: Takes a remark if colours were converted.

    Returns:
        Mode L for L, else RGB; the image itself if its profile is sRGB.
    """
    mode = image.mode
    if not profile and mode != "LAB":
        return image if mode in ("L", "RGB") else image.convert("RGB")
    try:
        transform = _transform(profile or b"", mode)
    except (ImageCms.PyCMSError, ValueError, OSError):  # metadata cost no picture
        if mode == "LAB":
            raise
        remarks.append(UNUSABLE)
        return image if mode in ("L", "RGB") else image.convert("RGB")
    if transform is None:
        return image
    remarks.append(CONVERTED)
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted.getchannel(0) if mode == "L" else converted


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if it is sRGB already.

    Raises:
        ValueError: If the profile is of another colour space than the mode; PyCMSError if it is none.
    """
    lab = mode == "LAB" and not profile
    opened = ImageCms.createProfile("LAB") if lab else ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
    if opened.xcolor_space != SPACES[mode]:
        raise ValueError(f"a profile of {opened.xcolor_space} in an image of mode {mode}")
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(opened),
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode not in ("L", "RGB"):
        return transform
    probe = _probe(mode)
    result = ImageCms.applyTransform(probe, transform)
    assert result is not None
    difference = np.asarray(result.convert(mode)).astype(int) - np.asarray(probe)
    return None if abs(difference).max() <= SAME else transform


def _probe(mode: str) -> Image.Image:
    """Every grey level, or colours on a grid."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3))
