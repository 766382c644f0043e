"""The closed forms of ``linear.py`` against computations that share no formula with them.

Objectives are minimised, diffusers' schedulers are run, flows are integrated, attacks are tried corner by corner, and
metrics are drawn. ``tests/losses/test_theory.py`` holds the objectives against the same results for full matrices.

A little over 400 lines: one closed form after the other.

A little over 400 lines: one section per closed form.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy.integrate import solve_ivp
from scipy.linalg import hadamard
from scipy.optimize import minimize
from torch import Tensor, nn

from experiments.paper import linear
from helpers import Given, ddpm_schedule, normal, schedule_at, seeded, uncorrelated
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.diffusion.sigma_floor import SigmaClampedModel
from robustdiff.evaluation.distances import frechet_floor
from robustdiff.losses.baselines import InvarianceLoss
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.perturbation import AdversarialPerturbation, Response
from robustdiff.losses.strength import SigmaRange

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
V = torch.tensor([2.0, 0.7, 0.2, 0.03, 0.004], dtype=torch.float64)
LEVELS = torch.tensor([3, 40, 200, 600, 900])

# -- what training converges to --------------------------------------------------------------------


class Diagonal(nn.Module):
    """``eps_hat = w[t] * x``: a number per timestep of LEVELS and direction."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight[torch.searchsorted(LEVELS, t)] * x


def minimiser(objective: type[EquivarianceLoss], schedule: NoiseSchedule, kappa: float, **settings: Any) -> Tensor:
    """The weights, shape (5, 5), that minimise the expected loss, by LBFGS from arbitrary ones."""
    x0, eps, omega = uncorrelated(64, 5, 5, 5, seed=1)
    x0, eps, omega = (x.repeat(len(LEVELS), 1) for x in (x0 * V.sqrt(), eps, kappa**0.5 * omega))
    t = LEVELS.repeat_interleave(64)
    # A function of the rows asked for: a gate passes some levels only, each of whole blocks of 64 rows.
    loss = objective(schedule, perturbation=Given(lambda like: omega[: len(like)]), **settings)
    model = Diagonal(normal(5, 5, seed=2))
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        total = loss(model, x0, t=t, eps=eps).total.sum()
        total.backward()
        return total

    optimiser.step(closure)
    return model.weight.detach()


near = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("m", [0.0, 0.4, 6.0])
def test_T3_optimum_is_where_the_objective_is_least(m: float) -> None:
    schedule = ddpm_schedule()
    found = minimiser(EquivarianceLoss, schedule, kappa=0.3, strength=m / 0.3)
    near(found, linear.optimum(schedule.alphas_cumprod[LEVELS], V, m))


def test_T6_optimum_takes_a_strength_per_level() -> None:
    schedule = ddpm_schedule()
    level = schedule.noise_to_signal(LEVELS)
    gate = SigmaRange(float(level[1]) - 1e-6, float(level[3]) + 1e-6, 5.0)
    found = minimiser(EquivarianceLoss, schedule, kappa=0.3, strength=gate)
    m = 0.3 * gate(level, level)
    assert m.tolist() == [0, 1.5, 1.5, 1.5, 0]
    near(found, linear.optimum(schedule.alphas_cumprod[LEVELS], V, m))
    assert linear.optimum(schedule.alphas_cumprod[300], V, 1.5).shape == (5,)


@pytest.mark.parametrize("m", [0.4, 6.0])
def test_T5_invariance_optimum_is_where_that_objective_is_least(m: float) -> None:
    schedule = ddpm_schedule()
    found = minimiser(InvarianceLoss, schedule, kappa=0.3, strength=m / 0.3)
    near(found, linear.invariance_optimum(schedule.alphas_cumprod[LEVELS], V, m))


@pytest.mark.parametrize("strength", [0.5, 20.0])
def test_T4_noise_target_strength(strength: float) -> None:
    schedule, m = ddpm_schedule(), linear.noise_target_strength(strength, 0.3)
    found = minimiser(EquivarianceLoss, schedule, kappa=0.3, strength=strength, target="noise")
    near(found, linear.optimum(schedule.alphas_cumprod[LEVELS], V, m))


