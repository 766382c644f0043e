"""Which images look like simulated damage of the set's own, on sets whose truth is known: told nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from helpers import seeded
from robustdiff.audit import audit, comparison
from robustdiff.audit.comparison import Comparison, comparable, compare
from robustdiff.audit.detector import Detector, registered_detectors
from robustdiff.audit.finding import Action
from robustdiff.utils.images import from_uint8, to_uint8

KINDS = {kind.name: kind for kind in registered_detectors() if kind.strengths}
SIDE = 32


@cache
def scenes(count: int, seed: int = 0) -> Tensor:
    """Pictures with soft shades, hard edges of a dozen shapes and some texture, 8 bit as files are: (N, 3, 32, 32)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: 4 * SIDE, : 4 * SIDE] / (4 * SIDE)
    images = []
    for _ in range(count):
        image = np.stack([rng.uniform(-0.5, 0.5) + rng.normal() * 0.4 * rows + rng.normal() * 0.4 * columns] * 3)
        for _ in range(12):
            y, x, size, angle = rng.uniform(), rng.uniform(), rng.uniform(0.04, 0.3), rng.uniform(0, np.pi)
            u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
            v = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
            inside = (u**2 + v**2 < size**2) if rng.random() < 0.5 else (np.abs(u) < size) & (np.abs(v) < size / 2)
            texture = ndimage.gaussian_filter(rng.normal(size=inside.shape), rng.uniform(2, 8))
            colour = rng.uniform(-0.8, 0.8, 3)[:, None, None] + rng.uniform(0, 0.2) * texture / texture.std()
            image = np.where(inside, colour, image)
        images.append(image.reshape(3, SIDE, 4, SIDE, 4).mean((2, 4)))
    return from_uint8(to_uint8(torch.from_numpy(np.stack(images)).float()))


