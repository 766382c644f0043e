"""Perturbations stay in their box, draw what they say, climb, and reach the bounds of theory T9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (
    PREDICTIONS,
    Calls,
    Given,
    SmallNet,
    Spy,
    ddpm_schedule,
    normal,
    schedule_at,
    seeded,
)
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.perturbation import (
    AdversarialPerturbation,
    Radius,
    RandomPerturbation,
    Respond,
    Response,
    named_perturbation,
)

BOXED: dict[str, Callable[..., Tensor]] = {
    "uniform": RandomPerturbation(),
    "signs": RandomPerturbation("signs"),
    **{
        f"{inner}_{steps}_{size}": AdversarialPerturbation(steps, inner, size)
        for inner in ("shift", "residual")
        for steps in (1, 3, 10)
        for size in (None, 0.01, 7.0)
    },
}


def linear_response(matrix: Tensor) -> Respond:
    """A response whose residual and shift are both ``A omega``, for images of shape (B, d)."""
    return lambda omega: Response(omega @ matrix.T, omega @ matrix.T)


def attained(perturbation: Callable[..., Tensor], matrix: Tensor, radius: float, images: int = 256) -> Tensor:
    """``|A omega|^2`` per image, shape (B,)."""
    like = torch.empty(images, matrix.shape[0], dtype=torch.float64)
    radii = torch.full((images,), radius, dtype=torch.float64)
    omega = perturbation(linear_response(matrix), radii, like, seeded(5))
    return (omega @ matrix.T).square().sum(1)


# -- the radius ------------------------------------------------------------------------------------


def test_radius_is_scale_times_factor_times_a_power_of_sigma_plus_floor() -> None:
    sigma = torch.linspace(0.01, 1, 7, dtype=torch.float64)
    fixed = Radius(exponent=3, scale=0.7, floor=0.02, random=False)
    torch.testing.assert_close(fixed(sigma), 0.7 * sigma**3 + 0.02)
    drawn = Radius(exponent=3, scale=0.7, floor=0.02)(sigma, seeded(1))
    factor = torch.rand(7, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(drawn, 0.7 * factor * sigma**3 + 0.02)


def test_radius_defaults_are_the_ingredients_the_paper_states() -> None:
    radius = Radius()(torch.full((20_000,), 0.5), seeded(2))
    floor, top = 8 / 255, 0.25 + 8 / 255
    assert floor <= radius.min() < floor + 0.001
    assert top - 0.001 < radius.max() <= top
    assert abs(radius.mean() - (floor + top) / 2) < 0.003


def test_radius_with_one_generator_per_image_does_not_depend_on_the_batch() -> None:
    sigma = torch.tensor([0.2, 0.5, 0.9])
    together = Radius()(sigma, [seeded(i) for i in range(3)])
    assert torch.equal(together[1:2], Radius()(sigma[1:2], [seeded(1)]))


# -- the box ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOXED)
def test_omega_never_leaves_its_box(name: str) -> None:
    matrix = normal(12, 12, seed=3).float()
    radius = torch.tensor([0.0, 1e-6, 8 / 255, 0.3, 1.0, 40.0])
    like = torch.empty(6, 12)
    omega = BOXED[name](linear_response(matrix), radius, like, seeded(1))
    assert omega.shape == like.shape
    assert not omega.requires_grad
    assert (omega.abs() <= radius[:, None]).all()
    assert (omega[2:].abs().amax(1) > 0.1 * radius[2:]).all()


@pytest.mark.parametrize("name", ["uniform", "signs", "shift_1_None", "residual_3_None"])
def test_omega_never_leaves_its_box_inside_an_objective(name: str) -> None:
    spy = Spy(BOXED[name])
    objective = EquivarianceLoss(ddpm_schedule(dtype=torch.float32), perturbation=spy)
    terms = objective(SmallNet(dtype=torch.float32), normal(16, 2, 5, 5).float(), generator=seeded(2))
    assert (spy.omega.flatten(1).abs().amax(1) <= terms.radius).all()
    assert torch.equal(spy.radius, terms.radius)


# -- random ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distribution", "kappa"), [("uniform", 1 / 3), ("signs", 1.0)])
def test_random_omega_has_the_second_moment_kappa_that_T3_needs(distribution: Any, kappa: float) -> None:
    radius = 0.7
    rows = torch.full((40_000,), radius, dtype=torch.float64)
    like = torch.empty(40_000, 3, dtype=torch.float64)
    omega = RandomPerturbation(distribution)(linear_response(torch.eye(3)), rows, like, seeded(4))
    moment = omega.T @ omega / 40_000
    torch.testing.assert_close(moment, torch.eye(3).double() * kappa * radius**2, rtol=0, atol=0.01)
    assert omega.mean(0).abs().max() < 0.015
    assert omega.abs().max() > 0.999 * radius
    if distribution == "signs":
        assert torch.equal(omega.abs(), torch.full_like(omega, radius))


def test_random_omega_never_asks_the_network() -> None:
    def refuse(omega: Tensor) -> Response:
        raise AssertionError("RandomPerturbation called respond")

    for distribution in ("uniform", "signs"):
        RandomPerturbation(distribution)(refuse, torch.ones(2), torch.empty(2, 3), seeded())


@pytest.mark.parametrize("name", ["uniform", "signs", "shift_3_None"])
def test_omega_with_one_generator_per_image_does_not_depend_on_the_batch(name: str) -> None:
    matrix, radius = normal(4, 4, seed=1), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    like = torch.empty(3, 4, dtype=torch.float64)
    together = BOXED[name](linear_response(matrix), radius, like, [seeded(i) for i in range(3)])
    for i in range(3):
        alone = BOXED[name](linear_response(matrix), radius[i : i + 1], like[i : i + 1], [seeded(i)])
        assert torch.equal(alone[0], together[i])


# -- adversarial: T9 -------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["shift", "residual"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_T9_the_gradient_at_omega_zero_is_exactly_zero(prediction: Any, inner: str) -> None:
    spy = Spy(RandomPerturbation())
    EquivarianceLoss(ddpm_schedule(prediction), perturbation=spy)(SmallNet(), normal(6, 2, 5, 5), generator=seeded(1))
    assert spy.respond is not None
    zero = torch.zeros(6, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(getattr(spy.respond(zero), inner).square().sum(), zero)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    away = torch.full_like(zero, 0.01).requires_grad_()
    (gradient,) = torch.autograd.grad(getattr(spy.respond(away), inner).square().sum(), away)
    assert gradient.abs().amax() > 0


@pytest.mark.parametrize("inner", ["shift", "residual"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_step_climbs_above_its_random_start_and_ten_steps_above_one(prediction: Any, inner: Any) -> None:
    schedule, x0 = ddpm_schedule(prediction), normal(48, 2, 5, 5, seed=2)
    t = torch.arange(20, 980, 20)
    values = []
    for perturbation in (RandomPerturbation(), AdversarialPerturbation(1, inner), AdversarialPerturbation(10, inner)):
        spy = Spy(perturbation)
        objective = EquivarianceLoss(schedule, perturbation=spy, radius=Radius(scale=0, floor=0.3))
        objective(SmallNet(seed=3), x0, t=t, generator=seeded(1))
        assert spy.respond is not None
        values.append(getattr(spy.respond(spy.omega), inner).square().flatten(1).mean(1).mean())
    start, one, ten = values
    assert one > 1.2 * start
    assert ten >= one


def test_the_inner_objectives_are_the_shift_of_eps_and_the_residual() -> None:
    """For a linear network W: shift = s W omega, residual = (s W - I) omega, whatever the parametrisation."""
    d, t = 6, torch.tensor([400] * 5)
    weight, omega = normal(d, d, seed=1), normal(5, d, seed=2)
    for prediction in PREDICTIONS:
        schedule = ddpm_schedule(prediction)
        a, s = schedule.alpha(t)[0], schedule.sigma(t)[0]

        def model(x: Tensor, t: Tensor, schedule: Any = schedule, a: Tensor = a, s: Tensor = s) -> Tensor:
            return schedule.output_from_x0((x - s * x @ weight.T) / a, x, t)

        spy = Spy(RandomPerturbation())
        EquivarianceLoss(schedule, perturbation=spy)(model, normal(5, d), t=t, generator=seeded())
        assert spy.respond is not None
        response = spy.respond(omega)
        torch.testing.assert_close(response.shift, s * omega @ weight.T)
        factor = {"epsilon": 1.0, "sample": -s / a, "v_prediction": 1 / a}[prediction]
        torch.testing.assert_close(response.residual, factor * (s * omega @ weight.T - omega))


def test_T9_random_signs_attain_the_lower_bound_of_the_box_on_average() -> None:
    matrix = normal(16, 16, seed=6)
    value = attained(RandomPerturbation("signs"), matrix, radius=0.4, images=20_000)
    torch.testing.assert_close(value.mean(), 0.16 * matrix.square().sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("steps", [1, 3, 10, 40])
def test_T9_the_attack_on_a_linear_network_lies_between_the_two_bounds(steps: int) -> None:
    matrix, radius = normal(16, 16, seed=6), 0.4
    value = attained(AdversarialPerturbation(steps, "residual"), matrix, radius)
    upper = radius**2 * 16 * torch.linalg.matrix_norm(matrix, 2) ** 2
    assert radius**2 * matrix.square().sum() < value.mean()
    assert value.max() <= upper * (1 + 1e-12)


def test_T9_the_attack_reaches_the_upper_bound_when_the_top_singular_vector_is_a_sign_pattern() -> None:
    d, radius = 16, 0.4
    pattern = torch.where(normal(d, seed=7) < 0, -1.0, 1.0).double()
    top = torch.outer(pattern, pattern) / d
    for matrix, share in ((3 * top, 1.0), (0.2 * torch.eye(d).double() + 2.8 * top, 0.9)):
        upper = radius**2 * d * 3**2
        reached = (attained(AdversarialPerturbation(10, "residual"), matrix, radius) / upper - 1).abs() < 1e-12
        assert reached.double().mean() >= share


@pytest.mark.parametrize(("inner", "sign"), [("residual", 1.0), ("shift", -1.0)])
def test_T9_the_two_inner_objectives_pull_in_different_directions(inner: Any, sign: float) -> None:
    """Ideal denoiser of two pixels, SNR Cov of eigenvalue .9 along (1, 1) and .1 along (1, -1).

    residual = -B omega grows along (1, 1), shift = (I - B) omega along (1, -1), B = a^2 v / (a^2 v + s^2).
    """
    ones, across = torch.ones(2, 2).double() / 2, torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=torch.float64)
    matrix = 0.9 * ones + 0.1 * across
    schedule, t = schedule_at(torch.tensor([1.0])), torch.zeros(64, dtype=torch.int64)
    s = schedule.sigma(t)[0]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x @ (torch.eye(2).double() - matrix) / s

    spy = Spy(AdversarialPerturbation(20, inner))
    radius = Radius(scale=0, floor=0.4)
    EquivarianceLoss(schedule, spy, radius=radius)(model, normal(64, 2), t=t, generator=seeded())
    torch.testing.assert_close(spy.omega.abs(), torch.full((64, 2), 0.4, dtype=torch.float64))
    assert ((spy.omega[:, 0] * spy.omega[:, 1]).sign() == sign).double().mean() > 0.9


def test_T9_most_of_the_attack_on_a_stationary_network_goes_to_the_brightness() -> None:
    """The top direction of a smooth circulant A is the constant pattern: the attack becomes one sign per image."""
    distance = torch.arange(32, dtype=torch.float64)
    row = torch.exp(-torch.minimum(distance, 32 - distance) / 8)
    matrix = torch.stack([row.roll(i) for i in range(32)])
    radii, like = torch.ones(200, dtype=torch.float64), torch.empty(200, 32, dtype=torch.float64)
    omega = AdversarialPerturbation(10, "residual")(linear_response(matrix), radii, like, seeded(1))
    start = RandomPerturbation()(linear_response(matrix), radii, like, seeded(1))
    energy_in_the_mean = omega.mean(1).square() / omega.square().mean(1)
    assert energy_in_the_mean.mean() > 0.5
    assert (start.mean(1).square() / start.square().mean(1)).mean() < 0.1


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_attack_takes_one_forward_pass_per_step(steps: int) -> None:
    model = Calls(SmallNet())
    objective = EquivarianceLoss(ddpm_schedule(), perturbation=AdversarialPerturbation(steps))
    objective(model, normal(3, 2, 5, 5), generator=seeded())
    assert len(model.seen) == 2 + steps


def test_the_step_size_is_in_units_of_the_radius() -> None:
    radius, like = torch.tensor([0.1, 2.0], dtype=torch.float64), torch.empty(2, 8, dtype=torch.float64)
    respond = linear_response(torch.eye(8).double())  # ascending |omega|^2 moves every element away from 0
    start = RandomPerturbation()(respond, radius, like, seeded(3))
    for steps, size in ((1, 0.05), (1, None), (5, None)):
        omega = AdversarialPerturbation(steps, "residual", size)(respond, radius, like, seeded(3))
        total = steps * (size if size is not None else (1.0 if steps == 1 else 2.5 / steps))
        wanted = start.sign() * torch.minimum(start.abs() + total * radius[:, None], radius[:, None])
        torch.testing.assert_close(omega, wanted)


def test_the_attack_works_where_gradients_are_switched_off() -> None:
    schedule, x0 = ddpm_schedule(), normal(4, 2, 5, 5)
    with_grad = EquivarianceLoss(schedule)(SmallNet(), x0, generator=seeded(1))
    with torch.no_grad():
        without = EquivarianceLoss(schedule)(SmallNet(), x0, generator=seeded(1))
    assert torch.equal(with_grad.total.detach(), without.total)
    assert not without.total.requires_grad


# -- settings --------------------------------------------------------------------------------------


def test_names_stand_for_the_default_settings() -> None:
    assert named_perturbation("none") is None
    assert named_perturbation("random") == RandomPerturbation("uniform")
    assert named_perturbation("adversarial") == AdversarialPerturbation(steps=1, inner="shift")


def test_a_perturbation_of_ones_own_is_used_as_it_is() -> None:
    omega = normal(4, 2, 5, 5, seed=8) * 0.1
    model = Calls(SmallNet())
    schedule, x0, eps, t = (
        ddpm_schedule(),
        normal(4, 2, 5, 5),
        normal(4, 2, 5, 5, seed=1),
        torch.tensor([1, 9, 99, 999]),
    )
    EquivarianceLoss(schedule, perturbation=Given(omega))(model, x0, eps=eps, t=t)
    torch.testing.assert_close(model.seen[1][0], schedule.add_noise(x0, eps + omega, t))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AdversarialPerturbation(steps=0), "steps"),
        (lambda: AdversarialPerturbation(step_size=0.0), "step_size"),
        (lambda: AdversarialPerturbation(step_size=-1.0), "step_size"),
        (lambda: AdversarialPerturbation(step_size=float("nan")), "step_size"),
        (lambda: AdversarialPerturbation(inner="loss"), "loss"),  # type: ignore[arg-type]
        (lambda: RandomPerturbation("gaussian"), "gaussian"),  # type: ignore[arg-type]
        (lambda: Radius(scale=-0.1), "scale"),
        (lambda: Radius(floor=-0.1), "floor"),
        (lambda: Radius(scale=float("nan")), "scale"),
        (lambda: replace(Radius(), floor=float("nan")), "floor"),
        (lambda: named_perturbation("fgsm"), "fgsm"),
    ],
    ids=[
        "steps_0",
        "step_size_0",
        "step_size_negative",
        "step_size_nan",
        "inner",
        "distribution",
        "scale_negative",
        "floor_negative",
        "scale_nan",
        "floor_nan",
        "name",
    ],
)
def test_bad_settings_are_refused_by_name(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_noise_levels_of_a_custom_process_reach_the_radius() -> None:
    spy = Spy(RandomPerturbation())
    schedule = schedule_at(torch.tensor([0.1, 1.0, 3.0]))
    objective = EquivarianceLoss(schedule, perturbation=spy, radius=Radius(exponent=2, scale=1, floor=0, random=False))
    objective(SmallNet(), normal(3, 2, 5, 5), t=torch.arange(3), generator=seeded())
    torch.testing.assert_close(spy.radius, torch.tensor([0.01 / 1.01, 0.5, 0.9], dtype=torch.float64))
