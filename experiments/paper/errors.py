"""Exact errors of a trained denoiser on a world, the same errors of real draws (the floor), and curves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ot
import torch
from torch import Tensor

from experiments.paper import linear
from experiments.paper.image_grid_spec import FLOORS, QUADRATURES, RELABELS, SHRINKS
from experiments.paper.toy_grid import (
    DIRTS,
    MAIN,
    MIXTURES,
    POINTS,
    Training,
    images_training,
)
from experiments.paper.toy_training import Denoiser, draw
from experiments.paper.worlds import (
    LinearGaussian,
    Mixture,
    Plane,
    Subspace,
    World,
    make_dirty,
)
from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.diffusion.sigma_floor import SigmaClampedModel
from robustdiff.utils.errors import UsageError
from robustdiff.utils.seeds import derive_seed

CALLS = (1000, 500, 200, 100, 50, 20, 10, 5)
"""Network calls of the few-step curves; all divide the 1000 noise levels."""
LEVELS = (10.0, 3.0, 1.0, 0.5, 0.3, 0.2, 0.15, 0.09, 0.07, 0.05, 0.03)
"""Noise levels sigma/alpha at which Jacobians are measured, nearest step of the sampler."""
MAX_IMAGES, MAX_VALUES = 5000, 1024
SMOOTHING = 0.3
"""h of the subspace: without it the law is a list of images, and no network of this size draws them from memory."""
LIMIT = 1e6
"""Draws that run away (invariance, T5) are held at this bound, per coordinate, in data units: errors stay numbers."""


@dataclass(frozen=True)
class ImageOptions:
    """Where the images of the subspace world come from.

    Attributes:
        data: Anything ``robustdiff train`` reads; ``digits`` is built in.
        resolution: Pixels of the shorter side, centre square; None = as they are.
        components: k.
    """

    data: str = "digits"
    resolution: int | None = None
    components: int = 8


@functools.lru_cache(maxsize=8)
def build_world(name: str, options: ImageOptions = ImageOptions()) -> World:
    """The world of that name.

    Raises:
        UsageError: If the images cannot be read or do not fit.
    """
    if name == "plane":
        return Plane()
    if name in ("ring", "grid"):
        return Mixture.ring() if name == "ring" else Mixture.grid()
    if name == "gaussian":
        return LinearGaussian(torch.tensor([0.2, 0.01]))
    try:
        images = load_images(options.data, resolution=options.resolution, channels=1)
    except UsageError as error:
        remedy = "give --data a folder of images, such as photographs of butterflies, or leave it out for digits"
        raise UsageError(f"{error}; {remedy}") from None
    pixels = images.x0(slice(0, MAX_IMAGES))
    if pixels[0].numel() > MAX_VALUES:
        raise UsageError(f"images of {pixels[0].numel()} pixels are too large for this experiment: add --resolution 16")
    try:
        return Subspace(pixels, options.components, SMOOTHING)
    except ValueError as error:
        raise UsageError(f"--components {options.components} does not fit: {error}") from None


def dimension(world: World) -> int:
    """Numbers in one draw."""
    return math.prod(world.shape)


def training_for(world: World, quick: bool) -> Training:
    """How long and how wide networks are trained there."""
    full = MIXTURES if isinstance(world, Mixture) else POINTS
    if isinstance(world, Subspace):
        full = images_training(dimension(world))
    return full.short if quick else full


def training_set(world: World, dirt: str, training: Training, seed: int) -> tuple[Tensor, Tensor]:
    """Dirty training points, shape (n, d), and which were hit, (n,); frozen, a function of the seed."""
    x0 = world.sample(training.points, _generator("training set", seed))
    corruptions = [Corruption.parse(spec) for spec in DIRTS[dirt]]
    dirty, hit = make_dirty(x0, corruptions, seed)
    return dirty.flatten(1), hit


def _generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*key))


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Exact Wasserstein-2 distance of two point sets of equal weight, (n, d) and (m, d), through POT."""
    cost = ot.dist(a.double().numpy(), b.double().numpy(), metric="sqeuclidean")
    return max(float(ot.emd2([], [], cost, numItermax=10_000_000)), 0.0) ** 0.5


# -- errors ----------------------------------------------------------------------------------------------


