"""Exact errors, floors, free baselines and Jacobians, on draws and networks whose answers are known.

Long, because each of five worlds has errors of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from experiments.paper import errors as measuring
from experiments.paper import linear as linear
from experiments.paper.errors import (
    CALLS,
    LEVELS,
    LIMIT,
    MAIN,
    MIXTURES,
    SMOOTHING,
    ImageOptions,
    build_world,
    choose,
    dimension,
    errors,
    few_step,
    floor,
    floor_of,
    free_choices,
    ideal,
    jacobian,
    judge,
    predicted_variance,
    score_error,
    shrink,
    training_for,
    training_set,
    wasserstein,
)
from experiments.paper.toy_grid import (
    FLOORS,
    POINTS,
    RELABELS,
    SHRINKS,
    Training,
    images_training,
)
from experiments.paper.toy_training import Denoiser, draw, schedule_for
from experiments.paper.worlds import LinearGaussian, Mixture, Plane, Subspace, World
from helpers import normal, seeded
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.evaluation.distances import frechet_floor
from robustdiff.utils.errors import UsageError

SMALL = Training(points=400, samples=200, calls=20)
EPSILON = schedule_for("epsilon")


def ends(settings: tuple[float, ...]) -> list[Any]:
    """The least and the largest setting; those between are long."""
    middle = sorted(settings)[1:-1]
    return [pytest.param(x, marks=pytest.mark.long if x in middle else ()) for x in settings]


def denoiser(eps_hat: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule = EPSILON) -> Denoiser:
    return Denoiser(eps_hat, schedule)


def perfect(world: Any, shift: float = 0.0) -> Denoiser:
    """The exact prediction of the noise, plus a constant."""

    def eps_hat(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(EPSILON.alpha(t)), float(EPSILON.sigma(t))
        return (-sigma * world.score(x_t, alpha, sigma) + shift).float()

    return denoiser(eps_hat)


def linear_network(variances: Tensor, kind: Callable[..., Tensor] = linear.optimum, m: float = 0.0) -> Denoiser:
    w = kind(EPSILON.alphas_cumprod.double(), variances, m).float()
    return denoiser(lambda x_t, t: w[t] * x_t)


# -- Wasserstein -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 10])
def test_the_wasserstein_distance_is_that_of_the_best_assignment(d: int) -> None:
    a, b = normal(60, d, seed=1), 0.5 * normal(60, d, seed=2) + 0.3
    cost = cdist(a.numpy(), b.numpy(), "sqeuclidean")
    wanted = math.sqrt(cost[linear_sum_assignment(cost)].mean())
    assert wasserstein(a, b) == pytest.approx(wanted, rel=1e-9)
    assert wasserstein(b, a) == pytest.approx(wanted, rel=1e-9)
    assert wasserstein(a.float(), b.float()) == pytest.approx(wanted, rel=1e-5)


def test_the_wasserstein_distance_on_a_line_sorts() -> None:
    a, b = normal(200, 1, seed=1), normal(200, 1, seed=2).abs()
    wanted = (a.sort(0).values - b.sort(0).values).square().mean().sqrt()
    assert wasserstein(a, b) == pytest.approx(float(wanted), rel=1e-9)
    thrice = torch.cat([b, b, b])  # other sizes: mass is split
    assert wasserstein(a, thrice) == pytest.approx(float(wanted), rel=1e-9)


def test_the_wasserstein_distance_of_a_shift_is_its_length() -> None:
    a = normal(50, 3)
    assert wasserstein(a, a + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(5, rel=1e-9)
    assert wasserstein(a, a[torch.randperm(50, generator=seeded())]) == pytest.approx(0, abs=1e-7)


# -- errors of draws whose answers are known ---------------------------------------------------------------


def test_errors_on_the_plane() -> None:
    world = Plane()
    reference = world.sample(300, seeded())
    lifted = (reference + 0.3 * world.normal).float()
    found = errors(world, lifted, reference)
    assert found["w2"] == pytest.approx(0.3, rel=1e-5)
    assert found["w2_in_plane"] == pytest.approx(0, abs=1e-5)
    assert found["distance"] == pytest.approx(0.3, rel=1e-5)
    assert found["coverage"] == world.coverage(reference)
    pushed = (reference + 0.1 * world.basis[:, 0]).float()
    found = errors(world, pushed, reference)
    assert found["w2"] == pytest.approx(0.1, rel=1e-4)
    assert found["w2_in_plane"] == pytest.approx(0.1, rel=1e-4)
    assert found["distance"] == pytest.approx(0, abs=1e-6)
    heights = torch.tensor([0.0, 0.0, 0.6, -0.6]).double()  # the distance is a root of a mean of squares
    found = errors(world, (heights[:, None] * world.normal).float(), reference[:4])
    assert found["distance"] == pytest.approx(0.6 / math.sqrt(2), rel=1e-5)
    assert found["coverage"] == pytest.approx(0.01)
    assert set(found) == {"w2", "w2_in_plane", "distance", "coverage"}


@pytest.mark.parametrize("world", [Mixture.ring(), Mixture.grid()], ids=["ring", "grid"])
def test_errors_on_a_mixture(world: Mixture) -> None:
    assert isinstance(world.std, Tensor)
    k, std = len(world.centres), float(world.std[0])
    reference = world.sample(20 * k, seeded())
    right = (world.centres.repeat_interleave(10, 0) + std * torch.tensor([1.0, -1.0])).float()
    found = errors(world, right, reference)
    assert set(found) == {"w2", "spurious", "spread", "modes"}
    assert found["w2"] == pytest.approx(wasserstein(right, reference))
    assert (found["spurious"], found["modes"]) == (0, 1)
    assert found["spread"] == pytest.approx(1, rel=1e-5)
    narrow = (world.centres.repeat_interleave(10, 0) + 0.25 * std * torch.tensor([1.0, -1.0])).float()
    assert errors(world, narrow, reference)["spread"] == pytest.approx(0.25, rel=1e-4)
    # all draws of the first mode go to the second: one mode is lost, nothing is spurious
    lost = right.clone()
    lost[:10] = lost[10:20]
    found = errors(world, lost, reference)
    assert found["modes"] == pytest.approx((k - 1) / k)
    assert found["spurious"] == 0
    # half of a mode's due is just enough, less is not
    for moved, held in ((5, 1.0), (6, (k - 1) / k)):
        thin = right.clone()
        thin[:moved] = thin[10 : 10 + moved]
        assert errors(world, thin, reference)["modes"] == pytest.approx(held)
    # 3.9 std away still belongs to a mode, 4.1 does not
    for away, spurious in ((3.9, 0.0), (4.1, 1 / (10 * k))):
        stray = right.clone()
        stray[0] = (world.centres[0] + away * std * world.centres[0] / world.centres[0].norm()).float()
        assert errors(world, stray, reference)["spurious"] == pytest.approx(spurious)


def test_errors_on_a_gaussian_and_of_draws_that_are_no_numbers() -> None:
    world = build_world("gaussian")
    assert isinstance(world, LinearGaussian)
    reference = world.sample(100, seeded())
    assert errors(world, reference + 0.5, reference) == {"w2": pytest.approx(0.5 * math.sqrt(2), rel=1e-5)}
    for bad in (math.nan, math.inf, -math.inf, 1e30):  # one draw of a hundred ran away: held at the bound
        broken = reference.clone()
        broken[3, 1] = bad
        assert errors(world, broken, reference) == {"w2": pytest.approx(LIMIT / 10, rel=1e-4)}
    broken[:50, 0] = math.nan
    with pytest.raises(ArithmeticError, match="was not trained"):
        errors(world, broken, reference)


def test_errors_on_the_subspace() -> None:
    world = build_world("subspace")
    assert isinstance(world, Subspace)
    exact = world.images.flatten(1)
    found = errors(world, exact, exact)
    n = len(exact)
    assert set(found) == {"frechet", "off_subspace", "psnr", "variance_low", "variance_high", "variance_mean"}
    assert found["frechet"] == pytest.approx(0, abs=1e-3)
    assert found["off_subspace"] == pytest.approx(0, abs=1e-10)
    assert found["psnr"] > 90
    for key in ("variance_low", "variance_high", "variance_mean"):
        assert found[key] == pytest.approx(n / (n - 1), rel=1e-4)
    # one component twice as wide, another half as wide
    k = len(world.variances)
    factor = torch.ones(k, dtype=torch.float64)
    factor[0], factor[1] = 2.0, 0.5
    wide = world.mean + world.coordinates(world.images) * factor @ world.basis.T  # type: ignore[attr-defined]
    found = errors(world, wide.float(), exact)
    assert found["variance_high"] == pytest.approx(4, rel=0.01)
    assert found["variance_low"] == pytest.approx(0.25, rel=0.01)
    assert found["variance_mean"] == pytest.approx((k - 2 + 4 + 0.25) / k, rel=0.01)
    spread = (factor - 1).square() @ world.variances  # type: ignore[attr-defined]
    assert found["frechet"] == pytest.approx(float(spread), rel=0.01)
    # a step out of the subspace, the same for all: a mean that is off, and energy
    out = normal(64, dtype=torch.float64)
    out -= world.basis @ (world.basis.T @ out)  # type: ignore[attr-defined]
    out *= 0.8 / out.norm()
    found = errors(world, (exact + out).float(), exact)
    assert found["off_subspace"] == pytest.approx(0.64 / 64, rel=1e-4)
    assert found["psnr"] == pytest.approx(10 * math.log10(4 * 64 / 0.64), abs=0.01)
    assert found["frechet"] == pytest.approx(0.64, rel=0.01)


# -- the error of the score --------------------------------------------------------------------------------


def test_the_exact_score_has_no_error_and_a_shifted_one_that_of_its_shift() -> None:
    world = Mixture.ring()
    assert score_error(world, perfect(world), SMALL, 0) == pytest.approx(0, abs=1e-5)
    for shift in (0.1, -0.3):
        assert score_error(world, perfect(world, shift), SMALL, 0) == pytest.approx(abs(shift), rel=1e-4)
    # the states are the network's own: one that is wrong at a single step is charged for this step
    once = denoiser(lambda x_t, t: perfect(world, 0.2 if int(t) == 499 else 0.0).model(x_t, t))
    assert score_error(world, once, SMALL, 0) == pytest.approx(0.2 / math.sqrt(SMALL.calls), rel=1e-3)


def test_the_score_of_another_law_is_off_by_the_difference() -> None:
    world = Mixture(torch.zeros(1, 2), 0.5)
    other = Mixture(torch.tensor([[0.3, 0.0]]), 0.5)
    calls = torch.arange(999, -1, -50)
    alpha_bar = EPSILON.alphas_cumprod.double()[calls]
    difference = (1 - alpha_bar).sqrt() * alpha_bar.sqrt() * 0.3 / (alpha_bar * 0.25 + 1 - alpha_bar)
    wanted = float((difference.square().mean() / 2).sqrt())  # in one of two coordinates
    assert score_error(world, perfect(other), SMALL, 0) == pytest.approx(wanted, rel=1e-4)


# -- worlds, training sets, floors -------------------------------------------------------------------------


def test_worlds_by_name() -> None:
    assert build_world("plane") == Plane()
    ring, grid = build_world("ring"), build_world("grid")
    assert isinstance(ring, Mixture)
    assert isinstance(grid, Mixture)
    assert (len(ring.centres), len(grid.centres)) == (8, 9)
    digits = build_world("subspace")
    assert isinstance(digits, Subspace)
    assert (digits.shape, len(digits.images), len(digits.variances)) == ((1, 8, 8), 1797, 8)  # type: ignore[attr-defined]
    assert digits.smoothing == SMOOTHING > 0
    few = build_world("subspace", ImageOptions(components=3))
    assert len(few.variances) == 3  # type: ignore[attr-defined]
    assert build_world("ring") is ring  # so that references are drawn once
    assert [dimension(world) for world in (Plane(), ring, digits)] == [3, 2, 64]


def pictures(folder: Path, count: int, size: int, channels: int = 1) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        shape = (size, size) if channels == 1 else (size, size, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_folder_of_pictures_is_made_grey_and_small(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos", 12, 10, channels=3)
    world = build_world("subspace", ImageOptions(str(folder), resolution=4, components=5))
    assert isinstance(world, Subspace)
    assert world.images.shape == (12, 1, 4, 4)


def test_images_that_are_missing_too_few_or_too_large_get_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.*give --data a folder of images, .* or leave it out for digits"):
        build_world("subspace", ImageOptions(str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="give --data a folder of images"):
        build_world("subspace", ImageOptions(str(tmp_path / "empty")))
    folder = pictures(tmp_path / "photos", 6, 33)
    with pytest.raises(UsageError, match=r"images of 1089 pixels are too large .*--resolution 16"):
        build_world("subspace", ImageOptions(str(folder), components=2))
    assert build_world("subspace", ImageOptions(str(folder), resolution=32, components=2)).shape == (1, 32, 32)
    with pytest.raises(UsageError, match=r"--components 6 does not fit: components must be in 1 \.\. 5 for 6 images"):
        build_world("subspace", ImageOptions(str(folder), resolution=8, components=6))
    with pytest.raises(UsageError, match="--components 64 does not fit"):
        build_world("subspace", ImageOptions(components=64))
    build_world("subspace", ImageOptions(components=63))


@pytest.mark.parametrize(("dirt", "share"), [("clean", 0.0), ("inlier", 0.9), ("outliers", 0.1)])
@pytest.mark.parametrize("name", ["plane", "subspace"])
def test_training_sets_are_frozen_and_dirty_as_said(name: str, dirt: str, share: float) -> None:
    world, training = build_world(name), dataclasses.replace(POINTS, points=2000)
    x, hit = training_set(world, dirt, training, 0)
    again, hit_again = training_set(world, dirt, training, 0)
    assert torch.equal(x, again)
    assert torch.equal(hit, hit_again)
    n = len(x)
    assert x.shape == (2000, dimension(world))
    assert abs(float(hit.double().mean()) - share) <= 4 * math.sqrt(share * (1 - share) / n)
    clean, _ = training_set(world, "clean", training, 0)
    moved = (x - clean).abs().amax(1) > 0
    assert torch.equal(moved, hit)  # what was not hit is what was drawn
    assert (world.distance_to_support(clean.reshape(-1, *world.shape)) < 1e-5).all()
    if dirt == "inlier":
        assert float((x - clean)[hit].std()) == pytest.approx(0.2, rel=0.03)
    if dirt == "outliers":
        assert float(x[hit].abs().max()) <= 1
    other, _ = training_set(world, dirt, training, 1)
    assert not torch.equal(x, other)


def test_training_is_that_of_the_world() -> None:
    assert training_for(Plane(), False) == POINTS
    assert training_for(Mixture.ring(), True) == MIXTURES.short
    assert training_for(build_world("subspace"), False) == images_training(64)
    assert training_for(build_world("subspace"), True) == images_training(64).short


@pytest.mark.parametrize("name", MAIN)
def test_floors_are_reproducible_and_hold_every_error(name: str) -> None:
    world = build_world(name)
    training = dataclasses.replace(SMALL, samples=100)
    found = floor_of(world, training, 0)
    assert found == floor_of(world, training, 0)
    assert found != floor_of(world, training, 1)
    found["w2"] = -1.0  # the caller's own
    assert floor_of(world, training, 0).get("w2") != -1.0
    judged = judge(world, denoiser(lambda x, t: x), training, 0)
    assert set(judged) == set(floor_of(world, training, 0))
    assert MAIN[name] in judged
    if isinstance(world, Mixture):
        assert floor_of(world, training, 0)["score_error"] == 0


def test_the_floor_of_a_wasserstein_distance_falls_with_the_draws() -> None:
    world = build_world("plane")
    few, many = ([floor(world, n, seed)["w2"] for seed in range(4)] for n in (50, 500))
    assert 1.5 < sum(few) / sum(many) < 4  # n^-1/2 up to a logarithm: two dimensions
    real, reference = (world.sample(500, seeded(seed)) for seed in (1, 2))
    assert floor(world, 500, 0)["w2"] == pytest.approx(wasserstein(real, reference), rel=0.3)
    assert floor(world, 500, 0)["distance"] < 1e-6


def test_the_floor_of_a_frechet_distance_is_that_of_theory() -> None:
    """T11: of Gaussian draws; digits are none, so the second term (covariance) is only of that size."""
    world = build_world("subspace")
    assert isinstance(world, Subspace)
    n = 600
    found = [floor(world, n, seed)["frechet"] for seed in range(8)]
    wanted = frechet_floor(world.variances, n)  # type: ignore[attr-defined]
    assert sum(found) / 8 == pytest.approx(wanted, rel=0.15)


# -- judging -----------------------------------------------------------------------------------------------


def test_a_network_is_judged_by_its_draws_against_fresh_ones() -> None:
    world = build_world("gaussian")
    assert isinstance(world, LinearGaussian)
    network = linear_network(world.variances)
    training = dataclasses.replace(SMALL, samples=300)
    found = judge(world, network, training, 0)
    x = draw(network, 300, 2, training.calls, 0)
    reference = measuring._reference(world, 300, 0, "reference")
    assert found == {"w2": wasserstein(x, reference)}
    assert not torch.equal(reference, measuring._reference(world, 300, 0, "floor"))
    assert not torch.equal(reference, measuring._reference(world, 300, 0, "validation")[:300])
    assert not torch.equal(reference, measuring._reference(world, 300, 1, "reference"))
    assert judge(world, network, training, 0, lambda y: y + 1) == {"w2": wasserstein(x + 1, reference)}
    assert judge(world, network, training, 1) != found


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_ideal_network_has_the_exact_score_whatever_it_predicts(prediction: str) -> None:
    schedule, t = schedule_for(prediction), torch.tensor(400)
    for name in ("ring", "gaussian", "subspace"):
        world: Any = build_world(name)
        x_t = normal(20, dimension(world), dtype=torch.float32)
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        wanted = (-sigma * world.score(x_t, alpha, sigma)).float()
        torch.testing.assert_close(ideal(world, schedule).eps_hat(x_t, t), wanted, rtol=1e-3, atol=1e-4)
    nothing: Any = object()
    with pytest.raises(ValueError, match="no density"):
        ideal(nothing, schedule)


def test_the_ideal_network_reaches_the_floor() -> None:
    training = Training(samples=400, calls=100)
    for name in ("ring", "plane"):
        world: Any = build_world(name)
        found = [judge(world, perfect(world), training, seed) for seed in range(4)]
        floors = [floor_of(world, training, seed)["w2"] for seed in range(4)]
        assert sum(each["w2"] for each in found) < 1.2 * sum(floors)  # counts of modes differ from draw to draw
        if name == "plane":
            assert max(each["distance"] for each in found) < 0.01
        else:
            assert max(each["score_error"] for each in found) < 1e-5
            assert {each["modes"] for each in found} == {1.0}


def test_the_ideal_network_reaches_the_floor_of_a_subspace() -> None:
    """4,000 draws: beside the floor of theory (one sd of a single set: half of it) stands the sampler's own error."""
    h, n, calls = 0.3, 4000, 200
    world = Subspace(0.4 * normal(30, 1, 3, 4, seed=1, dtype=torch.float32), 3, h)
    x = draw(ideal(world, schedule_for("v_prediction")), n, 12, calls, 0)
    found = errors(world, x, x)
    sampler = (
        predicted_variance(world.variances, "plain", 0.0, EPSILON, calls).sqrt() - world.variances.sqrt()
    ).square()
    assert found["frechet"] < 2.5 * (frechet_floor(world.variances, n) + float(sampler.sum()))
    assert found["off_subspace"] < 1e-6
    # not only as wide as the law: distributed like it
    white, centres = (world.coordinates(y) / world.variances.sqrt() for y in (x, world.images))
    for axis in range(3):
        middle = (1 - h**2) ** 0.5 * centres[:, axis].numpy()
        found = stats.kstest(white[:, axis].numpy(), lambda u, m=middle: stats.norm.cdf((u[:, None] - m) / h).mean(1))
        assert found.pvalue > 0.01


