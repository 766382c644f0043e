"""The experiment ``linear-gaussian``: what theory predicts of Gaussian data, against what the package does.

The network is one matrix per timestep. Its minimiser is solved for from gradients of the package's own objective, with
omega drawn by the package's own perturbations; samples come from diffusers' stock schedulers, attacks from the package.
Predictions come from :mod:`experiments.paper.linear`, which none of these use.

A little over 400 lines: one claim after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from experiments.paper import linear
from robustdiff import __version__
from robustdiff.diffusion.model import Model
from robustdiff.diffusion.pipeline import make_scheduler
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.diffusion.sigma_floor import SigmaClampedModel
from robustdiff.losses.baselines import InvarianceLoss
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.perturbation import (
    AdversarialPerturbation,
    Perturbation,
    Radius,
    RandomPerturbation,
    Response,
)
from robustdiff.losses.strength import SigmaRange
from robustdiff.utils.errors import UsageError

SPECTRA = ("powerlaw", "flat", "two-level")
UNIT = Radius(exponent=0.0, scale=1.0, floor=0.0, random=False)
KAPPA = 1 / 3
"""Second moment of an element of omega, uniform on [-1, 1]."""


def eigenvalues(spectrum: str, dimension: int) -> Tensor:
    """Eigenvalues of the data covariance by name, the largest, 1, first; shape (dimension,), float64.

    Args:
        spectrum: ``"powerlaw"`` (``i^-1.5``), ``"flat"`` (all 1), or ``"two-level"`` (one half 1, the other 0.01).
        dimension: 2 to 64.

    Raises:
        UsageError: Naming the flag, if there is no such spectrum or the dimension is out of range.
    """
    if not 2 <= dimension <= 64:
        raise UsageError(f"--dimension {dimension} is out of range: use 2 to 64")
    if spectrum not in SPECTRA:
        raise UsageError(f"--spectrum {spectrum!r} is not one of {', '.join(SPECTRA)}")
    rank = torch.arange(1, dimension + 1, dtype=torch.float64)
    if spectrum == "powerlaw":
        return rank**-1.5
    return torch.where((rank <= (dimension + 1) // 2) | (spectrum == "flat"), rank**0, 0.01 * rank**0)


# -- a linear network, its training and its samples --------------------------------------------------


class LinearDenoiser(nn.Module):
    """``eps_hat = W_t x_t``: a matrix per timestep, called like a diffusers model.

    Args:
        weight: The matrices, shape (K, d, d), or their diagonals, (K, d).
        timesteps: The K timesteps that have one.
    """

    def __init__(self, weight: Tensor, timesteps: Sequence[int]) -> None:
        """Keep a copy of the weights as the parameter."""
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.rows = {t: row for row, t in enumerate(timesteps)}

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise in states ``x_t``, shape (B, d), all of them at the first timestep of ``t``, (B,) or ()."""
        weight = self.weight[self.rows[int(t.reshape(-1)[0])]]
        return weight * x_t if weight.ndim == 1 else x_t @ weight.T


@dataclass(frozen=True)
class Data:
    """Training data and their noise, with exact second moments: what is left to chance in training is omega."""

    v: Tensor  # (d,), eigenvalues of the covariance
    basis: Tensor  # (d, d), its eigenvectors, the columns
    x0: Tensor  # (rows, d)
    eps: Tensor  # (rows, d)
    seed: int  # of all draws

    @classmethod
    def draw(cls, v: Tensor, basis: Tensor | None, rows: int, seed: int) -> Data:
        """Draw ``rows`` data; ``basis`` None for random axes, which are not those of omega's box."""
        generator, d = torch.Generator().manual_seed(seed), len(v)
        if basis is None:
            basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
        draw = torch.randn(rows, 2 * d, generator=generator, dtype=torch.float64)
        white = torch.linalg.qr(draw - draw.mean(0)).Q * rows**0.5
        return cls(v, basis, white[:, :d] * v.sqrt() @ basis.T, white[:, d:], seed)

    def generator(self, offset: int) -> torch.Generator:
        """A stream of its own for each ``offset``."""
        return torch.Generator().manual_seed(self.seed * 10_000 + offset)


