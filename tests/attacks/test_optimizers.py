"""Attacks against closed forms and other implementations: the sampler, the balls, the objectives, the optimisers.

Long, because samplers, goals, constraints and optimisers are tested on the same few cases.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from experiments.paper import linear
from helpers import TINY_UNET, normal, seeded
from linear_networks import PROCESS, VARIANCES, Linear, linear_trajectory, network_objective, points, random_network
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import (
    CallableGoal,
    FinalImageShift,
    NoGradient,
    NoisePredictionShift,
    evaluate,
    value_and_gradient,
)
from robustdiff.attacks.optimizers import APGD, PGD, RandomSearch
from robustdiff.diffusion.pipeline import SamplerStep, sample, trajectory_of
from robustdiff.diffusion.samplers import DifferentiableSampler, frozen, trailing
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.utils.random import image_generators


def tiny_pipeline(prediction: str = "epsilon", **scheduler) -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **TINY_UNET)
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100, prediction_type=prediction, **scheduler))


# -- the sampler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("settings", [{}, {"clip_sample": False, "variance_type": "fixed_large"}])
def test_the_trajectory_is_the_stock_sampler_pushed_through_its_step_callback(name, prediction, settings) -> None:
    pipeline = tiny_pipeline(prediction, **settings)
    trajectory, attacked = trajectory_of(pipeline, name, 10), [0, 4, 9]
    omega = 0.5 * normal(2, 3, 1, 8, 8, seed=3).float()

    def push(step: SamplerStep) -> Tensor | None:
        if step.index not in attacked:
            return None
        sigma = trajectory.sigmas([step.index], step.x_t)
        return step.x_t + sigma * omega[step.images[0] :, attacked.index(step.index)][: len(step.images)]

    for callback, pushes in ((None, None), (push, omega)):
        stock = sample(pipeline, 2, seed=7, scheduler=name, steps=10, callback=callback)
        generators = image_generators(7, range(2))
        x = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators])
        noise = trajectory.draw_noise(x, generators)
        with torch.no_grad():
            ours = trajectory.run(x, pushes, attacked if callback else (), noise=noise)
        assert (ours - stock).abs().max() < 2e-5


def test_timesteps_are_those_of_trailing_schedulers() -> None:
    for steps in (1, 3, 7, 50, 1000):
        scheduler = DDPMScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        assert trailing(1000, steps) == scheduler.timesteps.tolist()


def test_a_run_in_two_parts_is_a_run() -> None:
    trajectory, x = linear_trajectory(sampler="ddpm"), points()
    noise = trajectory.draw_noise(x, seeded(3))
    half = trajectory.run(x, last=8, noise=noise)
    assert torch.equal(trajectory.run(half, first=8, noise=noise), trajectory.run(x, noise=noise))


def test_noise_is_drawn_per_image_and_must_be_given() -> None:
    trajectory, x = linear_trajectory(sampler="ddpm"), points(2)
    together = trajectory.draw_noise(x, image_generators(0, range(2)))
    alone = trajectory.draw_noise(x[1:], image_generators(1, range(1)))
    assert all(torch.equal(a[1:], b) for a, b in zip(together, alone, strict=True))
    assert trajectory.stochastic
    assert not linear_trajectory().stochastic
    with pytest.raises(ValueError, match="draws noise, and none was given"):
        trajectory.run(x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("euler", 10), "not one of ddim, ddpm"),
        (("ddim", 0), "must be in 1"),
        (("ddim", 1001), "must be in 1"),
        (("ddim", [5, 5]), "must fall"),
        (("ddim", [1000, 5]), "must fall"),
        (("ddim", []), "must fall"),
    ],
)
def test_samplers_that_do_not_exist_are_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        DifferentiableSampler.of(Linear(), PROCESS, *arguments)


def test_steps_that_are_not_run_cannot_be_attacked() -> None:
    trajectory, x = linear_trajectory(), points()
    for attacked in ([20], [-1], [3, 3]):
        with pytest.raises(ValueError, match="not each once"):
            trajectory.run(x, torch.zeros(3, len(attacked), 5).double(), attacked)


def test_weights_are_left_as_they_were() -> None:
    model = random_network()
    model.first.weight.requires_grad_(False)
    model.train()
    model.hidden.eval()
    before = [(p.requires_grad, p.clone()) for p in model.parameters()]
    trajectory = DifferentiableSampler.of(model, PROCESS, "ddim", 5)
    objective = FinalImageShift(trajectory, normal(2, 3).float(), [0, 1])
    PGD(3)(objective, LpBall("linf", 0.1), objective.like, seeded())
    assert all(
        p.requires_grad == flag and torch.equal(p, old)
        for p, (flag, old) in zip(model.parameters(), before, strict=True)
    )
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not model.hidden.training
    with frozen([model]):
        assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(KeyError), frozen([model]):
        raise KeyError
    assert model.last.weight.requires_grad


# -- closed forms ------------------------------------------------------------------------------------


EVERYWHERE = (list(range(20)), [0.1] * 20)


@pytest.mark.parametrize(
    ("prediction", "attacked", "radii"),
    [
        ("epsilon", [0], [0.1]),
        ("epsilon", [7], [0.5]),
        ("epsilon", [19], [0.3]),
        ("epsilon", [0, 5, 10, 15], [0.2, 0.1, 0.05, 0.4]),
        ("v_prediction", *EVERYWHERE),
        ("sample", *EVERYWHERE),
    ],
)
@pytest.mark.parametrize("attack", [PGD(15), APGD(15)], ids=["pgd", "apgd"])
def test_T10_the_attack_reaches_the_largest_displacement_of_a_linear_sampler(attack, attacked, radii, prediction):
    trajectory = linear_trajectory(prediction=prediction)
    times = torch.tensor([step.t for step in trajectory.steps])
    alpha_bar = torch.cat([PROCESS.alphas_cumprod.double()[times], torch.ones(1).double()])
    gains = linear.ddim_gains(alpha_bar, linear.optimum(alpha_bar[:-1], VARIANCES))
    bounds = torch.zeros(20).double()
    bounds[attacked] = torch.tensor(radii).double() * (1 - alpha_bar[attacked]).sqrt()
    truth = linear.largest_displacement(gains, bounds)
    objective = FinalImageShift(trajectory, points(), attacked)
    found = attack(objective, LpBall("linf", torch.tensor(radii).double()), objective.like, seeded())
    assert found.value.sqrt() == pytest.approx(truth, rel=1e-4)
    assert (found.value.sqrt() <= truth * (1 + 1e-6)).all()


@pytest.mark.parametrize("attack", [PGD(60, step_size=2.0), APGD(60)], ids=["pgd", "apgd"])
def test_in_the_euclidean_ball_it_is_the_largest_gain(attack) -> None:
    """One step attacked: radius times s_k times the largest product of the remaining gains."""
    trajectory = linear_trajectory()
    times = torch.tensor([step.t for step in trajectory.steps])
    alpha_bar = torch.cat([PROCESS.alphas_cumprod.double()[times], torch.ones(1).double()])
    gains = linear.ddim_gains(alpha_bar, linear.optimum(alpha_bar[:-1], VARIANCES))
    truth = 0.3 * float((1 - alpha_bar[4]).sqrt()) * float(gains[4:].prod(0).abs().max())
    objective = FinalImageShift(trajectory, points(), [4])
    found = attack(objective, LpBall("l2", 0.3), objective.like, seeded())
    assert found.value.sqrt() == pytest.approx(truth, rel=1e-4)


def test_T10_shrinking_looks_like_robustness_until_it_is_normalised() -> None:
    absolute, relative = [], []
    for m in (0.0, 2.0):
        trajectory = linear_trajectory(steps=50, m=m)
        objective = FinalImageShift(trajectory, points(1), [10])
        moved = PGD(5)(objective, LpBall("linf", 0.5), objective.like, seeded()).value.sqrt()
        with torch.no_grad():
            spread = trajectory.run(torch.eye(5).double()).diagonal().norm()
        absolute.append(float(moved))
        relative.append(float(moved / spread))
    assert absolute[1] < 0.8 * absolute[0]
    assert relative[1] > relative[0]


def test_the_expectation_over_noise_of_a_linear_sampler_is_that_of_one_draw() -> None:
    """A linear ancestral sampler moves by the same amount whatever its noise: one term, five, fixed or fresh."""
    trajectory, x = linear_trajectory(10, sampler="ddpm"), points()
    fixed = [trajectory.draw_noise(x, seeded(i), first=3) for i in range(5)]
    generator = seeded(9)
    fresh = FinalImageShift(
        trajectory, x, [3, 8], lambda term: trajectory.draw_noise(x, generator, first=3), 2, fresh=True
    )
    objectives = [FinalImageShift(trajectory, x, [3, 8], fixed.__getitem__, terms) for terms in (1, 5)]
    values = [PGD(6)(o, LpBall("linf", 0.1), o.like, seeded()).value for o in (*objectives, fresh)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[2] == pytest.approx(values[0], rel=1e-6)


def test_towards_a_target_within_reach_the_image_gets_there() -> None:
    trajectory, x = linear_trajectory(10), points()
    secret = LpBall("linf", 0.2).draw(FinalImageShift(trajectory, x, [0, 6]).like, seeded(5)) / 2
    with torch.no_grad():
        target = trajectory.run(x, secret, [0, 6])
        away = (trajectory.run(x) - target).square().sum(1)
    objective = FinalImageShift(trajectory, x, [0, 6], target=target)
    found = APGD(60)(objective, LpBall("linf", 0.2), objective.like, seeded())
    assert (-found.value < 0.01 * away).all()


@pytest.mark.parametrize("inner", ["shift", "residual"])
def test_one_step_objectives_reach_their_closed_form(inner) -> None:
    """shift: W s omega; residual: (W s - 1) omega; each element as far as the box lets it."""
    trajectory, x, attacked = linear_trajectory(), points(), [2, 11]
    with torch.no_grad():
        states = [trajectory.run(x, last=k) for k in attacked]
    objective = NoisePredictionShift(trajectory, states, attacked, inner)
    found = PGD(20)(objective, LpBall("linf", 0.3), objective.like, seeded())
    truth = 0.0
    for k in attacked:
        t = torch.tensor(trajectory.steps[k].t)
        factor = trajectory.model.weight[t].detach() * PROCESS.sigma(t) - (1 if inner == "residual" else 0)
        truth += float((0.3 * factor).square().sum()) / 2
    assert found.value == pytest.approx(truth, rel=1e-6)


# -- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("terms", [1, 3])
def test_checkpointed_gradients_are_plain_ones(sampler, terms) -> None:
    trajectory, x = DifferentiableSampler.of(random_network().double(), PROCESS, sampler, 8), normal(4, 3).double()
    noises = [trajectory.draw_noise(x, seeded(i)) for i in range(terms)]
    omega = 0.1 * normal(4, 2, 3, seed=2).double()
    plain, cheap = (
        FinalImageShift(trajectory, x, [1, 4], noises.__getitem__, terms, checkpointed=flag) for flag in (False, True)
    )
    (a, b), (c, d) = (value_and_gradient(one, omega) for one in (plain, cheap))
    assert torch.allclose(a, c, rtol=1e-12)
    assert torch.allclose(b, d, rtol=1e-10)
    assert b.abs().min() > 0


def test_checkpointing_keeps_the_graph_of_one_network_call_only() -> None:
    """Bytes that autograd keeps: with checkpoints one state per step, without them every activation of every step."""

    def kept(steps: int, checkpointed: bool) -> int:
        objective = network_objective(steps, checkpointed=checkpointed)
        omega = (0.1 * normal(6, 2, 3, seed=2).double()).requires_grad_()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            objective(omega, 0)
        return sum(sizes)

    state = 6 * 3 * 8
    assert kept(40, True) - kept(20, True) <= 20 * 2 * state
    assert kept(40, False) - kept(20, False) > 20 * 20 * state


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_memory_of_a_step_is_what_the_whole_graph_keeps_of_it(sampler: str) -> None:
    def kept(steps: int) -> tuple[int, DifferentiableSampler]:
        trajectory, x = (
            DifferentiableSampler.of(random_network().double(), PROCESS, sampler, steps),
            normal(6, 3).double(),
        )
        weights = {p.untyped_storage().data_ptr() for model in trajectory.modules for p in model.parameters()}
        held: dict[int, Tensor] = {}  # alive, so that no address is used twice
        with (
            frozen(trajectory.modules),
            torch.autograd.graph.saved_tensors_hooks(
                lambda one: held.setdefault(one.untyped_storage().data_ptr(), one), lambda one: one
            ),
        ):
            noise = trajectory.draw_noise(x, seeded(0))
            trajectory.run(x, torch.zeros(6, 1, 3).double().requires_grad_(), [0], noise=noise)
        return sum(one.untyped_storage().nbytes() for at, one in held.items() if at not in weights), trajectory

    (few, _), (many, trajectory) = kept(10), kept(20)
    x = normal(6, 3).double()
    assert many - few == pytest.approx(10 * trajectory.graph_bytes(x, 3), rel=0.05)
    assert trajectory.graph_bytes(x[:2], 3) == pytest.approx(trajectory.graph_bytes(x, 3) / 3, rel=0.2)
    assert all(p.requires_grad for model in trajectory.modules for p in model.parameters())


@pytest.mark.parametrize("target", [None, 0.3])
def test_gradients_are_those_of_finite_differences(target) -> None:
    objective = network_objective(target=None if target is None else torch.full((6, 3), target).double())
    omega, h = 0.3 * normal(6, 2, 3, seed=2).double(), 1e-5
    _, gradient = value_and_gradient(objective, omega)
    for seed in range(3):
        way = normal(6, 2, 3, seed=10 + seed).double()
        slope = (evaluate(objective, omega + h * way) - evaluate(objective, omega - h * way)) / (2 * h)
        assert slope == pytest.approx((gradient * way).sum((1, 2)), rel=1e-5)


def test_no_image_depends_on_its_neighbours() -> None:
    trajectory = DifferentiableSampler.of(random_network().double(), PROCESS, "ddim", 6)
    x = normal(4, 3, seed=1).double()
    for attack in (PGD(5, restarts=2, momentum=0.9), APGD(8), RandomSearch(3)):
        together, alone = (
            attack(objective, LpBall("l2", 0.2), objective.like, generators).omega
            for objective, generators in (
                (FinalImageShift(trajectory, x, [0, 3]), image_generators(0, range(4))),
                (FinalImageShift(trajectory, x[2:3], [0, 3]), image_generators(2, range(1))),
            )
        )
        assert torch.allclose(together[2:3], alone, rtol=1e-9, atol=1e-12)


def test_a_model_without_gradients_is_refused() -> None:
    network = random_network().double()

    def blind(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x_t, t)

    x = normal(2, 3).double()
    states = [x]
    objective = NoisePredictionShift(
        DifferentiableSampler.of(blind, NoiseSchedule(PROCESS.alphas_cumprod, "sample"), "ddim", 4), states, [1]
    )
    function = CallableGoal(lambda omega: omega.detach().flatten(1).sum(1))
    for one in (dataclasses.replace(objective, inner="residual"), function):
        with pytest.raises(NoGradient, match="no gradients"):
            value_and_gradient(one, torch.zeros(2, 1, 3).double())


# -- balls and optimisers ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("radius", [0.3, torch.tensor([0.1, 2.0])])
def test_projections_and_draws_stay_in_the_ball(norm, radius) -> None:
    ball, x = LpBall(norm, radius), normal(50, 2, 3, 4)
    assert ball.excess(10 * x) > 1
    for omega in (ball.project(10 * x), ball.draw(x, seeded()), ball.draw(x, seeded(), surface=True)):
        assert ball.excess(omega) <= 1 + 1e-6
    inside = ball.bound(x) * ball.direction(x) * 0.5
    assert torch.equal(ball.project(inside), inside)
    bounds = ball.bound(x).reshape(-1)
    lengths = ball.length(ball.draw(x, seeded(), surface=True))
    assert torch.allclose(lengths, bounds.expand_as(lengths))
    # uniform: the mean largest element of 12 is 12/13 of the box, the mean distance in 12 dimensions too
    assert ball.length(ball.draw(x, seeded())).mean(0) / bounds == pytest.approx(12 / 13, abs=0.04)
    assert torch.equal(ball.direction(torch.zeros_like(x)), torch.zeros_like(x))


def test_balls_and_attacks_refuse_what_makes_no_sense() -> None:
    for arguments in (("l1", 0.1), ("linf", 0.0), ("l2", torch.tensor([0.1, -1.0])), ("linf", float("nan"))):
        with pytest.raises(ValueError):
            LpBall(*arguments)
    for wrong in (
        {"steps": 0}, {"restarts": 0}, {"step_size": 0.0}, {"momentum": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            PGD(**wrong)
    for kind, wrong in ((APGD, {"steps": 0}), (APGD, {"restarts": 0}), (RandomSearch, {"draws": 0})):
        with pytest.raises(ValueError):
            kind(**wrong)
    with pytest.raises(ValueError, match="not one of shift, residual"):
        NoisePredictionShift(linear_trajectory(), [points()], [0], "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 states for 1"):
        NoisePredictionShift(linear_trajectory(), [points()] * 2, [0])


class Escaping(LpBall):
    """Forgets to project."""

    def project(self, omega: Tensor) -> Tensor:
        return omega


def test_the_constraint_is_asserted_on_every_result() -> None:
    objective = network_objective()
    for attack in (PGD(3), APGD(3)):
        with pytest.raises(ArithmeticError, match="left its ball"):
            attack(objective, Escaping("linf", 0.1), objective.like, seeded())


def test_what_is_nowhere_finite_is_an_error() -> None:
    objective = CallableGoal(lambda omega: omega.flatten(1).sum(1) * torch.nan)
    with pytest.raises(ArithmeticError, match="not finite"):
        PGD(2)(objective, LpBall("linf", 1.0), torch.zeros(2, 1, 3), seeded())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_never_beats_pgd_and_the_best_iterate_only_rises(norm) -> None:
    objective, ball = network_objective(), LpBall(norm, 0.3)
    random = RandomSearch(20)(objective, ball, objective.like, seeded(1))
    once = PGD(1)(objective, ball, objective.like, seeded(2))
    found = PGD(10, restarts=3)(objective, ball, objective.like, seeded(2))
    adaptive = APGD(10, restarts=3)(objective, ball, objective.like, seeded(2))
    assert (found.value >= random.value).all()
    assert (adaptive.value >= random.value).all()
    assert adaptive.value.mean() > 0.98 * found.value.mean()
    assert found.value.mean() > once.value.mean()
    for one in (found, adaptive):
        assert (one.trace.diff(dim=0) >= 0).all()
        assert (one.restarts.diff(dim=0) >= 0).all()
        assert torch.equal(one.restarts[-1], one.value)
        assert torch.equal(one.restarts[0], one.trace[-1])
        assert evaluate(objective, one.omega) == pytest.approx(one.value, rel=1e-9)


def test_momentum_is_the_accumulated_gradient() -> None:
    """Dong et al. (2018), step by step, on a function whose gradient turns."""

    def function(omega: Tensor) -> Tensor:
        return (3 * omega).sin().flatten(1).sum(1) - omega.square().flatten(1).sum(1)

    start, ball = torch.full((1, 1, 4), 0.1).double(), LpBall("l2", 5.0)
    found = PGD(6, step_size=0.02, momentum=0.9)(CallableGoal(function), ball, start, start=start)
    omega, gathered, best = start, torch.zeros_like(start), []
    for _ in range(7):
        best.append(float(function(omega)))
        gradient = 3 * (3 * omega).cos() - 2 * omega
        gathered = 0.9 * gathered + gradient / gradient.abs().mean()
        omega = omega + 0.02 * 5.0 * gathered / gathered.norm()
    assert float(found.value) == pytest.approx(max(best), rel=1e-9)


def test_apgd_halves_its_step_where_it_overshoots_and_not_elsewhere() -> None:
    """A narrow peak inside the ball: plain steps of a fixed size jump over it, adaptive ones come down on it."""
    peak = torch.tensor([[[0.123, -0.271]]]).double()
    objective = CallableGoal(lambda omega: -(omega - peak).abs().flatten(1).sum(1))
    like, ball = torch.zeros(1, 1, 2).double(), LpBall("linf", 1.0)
    assert APGD(10).checkpoints() == [3, 5, 6, 7, 8, 9, 10]
    assert APGD(100).checkpoints()[:5] == [22, 41, 57, 70, 80]
    adaptive = APGD(100)(objective, ball, like, seeded())
    fixed = PGD(100, step_size=2.0)(objective, ball, like, seeded())
    assert -adaptive.value < 0.03 < 0.5 < -fixed.value


def test_apgd_by_hand() -> None:
    """Croce and Hein (2020), Algorithm 1, on values and slopes that are written down here: one number in [-1, 1].

    The slope is +1 and -1 in turn. Of 30 steps, progress is judged after 7, 13, 18, 21 ... The value rises

    * in 7 of the first 7 steps: nothing is done;
    * in 5 of the next 6, after a fall: enough, but never above the best, and the step was not halved before: it is
      halved, and the search goes on from the best;
    * in 4 of the next 5, never above the best: enough, and the step has just been halved: nothing is done;
    * in 3 of the next 3, never above the best: halved, and back.
    """
    values = [*range(8), 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 6.1, 6.2, *[0] * 9]
    seen: list[float] = []

    def function(omega: Tensor) -> Tensor:
        step = len(seen)
        seen.append(omega.item())
        slope = 1 - 2 * (step % 2)
        return values[step] + slope * (omega - omega.detach()).flatten(1).sum(1)

    best, _ = APGD(30)._ascend(CallableGoal(function), LpBall("linf", 1.0), torch.zeros(1, 1, 1).double(), lambda: None)
    assert len(seen) == 31
    # x1 = clip(0 + 2) = 1; then, with z = clip(x +- 2), x + 0.75 (z - x) + 0.25 (x - the x before)
    by_hand = [0, 1, -0.25, 0.375, -0.5, 0.40625, -0.421875, 0.4375]
    assert seen[:8] == pytest.approx(by_hand, abs=1e-12)
    # From x7 at rest with steps of 1: 0.4375 - 0.75, then -0.3125 + 0.75 - 0.25 * 0.75
    assert seen[14:16] == pytest.approx([-0.3125, 0.25], abs=1e-12)
    assert seen[22] == pytest.approx(0.4375 - 0.75 / 2, abs=1e-12)  # halved twice, not three times
    assert (best.value.item(), best.omega.item()) == (7, pytest.approx(0.4375, abs=1e-12))


def classifier() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5))


def attack_classifier(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, alpha: float, steps: int):
    """Ours: the objective is the classifier's loss, one push per image."""

    def loss(omega: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images + omega[:, 0]), labels, reduction="none")

    like = torch.zeros_like(images).unsqueeze(1)
    objective = CallableGoal(loss, modules=[model])
    return PGD(steps, step_size=alpha / eps)(objective, LpBall("linf", eps), like, start=like)


def test_pgd_on_a_classifier_is_the_textbook_loop() -> None:
    model, images, labels = classifier(), 0.3 + 0.4 * torch.rand(8, 1, 8, 8, generator=seeded()), torch.arange(8) % 5
    found = attack_classifier(model, images, labels, eps=8 / 255, alpha=2 / 255, steps=10)
    x, losses = images, []
    for _ in range(11):
        x = x.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), labels, reduction="none")
        losses.append(loss.detach())
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        x = images + (x.detach() + 2 / 255 * gradient.sign() - images).clamp(-8 / 255, 8 / 255)
    assert torch.allclose(found.value, torch.stack(losses).amax(0), rtol=1e-5)
