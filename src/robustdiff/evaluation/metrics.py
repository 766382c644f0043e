"""Two sets of features -> every metric with its floor and interval, and what a reader must be warned of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from robustdiff.diffusion.pipeline import make_scheduler
from robustdiff.evaluation.distances import (
    NORMAL_95,
    Interval,
    MetricValue,
    frechet_bias,
    frechet_distance,
    half_sampled,
    kernel_distance,
)
from robustdiff.evaluation.features import Extractor, Features
from robustdiff.evaluation.metric import Better, Estimate, Metric, register_metric, registered_metrics, silent
from robustdiff.evaluation.neighbours import Progress, clipped, diversity, prdc, vendi
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

# -- the package's own metrics ---------------------------------------------------------------------------------


@register_metric
class FrechetDistance(Metric):
    """Between the Gaussians of the two sets: FID of Inception's features, FD-NAME of others."""

    better: ClassVar[Mapping[str, Better]] = {"frechet": "lower"}

    def compute(self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent) -> dict[str, float]:
        """See :func:`~robustdiff.evaluation.distances.frechet_distance`."""
        return {"frechet": frechet_distance(fake, real)}

    def estimate(
        self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent
    ) -> dict[str, Estimate]:
        """With the distance that so few images of one law have."""
        about = {"predicted_floor": frechet_bias(real, len(fake), len(real))}
        return {"frechet": Estimate(frechet_distance(fake, real), about=about)}

    def label(self, name: str, extractor: Extractor) -> str:
        """FID, or FD-NAME."""
        return extractor.metric

    def cost(self, n: int, m: int, d: int) -> float:
        """Of the smaller factorisation."""
        return float((n + m) * d * min(d, max(n, m)))


@register_metric
class KernelDistance(Metric):
    """Mean over subsets: KID, or KID-NAME."""

    better: ClassVar[Mapping[str, Better]] = {"kernel": "lower"}

    def compute(self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent) -> dict[str, float]:
        """See :func:`~robustdiff.evaluation.distances.kernel_distance`."""
        return {"kernel": kernel_distance(fake, real, seed=seed)[0]}

    def estimate(
        self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent
    ) -> dict[str, Estimate]:
        """With the standard error of the mean over subsets, and the interval by it."""
        mean, error, size = kernel_distance(fake, real, seed=seed)
        about = {"standard_error": error, "subset_size": size, "subsets": 100}
        return {"kernel": Estimate(mean, (mean - NORMAL_95 * error, mean + NORMAL_95 * error), about)}

    def label(self, name: str, extractor: Extractor) -> str:
        """KID, or KID-NAME."""
        return "KID" if extractor.metric == "FID" else f"KID-{extractor.name}"


@register_metric
class Neighbours(Metric):
    """Shares of points in the other set's nearest-neighbour balls."""

    better: ClassVar[Mapping[str, Better]] = {
        "precision": "higher",
        "recall": "higher",
        "density": "neither",
        "coverage": "higher",
    }

    def compute(self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent) -> dict[str, float]:
        """See :func:`~robustdiff.evaluation.neighbours.prdc`."""
        return prdc(real, fake, NEIGHBOURS, progress=progress)

    def estimate(
        self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent
    ) -> dict[str, Estimate]:
        """With the number of neighbours."""
        found = self.compute(fake, real, progress=progress)
        return {name: Estimate(value, about={"k": NEIGHBOURS}) for name, value in found.items()}

    def rows(self, n: int, m: int) -> int:
        """Two searches and a comparison."""
        return n + 2 * m

    def cost(self, n: int, m: int, d: int) -> float:
        """Of about four comparisons of all with all."""
        return 4.0 * n * m * d

    def shares(self, n: int, m: int) -> dict[str, int]:
        """All but the density."""
        return {"precision": n, "recall": m, "coverage": m}


