"""The table of known damage: its document, its order, and how the damaged images are drawn."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import experiment
from robustdiff.data.dataset import ImageDataset
from robustdiff.evaluation.extractors import open_extractor

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "protocols.md").read_text()


@pytest.fixture(scope="module")
def damage() -> ModuleType:
    """The experiment, as a module."""
    return experiment("known_damage")


@pytest.fixture(scope="module")
def result(damage: ModuleType) -> dict:
    return json.loads(damage.RESULT.read_text())


def test_the_committed_result_is_of_what_the_document_says(damage, result) -> None:
    protocol = result["protocol"]
    assert (protocol["n"], protocol["reference"], protocol["training"]) == (500, damage.REFERENCE, damage.TRAINING)
    assert protocol["seeds"] == [0, 1, 2]
    assert all(extractor["sha256"] or extractor["name"] == "pixels" for extractor in protocol["extractors"])
    assert all(len(row["values"]) == 3 for row in result["rows"])
    places = [extractor["name"] for extractor in protocol["extractors"]]
    cases = 1 + sum(len(strengths) for strengths in damage.STRENGTHS.values())
    metrics = len(damage.METRICS) + 1  # density stands in the file alone
    assert len(result["rows"]) == len(places) * cases * metrics + (cases + 1) * len(damage.SHARES)


def test_every_metric_moves_as_it_should_but_for_the_exceptions_that_are_told(damage, result) -> None:
    found = damage.verdicts(result)
    wrong = {key: does for key, (should, does) in found.items() if should != does}
    assert wrong == damage.EXCEPTIONS
    assert len(wrong) < len(found) / 4
    told = TEXT.split("### What does not move")[1].split("###")[0]
    for where, kind, metric in wrong:
        lines = [line for line in told.split("\n* ") if f"`{kind}`" in line and metric in line]
        assert any(where in line or where == damage.COPYING for line in lines), (where, kind, metric)


def test_the_plainest_of_it_without_the_scripts_own_judgement(damage, result) -> None:
    values = damage.by_key(result)
    for extractor in ("squeezenet10_imagenet", "resnet20_cifar10"):
        for seed in range(3):
            for kind, strengths in (("noise", ("0.05", "0.1", "0.2")), ("blur", ("0.5", "1", "2"))):
                rising = [values[extractor, kind, strength, "FD"][seed] for strength in strengths]
                assert values[extractor, "none", "0", "FD"][seed] < rising[0] < rising[1] < rising[2]
            classes = [values[extractor, "modes", left, "recall"][seed] for left in ("5", "2", "1")]
            assert values[extractor, "none", "0", "recall"][seed] > classes[0] > classes[2]
    for strength in ("0.1", "0.5", "1"):
        assert min(values["copying", "replay", strength, "near-copies"]) >= 0.97 * float(strength)
    assert max(values["copying", "none", "0", "near-copies"]) < 0.02


@pytest.mark.parametrize(
    ("steps", "is_"),
    [
        ([[1.0, 1.1], [2.0, 2.1], [3.0, 3.1]], "up"),
        ([[3.0, 3.1], [2.0, 2.1], [1.0, 1.1]], "down"),
        ([[1.0, 1.1], [1.05, 1.1], [1.1, 1.0]], "same"),
        ([[1.0, 1.1], [5.0, 5.1], [3.0, 3.1]], "unclear"),  # back by half of the change
        ([[1.0, 1.1], [2.0, 2.1], [3.0, 1.0]], "unclear"),  # one seed the other way
        ([[1.0, 3.0], [2.0, 4.0], [7.1, 2.9]], "unclear"),
    ],
)
def test_what_counts_as_a_direction(damage, steps, is_) -> None:
    assert damage.direction(steps) == is_


def labelled(count: int, seed: int) -> ImageDataset:
    """``count`` different 8 x 8 images of each of ten classes, whose brightness tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat(count)
    pixels = 20 * labels[:, None, None, None] + torch.randint(0, 40, (10 * count, 3, 8, 8), generator=generator)
    names = tuple(str(i) for i in range(10 * count))
    return ImageDataset("made", pixels.to(torch.uint8), names, (), {}, tuple("0123456789"), labels)


def test_draws_are_disjoint_and_the_damage_is_what_it_is_called(damage, monkeypatch) -> None:
    monkeypatch.setattr(damage, "REFERENCE", 40)
    monkeypatch.setattr(damage, "TRAINING", 50)
    test, train = labelled(24, 1), labelled(15, 2)
    draws = [damage.Draw(test, train, 20, seed) for seed in range(3)]
    places = torch.cat([torch.cat([draw.reference, draw.plain]) for draw in draws])
    assert len(places.unique()) == len(places) == 180
    for draw in draws:
        plain = test.images[draw.plain]
        assert torch.equal(draw.damaged("none", 0), plain)
        held_out = {image.numpy().tobytes() for image in test.images[draw.reference]}
        for left in (5, 2, 1):
            images = draw.damaged("modes", left)
            classes = {int(image.float().mean()) // 20 for image in images}
            assert len(images) == len({image.numpy().tobytes() for image in images}) == 20
            assert len(classes) <= left + 1  # the mean of an image is within a class's band, or on its edge
            assert not held_out & {image.numpy().tobytes() for image in images}
        training = {image.numpy().tobytes() for image in draw.training}
        for share in (0.1, 0.5, 1):
            copies = sum(image.numpy().tobytes() in training for image in draw.damaged("replay", share))
            assert copies == 20 * share
        assert len({image.numpy().tobytes() for image in draw.damaged("duplicates", 0.1)}) == 2
        assert len(draw.damaged("duplicates", 0.1)) == 20
        contrast = draw.damaged("contrast", 0.5).float() - 127.5
        assert torch.allclose(contrast, (plain.float() - 127.5) / 2, atol=0.51)
        noise = (draw.damaged("noise", 0.05).float() - plain.float())[plain > 60].std()
        assert float(noise) == pytest.approx(0.05 * 127.5, rel=0.1)
    assert not {i.numpy().tobytes() for i in draws[0].training} & {i.numpy().tobytes() for i in draws[1].training}
    with pytest.raises(SystemExit, match="lower -n or --seeds"):
        damage.Draw(test, train, 20, 4)


def test_the_experiment_measures_every_case(damage, monkeypatch) -> None:
    monkeypatch.setattr(damage, "REFERENCE", 40)
    monkeypatch.setattr(damage, "TRAINING", 60)
    draw = damage.Draw(labelled(24, 1), labelled(15, 2), 20, 0)
    said: list[str] = []
    found = damage.measure(draw, [open_extractor("pixels")], None, said.append)
    assert len(said) == 19
    assert len(found) == 19 * 10 + 20 * 2
    assert found["pixels", "noise", "0.2", "FD"] > found["pixels", "none", "0", "FD"]
    assert found["copying", "replay", "1", "near-copies"] == 1
