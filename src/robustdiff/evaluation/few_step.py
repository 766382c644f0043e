"""Quality against the number of network calls: protocols say trailing spacing, equal calls, exact divisors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from robustdiff.evaluation.features import Extractor, Features, extract
from robustdiff.evaluation.neighbours import precision_recall_density_coverage
from robustdiff.evaluation.quality import frechet, kid
from robustdiff.sampling import make_scheduler


def timesteps_of(pipeline: DiffusionPipeline, scheduler: str, steps: int) -> list[float]:
    """The timesteps that a sampler visits.

    Raises:
        UsageError: If the steps do not fit the sampler.
    """
    times = make_scheduler(scheduler, pipeline.scheduler, steps).timesteps.tolist()
    return [int(t) if float(t).is_integer() else float(t) for t in times]


def curve(
    draw: Callable[[str, int], Tensor],
    pipeline: DiffusionPipeline,
    reference: Features,
    scheduler: str,
    steps: Sequence[int],
    batch_size: int,
) -> dict[str, Any]:
    """One curve of a result file: distances at each number of network calls.

    Args:
        draw: (scheduler, steps) -> uint8 (n, C, H, W); the same starting noise for all.
        pipeline: For its noise levels.
        reference: Features of real images.
        scheduler: Name of the sampler.
        steps: Network calls per image.
        batch_size: Of the extractor.
    """
    extractor: Extractor = reference.extractor
    metric = extractor.metric
    kernel = "KID" if metric == "FID" else f"KID-{extractor.name}"
    values: dict[str, list[float]] = {metric: [], kernel: [], "recall": [], "precision": []}
    for count in steps:
        fake = extract(extractor, draw(scheduler, count), batch_size=batch_size, cache=None).values
        values[metric].append(frechet(fake, reference.values))
        values[kernel].append(kid(fake, reference.values)[0])
        shares = precision_recall_density_coverage(reference.values, fake)
        values["precision"].append(shares["precision"])
        values["recall"].append(shares["recall"])
    return {
        "scheduler": scheduler,
        "steps": list(steps),
        "values": values,
        "timesteps": [timesteps_of(pipeline, scheduler, count) for count in steps],
    }