@pytest.mark.parametrize(("steps", "floor"), [(1, 0.0), (30, 0.0), (0, 0.8), (5, 0.2)])
def test_T7_relabelled_is_the_plain_denoiser_in_its_wrapper(steps: int, floor: float) -> None:
    """Levels spaced evenly in logarithm, so that a factor of whole steps asks at a level of the table."""
    levels = torch.logspace(-2, 2, 401, dtype=torch.float64)
    schedule, factor = schedule_at(levels), 10 ** (steps / 100)
    floor = float(levels[(levels < floor).sum()]) if floor else 0.0

    def plain(x: Tensor, t: Tensor) -> Tensor:
        s2 = 1 - schedule.alphas_cumprod[t]
        return x * (s2.sqrt() / (schedule.alphas_cumprod[t] * V[:, None] + s2))

    model = SigmaClampedModel(lambda x, t: plain(x.T, t).T, schedule, factor, floor)
    t = torch.arange(0, 360, 7)
    answer = model(torch.ones(len(t), 5, dtype=torch.float64), t)
    close(linear.relabelled(schedule.alphas_cumprod[t], V, factor, floor), answer, rtol=1e-9)
    if not floor:
        close(linear.optimum(schedule.alphas_cumprod[t], V, factor**2 - 1), answer, rtol=1e-9)


# -- what samplers make of it ----------------------------------------------------------------------


def visited(scheduler: Any) -> Tensor:
    """The levels that a scheduler passes through, the last being no noise."""
    return torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).double()


def run(scheduler: Any, w: Tensor, x: Tensor) -> Tensor:
    """A stock scheduler on the linear network, states of shape (n, d)."""
    generator = seeded(7)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(w[k] * x, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("steps", [5, 50, 1000])
def test_T3_ddim_gains_are_those_of_the_stock_scheduler(steps: int) -> None:
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    alpha_bar = visited(scheduler)
    w = normal(steps, 5, seed=3).abs() * 0.3 + linear.optimum(alpha_bar[:-1], V, 0.5)
    gains = linear.ddim_gains(alpha_bar, w)
    ones = torch.ones(5, dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps):
        # float32 tables in the scheduler: 1 - alpha_bar' is exact, its root is not
        close(scheduler.step(w[k] * ones, t, ones).prev_sample, gains[k], rtol=1e-6, atol=1e-6)
    w = linear.optimum(alpha_bar[:-1], V, 0.5)
    torch.testing.assert_close(run(scheduler, w, ones).square(), linear.ddim_variance(alpha_bar, w), rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [20, 1000])
def test_T3_ddpm_variance_is_that_of_the_stock_scheduler(steps: int) -> None:
    """By its definition: the gain of a start, and the sum of what each step's unit noise becomes."""
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    alpha_bar = visited(scheduler)
    w = linear.optimum(alpha_bar[:-1], V, 0.5)
    zero, variance = torch.zeros(1, 5, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps):
        z = torch.randn(1, 5, generator=seeded(int(t)), dtype=torch.float64)
        noise = scheduler.step(zero, t, zero, generator=seeded(int(t))).prev_sample / z
        moved = scheduler.step(w[k] * variance.sqrt(), t, variance.sqrt(), generator=seeded(int(t))).prev_sample
        variance = (moved - noise * z).square() + noise.square()
    torch.testing.assert_close(variance[0], linear.ddpm_variance(alpha_bar, w), rtol=1e-4, atol=0)
    if steps == 20:
        drawn = run(scheduler, w, normal(100_000, 5, seed=8)).var(0)
        torch.testing.assert_close(drawn, linear.ddpm_variance(alpha_bar, w), rtol=0.02, atol=0)


def test_samplers_of_many_small_steps_reach_the_continuum() -> None:
    levels = torch.logspace(2.5, -4, 40_000, dtype=torch.float64)
    alpha_bar = torch.cat([1 / (1 + levels.square()), torch.ones(1, dtype=torch.float64)])
    w = linear.optimum(alpha_bar[:-1], V, 1.5)
    torch.testing.assert_close(linear.ddim_variance(alpha_bar, w), V / 2.5, rtol=1e-3, atol=0)
    torch.testing.assert_close(linear.ddpm_variance(alpha_bar[::4], w[::4]), V / 2.5, rtol=3e-3, atol=0)


def test_samplers_refuse_what_does_not_fit() -> None:
    w = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"\(K, d\) for K \+ 1 levels"):
        linear.ddim_gains(torch.tensor([0.1, 0.5, 1.0]), w)
    with pytest.raises(ValueError, match="above 0 at every level"):
        linear.ddpm_variance(torch.tensor([0.0, 0.1, 0.5, 1.0]), w)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        linear.optimum(torch.tensor([1.5]), w[0])