def test_the_jacobian_of_the_ideal_network_on_a_gaussian_subspace_is_that_of_the_closed_form() -> None:
    """Along the components v / (v + c^2), across the subspace nothing."""
    world = Subspace(0.5 * normal(30, 1, 2, 2, seed=2, dtype=torch.float32), 2, 1.0)
    found = jacobian(world, ideal(world, EPSILON), SMALL, 0, points=4)
    c = EPSILON.noise_to_signal(torch.tensor(at_levels(SMALL.calls))).double()
    passed = world.variances / (world.variances + c[:, None].square())
    assert found["jacobian"] == pytest.approx((passed.square().sum(1) / 4).sqrt().tolist(), rel=1e-3)


# -- free baselines ------------------------------------------------------------------------------------------


def test_shrinking_pulls_to_the_mean() -> None:
    x = normal(40, 3) + torch.tensor([1.0, 2.0, 3.0])
    y = shrink(0.7)(x)
    torch.testing.assert_close(y.mean(0), x.mean(0))
    torch.testing.assert_close(y.T.cov(), 0.49 * x.T.cov())
    torch.testing.assert_close(shrink(1.0)(x), x)


def test_free_choices_ask_the_plain_network_elsewhere() -> None:
    variances = torch.tensor([0.2, 0.01], dtype=torch.float64)
    plain = linear_network(variances)
    t = torch.tensor(300)
    alpha_bar = EPSILON.alphas_cumprod.double()[t]
    x_t = normal(5, 2, dtype=torch.float32)
    for kind, settings in (("relabel", RELABELS), ("label_floor", FLOORS), ("shrink", SHRINKS)):
        choices = free_choices(kind, plain)
        assert tuple(choices) == settings
        for setting, (asked, change) in choices.items():
            x = normal(30, 2)
            torch.testing.assert_close(change(x), shrink(setting)(x) if kind == "shrink" else x)
            wanted = {"relabel": {"relabel": setting}, "label_floor": {"label_floor": setting}, "shrink": {}}[kind]
            w = linear.relabelled(alpha_bar, variances, **wanted)
            torch.testing.assert_close(asked.eps_hat(x_t, t).double(), w * x_t.double(), rtol=0.01, atol=1e-3)
    low = torch.tensor(5)  # below every label floor
    for setting, (asked, _) in free_choices("label_floor", plain).items():
        w = linear.relabelled(EPSILON.alphas_cumprod.double()[low], variances, label_floor=setting)
        torch.testing.assert_close(asked.eps_hat(x_t, low).double(), w * x_t.double(), rtol=0.03, atol=1e-3)
    with pytest.raises(ValueError, match="no free baseline 'shrunk'"):
        free_choices("shrunk", plain)


