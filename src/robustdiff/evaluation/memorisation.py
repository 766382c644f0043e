"""Does a model copy its training images? Every number stands beside that of held-out real images, the null.

Near-copies are counted in pixels, by two tests; similarity of features is shown as a histogram and judged by no
threshold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from robustdiff.evaluation.distances import Interval, MetricValue, check_sets, clopper_pearson
from robustdiff.evaluation.neighbours import CHUNK_BYTES, Progress, k_nearest

RATIO_THRESHOLD = 1 / 3
NEIGHBOURHOOD = 50
"""Training images whose mean distance is the yardstick of the relative distance."""
NULL_RATE = 0.01
"""Share of held-out images that the relative distance may take for copies."""
SHOWN = 20
"""Pairs, and most copied images, that are listed."""


@dataclass(frozen=True)
class CopyTest:
    """How many images one test takes for copies.

    Args:
        threshold: An image is a near-copy if its score is below.
        flagged: Generated images below the threshold.
        of: Generated images.
        null_flagged: Held-out images below it, or None without any.
        null_of: Held-out images, or None.
    """

    threshold: float
    flagged: int
    of: int
    null_flagged: int | None
    null_of: int | None

    @property
    def share(self) -> float:
        """Of generated images."""
        return self.flagged / self.of

    @property
    def null_share(self) -> float | None:
        """Of held-out images."""
        return None if self.null_flagged is None or self.null_of is None else self.null_flagged / self.null_of

    @property
    def excess(self) -> tuple[float, Interval] | None:
        """Share above the null's, with its 95 % interval.

        From the two Clopper-Pearson intervals: ``sqrt((p - l)^2 + (u_null - p_null)^2)`` below, likewise above.

        Source: Newcombe (1998), method 10, with exact instead of score intervals.
        """
        if self.null_flagged is None or self.null_of is None:
            return None
        share, null = self.share, self.null_flagged / self.null_of
        (low, high) = clopper_pearson(self.flagged, self.of)
        (null_low, null_high) = clopper_pearson(self.null_flagged, self.null_of)
        excess = share - null
        below, above = math.hypot(share - low, null_high - null), math.hypot(high - share, null - null_low)
        return excess, (excess - below, excess + above)

    def values(self, name: str) -> list[MetricValue]:
        """The share under ``name`` and, with a null, the excess under ``name + " above null"``."""
        about: dict[str, Any] = {"threshold": self.threshold, "flagged": self.flagged, "of": self.of}
        about |= {"null_flagged": self.null_flagged, "null_of": self.null_of}
        interval = clopper_pearson(self.flagged, self.of)
        found = [MetricValue(name, self.share, self.null_share, "lower", interval, about)]
        if self.excess is not None:
            found.append(MetricValue(f"{name} above null", self.excess[0], 0.0, "lower", self.excess[1], about))
        return found


@dataclass(frozen=True)
class Histogram:
    """Cosine similarity of features to the most similar training image.

    Args:
        edges: Of the bins, ascending; the last bin includes its upper edge.
        generated: Images per bin.
        null: Held-out images per bin, or None without any.
    """

    edges: tuple[float, ...]
    generated: tuple[int, ...]
    null: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Memorisation:
    """What :func:`find_copies` found. Indices are those of the tensors it was given.

    Args:
        by_ratio: Near-copies by ``d1 / d2 < 1/3``.
        by_relative: By the relative distance, whose threshold is the null's; None without held-out images.
        ratio: d1 / d2 of each generated image, shape (n,).
        relative: Relative distance of each generated image, shape (n,).
        nearest: Training image nearest to each generated image, shape (n,).
        histogram: Of feature similarity; None without features.
        pairs: (generated, training, ratio), the smallest ratio first.
        copied: (training, times): how often it is the nearest of a near-copy by ratio, the most often copied first.
        repeated: Training images equal to an earlier one; they were left out.
    """

    by_ratio: CopyTest
    by_relative: CopyTest | None
    ratio: Tensor
    relative: Tensor
    nearest: Tensor
    histogram: Histogram | None
    pairs: tuple[tuple[int, int, float], ...]
    copied: tuple[tuple[int, int], ...]
    repeated: int

    def values(self) -> list[MetricValue]:
        """Near-copies by both tests, and above the null."""
        relative = [] if self.by_relative is None else self.by_relative.values("close copies")
        return self.by_ratio.values("near-copies") + relative

    def to_json(self, names: Sequence[str | None] | None = None) -> dict[str, Any]:
        """``values`` and ``details`` of a result file.

        Args:
            names: Of all training images, for the list of copied ones.
        """
        histogram = None
        if self.histogram is not None:
            null = self.histogram.null
            histogram = {
                "edges": list(self.histogram.edges),
                "generated": list(self.histogram.generated),
                "null": None if null is None else list(null),
            }
        return {
            "values": {value.name: value.to_json() for value in self.values()},
            "details": {
                "histogram": histogram,
                "pairs": [list(pair) for pair in self.pairs],
                "copied": [[index, None if names is None else names[index], times] for index, times in self.copied],
                "repeated_training_images": self.repeated,
            },
        }


def distinct(x: Tensor) -> Tensor:
    """Indices of the first of each set of equal rows, ascending, shape (m,)."""
    seen: dict[bytes, int] = {}
    for index, row in enumerate(x.cpu().contiguous()):
        # + 0 makes 0.0 of -0.0, which is equal to it but not the same bytes
        seen.setdefault(hashlib.blake2b((row + 0).numpy().tobytes(), digest_size=32).digest(), index)
    return torch.tensor(list(seen.values()))


def find_copies(
    generated: Tensor,
    training: Tensor,
    held_out: Tensor | None,
    *,
    features: tuple[Tensor, Tensor, Tensor | None] | None = None,
    mirrored: tuple[Tensor, Tensor | None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> Memorisation:
    """Compare generated images, and held-out real ones as the null, with all training images.

    In pixels, with d1, d2, ... the Euclidean distances to the training images in ascending order:

    * ratio ``d1 / d2``, a near-copy if below 1/3. Among d-dimensional points without structure it is below r with
      probability r^d by chance;
    * relative distance: d1 divided by the mean of d1 to d50 (of all, if there are fewer). Carlini et al. halve the
      mean and leave the threshold open; here it is the largest score for which a fresh real image is below with a
      probability of at most 1 %, the ``floor((m + 1) / 100)``-th smallest of m held-out images. With fewer than 99
      of them it is the smallest, and that probability is ``1 / (m + 1)``.

    Training images equal to an earlier one are left out, so a copy of an image that occurs twice has a d2 above zero.
    Images that are nearly equal to each other do hide their copies from the ratio, not from the relative distance.

    Args:
        generated: Pixels, shape (n, d), any real dtype and range, the same for all three.
        training: All training images, shape (N, d), at least two of them distinct.
        held_out: Real images that were not trained on, shape (m, d); None: no null, no relative test.
        features: The same images in the same order as features, shapes (n, k), (N, k) and (m, k), for the histogram.
        mirrored: The generated and the held-out images left for right, as ``generated`` and ``held_out``: a training
            image is then as near as the nearer of the two, so that mirrored copies are found. Features are not asked.
        chunk_bytes: As in :func:`robustdiff.evaluation.neighbours.k_nearest`.
        progress: Told of finished rows; ``n + m`` in all, as often again with features, and with mirrored images.

    Raises:
        ValueError: If shapes do not fit, numbers are not finite, or all training images are equal.

    Source: ratio: Yoon et al. (2023); relative distance: Carlini et al. (2023), section 5.
    """
    sets = {"generated": generated, "training": training} | ({} if held_out is None else {"held_out": held_out})
    check_sets(1, **sets)
    if features is not None:
        _check_features(features, (generated, training, held_out))
    kept = distinct(training).to(training.device)
    if len(kept) < 2:
        raise ValueError("memorisation needs at least two different training images")

    if mirrored is not None:
        for name, x, image in zip(("generated", "held_out"), mirrored, (generated, held_out), strict=True):
            if (None if x is None else x.shape) != (None if image is None else image.shape):
                raise ValueError(f"mirrored images must have the shape of {name}")

    def score(x: Tensor, flipped: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        count = min(NEIGHBOURHOOD, len(kept))
        distances, indices = k_nearest(x, training[kept], count, chunk_bytes=chunk_bytes, progress=progress)
        if flipped is not None:
            others = k_nearest(flipped, training[kept], count, chunk_bytes=chunk_bytes, progress=progress)
            distances, indices = _nearer(distances, indices, *others)
        nearest = distances[:, 0]
        return nearest / distances[:, 1], nearest / distances.mean(1), kept[indices[:, 0]]

    flipped, null_flipped = mirrored or (None, None)
    ratio, relative, nearest = score(generated, flipped)
    null = None if held_out is None else score(held_out, null_flipped)
    copies = ratio < RATIO_THRESHOLD
    order = ratio.argsort(stable=True)[:SHOWN].tolist()
    times = torch.bincount(nearest[copies], minlength=len(training))
    most = times.argsort(descending=True, stable=True)[:SHOWN].tolist()
    return Memorisation(
        by_ratio=_count(RATIO_THRESHOLD, ratio, None if null is None else null[0]),
        by_relative=None if null is None else _count(_null_threshold(null[1]), relative, null[1]),
        ratio=ratio,
        relative=relative,
        nearest=nearest,
        histogram=None if features is None else _similarities(features, chunk_bytes, progress),
        pairs=tuple((i, int(nearest[i]), float(ratio[i])) for i in order),
        copied=tuple((i, int(times[i])) for i in most if times[i] > 0),
        repeated=len(training) - len(kept),
    )


def _nearer(distances: Tensor, indices: Tensor, others: Tensor, their_indices: Tensor) -> tuple[Tensor, Tensor]:
    """The k nearest of two lists of k, each row once, at its lesser distance; all of shape (n, k), ascending.

    What is among the k nearest by the lesser distance is so in one of the two lists.
    """
    count = distances.shape[1]
    both, where = torch.cat([distances, others], 1), torch.cat([indices, their_indices], 1)
    order = both.argsort(dim=1, stable=True)
    both, where = both.gather(1, order), where.gather(1, order)
    by_place = where.argsort(dim=1, stable=True)  # of equal places the nearer stays first
    sorted_places = where.gather(1, by_place)
    again = torch.zeros_like(where, dtype=torch.bool)
    again[:, 1:] = sorted_places[:, 1:] == sorted_places[:, :-1]
    twice = torch.zeros_like(again).scatter(1, by_place, again)
    both = both.masked_fill(twice, torch.inf)
    first = both.argsort(dim=1, stable=True)[:, :count]
    return both.gather(1, first), where.gather(1, first)


def _check_features(
    features: tuple[Tensor, Tensor, Tensor | None], images: tuple[Tensor, Tensor, Tensor | None]
) -> None:
    names = ("generated", "training", "held-out")
    check_sets(1, **{f"features of {name}": x for name, x in zip(names, features, strict=True) if x is not None})
    for name, x, pixels in zip(names, features, images, strict=True):
        found, wanted = (0 if y is None else len(y) for y in (x, pixels))
        if found != wanted:
            raise ValueError(f"{found} features for {wanted} {name} images")


def _null_threshold(null: Tensor) -> float:
    place = max(1, math.floor(NULL_RATE * (len(null) + 1)))
    return float(null.sort().values[place - 1])


def _count(threshold: float, scores: Tensor, null: Tensor | None) -> CopyTest:
    below = int((scores < threshold).sum())
    if null is None:
        return CopyTest(threshold, below, len(scores), None, None)
    return CopyTest(threshold, below, len(scores), int((null < threshold).sum()), len(null))


def _similarities(
    features: tuple[Tensor, Tensor, Tensor | None], chunk_bytes: int, progress: Progress | None
) -> Histogram:
    generated, training, held_out = (None if x is None else normalize(x.double(), dim=1) for x in features)
    assert generated is not None
    assert training is not None

    def most_similar(x: Tensor) -> Tensor:
        _, nearest = k_nearest(x, training, 1, chunk_bytes=chunk_bytes, progress=progress)
        return (x * training[nearest[:, 0]]).sum(1).clamp(-1, 1).cpu()

    found = most_similar(generated)
    null = None if held_out is None else most_similar(held_out)
    lowest = float(found.min()) if null is None else min(float(found.min()), float(null.min()))
    # 40 bins from the least similarity, rounded down to a twentieth, to 1
    edges = torch.linspace(min(math.floor(lowest * 20) / 20, 0.95), 1.0, 41, dtype=torch.float64)

    def counts(x: Tensor) -> tuple[int, ...]:
        return tuple(torch.histogram(x, edges).hist.long().tolist())

    return Histogram(tuple(edges.tolist()), counts(found), None if null is None else counts(null))
