"""Every kind of damage that can be simulated: what all simulators must hold, and some of each one's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from helpers import seeded
from robustdiff.audit.detector import Detector, registered_detectors
from robustdiff.audit.detectors import camera

KINDS = {kind.name: kind for kind in registered_detectors() if kind.strengths}
EACH = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def picture(channels: int = 3, height: int = 40, width: int = 32) -> Tensor:
    """A smooth picture with fine texture, in [-0.8, 0.8]."""
    coarse = torch.randn(1, channels, 5, 4, generator=seeded(0))
    smooth = interpolate(coarse, (height, width), mode="bicubic")[0]
    fine = 0.15 * torch.randn(channels, height, width, generator=seeded(1))
    return (0.4 * smooth + fine).clamp(-0.8, 0.8)


def changed(kind: Detector, strength: float, image: Tensor) -> float:
    copies = [kind.simulate(image, strength, seeded(n)) for n in range(12)]
    return float((torch.stack(copies) - image).square().mean().sqrt())


@EACH
@pytest.mark.parametrize("channels", [1, 3])
def test_a_copy_is_a_picture(kind: Detector, channels: int) -> None:
    """Of the same shape, finite, drawn by the generator alone; the source stays as it was."""
    image = picture(channels)
    before = image.clone()
    for strength in kind.strengths:
        copy = kind.simulate(image, strength, seeded(3))
        assert copy.shape == image.shape
        assert copy.is_floating_point()
        assert bool(copy.isfinite().all())
        assert torch.equal(copy, kind.simulate(image, strength, seeded(3)))
        assert not torch.equal(copy, image)
    assert torch.equal(image, before)


@EACH
def test_the_second_strength_is_the_stronger(kind: Detector) -> None:
    """The first of the strengths changes less than the last; of captions too, whose letters are larger."""
    weak, strong = kind.strengths
    assert changed(kind, weak, picture()) < changed(kind, strong, picture())


@EACH
def test_what_others_become_is_a_sentence(kind: Detector) -> None:
    """With the strength in it, where it says something."""
    assert "{" not in kind.become.format(kind.strengths[0])
    assert len(kind.become) > 5


def sideways(noise: Tensor) -> float:
    """Correlation of neighbours."""
    return float((noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean())


@pytest.mark.parametrize(("name", "level"), [("noise", 0.2), ("poisson", 0.2)])
def test_white_noise_has_its_standard_deviation(name: str, level: float) -> None:
    """At mid grey, and neighbours know nothing of one another."""
    noise = KINDS[name].simulate(torch.zeros(3, 128, 128), level, seeded(0))
    assert float(noise.std()) == pytest.approx(level, rel=0.03)
    assert sideways(noise) == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("channels", [1, 3])
def test_camera_noise_has_its_standard_deviation_and_neighbours_share_it(channels: int) -> None:
    """At mid grey, but for what JPEG takes, of colours above all; by much or by little, with colours or without."""
    noises = [KINDS["camera"].simulate(torch.zeros(channels, 96, 96), 0.2, seeded(seed)) for seed in range(40)]
    levels, shared = [float(noise.std()) for noise in noises], [sideways(noise) for noise in noises]
    assert all(0.1 < level < 0.21 for level in levels)
    assert torch.tensor(levels).median() == pytest.approx(0.2, rel=0.06)
    assert min(shared) > 0.05
    assert max(shared) - min(shared) > 0.3


@pytest.mark.parametrize("channels", [1, 3])
def test_camera_noise_before_the_file_has_exactly_its_standard_deviation(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(camera, "compressed", lambda image, *_: image)
    for seed in range(40):
        noise = KINDS["camera"].simulate(torch.zeros(channels, 96, 96), 0.2, seeded(seed))
        assert float(noise.std()) == pytest.approx(0.2, rel=1e-4)


def test_out_of_focus_is_as_wide_as_a_gaussian() -> None:
    """The deviation of a point along one axis is the strength, whichever way it was blurred."""
    point = torch.full((1, 41, 41), -1.0)
    point[0, 20, 20] = 1
    away = torch.arange(41.0) - 20
    shapes = set()
    for seed in range(30):
        spread = (KINDS["blur"].simulate(point, 2.0, seeded(seed))[0] + 1) / 2
        assert float((spread.sum(0) * away.square()).sum()) ** 0.5 == pytest.approx(2.0, rel=0.12)
        shapes.add(round(float(spread.max()), 3))
    assert len(shapes) == 2


def test_photon_noise_grows_with_brightness() -> None:
    """As its root: four times as bright, twice as noisy."""
    dark, light = (torch.full((1, 200, 200), value) for value in (-0.75, 0.0))
    spread = [float(KINDS["poisson"].simulate(one, 0.1, seeded(0)).std()) for one in (dark, light)]
    assert spread[1] / spread[0] == pytest.approx(2, rel=0.05)


def test_impulses_are_as_many_as_said() -> None:
    """Half black, half white, of all values; in all channels at once, or in each of its own."""
    together = []
    for seed in range(20):
        copy = KINDS["impulse"].simulate(torch.zeros(3, 200, 200), 0.1, seeded(seed))
        for value in (-1, 1):
            assert float((copy == value).float().mean()) == pytest.approx(0.05, abs=0.005)
        together.append(round(float((copy == -1).all(0).float().mean()), 2))
    assert set(together) == {0.0, 0.05}


def test_a_rectangle_covers_its_share() -> None:
    """On the average of many, one colour each."""
    covered = []
    for n in range(60):
        image = picture()
        copy = KINDS["blocks"].simulate(image, 0.15, seeded(n))
        other = (copy != image).any(0)
        assert len(copy[:, other].T.unique(dim=0)) == 1
        covered.append(float(other.float().mean()))
    assert sum(covered) / len(covered) == pytest.approx(0.15, abs=0.03)


def test_banding_leaves_so_many_levels() -> None:
    """Evenly spaced, from black to white."""
    copy = KINDS["banding"].simulate(torch.linspace(-1, 1, 900).reshape(1, 30, 30), 5.0, seeded(0))
    torch.testing.assert_close(copy.unique(), torch.linspace(-1, 1, 5))


def test_enlargement_leaves_no_detail() -> None:
    """White noise enlarged four times keeps little of what is between pixels."""
    noise = 0.3 * torch.randn(1, 64, 64, generator=seeded(0))
    copies = torch.stack([KINDS["enlarged"].simulate(noise, 4.0, seeded(n)) for n in range(12)])
    detail = copies - interpolate(avg_pool2d(copies, 4), scale_factor=4, mode="nearest")
    assert float(detail.square().mean()) < 0.2 * float(noise.square().mean())


def test_motion_smears_along_one_line() -> None:
    """A bright dot becomes a stroke about as long as said, thin across, of the same total light."""
    dot = torch.full((1, 61, 61), -1.0)
    dot[0, 30, 30] = 1.0
    lengths = []
    for n in range(20):
        light = (KINDS["motion"].simulate(dot, 9.0, seeded(n))[0] + 1).double()
        assert float(light.sum()) == pytest.approx(2.0, rel=1e-3)
        at = torch.stack(torch.meshgrid(*[torch.arange(61.0).double() - 30] * 2, indexing="ij")).flatten(1)
        mean = (at * light.flatten()).sum(1) / light.sum()
        away = at - mean[:, None]
        narrow, wide = (
            torch.linalg.eigvalsh((away * light.flatten()) @ away.T / light.sum()).clamp(min=0).sqrt().tolist()
        )
        assert narrow < 0.4 * wide
        lengths.append(wide * math.sqrt(12))
    assert sum(lengths) / len(lengths) == pytest.approx(9.0, rel=0.15)


def test_captions_are_of_one_colour_and_stand_out() -> None:
    """Thin: they cover a few hundredths, and some pixels have their colour to the letter."""
    for n in range(20):
        image = torch.full((3, 64, 64), 0.1)
        copy = KINDS["caption"].simulate(image, 0.15, seeded(n))
        other = (copy - copy[:, :1, :1]).abs().amax(0) > 0.01
        assert 0.01 < float(other.float().mean()) < 0.3
        farthest = (copy - copy[:, :1, :1]).abs().amax(0).amax()
        assert float(farthest) > 0.2


def test_jpeg_draws_its_subsampling() -> None:
    """Three ways to store colour; grey pictures have none."""
    colour = {float(KINDS["jpeg"].simulate(picture(), 30, seeded(n)).sum()) for n in range(12)}
    grey = {float(KINDS["jpeg"].simulate(picture(1), 30, seeded(n)).sum()) for n in range(12)}
    assert (len(colour), len(grey)) == (3, 1)