GATES = [(0.0, 0.17, 1.7), (0.0, 0.9, 0.44), (0.5, 3.0, 2.0), (0.1, math.inf, 4.0), (0.0, math.inf, 0.7)]


@pytest.mark.parametrize(("low", "high", "m"), GATES)
def test_T6_gated_variance_solves_the_flow_and_the_reverse_sde(low: float, high: float, m: float) -> None:
    """With T = log sigma: ``dy = sigma eps_hat dT`` and, for the SDE's variance, ``dV = (4 h V - 2) sigma^2 dT``."""
    top = 300.0
    edges = sorted({top, *(edge for edge in (low, high) if 0 < edge < top), 1e-5}, reverse=True)

    def integrate(v: float, noisy: bool) -> float:
        # Starting from the noise itself, which the exact process has reached at `top` but for v / top^2.
        value = top**2
        for begin, end in itertools.pairwise(edges):
            inflated = 1 + m * (low < (begin * end) ** 0.5 < high)

            def slope(log_sigma: float, y: np.ndarray, inflated: float = inflated) -> np.ndarray:
                tau = math.exp(2 * log_sigma)
                h = inflated / (v + inflated * tau)
                return (4 * h * y - 2) * tau if noisy else 2 * h * tau * y

            solution = solve_ivp(slope, (math.log(begin), math.log(end)), [value], method="LSODA", rtol=1e-9, atol=0)
            value = solution.y[0, -1]
        return value

    for closed, noisy in ((linear.gated_variance, False), (linear.gated_variance_sde, True)):
        solved = torch.tensor([integrate(float(v), noisy) for v in V], dtype=torch.float64)
        torch.testing.assert_close(closed(V, m, low, high), solved, rtol=1e-4, atol=0)


def test_T6_a_gate_at_low_noise_spares_the_large_directions() -> None:
    kept = linear.gated_variance(V, 5.9, 0, 0.115) / V
    assert kept[0] > 0.95
    assert kept[-1] < 0.3
    assert (kept.diff() < 0).all()


@pytest.mark.parametrize(("m", "largest", "stated"), [(0.5, 80.0, 0.658), (0.5, 20.0, None), (0.2, 80.0, None)])
def test_T5_the_variance_of_invariance_solves_its_flow(m: float, largest: float, stated: float | None) -> None:
    v = 0.01

    def slope(log_sigma: float, log_y: np.ndarray) -> list[float]:
        tau = math.exp(2 * log_sigma)
        return [2 * tau / (v + (1 + m) * tau)]

    solution = solve_ivp(slope, (math.log(largest), math.log(1e-6)), [math.log(largest**2)], rtol=1e-10, atol=1e-10)
    closed = linear.invariance_variance(torch.tensor([v]), m, largest)
    assert closed.item() == pytest.approx(math.exp(solution.y[0, -1]), rel=1e-6)
    if stated is not None:
        assert closed.item() == pytest.approx(stated, abs=5e-4)


# -- adversaries -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "strength", "radius"), [(40, 2.0, 0.8), (200, 0.5, 1.5), (600, 30.0, 1.0)])
def test_T9_spectral_clipping_is_where_the_worst_case_objective_is_least(
    index: int, strength: float, radius: float
) -> None:
    """The objective itself supplies the loss; the worst omega of a diagonal A lies along its largest element."""
    schedule = ddpm_schedule()
    s = float(schedule.sigma(torch.tensor(index)))
    x0, eps = uncorrelated(64, 5, 5, seed=4)
    x0, t = x0 * V.sqrt(), torch.full((64,), index)

    def loss(w: np.ndarray) -> float:
        worst = np.zeros((64, 5))
        worst[:, np.abs(1 - s * w).argmax()] = radius
        objective = EquivarianceLoss(schedule, perturbation=Given(torch.tensor(worst)), strength=strength)
        return float(objective(lambda x, t: torch.tensor(w) * x, x0, t=t, eps=eps).total.mean())

    found = linear.spectral_clipping(float(schedule.alphas_cumprod[index]), V, strength, radius).numpy()
    plain = linear.optimum(schedule.alphas_cumprod[index], V).numpy()
    clipped = 1 - s * found < (1 - s * plain) * (1 - 1e-9)
    assert clipped[0]
    assert not clipped[-1]
    # A smooth equivalent that the solver can handle: the largest element is a variable of its own.
    zero = loss(np.full(5, 1 / s))
    assert zero == pytest.approx(float((1 / s**2) * (schedule.alphas_cumprod[index] * V + s**2).mean() - 1))

    def smooth(z: np.ndarray) -> float:
        none = EquivarianceLoss(schedule, strength=0)(lambda x, t: torch.tensor(z[:5]) * x, x0, t=t, eps=eps)
        return float(none.total.mean()) + strength * radius**2 * z[5] ** 2 / 5

    inside = [
        {"type": "ineq", "fun": lambda z, sign=sign: z[5] + sign * (1 - s * z[:5])} for sign in (1, -1)
    ]  # -tau <= 1 - s w <= tau
    start = np.append(plain * 0.8, 1.0)
    best = minimize(smooth, start, method="SLSQP", constraints=inside, options={"ftol": 1e-15, "maxiter": 500})
    np.testing.assert_allclose(found, best.x[:5], rtol=2e-4)
    assert smooth(np.append(found, (1 - s * found).max())) == pytest.approx(loss(found), rel=1e-12)
    assert loss(found) < min(loss(found * (1 + 0.02 * z)) for z in normal(100, 5, seed=5).numpy())


