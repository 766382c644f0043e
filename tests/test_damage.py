"""Blind signs of damage, on images that were damaged on purpose, and their repair against a linear solve."""

import io

import numpy as np
import pytest
import scipy.fft
import scipy.sparse
import scipy.sparse.linalg
import torch
from fields import natural
from helpers import normal, seeded
from PIL import Image
from torch import Tensor

from robustdiff import damage
from robustdiff.corruption import Corruption, corrupt
from robustdiff.images import from_uint8, load_images


def rounded(images: Tensor) -> Tensor:
    """As 8-bit files hold them."""
    return from_uint8(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def dirty(images: Tensor, spec: str) -> Tensor:
    return torch.stack([corrupt(x, [Corruption.parse(spec)], 0, index)[0] for index, x in enumerate(images)])


# -- blur and JPEG -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 13])
def test_the_cosines_are_scipys(size: int) -> None:
    x = normal(size, size + 1)
    ours = damage._dct(size) @ x @ damage._dct(size + 1).T
    np.testing.assert_allclose(ours, scipy.fft.dctn(x.numpy(), norm="ortho"), atol=1e-12)


def test_white_noise_is_as_sharp_at_any_frequency_and_blur_is_less() -> None:
    noise = normal(200, 3, 16, 16)
    assert damage.sharpness(noise).shape == (200,)
    assert damage.sharpness(noise).mean().abs() < 0.02
    pictures = natural(100)
    before = damage.sharpness(pictures)
    for radius, least in (("1", 0.7), ("2", 1.5)):
        after = damage.sharpness(dirty(pictures, f"blur:radius={radius}"))
        assert (before - after).min() > 0
        assert (before - after).median() > least
        before = after + least


def test_sharpness_does_not_depend_on_contrast_and_brightness_and_of_a_constant_is_0() -> None:
    pictures = natural(20)
    torch.testing.assert_close(damage.sharpness(pictures), damage.sharpness(0.5 * pictures + 0.2), atol=1e-4, rtol=0)
    assert damage.sharpness(torch.zeros(2, 3, 8, 8)).tolist() == [0, 0]


def jpeg(images: Tensor, quality: int) -> Tensor:
    files = []
    for image in ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        files.append(torch.from_numpy(np.array(Image.open(file))))
    return from_uint8(torch.stack(files)[:, None])


def test_the_grid_shows_in_strong_jpeg_only() -> None:
    pictures = rounded(natural(100, 32))
    clean, strong, weak = (damage.jpeg_grid(x) for x in (pictures, jpeg(pictures, 15), jpeg(pictures, 95)))
    assert clean.median().abs() < 0.15
    assert weak.median().abs() < 0.3
    assert strong.median() < -0.8
    assert strong.quantile(0.9) < clean.quantile(0.02)
    shifted = damage.jpeg_grid(jpeg(pictures, 15)[:, :, 4:, 4:])
    assert shifted.median() > 0.3  # blocks on the grid where it jumps


def test_the_grid_needs_16_pixels() -> None:
    assert damage.jpeg_grid(torch.zeros(2, 1, 15, 64)).isnan().all()
    assert damage.jpeg_grid(torch.zeros(2, 1, 16, 16)).tolist() == [0, 0]


# -- lost pixels -------------------------------------------------------------------------------------


def test_the_histogram_counts_grey_pixels_in_half_steps() -> None:
    x = torch.full((2, 3, 2, 2), 0.1)
    x[0, :, 0, 0] = 0.0
    x[0, :, 0, 1], x[0, :, 1, 0], x[0, :, 1, 1] = -1.0, 1.0, 1.5  # the last out of range
    x[1, 0] = 0.2  # coloured
    counts = damage.grey_histogram(x)
    assert counts.shape == (511,)
    assert counts.nonzero().flatten().tolist() == [0, 255, 510]
    assert counts.sum() == 3
    every = from_uint8(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16))
    assert damage.grey_histogram(every)[::2].tolist() == [1] * 256


def suspected(images: Tensor) -> list[float]:
    return damage.suspected(damage.grey_histogram(images), images[:, 0].numel())


