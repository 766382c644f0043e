"""Damage of mixtures: as strong as it says, in 8 bit, the same again, and made without the audit."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import fft, ndimage

from experiments.audit_mixtures import damages
from experiments.audit_mixtures.damages import DAMAGES, HALF, damaged, kinds
from experiments.picture_sets import pictures

SIDE = 96


def apply(kind: str, picture: np.ndarray, strength: float, seed: int = 0) -> np.ndarray:
    return DAMAGES[kind].apply(picture, strength, np.random.default_rng(seed))


def flat(level: float = HALF, channels: int = 3) -> np.ndarray:
    return np.full((SIDE, SIDE, channels), level)


def point() -> np.ndarray:
    """One bright pixel on black."""
    picture = flat(0.0)
    picture[SIDE // 2, SIDE // 2] = 255
    return picture


def textured() -> np.ndarray:
    """Of every colour, no two neighbours alike, never black or white."""
    return np.random.default_rng(5).uniform(40, 200, (SIDE, SIDE, 3))


def std(kind: str, strength: float, level: float = HALF) -> float:
    return float(apply(kind, flat(level), strength).std() / HALF)


def changed(kind: str, strength: float) -> float:
    """Share of pixels that are not what they were, of many pictures."""
    before = textured()
    return float(np.mean([(apply(kind, before, strength, seed) != before).any(2).mean() for seed in range(20)]))


def widths(picture: np.ndarray) -> tuple[float, float]:
    """Standard deviations of light along its shorter and its longer direction, in pixels."""
    weight = picture[..., 0] / picture[..., 0].sum()
    places = np.indices(weight.shape).reshape(2, -1)
    return tuple(np.sqrt(np.linalg.eigvalsh(np.cov(places, aweights=weight.ravel(), ddof=0))))


def length(kind: str, strength: float) -> float:
    """Of a line with the same deviation, over directions."""
    spread = [widths(apply(kind, point(), strength, seed)) for seed in range(10)]
    assert max(across for across, _ in spread) < 0.6
    return float(np.mean([along for _, along in spread]) * 12**0.5)


def factor(kind: str, strength: float) -> float:
    """Pixels of a side for each that it has of its own, where every one was repeated."""
    found = []
    for seed in range(40):
        picture = apply(kind, textured(), strength, seed)
        own = 1 + (np.diff(picture, axis=1) != 0).any((0, 2)).sum()
        if own < 0.9 * SIDE:
            found.append(SIDE / own)
    assert len(found) > 5
    return float(np.mean(found))


def quality(kind: str, strength: float) -> float:
    """The quality whose quantisation every coefficient that is not 0 is a multiple of."""
    picture = apply(kind, textured()[..., :1], strength)[..., 0] - 128
    blocks = picture.reshape(SIDE // 8, 8, SIDE // 8, 8).transpose(0, 2, 1, 3)
    found = fft.dctn(blocks, axes=(2, 3), norm="ortho").reshape(-1, 8, 8)

    def misfit(asked: int) -> float:
        file = BytesIO()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "JPEG", quality=asked)
        steps = np.array(Image.open(file).quantization[0]).reshape(8, 8)
        return float(np.abs(found / steps - np.round(found / steps))[np.abs(found) > 4].mean())

    return min(range(5, 65, 5), key=misfit)


def letters(kind: str, strength: float) -> float:
    """Height of what was written, as a share of the picture; capitals are 7 tenths of it."""
    heights = []
    for seed in range(30):
        rows = np.flatnonzero((apply(kind, flat(), strength, seed) != np.round(HALF)).any((1, 2)))
        heights.append(np.ptp(rows) / SIDE)
    return float(np.median(heights)) / 0.85


def period(kind: str, strength: float) -> float:
    spectrum = np.abs(np.fft.fft2(apply(kind, flat(), strength)[..., 0] - HALF))
    row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
    f = np.fft.fftfreq(SIDE)
    return float(1 / np.hypot(f[row], f[column]))


def apart(kind: str, strength: float) -> float:
    """Distance of the red point from the blue one."""
    red, blue = (ndimage.center_of_mass(apply(kind, point(), strength)[..., channel]) for channel in (0, 2))
    return float(np.hypot(*np.subtract(red, blue)))


def light(kind: str, strength: float) -> float:
    """Of what is not where it was."""
    picture = apply(kind, point(), strength)[..., 0]
    return float(1 - picture[SIDE // 2, SIDE // 2] / picture.sum())


MEANING: dict[str, tuple[Callable[[str, float], float], float]] = {
    "noise": (std, 0.03),
    "poisson": (std, 0.03),
    "camera": (std, 0.1),
    "impulse": (changed, 0.05),
    "holes": (changed, 0.05),
    "blur": (lambda kind, s: widths(apply(kind, point(), s))[1], 0.02),
    "motion": (length, 0.1),
    "enlarged": (factor, 0.06),
    "jpeg": (quality, 0.01),
    "banding": (lambda kind, s: len(np.unique(apply(kind, textured() * 255 / 160 - 64, s).clip(0, 255))), 0.01),
    "blocks": (changed, 0.1),
    "caption": (letters, 0.25),
    "grain": (std, 0.02),
    "halftone": (period, 0.05),
    "rain": (lambda kind, s: float(apply(kind, flat(0.0), s).mean()) / 235 / 0.75, 0.15),
    "moire": (lambda kind, s: 2 * float(apply(kind, flat(channels=1), s).std()) / HALF, 0.05),
    "chroma": (std, 0.02),
    "fringe": (apart, 0.02),
    "ghost": (light, 0.01),
    "haze": (lambda kind, s: 1 - apply(kind, textured(), s).std((0, 1)).mean() / textured().std((0, 1)).mean(), 0.1),
}
"""How strong each kind is in what it did, and how far that may be from what was asked."""


def test_every_kind_has_a_meaning() -> None:
    assert MEANING.keys() == DAMAGES.keys()


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_strength_means_what_it_says(kind: str) -> None:
    measure, tolerance = MEANING[kind]
    low, high = DAMAGES[kind].strengths
    for strength in (low, (low * high) ** 0.5):
        strength = round(strength / 5) * 5 if kind == "jpeg" else round(strength) if kind == "banding" else strength
        assert measure(kind, strength) == pytest.approx(strength, rel=tolerance)


def test_photons_make_more_noise_where_it_is_bright() -> None:
    assert std("poisson", 0.1, HALF / 2) == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    assert std("noise", 0.1, HALF / 2) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_of_cameras_is_shared_by_neighbours(channels: int) -> None:
    made = apply("camera", flat(channels=channels), 0.1)[..., 0] - HALF
    assert (made[1:] * made[:-1]).mean() / made.var() > 0.25
    assert made.std() / HALF == pytest.approx(0.1, rel=0.1)


def test_noise_of_colour_leaves_brightness_alone() -> None:
    assert apply("chroma", flat(), 0.2).mean(2) == pytest.approx(HALF)


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_ends_in_8_bit_and_depends_on_the_generator_alone(channels: int) -> None:
    image = pictures("scenes", 1, 32, channels)[0]
    before = image.copy()
    for kind in kinds(channels):
        (one, strength), (again, _) = (damaged(image, kind, np.random.default_rng(3)) for _ in range(2))
        assert one.dtype == np.uint8
        assert one.shape == image.shape
        assert np.array_equal(one, again)
        assert not np.array_equal(one, image)
        low, high = DAMAGES[kind].strengths
        assert low <= strength <= high
    assert np.array_equal(image, before)


def test_grey_pictures_have_no_damage_of_colour() -> None:
    assert set(kinds(3)) - set(kinds(1)) == {"chroma", "fringe"}
    assert set(kinds(3, known=True)) | set(kinds(3, known=False)) == set(DAMAGES)


def test_weak_is_less_than_what_must_be_found() -> None:
    assert [DAMAGES["noise"].part(strength) for strength in (0.04, 0.05)] == ["weak", "judged"]
    assert [DAMAGES["jpeg"].part(quality) for quality in (30, 31)] == ["judged", "weak"]
    assert DAMAGES["caption"].part(0.01) == "judged"


def test_damage_is_made_without_the_audit() -> None:
    assert "robustdiff" not in Path(damages.__file__).read_text()