def solve(objective: DenoisingLoss, data: Data, timesteps: Sequence[int], diagonal: bool = False) -> LinearDenoiser:
    """The linear network at which the objective's gradient vanishes.

    The gradient of a loss that is quadratic in the network is ``W C - B``: its values at 0 and at the identity give the
    solution, where any gradient descent on these draws ends.
    """
    one = torch.eye(len(data.v), dtype=torch.float64)
    one = one.diagonal() if diagonal else one
    solved = []
    for t in timesteps:
        gradients, times = [], torch.full((len(data.x0),), t)
        for start in (torch.zeros_like(one), one):
            model = LinearDenoiser(start[None], [t])
            generator = data.generator(t + 1)  # the same omega at both
            loss = objective(model, data.x0, t=times, eps=data.eps, generator=generator).total.mean()
            gradients.append(torch.autograd.grad(loss, model.weight)[0][0])
        slope, minus_b = gradients[1] - gradients[0], gradients[0]
        solved.append(-minus_b / slope if diagonal else torch.linalg.solve(slope, -minus_b, left=False))
    return LinearDenoiser(torch.stack(solved), timesteps)


@torch.no_grad()
def generated(scheduler: Any, model: Model, data: Data, drawn: int) -> Tensor:  # noqa: ANN401
    """Variances generated along the eigenvectors, shape (d,): exact for DDIM, of ``drawn`` samples for DDPM."""
    d, noisy, generator = len(data.v), isinstance(scheduler, DDPMScheduler), data.generator(2000)
    x_t = torch.eye(d, dtype=torch.float64)  # the unit vectors, whose images make the covariance
    x_t = torch.randn(drawn, d, generator=generator, dtype=torch.float64) if noisy else x_t
    for t in scheduler.timesteps:
        x_t = scheduler.step(model(x_t, t), t, x_t, generator=generator).prev_sample
    covariance = torch.cov(x_t.T) if noisy else x_t.T @ x_t
    return (data.basis.T @ covariance @ data.basis).diagonal()


def visited(scheduler: Any) -> Tensor:  # noqa: ANN401
    """alpha_bar at every timestep of a scheduler with trailing spacing, and 1, shape (K + 1,)."""
    return torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).double()


def ddpm(levels: Tensor | None = None) -> Any:  # noqa: ANN401 - schedulers are untyped
    """Diffusers' default DDPM scheduler, or one whose noise levels sigma/alpha are ``levels``, ascending."""
    if levels is None:
        return DDPMScheduler(clip_sample=False)  # type: ignore[no-untyped-call]
    table = 1 / (1 + levels.double().square())
    betas = 1 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    # by name: diffusers' from_config forgets what was passed by position
    named = {"num_train_timesteps": len(table), "trained_betas": betas.tolist(), "clip_sample": False}
    return DDPMScheduler(**named)  # type: ignore[no-untyped-call]


# -- the claims --------------------------------------------------------------------------------------


@dataclass
class Finding:
    """A claim's measurement: values predicted and measured by case, the first of which is the row's headline."""

    data: Data  # on random axes
    steps: int  # of the samplers; a divisor of 1000
    drawn: int  # samples, where the sampler is stochastic
    settings: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Tensor] = field(default_factory=dict)  # each (n,)
    measured: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, Tensor] = field(default_factory=dict)  # further values

    def add(self, case: str, predicted: Tensor | float, measured: Tensor | float) -> None:
        """One more case."""
        self.predicted[case] = torch.as_tensor(predicted, dtype=torch.float64).reshape(-1)
        self.measured[case] = torch.as_tensor(measured, dtype=torch.float64).reshape(-1)

    def sample(self, case: str, scheduler: Any, model: Model, w: Tensor, continuum: Tensor | None = None) -> None:  # noqa: ANN401
        """One more case: the variance that ``model`` generates, over the data's, with ``w`` predicted for its weights.

        The ``continuum``, variances for infinitely many steps, is kept beside it: finite samplers only approach it.
        """
        v, levels = self.data.v, visited(scheduler)
        product = linear.ddpm_variance if isinstance(scheduler, DDPMScheduler) else linear.ddim_variance
        self.add(case, product(levels, w) / v, generated(scheduler, model, self.data, self.drawn) / v)
        if continuum is not None:
            self.curves[f"{case}: continuum"] = continuum / v


def robust(schedule: NoiseSchedule, m: float, **changes: Any) -> EquivarianceLoss:  # noqa: ANN401
    """The objective with omega uniform on [-1, 1] and ``lambda kappa = m``."""
    return EquivarianceLoss(schedule, RandomPerturbation(), **{"strength": m / KAPPA, "radius": UNIT, **changes})


