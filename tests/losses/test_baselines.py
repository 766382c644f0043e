"""The objectives that the robust one is compared with equal their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from helpers import (
    PREDICTIONS,
    Calls,
    Given,
    SmallNet,
    Spy,
    ddpm_schedule,
    gradients,
    normal,
    schedule_at,
    seeded,
)
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.baselines import (
    InputPerturbationLoss,
    InvarianceLoss,
    PseudoHuberLoss,
)
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.perturbation import AdversarialPerturbation, Radius
from robustdiff.losses.strength import SigmaRange

T = torch.tensor([0, 10, 200, 500, 800, 999])


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    """Images in [-1, 1], shape (6, 2, 5, 5)."""
    return (torch.rand(6, 2, 5, 5, generator=seeded(1), dtype=torch.float64) * 2 - 1).to(dtype)


# -- elements that do not count ---------------------------------------------------------------------

OBJECTIVES = [
    DenoisingLoss,
    EquivarianceLoss,
    InvarianceLoss,
    InputPerturbationLoss,
    PseudoHuberLoss,
]


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("shape", [(6, 1, 5, 5), (6, 2, 5, 5)])
def test_the_loss_is_the_mean_over_the_elements_that_count(kind: type[DenoisingLoss], shape: tuple) -> None:
    """Each image's known elements as an image of its own: the same mean. What they lack cannot change the gradient."""
    schedule, mask = ddpm_schedule("v_prediction"), torch.rand(shape, generator=seeded(3)) < 0.6
    objective, scale = kind(schedule), torch.full((6, 2, 5, 5), 0.7, dtype=torch.float64, requires_grad=True)

    def model(x: Tensor, t: Tensor) -> Tensor:  # works on each number alone
        return scale[: len(x)] * x.tanh()

    keys = {"t": T, "eps": normal(6, 2, 5, 5, seed=2)}
    terms = objective(model, images(), loss_mask=mask, generator=seeded(), **keys)
    full = mask.expand(6, 2, 5, 5)
    for i in range(6):

        def crop(x: Tensor) -> Tensor:
            return x[i][full[i]][None]  # noqa: B023 - called in this turn

        def part(x: Tensor, t: Tensor) -> Tensor:
            return 0.7 * x.tanh()

        some = {"t": T[i : i + 1], "eps": crop(keys["eps"])}
        plain = DenoisingLoss(schedule) if kind in (EquivarianceLoss, InvarianceLoss) else objective
        if kind is InputPerturbationLoss:
            continue  # draws of its own: below
        alone = plain(part, crop(images()), **some)
        torch.testing.assert_close(terms.denoising[i : i + 1], alone.denoising)
    (gradient,) = torch.autograd.grad(terms.denoising.sum(), scale)
    assert bool((gradient[~full] == 0).all())
    assert bool((gradient[full] != 0).all())


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_where_all_count_the_mask_changes_nothing_and_where_none_does_the_loss_is_0(kind: type[DenoisingLoss]) -> None:
    objective, model, mask = kind(ddpm_schedule()), SmallNet(), torch.ones(6, 1, 1, 1)
    plain = objective(model, images(), t=T, generator=seeded())
    terms = objective(model, images(), t=T, generator=seeded(), loss_mask=mask)
    torch.testing.assert_close(terms.denoising, plain.denoising)
    assert torch.equal(terms.equivariance, plain.equivariance)
    mask[2] = 0
    terms = objective(model, images(), t=T, generator=seeded(), loss_mask=mask)
    assert terms.denoising[2] == 0
    assert bool((terms.denoising[[0, 1, 3, 4, 5]] > 0).all())
    assert all(g.isfinite().all() for g in torch.autograd.grad(terms.denoising.sum(), list(model.parameters())))


@pytest.mark.parametrize("target", ["output", "noise"])
def test_the_regulariser_asks_for_all_elements_unless_its_target_is_the_noise(target: Any) -> None:
    """Made-up pixels say nothing of the noise; but nowhere may the denoised image move. Some images are in the gate."""
    mask = torch.rand(6, 1, 5, 5, generator=seeded(3)) < 0.6
    level, t = torch.tensor([0, 0.05, 0.1, 0, 0.2, 0.3]).double(), torch.tensor([100, 150, 200, 500, 800, 990])
    scale = torch.full((6, 2, 5, 5), 0.7, dtype=torch.float64, requires_grad=True)
    inside = ddpm_schedule().noise_to_signal(t) <= 1.0
    assert inside.tolist() == [True, True, True, False, False, False]

    def model(x: Tensor, t: Tensor) -> Tensor:  # works on each number alone; the images in the gate come first
        return scale[: len(x)] * x.tanh()

    objective = EquivarianceLoss(
        ddpm_schedule(), Given(0.2 * normal(3, 2, 5, 5)), strength=SigmaRange(0, 1, 0.5), target=target
    )
    masked, without = (
        objective(model, images(), t=t, generator=seeded(), noise_level=level, loss_mask=m) for m in (mask, None)
    )
    assert not torch.equal(masked.denoising, without.denoising)
    assert torch.equal(masked.equivariance, without.equivariance) == (target == "output")
    (gradient,) = torch.autograd.grad(masked.equivariance.sum(), scale)
    full = mask.expand(6, 2, 5, 5)
    assert bool((gradient[inside][full[inside]] != 0).all())
    assert bool((gradient[inside][~full[inside]] == 0).all()) == (target == "noise")
    assert not gradient[~inside].any()


