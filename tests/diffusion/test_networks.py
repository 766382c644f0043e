"""Networks: every preset builds and keeps the shape, stated sizes, and the small denoiser for points."""

from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import UNet2DModel

from experiments.paper import linear
from experiments.paper.point_denoiser import PointDenoiser
from helpers import normal, schedule_at, seed_parameters, seeded
from robustdiff.diffusion.networks import (
    NETWORKS,
    build_unet,
    check_size,
    network_for,
    size_multiple,
)
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.training.config import TrainConfig
from robustdiff.utils.errors import UsageError

SIDE = {"tiny": 8, "small": 16, "medium": 32, "base": 32, "large": 32, "improved-ddpm": 32}


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- image networks ----------------------------------------------------------------------------------


def test_the_names_the_command_offers_are_the_presets() -> None:
    (names, _) = get_args(get_type_hints(TrainConfig)["network"])
    assert get_args(names) == tuple(NETWORKS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_preset_builds_and_keeps_the_shape(name: str, channels: int) -> None:
    side = SIDE[name]
    unet = build_unet(name, channels, (side, side)).eval()
    x_t = normal(2, channels, side, side, dtype=torch.float32)
    with torch.no_grad():
        output = unet(x_t, torch.tensor([0, 999])).sample
    assert output.shape == x_t.shape
    assert torch.isfinite(output).all()
    assert unet.config.sample_size == side
    assert size_multiple(unet) == 2 ** (len(NETWORKS[name].widths) - 1)


def test_parameter_counts() -> None:
    """``base`` is the CIFAR-10 network of Ho et al. (2020), 35.7 M; ``large`` that of diffusers' script, 113.7 M."""
    with torch.device("meta"):
        millions = {name: parameters(build_unet(name, 3, (32, 32))) / 1e6 for name in NETWORKS}
    assert millions["base"] == pytest.approx(35.7, abs=0.1)
    assert millions["large"] == pytest.approx(113.7, abs=0.1)
    assert millions["medium"] == pytest.approx(16.2, abs=0.1)
    assert millions["small"] == pytest.approx(1.11, abs=0.02)
    assert millions["tiny"] < 1
    assert millions["improved-ddpm"] == pytest.approx(52.5, abs=0.1)
    by_size = [millions[name] for name in ("tiny", "small", "medium", "base", "large")]
    assert by_size == sorted(by_size)


def test_improved_ddpm_has_the_published_shape() -> None:
    """CIFAR-10 of Nichol and Dhariwal (2021): 3 blocks a level, 4 heads at 16 and 8, dropout .3, scale and shift."""
    with torch.device("meta"):
        unet = build_unet("improved-ddpm", 3, (32, 32))
    config = unet.config
    assert (config["layers_per_block"], config["dropout"], config["block_out_channels"]) == (
        3,
        0.3,
        (128, 256, 256, 256),
    )
    assert config["resnet_time_scale_shift"] == "scale_shift"
    assert [kind.startswith("Attn") for kind in config["down_block_types"]] == [False, True, True, False]
    assert {module.heads for module in unet.modules() if hasattr(module, "heads")} == {4}


def test_base_has_the_published_shape() -> None:
    with torch.device("meta"):
        unet = build_unet("base", 3, (32, 32))
    assert unet.config.block_out_channels == (128, 256, 256, 256)
    assert unet.config.layers_per_block == 2
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    assert unet.config.up_block_types == ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    # unlike the source's: dropout would differ between the two branches of the regulariser
    assert not any(module.p for module in unet.modules() if isinstance(module, torch.nn.Dropout))


def test_sizes_that_do_not_halve_often_enough_get_the_next_smaller_preset_that_fits() -> None:
    assert network_for((28, 28)) == "small"  # MNIST and its kin
    assert network_for((30, 30)) == "tiny"
    assert network_for((31, 31)) == "medium"  # nothing fits: the message names sizes that do


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((8, 8), "tiny"),
        ((12, 12), "tiny"),
        ((13, 13), "small"),
        ((24, 24), "small"),
        ((25, 25), "medium"),
        ((64, 64), "medium"),
        ((65, 65), "large"),
        ((256, 256), "large"),
        ((8, 64), "tiny"),
        ((64, 16), "small"),
    ],
)
def test_the_network_picked_follows_the_shorter_side(size: tuple[int, int], name: str) -> None:
    assert network_for(size) == name


