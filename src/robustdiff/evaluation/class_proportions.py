"""Which class each image of a class-conditional model is drawn of: as often as the real images it is compared with.

A set of equally many images a class is another law than the reference's: every distance would count that as a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from robustdiff.data.dataset import ImageDataset
from robustdiff.utils.seeds import derive_seed

Proportions = Literal["reference", "training", "equal"]
"""Whose: the reference's, those of the training images, or equally many of each class."""


def counts_of(reference: ImageDataset, names: Sequence[str], classes: int) -> dict[int, int] | None:
    """How many images of each of a model's classes a set has; None if its labels are none of the model's.

    Args:
        reference: Real images.
        names: Of the model's classes, by number; none if it knows them by number only.
        classes: How many there are.
    """
    if reference.labels is None:
        return None
    known = {name: number for number, name in enumerate(names)}
    if not names and len(reference.classes) == classes:
        known = {name: number for number, name in enumerate(reference.classes)}
    found = torch.bincount(reference.labels, minlength=len(reference.classes)).tolist()
    counts = {known[name]: count for name, count in zip(reference.classes, found, strict=True) if name in known}
    return counts if any(counts.values()) else None


def in_proportion(counts: Mapping[int, float], n: int, seed: int) -> list[int]:
    """The class of each of ``n`` images, in random order.

    Each class has its share, rounded: down first, then up where most was lost (largest remainder).

    Args:
        counts: Weight of each class, not all 0.
        n: How many images.
        seed: Of the order.
    """
    total = sum(counts.values())
    exact = {number: n * weight / total for number, weight in counts.items()}
    dealt = {number: int(share) for number, share in exact.items()}
    missing = n - sum(dealt.values())
    for number in sorted(exact, key=lambda one: dealt[one] - exact[one])[:missing]:
        dealt[number] += 1
    labels = [number for number, times in sorted(dealt.items()) for _ in range(times)]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed("classes", seed)))
    return [labels[place] for place in order.tolist()]
