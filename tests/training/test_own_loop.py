"""Curriculum, for loops that are not ours: draws and weights against closed forms; the loops of the guide, run."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import compute_density_for_timestep_sampling

from helpers import seeded
from robustdiff.audit import AuditResult, in_latents
from robustdiff.training import Curriculum, LevelBalancedSampler
from robustdiff.utils.errors import UsageError

NAMES = ("a.png", "b.png", "c.png", "d.png", "e.png")
GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "own-trainer.md"


def audit(min_sigma: list[float], weight: list[float]) -> AuditResult:
    clean = AuditResult.of_clean(len(min_sigma), NAMES[: len(min_sigma)])
    floor, weights = torch.tensor(min_sigma).double(), torch.tensor(weight).double()
    return replace(clean, min_sigma=floor, noise_std=floor / 2, weight=weights)


def ddpm(**kwargs: Any) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=50, beta_end=0.3, **kwargs)


def flow(shift: float) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=shift)


SCHEDULERS = {
    "ddpm": ddpm(),
    "zero terminal SNR": ddpm(rescale_betas_zero_snr=True),
    "ddim": DDIMScheduler(num_train_timesteps=50, beta_end=0.3),
    "flow": flow(1.0),
    "flow, shift 3": flow(3.0),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)


def levels_of(scheduler: Any) -> torch.Tensor:
    """Sigma/alpha of what a loop draws from: timesteps of a DDPM table, indices of a flow table."""
    if hasattr(scheduler, "alphas_cumprod"):
        return ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).sqrt()
    s = scheduler.sigmas.double()
    return s / (1 - s)


# -- draws and weights ---------------------------------------------------------------------------------


@every_scheduler
@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "a density"])
def test_draws_are_the_plain_density_above_each_images_noise_level(scheduler: Any, skewed: bool) -> None:
    density = torch.linspace(1, 3, 50).square() if skewed else torch.ones(50)
    floors, count = [0.0, 0.15, 0.7, 2.0], 20_000
    levels = Curriculum(audit(floors, [1, 1, 0.25, 1]), scheduler, density if skewed else None)
    for name, floor in zip(NAMES, floors, strict=False):
        t, _ = levels.draw([name] * count, seeded(1))
        found = torch.bincount(levels.indices(t), minlength=50)
        expected = torch.where(levels_of(scheduler) >= floor, density, torch.zeros(50)).double()
        assert not found[expected == 0].any()
        result = scipy.stats.chisquare(found[expected > 0], expected[expected > 0] / expected.sum() * count)
        assert result.pvalue > 1e-3
        assert torch.unique(levels.indices(t)).numel() > 5


@every_scheduler
@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "a density"])
def test_weights_make_every_level_count_as_in_plain_training(scheduler: Any, skewed: bool) -> None:
    """Over plain visits, weighted draws are the table: levels as plain, at each the images by their weights."""
    density = (torch.linspace(1, 3, 50).square() if skewed else torch.ones(50)).double()
    floors, weights = torch.tensor([0.0, 0.15, 0.7, 2.0, 0.0]).double(), torch.tensor([1, 1, 0.25, 1, 0]).double()
    levels = Curriculum(audit(floors.tolist(), weights.tolist()), scheduler, density if skewed else None)
    allowed = (levels_of(scheduler) >= floors[:, None]).double()
    plain = allowed * density
    plain = plain / plain.sum(1, keepdim=True) / 5  # P(i, t) of a loop that visits all five
    wanted = allowed * weights[:, None] * density
    wanted = density * wanted / wanted.sum(0)
    wanted = wanted / wanted.sum()

    got = torch.zeros(5, 50).double()
    for place in range(5):
        t, weight = levels.draw([place] * 4000, seeded(place))
        at = levels.indices(t)
        got[place, at] = weight.double() * plain[place, at]
        assert (weight[0] > 0) == (weights[place] > 0)
    torch.testing.assert_close(got.sum(), torch.ones(()).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_it_is_the_trainers_own_mechanism() -> None:
    """Importance weights between plain visits and LevelBalancedSampler: shares and cap are its."""
    first, weight = torch.tensor([0] + [5] * 999), torch.ones(1000)
    sampler = LevelBalancedSampler(first, weight, 10)
    t = torch.arange(10)
    for place in (0, 1):
        mine = sampler.loss_weight(torch.full((10,), place), t) * (t >= first[place]) / (10 - first[place]) / 1000
        torch.testing.assert_close(mine.sum(), sampler.share[place])
    few = sampler.loss_weight(torch.zeros(10, dtype=torch.long), t)
    assert few[0] / few[9] == pytest.approx(50)


@every_scheduler
def test_a_clean_set_is_plain_training(scheduler: Any) -> None:
    levels = Curriculum(AuditResult.of_clean(5, NAMES), scheduler)
    t, weight = levels.draw(list(range(5)) * 40, seeded(2))
    assert torch.equal(weight, torch.ones(200))
    u = torch.rand(200, generator=seeded(2), dtype=torch.float64)
    at = (u * 50).long()
    assert torch.equal(levels.indices(t), 49 - at if t.is_floating_point() else at)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_and_timesteps_are_those_of_the_flow_scheduler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    levels = Curriculum(audit([0.25, 1.0], [1, 1]), scheduler)
    t, _ = levels.draw(["a.png", "b.png"] * 3000, seeded(3))
    assert torch.equal(scheduler.timesteps[levels.indices(t)], t)
    assert torch.equal(scheduler.sigmas[levels.indices(t)], levels.sigmas(t))
    lowest = [levels.sigmas(t)[place::2].min().item() for place in (0, 1)]
    assert lowest == pytest.approx([0.2, 0.5], abs=0.005)  # s = c / (1 + c): 0.25 / 1.25 and 1 / 2
    assert (torch.tensor(lowest) >= torch.tensor([0.2, 0.5]) - 1e-6).all()


def test_density_of_the_scripts_that_draw_logit_normal() -> None:
    u = compute_density_for_timestep_sampling("logit_normal", 200_000, 0.0, 1.0, 1.29)
    density = torch.bincount((u * 50).long(), minlength=50)
    scheduler = flow(3.0)
    levels = Curriculum(audit([0.0, 1.5], [1, 1]), scheduler, density)
    t, _ = levels.draw([1] * 20_000, seeded(4))
    above = density.double() * (levels_of(scheduler) >= 1.5)
    found = torch.bincount(levels.indices(t), minlength=50).double() / 20_000
    torch.testing.assert_close(found, above / above.sum(), atol=0.01, rtol=0)


def test_what_images_carry_is_told_by_name_or_place() -> None:
    levels = Curriculum(audit([0.0, 0.5], [1, 1]), ddpm())
    assert levels.min_sigma(["b.png", "a.png"]).tolist() == [0.5, 0.0]
    assert levels.noise_level(torch.tensor([1, 0])).tolist() == [0.25, 0.0]
    one = [seeded(7), seeded(8)]
    t, _ = levels.draw(["a.png", "b.png"], one)
    assert torch.equal(t[:1], levels.draw(["a.png"], seeded(7))[0])


def test_images_with_lost_pixels_count_where_the_loop_repairs_them() -> None:
    found = replace(audit([0.0, 0.5], [1, 1]), has_missing=torch.tensor([False, True]))
    assert (Curriculum(found, ddpm()).draw([0, 1])[1] > 0).tolist() == [True, False]
    assert (Curriculum(found, ddpm(), repaired=True).draw([0, 1])[1] > 0).all()
    with pytest.raises(UsageError, match="fill in lost pixels, with `repaired` true"):
        Curriculum(replace(found, has_missing=torch.tensor([True, True])), ddpm())


def test_what_cannot_be_is_said_in_one_line() -> None:
    fine = audit([0.0, 0.5], [1, 1])
    with pytest.raises(UsageError, match=r"'x\.png' is no image of this audit of 2: name it as 'a\.png'"):
        Curriculum(fine, ddpm()).draw(["x.png"])
    with pytest.raises(UsageError, match="2 is no image"):
        Curriculum(fine, ddpm()).draw([2])
    with pytest.raises(UsageError, match="no image to train on"):
        Curriculum(audit([1e9, 0.0], [1, 0]), ddpm())
    with pytest.raises(TypeError, match="EDMEulerScheduler has neither"):
        Curriculum(fine, EDMEulerScheduler())
    (used := flow(1.0)).set_timesteps(4)
    with pytest.raises(ValueError, match="`scheduler` is set to 4 of 50 timesteps for sampling: give a fresh"):
        Curriculum(fine, used)
    with pytest.raises(ValueError, match="`density` needs shape"):
        Curriculum(fine, ddpm(), torch.ones(3))
    with pytest.raises(ValueError, match="`density` is 0 at every timestep"):
        Curriculum(fine, ddpm(), torch.tensor([1.0] + [0.0] * 49))


@pytest.mark.parametrize(("v", "c", "noise"), [(0.0, 0.3, 0.2), (0.01, 0.2, 0.2), (0.25, 0.4, 0.2)])
def test_what_a_plain_loss_makes_of_noisy_images_is_as_the_guide_says(v: float, c: float, noise: float) -> None:
    """Data of variance v + noise^2 above the noise level c and v below: the probability-flow ODE, in small steps."""
    sigma = torch.logspace(2, -4, 400_000, dtype=torch.float64)
    middle = (sigma[1:] * sigma[:-1]).sqrt()
    data = torch.where(middle >= c, v + noise**2, v)
    gain = data / (data + middle.square())  # of the ideal denoiser: d log x = (1 - gain) d log sigma
    growth = ((1 - gain) * (sigma[1:] / sigma[:-1]).log()).sum().exp()
    found = (v + noise**2 + sigma[0] ** 2) * growth**2
    assert found.item() == pytest.approx(v * (v + c**2 + noise**2) / (v + c**2), rel=1e-2, abs=1e-6)


# -- the loops of the guide ----------------------------------------------------------------------------


class Seen(torch.nn.Module):
    """A network, and the timesteps that it was asked at."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.t = network, torch.zeros(0)
        self.config = network.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        return self.network(*args, **kwargs)