def test_T9_spectral_clipping_without_a_radius_is_plain_and_with_a_huge_one_denoises_nothing() -> None:
    close(linear.spectral_clipping(0.7, V, 1.0, 0.0), linear.optimum(0.7, V))
    s = 0.3**0.5
    close(linear.spectral_clipping(0.7, V, 1e9, 10.0), torch.full((5,), 1 / s, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("basis", ["axes", "patterns", "oblique"])
def test_T9_linf_bounds_hold_over_all_corners(basis: str) -> None:
    d, alpha_bar, radius = 8, 0.8, 0.7
    v = torch.logspace(0.5, -3, d, dtype=torch.float64)
    w = linear.optimum(alpha_bar, v, 0.5)
    axes = {
        "axes": torch.eye(d, dtype=torch.float64),
        "patterns": torch.tensor(hadamard(d) / d**0.5),
        "oblique": torch.linalg.qr(normal(d, d, seed=6)).Q,
    }[basis]
    matrix = 0.2**0.5 * axes @ torch.diag(w) @ axes.T - torch.eye(d, dtype=torch.float64)
    corners = radius * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d)), dtype=torch.float64)
    squares = (corners @ matrix.T).square().sum(1)
    low, high = linear.linf_bounds(alpha_bar, w, radius)
    assert squares.mean().item() == pytest.approx(low, rel=1e-12)
    most = squares.max().item()
    if basis == "axes":
        assert most == pytest.approx(low, rel=1e-12)
    elif basis == "patterns":
        assert most == pytest.approx(high, rel=1e-12)
    else:
        assert low * 1.1 < most < high / 1.1


def ddim(steps: int) -> Any:
    """A stock DDIM scheduler whose tables are float64."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler


def push(scheduler: Any, w: Tensor, pushes: Tensor) -> Tensor:
    """How far pushes, shape (n, K, d), each before its step, move the end: shape (n, d)."""
    x = torch.zeros_like(pushes[:, 0])
    for k, t in enumerate(scheduler.timesteps):
        x = x + pushes[:, k]
        x = scheduler.step(w[k] * x, t, x).prev_sample
    return x


@pytest.mark.parametrize("kind", ["denoiser", "signs"])
def test_T10_no_corner_is_farther_than_the_largest_displacement(kind: str) -> None:
    """``signs``: weights that are no denoiser's, so that gains of both signs occur."""
    scheduler, bounds = ddim(4), torch.tensor([0.3, 0.1, 0.5, 0.2], dtype=torch.float64)
    alpha_bar = visited(scheduler)
    w = linear.optimum(alpha_bar[:-1], V[1:4], 0.4) if kind == "denoiser" else 3 * normal(4, 3, seed=9)
    gains = linear.ddim_gains(alpha_bar, w)
    assert bool((gains < 0).any()) == (kind == "signs")
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)), dtype=torch.float64).reshape(-1, 4, 3)
    farthest = push(scheduler, w, corners * bounds[:, None]).norm(dim=1).max().item()
    assert farthest == pytest.approx(linear.largest_displacement(gains, bounds), rel=1e-12)


