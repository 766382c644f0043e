"""Clean pictures of many kinds: the same again each time, no two alike, and each what its name says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.picture_sets import KINDS, pictures
from experiments.picture_sets.__main__ import main

PRINTED = ("halftone", "ordered_dither", "error_diffusion")


def colours(picture: np.ndarray) -> int:
    """How many different colours a picture (C, H, W) has."""
    return len(np.unique(picture.reshape(len(picture), -1), axis=1).T)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same_again_and_no_two_pictures_are_alike(kind: str, channels: int) -> None:
    made = pictures(kind, 12, 32, channels)
    assert made.shape == (12, channels, 32, 32)
    assert made.dtype == np.uint8
    assert np.array_equal(pictures(kind, 3, 32, channels), made[:3])  # whatever the count
    assert len(np.unique(made.reshape(12, -1), axis=0)) == 12
    assert made.reshape(12, -1).std(1).min() > 1
    assert not np.array_equal(pictures(kind, 1, 32, channels, seed=1), made[:1])


@pytest.mark.parametrize("size", [33, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes(kind: str, size: int) -> None:
    assert pictures(kind, 2, size).shape == (2, 3, size, size)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["line_art", "modules"])
def test_two_valued(kind: str, channels: int) -> None:
    assert {colours(picture) for picture in pictures(kind, 20, 32, channels)} == {2}


@pytest.mark.parametrize("kind", PRINTED)
def test_printed_channels_have_few_values(kind: str) -> None:
    made = pictures(kind, 20, 32)
    assert max(len(np.unique(channel)) for picture in made for channel in picture) <= 4
    assert max(len(np.unique(picture)) for picture in pictures(kind, 20, 32, 1)) <= 4


def test_dots_of_pixel_art_2x_are_two_pixels_wide() -> None:
    made = pictures("pixel_art_2x", 20, 64)
    assert np.array_equal(made[..., ::2, ::2].repeat(2, 2).repeat(2, 3), made)
    assert max(colours(picture) for picture in made) < 64


def test_what_there_is_not_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"no pictures of kind 'photos'; there are line_drawings, .*, fog") as said:
        pictures("photos", 1, 32)
    assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="channels=2: pictures have 1 or 3"):
        pictures("fog", 1, 32, channels=2)


def test_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["picture_sets", "--output", str(tmp_path), "--size", "32", "--kinds", "modules", "text", "--channels", "1"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modules.png", "text.png"]
    with Image.open(tmp_path / "text.png") as image:
        assert (image.mode, image.size) == ("L", (8 * 34, 8 * 34))
