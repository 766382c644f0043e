"""Groups of an export: few levels, none below an image's own; what a trainer then draws, by its own rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from helpers import seeded
from robustdiff.audit import AuditResult
from robustdiff.audit.export.groups import (
    ALL,
    HIGH,
    LEFT_OUT,
    first_timestep,
    flow_sigma,
    groups,
    round_up,
    stages,
    thresholds,
)


def audit(min_sigma, weight=None, copies=()) -> AuditResult:
    floor = torch.as_tensor(min_sigma, dtype=torch.float64)
    weights = torch.ones(len(floor)).double() if weight is None else torch.tensor(weight, dtype=torch.float64)
    return replace(AuditResult.of_clean(len(floor)), min_sigma=floor, weight=weights, copies=copies)


@pytest.mark.parametrize("count", [1, 3, 40, 500])
@pytest.mark.parametrize("seed", range(3))
def test_every_image_is_in_one_group_whose_level_is_not_below_its_own(count, seed):
    levels = torch.rand(count, generator=seeded(seed)).double().exp() - 1
    levels[:: 3 + seed] = 0
    made = groups(audit(levels))
    assert sorted(place for group in made for place in group.places) == list(range(count))
    for group in made:
        assert all(levels[place] <= group.level for place in group.places)
        assert (group.level == 0) == (group.kind == ALL)
    assert len([group for group in made if group.kind == HIGH]) <= 4


def lost(levels, chosen):
    return sum(flow_sigma(min(high for high in chosen if high >= level)) - flow_sigma(level) for level in levels)


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_lose_the_least_noise_of_all_choices(seed):
    levels = [round_up(x) for x in torch.rand(25, generator=seeded(seed)).square().tolist()]
    best = min(
        lost(levels, (*inner, max(levels))) for inner in itertools.combinations(sorted(set(levels) - {max(levels)}), 3)
    )
    chosen = thresholds(levels)
    assert len(chosen) == 4
    assert lost(levels, chosen) == pytest.approx(best, abs=1e-12)


def test_few_levels_are_kept_as_they_are_and_a_crowd_is_not_spread_over_all():
    assert thresholds([0.0, 0.2, 0.2, 0.5]) == (0.2, 0.5)
    assert thresholds([]) == ()
    crowd = [0.1 + 1e-3 * (number % 100) / 100 for number in range(1000)] + [1.0, 2.0, 4.0]
    assert {1.0, 2.0, 4.0} < set(thresholds([*crowd, *[1.0, 2.0, 4.0] * 20]))


def test_levels_are_rounded_up_to_three_digits():
    for level in (0.2, 0.14159, 1e-3, 0.99999, 9.87, 0.30000000000000004, 3.14159):
        up = round_up(level)
        assert level <= up <= level * 1.01
        assert float(f"{up:.3g}") == up
    assert round_up(0.2) == 0.2


def test_of_copies_one_is_listed_the_one_that_may_be_used_lowest():
    third = 1 / 3
    found = audit([0.5, 0.0, 0.2, 0.0, 0.0], [third, 1, third, 0, third], copies=((0, 2, 4),))
    listed = [place for group in groups(found) if group.kind != LEFT_OUT for place in group.places]
    assert sorted(listed) == [1, 4]
    (left,) = [group for group in groups(found) if group.kind == LEFT_OUT]
    assert left.places == (0, 2, 3)


def test_many_copies_and_odd_weights_add_up():
    weight = [1 / 7] * 700 + [0.25] * 400 + [1.0] * 50
    copies = tuple(tuple(range(start, start + 7)) for start in range(0, 700, 7))
    made = groups(audit([0.0] * 1150, weight, copies))
    listed = {place for group in made if group.kind != LEFT_OUT for place in group.places}
    assert len(listed) == 100 + 100 + 50
    assert all(len(listed & set(group)) == 1 for group in copies)


def test_what_cannot_be_used_is_left_out_and_stages_go_down():
    made = groups(audit([0.0, 0.2, 0.5, 50.0, 0.1], [1, 1, 1, 1, 0]))
    assert [(group.kind, group.level, group.places) for group in made] == [
        (ALL, 0.0, (0,)),
        (HIGH, 0.2, (1,)),
        (HIGH, 0.5, (2,)),
        (LEFT_OUT, math.inf, (3, 4)),
    ]
    runs = stages(made)
    assert [(stage.level, sum(len(group.places) for group in stage.groups)) for stage in runs] == [
        (0.5, 3),
        (0.2, 2),
        (0.0, 1),
    ]
    assert [stage.slug for stage in runs] == ["1-from-0.5", "2-from-0.2", "3-all-levels"]
    none_clean = stages(groups(audit([0.2, 0.3])))
    assert none_clean[-1].level == 0.2  # nothing trains below


def test_images_with_lost_pixels_are_left_out_as_nobody_repairs_them():
    found = replace(audit([0.0, 0.0, 0.3]), has_missing=torch.tensor([False, True, True]))
    assert [(group.kind, group.places) for group in groups(found)] == [(ALL, (0,)), (LEFT_OUT, (1, 2))]
    copies = replace(audit([0.0, 0.1], [0.5, 0.5], ((0, 1),)), has_missing=torch.tensor([True, False]))
    assert [(group.kind, group.places) for group in groups(copies)] == [(HIGH, (1,)), (LEFT_OUT, (0,))]


def test_timesteps_are_those_of_the_scheduler_of_stable_diffusion():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    for level in (0.05, 0.2, 0.52, 1.0, 9.9):
        first = first_timestep(level)
        assert levels[first] > level >= levels[first - 1]
    assert first_timestep(0.0) == 0
