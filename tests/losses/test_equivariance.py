"""The robust objective: plain training bit for bit where it is off, no side effects where it is on.

Long, because it holds all that the two losses share: one section per claim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
from robustdiff.losses.denoising import DenoisingLoss, LossOutput
from robustdiff.losses.equivariance import PRESETS, EquivarianceLoss
from robustdiff.losses.perturbation import (
    AdversarialPerturbation,
    Perturbation,
    Radius,
    RandomPerturbation,
    Response,
)
from robustdiff.losses.strength import InverseRadius, SigmaRange
from robustdiff.utils.random import Generators, draw_uniform

PERTURBATIONS: dict[str, Perturbation] = {
    "random": RandomPerturbation(),
    "shift": AdversarialPerturbation(1, "shift"),
    "residual": AdversarialPerturbation(3, "residual"),
}
TERMS = [field.name for field in fields(LossOutput)]


def images(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in [-1, 1], shape (count, 2, 5, 5)."""
    return (torch.rand(count, 2, 5, 5, generator=seeded(1), dtype=torch.float64) * 2 - 1).to(dtype)


def only_finite(terms: LossOutput) -> bool:
    """Whether every number in the terms is finite."""
    return all(bool(torch.isfinite(getattr(terms, name)).all()) for name in TERMS)


