"""`audit(images)`: every way to give images, what it says of clean ones, and that the room itself can be called."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

import robustdiff
from fields import natural, scenes
from helpers import normal, seeded
from robustdiff.audit import (
    Action,
    AuditResult,
    Detector,
    Finding,
    Survey,
    audit,
    detector,
    register_detector,
    registered_detectors,
)
from robustdiff.audit.parts import parts
from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.training.curriculum import sampler_from_audit
from robustdiff.utils.images import from_uint8, to_uint8


@pytest.fixture(scope="module")
def blurred() -> Tensor:
    """Pictures, every third blurred, uint8."""
    images, blur = natural(300), Corruption("blur", {"radius": 1.2})
    for place in range(0, 300, 3):
        images[place] = blur.apply(images[place], 0, place)
    return to_uint8(images)


# -- ways to ask -------------------------------------------------------------------------------------


def test_every_way_to_give_the_same_images_has_the_same_answer(blurred: Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", blurred[:, 0].numpy())
    by_path = audit(tmp_path / "set.npy")
    ways = [
        audit(str(tmp_path / "set.npy")),
        audit(load_images(tmp_path / "set.npy")),
        audit(blurred),
        audit(from_uint8(blurred)),
        audit(blurred, memory=2**30),
        robustdiff.audit(blurred),
    ]
    assert by_path.groups["blur"].nonzero().flatten().tolist() == list(range(0, 300, 3))
    for one in ways:
        assert isinstance(one, robustdiff.AuditResult)
        assert (one.sha256, one.findings, one.names) == (by_path.sha256, by_path.findings, by_path.names)
    assert by_path.names[:2] == ("000", "001")
    assert audit(tmp_path / "set.npy", resolution=8).sha256 != by_path.sha256


def test_the_room_can_be_called_in_a_fresh_interpreter_and_imported_from() -> None:
    code = (
        "import robustdiff, sys; print(callable(robustdiff.audit), robustdiff.audit.__name__, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "robustdiff.audit", "False"]
    assert robustdiff.audit.audit is audit


def test_what_is_no_set_of_images_is_refused_in_one_line(blurred: Tensor) -> None:
    for wrong, message in (
        (blurred[0], r"images must have shape \(N, C, H, W\), none of them 0, got \(1, 16, 16\)"),
        (blurred[:0], "none of them 0"),
        (blurred.long(), "images must be uint8, or floating point"),
        (blurred.float(), "divide by 127.5 and subtract 1"),
        (torch.full((2, 1, 8, 8), torch.nan), "images must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            audit(wrong)
    with pytest.raises(ValueError, match="resolution: only for a source that load_images reads"):
        audit(blurred, resolution=8)
    with pytest.raises(ValueError, match=r"features must have shape \(300, d\), got \(299, 4\)"):
        audit(blurred, features=torch.zeros(299, 4))
    with pytest.raises(ValueError, match="dust: not one of "):
        audit(blurred, without=("dust",))
    for given, message in (
        ([1.0, 2.0], "images must be a tensor, a NumPy array, a set or a source, got list"),
        (np.full((2, 1, 8, 8), "a"), "images must be an array of numbers"),
        (OneSet(torch.full((70, 1, 8, 8), torch.nan)), "images must be finite: one of 0"),
        (OneSet(torch.zeros(0, 1, 8, 8)), "images: there is none"),
    ):
        with pytest.raises(ValueError, match=message):
            audit(given)
    with pytest.raises(ValueError, match="features must be finite"):
        audit(blurred, features=torch.full((300, 4), torch.nan))
    with pytest.raises(ValueError, match="features must be a tensor or a NumPy array, got list"):
        audit(blurred, features=[1.0])


class OneSet:
    """A set as a stranger writes it."""

    def __init__(self, images: Tensor) -> None:
        """Hold them."""
        self.images, self.names = images, tuple(map(str, range(len(images))))

    def __len__(self) -> int:
        """How many."""
        return len(self.images)

    def x0(self, index: list[int]) -> Tensor:
        """Some."""
        return self.images[index]


def test_arrays_and_tensors_of_any_precision_are_taken() -> None:
    images, features = natural(80), normal(80, 3)
    known = audit(images, features=features)
    of_numpy = audit(images.numpy()[:, ::-1], features=features.numpy())
    assert of_numpy.sha256 == known.sha256
    assert of_numpy.signs["distance"].equal(known.signs["distance"])
    assert audit(images.clone().requires_grad_()).sha256 == known.sha256
    half = images.bfloat16()
    assert audit(half).sha256 == audit(half.float()).sha256
    assert audit(images, without="noise").sha256 == audit(images, without=("noise",)).sha256
    assert inspect.signature(robustdiff.audit) == inspect.signature(audit)


@pytest.mark.parametrize(
    ("detect", "message"),
    [
        (lambda survey: survey.left.float(), "^detector dust: `detect` must return bool of shape"),
        (lambda survey: survey.left[:1], "^detector dust: `detect` must return bool of shape"),
        (lambda survey: survey.low_group(lambda images: images.flatten(1).mean(1), 0.0), "^detector dust: a sign"),
        (lambda survey: survey.low_group(noise, 0.0), "^detector dust: a sign cannot be called noise"),
    ],
)
def test_a_detector_that_answers_wrongly_is_named(detect: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registered_detectors()
    monkeypatch.setattr(detector, "_registered", dict(detector._registered))
    register_detector(type("Dust", (Detector,), {"name": "dust", "title": "dusty", "detect": lambda _, s: detect(s)}))
    with pytest.raises(ValueError, match=message):
        audit(natural(80))


def noise(images: Tensor) -> Tensor:
    """A sign with the name of a column of the file."""
    return images.flatten(1).mean(1)


def test_what_is_no_detector_is_not_registered_and_a_finding_of_no_image_is_kept() -> None:
    with pytest.raises(ValueError, match="detector int must be a subclass of Detector"):
        register_detector(int)
    with pytest.raises(ValueError, match="'regulariser' is the name of another part"):
        register_detector(type("Other", (Detector,), {"name": "regulariser", "title": "w"}))
    images = natural(4)
    survey = Survey(lambda places: images[list(places)], 4)
    survey.add(Finding("set", 4, "of one camera", Action.LEFT_ALONE))
    assert [one.kind for one in survey.result.findings] == ["set"]
    assert survey.result.groups == {}


def test_features_measure_a_distance_and_change_nothing_else(blurred: Tensor) -> None:
    features = normal(300, 6)
    features[7] += 30
    without, with_them = audit(blurred), audit(blurred, features=("mine", features))
    assert with_them.sha256 == without.sha256
    assert with_them.signs["distance"].argmax() == 7
    assert "farthest from the others in mine, typical 1, not acted on: 007 (" in with_them.summary()
    assert "distance" not in without.signs
    assert audit(blurred, features=features).features == "features"


# -- what it says ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["colour, 32", "grey, 32", "colour, 16", "grey, 16"])
def test_a_clean_set_is_not_called_dirty(kind: str) -> None:
    images = scenes(300)
    images = images.mean(1, keepdim=True) if "grey" in kind else images
    images = avg_pool2d(images, 2) if "16" in kind else images
    result = audit(to_uint8(images))
    assert result.findings == ()
    assert result.groups == {}
    assert result.trivial
    assert result.regularise is None
    assert result.clean.all()


def test_a_wide_noise_group_trains_each_image_above_its_own_level() -> None:
    images, noisy = natural(600), torch.arange(600) % 3 > 0
    u, v = (torch.rand(600, generator=seeded(seed)) for seed in (1, 2))
    sigma = torch.where(noisy, 0.08 + 0.28 * u + 0.1 * v, 0.0)  # too wide for one level, too dense for two groups
    result = audit(images + sigma[:, None, None, None] * normal(600, 1, 16, 16).float())
    (finding,) = [one for one in result.findings if one.kind == "noise"]
    assert finding.action is Action.TRAINED_ABOVE
    assert finding.confidence is not None
    assert finding.confidence > 3
    members = result.groups["noise"]
    assert (members == noisy).double().mean() > 0.98
    assert torch.equal(result.noise_std[members], result.sigma[members])
    assert (result.noise_std - sigma)[members & noisy].abs().quantile(0.9) < 0.04
    schedule = NoiseSchedule(torch.linspace(0.9999, 0.001, 200))
    visits = sampler_from_audit(result, schedule)
    assert visits is not None
    first, levels = visits.first[members], schedule.noise_to_signal(torch.arange(200)).double()
    assert (levels[first] > result.sigma[members]).all()
    assert (levels[first - 1] <= result.sigma[members]).all()
    assert len(first.unique()) > 10


# -- kinds of damage ---------------------------------------------------------------------------------


def test_the_parts_are_the_kinds_that_are_acted_on_and_the_regulariser() -> None:
    kinds = registered_detectors()
    compared = ("banding", "blocks", "camera", "caption", "enlarged", "impulse", "motion", "poisson")
    acted = ("cut", "blur", "jpeg", *compared, "noise", "holes", "outliers", "duplicates")
    assert tuple(kind.name for kind in kinds if kind.acts) == acted
    assert {kind.name for kind in kinds if not kind.acts} == {"bars", "looks", "far"}
    assert parts() == (*acted, "regulariser")


@pytest.mark.parametrize("kind", ["blur", "jpeg", "noise", "holes"])
@pytest.mark.parametrize("channels", [1, 3])
def test_simulated_damage_is_drawn_from_the_generator_and_stronger_where_it_says_so(kind: str, channels: int) -> None:
    (one,) = [there for there in registered_detectors() if there.name == kind]
    image = scenes(1)[0, :channels]
    before = image.clone()
    weak, again, strong = (one.simulate(image, strength, seeded(5)) for strength in one.strengths[:1] + one.strengths)
    assert torch.equal(image, before)
    assert torch.equal(weak, again)
    assert weak.shape == image.shape
    error = [(x - image).square().mean().item() for x in (weak, strong)]
    assert 0 < error[0] < error[1]
    if kind in ("noise", "holes"):
        assert not torch.equal(weak, one.simulate(image, one.strengths[0], seeded(6)))


def test_what_cannot_be_simulated_says_so_and_names_are_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {kind.name: kind for kind in registered_detectors()}
    without = {name for name, kind in kinds.items() if not kind.strengths}
    assert without == {"cut", "outliers", "duplicates", "bars", "looks", "far"}
    with pytest.raises(NotImplementedError, match="duplicates cannot be simulated"):
        kinds["duplicates"].simulate(torch.zeros(1, 8, 8), 1.0, seeded())
    monkeypatch.setattr(detector, "_registered", dict(detector._registered))
    with pytest.raises(ValueError, match="detector Mine: 'blur' is the name of Blur; choose another"):
        register_detector(type("Mine", (Detector,), {"name": "blur", "title": "soft"}))
    for attributes in ({"name": "mine"}, {"title": "mine"}, {"name": "my kind", "title": "mine"}):
        with pytest.raises(ValueError, match="needs a name, one word, and a title"):
            register_detector(type("Mine", (Detector,), attributes))
    again = register_detector(type("Mine", (Detector,), {"name": "mine", "title": "mine"}))
    assert register_detector(again) is again
    assert "mine" in parts()


def test_a_kind_that_claims_images_leaves_the_others_to_later_kinds(
    blurred: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Tensor] = {}

    class Claims(Detector):
        name, title, order = "claims", "claimed", 5

        def detect(self, survey):
            asked["first"] = survey.left
            return torch.arange(survey.count) < 30

        def measure(self, survey, shows):
            asked["yardstick"] = survey.yardstick

    monkeypatch.setattr(detector, "_registered", dict(detector._registered))
    register_detector(Claims)
    result = audit(blurred)
    assert asked["first"].all()
    assert not asked["yardstick"][:30].any()
    assert result.groups["blur"].nonzero().flatten().tolist() == list(range(30, 300, 3))
    assert isinstance(result, AuditResult)