@pytest.mark.parametrize("factor", ends(SHRINKS))
def test_the_best_shrinking_is_chosen(factor: float) -> None:
    """A network for a law that is wider by 1 / factor is put right by that factor."""
    world = LinearGaussian(torch.tensor([0.2, 0.05]))
    wide = linear_network(world.variances / factor**2)
    training = Training(samples=3000, calls=100)
    assert choose("gaussian", world, "shrink", wide, training, 0) == factor


@pytest.mark.parametrize("factor", ends(RELABELS))
def test_the_best_relabelling_is_chosen(factor: float) -> None:
    """By T7 relabelling by sqrt(1 + m) divides generated variances by 1 + m."""
    world = LinearGaussian(torch.tensor([0.2, 0.05]))
    wide = linear_network(world.variances * factor**2)
    training = Training(samples=3000, calls=100)
    assert choose("gaussian", world, "relabel", wide, training, 0) == factor


def test_a_choice_is_that_of_the_least_main_error_on_draws_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    world = build_world("subspace")
    seen: list[tuple[int, int, int]] = []
    drawn = torch.linspace(0.9, 1.1, 64)
    truth = measuring._reference(world, 128, 7, "validation")

    def record(asked: Denoiser, n: int, d: int, calls: int, seed: int) -> Tensor:
        seen.append((n, calls, seed))
        return measuring._reference(world, n, 7, "validation") * drawn

    monkeypatch.setattr(measuring, "draw", record)
    chosen = choose("subspace", world, "shrink", linear_network(torch.ones(64).double()), SMALL, 7)
    assert seen == [(128, SMALL.calls, 7 + 10**6)] * len(SHRINKS)  # n: half the draws, but twice the dimension
    frechet = {f: errors(world, shrink(f)(truth * drawn), truth)["frechet"] for f in SHRINKS}
    assert chosen == min(SHRINKS, key=lambda f: frechet[f])


