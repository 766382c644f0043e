"""The rows of the experiments: names, what each method sets, which rows there are."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from experiments.paper.point_denoiser import PointDenoiser
from experiments.paper.toy_grid import (
    DIRTS,
    FLOORS,
    FRONTIER,
    IMAGES,
    INVARIANCE,
    KEY,
    METHODS,
    POINTS,
    QUADRATURES,
    QUICK,
    RELABELS,
    SHRINKS,
    STATE_UNITS,
    SWEPT,
    WORLDS,
    Method,
    images_training,
    pick,
    rows_of,
    training_data,
)
from experiments.paper.toy_training import schedule_for, settings_of
from helpers import normal, seeded
from robustdiff.data.corruption import Corruption
from robustdiff.losses.baselines import (
    InputPerturbationLoss,
    InvarianceLoss,
    PseudoHuberLoss,
)
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.perturbation import (
    AdversarialPerturbation,
    Radius,
    RandomPerturbation,
)
from robustdiff.losses.strength import SigmaRange
from robustdiff.utils.errors import UsageError

EVERY = {
    **METHODS, **FRONTIER, **{f"{name} (invariance)": method for name, method in INVARIANCE.items()},
}  # fmt: skip
LEVELS = torch.tensor([0.01, 0.0999, 0.1001, 0.1499, 0.1501, 0.4999, 0.5001, 2.999, 3.001, 100.0], dtype=torch.float64)
ISSUE = {
    "plain": ["plain"],
    "invariance": ["invariance"],
    "random": ["random"],
    "adversarial-shift": ["adversarial-shift"],
    "adversarial-residual": ["adversarial-residual"],
    "gated lambda(sigma)": ["gated-low", "gated-mid", "gated-strong", "preset"],
    "pseudo-Huber": ["pseudo-huber"],
    "input perturbation": ["input-perturbation"],
    "relabelled plain": ["relabelled"],
    "label-floored plain": ["label-floor"],
    "shrunk plain": ["shrunk"],
    "plain on the clean subset": ["clean-subset"],
    "the radius in units of the state": ["paper", "paper-random", "paper-half", "paper-random-half"],
    "floored in quadrature plain": ["quadrature-floor"],
}
"""What is compared, and the methods that are it."""
BESIDE = ["ideal", "plain-epsilon", "gated-low-floor"]
"""Not among them: the best there can be, the control of invariance, and two of the twelve together."""


def objective(method: Method) -> DenoisingLoss:
    return method.objective(schedule_for(method.prediction))


def second_moment(robust: EquivarianceLoss) -> float:
    """kappa = E[omega_i^2] at radius 1, from the objective's own perturbation, drawn."""
    assert isinstance(robust.perturbation, RandomPerturbation)
    like = torch.zeros(2000, 50)
    omega = robust.perturbation(lambda _: pytest.fail("asked the network"), torch.ones(2000), like, seeded())
    return float(omega.square().mean())


