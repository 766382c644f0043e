"""Does a model know its training images? Asked of the network itself, not of what it draws.

Two tests, each with its null: held-out images of the same law, which the network has not seen. A network that learnt
the law denoises both alike; one that learnt images denoises those better. Held-out images of another law would look
like that, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.schedule import Schedule
from robustdiff.evaluation.distances import NORMAL_95, Interval, MetricValue, clopper_pearson
from robustdiff.utils.images import from_uint8
from robustdiff.utils.seeds import derive_seed

LEVELS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Noise levels sigma / alpha that are asked; a schedule's nearest timesteps."""
ONE_QUERY = 0.2
"""That of the single query."""
MOST = 1000
"""Images of each set that are asked, drawn at random."""


@dataclass(frozen=True)
class Area:
    """How well scores tell training images from others.

    Attributes:
        area: Under the curve: probability that a training image scores below a held-out one; 0.5: not at all.
        interval: 95 %.
    """

    area: float
    interval: Interval


@dataclass(frozen=True)
class LevelGap:
    """The denoising loss at one noise level.

    Attributes:
        noise_to_signal: sigma / alpha.
        training: Mean over training images; held_out: over held-out ones.
        gap: By which share of the latter the former is smaller.
        interval: Of the gap, 95 %.
        told: Training images from held-out ones, by this loss alone.
    """

    noise_to_signal: float
    training: float
    held_out: float
    gap: float
    interval: Interval
    told: Area


