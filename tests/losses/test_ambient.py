"""Images that say how noisy they are train above that noise only: the same as plain training where they are clean.

The second half is T13 of docs/explanation/theory.md. The command line: ``tests/training/test_annotations.py``.
Long, because every
objective and every prediction is held against the same formulas.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.paper import linear
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
    uncorrelated,
)
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.baselines import (
    InputPerturbationLoss,
    InvarianceLoss,
    PseudoHuberLoss,
)
from robustdiff.losses.denoising import DenoisingLoss, LossOutput
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.strength import SigmaRange

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
OBJECTIVES: dict[str, Any] = {
    "plain": DenoisingLoss,
    "adversarial": partial(EquivarianceLoss, strength=0.7),
    "gated": partial(EquivarianceLoss, perturbation="random", strength=SigmaRange(0.0, 1.0, 2.0)),
    "true noise": partial(EquivarianceLoss, perturbation="random", target="noise"),
    "invariance": partial(InvarianceLoss, perturbation="random"),
    "input perturbation": InputPerturbationLoss,
}
LEVELS = torch.tensor([0.0, 0.1, 0.5, 0.0, 2.0, 0.02])


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    """Images in [-1, 1], shape (6, 2, 5, 5)."""
    return (torch.rand(6, 2, 5, 5, generator=seeded(1), dtype=torch.float64) * 2 - 1).to(dtype)


def same(a: LossOutput, b: LossOutput) -> bool:
    """Whether all terms are, bit for bit."""
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


# -- level 0 is plain training ---------------------------------------------------------------------


@pytest.mark.parametrize("per_image", [False, True], ids=["one_generator", "one_per_image"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_level_of_zero_changes_no_bit_of_loss_gradient_and_draws(name: str, prediction: Any, per_image: bool) -> None:
    objective, model = OBJECTIVES[name](ddpm_schedule(prediction)), SmallNet(dtype=torch.float32)
    results = []
    for level in (None, torch.zeros(6)):
        generators = [seeded(i) for i in range(6 if per_image else 1)]
        terms = objective(
            model, images(torch.float32), generator=generators if per_image else generators[0], noise_level=level
        )
        results.append((terms, gradients(model, terms.total.mean()), [g.get_state() for g in generators]))
    (plain, *before), (told, *after) = results
    assert same(plain, told)
    for wanted, got in zip(before, after, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(wanted, got, strict=True))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_clean_images_among_noisy_ones_are_trained_as_if_alone(name: str, prediction: Any) -> None:
    objective = OBJECTIVES[name](ddpm_schedule(prediction))

    def model(x: Tensor, t: Tensor) -> Tensor:  # each number alone: neighbours cannot change its rounding
        return 0.3 * x.tanh() + 0.001 * t[:, None, None, None]

    plain, told = Calls(model), Calls(model)
    generators = [[seeded(i) for i in range(6)] for _ in range(2)]
    before = objective(plain, images(torch.float32), generator=generators[0])
    after = objective(told, images(torch.float32), generator=generators[1], noise_level=LEVELS)
    clean = LEVELS == 0
    assert (plain.seen[0][1] != told.seen[0][1])[~clean].any()
    for wanted, got in zip(plain.seen[0][:2], told.seen[0][:2], strict=True):
        assert torch.equal(wanted[clean], got[clean])
    for term in vars(before):
        assert torch.equal(getattr(before, term)[clean], getattr(after, term)[clean])
    assert (before.denoising != after.denoising)[~clean].all()
    ends = [[torch.rand((), generator=g).item() for g in row] for row in generators]
    assert name == "gated" or ends[0] == ends[1]  # a gate opens by t, and an open one draws


# -- the formulas ----------------------------------------------------------------------------------

T = torch.tensor([0, 50, 200, 500, 800, 999])
TOLD = torch.tensor([0.0, 0.05, 0.3, 1.0, 3.0, 20.0], dtype=torch.float64)


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_that_of_a_denoised_image_made_noisy_again(prediction: Any, zero_snr: bool) -> None:
    """``x0_weight |rho x_t / a + (1 - rho) x0_hat - y|^2`` with x_t = a y + sqrt(s^2 - a^2 sigma_n^2) z, in words."""
    schedule, model = ddpm_schedule(prediction, zero_snr), Calls(SmallNet())
    y, z, t = images(), normal(6, 2, 5, 5, seed=2), T.clamp(max=998 if zero_snr else 999)  # a = 0: see the next test
    terms = DenoisingLoss(schedule)(model, y, t=t, eps=z, noise_level=TOLD)
    a, s = (value[:, None, None, None] for value in (schedule.alpha(t), schedule.sigma(t)))
    sigma_n = TOLD[:, None, None, None]
    x_t, rho = a * y + (s.square() - (a * sigma_n).square()).sqrt() * z, (a * sigma_n / s).square()
    close(model.seen[0][0], x_t)
    x0_hat = schedule.x0_hat(model.model(x_t, t), x_t, t)
    error = (rho * x_t / a + (1 - rho) * x0_hat - y).square().mean((1, 2, 3))
    close(terms.total, schedule.x0_weight(t) * error, rtol=1e-8)
    assert torch.equal(terms.total, terms.denoising)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_at_zero_terminal_snr_every_level_is_harmless_and_the_loss_plain(prediction: Any, dtype: torch.dtype) -> None:
    schedule, model = ddpm_schedule(prediction, zero_snr=True, dtype=dtype), SmallNet(dtype=dtype)
    t = torch.full((6,), 999)
    for level in (0.5, 1e6):
        told = DenoisingLoss(schedule)(
            model, images(dtype), t=t, generator=seeded(), noise_level=torch.full((6,), level)
        )
        plain = DenoisingLoss(schedule)(model, images(dtype), t=t, generator=seeded())
        assert torch.isfinite(told.total).all()
        assert all(torch.isfinite(g).all() for g in gradients(model, told.total.mean()))
        torch.testing.assert_close(told.total, plain.total)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_single_precision_is_enough_just_above_the_level(prediction: Any) -> None:
    """At the first timestep allowed, 1 - rho is small, and the formula in float32 agrees with float64."""
    levels = torch.tensor([0.011, 0.02, 0.05, 0.3, 1.0, 10.0], dtype=torch.float64)
    schedule, z = ddpm_schedule(prediction, dtype=torch.float32), normal(6, 2, 5, 5, seed=2)
    t = schedule.first_timesteps(levels)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x.tanh()

    exact = DenoisingLoss(NoiseSchedule(schedule.alphas_cumprod.double(), prediction))
    wanted = exact(model, images(), t=t, eps=z, noise_level=levels).total
    got = DenoisingLoss(schedule)(model, images(torch.float32), t=t, eps=z, noise_level=levels).total
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", [EquivarianceLoss, InvarianceLoss])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_regulariser_stays_as_it_is_defined_at_the_same_state(prediction: Any, kind: Any) -> None:
    schedule, model, omega = ddpm_schedule(prediction), Calls(SmallNet()), 0.2 * normal(6, 2, 5, 5, seed=4)
    terms = kind(schedule, Given(omega), strength=0.4)(model, images(), t=T, generator=seeded(), noise_level=TOLD)
    (x_t, t, _), (moved, _, _) = model.seen
    close(moved, schedule.perturb(x_t, omega, t))
    outputs = model.model(x_t, t), model.model(moved, t)
    if kind is EquivarianceLoss:
        shift = schedule.x0_hat(outputs[1], moved, t) - schedule.x0_hat(outputs[0], x_t, t)
        weight = schedule.x0_weight(t)
    else:
        shift = schedule.eps_hat(outputs[1], moved, t) - schedule.eps_hat(outputs[0], x_t, t)
        weight = torch.ones(6, dtype=torch.float64)
    close(terms.equivariance, weight * shift.square().mean((1, 2, 3)), rtol=1e-7)
    close(terms.total, terms.denoising + 0.4 * terms.equivariance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["true noise", "input perturbation"])
def test_a_target_at_a_moved_state_is_that_of_the_state_before(kind: str, prediction: Any) -> None:
    """``rho x_t / a`` keeps the state that was not moved: what was added knows nothing of the image.

    For the true noise the denoised image must stay; under input perturbation the prediction itself.
    """
    schedule, model, z = ddpm_schedule(prediction), Calls(SmallNet()), normal(6, 2, 5, 5, seed=2)
    a, s, sigma_n = (v[:, None, None, None] for v in (schedule.alpha(T), schedule.sigma(T), TOLD))
    rho, y = (a * sigma_n / s).square(), images()
    x_t = a * y + (s.square() - (a * sigma_n).square()).sqrt() * z
    if kind == "true noise":
        omega = 0.2 * normal(6, 2, 5, 5, seed=4)
        objective: Any = EquivarianceLoss(schedule, Given(omega), target="noise")
        got = objective(model, y, t=T, eps=z, noise_level=TOLD).equivariance
        moved = x_t + s * omega
        x0_hat = schedule.x0_hat(model.model(moved, T), moved, T)
    else:
        got = InputPerturbationLoss(schedule)(model, y, t=T, eps=z, generator=seeded(5), noise_level=TOLD).total
        moved = x_t + 0.1 * s * torch.randn(z.shape, generator=seeded(5), dtype=torch.float64)
        x0_hat = schedule.x0_hat(model.model(moved, T), x_t, T)
    close(model.seen[-1][0], moved)
    error = (rho * x_t / a + (1 - rho) * x0_hat - y).square().mean((1, 2, 3))
    close(got, schedule.x0_weight(T) * error, rtol=1e-8)


def test_a_gate_slices_noisy_images_with_their_own_damping() -> None:
    """The true-noise target needs it in the second pass, which only some images take."""
    schedule, omega = ddpm_schedule(), 0.2 * normal(6, 2, 5, 5, seed=4)
    every, gated = (
        EquivarianceLoss(schedule, Spy(lambda respond, radius, like, generator: omega[-len(like) :]), s, target="noise")
        for s in (1.0, SigmaRange(1.0, float("inf"), 1.0))
    )
    arguments = {"t": T, "eps": normal(6, 2, 5, 5, seed=2), "noise_level": TOLD}
    whole, part = (objective(SmallNet(), images(), **arguments) for objective in (every, gated))
    inside = schedule.noise_to_signal(T) >= 1
    assert inside.tolist() == [False] * 3 + [True] * 3
    close(part.equivariance[inside], whole.equivariance[inside])


# -- timesteps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 0.2, 3.0, 150.0])
def test_timesteps_are_uniform_over_those_above_the_level(level: float) -> None:
    schedule, count = ddpm_schedule(), 60_000
    levels = schedule.noise_to_signal(torch.arange(1000))
    first = int((levels > level).nonzero()[0])
    drawn = schedule.draw_timesteps(count, seeded(3), schedule.first_timesteps(torch.full((count,), level)))
    assert drawn.min() >= first
    assert drawn.max() == 999
    assert schedule.noise_to_signal(drawn).min() > level
    # the largest gap between the distributions of n draws and the truth is above 1.63 / sqrt(n) once in a hundred
    found = (torch.bincount(drawn - first, minlength=1000 - first) / count).cumsum(0)
    assert (found - torch.arange(1, 1001 - first) / (1000 - first)).abs().max() < 1.63 / count**0.5
    plain = schedule.draw_timesteps(count, seeded(3))
    assert torch.equal(drawn, plain) == (level == 0)  # one number each, whatever the level


def test_a_level_on_the_table_trains_above_it_only() -> None:
    schedule = schedule_at(torch.tensor([0.25, 0.5, 1.0, 2.0]))
    level = schedule.noise_to_signal(torch.tensor([0, 1, 2]))  # equal to a level of the table, bit for bit
    assert schedule.first_timesteps(torch.cat([level, torch.zeros(1)])).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("last", [0.9999999, 0.99999994], ids=["one_ulp_and_more", "one_ulp"])
def test_a_level_just_below_the_table_is_allowed_and_finite(last: float) -> None:
    schedule = schedule_at(torch.tensor([0.5, 1.0]))
    terms = DenoisingLoss(schedule)(
        SmallNet(dtype=torch.float32), images(torch.float32), generator=seeded(), noise_level=torch.full((6,), last)
    )
    assert terms.t.tolist() == [1] * 6
    assert torch.isfinite(terms.total).all()


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (torch.tensor([0.0, 0.0, -0.1, 0, 0, 0]), "finite and 0 or more, got -0.1"),
        (torch.full((6,), float("inf")), "finite"),
        (torch.full((6,), float("nan")), "finite"),
        (torch.full((6,), 1000.0), r"1000 is not below 157.*largest noise level"),
        (torch.zeros(5), r"shape \(6,\), got \(5,\)"),
        (torch.zeros(()), r"shape \(6,\), got \(\)"),
    ],
)
def test_levels_that_mean_nothing_are_refused(level: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingLoss(ddpm_schedule())(SmallNet(), images(), noise_level=level)


def test_a_timestep_that_is_too_low_for_its_image_is_refused() -> None:
    level, t = torch.full((6,), 0.2), torch.full((6,), 500)
    first = int(ddpm_schedule().first_timesteps(level)[0])
    objective = DenoisingLoss(ddpm_schedule())
    t[3] = first
    objective(SmallNet(), images(), t=t, noise_level=level)
    t[3] -= 1
    with pytest.raises(ValueError, match="t is not above the noise_level"):
        objective(SmallNet(), images(), t=t, noise_level=level)


def test_a_table_that_is_not_sorted_is_refused() -> None:
    schedule = NoiseSchedule(torch.tensor([0.9, 0.1, 0.5]))
    with pytest.raises(ValueError, match="grows with t"):
        DenoisingLoss(schedule)(SmallNet(), images(), noise_level=torch.zeros(6))


def test_a_loss_whose_optimum_is_no_mean_refuses_levels() -> None:
    with pytest.raises(ValueError, match="PseudoHuberLoss cannot use noise_level"):
        PseudoHuberLoss(ddpm_schedule())(SmallNet(), images(), noise_level=torch.zeros(6))


# -- T13: what training converges to ---------------------------------------------------------------

V = torch.tensor([2.0, 0.7, 0.2, 0.03], dtype=torch.float64)
SIGMA, SHARE = 0.3, torch.tensor([0.9, 0.1], dtype=torch.float64)
"""90 % of the images carry noise of this size, 10 % none."""
TIMES = torch.tensor([3, 40, 150, 250, 600, 900])  # the first two lie below SIGMA
schedule = ddpm_schedule()


class Diagonal(nn.Module):
    """``eps_hat = w[t] * x``: a number per timestep of TIMES and direction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(len(TIMES), len(V), seed=2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight[torch.searchsorted(TIMES, t)] * x


def minimiser(noise: Tensor, told: Tensor, share: Tensor, times: Tensor) -> Tensor:
    """The weights, shape (len(times), 4), that minimise the expected loss over groups of images, by LBFGS."""
    x0, n, z = uncorrelated(32, 4, 4, 4, seed=1)
    batches = []
    for sigma, level, weight in zip(noise.tolist(), told.tolist(), share.tolist(), strict=True):
        allowed = times[schedule.noise_to_signal(times) > level]
        y, fresh = ((x0 * V.sqrt() + sigma * n), z)
        size = len(allowed)
        batches.append(
            (y.repeat(size, 1), fresh.repeat(size, 1), allowed.repeat_interleave(32), torch.tensor([level]), weight)
        )
    model = Diagonal()
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for y, fresh, t, level, weight in batches:
            told_to_all = level.double().expand(len(t))
            terms = DenoisingLoss(schedule)(model, y, t=t, eps=fresh, noise_level=told_to_all)
            total = total + weight * terms.total.sum()
        total.backward()
        return total

    optimiser.step(closure)
    return model.weight.detach()[torch.searchsorted(TIMES, times)]


near = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
NOISE = torch.tensor([SIGMA, 0.0], dtype=torch.float64)


def test_T13_told_the_truth_the_optimum_is_the_clean_wiener_filter_at_every_level() -> None:
    clean = linear.optimum(schedule.alphas_cumprod[TIMES], V)
    near(minimiser(NOISE, NOISE, SHARE, TIMES), clean)
    close(linear.levelled_optimum(schedule.alphas_cumprod[TIMES], V, NOISE, NOISE, SHARE), clean)


@pytest.mark.parametrize("told", [0.0, 0.27, 0.33], ids=["nothing", "too_little", "too_much"])
def test_T13_told_wrongly_the_optimum_is_that_of_other_data(told: float) -> None:
    wrong, table = torch.tensor([told, 0.0], dtype=torch.float64), schedule.alphas_cumprod[TIMES]
    predicted = linear.levelled_optimum(table, V, NOISE, wrong, SHARE)
    near(minimiser(NOISE, wrong, SHARE, TIMES), predicted)
    assert ((predicted - linear.optimum(table, V)).abs().max(1).values > 1e-3)[2:4].all()
    if told:  # below what they say, noisy images do no harm, whatever they hold
        close(predicted[:2], linear.optimum(table[:2], V))
    else:  # plain training on a mixture: the mean of its covariances
        close(predicted, linear.optimum(table, V + 0.9 * SIGMA**2))


def test_T13_all_images_noisy_and_told_ten_per_cent_too_little_leaves_19_per_cent_of_the_noise() -> None:
    noise, told, one = torch.tensor([SIGMA]), torch.tensor([0.9 * SIGMA]), torch.ones(1)
    left = SIGMA**2 - told.double().item() ** 2
    assert left == pytest.approx(0.19 * SIGMA**2, rel=1e-5)
    above = TIMES[2:]
    predicted = linear.levelled_optimum(schedule.alphas_cumprod[above], V, noise, told, one)
    close(predicted, linear.optimum(schedule.alphas_cumprod[above], V + left), rtol=1e-6)
    near(minimiser(noise, told, one, above), predicted, rtol=1e-5)
    with pytest.raises(ValueError, match="no image trains it"):
        linear.levelled_optimum(schedule.alphas_cumprod[TIMES], V, noise, told, one)


def test_T13_what_is_generated_is_clean_if_told_and_dirty_if_not() -> None:
    """DDIM over the whole table; 4 % from the continuum at a thousand steps, as in T3."""
    table = torch.cat([schedule.alphas_cumprod.flip(0), torch.ones(1, dtype=torch.float64)])

    def generated(told: float) -> Tensor:
        words = torch.tensor([told, 0.0], dtype=torch.float64)
        return linear.ddim_variance(table, linear.levelled_optimum(table[:-1], V, NOISE, words, SHARE))

    close(generated(SIGMA), linear.ddim_variance(table, linear.optimum(table[:-1], V)))
    torch.testing.assert_close(generated(SIGMA), V, rtol=0.04, atol=0)
    torch.testing.assert_close(generated(0.0), V + 0.9 * SIGMA**2, rtol=0.04, atol=0)
    # told too little with a tenth of clean images: they alone rule below, and pull the smallest directions back
    assert (generated(0.0) > generated(0.9 * SIGMA)).all()
    assert (generated(0.9 * SIGMA) > generated(SIGMA)).all()


def test_the_share_may_depend_on_the_level() -> None:
    """Uniform timesteps above the level: density 1 / (T - first) where it is trained."""
    first = int(schedule.first_timesteps(torch.tensor([SIGMA]))[0])
    density = torch.tensor([1 / (1000 - first), 1 / 1000])
    shares = (SHARE * density).expand(len(TIMES), 2)
    table, wrong = schedule.alphas_cumprod[TIMES], torch.tensor([0.2, 0.0])
    by_level = linear.levelled_optimum(table, V, NOISE, wrong, shares)
    close(by_level, linear.levelled_optimum(table, V, NOISE, wrong, SHARE * density))
    assert not torch.equal(by_level, linear.levelled_optimum(table, V, NOISE, wrong, SHARE))


# -- a trained network -----------------------------------------------------------------------------


class PerLevel(nn.Module):
    """``eps_hat = W_t x_t``: a matrix per timestep."""

    def __init__(self, steps: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(steps, size, size, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.weight[t] @ x[:, :, None])[:, :, 0]


def test_a_network_trained_on_noisy_images_draws_clean_ones_if_told() -> None:
    """Everything drawn, timesteps too: 40,000 images of 2 pixels, of which nine in ten carry noise.

    Told, within 3 % of what the clean optimum for these images' covariance draws; if not, more than half too much in
    the smaller direction.
    """
    count, steps = 40_000, 25
    axes = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)
    x0 = normal(count, 2, seed=1) * torch.tensor([1.0, 0.35], dtype=torch.float64) @ axes
    level = torch.where(torch.arange(count) % 10 > 0, SIGMA, 0.0).double()
    y = x0 + level[:, None] * normal(count, 2, seed=2)
    noise = schedule_at(torch.logspace(-1.5, 1.5, steps))
    truth = axes @ (x0.T @ x0 / count) @ axes.T

    def generated(told: Tensor | None) -> Tensor:
        model = PerLevel(steps, 2)
        optimiser = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = DenoisingLoss(noise)(model, y, generator=seeded(3), noise_level=told).total.sum() / count
            loss.backward()
            return loss

        optimiser.step(closure)
        x = torch.eye(2, dtype=torch.float64)  # the map from the first noise to the image
        table = [*noise.alphas_cumprod.flip(0).tolist(), 1.0]
        for t, (now, then) in zip(reversed(range(steps)), itertools.pairwise(table), strict=True):
            eps = model.weight[t].detach() @ x
            x = (then / now) ** 0.5 * (x - (1 - now) ** 0.5 * eps) + (1 - then) ** 0.5 * eps
        return axes @ (x @ x.T) @ axes.T

    told, silent = generated(level), generated(None)
    exact = linear.ddim_variance(
        torch.cat([noise.alphas_cumprod.flip(0), torch.ones(1, dtype=torch.float64)]),
        linear.optimum(noise.alphas_cumprod.flip(0), truth.diagonal()),
    )
    torch.testing.assert_close(told.diagonal(), exact, rtol=0.03, atol=0)
    assert silent[1, 1] > 1.5 * exact[1]