def mixed(kinds: Sequence[str], share: float, count: int = 400) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Scenes, a share of them damaged at strengths between the two of their kind: images, kinds, strengths."""
    rng, generator = np.random.default_rng(1), seeded(1)
    images, truth, strengths = scenes(count).clone(), np.full(count, "clean", object), np.full(count, np.nan)
    for i in np.flatnonzero(rng.random(count) < share):
        truth[i] = kinds[rng.integers(len(kinds))]
        low, high = np.log(KINDS[truth[i]].strengths)
        strengths[i] = np.exp(low + (high - low) * rng.uniform(0.25, 1))
        images[i] = KINDS[truth[i]].simulate(images[i], float(strengths[i]), generator)
    return from_uint8(to_uint8(images)), truth, strengths


def loaded(images: Tensor) -> Callable[[Sequence[int]], Tensor]:
    return lambda places: images[list(places)]


def some(*names: str) -> list[Detector]:
    return [KINDS[name] for name in names]


@pytest.mark.slow
def test_a_mixture_is_taken_apart() -> None:
    """Half of the images hit by one of five kinds: nearly all found, as what they are, at about their strength."""
    names = ("noise", "jpeg", "blur", "impulse", "enlarged")
    images, truth, strengths = mixed(names, 0.5)
    found = compare(loaded(images), range(len(images)), some(*names))
    damaged = (found.damaged >= comparison.FOUND).numpy()
    assert damaged[truth == "clean"].mean() <= 0.02
    torch.testing.assert_close(found.probability.sum(1), torch.ones(len(images)).double(), rtol=0, atol=1e-5)
    for place, name in enumerate(names):
        mine = truth == name
        assert damaged[mine].mean() >= 0.95, name
        right = mine & found.shows(name).numpy()
        wrong = np.abs(np.log(found.strength[:, place].numpy()[right] / strengths[right]))
        assert np.median(wrong) < 0.25, name
    assert found.told_apart["noise"] < 0.7
    again = compare(loaded(images), range(len(images)), some(*names))
    assert torch.equal(again.probability, found.probability)


@pytest.mark.slow
def test_a_clean_set_stays_clean() -> None:
    """Of all kinds, none is found in more than 2 % of 200 scenes."""
    images = scenes(200)
    found = compare(loaded(images), range(200), list(KINDS.values()))
    assert float((found.damaged >= comparison.FOUND).float().mean()) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strength"), [("noise", 0.1), ("blur", 1.5)])
def test_damage_that_is_usual_is_damage(name: str, strength: float) -> None:
    """Nine of ten images damaged alike: those are found, and not the tenth that is clean."""
    images, generator = scenes(300).clone(), seeded(2)
    hit = torch.rand(300, generator=seeded(3)) < 0.9
    for i in hit.nonzero().flatten().tolist():
        images[i] = KINDS[name].simulate(images[i], strength, generator)
    images = from_uint8(to_uint8(images))
    found = compare(loaded(images), range(300), some("noise", "blur", "jpeg", "enlarged"))
    damaged = found.damaged >= comparison.FOUND
    assert float(damaged[hit].float().mean()) >= 0.95
    assert float(damaged[~hit].float().mean()) <= 0.1


@pytest.mark.slow
def test_what_an_image_cannot_have_is_not_found() -> None:
    """Noisy images, of which a kind says that only the first half may have its damage."""

    class Sometimes(type(KINDS["noise"])):
        name = "sometimes"

        def possible(self, images: Tensor) -> Tensor:
            return images[:, 0, 0, 0] > 0

    images, generator = scenes(80).clone(), seeded(2)
    for i in range(0, 80, 2):
        images[i] = KINDS["noise"].simulate(images[i], 0.2, generator)
    images[:40, :, 0, 0], images[40:, :, 0, 0] = 1.0, -1.0
    found = compare(loaded(from_uint8(to_uint8(images))), range(80), [Sometimes(), KINDS["blur"]])
    assert int((found.damaged[:40:2] >= comparison.FOUND).sum()) >= 18
    assert float(found.probability[40:, 1].max()) == 0.0


def test_what_can_be_compared() -> None:
    """Enough images, large enough, grey or of three channels, and something to compare with."""
    kinds = list(KINDS.values())
    assert comparable((3, 24, 40), 64, kinds)
    assert not comparable((3, 23, 40), 64, kinds)
    assert not comparable((2, 32, 32), 64, kinds)
    assert not comparable((3, 32, 32), 63, kinds)
    assert not comparable((3, 32, 32), 64, [])


def judged(damaged: Sequence[float], told_apart: float) -> Comparison:
    """Images that look blurred, with these probabilities."""
    probability = torch.tensor([[1 - p, p] for p in damaged]).double()
    return Comparison(tuple(some("blur")), probability, torch.ones(len(damaged), 1).double(), {"blur": told_apart})


def test_found_doubted_and_refuted() -> None:
    """Sure ones are found, middling ones doubted; a group that differs from what others become is not damaged."""
    found = judged([0.6, 0.8, 0.95], told_apart=0.6)
    assert found.shows("blur").tolist() == [False, False, True]
    assert found.doubted("blur").tolist() == [False, True, False]
    assert not judged([0.95], told_apart=1.0).shows("blur").any()


def test_images_left_out_show_nothing() -> None:
    """Those that were not asked about are clean, and have no strength."""
    whole = judged([0.9, 0.95], 0.5).among([1, 3], 5)
    assert whole.damaged.tolist() == pytest.approx([0, 0.9, 0, 0.95, 0])
    assert whole.strength.isnan().flatten().tolist() == [True, False, True, False, True]


@pytest.mark.slow
def test_the_audit_says_what_was_found_and_what_is_done() -> None:
    """Groups, levels and sentences of a mixture: noise by its level, the others where they are hidden."""
    images, truth, strengths = mixed(("noise", "jpeg"), 0.4, 300)
    result = audit(images)
    for name, action in (("noise", Action.TRAINED_ABOVE), ("jpeg", Action.TRAINED_WHERE_HIDDEN)):
        (one,) = (finding for finding in result.findings if finding.kind == name)
        assert one.action is action
        assert one.told_apart is not None
        assert float(result.groups[name][torch.from_numpy(truth == name)].double().mean()) >= 0.9
    noisy = torch.from_numpy(truth == "noise") & result.groups["noise"]
    wrong = result.noise_std[noisy].numpy() / strengths[noisy.numpy()] - 1
    assert np.median(np.abs(wrong)) < 0.1
    assert bool((result.min_sigma[noisy] == result.noise_std[noisy]).all())
    text = result.summary()
    assert "what the others become at JPEG quality" in text
    clean = torch.from_numpy(truth == "clean")
    assert float((result.min_sigma[clean] > 0).double().mean()) <= 0.03
    assert float(result.signs["damaged"][clean].median()) < 0.05
