"""Known answers: a network that learnt 64 images by heart, one that saw fresh draws of their law in every step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from helpers import normal, seeded
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.evaluation import model_copying
from robustdiff.evaluation.model_copying import LEVELS, area, copying_of_model
from robustdiff.utils.images import from_uint8, to_uint8

STEPS, SIDE = 100, 6
ALPHA_BAR = torch.cos(torch.linspace(0.02, 1.5, STEPS)).square().double()


def pictures(n: int, seed: int) -> Tensor:
    """A law with an end nowhere: smooth mixtures of five patterns, uint8 (n, 1, 6, 6)."""
    patterns = normal(5, SIDE * SIDE, seed=99)
    return to_uint8(torch.tanh(0.6 * normal(n, 5, seed=seed) @ patterns).view(n, 1, SIDE, SIDE).float())


class Net(nn.Module):
    """Two layers on the pixels and the noise level."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(SIDE * SIDE + 2, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, SIDE * SIDE)
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        level = ALPHA_BAR.to(x_t.dtype)[t][:, None]
        inputs = torch.cat([x_t.flatten(1), level, (1 - level).sqrt()], 1)
        return self.layers(inputs).view_as(x_t)


def trained(draw: Callable[[int], Tensor], steps: int) -> Net:
    """Predicts the image, from what ``draw`` gives in each step."""
    network, schedule = Net(), NoiseSchedule(ALPHA_BAR, "sample")
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    generator = seeded(7)
    for step in range(steps):
        x0 = from_uint8(draw(step))
        t = torch.randint(STEPS, (len(x0),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        loss = (network(schedule.add_noise(x0, eps, t), t) - x0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


TRAINING, HELD_OUT = pictures(64, 1), pictures(64, 2)


@pytest.mark.slow
def test_a_network_that_copies_is_caught_and_one_of_fresh_draws_is_not() -> None:
    schedule = NoiseSchedule(ALPHA_BAR, "sample")
    copies = copying_of_model(trained(lambda _: TRAINING, 4000), schedule, TRAINING, HELD_OUT)
    assert copies.gap > 0.3
    assert copies.interval[0] > 0.1
    assert copies.by_loss.area > 0.9
    assert copies.by_query.interval[0] > 0.5
    assert any(level.interval[0] > 0.3 for level in copies.levels)
    fresh = copying_of_model(trained(lambda step: pictures(64, 1000 + step), 1500), schedule, TRAINING, HELD_OUT)
    assert fresh.interval[0] < 0 < fresh.interval[1]
    for found in (fresh.by_loss, fresh.by_query):
        assert found.interval[0] < 0.5 < found.interval[1]


def test_the_losses_are_the_trainers_own_whatever_is_predicted() -> None:
    """At a level each kind of prediction has the same error but for a factor: gaps and areas do not depend on it."""
    network = Net().eval()
    found = []
    for kind in ("sample", "epsilon", "v_prediction"):
        schedule, base = NoiseSchedule(ALPHA_BAR, kind), NoiseSchedule(ALPHA_BAR, "sample")

        def asked(x_t: Tensor, t: Tensor, schedule: NoiseSchedule = schedule, base: NoiseSchedule = base) -> Tensor:
            return schedule.output_from_x0(base.x0_hat(network(x_t, t), x_t, t), x_t, t)

        found.append(copying_of_model(asked, schedule, TRAINING, HELD_OUT, batch_size=17))
    for other in found[1:]:
        assert other.gap == pytest.approx(found[0].gap, abs=1e-4)
        assert other.by_loss.area == pytest.approx(found[0].by_loss.area, abs=2e-3)
        assert other.by_query.area == pytest.approx(found[0].by_query.area, abs=2e-3)
    level = found[0].levels[2]
    t = NoiseSchedule(ALPHA_BAR, "sample").timestep_at(torch.tensor([LEVELS[2]]))
    assert level.noise_to_signal == pytest.approx(float(((1 - ALPHA_BAR[t]) / ALPHA_BAR[t]).sqrt()))
    assert level.gap == pytest.approx(1 - level.training / level.held_out)


def test_both_sets_get_the_same_noise_whatever_the_batches() -> None:
    schedule = NoiseSchedule(ALPHA_BAR, "sample")
    same = copying_of_model(Net(), schedule, TRAINING, TRAINING.clone())
    assert same.gap == pytest.approx(0, abs=1e-12)
    assert same.by_loss.area == same.by_query.area == 0.5
    one, other = (copying_of_model(Net(), schedule, TRAINING, HELD_OUT, batch_size=size) for size in (64, 5))
    assert other.gap == pytest.approx(one.gap, abs=1e-6)
    assert copying_of_model(Net(), schedule, TRAINING, HELD_OUT, seed=1).gap != one.gap


def test_areas_are_those_of_the_ranks_and_their_intervals_hold() -> None:
    a, b = normal(40, seed=1) - 0.5, normal(70, seed=2)
    found = area(a, b)
    truth = np.r_[np.ones(40), np.zeros(70)]
    assert found.area == pytest.approx(roc_auc_score(truth, -torch.cat([a, b]).numpy()))
    assert area(torch.ones(5), torch.ones(9)).area == 0.5
    held = 0
    for seed in range(200):
        low, high = area(normal(60, seed=2 * seed), normal(60, seed=2 * seed + 1)).interval
        held += low <= 0.5 <= high
    assert 180 <= held <= 198
    apart = area(torch.arange(10.0), torch.arange(10.0) + 100)
    assert apart.area == 1
    assert 0.6 < apart.interval[0] < 0.75  # as 10 of 10 have it
    assert apart.interval[1] == 1


def test_classes_are_told_to_the_network() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"num_class_embeds": 2}

        def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
            return x_t * class_labels[:, None, None, None]

    schedule = NoiseSchedule(ALPHA_BAR, "sample")
    labels = torch.ones(64).long(), torch.zeros(64).long()
    found = copying_of_model(Conditional(), schedule, TRAINING, HELD_OUT, labels=labels)
    assert found.levels[0].training < 0.1 < found.levels[0].held_out
    with pytest.raises(ValueError, match="class_labels are needed"):
        copying_of_model(Conditional(), schedule, TRAINING, HELD_OUT)


def test_what_cannot_be_compared_is_refused() -> None:
    schedule = NoiseSchedule(ALPHA_BAR, "sample")
    with pytest.raises(ValueError, match="images must be of one shape"):
        copying_of_model(Net(), schedule, TRAINING, HELD_OUT[:, :, 1:])
    with pytest.raises(ValueError, match="held_out needs at least two images, got 1"):
        copying_of_model(Net(), schedule, TRAINING, HELD_OUT[:1])
    short = NoiseSchedule(ALPHA_BAR[::25], "sample")
    assert 1 < len(model_copying._timesteps(short)) <= 4