def unet() -> torch.nn.Module:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )


def conditional_unet() -> torch.nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def transformer() -> torch.nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
    )


def section() -> str:
    return GUIDE.read_text().split("## Each image at its own noise levels")[1].split("\n## ")[0]


def loops() -> dict[str, tuple[str, str]]:
    """Every loop that the guide shows as a difference, by its script: (as it was, as it is)."""
    shown = re.findall(r"^### .*?`(\w+)\.py`.*?\n```diff\n(.*?)^```", section(), flags=re.DOTALL | re.MULTILINE)

    def side(diff: str, mark: str) -> str:
        return "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in f" {mark}")

    return {name: (side(diff, "-"), side(diff, "+")) for name, diff in shown}


def training(script: str) -> dict[str, Any]:
    """What such a script has made before its loop."""
    batch, draw = 5, seeded(0)
    images = torch.randn(batch, 1 if script == "train_unconditional" else 4, 8, 8, generator=draw)
    if script == "train_unconditional":
        network, scheduler = unet(), DDPMScheduler()
    elif script == "train_text_to_image_lora":
        network, scheduler = conditional_unet(), DDPMScheduler(prediction_type="v_prediction")
    else:
        network = transformer()
        if (channels := network.config.in_channels) != 4:
            images = torch.randn(batch, channels, 8, 8, generator=draw)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    seen = Seen(network)

    def get_sigmas(timesteps: torch.Tensor, n_dim: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        at = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]  # as the scripts do
        return scheduler.sigmas[at].to(dtype).reshape(-1, *[1] * (n_dim - 1))

    return {
        "torch": torch,
        "F": F,
        "AuditResult": AuditResult,
        "Curriculum": Curriculum,
        "compute_density_for_timestep_sampling": compute_density_for_timestep_sampling,
        "model": seen,
        "unet": seen,
        "transformer": seen,
        "noise_scheduler": scheduler,
        "noise_scheduler_copy": scheduler,
        "get_sigmas": get_sigmas,
        "train_dataloader": [{"input": images, "latents": images, "name": list(NAMES)}],
        "encoder_hidden_states": torch.randn(batch, 3, 6, generator=draw),
        "prompt_embeds": torch.randn(batch, 3, 8, generator=draw),
        "pooled_prompt_embeds": torch.randn(batch, 6, generator=draw),
        "accelerator": SimpleNamespace(backward=torch.Tensor.backward),
    }