def _T3(finding: Finding) -> None:
    data, schedule = finding.data, NoiseSchedule.from_scheduler(ddpm())
    finding.settings["m"] = [1.0, 0.3, 3.0]
    samplers = {name: make_scheduler(name, ddpm(), finding.steps) for name in ("ddim", "ddpm")}
    alpha_bar = visited(samplers["ddim"])[:-1]
    for m in finding.settings["m"]:
        model = solve(robust(schedule, m), data, samplers["ddim"].timesteps.tolist())
        for name, scheduler in samplers.items():
            predicted = linear.optimum(alpha_bar, data.v, m)
            finding.sample(f"{name}, m = {m:g}", scheduler, model, predicted, data.v / (1 + m))


def _T4(finding: Finding) -> None:
    data, schedule = finding.data, NoiseSchedule.from_scheduler(ddpm())
    m = finding.settings["m"] = 1.0
    scheduler = make_scheduler("ddim", ddpm(), finding.steps)
    for case, effective, changes in (
        ("true noise as target", linear.noise_target_strength(m / KAPPA, KAPPA), {"target": "noise"}),
        ("gradient through the perturbed branch", m, {"gradient": "perturbed"}),
        ("gradient through the clean branch", 0.0, {"gradient": "clean"}),
    ):
        model = solve(robust(schedule, m, **changes), data, scheduler.timesteps.tolist())
        w = linear.optimum(visited(scheduler)[:-1], data.v, effective)
        finding.sample(case, scheduler, model, w, data.v / (1 + effective))


def _T5(finding: Finding) -> None:
    data, steps = finding.data, finding.steps
    m = finding.settings["m"] = 0.5
    cases: dict[str, tuple[Any, Tensor | None]] = {}
    for largest in (80.0, 20.0, 5.0):
        # a variance-exploding process: DDIM takes the same steps in x_t / alpha, whatever alpha is
        levels = torch.logspace(-2, torch.tensor(largest).log10().item(), steps, dtype=torch.float64)
        cases[f"largest noise {largest:g}"] = ddpm(levels), linear.invariance_variance(data.v, m, largest)
    cases["default process"] = ddpm(), None
    for case, (base, continuum) in cases.items():
        objective = InvarianceLoss(NoiseSchedule.from_scheduler(base), RandomPerturbation(), m / KAPPA, UNIT)
        scheduler = make_scheduler("ddim", base, steps)
        model = solve(objective, data, scheduler.timesteps.tolist())
        w = linear.invariance_optimum(visited(scheduler)[:-1], data.v, m)
        finding.sample(case, scheduler, model, w, continuum)


def _T6(finding: Finding) -> None:
    data, schedule = finding.data, NoiseSchedule.from_scheduler(ddpm())
    finding.settings["gates"] = gates = [[0.0, 0.17, 1.7], [0.0, 0.115, 5.9], [0.5, 3.0, 2.0]]
    samplers = {name: make_scheduler(name, ddpm(), finding.steps) for name in ("ddim", "ddpm")}
    alpha_bar = visited(samplers["ddim"])[:-1]
    level = (1 / alpha_bar - 1).sqrt()
    for low, high, m in gates:
        objective = robust(schedule, m, strength=SigmaRange(low, high, m / KAPPA))
        model = solve(objective, data, samplers["ddim"].timesteps.tolist())
        w = linear.optimum(alpha_bar, data.v, m * ((low <= level) & (level <= high)).double())
        for name, scheduler in samplers.items():
            limit = linear.gated_variance if name == "ddim" else linear.gated_variance_sde
            case = f"{name}, m = {m:g} from {low:g} to {high:g}"
            finding.sample(case, scheduler, model, w, limit(data.v, m, low, high))


def _T7(finding: Finding) -> None:
    data, schedule = finding.data, NoiseSchedule.from_scheduler(ddpm())
    m = finding.settings["m"] = 1.0
    relabel = finding.settings["relabel"] = (1 + m) ** 0.5
    scheduler = make_scheduler("ddim", ddpm(), finding.steps)
    asked = schedule.timestep_at(relabel * schedule.noise_to_signal(scheduler.timesteps))
    plain = solve(DenoisingLoss(schedule), data, sorted({*scheduler.timesteps.tolist(), *asked.tolist()}))
    w = linear.optimum(visited(scheduler)[:-1], data.v, m)
    finding.sample("relabelled", scheduler, SigmaClampedModel(plain, schedule, relabel), w, data.v / (1 + m))