@pytest.mark.parametrize("value", [0.0, -0.498, 0.3])
@pytest.mark.parametrize("channels", [1, 3])
def test_scattered_pixels_of_a_value_are_found_to_the_pixel(value: float, channels: int) -> None:
    pictures = rounded(0.8 * natural(200)).repeat(1, channels, 1, 1)
    value = round((value + 1) * 255) / 255 - 1
    lost = torch.rand(200, 16, 16, generator=seeded(3)) < 0.2
    lost[100:] = False
    holed = torch.where(lost[:, None], torch.tensor(value).float(), pictures)
    values = suspected(holed)
    assert any(abs(v - value) < 1e-6 for v in values)
    found = damage.holes(holed, values)
    assert (found & ~lost)[:100].double().mean() < 0.005  # pixels that had the value before
    assert found[:100][lost[:100]].all()
    assert found[100:].flatten(1).any(1).double().mean() < 0.1  # by chance 1 in 50 of their pixels has it


@pytest.mark.parametrize("images", [rounded(0.8 * natural(200)), rounded(natural(200))], ids=["grey", "saturated"])
def test_whole_pictures_have_no_holes(images: Tensor) -> None:
    assert not damage.holes(images, suspected(images)).flatten(1).any(1).double().mean() > 0.01


def test_flat_areas_and_drawings_have_no_holes() -> None:
    pictures = rounded(0.8 * natural(200))
    pictures[:, :, 4:12, 4:12] = 0.0
    values = suspected(pictures)
    assert any(abs(value) < 1e-6 for value in values)
    assert not damage.holes(pictures, values).any()
    digits = load_images("digits").x0(slice(0, 600))
    assert not damage.holes(digits, suspected(digits)).any()


def test_black_and_white_pixels_that_stand_alone_are_impulses() -> None:
    pictures = rounded(0.6 * natural(200))
    noisy = dirty(pictures, "impulse:amount=0.05")
    changed = (noisy != pictures)[:, 0]
    found = damage.holes(noisy, suspected(noisy))
    assert found[changed].double().mean() > 0.8
    assert found[~changed].double().mean() < 0.005


def test_nothing_suspected_is_nothing_found() -> None:
    assert damage.suspected(torch.zeros(511, dtype=torch.long), 0) == []
    assert not damage.holes(torch.zeros(2, 1, 8, 8), []).any()


# -- repair ------------------------------------------------------------------------------------------


def harmonic(image: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Lost pixels the mean of their neighbours, edges mirrored: by one sparse solve."""
    height, width = image.shape
    place = np.full(image.shape, -1)
    place[lost] = np.arange(lost.sum())
    matrix, right = scipy.sparse.lil_matrix((lost.sum(), lost.sum())), np.zeros(lost.sum())
    for y, x in zip(*lost.nonzero(), strict=True):
        row = place[y, x]
        matrix[row, row] += 4
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            b, a = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
            if lost[b, a]:
                matrix[row, place[b, a]] -= 1
            else:
                right[row] += image[b, a]
    filled = image.copy()
    filled[lost] = scipy.sparse.linalg.spsolve(matrix.tocsr(), right)
    return filled


def test_lost_pixels_become_the_discrete_harmonic_function() -> None:
    images, lost = normal(4, 2, 9, 7), torch.rand(4, 9, 7, generator=seeded(1)) < 0.35
    lost[0, 0, 0] = lost[0, -1, -1] = True  # corners
    lost[3] = False
    filled = damage.fill(images, lost, rounds=2000)
    for image in range(4):
        for channel in range(2):
            wanted = harmonic(images[image, channel].numpy(), lost[image].numpy())
            np.testing.assert_allclose(filled[image, channel], wanted, atol=1e-9)
    usual = damage.fill(images, lost)
    assert (usual - filled).abs().max() < 0.05
    known = ~lost[:, None].expand_as(images)
    assert torch.equal(usual[known], images[known])
    assert torch.equal(usual[3], images[3])


def test_repair_changes_no_input_and_nothing_where_nothing_is_lost() -> None:
    images, lost = normal(2, 1, 8, 8).float(), torch.zeros(2, 8, 8, dtype=torch.bool)
    assert torch.equal(damage.fill(images, lost), images)
    before = images.clone()
    lost[0, 3, 3] = True
    assert damage.fill(images, lost).dtype == torch.float32
    assert torch.equal(images, before)
    assert damage.fill(images, torch.ones_like(lost)).isfinite().all()
