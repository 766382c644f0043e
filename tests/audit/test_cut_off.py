"""Pictures whose rest is missing: found where the format does not tell, and nothing else is taken for them."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from robustdiff.audit import audit
from robustdiff.audit.detectors.cut_off import flat_part
from robustdiff.audit.finding import Action
from robustdiff.data.dataset import load_images
from robustdiff.utils.images import from_uint8


def photos(count, side=64, seed=0):
    """uint8, (N, 3, side, side), of all scales as photographs are."""
    noise = np.random.default_rng(seed).normal(size=(count, 3, side, side))
    smooth = sum(gaussian_filter(noise, (0, 0, width, width)) * width for width in (0.7, 2, 8))
    return np.clip(smooth * 40 + 128, 1, 254).astype(np.uint8)


@pytest.mark.parametrize("form", ["bmp", "tif", "ppm"])
@pytest.mark.parametrize("resolution", [None, 48])
def test_files_whose_end_is_zeros_are_found(tmp_path, form, resolution):
    for number, image in enumerate(photos(100)):
        path = tmp_path / f"{number:03d}.{form}"
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
        if number < 10:
            data = path.read_bytes()
            size = int(len(data) * (0.3 + 0.06 * number))
            keep = len(data) - 300 if form == "tif" and data[4:8] > b"\x08\0\0\0" else len(data)
            path.write_bytes(data[:size] + bytes(keep - size) + data[keep:])
    images = load_images(tmp_path, resolution=resolution)
    found = audit(images)
    assert found.groups["cut"].nonzero().flatten().tolist() == list(range(10))
    assert (found.weight[:10] == 0).all()
    assert (found.weight[10:] > 0).all()
    assert [(one.count, one.action) for one in found.findings if one.kind == "cut"] == [(10, Action.LEFT_OUT)]


def test_the_grey_of_jpeg_and_a_half_filled_row_of_blocks():
    images = photos(3)
    images[0, :, 32:] = 128
    images[1, :, 48:] = 128
    images[1, :, 32:48, 16:] = 128
    share = flat_part(from_uint8(torch.from_numpy(images)))
    assert share.tolist() == [0.5, 0.25, 0]


def shaped(draw):
    images = photos(8)
    for number, image in enumerate(images):
        draw(image, number)
    return images


def fade(image, number):
    image[:] = image * np.clip((40 + number - np.arange(64)) / 30, 0, 1)[:, None]


def disc(image, number):
    y, x = np.indices((64, 64))
    image[:, (y - 30) ** 2 + (x - 32) ** 2 > (20 + number) ** 2] = 0


def bars(image, number):
    image[:, : 8 + number] = image[:, -8 - number :] = 0


def white(image, _):
    image[:, 40:] = 255


def caption(image, _):
    image[:, 48:] = 0
    image[:, 52:60, 8:50] = 255


def untouched(image, _):
    pass


@pytest.mark.parametrize("draw", [fade, disc, bars, white, caption, untouched])
def test_dark_backgrounds_bars_and_captions_are_pictures(draw):
    assert (flat_part(from_uint8(torch.from_numpy(shaped(draw)))) == 0).all()


def test_where_many_look_so_it_is_how_they_are_meant():
    images = photos(100)
    images[:60, :, 48:] = 0
    assert "cut" not in audit(images).groups


def test_the_digits_have_none():
    images = load_images("digits")
    assert "cut" not in audit(images).groups
    assert (flat_part(images.x0(range(len(images)))) == 0).all()