# -- curves --------------------------------------------------------------------------------------------------


def test_few_step_errors_are_those_of_that_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(1000 % calls == 0 for calls in CALLS)
    assert list(CALLS) == sorted(CALLS, reverse=True)
    assert (CALLS[0], CALLS[-1]) == (1000, 5)
    monkeypatch.setattr(measuring, "CALLS", (20, 5, 1))
    world = build_world("gaussian")
    assert isinstance(world, LinearGaussian)
    network = linear_network(world.variances)
    found = few_step("gaussian", world, network, SMALL, 2)
    assert found["calls"] == [20, 5, 1]
    for calls, error in zip((20, 5, 1), found["error_by_calls"], strict=True):
        training = dataclasses.replace(SMALL, calls=calls)
        assert error == judge(world, network, training, 2)["w2"]


def at_levels(calls: int) -> list[int]:
    """The timesteps of a trailing sampler nearest to LEVELS, by search."""
    steps = list(range(999, -1, -1000 // calls))
    level = {t: math.log(float(EPSILON.noise_to_signal(torch.tensor(t)))) for t in steps}
    return sorted({min(steps, key=lambda t: abs(level[t] - math.log(wanted))) for wanted in LEVELS}, reverse=True)


@pytest.mark.parametrize("calls", [1000, 200, 20])
def test_the_jacobian_of_a_linear_denoiser_is_that_of_the_closed_form(calls: int) -> None:
    """D(y) = alpha (1 - s w) / alpha y: every axis passes on v / (v + c^2) of what moves it."""
    variances = torch.tensor([0.5, 0.05, 0.002], dtype=torch.float64)
    world = LinearGaussian(variances)
    training = dataclasses.replace(SMALL, calls=calls)
    found = jacobian(world, linear_network(variances), training, 0, points=4)
    steps = at_levels(calls)
    c = EPSILON.noise_to_signal(torch.tensor(steps)).double()
    passed = variances / (variances + c[:, None].square())
    assert found["jacobian_levels"] == pytest.approx(c.tolist(), rel=1e-5)
    assert found["jacobian"] == pytest.approx(passed.square().mean(1).sqrt().tolist(), rel=1e-3)
    assert len(steps) >= 5


def test_the_jacobian_in_many_dimensions_is_estimated_by_probes() -> None:
    d = 64
    variances = torch.logspace(0, -3, d, dtype=torch.float64)
    world = LinearGaussian(variances)
    found = jacobian(world, linear_network(variances), SMALL, 0, points=4)
    c = torch.tensor(found["jacobian_levels"], dtype=torch.float64)
    wanted = (variances / (variances + c[:, None].square())).square().mean(1).sqrt()
    # the Jacobian is diagonal: |J probe|^2 is the same for every pattern of signs, the estimate is exact
    assert found["jacobian"] == pytest.approx(wanted.tolist(), rel=2e-3)
    turn = torch.linalg.qr(normal(d, d, seed=1)).Q
    w = linear.optimum(EPSILON.alphas_cumprod.double(), variances)
    turned = denoiser(lambda x, t: ((x.double() @ turn * w[t]) @ turn.T).float())
    estimate = jacobian(world, turned, SMALL, 0, points=2)
    assert estimate["jacobian"] == pytest.approx(wanted.tolist(), rel=0.2)  # 8 probes
    assert estimate["jacobian"] != pytest.approx(found["jacobian"], rel=1e-4)
    assert estimate == jacobian(world, turned, SMALL, 0, points=2)


def test_the_jacobian_of_passing_everything_on_is_one_and_of_a_constant_nothing() -> None:
    world = build_world("plane")
    for keep, wanted in ((1.0, 1.0), (0.5, 0.5), (0.0, 0.0)):

        def eps_hat(x_t: Tensor, t: Tensor, keep: float = keep) -> Tensor:
            return (x_t - EPSILON.alpha(t) * (keep * x_t / EPSILON.alpha(t) + 0.1)) / EPSILON.sigma(t)

        found = jacobian(world, denoiser(eps_hat), SMALL, 0, points=3)
        assert found["jacobian"] == pytest.approx([wanted] * len(found["jacobian"]), abs=2e-3)


# -- closed forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("method", "kind"), [("equivariance", linear.optimum), ("invariance", linear.invariance_optimum)]
)
def test_predicted_variances_are_those_of_draws_of_the_optimum(
    method: str, kind: Callable[..., Tensor], m: float
) -> None:
    variances = torch.tensor([0.2, 0.01], dtype=torch.float64)
    x = draw(linear_network(variances, kind, m), 20_000, 2, 100, 0).double()
    predicted = predicted_variance(variances, method, m, EPSILON, 100)
    torch.testing.assert_close(x.var(0), predicted, rtol=0.05, atol=0)
    many = predicted_variance(variances, method, m, EPSILON, 1000)
    if m == 0:
        torch.testing.assert_close(many, variances, rtol=0.05, atol=0)
        torch.testing.assert_close(predicted, predicted_variance(variances, "plain", 0.0, EPSILON, 100))
    elif method == "equivariance":
        torch.testing.assert_close(many, variances / (1 + m), rtol=0.1, atol=0)  # T3
    else:
        assert (many > 1.5 * variances).all()  # T5: noise is left in


def test_predicted_variances_stand_for_a_direction_without_any() -> None:
    plane = torch.tensor([0.2, 0.2, 0.0], dtype=torch.float64)
    assert float(predicted_variance(plane, "equivariance", 1.0, EPSILON, 100)[2]) == pytest.approx(0, abs=1e-6)
    assert float(predicted_variance(plane, "invariance", 1.0, EPSILON, 100)[2]) > 1e-3
    assert isinstance(build_world("plane"), World)