def waves(d: int) -> Tensor:
    """Orthonormal waves on a ring of d pixels by rising frequency, the columns, the constant first; shape (d, d)."""
    column = torch.arange(d)
    phase = 2 * torch.pi / d * column[:, None].double() * ((column + 1) // 2)
    columns = torch.where((column % 2 == 1) & (column < d - 1 + d % 2), phase.sin(), phase.cos())
    return torch.nn.functional.normalize(columns, dim=0)


def _T9(finding: Finding) -> None:
    data, schedule = finding.data, NoiseSchedule.from_scheduler(ddpm())
    d, column = len(data.v), torch.arange(len(data.v))
    finding.settings.update(sigma_over_alpha=1.0, attack_steps=20)
    t = schedule.timestep_at(torch.tensor(1.0))
    alpha_bar, times = float(schedule.alphas_cumprod[t]), t.repeat(len(data.x0))
    paired = data.v[torch.where(column > 0, 2 * ((column + 1) // 2) - 1, 0)]  # both waves of a frequency alike
    finding.curves["stationary: eigenvalues"] = paired
    worlds = {"stationary": Data.draw(paired, waves(d), len(data.x0), data.seed), "random axes": data}
    attacks: dict[str, Perturbation] = {
        "attack": AdversarialPerturbation(finding.settings["attack_steps"], inner="residual"),
        "random signs": RandomPerturbation("signs"),
    }
    for name, world in worlds.items():
        model, x_t = solve(DenoisingLoss(schedule), world, [int(t)]), schedule.add_noise(world.x0, world.eps, times)
        low, high = linear.linf_bounds(alpha_bar, linear.optimum(alpha_bar, world.v), 1.0)
        finding.curves[f"{name}: bounds"] = torch.tensor([low, high])

        def respond(omega: Tensor, model: LinearDenoiser = model, x_t: Tensor = x_t) -> Response:
            moved = model(schedule.perturb(x_t, omega, times), times) - model(x_t, times)
            return Response(moved, schedule.equivariance_residual(moved, omega, times))

        for attack, perturbation in attacks.items():
            omega = perturbation(respond, torch.ones(len(x_t)), x_t, data.generator(3000))
            penalty = respond(omega).residual.detach().square().sum(1)
            if attack == "random signs":
                finding.add(f"{name}, random signs, mean", low, penalty.mean())
            elif name == "stationary":
                finding.add(f"{name}, strongest attack", high, penalty.max())
            share = (omega.sum(1).square() / (d * omega.square().sum(1))).mean()
            finding.curves[f"{name}, {attack}: share of the energy in the mean"] = share.reshape(1)
            finding.curves[f"{name}, {attack}: mean and largest"] = torch.stack([penalty.mean(), penalty.max()])


def _T10(finding: Finding) -> None:
    v, schedule, steps = finding.data.v, NoiseSchedule.from_scheduler(ddpm()), 10
    finding.settings.update(m=[2.0, 0.0], push=0.1, sampler_steps=steps, attack_steps=20, restarts=8)
    data = Data.draw(v, torch.eye(len(v), dtype=torch.float64), len(finding.data.x0), finding.data.seed)
    scheduler = make_scheduler("ddim", ddpm(), steps)
    levels, times, push = visited(scheduler), scheduler.timesteps, finding.settings["push"]
    attack = AdversarialPerturbation(finding.settings["attack_steps"])
    for m in finding.settings["m"]:
        model = solve(robust(schedule, m), data, times.tolist(), diagonal=True)

        def respond(omega: Tensor, model: LinearDenoiser = model) -> Response:
            x_t = torch.zeros_like(omega[:, 0])
            for k, t in enumerate(times):
                x_t = x_t + push * omega[:, k]
                x_t = scheduler.step(model(x_t, t), t, x_t).prev_sample
            return Response(x_t, x_t)

        start = torch.zeros(finding.settings["restarts"], steps, len(v), dtype=torch.float64)
        omega = attack(respond, torch.ones(len(start), dtype=torch.float64), start, data.generator(3000))
        measured = respond(omega).shift.detach().norm(dim=1).max()
        w = linear.optimum(levels[:-1], v, m)
        predicted = linear.largest_displacement(linear.ddim_gains(levels, w), torch.full((steps,), push))
        true_spread = linear.ddim_variance(levels, w).sum().sqrt()
        spread = generated(scheduler, model, data, 0).sum().sqrt()
        finding.add(f"m = {m:g}, over the spread", predicted / true_spread, measured / spread)
        finding.add(f"m = {m:g}", predicted, measured)


_RATIO = "generated variance over the data's, mean over directions"
_MEASURES: dict[str, tuple[Callable[[Finding], None], str, str]] = {
    "T3": (_T3, "a constant strength shrinks every direction alike", f"{_RATIO}; DDIM, m = 1"),
    "T4": (_T4, "which branch carries the gradient, and which target", f"{_RATIO}; the true noise as target, m = 1"),
    "T5": (_T5, "invariance lets the variance grow with the noise", f"{_RATIO}; m = 0.5, largest noise 80"),
    "T6": (_T6, "a gate in the noise level is selective", f"{_RATIO}; DDIM, m = 1.7 below sigma/alpha = 0.17"),
    "T7": (_T7, "relabelling a plain network does the same for nothing", f"{_RATIO}; sqrt(2), rounded to timesteps"),
    "T9": (_T9, "an attack on stationary data goes into the mean", "largest ||A omega||^2 found in the box"),
    "T10": (_T10, "shrinking looks like robustness", "largest displacement over the generated spread; DDIM, m = 2"),
}
CLAIMS = tuple(_MEASURES)
"""Names of the claims, in their order; see docs/explanation/theory.md."""


def measure(claim: str, *, dimension: int, spectrum: str, quick: bool, seed: int) -> dict[str, Any]:
    """Measure one claim.

    Args:
        claim: One of :data:`CLAIMS`.
        dimension: Of the data, 2 to 64.
        spectrum: One of :data:`SPECTRA`.
        quick: Fewer training rows, sampler steps and samples.
        seed: Of all draws, >= 0.

    Returns:
        The row as it is to be written: ``values`` holds the headline case and the root mean square of all relative
        errors, ``curves`` every value; ``n`` counts drawn samples, 0 where covariances are propagated exactly.

    Raises:
        UsageError: Naming the flag, if the dimension or the spectrum is none of those.
        ValueError: If there is no such claim.
    """
    if claim not in _MEASURES:
        raise ValueError(f"claim {claim!r} is not one of {', '.join(CLAIMS)}")
    v, began = eigenvalues(spectrum, dimension), time.perf_counter()
    function, title, what = _MEASURES[claim]
    rows = max(1024, 64 * dimension) if quick else max(4096, 128 * dimension)
    finding = Finding(Data.draw(v, None, rows, seed), *((50, 5000) if quick else (100, 20_000)))
    function(finding)
    first, *_ = cases = list(finding.predicted)
    errors = torch.cat([finding.measured[case] / finding.predicted[case] - 1 for case in cases])
    values = {
        "predicted": finding.predicted[first].mean(),
        "measured": finding.measured[first].mean(),
        "relative_error": errors.square().mean().sqrt(),
    }
    curves = {"eigenvalues": v, **finding.curves}
    for case in cases:
        curves |= {f"{case}: predicted": finding.predicted[case], f"{case}: measured": finding.measured[case]}
    n = finding.drawn if claim in ("T3", "T6") else 0
    settings = {"dimension": dimension, "spectrum": spectrum, "rows": rows, "steps": finding.steps, "radius": 1.0}
    return {
        "format": 1,
        "experiment": "linear-gaussian",
        "claim": claim,
        "title": title,
        "what": what,
        "told": "the law",
        "settings": {"quick": quick, **settings, **finding.settings},
        "seeds": [seed],
        "n": n,
        "values": {name: _one(float(value)) for name, value in values.items()},
        "floor": {"relative_error": _one((2 / n) ** 0.5)} if n else {},
        "curves": {name: curve.tolist() for name, curve in curves.items()},
        "seconds": round(time.perf_counter() - began, 2),
        "version": __version__,
        "hardware": f"cpu, {(threads := torch.get_num_threads())} thread{'s'[: threads > 1]}",
        "torch": torch.__version__,
    }


def _one(value: float) -> dict[str, Any]:
    """A value of one seed, which has no deviation."""
    return {"mean": value, "sd": None, "per_seed": [value]}
