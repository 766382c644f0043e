"""The experiment ``linear-gaussian``: the rows it writes, what they must say, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from experiments.paper import linear
from experiments.paper.linear_gaussian import (
    CLAIMS,
    SPECTRA,
    UNIT,
    Data,
    LinearDenoiser,
    ddpm,
    eigenvalues,
    generated,
    measure,
    robust,
    solve,
    waves,
)
from helpers import Given, uncorrelated
from robustdiff.diffusion.pipeline import make_scheduler
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.baselines import InvarianceLoss
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.utils.errors import UsageError

Rows = dict[str, dict[str, Any]]

BOUNDS = {"T3": 0.03, "T4": 0.04, "T5": 0.03, "T6": 0.03, "T7": 0.01, "T9": 0.06, "T10": 0.006}
"""On the root mean square relative error: 1024 rows of omega (3 %), 5000 samples (2 %), timesteps rounded (1 %)."""


@pytest.fixture(scope="module")
def rows() -> Rows:
    return {claim: measure(claim, dimension=4, spectrum="powerlaw", quick=True, seed=0) for claim in CLAIMS}


def cases(row: dict[str, Any], kind: str) -> dict[str, torch.Tensor]:
    """The values of a kind (predicted, measured, continuum), by case."""
    end = f": {kind}"
    found = {name[: -len(end)]: curve for name, curve in row["curves"].items() if name.endswith(end)}
    return {case: torch.tensor(curve, dtype=torch.float64) for case, curve in found.items()}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_is_measured_is_what_theory_predicts(rows: Rows, claim: str) -> None:
    row = rows[claim]
    predicted, measured = cases(row, "predicted"), cases(row, "measured")
    assert predicted.keys() == measured.keys()
    errors = torch.cat([measured[case] / predicted[case] - 1 for case in predicted])
    assert errors.abs().max() < 3 * BOUNDS[claim]
    value = row["values"]
    assert value["relative_error"]["mean"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-9)
    assert 0 < value["relative_error"]["mean"] < BOUNDS[claim]
    first = next(iter(predicted))
    assert value["predicted"]["mean"] == pytest.approx(predicted[first].mean().item(), rel=1e-9)
    assert value["measured"]["mean"] == pytest.approx(value["predicted"]["mean"], rel=BOUNDS[claim])


@pytest.mark.parametrize("claim", CLAIMS)
def test_rows_are_as_agreed(rows: Rows, claim: str) -> None:
    row = json.loads(json.dumps(rows[claim], allow_nan=False))
    assert row == rows[claim]
    first = "format experiment claim title what told settings seeds n values floor"
    assert list(row) == [*first.split(), "curves", "seconds", "version", "hardware", "torch"]
    assert row["claim"] == claim
    assert row["settings"]["dimension"] == 4
    assert row["seeds"] == [0]
    assert row["n"] == (5000 if claim in ("T3", "T6") else 0)
    for value in [*row["values"].values(), *row["floor"].values()]:
        assert value == {"mean": value["mean"], "sd": None, "per_seed": [value["mean"]]}


def test_a_row_depends_on_its_seed_alone(rows: Rows) -> None:
    again, other = (measure("T10", dimension=4, spectrum="powerlaw", quick=True, seed=seed) for seed in (0, 1))
    assert again["curves"] == rows["T10"]["curves"]
    assert other["values"]["measured"] != again["values"]["measured"]
    assert other["values"]["predicted"] == again["values"]["predicted"]


# -- what the claims say, in the measured values ---------------------------------------------------


def test_T3_no_direction_is_shrunk_more_than_another_but_by_the_steps(rows: Rows) -> None:
    measured, continuum = cases(rows["T3"], "measured"), cases(rows["T3"], "continuum")
    assert set(measured) == {f"{name}, m = {m}" for name in ("ddim", "ddpm") for m in ("0.3", "1", "3")}
    assert continuum["ddim, m = 3"].tolist() == [0.25] * 4
    # 50 steps lose variance, of the small directions most, and without any regulariser too: divide by what they leave
    plain = cases(rows["T4"], "measured")["gradient through the clean branch"]
    for m in ("0.3", "1", "3"):
        torch.testing.assert_close(measured[f"ddim, m = {m}"] / plain, continuum[f"ddim, m = {m}"], rtol=0.25, atol=0)


def test_T5_the_variance_grows_with_the_largest_noise(rows: Rows) -> None:
    measured = cases(rows["T5"], "measured")
    by_noise = torch.stack([measured[f"largest noise {size}"] for size in (5, 20, 80)])
    assert (by_noise[1:] > 1.5 * by_noise[:-1]).all()
    for case, limit in cases(rows["T5"], "continuum").items():
        torch.testing.assert_close(measured[case], limit, rtol=0.2, atol=0)


def test_T6_a_low_gate_shrinks_the_smallest_directions_most_and_a_middle_band_hardly_any(rows: Rows) -> None:
    measured = cases(rows["T6"], "measured")
    assert (measured["ddim, m = 5.9 from 0 to 0.115"].diff() < -0.02).all()
    assert measured["ddim, m = 5.9 from 0 to 0.115"][0] > 0.85
    assert measured["ddim, m = 5.9 from 0 to 0.115"][-1] < 0.6
    assert measured["ddim, m = 2 from 0.5 to 3"][-1] > measured["ddim, m = 2 from 0.5 to 3"][0]


@pytest.mark.parametrize(("dimension", "spectrum"), [(4, "powerlaw"), (5, "powerlaw"), (6, "two-level"), (3, "flat")])
def test_T9_attacks_stay_between_the_bounds_and_go_into_the_mean(rows: Rows, dimension: int, spectrum: str) -> None:
    row = measure("T9", dimension=dimension, spectrum=spectrum, quick=True, seed=3)
    curves = row["curves"]
    paired = torch.tensor(curves["stationary: eigenvalues"], dtype=torch.float64)
    covariance = waves(dimension) @ torch.diag(paired) @ waves(dimension).T
    torch.testing.assert_close(covariance.roll((1, 1), (0, 1)), covariance)
    torch.testing.assert_close(paired[[0, 1, -1]], eigenvalues(spectrum, dimension)[[0, 1, 2 * (dimension // 2) - 1]])
    low, high = curves["random axes: bounds"]
    assert low * 0.999 <= curves["random axes, attack: mean and largest"][1] <= high * 1.001
    # on average signs reach the lower bound: the strongest of many is above it
    assert curves["random axes, random signs: mean and largest"][1] >= low * 0.999
    assert curves["stationary, attack: mean and largest"][1] == pytest.approx(curves["stationary: bounds"][1], rel=1e-4)
    attack, signs = (
        curves[f"stationary, {kind}: share of the energy in the mean"][0] for kind in ("attack", "random signs")
    )
    assert signs == pytest.approx(1 / dimension, rel=0.1)
    if spectrum == "powerlaw":
        assert attack > 0.75
    if spectrum == "flat":
        assert attack == pytest.approx(signs, rel=0.1)
        assert low == pytest.approx(high)


def test_T10_the_displacement_falls_and_relative_to_the_spread_it_rises(rows: Rows) -> None:
    measured = cases(rows["T10"], "measured")
    assert measured["m = 2"] < 0.7 * measured["m = 0"]
    assert measured["m = 2, over the spread"] > 1.05 * measured["m = 0, over the spread"]
    predicted = cases(rows["T10"], "predicted")  # the plain network is exact: no omega
    torch.testing.assert_close(measured["m = 0"], predicted["m = 0"], rtol=1e-4, atol=0)


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("kind", ["robust", "invariance", "clean"])
def test_the_gradient_vanishes_at_the_solution(kind: str, diagonal: bool) -> None:
    data, schedule = Data.draw(eigenvalues("powerlaw", 3), None, 256, seed=2), NoiseSchedule.from_scheduler(ddpm())
    objective = robust(schedule, 1.5, gradient="clean" if kind == "clean" else "both")
    if kind == "invariance":
        objective = InvarianceLoss(schedule, objective.perturbation, objective.strength, UNIT)
    model = solve(objective, data, [60, 400], diagonal)
    for t in (60, 400):
        terms = objective(
            model, data.x0, t=torch.full((256,), t), eps=data.eps, generator=data.generator(t + 1)
        ).total.mean()
        (gradient,) = torch.autograd.grad(terms, model.weight)
        assert gradient.abs().max() < 1e-12
        moved = LinearDenoiser(1.01 * model.weight.detach(), [60, 400])
        away = objective(moved, data.x0, t=torch.full((256,), t), eps=data.eps, generator=data.generator(t + 1))
        assert torch.autograd.grad(away.total.mean(), moved.weight)[0].abs().max() > 1e-3


def test_with_an_omega_of_exact_moments_the_solution_is_the_closed_form() -> None:
    v, m = eigenvalues("powerlaw", 4), 2.0
    data, schedule = Data.draw(v, None, 128, seed=5), NoiseSchedule.from_scheduler(ddpm())
    omega = Given(uncorrelated(128, 4, seed=6)[0] / 3**0.5)
    scheduler = make_scheduler("ddim", ddpm(), 20)
    model = solve(EquivarianceLoss(schedule, omega, 3 * m, UNIT), data, scheduler.timesteps.tolist())
    along = (data.basis.T @ model.weight.detach() @ data.basis).diagonal(dim1=1, dim2=2)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
    torch.testing.assert_close(along, linear.optimum(alpha_bar, v, m), rtol=1e-5, atol=1e-6)
    product = linear.ddim_variance(torch.cat([alpha_bar, torch.ones(1)]), linear.optimum(alpha_bar, v, m))
    torch.testing.assert_close(generated(scheduler, model, data, 0), product, rtol=1e-4, atol=0)


def test_data_have_the_moments_they_should() -> None:
    v = eigenvalues("two-level", 5)
    data = Data.draw(v, None, 300, seed=1)
    torch.testing.assert_close(data.x0.T @ data.x0 / 300, data.basis @ torch.diag(v) @ data.basis.T)
    torch.testing.assert_close(data.x0.T @ data.eps / 300, torch.zeros(5, 5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(data.eps.T @ data.eps / 300, torch.eye(5).double())
    assert (data.basis.abs() < 0.999).all()


@pytest.mark.parametrize("d", [2, 3, 4, 7, 64])
def test_waves_diagonalise_stationary_covariances(d: int) -> None:
    basis = waves(d)
    torch.testing.assert_close(basis.T @ basis, torch.eye(d).double(), rtol=0, atol=1e-12)
    assert torch.equal(basis[:, 0], basis[0, 0].expand(d))
    frequency = (torch.arange(d) + 1) // 2
    covariance = basis @ torch.diag(1.0 / (1 + frequency.double())) @ basis.T
    torch.testing.assert_close(covariance.roll((1, 1), (0, 1)), covariance, rtol=0, atol=1e-12)


def test_a_scheduler_can_be_given_its_noise_levels() -> None:
    levels = torch.logspace(-2, 1.9, 25, dtype=torch.float64)
    scheduler = make_scheduler("ddim", ddpm(levels), 25)
    assert scheduler.timesteps.tolist() == list(range(24, -1, -1))
    found = NoiseSchedule.from_scheduler(scheduler).noise_to_signal(torch.arange(25))
    torch.testing.assert_close(found.double(), levels, rtol=1e-3, atol=0)


def test_spectra() -> None:
    assert eigenvalues("powerlaw", 4).tolist() == pytest.approx([1, 2**-1.5, 3**-1.5, 0.125])
    assert eigenvalues("flat", 3).tolist() == [1, 1, 1]
    assert eigenvalues("two-level", 5).tolist() == [1, 1, 1, 0.01, 0.01]
    assert SPECTRA == ("powerlaw", "flat", "two-level")


@pytest.mark.parametrize("dimension", [-3, 1, 65])
def test_dimensions_out_of_range_are_refused(dimension: int) -> None:
    with pytest.raises(UsageError, match=rf"--dimension {dimension} is out of range: use 2 to 64"):
        measure("T3", dimension=dimension, spectrum="flat", quick=True, seed=0)


def test_other_names_are_refused_with_a_list() -> None:
    with pytest.raises(UsageError, match="--spectrum 'pink' is not one of powerlaw, flat, two-level"):
        measure("T3", dimension=4, spectrum="pink", quick=True, seed=0)
    with pytest.raises(ValueError, match="'T8' is not one of T3, T4, T5, T6, T7, T9, T10"):
        measure("T8", dimension=4, spectrum="flat", quick=True, seed=0)