@pytest.mark.parametrize("name", EVERY)
def test_every_method_gives_finite_losses_of_the_right_sign(name: str) -> None:
    method = EVERY[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = PointDenoiser(2, width=8, depth=1)
    t = torch.tensor([0, 1, 20, 60, 300, 600, 900, 999])
    x0 = normal(8, 2, dtype=torch.float32)
    terms = objective(method)(model, x0, generator=seeded(1), t=t)
    level = schedule_for(method.prediction).noise_to_signal(t)
    assert terms.total.shape == (8,)
    for values in (terms.total, terms.denoising, terms.equivariance, terms.radius, terms.strength):
        assert torch.isfinite(values).all()
        assert (values >= 0).all()
    assert (terms.denoising > 0).all()
    settings = method.settings
    both = terms.denoising + terms.strength * terms.equivariance
    if settings.get("levels") == "normalised":  # by 1 + lambda E[omega^2], which is 1 or more
        assert bool((terms.total < both).all())
    else:
        torch.testing.assert_close(terms.total, both)
    inside = torch.zeros(8, dtype=torch.bool)  # where the settings say that there is a regulariser
    if ("m" in settings and not method.free) or name in ("preset", "gated-strong"):
        inside = (level >= settings["low"]) & (level <= float(settings["high"]))
    elif "strength" in settings:
        inside = torch.ones(8, dtype=torch.bool)
    assert torch.equal(terms.strength > 0, inside)
    assert torch.equal(terms.radius > 0, inside)
    assert torch.equal(terms.equivariance > 0, inside)
    terms.total.mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", [n for n, method in EVERY.items() if "m" in method.settings and not method.free])
def test_the_settings_of_a_strength_are_those_of_its_objective(name: str) -> None:
    method, settings = EVERY[name], EVERY[name].settings
    robust = objective(method)
    assert isinstance(robust, EquivarianceLoss)
    assert type(robust) is (InvarianceLoss if name.startswith("invariance-") else EquivarianceLoss)
    assert robust.radius == Radius(exponent=0.0, scale=1.0, floor=0.0, random=False)
    assert settings["perturbation"].endswith("r = 1")
    if settings["perturbation"].startswith("random signs"):
        assert second_moment(robust) == 1  # kappa = 1: the strength is m
    else:
        assert settings["perturbation"].startswith("adversarial")
        assert robust.perturbation == AdversarialPerturbation(inner="residual")
        assert method.family == "adversarial-gated"
    low, high, m = settings["low"], float(settings["high"]), settings["m"]
    if callable(robust.strength):
        wanted = m * (LEVELS.ge(low) & LEVELS.le(high)).double()
        torch.testing.assert_close(robust.strength(LEVELS, LEVELS), wanted, rtol=0, atol=0)
        assert robust.strength == SigmaRange(low, high, m)
    else:
        assert (robust.strength, low, high) == (m, 0, math.inf)
    assert (robust.gradient, robust.target) == ("both", "output")
    if name in FRONTIER or name.endswith("(invariance)"):
        assert f"m{m:g}" in name
        assert f"m = {m:g}" in method.title


@pytest.mark.parametrize(
    ("name", "perturbation"),
    [
        ("invariance", AdversarialPerturbation(steps=1, inner="shift")),
        ("random", RandomPerturbation("uniform")),
        ("adversarial-shift", AdversarialPerturbation(steps=1, inner="shift")),
        ("adversarial-residual", AdversarialPerturbation(steps=1, inner="residual")),
    ],
)
def test_the_methods_of_the_paper_have_its_strength_and_radius(name: str, perturbation: Any) -> None:
    robust, settings = objective(METHODS[name]), METHODS[name].settings
    assert isinstance(robust, EquivarianceLoss)
    assert isinstance(robust, InvarianceLoss) == (name == "invariance")
    assert robust.perturbation == perturbation
    assert robust.strength == settings["strength"] == 0.3
    assert robust.radius == Radius(exponent=2.0, scale=1.0, floor=8 / 255, random=True)
    assert settings["radius"] == "s^2 U(0, 1) + 8/255"
    words = ["adversarial", "one step", perturbation.inner] if name != "random" else ["random", "uniform"]
    assert all(word in settings["perturbation"] for word in words)


def test_the_settings_of_the_other_objectives_are_theirs() -> None:
    for name in ("ideal", "plain", "plain-epsilon", "relabelled", "label-floor", "shrunk", "clean-subset"):
        assert type(objective(METHODS[name])) is DenoisingLoss
    shipped = objective(METHODS["preset"])
    assert shipped == EquivarianceLoss.preset("gated", shipped.schedule)
    assert isinstance(shipped, EquivarianceLoss)
    said = METHODS["preset"].settings
    assert shipped.strength == SigmaRange(said["low"], said["high"], said["strength"])
    assert shipped.radius == Radius(exponent=0.0, scale=1.0, floor=0.0, random=False)
    assert second_moment(shipped) == pytest.approx(1 / 3, abs=0.005)
    assert said["perturbation"] == "random uniform, r = 1"
    noisy = objective(METHODS["input-perturbation"])
    assert isinstance(noisy, InputPerturbationLoss)
    assert noisy.gamma == METHODS["input-perturbation"].settings["gamma"] == 0.1
    huber = objective(METHODS["pseudo-huber"])
    assert isinstance(huber, PseudoHuberLoss)
    assert huber.width is None  # falls with the noise level
    assert "level" in METHODS["pseudo-huber"].settings.values()


def test_invariance_is_compared_with_epsilon_prediction_and_all_else_with_v_prediction() -> None:
    epsilon = {name for name, method in METHODS.items() if method.prediction == "epsilon"}
    assert epsilon == {"plain-epsilon", "invariance"}
    assert {method.prediction for method in FRONTIER.values()} == {"v_prediction"}
    assert {method.prediction for method in INVARIANCE.values()} == {"epsilon"}


@pytest.mark.parametrize("name", EVERY)
def test_settings_are_json_and_hide_none_of_the_training(name: str) -> None:
    method = EVERY[name]
    assert json.loads(json.dumps(method.settings, allow_nan=False)) == dict(method.settings)
    assert not set(method.settings) & set(settings_of(POINTS, method.prediction))
    assert not set(method.settings) & {"chosen", "seed"}


def test_gates_of_the_frontier_share_what_rules_their_price() -> None:
    swept: dict[float, list[float]] = {}
    for method in FRONTIER.values():
        if method.family == "gated":
            assert method.settings["low"] == 0
            c = method.settings["high"]
            swept.setdefault(c, []).append(method.settings["m"] * c**2)
    assert len(swept) >= 3
    for products in swept.values():
        assert sorted(products) == pytest.approx([0.05, 0.2, 0.8], rel=0.05)


def test_a_frontier_has_four_families_each_of_several_strengths() -> None:
    families: dict[str | None, list[Mapping[str, Any]]] = {}
    for method in FRONTIER.values():
        families.setdefault(method.family, []).append(method.settings)
    assert set(families) == {"constant", "gated", "mid-band", "adversarial-gated"}
    assert all(len(members) >= 3 for members in families.values())
    assert all((s["low"], s["high"]) == (0, "inf") for s in families["constant"])
    assert all(s["low"] > 0 and math.isfinite(s["high"]) for s in families["mid-band"])
    assert {method.family for method in [*METHODS.values(), *INVARIANCE.values()]} == {None}


def test_free_methods_are_plain_training_and_say_what_was_tried() -> None:
    tried = {"relabelled": RELABELS, "label-floor": FLOORS, "shrunk": SHRINKS, "gated-low-floor": FLOORS}
    tried["quadrature-floor"] = QUADRATURES
    bases = {**dict.fromkeys(tried, "plain"), "gated-low-floor": "gated-low"}
    assert {name for name, method in EVERY.items() if method.free} == set(tried)
    kinds = ["relabel", "label_floor", "shrink", "label_floor", "quadrature_floor"]
    assert [METHODS[name].free for name in tried] == kinds
    words = {4: "four", 5: "five"}
    for name, settings in tried.items():
        method = METHODS[name]
        assert method.prediction == METHODS[bases[name]].prediction
        assert {**METHODS[bases[name]].settings, "tried": list(settings)} == method.settings
        assert method.settings["tried"] == list(settings)
        assert f"the best of {words[len(settings)]} " in method.told
        assert not method.clean_only
    assert min(RELABELS) > 1
    assert max(SHRINKS) < 1
    for row in rows_of("plane"):
        assert row.trained == bases.get(row.method, row.method)


def test_told_says_more_than_nothing_wherever_clean_data_or_the_dirt_were_used() -> None:
    told = {name for name, method in METHODS.items() if method.told != "nothing"}
    assert told == {
        "ideal",
        "preset",
        "gated-low",
        "gated-mid",
        "gated-low-floor",
        "relabelled",
        "label-floor",
        "quadrature-floor",
        "shrunk",
        "clean-subset",
    }
    assert {name for name, method in EVERY.items() if method.clean_only} == {"clean-subset"}


def test_every_method_has_words_of_its_own() -> None:
    for methods in (METHODS, FRONTIER, INVARIANCE):
        assert len({method.title for method in methods.values()}) == len(methods)
    for methods in (METHODS, FRONTIER):  # in the third it is the title that says how strong
        assert len({method.what for method in methods.values()}) == len(methods)
    assert not set(METHODS) & set(FRONTIER)


def test_training_data_leaves_out_what_was_hit_only_where_told() -> None:
    dirty, hit = torch.arange(12.0).reshape(6, 2), torch.tensor([True, False, True, False, False, True])
    assert training_data(METHODS["plain"], dirty, hit) is dirty
    assert training_data(METHODS["clean-subset"], dirty, hit).tolist() == [[2, 3], [6, 7], [8, 9]]


# -- rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", WORLDS)
@pytest.mark.parametrize("quick", [False, True])
def test_names_of_rows_are_unique_and_those_of_their_parts(experiment: str, quick: bool) -> None:
    rows = rows_of(experiment, quick=quick)
    assert len({row.name for row in rows}) == len(rows) > 0
    for row in rows:
        assert row.name == f"{row.world}-{row.dirt}-{row.method}"
        assert row.experiment == experiment
        assert row.world in WORLDS[experiment]
        assert row.dirt in DIRTS
        assert row.trained in (METHODS if experiment != "invariance" else INVARIANCE) or row.method in FRONTIER


@pytest.mark.parametrize("experiment", ["plane", "mixture", "subspace"])
def test_rows_cover_worlds_dirts_and_methods_as_the_issue_lists_them(experiment: str) -> None:
    methods = [name for members in ISSUE.values() for name in members] + BESIDE
    assert sorted(METHODS) == sorted(methods)
    worlds = WORLDS[experiment]
    wanted = {(w, d, m) for w in worlds for d in DIRTS for m in methods if (d, m) != ("clean", "clean-subset")}
    wanted -= {(w, d, "ideal") for w in worlds for d in DIRTS if d != "clean"}  # the exact score sees no dirt
    third = {"plain", "label-floor", *STATE_UNITS}  # what is run on a third noise level
    wanted = {(w, d, m) for w, d, m in wanted if d != "inlier-s0.1" or m in third}
    wanted |= {(worlds[0], d, m) for d in SWEPT for m in FRONTIER}
    rows = rows_of(experiment)
    assert {(row.world, row.dirt, row.method) for row in rows} == wanted
    assert len(rows) == len(wanted)
    first = [row.method in KEY for row in rows]
    assert first == sorted(first, reverse=True)  # what conclusions rest on comes first


def test_dirt_is_that_of_the_issue() -> None:
    assert list(DIRTS) == ["clean", "inlier", "inlier-s0.1", "outliers"]
    assert DIRTS["inlier-s0.1"] == ("gaussian:sigma=0.1,fraction=0.9",)
    assert DIRTS["clean"] == ()
    (inlier,) = (Corruption.parse(spec) for spec in DIRTS["inlier"])
    assert (inlier.kind, inlier.parameters["sigma"], inlier.fraction) == ("gaussian", 0.2, 0.9)
    (outliers,) = (Corruption.parse(spec) for spec in DIRTS["outliers"])
    assert (outliers.kind, outliers.parameters["source"], outliers.fraction) == ("outlier", "uniform", 0.1)


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_rows_that_conclusions_rest_on_have_the_seeds_asked_for(seeds: int) -> None:
    for row in rows_of("plane", seeds=seeds):
        assert row.seeds == (seeds if row.method in KEY else 1)
    for row in rows_of("mixture", seeds=seeds):
        assert row.seeds == (seeds if row.world == "ring" and row.method in KEY else 1)
    for row in rows_of("subspace", seeds=seeds):
        assert row.seeds == (seeds if row.method in KEY else 1)
    assert {row.seeds for row in rows_of("invariance", seeds=seeds)} == {seeds}
    assert set(KEY) <= set(METHODS)


def test_the_invariance_experiment_has_both_kinds_at_equal_strengths_on_clean_data() -> None:
    rows = rows_of("invariance")
    assert {(row.world, row.dirt) for row in rows} == {("gaussian", "clean"), ("plane", "clean")}
    assert {row.method for row in rows} == set(INVARIANCE)
    strengths = {
        kind: sorted(method.settings["m"] for name, method in INVARIANCE.items() if name.startswith(kind))
        for kind in ("equivariance", "invariance")
    }
    assert strengths["equivariance"] == strengths["invariance"]
    assert len(strengths["invariance"]) >= 3
    for row in rows:
        assert row.what is INVARIANCE[row.method]
        assert row.trained == row.method
        if row.method != "plain":
            kind = InvarianceLoss if row.method.startswith("invariance") else EquivarianceLoss
            assert type(objective(row.what)) is kind


@pytest.mark.parametrize("experiment", WORLDS)
def test_quick_rows_are_some_of_all_with_one_seed(experiment: str) -> None:
    rows = rows_of(experiment, quick=True)
    assert {row.name for row in rows} < {row.name for row in rows_of(experiment)}
    assert {row.seeds for row in rows} == {1}
    assert {row.world for row in rows} == {WORLDS[experiment][0]}
    if experiment == "invariance":
        assert [row.method for row in rows] == ["plain", "equivariance-m0.5", "invariance-m0.5"]
    else:
        assert {(row.dirt, row.method) for row in rows} == {(d, m) for d, methods in QUICK.items() for m in methods}
        assert all("plain" in methods for methods in QUICK.values())


def test_pick_takes_what_matches_in_the_order_of_the_rows() -> None:
    rows = rows_of("plane")
    assert pick(rows, ()) == rows
    assert [row.name for row in pick(rows, ["plane-clean-plain"])] == ["plane-clean-plain"]
    both = pick(rows, ["plane-outliers-shrunk", "plane-clean-p*", "plane-clean-plain"])
    assert [row.name for row in both] == [
        row.name for row in rows if row.name == "plane-outliers-shrunk" or row.name.startswith("plane-clean-p")
    ]
    assert len(both) == 9  # four in units of the state


def test_a_pattern_that_matches_nothing_lists_the_names() -> None:
    rows = rows_of("plane", quick=True)
    with pytest.raises(UsageError, match=r"--rows 'ring-\*' matches none of: ") as caught:
        pick(rows, ["plane-*", "ring-*"])
    message = str(caught.value)
    assert all(row.name in message for row in rows)
    assert "\n" not in message
    with pytest.raises(UsageError):
        pick(rows, ["PLANE-CLEAN-PLAIN"])


def test_training_for_quick_is_shorter_and_for_more_pixels_wider() -> None:
    short = POINTS.short
    assert (short.steps, short.samples, short.calls) == (POINTS.steps * 3 // 8, POINTS.samples // 2, POINTS.calls // 2)
    same = ("points", "batch_size", "learning_rate", "width", "depth")
    assert [getattr(short, name) for name in same] == [getattr(POINTS, name) for name in same]
    assert images_training(64) == IMAGES
    assert [images_training(n).width for n in (1, 64, 100, 256, 4096)] == [192, 192, 300, 512, 512]
    assert dataclasses.replace(images_training(4096), width=IMAGES.width) == IMAGES
    for training in (POINTS, IMAGES, POINTS.short, IMAGES.short):
        assert 1000 % training.calls == 0
