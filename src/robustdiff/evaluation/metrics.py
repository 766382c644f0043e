"""Two sets of features -> every quality metric with its floor and interval, and what a reader must be warned of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustdiff.evaluation.distances import (
    NORMAL_95,
    Interval,
    MetricValue,
    frechet,
    frechet_bias,
    half_sampled,
    kid,
)
from robustdiff.evaluation.features import Features
from robustdiff.evaluation.neighbours import (
    Progress,
    diversity,
    precision_recall_density_coverage,
)
from robustdiff.utils.errors import UsageError
from robustdiff.utils.seeds import derive_seed

NEIGHBOURS = 5
"""k of precision, recall, density and coverage."""
LEAST = 2 * (NEIGHBOURS + 1) + 2
"""Fewest images on either side: half of them must still have k neighbours."""
CHEAP = 4e9
"""Multiply-adds up to which a metric is computed again on forty pairs of halves, for its interval."""
REPEATS = 40
Bars = Callable[[str, int], AbstractContextManager[Progress]]
"""(what, rows) -> a progress bar: entered, it is told of finished rows, and closed at the end."""


@contextmanager
def no_bar(what: str, rows: int) -> Iterator[Progress]:
    """A bar that shows nothing."""
    yield lambda done: None


@dataclass(frozen=True)
class Quality:
    """What :func:`judge` found.

    Attributes:
        values: Every metric.
        floor: How the floors were measured, in words.
        warnings: One line each.
    """

    values: tuple[MetricValue, ...]
    floor: str
    warnings: tuple[str, ...]


def judge(
    generated: Features,
    reference: Features,
    held_out: Features | None = None,
    *,
    seed: int = 0,
    intervals: bool = True,
    bars: Bars = no_bar,
) -> Quality:
    """Frechet and kernel distance, precision, recall, density, coverage and diversity of generated images.

    The floor of each is the same metric between real images and real images: ``held_out`` (as many as were generated,
    if there are) against the whole reference; or else a random part of the reference, at most half of it and at most
    as many as were generated, against the rest.

    Args:
        generated: At least :data:`LEAST` images.
        reference: Real images, likewise; by the same extractor.
        held_out: Further real images.
        seed: Of the random parts.
        intervals: Compute them where that is cheap; KID has its own in any case.
        bars: Shows how far the neighbour search is, which takes longest where there are many images.

    Raises:
        UsageError: If there are too few images.
    """
    for name, features in (("`run`", generated), ("`reference`", reference), ("`held_out`", held_out)):
        if features is not None:
            check_enough(name, len(features.values))
    fake, real = generated.values, reference.values
    n, m, d = len(fake), len(real), real.shape[1]
    if held_out is not None:
        base, other = held_out.values[:n], real
        floor = f"{len(base)} held-out real images against the {m} of the reference"
    else:
        generator = torch.Generator().manual_seed(derive_seed("floor", seed))
        order, part = torch.randperm(m, generator=generator), min(n, m // 2)
        base, other = real[order[:part]], real[order[part:]]
        floor = f"{part} images of the reference against the other {m - part}"
    warnings = []
    if (len(base), len(other)) != (n, m):
        floor += f"; the values are of {n} against {m}"
        if len(base) < 0.9 * n or len(other) < 0.9 * m:
            warnings.append(
                f"the floor is of {len(base)} against {len(other)} real images, the values of {n} against {m}: the "
                f"floor of {generated.extractor.metric} is too high for them; name more real images with `held_out`"
            )
    if min(n, m) < 2 * d:
        warnings.append(
            f"{min(n, m)} images for {d} features: {generated.extractor.metric} is mostly small-sample bias; read it "
            f"beside its floor, compare it at equal n only, and trust KID more"
        )

    metric, about = generated.extractor.metric, {"floor_n": [len(base), len(other)]}
    kernel_name = "KID" if metric == "FID" else f"KID-{generated.extractor.name}"
    # -- Frechet
    found, least = frechet(fake, real), frechet(base, other)
    interval = None
    if intervals and (n + m) * d * min(d, max(n, m)) <= CHEAP:
        halves = half_sampled(lambda a, b: {"frechet": frechet(a, b)}, fake, real, repeats=REPEATS, seed=seed)
        interval = halves["frechet"]
    bias = {"predicted_floor": frechet_bias(real, n, m)}
    values = [MetricValue(metric, found, least, "lower", interval, {**about, **bias})]
    # -- kernel
    mean, error, size = kid(fake, real, seed=seed)
    kernel = {"standard_error": error, "subset_size": size, "subsets": 100}
    around = (mean - NORMAL_95 * error, mean + NORMAL_95 * error)
    values.append(MetricValue(kernel_name, mean, kid(base, other, seed=seed)[0], "lower", around, {**about, **kernel}))
    # -- neighbours
    sizes = (len(base), len(other))
    with bars("neighbours", 3 * (m + sizes[1]) + 2 * (n + sizes[0])) as tell:
        shares, floors = _shares(real, fake, tell), _shares(other, base, tell)
        spreads = diversity(fake, real, progress=tell), diversity(base, other, progress=tell)
    around_shares: Mapping[str, Interval] = {}
    if intervals and n * m * d <= CHEAP / 4:
        rows = {"precision": n, "recall": m, "coverage": m}
        around_shares = half_sampled(lambda a, b: _shares(b, a), fake, real, repeats=REPEATS, seed=seed, shares=rows)
    for name, share in shares.items():
        better: Literal["neither", "higher"] = "neither" if name == "density" else "higher"
        values.append(
            MetricValue(name, share, floors[name], better, around_shares.get(name), {**about, "k": NEIGHBOURS})
        )
    values.append(MetricValue("diversity", *spreads, "neither", None, about))
    return Quality(tuple(values), floor, tuple(warnings))


def check_enough(what: str, count: int) -> None:
    """Refuse sets too small to be judged.

    Args:
        what: What the error calls them.
        count: Images, at least :data:`LEAST`.

    Raises:
        UsageError: If there are fewer.
    """
    if count < LEAST:
        raise UsageError(f"{what} has {count} images; at least {LEAST} are needed: give more")


def _shares(real: Tensor, fake: Tensor, progress: Progress | None = None) -> dict[str, float]:
    return precision_recall_density_coverage(real, fake, NEIGHBOURS, progress=progress)
