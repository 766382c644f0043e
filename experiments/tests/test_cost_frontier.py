"""The thinned regularisers of the cost frontier are what they are called, and the table is of the file."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from experiments import cost_frontier
from experiments.cost_frontier import VARIANTS, Shared, Thinned, share_below
from experiments.paper.toy_training import schedule_for
from robustdiff.losses import EquivarianceLoss

pytestmark = pytest.mark.slow
RESULTS = Path(__file__).parents[1] / "results"
SCHEDULE = schedule_for("v_prediction")


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) + 0.1 * x


def points(count: int = 4000) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


def test_a_share_of_the_batch_stronger_in_return_has_the_same_expected_loss() -> None:
    full = EquivarianceLoss.preset("paper-random", SCHEDULE)
    thinned = Thinned.preset("paper-random", SCHEDULE, share=0.25)
    t = torch.full((40_000,), 100)
    both = [loss(network, points(40_000), t=t, generator=torch.Generator().manual_seed(1)) for loss in (full, thinned)]
    one, other = (terms.total.mean().item() for terms in both)
    assert other == pytest.approx(one, rel=0.03)
    assert (both[1].equivariance > 0).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_every_fourth_step_and_the_last_part_have_it_in_those_steps_alone() -> None:
    full = EquivarianceLoss.preset("paper-random", SCHEDULE)
    t = torch.full((100,), 100)
    every, last = (
        Thinned.preset("paper-random", SCHEDULE, **settings) for settings in ({"every": 4}, {"last": 0.5, "steps": 6})
    )
    calls = [
        [loss(network, points(100), t=t, generator=torch.Generator().manual_seed(1)) for _ in range(6)]
        for loss in (every, last)
    ]
    whole = full(network, points(100), t=t, generator=torch.Generator().manual_seed(1))
    assert [bool(terms.equivariance.any()) for terms in calls[0]] == [True, False, False, False, True, False]
    assert [bool(terms.equivariance.any()) for terms in calls[1]] == [False] * 3 + [True] * 3
    torch.testing.assert_close(calls[0][0].equivariance, 4 * whole.equivariance)
    torch.testing.assert_close(calls[1][5].total, whole.total)
    torch.testing.assert_close(calls[1][0].total, whole.denoising)  # not yet normalised


def test_the_shared_perturbation_is_a_sign_of_the_gradient_of_the_denoising_loss() -> None:
    shared = Shared.preset("paper", SCHEDULE)
    seen = []

    def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return network(x, t)

    terms = shared(watched, points(50), t=torch.full((50,), 100), generator=torch.Generator().manual_seed(1))
    clean, _, moved = seen
    omega = (moved - clean).detach() / SCHEDULE.sigma(torch.tensor(100))
    torch.testing.assert_close(omega.abs(), terms.radius[:, None].expand_as(omega), rtol=1e-4, atol=1e-5)
    assert bool((terms.equivariance > 0).all())


def test_costs_are_those_of_theory() -> None:
    cost = {name: variant.cost(share_below(SCHEDULE, variant.below)) for name, variant in VARIANTS.items()}
    assert cost["random"] == cost["shared"] == 2
    assert cost["adversarial"] == pytest.approx(8 / 3)
    assert cost["random-share0.25"] == cost["random-every4"] == 1.25
    assert 1.05 < cost["random-c0.3"] < 1.1
    assert cost["adversarial-c0.3"] - 1 == pytest.approx(5 / 3 * (cost["random-c0.3"] - 1))
    assert VARIANTS["adversarial-c0.2"].loss(SCHEDULE) == EquivarianceLoss.preset("fast", SCHEDULE)
    assert 1.05 < cost["adversarial-c0.2"] < 1.1


def test_the_table_says_effect_and_price() -> None:
    distance = {"plain": 0.18, "random": 0.10, "random-c0.3": 0.11}
    runs = {
        f"{name}/{dirt}/{seed}": {"w2": 0.2, "distance": value}
        for name, value in distance.items()
        for dirt in cost_frontier.DIRTS
        for seed in (0, 1)
    }
    rows = {row["variant"]: row for row in cost_frontier.rows({"runs": runs})}
    assert set(rows) == {"random", "random-c0.3"}
    assert rows["random"]["effect"] == 1
    assert rows["random-c0.3"]["effect"] == pytest.approx(7 / 8)
    text = cost_frontier.table({"runs": runs})
    assert "| random, below 0.3 | 1.09 | 0.88 ± 0.00 | 0.110 |" in text


def test_the_findings_and_the_readme_say_what_was_measured() -> None:
    found = json.loads((RESULTS / "cost_frontier.json").read_text())
    row = {row["variant"]: row for row in cost_frontier.rows(found)}
    plain = {
        dirt: statistics.fmean(found["runs"][f"plain/{dirt}/{seed}"]["w2"] for seed in range(3))
        for dirt in cost_frontier.DIRTS
    }
    text = " ".join((RESULTS.parent / "findings.md").read_text().split())
    fast, full, wide = row["adversarial-c0.2"], row["adversarial"], row["adversarial-c0.5"]
    for title, name in (("`paper-random`", "random"), ("`paper`", "adversarial"), ("0.2", "adversarial-c0.2")):
        w2 = " | ".join(f"{row[name][f'w2 {dirt}']:.3f}" for dirt in ("clean", "inlier", "outliers"))
        assert f"{title} | {row[name]['cost']:.2f} | {w2} |" in text
        assert row[name]["seeds"] == 3
    assert f"| plain | 1.00 | {plain['clean']:.3f} | {plain['inlier']:.3f} | {plain['outliers']:.3f} |" in text
    assert f"keeps {fast['effect']:.2f} ± {fast['deviation']:.2f} of the" in text
    assert f"({wide['effect']:.2f} ± {wide['deviation']:.2f}, {wide['cost']:.2f} passes)" in text
    low, high = (kind["w2 clean"] - plain["clean"] for kind in (fast, full))
    assert f"a price of {low:.3f} to {high:.3f} on clean data" in text
    assert f"costs {row['random']['w2 clean'] - plain['clean']:.3f} and gains half as much" in text
    gains = [plain["outliers"] - row[name]["w2 outliers"] for name in ("random", "adversarial")]
    assert 0.4 < gains[0] / gains[1] < 0.6
    readme = " ".join((RESULTS.parents[1] / "README.md").read_text().split())
    out, price = (f"{number:.3f}"[1:] for number in (fast["w2 outliers"], low))
    assert f"{plain['outliers']:.3f}"[1:] + f" to {out}, for {price} on clean data" in readme