@register_metric
class ClippedNeighbours(Metric):
    """Density and coverage that no single image can raise: equivalent shares of good samples."""

    better: ClassVar[Mapping[str, Better]] = {"clipped density": "higher", "clipped coverage": "higher"}

    def compute(self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent) -> dict[str, float]:
        """See :func:`~robustdiff.evaluation.neighbours.clipped`."""
        return clipped(real, fake, NEIGHBOURS, progress=progress)

    def estimate(
        self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent
    ) -> dict[str, Estimate]:
        """With the number of neighbours."""
        found = self.compute(fake, real, progress=progress)
        return {name: Estimate(value, about={"k": NEIGHBOURS}) for name, value in found.items()}

    def rows(self, n: int, m: int) -> int:
        """A search and a comparison."""
        return 2 * m

    def cost(self, n: int, m: int, d: int) -> float:
        """Of a search among real images, and a comparison of all with all."""
        return float((n + m) * m * d)

    def shares(self, n: int, m: int) -> dict[str, int]:
        """Equivalent ones."""
        return {"clipped density": n, "clipped coverage": m}


@register_metric
class Vendi(Metric):
    """How many different images a set is worth; the floor is that of real images."""

    better: ClassVar[Mapping[str, Better]] = {"vendi": "neither"}

    def compute(self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent) -> dict[str, float]:
        """See :func:`~robustdiff.evaluation.neighbours.vendi`; real images are not asked."""
        return {"vendi": vendi(fake)}

    def cost(self, n: int, m: int, d: int) -> float:
        """Of the smaller Gram matrix, and its eigenvalues."""
        return float(n * d * min(n, d) + 10 * min(n, d) ** 3)


@register_metric
class Diversity(Metric):
    """Mean distance of two generated images, in units of that of two real ones."""

    better: ClassVar[Mapping[str, Better]] = {"diversity": "neither"}

    def compute(self, fake: Tensor, real: Tensor, *, seed: int = 0, progress: Progress = silent) -> dict[str, float]:
        """See :func:`~robustdiff.evaluation.neighbours.diversity`."""
        return {"diversity": diversity(fake, real, progress=progress)}

    def rows(self, n: int, m: int) -> int:
        """Once each."""
        return n + m


# -- all of them -----------------------------------------------------------------------------------------------


@contextmanager
def no_bar(what: str, rows: int) -> Iterator[Progress]:
    """A bar that shows nothing."""
    yield silent


@dataclass(frozen=True)
class Quality:
    """What :func:`compute_metrics` found.

    Attributes:
        values: Every metric.
        floor: How the floors were measured, in words.
        warnings: One line each.
    """

    values: tuple[MetricValue, ...]
    floor: str
    warnings: tuple[str, ...]


def compute_metrics(
    generated: Features,
    reference: Features,
    held_out: Features | None = None,
    *,
    seed: int = 0,
    intervals: bool = True,
    bars: Bars = no_bar,
) -> Quality:
    """Every registered metric of generated images: distances, precision, recall, density, coverage, diversity ...

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
        ValueError: If a metric does not keep to what it declares, or has the label of another.
    """
    for name, features in (("`run`", generated), ("`reference`", reference), ("`held_out`", held_out)):
        if features is not None:
            check_enough(name, len(features.values))
    fake, real = generated.values, reference.values
    n, m, d = len(fake), len(real), real.shape[1]
    if held_out is not None:
        base, other = some(held_out.values, n, seed), real
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

    extractor, metrics = generated.extractor, registered_metrics()
    values: list[MetricValue] = []
    sizes = ((n, m), (len(base), len(other)))
    with bars("neighbours", sum(metric.rows(*size) for metric in metrics for size in sizes)) as tell:
        for metric in metrics:
            found = _complete(metric, metric.estimate(fake, real, seed=seed, progress=tell))
            floors = _numbers(metric, metric.compute(base, other, seed=seed, progress=tell))
            around: Mapping[str, Interval] = {}
            if intervals and metric.cost(n, m, d) <= CHEAP:
                shares = metric.shares(n, m)
                compute = partial(_computed, metric)
                around = half_sampled(compute, fake, real, repeats=REPEATS, seed=seed, shares=shares)
            for name, value in _numbers(metric, {name: one.value for name, one in found.items()}).items():
                one = found[name]
                about = {"floor_n": [len(base), len(other)], **one.about}
                interval = around.get(name) if one.interval is None else one.interval
                label, better = metric.label(name, extractor), metric.better[name]
                if not math.isfinite(value):
                    warnings.append(
                        f"{label} is not defined for these images (are all of the reference alike, as {extractor.name} "
                        f"sees them?): it is left out, the other values stay"
                    )
                if any(label == other.name for other in values):
                    raise ValueError(f"metric {type(metric).__name__}: {label!r} is taken; choose another name")
                values.append(MetricValue(label, value, floors[name], better, interval, about))
    return Quality(tuple(values), floor, tuple(warnings))