@pytest.mark.parametrize(("name", "size"), [("tiny", (6, 10)), ("small", (16, 24)), ("medium", (16, 40))])
def test_images_need_not_be_square(name: str, size: tuple[int, int]) -> None:
    unet = build_unet(name, 1, size)
    assert tuple(unet.config.sample_size) == size
    with torch.no_grad():
        assert unet(torch.zeros(1, 1, *size), torch.tensor([5])).sample.shape == (1, 1, *size)


def test_the_weights_follow_the_global_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return torch.cat([p.detach().flatten() for p in build_unet("tiny", 1, (8, 8)).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(
    ("size", "multiple", "words"),
    [
        ((7, 9), 2, ("9 x 7", "'net'", "multiples of 2", "`resolution` 6 or 8", "another `network`")),
        ((32, 28), 8, ("28 x 32", "`resolution` 24 or 32")),
        ((3, 16), 8, ("16 x 3", "`resolution` 8,")),  # nothing smaller is left
    ],
)
def test_sizes_that_do_not_halve_are_refused_in_one_line(size, multiple, words) -> None:
    with pytest.raises(UsageError) as caught:
        check_size(size, multiple, "net")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sizes_that_are_accepted_are_those_the_network_can_run(name: str) -> None:
    multiple = 2 ** (len(NETWORKS[name].widths) - 1)
    check_size((multiple, 3 * multiple), multiple, name)
    for bad in ((multiple + 1, multiple), (multiple, multiple + 1), (multiple // 2, multiple)):
        with pytest.raises(UsageError, match=f"multiples of {multiple}"):
            build_unet(name, 1, bad)
    unet = UNet2DModel(block_out_channels=(8, 8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 3,
                       up_block_types=("UpBlock2D",) * 3)  # fmt: skip
    assert size_multiple(unet) == 4


# -- points ------------------------------------------------------------------------------------------


def points(dimension: int = 3, modulated: bool = False) -> PointDenoiser:
    """A fresh network; a modulated one as if trained for a while, its modulation not 0."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = PointDenoiser(dimension, width=32, depth=2, modulated=modulated)
    if model.modulation is not None:
        seed_parameters(model.modulation, 3)
    return model.double()


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_points_keep_their_shape_for_every_form_of_the_timestep(dimension: int, modulated: bool) -> None:
    model, x_t = points(dimension, modulated), normal(4, dimension)
    one_each = model(x_t, torch.full((4,), 7))
    assert one_each.shape == (4, dimension)
    torch.testing.assert_close(model(x_t, torch.tensor(7)), one_each, rtol=0, atol=1e-12)


@pytest.mark.parametrize("modulated", [False, True])
def test_points_are_treated_alone_and_each_at_its_own_noise_level(modulated: bool) -> None:
    model, x_t = points(3, modulated), normal(4, 3)
    t = torch.tensor([0, 10, 500, 999])
    together = model(x_t, t)
    alone = torch.cat([model(x_t[i : i + 1], t[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    same_points = model(x_t[:1].expand(4, 3), t)
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(same_points[i], same_points[j], rtol=0, atol=1e-4)


@pytest.mark.parametrize("modulated", [False, True])
def test_neighbouring_timesteps_are_told_apart_but_give_similar_answers(modulated: bool) -> None:
    model, x_t = points(3, modulated), normal(1, 3)
    a, b, far = (model(x_t, torch.tensor([t])) for t in (500, 501, 900))
    assert 0 < (a - b).norm() < (a - far).norm()


def test_a_fresh_modulated_network_is_the_same_at_every_timestep_and_has_the_weights_of_one_without() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = PointDenoiser(3, width=32, depth=2, modulated=True).double()
    x_t = normal(4, 3)
    assert torch.equal(model(x_t, torch.tensor([0, 10, 500, 999])), model(x_t, torch.tensor(0)))
    without = points(3).state_dict()
    assert not any("modulation" in key for key in without)  # networks kept before there was any still load
    assert all(torch.equal(model.state_dict()[key], value) for key, value in without.items())
    x = (0.1 * x_t).requires_grad_()
    (slope,) = torch.autograd.grad(model(x, torch.tensor(3)).sum(), x)
    assert not torch.allclose(slope[0], slope[1])  # and yet not linear: its hidden layers are at work


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layers_scale_and_shift_are_those_of_what_it_reads(layer: int) -> None:
    """Scaled by 1 - 1 it passes on its bias alone; shifted by s, its bias grows by what it makes of s."""
    model, other = points(3, True), points(3, True)
    x_t, t, s = normal(4, 3), torch.tensor([0, 10, 500, 999]), normal(32, seed=7)
    for each in (model, other):
        assert each.modulation is not None
        seed_parameters(each.modulation, 3)
        rows = slice(64 * layer, 64 * layer + 64)
        with torch.no_grad():
            each.modulation.weight[rows] = 0
            each.modulation.bias[rows] = 0
    changed = [*other.hidden, other.last][layer]
    with torch.no_grad():
        model.modulation.bias[64 * layer + 32 : 64 * layer + 64] = s
        changed.bias += changed.weight @ s
        torch.testing.assert_close(model(x_t, t), other(x_t, t), rtol=1e-9, atol=1e-9)
        model.modulation.bias[64 * layer : 64 * layer + 32] = -1
        changed.weight.zero_()
        torch.testing.assert_close(model(x_t, t), other(x_t, t), rtol=1e-9, atol=1e-9)


def test_a_modulated_network_can_be_the_exact_denoiser_of_a_gaussian_at_every_noise_level() -> None:
    """W = B diag(w(t)) B^T (docs/explanation/theory.md, the optimum of plain training): no hidden layer needed."""
    model = points(3, True)
    assert model.modulation is not None
    turn, variances = torch.linalg.qr(normal(3, 3, seed=5)).Q, torch.tensor([1.0, 0.1, 0.002], dtype=torch.float64)
    schedule, t = schedule_at(torch.logspace(-2, 2, 1000)), torch.arange(0, 1000, 100)
    w = linear.optimum(schedule.alphas_cumprod.double()[t], variances)  # (10, 3)
    read: list[torch.Tensor] = []
    model.modulation.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(normal(10, 3), t)
        for parameter in (*model.first.parameters(), *model.hidden.parameters(), *model.modulation.parameters()):
            parameter.zero_()
        model.first.weight[:3] = turn.T
        model.last.weight[:, :3] = turn
        model.last.bias.zero_()
        scale = 2 * 32 * 2  # of the last layer: behind a scale and a shift for each of two hidden ones
        model.modulation.weight[scale : scale + 3] = torch.linalg.lstsq(read[0], w - 1).solution.T
        for i in range(10):
            x_t = 3 * normal(5, 3, seed=i)
            torch.testing.assert_close(model(x_t, t[i]), x_t @ turn * w[i] @ turn.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("perturbation", "modulated"), [("random", False), ("adversarial", False), ("random", True)])
def test_points_train_under_the_robust_objective(perturbation: str, modulated: bool) -> None:
    """Two clusters in the plane: 150 steps of AdamW more than halve the loss of a fresh network."""
    model = points(2, modulated)
    seed_parameters(model.last, 1)
    schedule = schedule_at(torch.logspace(-1.5, 1, 1000))
    objective = EquivarianceLoss(schedule, perturbation=perturbation, strength=0.3)
    generator = seeded(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        x0 = (torch.randint(0, 2, (128, 1), generator=generator) * 2 - 1).double().expand(128, 2)
        terms = objective(model, x0, generator=generator)
        assert terms.total.shape == (128,)
        assert (terms.equivariance > 0).any()
        optimizer.zero_grad()
        terms.total.mean().backward()
        optimizer.step()
        losses.append(terms.total.mean().item())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