def errors(world: World, x: Tensor, reference: Tensor) -> dict[str, float]:
    """Every error of the draws ``x``, (n, d), that needs no network.

    Args:
        world: Where the truth is known.
        x: Draws to judge, shape (n, d); images flat.
        reference: Fresh clean draws, for Wasserstein distances.

    Raises:
        ArithmeticError: If half of the draws or more are no numbers.
    """
    if (~torch.isfinite(x)).any(1).double().mean() >= 0.5:
        raise ArithmeticError("the sampler left the range of numbers: the network was not trained")
    x = _bounded(x)
    if isinstance(world, Plane):
        plane, truth = world.coordinates(x)[:, :2], world.coordinates(reference)[:, :2]
        return {
            "w2": wasserstein(x, reference),
            "w2_in_plane": wasserstein(plane, truth),
            "distance": float(world.distance_to_plane(x).square().mean().sqrt()),
            "coverage": world.coverage(x),
        }
    if isinstance(world, Mixture):
        return {"w2": wasserstein(x, reference), **_mixture_errors(world, x)}
    if isinstance(world, LinearGaussian):
        return {"w2": wasserstein(x, reference)}
    assert isinstance(world, Subspace)
    images = x.reshape(-1, *world.shape)
    ratio = world.coordinates(images).var(0) / world.variances
    return {
        "frechet": world.frechet(images),
        "off_subspace": float(world.residual(images).mean()),
        "psnr": float(world.psnr(images).mean()),
        "variance_low": float(ratio.min()),
        "variance_high": float(ratio.max()),
        "variance_mean": float(ratio.mean()),
    }


def _mixture_errors(world: Mixture, x: Tensor) -> dict[str, float]:
    assert isinstance(world.std, Tensor)
    distance, which = world.nearest(x)
    std = world.std[which]
    near = distance <= 4 * std
    held = torch.bincount(which[near], minlength=len(world.centres))
    return {
        "spurious": float((~near).double().mean()),
        "spread": float((distance / std).square().mean().div(x.shape[1]).sqrt()),
        "modes": float((held >= len(x) / len(world.centres) / 2).double().mean()),
    }


def _bounded(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=LIMIT, posinf=LIMIT, neginf=-LIMIT).clamp(-LIMIT, LIMIT)


@functools.lru_cache(maxsize=64)
def _reference(world: World, n: int, seed: int, purpose: str) -> Tensor:
    return world.sample(n, _generator(purpose, seed)).flatten(1)


@functools.lru_cache(maxsize=64)
def floor(world: World, n: int, seed: int) -> dict[str, float]:
    """The errors of ``n`` real draws, judged like generated ones."""
    return errors(world, _reference(world, n, seed, "floor"), _reference(world, n, seed, "reference"))


def score_error(world: Mixture, denoiser: Denoiser, training: Training, seed: int) -> float:
    """Root mean square error of the predicted noise, per coordinate, over the network's own trajectories.

    The truth is ``-sigma * score`` of the clean law at the states that the sampler visits.
    """
    squares = []

    def watch(x_t: Tensor, t: Tensor) -> None:
        alpha, sigma = float(denoiser.schedule.alpha(t)), float(denoiser.schedule.sigma(t))
        error = denoiser.eps_hat(x_t, t) + sigma * world.score(x_t, alpha, sigma)
        squares.append(_bounded(error).square().mean())

    draw(denoiser, 256, dimension(world), training.calls, seed, watch)
    return float(torch.stack(squares).mean().sqrt())


def ideal(world: World, schedule: NoiseSchedule) -> Denoiser:
    """The network that predicts the noise exactly: ``-sigma`` times the score of the clean law.

    Raises:
        ValueError: If the world has no density.
    """
    if not isinstance(world, Plane | Mixture | LinearGaussian | Subspace):
        raise ValueError("the world has no density, so no exact score")

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        eps = -sigma * world.score(x_t, alpha, sigma)
        return schedule.output_from_x0((x_t - sigma * eps) / alpha, x_t.double(), t).to(x_t.dtype)

    return Denoiser(model, schedule)


def judge(
    world: World, denoiser: Denoiser, training: Training, seed: int, change: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, float]:
    """Every error of a network.

    Args:
        world: Where the truth is known.
        denoiser: On points of shape (n, d).
        training: For the number of draws and of network calls.
        seed: The same for all methods: same reference, same noise.
        change: Applied to the draws (shrinking).
    """
    n = training.samples
    x = change(draw(denoiser, n, dimension(world), training.calls, seed))
    found = errors(world, x, _reference(world, n, seed, "reference"))
    if isinstance(world, Mixture):
        found["score_error"] = score_error(world, denoiser, training, seed)
    return found


def floor_of(world: World, training: Training, seed: int) -> dict[str, float]:
    """:func:`floor` of as many draws as the networks make; the ideal network has no score error."""
    return {**floor(world, training.samples, seed), **({"score_error": 0.0} if isinstance(world, Mixture) else {})}


# -- free baselines ----------------------------------------------------------------------------------------


def shrink(factor: float) -> Callable[[Tensor], Tensor]:
    """Pull draws towards their mean: (n, d) -> (n, d)."""
    return lambda x: x.mean(0) + factor * (x - x.mean(0))