@pytest.mark.parametrize("m", [0.0, 2.0])
def test_T10_projected_gradient_ascent_through_the_sampler_reaches_it(m: float) -> None:
    scheduler, bounds = ddim(20), 0.1 * torch.linspace(1, 0.2, 20, dtype=torch.float64)
    alpha_bar = visited(scheduler)
    w = linear.optimum(alpha_bar[:-1], V, m)

    def respond(omega: Tensor) -> Response:
        moved = push(scheduler, w, omega * bounds[:, None])
        return Response(moved, moved)

    attack = AdversarialPerturbation(steps=10)
    omega = attack(respond, torch.ones(4, dtype=torch.float64), torch.zeros(4, 20, 5, dtype=torch.float64), seeded(1))
    reached = respond(omega).shift.norm(dim=1).max().item()
    assert reached == pytest.approx(linear.largest_displacement(linear.ddim_gains(alpha_bar, w), bounds), rel=1e-4)


# -- what metrics say about samples of the true law ------------------------------------------------


@pytest.mark.parametrize("spectrum", ["flat", "falling", "singular"])
def test_T11_the_frechet_floor_is_the_mean_distance_of_samples(spectrum: str) -> None:
    d, n, repeats = 64, 500, 200
    v = torch.ones(d, dtype=torch.float64)
    if spectrum != "flat":
        v = torch.arange(1, d + 1, dtype=torch.float64) ** -1.5
    if spectrum == "singular":
        v[40:] = 0
    root, distances = v.sqrt(), []
    for seed in range(repeats):
        x = normal(n, d, seed=100 + seed) * root
        covariance = torch.cov(x.T)
        inner = torch.linalg.eigvalsh(root[:, None] * covariance * root).clamp(min=0).sqrt().sum()
        distances.append(float(x.mean(0).square().sum() + v.sum() + covariance.trace() - 2 * inner))
    predicted = frechet_floor(v, n)
    assert np.mean(distances) == pytest.approx(predicted, rel=0.04)
    if spectrum == "flat":
        assert predicted == pytest.approx(2.21, abs=0.005)


def test_T11_the_coverage_of_one_law_is_the_mean_coverage_of_samples() -> None:
    n, k, repeats = 200, 5, 60
    values = []
    for seed in range(repeats):
        real, other = normal(n, 3, seed=2 * seed), normal(n, 3, seed=2 * seed + 1)
        ball = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
        values.append(float((torch.cdist(real, other).min(1).values < ball).double().mean()))
    predicted = linear.coverage_of_one_law(n, k)
    assert np.mean(values) == pytest.approx(predicted, abs=0.004)
    assert predicted == pytest.approx(0.9699, abs=5e-5)


@pytest.mark.parametrize("rho", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_T14_hermite_polynomials_move_as_their_degree_says_and_never_less_than_the_bound(
    degree: int, rho: float
) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)  # exact up to degree 47
    x, z = np.meshgrid(nodes, nodes, indexing="ij")
    weight = np.outer(weights, weights) / weights.sum() ** 2

    def he(y: np.ndarray) -> np.ndarray:
        return np.polynomial.hermite_e.hermeval(y, [0] * degree + [1])

    moved = (weight * (he(math.sqrt(1 - rho**2) * x + rho * z) - he(x)) ** 2).sum()
    variance = math.factorial(degree)
    assert moved / variance == pytest.approx(2 * (1 - (1 - rho**2) ** (degree / 2)), rel=1e-9)
    slack = math.sqrt(moved / variance) / linear.displacement_bound(rho)
    assert slack == pytest.approx(1, rel=1e-9) if degree == 1 else slack > 1.02


def test_T14_a_sampler_of_a_known_mixture_moves_more_than_its_spread_demands() -> None:
    # The exact flow to an even mixture of N(+-1, 0.2^2) in one dimension is the monotone map of quantiles
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(100_000, generator=generator, dtype=torch.float64) for _ in range(2))
    grid = torch.linspace(-3, 3, 20_001, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    cdf = (normal.cdf((grid - 1) / 0.2) + normal.cdf((grid + 1) / 0.2)) / 2

    def flow(y: torch.Tensor) -> torch.Tensor:
        return grid[torch.searchsorted(cdf, normal.cdf(y)).clamp(max=len(grid) - 1)]

    rho = 0.1
    moved = (flow(math.sqrt(1 - rho**2) * x + rho * z) - flow(x)).square().mean().sqrt() / flow(x).std()
    assert float(moved) > 2 * linear.displacement_bound(rho)
