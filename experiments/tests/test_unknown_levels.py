"""The experiment with unknown noise in known worlds: its closed forms, a row anew, and what the documents say."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch

from experiments.paper import linear
from helpers import experiment


@pytest.fixture(scope="module")
def unknown() -> ModuleType:
    return experiment("unknown_levels")


def test_noise_is_drawn_in_the_shares_that_are_named(unknown: ModuleType) -> None:
    world, v = unknown.worlds()["Gaussian"]
    images, levels = unknown.draw(world, {0.0: 0.25, 0.2: 0.5}, seed=3)
    assert (levels == 0).sum() == 1000
    at_02 = (levels - 0.2).abs() < 1e-6
    assert at_02.sum() == 2000
    rest = levels[(levels != 0) & ~at_02]
    assert 0.05 <= rest.min() < 0.06
    assert 0.35 < rest.max() <= 0.4
    for some, variance in ((levels == 0, v.mean()), (at_02, v.mean() + 0.04)):
        assert images[some].square().mean().item() == pytest.approx(variance.item(), rel=0.1)


def test_told_the_truth_is_the_floor_and_plain_learns_the_mean_noise(unknown: ModuleType) -> None:
    v, noise = torch.tensor([0.5, 0.01, 0.0]).double(), torch.tensor([0.0, 0.2, 0.2, 0.1]).double()
    nothing = torch.zeros_like(noise)
    floor = unknown.generated(v, nothing, unknown.believing(nothing))
    torch.testing.assert_close(unknown.generated(v, noise, unknown.believing(noise)), floor)
    alpha_bar = unknown.sampler()
    for noisier, believed in ((noise.square().mean(), nothing), (torch.tensor(0.0), noise)):
        expected = linear.ddim_variance(alpha_bar, linear.optimum(alpha_bar[:-1], v + noisier, 0.0))
        torch.testing.assert_close(unknown.generated(v, noise, unknown.believing(believed)), expected)


def test_where_none_is_clean_lower_levels_are_asked_at_the_lowest_trained(unknown: ModuleType) -> None:
    """A direction without variance stays without, whatever is told; half of sigma leaves three quarters of it."""
    noise = torch.full((5,), 0.2).double()
    told = unknown.generated(torch.zeros(1).double(), noise, unknown.believing(noise))
    half = unknown.generated(torch.zeros(1).double(), noise, unknown.believing(noise / 2))
    assert told.sqrt().item() < 0.01
    assert 0.05 < half.sqrt().item() < 0.75**0.5 * 0.2


def test_a_row_anew(unknown: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    subspace = unknown.worlds()["subspace"]
    monkeypatch.setattr(unknown, "worlds", lambda: {"subspace": subspace})
    monkeypatch.setattr(unknown, "MIXTURES", {"90 % at 0.2": {0.0: 0.1, 0.2: 0.9}})
    monkeypatch.setattr(unknown, "COUNT", 2000)
    monkeypatch.setattr(unknown, "SEEDS", (0,))
    (row,) = unknown.rows()
    assert row["missed"] + row["false"] < 10
    frechet = row["frechet"]
    assert frechet["told"] == pytest.approx(frechet["floor"], rel=1e-6)
    assert frechet["auto"] < 2 * frechet["told"]
    assert frechet["plain"] > 100 * frechet["auto"]


def test_the_committed_result_has_every_row(unknown: ModuleType) -> None:
    committed = json.loads(unknown.RESULT.read_text())
    assert committed["protocol"]["images"] == unknown.COUNT
    assert len(committed["rows"]) == len(unknown.worlds()) * len(unknown.MIXTURES) * len(unknown.SEEDS)