# -- the terms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_terms_have_one_finite_number_per_image_and_add_up(perturbation: str) -> None:
    objective = EquivarianceLoss(ddpm_schedule(), PERTURBATIONS[perturbation], strength=0.7)
    terms = objective(SmallNet(), images(dtype=torch.float64), generator=seeded())
    assert all(getattr(terms, name).shape == (6,) for name in TERMS)
    assert only_finite(terms)
    assert (terms.equivariance > 0).all()
    assert torch.equal(terms.strength, torch.full((6,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(terms.total, terms.denoising + 0.7 * terms.equivariance)
    assert not terms.radius.requires_grad
    assert not terms.strength.requires_grad


def test_the_regulariser_is_the_formula_of_the_paper() -> None:
    """``|eps_hat(x') - [eps_hat(x) + omega]|^2`` at x' = a x0 + s (eps + omega), written out."""
    scheduler, model = DDPMScheduler(), SmallNet(dtype=torch.float32)
    x0, eps, t = images(), normal(6, 2, 5, 5, seed=2).float(), torch.tensor([0, 5, 100, 400, 800, 999])
    spy = Spy(AdversarialPerturbation())
    objective = EquivarianceLoss(NoiseSchedule.from_scheduler(scheduler), spy, strength=0.3)
    terms = objective(model, x0, eps=eps, t=t, generator=seeded(1))
    clean = model(scheduler.add_noise(x0, eps, t), t)
    moved = model(scheduler.add_noise(x0, eps + spy.omega, t), t)
    torch.testing.assert_close(terms.denoising, (clean - eps).square().mean((1, 2, 3)))
    torch.testing.assert_close(
        terms.equivariance, (moved - clean - spy.omega).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_plain_loss_is_the_mean_squared_error_of_diffusers_target(prediction: Any) -> None:
    scheduler, model = DDPMScheduler(prediction_type=prediction), SmallNet(dtype=torch.float32)
    x0, generator = images(), seeded(3)
    terms = DenoisingLoss(NoiseSchedule.from_scheduler(scheduler))(model, x0, generator=seeded(3))
    t = (torch.rand(6, generator=generator, dtype=torch.float64) * 1000).long()
    eps = torch.randn(x0.shape, generator=generator)
    target = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, t)}[prediction]
    loss = nn.functional.mse_loss(model(scheduler.add_noise(x0, eps, t), t), target, reduction="none")
    assert torch.equal(terms.t, t)
    assert torch.equal(terms.total, loss.flatten(1).mean(1))
    assert torch.equal(terms.total, terms.denoising)
    for name in ("equivariance", "radius", "strength"):
        assert torch.equal(getattr(terms, name), torch.zeros(6))


def test_timesteps_and_noise_may_be_given() -> None:
    model, x0 = Calls(SmallNet()), images(dtype=torch.float64)
    eps, t = normal(6, 2, 5, 5, seed=9), torch.arange(6) * 100
    terms = EquivarianceLoss(ddpm_schedule(), "random")(model, x0, eps=eps, t=t, generator=seeded())
    assert torch.equal(terms.t, t)
    assert torch.equal(model.seen[0][0], ddpm_schedule().add_noise(x0, eps, t))
    assert torch.equal(model.seen[0][1], t)
    assert torch.equal(model.seen[1][1], t)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_raised_to_float32(half: torch.dtype) -> None:
    x0 = images().to(half)
    terms = EquivarianceLoss(ddpm_schedule())(SmallNet(dtype=torch.float32), x0, generator=seeded())
    wanted = EquivarianceLoss(ddpm_schedule())(SmallNet(dtype=torch.float32), x0.float(), generator=seeded())
    assert terms.total.dtype == torch.float32
    assert torch.equal(terms.total, wanted.total)


def test_a_model_that_returns_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        EquivarianceLoss(ddpm_schedule())(lambda x, t: torch.cat([x, x], 1), images())


# -- where it is off it is plain training, bit for bit ---------------------------------------------


def never(levels: Tensor, radius: Tensor) -> Tensor:
    """A strength that is zero everywhere."""
    return torch.zeros_like(levels)


OFF: dict[str, dict[str, Any]] = {
    "perturbation_none": {"perturbation": "none"},
    "perturbation_None": {"perturbation": None},
    "strength_0": {"strength": 0},
    "strength_0.0": {"strength": 0.0},
    "gate_value_0": {"strength": SigmaRange(0, float("inf"), 0.0)},
    "gate_never_open": {"strength": SigmaRange(1e6, float("inf"), 5.0)},
    "function_0": {"strength": never},
}


@pytest.mark.parametrize("generators", ["one", "per_image", "global"])
@pytest.mark.parametrize("off", OFF)
def test_switched_off_it_equals_the_plain_loss_bit_for_bit_at_plain_cost(off: str, generators: str) -> None:
    results = []
    for objective in (DenoisingLoss(ddpm_schedule()), EquivarianceLoss(ddpm_schedule(), **OFF[off])):
        generator: Generators = {
            "one": seeded(4),
            "per_image": [seeded(i) for i in range(6)],
            "global": None,
        }[generators]
        model = Calls(SmallNet(dtype=torch.float32, norm=True, dropout=0.2))
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            terms = objective(model, images(), generator=generator)
            states = [torch.get_rng_state()]
        if generator is not None:
            states += [g.get_state() for g in (generator if isinstance(generator, Sequence) else [generator])]
        assert len(model.seen) == 1
        results.append((terms, gradients(model, terms.total.mean()), states, list(model.buffers())))
    (plain, plain_gradients, plain_states, plain_buffers), (terms, grads, states, buffers) = results
    for name in TERMS:
        assert torch.equal(getattr(terms, name), getattr(plain, name))
    for got, wanted in zip(grads + states + buffers, plain_gradients + plain_states + plain_buffers, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_with_radius_zero_total_and_gradients_equal_plain_exactly(perturbation: str, prediction: Any) -> None:
    schedule, model = ddpm_schedule(prediction), SmallNet(dtype=torch.float32)
    t = torch.tensor([0, 10, 200, 500, 800, 999])
    terms = EquivarianceLoss(schedule, PERTURBATIONS[perturbation], strength=3.0, radius=Radius(scale=0, floor=0))(
        model, images(), t=t, generator=seeded(6)
    )
    plain = DenoisingLoss(schedule)(model, images(), t=t, generator=seeded(6))
    assert torch.equal(terms.total, plain.total)
    assert torch.equal(terms.equivariance, torch.zeros(6))
    for got, wanted in zip(gradients(model, terms.total.mean()), gradients(model, plain.total.mean()), strict=True):
        assert torch.equal(got, wanted)


def test_the_noise_and_timesteps_drawn_do_not_depend_on_the_perturbation() -> None:
    seen = []
    for perturbation in (None, *PERTURBATIONS.values()):
        model = Calls(SmallNet())
        EquivarianceLoss(ddpm_schedule(), perturbation)(model, images(dtype=torch.float64), generator=seeded(8))
        seen.append(model.seen[0])
    for x_t, t, _ in seen[1:]:
        assert torch.equal(x_t, seen[0][0])
        assert torch.equal(t, seen[0][1])


@pytest.mark.parametrize(("perturbation", "passes"), [("none", 1), ("random", 2), ("adversarial", 3)])
def test_T12_the_number_of_forward_passes(perturbation: str, passes: int) -> None:
    model = Calls(SmallNet())
    EquivarianceLoss(ddpm_schedule(), perturbation)(model, images(dtype=torch.float64), generator=seeded())
    assert len(model.seen) == passes


# -- zero terminal SNR -----------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [2.0, SigmaRange(0.5, float("inf"), 2.0)], ids=["constant", "gate"])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_at_zero_terminal_snr_losses_and_gradients_are_finite(
    prediction: Any, perturbation: str, strength: Any
) -> None:
    schedule = ddpm_schedule(prediction, zero_snr=True, dtype=torch.float32)
    assert schedule.alpha(torch.tensor(999)) == 0
    model, t = SmallNet(dtype=torch.float32), torch.tensor([999, 999, 999, 998, 500, 999])
    spy = Spy(PERTURBATIONS[perturbation])
    terms = EquivarianceLoss(schedule, spy, strength=strength)(model, images(), t=t, generator=seeded())
    assert only_finite(terms)
    assert torch.isfinite(spy.omega).all()
    assert (terms.equivariance > 0).all()
    assert torch.equal(terms.strength, torch.full((6,), 2.0))
    grads = gradients(model, terms.total.mean())
    assert all(torch.isfinite(g).all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


# -- one generator per image -----------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, SigmaRange(0.0, 1.0, 0.5)], ids=["constant", "gate"])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_with_one_generator_per_image_a_row_equals_the_same_image_alone(perturbation: str, strength: Any) -> None:
    objective = EquivarianceLoss(ddpm_schedule(), PERTURBATIONS[perturbation], strength=strength)
    model, x0 = SmallNet(), images(dtype=torch.float64)
    together = objective(model, x0, generator=[seeded(i) for i in range(6)])
    assert (together.strength > 0).sum() > 0
    for i in range(6):
        alone = objective(model, x0[i : i + 1], generator=[seeded(i)])
        assert torch.equal(alone.t, together.t[i : i + 1])
        for name in TERMS:
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[i], rtol=1e-10, atol=1e-14)
    order = [4, 1, 5, 0]
    shuffled = objective(model, x0[order], generator=[seeded(i) for i in order])
    torch.testing.assert_close(shuffled.total, together.total[order], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("strength", [0.5, SigmaRange(0.0, 1.0, 0.5)], ids=["constant", "gate"])
@pytest.mark.parametrize("given", [True, False], ids=["t_and_eps_given", "all_drawn"])
@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_a_wrong_number_of_generators_is_refused(count: int, given: bool, strength: Any) -> None:
    draws = {"t": torch.tensor([1, 1, 1, 900, 900, 900]), "eps": normal(6, 2, 5, 5)} if given else {}
    objective = EquivarianceLoss(ddpm_schedule(), "random", strength=strength)
    with pytest.raises(ValueError, match="generators"):
        objective(SmallNet(), images(dtype=torch.float64), generator=[seeded(i) for i in range(count)], **draws)


# -- the inner step leaves no trace ----------------------------------------------------------------


class Replay:
    """Returns a stored omega and draws what the recorded attack drew, without any ``respond``."""

    def __init__(self, omega: Tensor) -> None:
        self.omega = omega

    def __call__(
        self, respond: Callable[[Tensor], Response], radius: Tensor, like: Tensor, generator: Generators = None
    ) -> Tensor:
        """The stored omega."""
        draw_uniform(like, generator)
        return self.omega


@pytest.mark.parametrize("generator_seed", [None, 3], ids=["global_stream", "generator"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attack", ["shift", "residual"])
def test_the_inner_step_leaves_everything_as_if_it_had_not_run(
    attack: str, training: bool, generator_seed: int | None
) -> None:
    """Weights' .grad, batch-norm statistics, dropout masks, random streams, modes and the loss itself."""
    model = SmallNet(dtype=torch.float32, norm=True, dropout=0.3).train(training)
    model.first.weight.grad = torch.ones_like(model.first.weight)
    spy = Spy(PERTURBATIONS[attack])
    results = []
    for kind in ("attack", "replay"):
        network, perturbation = copy.deepcopy(model), spy if kind == "attack" else Replay(spy.omega)
        network.first.weight.grad = torch.ones_like(model.first.weight)
        generator = None if generator_seed is None else seeded(generator_seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            terms = EquivarianceLoss(ddpm_schedule(), perturbation)(network, images(), generator=generator)
            stream = torch.get_rng_state()
        assert torch.equal(network.first.weight.grad, torch.ones_like(model.first.weight))
        assert all(p.grad is None for n, p in network.named_parameters() if n != "first.weight")
        assert all(module.training == training for module in network.modules())
        assert all(p.requires_grad for p in network.parameters())
        state = [stream] if generator is None else [stream, generator.get_state()]
        loss = [getattr(terms, name) for name in TERMS]
        results.append(state + loss + list(network.buffers()) + gradients(network, terms.total.mean()))
        if training:
            assert isinstance(network.norm, nn.BatchNorm2d)
            assert network.norm.num_batches_tracked == 2  # the clean pass and the penalised one
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_batch_norm_statistics_are_those_of_the_clean_and_the_penalised_pass() -> None:
    model, reference = (SmallNet(dtype=torch.float32, norm=True) for _ in range(2))
    calls = Calls(model)
    EquivarianceLoss(ddpm_schedule(), AdversarialPerturbation(4))(calls, images(), generator=seeded(1))
    assert len(calls.seen) == 6
    for x, t, _ in (calls.seen[0], calls.seen[-1]):
        reference(x, t)
    for got, wanted in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(got, wanted)


class BackwardCalls(TorchDispatchMode):
    """Keeps the output mask (input, weight, bias) of every convolution's backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record and run."""
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_inner_step_computes_no_weight_gradient(steps: int) -> None:
    model = SmallNet(dtype=torch.float32)
    with BackwardCalls() as inner:
        terms = EquivarianceLoss(ddpm_schedule(), AdversarialPerturbation(steps))(model, images(), generator=seeded())
    assert inner.masks == [[True, False, False]] * (2 * steps)  # two convolutions
    with BackwardCalls() as outer:
        terms.total.mean().backward()
    assert len(outer.masks) == 4
    assert all(mask[1:] == [True, True] for mask in outer.masks)


def test_weight_hooks_are_not_called_by_the_inner_step() -> None:
    model, calls = SmallNet(dtype=torch.float32), []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: calls.append(gradient.shape))
    terms = EquivarianceLoss(ddpm_schedule(), AdversarialPerturbation(3))(model, images(), generator=seeded())
    assert calls == []
    terms.total.mean().backward()
    assert len(calls) == 6


def test_a_perturbation_that_raises_still_leaves_the_buffers_as_they_were() -> None:
    class Failing:
        def __call__(self, respond: Any, radius: Tensor, like: Tensor, generator: Generators = None) -> Tensor:
            respond(torch.zeros_like(like))
            raise RuntimeError("on purpose")

    model, reference = (SmallNet(dtype=torch.float32, norm=True) for _ in range(2))
    calls = Calls(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        EquivarianceLoss(ddpm_schedule(), Failing())(calls, images(), generator=seeded())
    reference(*calls.seen[0][:2])
    for got, wanted in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("strength", [0.5, SigmaRange(0, 1.0, 0.5)], ids=["constant", "gate"])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_no_input_is_mutated(perturbation: str, strength: Any) -> None:
    def model(x: Tensor, t: Tensor, extra: dict[str, Any], label: Tensor) -> Tensor:
        return net(x, t) * extra["scale"][0] + label[:, None, None, None]

    net = SmallNet(dtype=torch.float32)
    given = {
        "x0": images(),
        "eps": normal(6, 2, 5, 5).float(),
        "t": torch.tensor([0, 100, 200, 600, 800, 999]),
        "extra": {"scale": [torch.rand(6, 1, 1, 1, generator=seeded())]},
        "label": torch.arange(6),
    }
    kept = copy.deepcopy(given)
    objective = EquivarianceLoss(ddpm_schedule(), PERTURBATIONS[perturbation], strength=strength)
    objective(model, generator=seeded(), **given).total.mean().backward()
    for name in ("x0", "eps", "t", "label"):
        assert torch.equal(given[name], kept[name])
        assert not given[name].requires_grad
    assert torch.equal(given["extra"]["scale"][0], kept["extra"]["scale"][0])


# -- gates and extra model arguments ---------------------------------------------------------------

MIXED_T = torch.tensor([999, 10, 800, 90, 30, 900])  # at 10, 90 and 30 sigma/alpha is below .5
INSIDE = [1, 3, 4]


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_gate_is_its_value_between_its_ends_and_zero_outside(perturbation: str) -> None:
    levels = torch.tensor([0.05, 0.1, 0.3, 1.0, 1.01, 50.0])
    assert SigmaRange(0.1, 1.0, 2.5)(levels, levels).tolist() == [0, 2.5, 2.5, 2.5, 0, 0]
    terms = EquivarianceLoss(
        schedule_at(levels),
        PERTURBATIONS[perturbation],
        strength=SigmaRange(0.09, 1.005, 2.5),
        radius=Radius(random=False),
    )(SmallNet(), images(dtype=torch.float64), t=torch.arange(6), generator=seeded())
    assert terms.strength.tolist() == [0, 2.5, 2.5, 2.5, 0, 0]
    for name in ("equivariance", "radius"):
        assert (getattr(terms, name) > 0).tolist() == [False, True, True, True, False, False]
    assert torch.equal(terms.total[[0, 4, 5]], terms.denoising[[0, 4, 5]])


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_only_images_inside_the_gate_take_the_perturbed_passes(perturbation: str) -> None:
    model = Calls(SmallNet())
    objective = EquivarianceLoss(ddpm_schedule(), PERTURBATIONS[perturbation], strength=SigmaRange(0, 0.5, 2.0))
    objective(model, images(dtype=torch.float64), t=MIXED_T, generator=seeded())
    assert model.seen[0][0].shape[0] == 6
    assert len(model.seen) > 1
    for x, t, _ in model.seen[1:]:
        assert x.shape[0] == 3
        assert torch.equal(t, MIXED_T[INSIDE])


def test_a_gated_objective_equals_an_ungated_one_with_the_same_omega() -> None:
    omega, model, x0, eps = (
        0.2 * normal(6, 2, 5, 5, seed=4),
        SmallNet(),
        images(dtype=torch.float64),
        normal(6, 2, 5, 5),
    )
    gated = EquivarianceLoss(ddpm_schedule(), Given(omega[INSIDE]), strength=SigmaRange(0, 0.5, 2.0))
    everywhere = EquivarianceLoss(ddpm_schedule(), Given(omega), strength=2.0)
    got, wanted = (o(model, x0, t=MIXED_T, eps=eps, generator=seeded()) for o in (gated, everywhere))
    torch.testing.assert_close(got.equivariance[INSIDE], wanted.equivariance[INSIDE])
    torch.testing.assert_close(got.total[INSIDE], wanted.total[INSIDE])
    torch.testing.assert_close(got.denoising, wanted.denoising)
    for a, b in zip(
        gradients(model, got.total[INSIDE].sum()), gradients(model, wanted.total[INSIDE].sum()), strict=True
    ):
        torch.testing.assert_close(a, b)


class RowChecking(nn.Module):
    """Fails unless every argument, however nested, belongs to the same image as the row of x."""

    def forward(self, x: Tensor, t: Tensor, ident: Tensor, nested: dict[str, Any], shared: Tensor, name: str) -> Tensor:
        """``ident``, and the tensors in ``nested``, name the image; the image says it in its own first pixel."""
        rows = (t // 10).long()
        assert torch.equal(ident, rows)
        assert torch.equal(nested["list"][0][:, 0], rows)
        assert torch.equal(nested["tuple"][1], rows)
        assert torch.equal(nested["deep"]["deeper"][0]["deepest"], rows)
        assert nested["nothing"] is None
        assert nested["number"] == 3
        assert shared.shape == (7,)
        assert name == "same for all"
        return 0.5 * x


@pytest.mark.parametrize("strength", [0.5, SigmaRange(0.0, 0.017, 0.5)], ids=["constant", "gate"])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_extra_model_arguments_are_passed_through_and_sliced_with_their_images(
    perturbation: str, strength: Any
) -> None:
    ident = torch.tensor([4, 0, 5, 1, 3, 2])
    arguments = {
        "ident": ident,
        "nested": {
            "list": [ident[:, None].repeat(1, 3)],
            "tuple": (1, ident),
            "deep": {"deeper": [{"deepest": ident}]},
            "nothing": None,
            "number": 3,
        },
        "shared": torch.zeros(7),
        "name": "same for all",
    }
    schedule = schedule_at(torch.linspace(0.01, 0.03, 60))  # t = 10 ident, so the gate lets 0, 1 and 2 through
    model = Calls(RowChecking())
    objective = EquivarianceLoss(schedule, PERTURBATIONS[perturbation], strength=strength)
    terms = objective(model, images(dtype=torch.float64), t=10 * ident, generator=seeded(), **arguments)
    inside = 6 if strength == 0.5 else 3
    assert model.seen[-1][0].shape[0] == inside
    assert (terms.strength > 0).sum() == inside


def test_a_named_tuple_of_model_arguments_is_sliced_too() -> None:
    def model(x: Tensor, t: Tensor, pair: Response) -> Tensor:
        return x * pair.shift[:, None, None, None] + pair.residual[:, None, None, None]

    objective = EquivarianceLoss(ddpm_schedule(), "random", strength=SigmaRange(0, 0.5, 1.0))
    pair = Response(torch.rand(6, generator=seeded()).double(), torch.rand(6, generator=seeded(1)).double())
    terms = objective(model, images(dtype=torch.float64), t=MIXED_T, generator=seeded(), pair=pair)
    assert torch.isfinite(terms.total).all()


def test_a_strength_function_sees_noise_levels_and_must_return_one_number_per_image() -> None:
    seen = []

    def strength(levels: Tensor, radius: Tensor) -> Tensor:
        seen.append(levels)
        return levels.clamp(max=2)

    schedule = ddpm_schedule()
    terms = EquivarianceLoss(schedule, "random", strength=strength)(
        SmallNet(), images(dtype=torch.float64), t=MIXED_T, generator=seeded()
    )
    level = (1 / schedule.alphas_cumprod[MIXED_T] - 1).sqrt()
    torch.testing.assert_close(seen[0], level)
    torch.testing.assert_close(terms.strength, level.clamp(max=2))
    torch.testing.assert_close(terms.total, terms.denoising + level.clamp(max=2) * terms.equivariance)
    with pytest.raises(ValueError, match="shape"):
        EquivarianceLoss(schedule, "random", strength=lambda levels, radius: levels[:1])(
            SmallNet(), images(dtype=torch.float64)
        )


@pytest.mark.parametrize(
    ("radius", "what"), [(lambda sigma, _: sigma[:1], "shape"), (lambda sigma, _: -sigma, "negative")]
)
def test_a_bad_radius_from_a_function_is_refused(radius: Any, what: str) -> None:
    objective = EquivarianceLoss(ddpm_schedule(), "random", radius=radius)
    with pytest.raises(ValueError, match=f"radius.*{what}"):
        objective(SmallNet(), images(dtype=torch.float64), generator=seeded())


@pytest.mark.parametrize(
    ("x0", "draws", "what"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), {}, "floating point"),
        (torch.zeros(2, 1, 4, 4), {"t": torch.tensor(3)}, "t must have shape"),
        (torch.zeros(2, 1, 4, 4), {"eps": torch.zeros(1, 1, 4, 4)}, "eps must have the shape"),
    ],
)
def test_inputs_that_would_be_broadcast_or_misread_are_refused(x0: Tensor, draws: dict[str, Tensor], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        EquivarianceLoss(ddpm_schedule(), "random")(SmallNet(), x0, **draws)


def test_an_infinite_strength_is_refused() -> None:
    with pytest.raises(ValueError, match="strength must be a finite number"):
        EquivarianceLoss(ddpm_schedule(), "random", strength=float("inf"))


def test_a_strength_function_sees_the_radius_of_each_image() -> None:
    schedule, box = ddpm_schedule(), Radius(exponent=0, units="state")
    objective = EquivarianceLoss(schedule, "random", lambda levels, radius: levels / radius, box, normalise=False)
    terms = objective(SmallNet(), images(dtype=torch.float64), t=MIXED_T, generator=seeded())
    level = (1 / schedule.alphas_cumprod[MIXED_T] - 1).sqrt()
    torch.testing.assert_close(terms.strength, level / terms.radius)
    scaled = terms.radius * schedule.sigma(MIXED_T)
    assert bool(((scaled > 8 / 255) & (scaled < 1 + 8 / 255)).all())  # in units of the state
    assert scaled.std() > 0.05
    for strength in (lambda levels: levels, lambda: 1.0):
        with pytest.raises(ValueError, match="takes the noise levels sigma/alpha and the radius"):
            EquivarianceLoss(schedule, "random", strength)
    for strength in ("0.3", None):
        with pytest.raises(ValueError, match="strength must be a finite number"):
            EquivarianceLoss(schedule, "random", strength)
    with pytest.raises(ValueError, match="a radius function takes the noise scales sigma, and a generator"):
        EquivarianceLoss(schedule, "random", radius=lambda sigma: sigma)
    with pytest.raises(ValueError, match="the strength function returned float, not a tensor"):
        EquivarianceLoss(schedule, "random", lambda levels, radius: 1.0)(SmallNet(), images(dtype=torch.float64))
    with pytest.raises(ValueError, match="normalise needs a Radius"):
        EquivarianceLoss(schedule, "random", radius=lambda sigma, generator: sigma, normalise=True)


def test_a_strength_that_only_some_radii_have_is_given_to_them() -> None:
    x0, t = images(dtype=torch.float64), torch.full((6,), 500)

    def large(levels: Tensor, radius: Tensor) -> Tensor:
        return (radius > 0.9).to(levels.dtype)

    box = Radius(exponent=0)
    terms = EquivarianceLoss(ddpm_schedule(), "random", large, box)(SmallNet(), x0, t=t, generator=seeded(3))
    assert torch.equal(terms.strength > 0, terms.radius > 0.9)
    always = EquivarianceLoss(
        ddpm_schedule(), "random", large, radius=lambda sigma, generator: torch.full_like(sigma, 5)
    )
    assert bool((always(SmallNet(), x0, t=t, generator=seeded()).strength == 1).all())


def test_a_negative_strength_from_a_function_is_refused() -> None:
    objective = EquivarianceLoss(ddpm_schedule(), "random", strength=lambda levels, radius: -torch.ones_like(levels))
    with pytest.raises(ValueError, match="strength"):
        objective(SmallNet(), images(dtype=torch.float64), generator=seeded())


# -- real networks, mixed precision, compilation ---------------------------------------------------


def tiny_unet(**settings: Any) -> UNet2DModel:
    """A U-Net of two levels for (B, 2, 8, 8)."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
            **settings,
        )


@pytest.mark.parametrize("strength", [0.5, SigmaRange(0, 0.5, 0.5)], ids=["constant", "gate"])
def test_a_class_conditional_unet_trains(strength: Any) -> None:
    model = tiny_unet(num_class_embeds=10)
    x0 = normal(6, 2, 8, 8).float().clamp(-1, 1)
    objective = EquivarianceLoss(ddpm_schedule(dtype=torch.float32), strength=strength)
    labels = torch.tensor([9, 0, 3, 3, 7, 1])
    terms = objective(model, x0, t=MIXED_T, generator=seeded(), class_labels=labels)
    other = objective(model, x0, t=MIXED_T, generator=seeded(), class_labels=labels.flip(0))
    assert only_finite(terms)
    assert not torch.equal(terms.equivariance, other.equivariance)
    assert all(torch.isfinite(g).all() for g in gradients(model, terms.total.mean()))


@pytest.mark.parametrize("strength", [0.5, SigmaRange(0, 0.5, 0.5)], ids=["constant", "gate"])
def test_a_text_conditional_unet_with_v_prediction_trains(strength: Any) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    objective = EquivarianceLoss(NoiseSchedule.from_scheduler(scheduler), strength=strength)
    text = normal(6, 3, 12, seed=2).float()
    x0 = normal(6, 2, 8, 8).float().clamp(-1, 1)
    terms = objective(model, x0, t=MIXED_T, generator=seeded(), encoder_hidden_states=text)
    assert only_finite(terms)
    assert (terms.equivariance > 0).sum() == (6 if strength == 0.5 else 3)
    assert all(torch.isfinite(g).all() for g in gradients(model, terms.total.mean()))


def test_gradient_checkpointing_changes_nothing() -> None:
    x0, results = normal(4, 2, 8, 8).float().clamp(-1, 1), []
    for checkpointed in (False, True):
        model = tiny_unet().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        terms = EquivarianceLoss(ddpm_schedule(dtype=torch.float32))(model, x0, generator=seeded(1))
        results.append([terms.total, *gradients(model, terms.total.mean())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_under_bfloat16_autocast_losses_are_float32_and_close(perturbation: str) -> None:
    model = SmallNet(dtype=torch.float32)
    objective = EquivarianceLoss(
        ddpm_schedule(dtype=torch.float32), PERTURBATIONS[perturbation], radius=Radius(floor=0.5)
    )
    wanted = objective(model, images(), t=MIXED_T, generator=seeded(2))
    calls = Calls(model)
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = objective(calls, images(), t=MIXED_T, generator=seeded(2))
    assert set(outputs) == {torch.bfloat16}
    assert all(x.dtype == torch.float32 for x, _, _ in calls.seen)
    for name in ("total", "denoising", "equivariance", "radius", "strength"):
        assert getattr(terms, name).dtype == torch.float32
    torch.testing.assert_close(terms.denoising, wanted.denoising, rtol=0.05, atol=0.02)
    torch.testing.assert_close(terms.equivariance, wanted.equivariance, rtol=0.1, atol=0.02)
    terms.total.mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("gradient", ["both", "perturbed", "clean"])
def test_outputs_in_bfloat16_are_subtracted_in_float32(gradient: Any) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return (1.7 * x).to(torch.bfloat16)

    x0, eps, omega = images(), normal(6, 2, 5, 5).float(), normal(6, 2, 5, 5, seed=4).float()
    schedule = ddpm_schedule(dtype=torch.float32)
    terms = EquivarianceLoss(schedule, Given(omega), gradient=gradient)(model, x0, eps=eps, t=MIXED_T)
    x_t = schedule.add_noise(x0, eps, MIXED_T)
    clean, moved = model(x_t, MIXED_T).float(), model(schedule.perturb(x_t, omega, MIXED_T), MIXED_T).float()
    wanted = (moved - clean - omega).square().mean((1, 2, 3))
    torch.testing.assert_close(terms.equivariance, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_gives_the_same_terms_gradients_and_buffers(backend: str) -> None:
    results = []
    for compiled in (False, True):
        network = SmallNet(dtype=torch.float32, norm=True)
        model = torch.compile(network, backend=backend) if compiled else network
        terms = EquivarianceLoss(ddpm_schedule(dtype=torch.float32))(model, images(), generator=seeded(1))
        results.append([terms.total, terms.equivariance, *gradients(network, terms.total.mean()), *network.buffers()])
        assert all(p.grad is None for p in network.parameters())
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


# -- settings --------------------------------------------------------------------------------------


def test_the_presets_of_the_paper_are_its_readings() -> None:
    schedule = ddpm_schedule()
    state, noise = Radius(0.0, 1.0, 8 / 255, True, "state"), Radius(2.0, 1.0, 8 / 255, True, "noise")
    adversarial = AdversarialPerturbation(1, "shift")
    readings = {
        "paper": EquivarianceLoss(schedule, adversarial, 0.3, state, normalise=True),
        "paper-random": EquivarianceLoss(schedule, RandomPerturbation("uniform"), 0.3, state, normalise=True),
        "paper-noise": EquivarianceLoss(schedule, adversarial, 0.3, noise, normalise=False),
        "paper-scaled": EquivarianceLoss(schedule, adversarial, InverseRadius(0.3, 1.0), noise, normalise=False),
    }
    for name, reading in readings.items():
        assert EquivarianceLoss.preset(name, schedule) == reading


def test_the_preset_fast_is_paper_at_low_noise_levels_and_costs_at_most_a_quarter() -> None:
    for beta_schedule in ("linear", "squaredcos_cap_v2"):
        schedule = NoiseSchedule.from_scheduler(DDPMScheduler(beta_schedule=beta_schedule))
        fast, full = (EquivarianceLoss.preset(name, schedule) for name in ("fast", "paper"))
        assert (fast.perturbation, fast.radius, fast.normalise) == (full.perturbation, full.radius, full.normalise)
        count = 400
        t = torch.linspace(0, 999, count).long()
        terms = fast(SmallNet(), normal(count, 2, 5, 5), t=t, generator=seeded())
        inside = schedule.noise_to_signal(t) <= fast.strength.high
        assert torch.equal(terms.strength > 0, inside)
        assert bool((terms.strength[inside] == full.strength).all())
        assert 0 < 5 / 3 * inside.double().mean() <= 0.25  # one adversarial step costs 5 / 3 of a plain one
    assert EquivarianceLoss.preset("paper", schedule, strength=0.5).strength == 0.5
    assert "paper" in PRESETS


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"strength": -0.1}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"perturbation": "fgsm"}, "fgsm"),
        ({"gradient": "none"}, "gradient"),
        ({"target": "eps"}, "target"),
        ({"target": "noise", "gradient": "clean"}, "target"),
    ],
    ids=str,
)
def test_bad_settings_of_the_objective_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EquivarianceLoss(ddpm_schedule(), **settings)


@pytest.mark.parametrize(
    ("low", "high", "value"),
    [
        (-0.1, 1, 1),
        (2, 1, 1),
        (0, 1, -1),
        (float("nan"), 1, 1),
        (0, float("nan"), 1),
        (0, 1, float("nan")),
        (0, 1, float("inf")),
    ],
)
def test_bad_gates_are_refused(low: float, high: float, value: float) -> None:
    with pytest.raises(ValueError, match="SigmaRange"):
        SigmaRange(low, high, value)


def test_an_unknown_preset_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="papre"):
        EquivarianceLoss.preset("papre", ddpm_schedule())


def test_a_radius_that_is_a_number_is_refused_with_the_constant_one() -> None:
    with pytest.raises(ValueError, match=r"radius must be a Radius or a function, got 0\.1: Radius\(exponent=0"):
        EquivarianceLoss(ddpm_schedule(), radius=0.1)
