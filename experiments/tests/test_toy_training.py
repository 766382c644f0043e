"""Training, keeping and sampling a small denoiser of points: against loops written out, and closed forms.

A little over 400 lines: training, files and sampling of the same small network.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor

from experiments.paper import linear
from experiments.paper.point_denoiser import PointDenoiser
from experiments.paper.toy_grid import Training
from experiments.paper.toy_training import (
    WARMUP,
    Denoiser,
    Stopped,
    digest,
    draw,
    load,
    save,
    schedule_for,
    settings_of,
    train,
)
from experiments.paper.worlds import LinearGaussian
from helpers import normal, seeded
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.utils.errors import UsageError
from robustdiff.utils.seeds import derive_seed

TINY = Training(points=64, steps=60, batch_size=16, learning_rate=4e-3, width=8, depth=2, samples=50, calls=20)
MODULATED = dataclasses.replace(TINY, modulated=True)
X0 = 0.5 * normal(64, 3, seed=3, dtype=torch.float32)
VARIANCES = torch.tensor([0.2, 0.05, 0.01], dtype=torch.float64)


def plain(prediction: str = "v_prediction") -> DenoisingLoss:
    return DenoisingLoss(schedule_for(prediction))


def weights(model: PointDenoiser) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


class Ideal(torch.nn.Module):
    """The optimum of the regulariser on a Gaussian, ``eps_hat = W x_t``, as a network of either prediction."""

    def __init__(self, schedule: NoiseSchedule, variances: Tensor, m: float = 0.0) -> None:
        super().__init__()
        self.schedule = schedule
        self.w = linear.optimum(schedule.alphas_cumprod.double(), variances, m).float()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        eps_hat = self.w[t] * x_t
        if self.schedule.prediction.name == "epsilon":
            return eps_hat
        x0_hat = (x_t - self.schedule.sigma(t) * eps_hat) / self.schedule.alpha(t)
        return self.schedule.output_from_x0(x0_hat, x_t, t)


def ideal(prediction: str = "epsilon", m: float = 0.0) -> Denoiser:
    schedule = schedule_for(prediction)
    return Denoiser(Ideal(schedule, VARIANCES, m), schedule)


def network(seed: int = 0, prediction: str = "v_prediction") -> Denoiser:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Denoiser(PointDenoiser(3, width=8, depth=1).requires_grad_(False), schedule_for(prediction))


# -- the schedule ----------------------------------------------------------------------------------------


def test_the_process_is_that_of_the_paper() -> None:
    schedule = schedule_for("epsilon")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-5, atol=0)
    assert schedule.prediction.name == "epsilon"
    assert schedule_for("v_prediction").prediction.name == "v_prediction"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_denoiser_says_what_its_network_means(prediction: str) -> None:
    schedule = schedule_for(prediction)
    x0, eps, t = normal(5, 3, dtype=torch.float32), normal(5, 3, seed=1, dtype=torch.float32), torch.tensor(400)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    output = eps if prediction == "epsilon" else alpha * eps - sigma * x0
    denoiser = Denoiser(lambda x_t, t: output, schedule)
    x_t = alpha * x0 + sigma * eps
    torch.testing.assert_close(denoiser.eps_hat(x_t, t), eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoiser.x0_hat(x_t, t), x0, rtol=1e-4, atol=1e-5)


# -- training --------------------------------------------------------------------------------------------


def test_training_is_a_function_of_its_seed_bit_for_bit() -> None:
    torch.manual_seed(5)
    first = weights(train(plain(), X0, TINY, 0))
    torch.manual_seed(6)
    assert torch.equal(first, weights(train(plain(), X0, TINY, 0)))
    assert not torch.equal(first, weights(train(plain(), X0, TINY, 1)))
    assert not torch.equal(first, weights(train(plain(), X0 + 0.1, TINY, 0)))
    robust = EquivarianceLoss(schedule_for("v_prediction"), perturbation="random", strength=1.0)
    assert torch.equal(weights(train(robust, X0, TINY, 0)), weights(train(robust, X0, TINY, 0)))
    assert not torch.equal(first, weights(train(robust, X0, TINY, 0)))


def test_seeds_rule_initial_weights_as_well_as_batches() -> None:
    nothing = Training(**{**vars(TINY), "steps": 1, "learning_rate": 0.0})
    start = weights(train(plain(), X0, nothing, 0))
    assert torch.equal(start, weights(train(plain(), X0 + 1, nothing, 0)))
    assert not torch.equal(start, weights(train(plain(), X0, nothing, 1)))
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed("initial weights", 0))
        assert torch.equal(start, weights(PointDenoiser(3, TINY.width, TINY.depth)))


def test_training_leaves_the_global_stream_and_its_data_alone() -> None:
    torch.manual_seed(7)
    before, data = torch.get_rng_state(), X0.clone()
    train(plain(), X0, TINY, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(X0, data)


def test_training_is_the_loop_written_out_and_returns_its_moving_average() -> None:
    trained = train(plain(), X0, TINY, 2)
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed("initial weights", 2))
        model = PointDenoiser(3, TINY.width, TINY.depth)
    generator = seeded(derive_seed("training", 2))
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    average = weights(model).detach().clone()
    for step in range(TINY.steps):
        optimiser.param_groups[0]["lr"] = TINY.learning_rate * step / WARMUP  # 60 steps never leave the warm-up
        batch = X0[torch.randint(len(X0), (TINY.batch_size,), generator=generator)]
        optimiser.zero_grad()
        plain()(model, batch, generator=generator).total.mean().backward()
        optimiser.step()
        decay = min(0.999, (1 + step) / (10 + step)) if step else 0.0
        average = decay * average + (1 - decay) * weights(model).detach()
    torch.testing.assert_close(weights(trained), average, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights(trained), weights(model), rtol=1e-4, atol=1e-6)
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_the_rate_falls_to_nothing_at_the_end() -> None:
    rates: list[float] = []
    long = Training(**{**vars(TINY), "steps": WARMUP + 200, "batch_size": 2})

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        train(plain(), X0, long, 0)
    assert len(rates) == long.steps
    assert max(rates) == rates[WARMUP] == pytest.approx(long.learning_rate)
    assert rates[WARMUP // 2] == pytest.approx(long.learning_rate / 2)
    assert rates[WARMUP + 100] == pytest.approx(long.learning_rate / 2)
    assert rates[-1] < 1e-3 * long.learning_rate


def test_training_lowers_the_loss() -> None:
    long = Training(**{**vars(TINY), "steps": 400, "width": 16})
    start = Training(**{**vars(long), "steps": 1, "learning_rate": 0.0})

    def loss(model: PointDenoiser) -> float:
        return float(plain()(model, X0.repeat(20, 1), generator=seeded(1)).total.mean())

    assert loss(train(plain(), X0, long, 0)) < 0.8 * loss(train(plain(), X0, start, 0))


def test_training_stops_when_told_and_asks_often() -> None:
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(Stopped):
        train(plain(), X0, TINY, 0, stop)
    assert len(asked) == 2
    with pytest.raises(Stopped):  # before much was done
        train(plain(), X0, Training(**{**vars(TINY), "steps": 10**9}), 0, lambda: True)


def test_being_asked_changes_nothing() -> None:
    assert torch.equal(weights(train(plain(), X0, TINY, 0, lambda: False)), weights(train(plain(), X0, TINY, 0)))


def test_a_loss_that_is_not_finite_says_where() -> None:
    broken = torch.full_like(X0, math.nan)
    with pytest.raises(ArithmeticError, match="the loss is not finite at step 0 of 60"):
        train(plain(), broken, TINY, 0)


# -- on disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [TINY, MODULATED], ids=["plain", "modulated"])
def test_a_network_comes_back_from_disk_bit_for_bit(tmp_path: Path, training: Training) -> None:
    model = train(plain(), X0, training, 0)
    path = tmp_path / "deep" / "er" / "network.safetensors"
    save(model, path, {"lambda": 0.3, "steps": 60}, 1.5)
    found = load(path, 3, training, {"steps": 60, "lambda": 0.3})  # whatever the order
    assert found is not None
    again, seconds = found
    assert seconds == 1.5  # how long its training took
    assert torch.equal(weights(again), weights(model))
    x, t = normal(4, 3, dtype=torch.float32), torch.tensor(500)
    assert torch.equal(again(x, t), model(x, t))
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert [each.name for each in path.parent.iterdir()] == ["network.safetensors"]


def test_training_moves_the_modulation_and_its_weights_are_beside_the_others(tmp_path: Path) -> None:
    still = {"steps": 1, "learning_rate": 0.0}
    start, other = (train(plain(), X0, dataclasses.replace(t, **still), 0) for t in (MODULATED, TINY))
    assert start.modulation is not None
    assert not start.modulation.weight.any()
    assert other.modulation is None
    before = other.state_dict()  # a network without is what it was, file by file
    assert {key for key in start.state_dict() if key not in before} == {"modulation.weight", "modulation.bias"}
    assert all(torch.equal(start.state_dict()[key], value) for key, value in before.items())
    moved = train(plain(), X0, MODULATED, 0).modulation
    assert moved is not None
    assert all(chunk.abs().max() > 1e-4 for chunk in moved.weight.detach().chunk(2 * MODULATED.depth + 2))
    path = tmp_path / "network.safetensors"
    save(start, path, "settings", 1.5)
    with pytest.raises(UsageError, match="cannot be read"):  # were settings not told apart, the weights would be
        load(path, 3, TINY, "settings")


def test_a_network_of_other_settings_or_none_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    assert load(path, 3, TINY, {"m": 1}) is None
    save(network().model, path, {"m": 1}, 1.5)
    assert load(path, 3, Training(width=8, depth=1), {"m": 1}) is not None
    assert load(path, 3, Training(width=8, depth=1), {"m": 2}) is None
    save_file({"x": torch.zeros(1)}, path)  # whose it is nobody knows
    assert load(path, 3, TINY, {"m": 1}) is None


def test_saving_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    small = Training(width=8, depth=1)
    for seed in (0, 1):
        save(network(seed).model, path, seed, 1.5)
        found = load(path, 3, small, seed)
        assert found is not None
        assert torch.equal(weights(found[0]), weights(network(seed).model))
    assert load(path, 3, small, 0) is None


@pytest.mark.parametrize("damage", ["empty", "cut", "cut short", "text", "other shape", "other names"])
def test_a_damaged_network_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "network.safetensors"
    save(network().model, path, "settings", 1.5)
    whole = path.read_bytes()
    if damage == "other shape":
        save(PointDenoiser(2, 8, 1), path, "settings", 1.5)
    elif damage == "other names":
        save_file({"x": torch.zeros(1)}, path, {"settings": digest("settings")})
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-1], "cut short": whole[:50], "text": b"hello " * 99}[damage])
    with pytest.raises(UsageError, match=r"network\.safetensors cannot be read .*delete it and run again") as caught:
        load(path, 3, Training(width=8, depth=1), "settings")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_digest_tells_settings_apart() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    different = [{"a": 1}, {"a": 2}, {"b": 1}, [1], "1", 1, None, {"a": {"b": 1}}]
    assert len({digest(settings) for settings in different}) == len(different)
    assert len(digest({})) == 16


def test_settings_hold_the_whole_training_and_the_process() -> None:
    settings = settings_of(TINY, "epsilon")
    usual = {"input_scale": 1.0, "modulated": False}
    assert {**vars(TINY), **settings} == {**settings, **usual}
    assert not set(usual) & set(settings)  # so that older results stay those of their settings
    assert settings_of(dataclasses.replace(TINY, input_scale=4.0), "epsilon") == {**settings, "input_scale": 4.0}
    assert settings_of(MODULATED, "epsilon") == {**settings, "modulated": True}
    assert settings["prediction"] == "epsilon"
    assert digest(settings) != digest(settings_of(TINY, "v_prediction"))
    assert json.loads(json.dumps(settings)) == settings


def test_the_input_scale_is_that_of_the_first_layer_before_training() -> None:
    x0, still = normal(50, 2, dtype=torch.float32), dataclasses.replace(TINY, steps=1, learning_rate=1e-12)
    one, four = (
        train(DenoisingLoss(schedule_for("epsilon")), x0, dataclasses.replace(still, input_scale=scale), 0)
        for scale in (1.0, 4.0)
    )
    torch.testing.assert_close(four.first.weight, 4 * one.first.weight)
    torch.testing.assert_close(four.last.weight, one.last.weight)


# -- sampling --------------------------------------------------------------------------------------------


def written_out(denoiser: Denoiser, n: int, calls: int, seed: int) -> Tensor:
    """Song et al. (2021), Eq. 12 with eta = 0, in float64, from the same noise."""
    alpha_bar = DDPMScheduler().alphas_cumprod.double()
    x = torch.randn(n, 3, generator=seeded(derive_seed("sampling", seed))).double()
    for t in range(999, -1, -1000 // calls):
        here = alpha_bar[t]
        there = alpha_bar[t - 1000 // calls] if t >= 1000 // calls else torch.tensor(1.0)
        eps_hat = denoiser.eps_hat(x.float(), torch.tensor(t)).double()
        x0_hat = (x - (1 - here).sqrt() * eps_hat) / here.sqrt()
        x = there.sqrt() * x0_hat + (1 - there).sqrt() * eps_hat
    return x.float()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("calls", [1, 5, 50])
def test_drawing_is_ddim_written_out(prediction: str, calls: int) -> None:
    denoiser = network(1, prediction)
    found = draw(denoiser, 20, 3, calls, 4)
    assert found.shape == (20, 3)
    torch.testing.assert_close(found, written_out(denoiser, 20, calls, 4), rtol=1e-3, atol=1e-3 * float(found.std()))


def test_drawing_is_what_diffusers_does() -> None:
    denoiser = network(2)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x = torch.randn(7, 3, generator=seeded(derive_seed("sampling", 3)))
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.model(x, t), t, x, eta=0.0).prev_sample
    assert torch.equal(draw(denoiser, 7, 3, 10, 3), x)
    assert (x.abs() > 1).any()  # nothing is clipped


def test_draws_are_a_function_of_the_seed_and_not_of_the_model() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(network(), 9, 3, 5, 0)
    assert torch.equal(first, draw(network(), 9, 3, 5, 0))
    assert not torch.equal(first, draw(network(), 9, 3, 5, 1))
    assert torch.equal(torch.get_rng_state(), before)
    starts: list[Tensor] = []
    for denoiser in (network(0), network(1, "epsilon"), ideal()):
        draw(denoiser, 9, 3, 5, 0, lambda x, t: starts.append(x.clone()) if t == 999 else None)
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("calls", [1, 20])
def test_watch_sees_every_state_before_the_network_does(calls: int) -> None:
    seen: list[tuple[Tensor, int]] = []
    asked: list[tuple[Tensor, int]] = []
    inner = network()

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append((x_t.clone(), int(t)))
        assert len(seen) == len(asked)
        return inner.model(x_t, t)

    draw(Denoiser(model, inner.schedule), 4, 3, calls, 0, lambda x, t: seen.append((x.clone(), int(t))))
    assert [t for _, t in seen] == list(range(999, -1, -1000 // calls))
    for (state, t), (other, u) in zip(seen, asked, strict=True):
        assert torch.equal(state, other)
        assert t == u


def test_drawing_keeps_no_gradients() -> None:
    model = PointDenoiser(3, 8, 1)
    assert not draw(Denoiser(model, schedule_for("epsilon")), 2, 3, 2, 0).requires_grad


@pytest.mark.parametrize("m", [0.0, 2.0])
@pytest.mark.parametrize("calls", [10, 200])
def test_draws_of_the_ideal_network_have_the_variance_of_the_closed_form(m: float, calls: int) -> None:
    """T3: exact for any number of steps; 20,000 draws leave a relative error of 1 % (one sd)."""
    x = draw(ideal(m=m), 20_000, 3, calls, 0).double()
    alpha_bar = schedule_for("epsilon").alphas_cumprod.double()
    levels = torch.cat([alpha_bar[torch.arange(999, -1, -1000 // calls)], torch.ones(1)])
    wanted = linear.ddim_variance(levels, linear.optimum(levels[:-1], VARIANCES, m))
    torch.testing.assert_close(x.var(0), wanted, rtol=0.04, atol=0)
    assert x.mean(0).abs().max() < 0.02
    start = torch.randn(20_000, 3, generator=seeded(derive_seed("sampling", 0))).double()
    torch.testing.assert_close(x / start, wanted.sqrt().expand_as(x), rtol=1e-3, atol=1e-3)  # draw by draw


def test_many_steps_of_the_ideal_network_draw_the_law_itself() -> None:
    world = LinearGaussian(VARIANCES)
    x = world.coordinates(draw(ideal(), 20_000, 3, 1000, 1))
    torch.testing.assert_close(x.T.cov(), torch.diag(VARIANCES), rtol=0.05, atol=0.003)


def test_either_prediction_of_the_same_denoiser_draws_the_same_points() -> None:
    for m in (0.0, 3.0):
        epsilon, v = draw(ideal("epsilon", m), 500, 3, 100, 2), draw(ideal("v_prediction", m), 500, 3, 100, 2)
        torch.testing.assert_close(v, epsilon, rtol=1e-3, atol=2e-4)
        assert float(epsilon.std()) > 0.05
