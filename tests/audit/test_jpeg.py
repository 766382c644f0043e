"""JPEG, and the grid that it leaves."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fields import natural
from helpers import seeded
from robustdiff.audit.detectors.jpeg import Jpeg, jpeg_grid
from robustdiff.utils.images import from_uint8


def rounded(images: Tensor) -> Tensor:
    """As 8-bit files hold them."""
    return from_uint8(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def jpeg(images: Tensor, quality: int) -> Tensor:
    files = []
    for image in ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        files.append(torch.from_numpy(np.array(Image.open(file))))
    return from_uint8(torch.stack(files)[:, None])


def test_the_grid_shows_in_strong_jpeg_only() -> None:
    pictures = rounded(natural(100, 32))
    clean, strong, weak = (jpeg_grid(x) for x in (pictures, jpeg(pictures, 15), jpeg(pictures, 95)))
    assert clean.median().abs() < 0.15
    assert weak.median().abs() < 0.3
    assert strong.median() < -0.8
    assert strong.quantile(0.9) < clean.quantile(0.02)
    shifted = jpeg_grid(jpeg(pictures, 15)[:, :, 4:, 4:])
    assert shifted.median() > 0.3  # blocks on the grid where it jumps


def test_the_grid_needs_16_pixels() -> None:
    assert jpeg_grid(torch.zeros(2, 1, 15, 64)).isnan().all()
    assert jpeg_grid(torch.zeros(2, 1, 16, 16)).tolist() == [0, 0]


def test_simulated_jpeg_is_pillows_and_shows_the_more_the_stronger() -> None:
    pictures = rounded(natural(30, 32))
    weak, strong = (
        torch.stack([Jpeg().simulate(x, quality, seeded()) for x in pictures]) for quality in Jpeg.strengths
    )
    torch.testing.assert_close(weak, jpeg(pictures, round(Jpeg.strengths[0])))
    assert jpeg_grid(strong).median() < jpeg_grid(weak).median() < jpeg_grid(pictures).median()