@pytest.mark.parametrize("shape", [(6,), (6, 5, 5), (5, 2, 5, 5), (1, 2, 5, 5), (6, 3, 5, 5), (6, 2, 5, 4)])
def test_a_mask_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"loss_mask must broadcast to the shape of x0, \(6, 2, 5, 5\), got"):
        DenoisingLoss(ddpm_schedule())(SmallNet(), images(), loss_mask=torch.ones(shape))


# -- invariance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_invariance_penalises_the_shift_of_eps_hat(prediction: Any) -> None:
    schedule, model, omega = ddpm_schedule(prediction), SmallNet(), 0.2 * normal(6, 2, 5, 5, seed=4)
    x0, eps, t = images(), normal(6, 2, 5, 5, seed=2), T[:-1].repeat(2)[:6]
    terms = InvarianceLoss(schedule, Given(omega), strength=0.4)(model, x0, eps=eps, t=t, generator=seeded())
    x_t, moved = schedule.add_noise(x0, eps, t), schedule.add_noise(x0, eps + omega, t)
    shift = schedule.eps_hat(model(moved, t), moved, t) - schedule.eps_hat(model(x_t, t), x_t, t)
    torch.testing.assert_close(terms.equivariance, shift.square().mean((1, 2, 3)), rtol=1e-8, atol=1e-10)
    plain = DenoisingLoss(schedule)(model, x0, eps=eps, t=t)
    assert torch.equal(terms.denoising, plain.denoising)
    torch.testing.assert_close(terms.total, plain.denoising + 0.4 * terms.equivariance)


def test_invariance_and_equivariance_differ_by_omega_for_a_network_that_ignores_its_input() -> None:
    """A constant network is perfectly invariant, and fails equivariance by exactly omega."""

    def constant(x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    omega = 0.2 * normal(6, 2, 5, 5, seed=4)
    for kind, wanted in ((InvarianceLoss, torch.zeros(6)), (EquivarianceLoss, omega.square().mean((1, 2, 3)))):
        terms = kind(ddpm_schedule(), Given(omega))(constant, images(), t=T, generator=seeded())
        torch.testing.assert_close(terms.equivariance, wanted.double())


@pytest.mark.parametrize(("gradient", "branch"), [("perturbed", "clean"), ("clean", "perturbed")])
@pytest.mark.parametrize("kind", [EquivarianceLoss, InvarianceLoss])
def test_a_stopped_branch_carries_no_gradient(kind: type[EquivarianceLoss], gradient: Any, branch: str) -> None:
    weights = {name: torch.ones((), dtype=torch.float64, requires_grad=True) for name in ("clean", "perturbed")}
    passes = iter(("clean", "perturbed"))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return weights[next(passes)] * x.tanh()

    objective = kind(ddpm_schedule(), Given(0.2 * normal(6, 2, 5, 5)), strength=1.0, gradient=gradient)
    terms = objective(model, images(), t=T, generator=seeded())
    got = torch.autograd.grad(terms.equivariance.sum(), list(weights.values()), allow_unused=True)
    by_name = dict(zip(weights, got, strict=True))
    assert by_name[branch] is None or by_name[branch] == 0
    other = by_name[gradient]
    assert other is not None
    assert other.abs() > 1e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_with_the_true_noise_as_target_the_perturbed_state_is_plainly_denoised(prediction: Any) -> None:
    """``eps_hat(x')`` should be ``eps + omega``; in other units, the denoised image of x' should be x0."""
    schedule, model, omega = ddpm_schedule(prediction), SmallNet(), 0.2 * normal(6, 2, 5, 5, seed=4)
    x0, eps, t = images(), normal(6, 2, 5, 5, seed=2), T[1:].repeat(2)[:6]
    terms = EquivarianceLoss(schedule, Given(omega), target="noise")(model, x0, eps=eps, t=t, generator=seeded())
    moved = schedule.add_noise(x0, eps + omega, t)
    error = (schedule.x0_hat(model(moved, t), moved, t) - x0).square().mean((1, 2, 3))
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    weight = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction]
    torch.testing.assert_close(terms.equivariance, weight * error, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("settings", [{"target": "noise"}, {"perturbation": AdversarialPerturbation(inner="residual")}])
def test_invariance_refuses_what_has_no_meaning_for_it(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="InvarianceLoss penalises the shift"):
        InvarianceLoss(ddpm_schedule(), **settings)


def test_invariance_is_switched_off_and_gated_like_the_robust_objective() -> None:
    schedule, model = ddpm_schedule(), Calls(SmallNet())
    plain = DenoisingLoss(schedule)(model, images(), t=T, generator=seeded(2))
    off = InvarianceLoss(schedule, strength=0)(model, images(), t=T, generator=seeded(2))
    assert torch.equal(off.total, plain.total)
    assert len(model.seen) == 2
    spy = Spy(AdversarialPerturbation())
    gated = InvarianceLoss(schedule, spy, strength=SigmaRange(0, 0.5, 1.0))(model, images(), t=T, generator=seeded(2))
    assert (gated.strength > 0).tolist() == [True, True, False, False, False, False]
    assert spy.omega.shape[0] == 2


# -- input perturbation ----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_input_perturbation_adds_noise_to_the_state_and_not_to_the_target(prediction: Any) -> None:
    scheduler, model = DDPMScheduler(prediction_type=prediction), SmallNet(dtype=torch.float32)
    x0, generator, gamma = images(torch.float32), seeded(5), 0.25
    objective = InputPerturbationLoss(NoiseSchedule.from_scheduler(scheduler), gamma=gamma)
    terms = objective(model, x0, generator=seeded(5))
    t = (torch.rand(6, generator=generator, dtype=torch.float64) * 1000).long()
    eps, xi = (torch.randn(x0.shape, generator=generator) for _ in range(2))
    target = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, t)}[prediction]
    output = model(scheduler.add_noise(x0, eps + gamma * xi, t), t)
    torch.testing.assert_close(terms.total, (output - target).square().mean((1, 2, 3)))
    plain = DenoisingLoss(objective.schedule)(model, x0, generator=seeded(5))
    assert not torch.allclose(terms.total, plain.total, rtol=1e-2)


