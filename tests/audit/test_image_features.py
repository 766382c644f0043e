"""Statistics of single images: against other libraries, and by what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from helpers import seeded
from robustdiff.audit import image_features as features
from robustdiff.audit.image_features import image_features


def pictures(count: int = 4, channels: int = 3, height: int = 48, width: int = 40) -> Tensor:
    """Smooth pictures with edges, 8 bit."""
    noise = torch.randn(count, channels, height, width, generator=seeded(0)).numpy()
    soft = ndimage.gaussian_filter(noise, (0, 0, 3, 3))
    edges = ndimage.gaussian_filter(noise[:, :1], (0, 0, 5, 5)) > 0
    grey = 128 + 300 * soft + 60 * edges
    return torch.from_numpy(np.clip(grey, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (3, 17, 40), (1, 64, 33), (3, 96, 96)])
def test_every_shape_has_finite_statistics(shape: tuple[int, int, int]) -> None:
    """One row an image, as many columns for a shape, nothing infinite: of flat, black, white and noisy ones."""
    noisy = torch.randint(0, 256, (2, *shape), generator=seeded(1), dtype=torch.uint8)
    flat = torch.stack([torch.full(shape, value, dtype=torch.uint8) for value in (0, 128, 255)])
    found = image_features(torch.cat([noisy, flat]))
    assert found.shape[0] == 5
    assert found.dtype == torch.float32
    assert bool(found.isfinite().all())
    assert found.shape[1] == image_features(pictures(1, *shape)).shape[1]


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    """The same alone and among others."""
    images = pictures(6)
    together = image_features(images)
    alone = torch.cat([image_features(images[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("reach", [1, 3, 6])
def test_highest_is_the_maximum_filter(reach: int) -> None:
    """Of scipy, with the border repeated."""
    x = torch.randn(2, 1, 20, 17, generator=seeded(2))
    expected = ndimage.maximum_filter(x.numpy(), (1, 1, 2 * reach + 1, 2 * reach + 1), mode="nearest")
    assert np.array_equal(features._highest(x, reach).numpy(), expected)


def test_median_of_nine_is_the_median_filter() -> None:
    """Of scipy, with the border repeated."""
    x = torch.randn(2, 1, 20, 17, generator=seeded(3))
    expected = ndimage.median_filter(x.numpy(), (1, 1, 3, 3), mode="nearest")
    assert np.array_equal(features._median_of_nine(x).numpy(), expected)


def test_counted_quantiles_are_quantiles() -> None:
    """To the width of a bin."""
    x = torch.randn(3, 5000, generator=seeded(4)) * 20
    shares = (0.25, 0.5, 0.95)
    expected = torch.quantile(x.abs(), torch.tensor(shares), dim=1).T
    found = features._quantiles(x, shares).exp() - 0.05
    assert float((found - expected).abs().max()) < 2 * float(expected.max()) ** 0.5 / features.STEPS_PER_ROOT


def test_white_noise_has_no_correlation() -> None:
    """In the spectrum's own terms: the finest detail of white noise, diagonal differences, agrees by -1/2 sideways."""
    images = torch.randint(0, 256, (8, 1, 64, 64), generator=seeded(5), dtype=torch.uint8)
    parts = list(features._spectrum(images.float()))
    sideways = parts[-3].mean(0)
    torch.testing.assert_close(sideways[:3], torch.tensor([-0.5, -0.5, 0.25]), atol=0.05, rtol=0)


def test_a_rectangle_fills_its_box() -> None:
    """The commonest colour of a covered picture, its share, its box, and how full that is."""
    image = torch.arange(32 * 32).remainder(250).to(torch.uint8).reshape(1, 1, 32, 32).clone()
    image[..., 4:12, 6:22] = 251
    x = image.float()
    share, full, height, width, *_ = features._commonest_colour(x, torch.ones(1, 32, 32, dtype=torch.bool))
    assert float(share) == pytest.approx(np.log(128 / 1024 + 0.001), abs=1e-4)
    assert (float(full), float(height), float(width)) == (1.0, 8 / 32, 16 / 32)


def test_blur_and_noise_move_what_they_should() -> None:
    """The finest band of the spectrum falls by blur, rises by noise."""
    images = pictures(4)
    blurred = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, 1.5, 1.5)))
    noisy = (images + 20 * torch.randn(images.shape, generator=seeded(6))).clamp(0, 255).to(torch.uint8)

    def finest(some: Tensor) -> Tensor:
        return next(iter(features._spectrum(some.float().mean(1, keepdim=True))))[:, -1]

    assert bool((finest(blurred) < finest(images)).all())
    assert bool((finest(images) < finest(noisy)).all())