@dataclass(frozen=True)
class ModelCopying:
    """What :func:`copying_of_model` found.

    Attributes:
        levels: By noise level, ascending.
        gap: Over all levels, each loss in units of its mean over held-out images.
        interval: Of it, 95 %.
        by_loss: By the geometric mean of an image's losses, in which each level counts alike.
        by_query: By the norm of the noise that is predicted in the image as it is.
        training: Images asked; held_out: likewise.
    """

    levels: tuple[LevelGap, ...]
    gap: float
    interval: Interval
    by_loss: Area
    by_query: Area
    training: int
    held_out: int

    def values(self) -> list[MetricValue]:
        """As result files hold them; floors are what a model has that never saw the images."""
        about = {"n_training": self.training, "n_held_out": self.held_out}
        return [
            MetricValue("denoising gap", self.gap, 0.0, "lower", self.interval, about),
            MetricValue("told by loss", self.by_loss.area, 0.5, "lower", self.by_loss.interval, about),
            MetricValue(
                "told by one query",
                self.by_query.area,
                0.5,
                "lower",
                self.by_query.interval,
                {**about, "noise_to_signal": ONE_QUERY},
            ),
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """The levels, as ``details`` of a result file."""
        return [asdict(level) for level in self.levels]


def copying_of_model(
    model: Any,  # noqa: ANN401 - a pipeline, a network or any callable
    schedule: Schedule,
    training: Tensor,
    held_out: Tensor,
    *,
    labels: tuple[Tensor | None, Tensor | None] = (None, None),
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> ModelCopying:
    """Ask a network how well it denoises training images, and held-out ones.

    The denoising gap: at each of :data:`LEVELS` every image gets one noise, the i-th of both sets the same, and the
    trainer's own loss is taken. One query: the image as it is, scaled as at a low level but without noise; what a
    network has learnt by heart it finds nothing to take away from.

    Args:
        model: What :class:`~robustdiff.diffusion.Denoiser` takes; on the device it is to run on, in evaluation mode.
        schedule: Its noise levels, and what it predicts.
        training: Images that it was trained on, uint8, shape (n, C, H, W), n >= 2.
        held_out: Images of the same law that it was not trained on, uint8, (m, C, H, W), m >= 2.
        labels: Classes of both, int64, shapes (n,) and (m,), for a conditional network.
        seed: Of the noise.
        batch_size: Images at a time.
        progress: Told of finished images; ``n + m`` in all.

    Raises:
        ValueError: If there are too few images, or they are not of one shape.

    Source: the gap of losses: Carlini et al. (2023), section 5.2; areas: DeLong, DeLong and Clarke-Pearson (1988).
    """
    if training.shape[1:] != held_out.shape[1:]:
        raise ValueError(f"images must be of one shape, got {tuple(training.shape[1:])}, {tuple(held_out.shape[1:])}")
    for name, images in (("training", training), ("held_out", held_out)):
        if len(images) < 2:
            raise ValueError(f"{name} needs at least two images, got {len(images)}")
    scores = [
        _scores(Denoiser.of(model), schedule, images, own, seed, batch_size, progress)
        for images, own in zip((training, held_out), labels, strict=True)
    ]
    (seen, seen_norm), (new, new_norm) = scores  # losses (n, levels), norms (n,)
    shown = schedule.noise_to_signal(_timesteps(schedule)).tolist()
    levels = []
    for number, level in enumerate(shown):
        a, b = seen[:, number], new[:, number]
        gap, interval = _gap(a, b)
        levels.append(LevelGap(level, float(a.mean()), float(b.mean()), gap, interval, area(a, b)))
    yardstick = new.mean(0)
    a, b = (seen / yardstick).mean(1), (new / yardstick).mean(1)
    gap, interval = _gap(a, b)
    tiny = torch.finfo(torch.float64).tiny
    by_loss = area(*(x.clamp(min=tiny).log().mean(1) for x in (seen, new)))
    return ModelCopying(tuple(levels), gap, interval, by_loss, area(seen_norm, new_norm), len(training), len(held_out))


@torch.no_grad()
def _scores(
    denoiser: Denoiser,
    schedule: Schedule,
    images: Tensor,
    labels: Tensor | None,
    seed: int,
    batch_size: int,
    progress: Callable[[int], object] | None,
) -> tuple[Tensor, Tensor]:
    """Losses by level, float64, (n, levels), and norms of the predicted noise, (n,), a root mean square."""
    device = next((p.device for p in getattr(denoiser.model, "parameters", list)()), torch.device("cpu"))
    single = schedule.timestep_at(torch.tensor([ONE_QUERY]))
    losses, norms = [], []
    for first in range(0, len(images), batch_size):
        x0 = from_uint8(images[first : first + batch_size]).to(device)
        own = {}
        if labels is not None or hasattr(denoiser.model, "config"):  # plain callables are not conditional
            own = denoiser.class_kwargs(None if labels is None else labels[first : first + batch_size].to(device))
        found = []
        for number, timestep in enumerate(_timesteps(schedule)):
            noise = [_noise(x0, derive_seed("copying", seed, number, first + i)) for i in range(len(x0))]
            eps, t = torch.stack(noise).to(device), timestep.expand(len(x0)).to(device)
            output = denoiser(schedule.add_noise(x0, eps, t), t, **own)
            found.append((output - schedule.target(x0, eps, t)).double().square().flatten(1).mean(1))
        t = single.expand(len(x0)).to(device)
        alpha, _ = schedule.scales(t, x0)
        x_t = alpha * x0
        predicted = schedule.eps_hat(denoiser(x_t, t, **own), x_t, t)
        norms.append(predicted.double().square().flatten(1).mean(1).sqrt().cpu())
        losses.append(torch.stack(found, 1).cpu())
        if progress is not None:
            progress(len(x0))
    return torch.cat(losses), torch.cat(norms)


def _timesteps(schedule: Schedule) -> Tensor:
    """Of :data:`LEVELS`; short schedules have the same one for several."""
    timesteps: Tensor = torch.unique(schedule.timestep_at(torch.tensor(LEVELS)))
    return timesteps


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed))


def _gap(seen: Tensor, new: Tensor) -> tuple[float, Interval]:
    """``1 - mean(seen) / mean(new)``, with the interval of the ratio by the delta method; images are the units."""
    ratio = float(seen.mean() / new.mean())
    parts = (float(x.var() / len(x) / x.mean().square()) for x in (seen, new))
    half = NORMAL_95 * ratio * math.sqrt(sum(parts))
    return 1 - ratio, (1 - ratio - half, 1 - ratio + half)


def area(members: Tensor, others: Tensor) -> Area:
    """Probability that a member scores below another, ties counting half, with its interval.

    Args:
        members: Scores, shape (n,), n >= 2.
        others: Scores, shape (m,), m >= 2.

    Source: DeLong, DeLong and Clarke-Pearson (1988); where nothing is on the wrong side, Clopper and Pearson (1934).
    """
    below = (members[:, None] < others).double() + 0.5 * (members[:, None] == others).double()
    value = float(below.mean())
    error = math.sqrt(float(below.mean(1).var() / len(members) + below.mean(0).var() / len(others)))
    low, high = max(0.0, value - NORMAL_95 * error), min(1.0, value + NORMAL_95 * error)
    if value in (0.0, 1.0):
        fewer = min(below.shape)
        low, high = clopper_pearson(round(value * fewer), fewer)
    return Area(value, (low, high))