Found = TypeVar("Found")


def _complete(metric: Metric, found: Mapping[str, Found]) -> Mapping[str, Found]:
    if set(found) != set(metric.better):
        raise ValueError(
            f"metric {type(metric).__name__}: found {', '.join(map(str, found)) or 'nothing'}, but `better` names "
            f"{', '.join(metric.better)}; make them the same"
        )
    return found


def _numbers(metric: Metric, found: Mapping[str, float]) -> dict[str, float]:
    _complete(metric, found)
    try:
        return {name: float(value) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"metric {type(metric).__name__}: found what is no number; return one for each name") from None


def _computed(metric: Metric, fake: Tensor, real: Tensor) -> dict[str, float]:
    return _numbers(metric, metric.compute(fake, real))


def some(rows: Tensor, n: int, seed: int) -> Tensor:
    """At most ``n`` of the rows, drawn at random: files come class by class, so the first ones would be of a kind.

    Args:
        rows: Shape (m, ...).
        n: How many; all of them, in their order, if there are no more.
        seed: Of the draw.
    """
    return rows if n >= len(rows) else rows[drawn(len(rows), n, seed)]


def drawn(count: int, n: int, seed: int) -> list[int]:
    """``n`` different places of ``count``, in random order."""
    generator = torch.Generator().manual_seed(derive_seed("part", seed))
    return torch.randperm(count, generator=generator)[:n].tolist()


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


# -- fewer network calls: equal calls, trailing spacing, exact divisors ------------------------------------------


def timesteps_of(pipeline: DiffusionPipeline, scheduler: str, steps: int) -> list[float]:
    """The timesteps that a sampler visits.

    Raises:
        UsageError: If the steps do not fit the sampler.
    """
    times = make_scheduler(scheduler, pipeline.scheduler, steps).timesteps.tolist()
    return [int(t) if float(t).is_integer() else float(t) for t in times]


def few_step_curve(
    fakes: Sequence[Features],
    pipeline: DiffusionPipeline,
    reference: Features,
    scheduler: str,
    steps: Sequence[int],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One curve of a result file: distances at each number of network calls.

    Args:
        fakes: Features of the images drawn with each of ``steps``, from the same starting noise.
        pipeline: For its noise levels.
        reference: Features of real images.
        scheduler: Name of the sampler.
        steps: Network calls per image.
        progress: Told of finished rows of the neighbour search.
    """
    extractor: Extractor = reference.extractor
    metric = extractor.metric
    kernel = KernelDistance().label("kernel", extractor)
    values: dict[str, list[float]] = {metric: [], kernel: [], "recall": [], "precision": []}
    for features in fakes:
        fake = features.values
        values[metric].append(frechet_distance(fake, reference.values))
        values[kernel].append(kernel_distance(fake, reference.values)[0])
        shares = prdc(reference.values, fake, NEIGHBOURS, progress=progress)
        values["precision"].append(shares["precision"])
        values["recall"].append(shares["recall"])
    return {
        "scheduler": scheduler,
        "steps": list(steps),
        "values": values,
        "timesteps": [timesteps_of(pipeline, scheduler, count) for count in steps],
    }