def free_choices(kind: str, plain: Denoiser) -> dict[float, tuple[Denoiser, Callable[[Tensor], Tensor]]]:
    """Setting -> (denoiser, change of the draws) of a free baseline over a plain network.

    Raises:
        ValueError: If there is no such baseline.
    """

    def asked(**change: Any) -> Denoiser:  # noqa: ANN401 - a level, a factor or a shape
        return Denoiser(SigmaClampedModel(plain.model, plain.schedule, **change), plain.schedule)

    if kind == "relabel":
        return {f: (asked(sigma_scale=f), lambda x: x) for f in RELABELS}
    if kind == "label_floor":
        return {f: (asked(sigma_floor=f), lambda x: x) for f in FLOORS}
    if kind == "quadrature_floor":
        return {f: (asked(sigma_floor=f, floor_shape="quadrature"), lambda x: x) for f in QUADRATURES}
    if kind == "shrink":
        return {f: (plain, shrink(f)) for f in SHRINKS}
    raise ValueError(f"no free baseline {kind!r}")


def choose(name: str, world: World, kind: str, plain: Denoiser, training: Training, seed: int) -> float:
    """The setting of a free baseline with the least main error on validation draws, which no row uses."""
    d = dimension(world)
    n = max(training.samples // 2, 2 * d)
    truth = _reference(world, n, seed, "validation")

    def error(setting: float) -> float:
        asked, change = choices[setting]
        return errors(world, change(draw(asked, n, d, training.calls, seed + 10**6)), truth)[MAIN[name]]

    choices = free_choices(kind, plain)
    return min(choices, key=error)


# -- curves --------------------------------------------------------------------------------------------------


def few_step(name: str, world: World, denoiser: Denoiser, training: Training, seed: int) -> dict[str, list[float]]:
    """The main error against the number of network calls."""
    n, truth = training.samples, _reference(world, training.samples, seed, "reference")
    found = [errors(world, draw(denoiser, n, dimension(world), calls, seed), truth)[MAIN[name]] for calls in CALLS]
    return {"calls": list(CALLS), "error_by_calls": found}


def jacobian(
    world: World, denoiser: Denoiser, training: Training, seed: int, points: int = 128
) -> dict[str, list[float]]:
    """Frobenius norm of the Jacobian of the denoised point along the network's own trajectories.

    Of ``D(y) = x0_hat`` in ``y = x_t / alpha``, divided by the root of the dimension: 1 where the network passes all
    noise on, 0 where it removes all of it. Root mean square over ``points`` trajectories, with exact directional
    derivatives along the axes (up to 8) or along 8 random signs (Hutchinson).
    """
    d, schedule = dimension(world), denoiser.schedule
    wanted = set(_visited(schedule, training.calls).tolist())
    levels: list[float] = []
    norms: list[float] = []
    if d <= 8:
        probes = torch.eye(d) * d**0.5
    else:
        probes = torch.randint(0, 2, (8, d), generator=_generator("probes", seed)).float() * 2 - 1

    def watch(x_t: Tensor, t: Tensor) -> None:
        if int(t) not in wanted:
            return
        alpha, squares = schedule.alpha(t), []
        for probe in probes:
            along = probe.expand_as(x_t).contiguous()
            _, moved = torch.func.jvp(lambda y: denoiser.x0_hat(y * alpha, t), (x_t / alpha,), (along,))
            squares.append(moved.square().sum(1) / d)
        levels.append(float(schedule.noise_to_signal(t)))
        norms.append(float(torch.stack(squares).mean().sqrt()))

    draw(denoiser, points, d, training.calls, seed, watch)
    return {"jacobian_levels": levels, "jacobian": norms}


def _visited(schedule: NoiseSchedule, calls: int) -> Tensor:
    """Those timesteps of a trailing sampler that lie nearest to ``LEVELS``."""
    steps = torch.arange(schedule.num_timesteps, 0, -schedule.num_timesteps // calls) - 1
    at = schedule.noise_to_signal(steps).log()
    nearest = (at[:, None] - torch.tensor(LEVELS).log()).abs().argmin(0)
    return steps[sorted(set(nearest.tolist()))]


def predicted_variance(v: Tensor, method: str, m: float, schedule: NoiseSchedule, calls: int) -> Tensor:
    """Closed form (T3, T5): the variance that the sampler generates from the ideal linear epsilon-predictor.

    Args:
        v: Variances of the data, shape (d,).
        method: ``"invariance"``, or anything else for equivariance.
        m: Strength at every noise level; 0 is plain training.
        schedule: Noise schedule.
        calls: Network calls of DDIM, trailing.
    """
    steps = torch.arange(schedule.num_timesteps, 0, -schedule.num_timesteps // calls) - 1
    alpha_bar = schedule.alphas_cumprod.double()[steps]
    kind = linear.invariance_optimum if method == "invariance" else linear.optimum
    return linear.ddim_variance(torch.cat([alpha_bar, torch.ones(1)]), kind(alpha_bar, v, m))
