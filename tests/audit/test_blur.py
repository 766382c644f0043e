"""Blur, and how sharp pictures are."""

import math

import pytest
import torch
from torch import Tensor

from fields import natural
from helpers import normal, seeded
from robustdiff.audit.cosines import cosine_energy
from robustdiff.audit.detectors.blur import Blur, sharpness
from robustdiff.data.corruption import Corruption, corrupt


def dirty(images: Tensor, spec: str) -> Tensor:
    return torch.stack([corrupt(x, [Corruption.parse(spec)], 0, index)[0] for index, x in enumerate(images)])


@pytest.mark.parametrize("size", [4, 8, 13])
def test_the_energies_are_of_cosines(size: int) -> None:
    def cosines(size: int) -> Tensor:
        k, x = torch.arange(size).double()[:, None], torch.arange(size).double()
        matrix = (2 / size) ** 0.5 * torch.cos(math.pi * (2 * x + 1) * k / (2 * size))
        matrix[0] /= 2**0.5
        return matrix

    x = normal(2, size, size + 1)
    wanted = (cosines(size) @ x @ cosines(size + 1).T).square()
    torch.testing.assert_close(cosine_energy(x), wanted, atol=1e-12, rtol=0)


def test_white_noise_is_as_sharp_at_any_frequency_and_blur_is_less() -> None:
    noise = normal(200, 3, 16, 16)
    assert sharpness(noise).shape == (200,)
    assert sharpness(noise).mean().abs() < 0.02
    pictures = natural(100)
    before = sharpness(pictures)
    for radius, least in (("1", 0.7), ("2", 1.5)):
        after = sharpness(dirty(pictures, f"blur:radius={radius}"))
        assert (before - after).min() > 0
        assert (before - after).median() > least
        before = after + least


def test_sharpness_does_not_depend_on_contrast_and_brightness_and_of_a_constant_is_0() -> None:
    pictures = natural(20)
    torch.testing.assert_close(sharpness(pictures), sharpness(0.5 * pictures + 0.2), atol=1e-4, rtol=0)
    assert sharpness(torch.zeros(2, 3, 8, 8)).tolist() == [0, 0]


def test_simulated_blur_is_that_of_corrupt_and_shows_the_more_the_stronger() -> None:
    pictures = natural(30)
    weak, strong = (torch.stack([Blur().simulate(x, radius, seeded()) for x in pictures]) for radius in (0.8, 1.5))
    torch.testing.assert_close(weak, dirty(pictures, "blur:radius=0.8"))
    assert (sharpness(strong) < sharpness(weak)).all()
    assert (sharpness(weak) < sharpness(pictures)).all()
