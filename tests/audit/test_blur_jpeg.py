"""Blind signs of damage, on images that were damaged on purpose."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fields import natural
from helpers import normal
from robustdiff.audit.detectors import blur_jpeg
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import from_uint8


def rounded(images: Tensor) -> Tensor:
    """As 8-bit files hold them."""
    return from_uint8(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def dirty(images: Tensor, spec: str) -> Tensor:
    return torch.stack([corrupt(x, [Corruption.parse(spec)], 0, index)[0] for index, x in enumerate(images)])


# -- blur and JPEG -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 13])
def test_the_energies_are_of_cosines(size: int) -> None:
    def cosines(size: int) -> Tensor:
        k, x = torch.arange(size).double()[:, None], torch.arange(size).double()
        matrix = (2 / size) ** 0.5 * torch.cos(math.pi * (2 * x + 1) * k / (2 * size))
        matrix[0] /= 2**0.5
        return matrix

    x = normal(2, size, size + 1)
    wanted = (cosines(size) @ x @ cosines(size + 1).T).square()
    torch.testing.assert_close(blur_jpeg._energy(x), wanted, atol=1e-12, rtol=0)


def test_white_noise_is_as_sharp_at_any_frequency_and_blur_is_less() -> None:
    noise = normal(200, 3, 16, 16)
    assert blur_jpeg.sharpness(noise).shape == (200,)
    assert blur_jpeg.sharpness(noise).mean().abs() < 0.02
    pictures = natural(100)
    before = blur_jpeg.sharpness(pictures)
    for radius, least in (("1", 0.7), ("2", 1.5)):
        after = blur_jpeg.sharpness(dirty(pictures, f"blur:radius={radius}"))
        assert (before - after).min() > 0
        assert (before - after).median() > least
        before = after + least


def test_sharpness_does_not_depend_on_contrast_and_brightness_and_of_a_constant_is_0() -> None:
    pictures = natural(20)
    torch.testing.assert_close(
        blur_jpeg.sharpness(pictures), blur_jpeg.sharpness(0.5 * pictures + 0.2), atol=1e-4, rtol=0
    )
    assert blur_jpeg.sharpness(torch.zeros(2, 3, 8, 8)).tolist() == [0, 0]


def jpeg(images: Tensor, quality: int) -> Tensor:
    files = []
    for image in ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        files.append(torch.from_numpy(np.array(Image.open(file))))
    return from_uint8(torch.stack(files)[:, None])


def test_the_grid_shows_in_strong_jpeg_only() -> None:
    pictures = rounded(natural(100, 32))
    clean, strong, weak = (blur_jpeg.jpeg_grid(x) for x in (pictures, jpeg(pictures, 15), jpeg(pictures, 95)))
    assert clean.median().abs() < 0.15
    assert weak.median().abs() < 0.3
    assert strong.median() < -0.8
    assert strong.quantile(0.9) < clean.quantile(0.02)
    shifted = blur_jpeg.jpeg_grid(jpeg(pictures, 15)[:, :, 4:, 4:])
    assert shifted.median() > 0.3  # blocks on the grid where it jumps


def test_the_grid_needs_16_pixels() -> None:
    assert blur_jpeg.jpeg_grid(torch.zeros(2, 1, 15, 64)).isnan().all()
    assert blur_jpeg.jpeg_grid(torch.zeros(2, 1, 16, 16)).tolist() == [0, 0]
