"""Classes are drawn as often as the real images have them, to the image."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from robustdiff.data.dataset import ImageDataset
from robustdiff.evaluation.class_proportions import counts_of, in_proportion


@pytest.mark.parametrize(
    ("counts", "n", "dealt"),
    [
        ({0: 160, 1: 15, 2: 15}, 190, {0: 160, 1: 15, 2: 15}),
        ({0: 160, 1: 15, 2: 15}, 19, {0: 16, 1: 2, 2: 1}),  # 16, 1.5, 1.5: of equal remainders the first
        ({3: 1.0, 5: 1.0, 9: 1.0}, 14, {3: 5, 5: 5, 9: 4}),
        ({4: 7, 6: 0}, 5, {4: 5}),
    ],
)
def test_shares_are_rounded_by_the_largest_remainder(counts: dict[int, float], n: int, dealt: dict[int, int]) -> None:
    labels = in_proportion(counts, n, seed=0)
    assert Counter(labels) == dealt
    assert labels == in_proportion(counts, n, seed=0)
    assert n < 10 or labels != sorted(labels)  # a head of them is of several classes


def labelled(classes: tuple[str, ...], labels: list[int]) -> ImageDataset:
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    names = list(map(str, range(len(labels))))
    return ImageDataset("real", images, names, (), {}, classes, torch.tensor(labels))


def test_classes_are_those_of_the_model_by_name_or_by_number() -> None:
    real = labelled(("cat", "zebra"), [0, 0, 0, 1])
    assert counts_of(real, ["ant", "cat", "zebra"], 3) == {1: 3, 2: 1}
    assert counts_of(real, ["ant", "bee"], 2) is None
    assert counts_of(real, [], 2) == {0: 3, 1: 1}  # the model knows numbers only
    assert counts_of(real, [], 3) is None
    assert counts_of(replace(real, labels=None, classes=()), ["cat"], 1) is None