def test_input_perturbation_with_gamma_zero_is_plain_and_its_default_is_the_source_s() -> None:
    schedule, model, x0 = ddpm_schedule(), SmallNet(dtype=torch.float32), images(torch.float32)
    none = InputPerturbationLoss(schedule, gamma=0)(model, x0, generator=seeded(5))
    plain = DenoisingLoss(schedule)(model, x0, generator=seeded(5))
    assert torch.equal(none.total, plain.total)
    for got, wanted in zip(gradients(model, none.total.sum()), gradients(model, plain.total.sum()), strict=True):
        assert torch.equal(got, wanted)
    assert InputPerturbationLoss(schedule).gamma == 0.1


def test_input_perturbation_with_one_generator_per_image_does_not_depend_on_the_batch() -> None:
    objective, x0, model = InputPerturbationLoss(ddpm_schedule()), images(), SmallNet()
    together = objective(model, x0, generator=[seeded(i) for i in range(6)])
    alone = objective(model, x0[2:3], generator=[seeded(2)])
    torch.testing.assert_close(alone.total[0], together.total[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [-0.1, float("nan")])
def test_a_bad_gamma_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        InputPerturbationLoss(ddpm_schedule(), gamma=gamma)


# -- pseudo-Huber ----------------------------------------------------------------------------------


def huber(error: Tensor, width: Tensor | float) -> Tensor:
    """The formula of diffusers' training scripts (``--loss_type huber``): ``2 c (sqrt(e^2 + c^2) - c)``."""
    return 2 * width * (torch.sqrt(error**2 + width**2) - width)


def error_of(schedule: NoiseSchedule, model: Any, x0: Tensor, seed: int) -> Tensor:
    """Output minus target, with the noise of ``generator=seeded(seed)`` and timesteps ``T``."""
    eps = torch.randn(x0.shape, generator=seeded(seed), dtype=x0.dtype)
    return model(schedule.add_noise(x0, eps, T), T) - schedule.target(x0, eps, T)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("width", [0.01, 0.1, 1.0, 30.0])
def test_pseudo_huber_equals_diffusers_formula(width: float, prediction: Any) -> None:
    schedule, model, x0 = ddpm_schedule(prediction), SmallNet(), images()
    terms = PseudoHuberLoss(schedule, width=width)(model, x0, t=T, generator=seeded(3))
    wanted = huber(error_of(schedule, model, x0, 3), width).mean((1, 2, 3))
    torch.testing.assert_close(terms.denoising, wanted, rtol=1e-8, atol=0)
    assert torch.equal(terms.total, terms.denoising)


def test_pseudo_huber_of_a_large_width_is_the_mean_square() -> None:
    schedule, model, x0 = ddpm_schedule(), SmallNet(), images()
    terms = PseudoHuberLoss(schedule, width=1e3)(model, x0, t=T, generator=seeded(3))
    plain = DenoisingLoss(schedule)(model, x0, t=T, generator=seeded(3))
    torch.testing.assert_close(terms.total, plain.total, rtol=1e-5, atol=0)


def test_pseudo_huber_of_a_small_width_is_twice_the_width_times_the_absolute_error() -> None:
    schedule, model, x0, width = ddpm_schedule(), SmallNet(), images(), 1e-6
    terms = PseudoHuberLoss(schedule, width=width)(model, x0, t=T, generator=seeded(3))
    wanted = 2 * width * error_of(schedule, model, x0, 3).abs().mean((1, 2, 3))
    torch.testing.assert_close(terms.total, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_default_width_falls_from_one_to_a_tenth_with_the_noise_level(prediction: Any) -> None:
    levels = torch.tensor([1e-4, 0.5, 1.0, 9.0, 1e3, 1e5])
    widths = torch.tensor([1.0, 0.5, 0.325, 0.109, 0.1, 0.1], dtype=torch.float64)[:, None, None, None]
    schedule, x0, eps = schedule_at(levels, prediction), images(), normal(6, 2, 5, 5, seed=2)
    model, t = SmallNet(), torch.arange(6)
    terms = PseudoHuberLoss(schedule)(model, x0, eps=eps, t=t)
    error = model(schedule.add_noise(x0, eps, t), t) - schedule.target(x0, eps, t)
    torch.testing.assert_close(terms.total, huber(error, widths).mean((1, 2, 3)), rtol=3e-4, atol=0)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (lambda level: level[:1], "the width function returned shape"),
        (lambda level: level * -1 - 1, "the width function returned a value that is negative"),
        (lambda level: level * 0, "the width function returned a value that is 0"),
        (lambda level: level + math.inf, "the width function returned a value that is negative or not finite"),
    ],
)
def test_a_width_function_is_checked(width: Any, message: str) -> None:
    loss = PseudoHuberLoss(ddpm_schedule(), width=width)
    with pytest.raises(ValueError, match=message):
        loss(SmallNet(), images(), t=T, generator=seeded(3))


