"""Quality against the number of network calls: protocols say trailing spacing, equal calls, exact divisors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from robustdiff.diffusion.pipeline import make_scheduler
from robustdiff.evaluation.distances import frechet, kid
from robustdiff.evaluation.features import Extractor, Features
from robustdiff.evaluation.neighbours import Progress, precision_recall_density_coverage


def timesteps_of(pipeline: DiffusionPipeline, scheduler: str, steps: int) -> list[float]:
    """The timesteps that a sampler visits.

    Raises:
        UsageError: If the steps do not fit the sampler.
    """
    times = make_scheduler(scheduler, pipeline.scheduler, steps).timesteps.tolist()
    return [int(t) if float(t).is_integer() else float(t) for t in times]


def curve(
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
    kernel = "KID" if metric == "FID" else f"KID-{extractor.name}"
    values: dict[str, list[float]] = {metric: [], kernel: [], "recall": [], "precision": []}
    for features in fakes:
        fake = features.values
        values[metric].append(frechet(fake, reference.values))
        values[kernel].append(kid(fake, reference.values)[0])
        shares = precision_recall_density_coverage(reference.values, fake, progress=progress)
        values["precision"].append(shares["precision"])
        values["recall"].append(shares["recall"])
    return {
        "scheduler": scheduler,
        "steps": list(steps),
        "values": values,
        "timesteps": [timesteps_of(pipeline, scheduler, count) for count in steps],
    }