def test_the_other_snippets_of_the_guide_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos-audit").mkdir()
    audit([0.0, 0.2], [1, 1]).save(tmp_path / "photos-audit" / "found.json")
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.5)
    names = training("train_dreambooth_lora_sd3") | {"vae": vae, "clean_images": torch.rand(2, 3, 16, 16) * 2 - 1}
    shown = re.findall(r"^( *)```python\n(.*?)^\1```", section(), flags=re.DOTALL | re.MULTILINE)
    assert len(shown) == 2
    for _, code in shown:
        exec(compile(textwrap.dedent(code), "guide", "exec"), names | {"in_latents": in_latents})


@pytest.mark.parametrize("script", ["train_unconditional", "train_text_to_image_lora", "train_dreambooth_lora_sd3"])
def test_the_loops_of_the_guide_run_before_and_after(script: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos-audit").mkdir()
    floors = [0.0, 0.2, 1.0, 5.0, 0.0]
    audit(floors, [1, 1, 0.5, 1, 0]).save(tmp_path / "photos-audit" / "found.json")
    before, after = loops()[script]
    for code in (before, after):
        names = training(script)
        for repeat in range(4):
            torch.manual_seed(repeat)
            exec(compile(code, script, "exec"), names)
            t = names["model"].t
            table = levels_of(names["noise_scheduler"])
            at = t if not t.is_floating_point() else names["levels"].indices(t) if code is after else None
            if code is after:
                assert (table[at] >= torch.tensor(floors)).all()
                assert names["weight"][4] == 0
        grads = [p.grad for p in names["model"].parameters() if p.grad is not None]
        assert grads
        assert all(g.isfinite().all() for g in grads)
        assert torch.isfinite(names["loss"])
    assert set(loops()) == {"train_unconditional", "train_text_to_image_lora", "train_dreambooth_lora_sd3"}