def test_a_width_function_sees_noise_levels() -> None:
    schedule, model, x0 = ddpm_schedule(), SmallNet(), images()
    terms = PseudoHuberLoss(schedule, width=lambda level: 0.2 + level / (1 + level))(
        model, x0, t=T, generator=seeded(3)
    )
    level = (1 / schedule.alphas_cumprod[T] - 1).sqrt()
    width = (0.2 + level / (1 + level))[:, None, None, None]
    wanted = huber(error_of(schedule, model, x0, 3), width).mean((1, 2, 3))
    torch.testing.assert_close(terms.total, wanted, rtol=1e-8, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pseudo_huber_is_finite_at_zero_terminal_snr(prediction: Any) -> None:
    schedule, model = ddpm_schedule(prediction, zero_snr=True, dtype=torch.float32), SmallNet(dtype=torch.float32)
    terms = PseudoHuberLoss(schedule)(model, images(torch.float32), t=torch.full((6,), 999), generator=seeded())
    assert torch.isfinite(terms.total).all()
    assert all(torch.isfinite(g).all() for g in gradients(model, terms.total.mean()))


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_pseudo_huber_of_small_errors_keeps_float32_precision(size: float) -> None:
    """``sqrt(e^2 + c^2) - c`` cancels; ``e^2 / (sqrt(e^2 + c^2) + c)`` is the same number and does not."""
    schedule, x0 = NoiseSchedule(torch.tensor([0.9], dtype=torch.float64)), torch.zeros(3, 4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, size)

    terms = PseudoHuberLoss(schedule, width=1.0)(model, x0, t=torch.zeros(3, dtype=torch.int64), eps=x0)
    wanted = 2 * size**2 / (math.sqrt(size**2 + 1) + 1)
    torch.testing.assert_close(terms.total, torch.full((3,), wanted), rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [0, 0.0, -1, float("nan"), float("inf")])
def test_a_bad_width_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match="width"):
        PseudoHuberLoss(ddpm_schedule(), width=width)


def test_objectives_take_the_settings_of_the_robust_one() -> None:
    changed = InvarianceLoss.preset("paper", ddpm_schedule(), strength=0.9, radius=Radius(scale=2))
    assert isinstance(changed, InvarianceLoss)
    assert changed.strength == 0.9
    assert changed.radius == Radius(scale=2)
    with pytest.raises(ValueError, match="strength"):
        InvarianceLoss(ddpm_schedule(), strength=-1)
