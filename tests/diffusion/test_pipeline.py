"""Sampling: equal to stock diffusers, independent of the batch, exact on Gaussians, and the free baselines.

A little over 400 lines: one section per claim, on the same few pipelines.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from PIL import Image

from robustdiff.commands import main
from robustdiff.diffusion import sample_files
from robustdiff.diffusion.config import SampleConfig
from robustdiff.diffusion.pipeline import (
    SCHEDULERS,
    largest_divisor,
    load_pipeline,
    make_scheduler,
    sample,
    to_uint8,
)
from robustdiff.diffusion.sample_files import sample_to_files
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.diffusion.sigma_floor import SigmaClampedModel
from robustdiff.training.config import TrainConfig
from robustdiff.training.trainer import train
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import image_grid


def tiny_pipeline(prediction_type: str = "epsilon", classes: int | None = None) -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    )
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100, prediction_type=prediction_type))


class GaussianDenoiser(torch.nn.Module):
    """The exact network for N(0, variance) data in 8 x 8 pixels, in any parametrisation."""

    def __init__(self, schedule: NoiseSchedule, variance: float) -> None:
        super().__init__()
        self.schedule, self.variance = schedule, variance
        self.config = {"num_class_embeds": None, "sample_size": 8, "in_channels": 1}
        self.device, self.dtype = torch.device("cpu"), torch.float64

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.reshape(-1).long().expand(len(x_t))
        a, s = (f(t).double().reshape(-1, 1, 1, 1) for f in (self.schedule.alpha, self.schedule.sigma))
        x0_hat = a * self.variance / (a**2 * self.variance + s**2) * x_t
        return self.schedule.output_from_x0(x0_hat, x_t, t)


def gaussian_pipeline(variance: float, prediction_type: str = "epsilon") -> SimpleNamespace:
    scheduler = DDPMScheduler(clip_sample=False, prediction_type=prediction_type)
    return SimpleNamespace(
        unet=GaussianDenoiser(NoiseSchedule.from_scheduler(scheduler), variance), scheduler=scheduler
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of ``train``: two steps on noise, moving-average weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    random = np.random.default_rng(0)
    np.save(folder / "images.npy", random.integers(0, 256, (8, 8, 8), dtype=np.uint8))
    tiny_pipeline().unet.save_config(folder / "unet")
    config = TrainConfig(
        str(folder / "images.npy"),
        output_dir=str(folder / "run"),
        images="16",
        train_batch_size=8,
        ddpm_num_steps=100,
        model_config_name_or_path=str(folder / "unet"),
        preview_images=0,
    )
    return str(train(config))


STOCK = """
import sys
sys.modules["robustdiff"] = None  # importing it is an error from here on
import numpy, torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
run, name, steps, seed, n, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(run)
assert type(pipeline) is DDPMPipeline
kind = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[name]
pipeline.scheduler = kind.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
options = {}
if name == "ddim":  # else its noise is not that of the image which it clips
    pipeline, options = DDIMPipeline(pipeline.unet, pipeline.scheduler), {"use_clipped_model_output": True}
generators = [torch.Generator().manual_seed(int(seed) + i) for i in range(int(n))]
images = pipeline(batch_size=int(n), generator=generators, num_inference_steps=int(steps), **options).images
numpy.save(output, numpy.stack([numpy.array(image) for image in images]))
"""


@pytest.mark.parametrize("name", ["ddim", pytest.param("ddpm", marks=pytest.mark.slow)])
def test_stock_diffusers_without_robustdiff_draws_the_same_images(run: str, tmp_path, name: str) -> None:
    output = tmp_path / "stock.npy"
    command = [sys.executable, "-c", STOCK, run, name, "20", "7", "3", str(output)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # equal arithmetic, equal images
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **threads})
    ours = to_uint8(sample(load_pipeline(run), 3, seed=7, scheduler=name, steps=20))
    assert np.array_equal(np.load(output), ours[:, 0].numpy())


def test_an_image_does_not_depend_on_its_batch() -> None:
    pipeline = tiny_pipeline()
    together = sample(pipeline, 5, steps=20, scheduler="ddpm")
    alone = sample(pipeline, 5, steps=20, scheduler="ddpm", batch_size=2)
    one = sample(pipeline, [3], steps=20, scheduler="ddpm")
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(together[3:4], one, atol=1e-4, rtol=0)
    assert (together[3] - together[2]).abs().max() > 0.1


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_scheduler_generates_the_variance_of_gaussian_data(name: str, prediction_type: str) -> None:
    variance = 0.05
    images = sample(gaussian_pipeline(variance, prediction_type), 128, scheduler=name, steps=500)
    # 128 x 64 independent numbers: relative standard error of the variance 1.6 %; the samplers' own bias is below 5 %.
    assert images.var().item() == pytest.approx(variance, rel=0.1)
    assert abs(images.mean().item()) < 4 * math.sqrt(variance / images.numel())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_T7_relabelling_by_sqrt_1_plus_m_is_the_regularised_linear_denoiser(prediction_type: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    t, asked = torch.tensor([300]), torch.tensor([380])
    scale = (schedule.noise_to_signal(asked) / schedule.noise_to_signal(t)).item()
    m, variance = scale**2 - 1, 0.3
    x_t = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = GaussianDenoiser(schedule, variance)
    output = SigmaClampedModel(plain, schedule, sigma_scale=scale)(x_t, t)
    a, s = schedule.alpha(t).double(), schedule.sigma(t).double()
    expected_eps = s * (1 + m) / (a**2 * variance + (1 + m) * s**2) * x_t  # theory T3
    torch.testing.assert_close(schedule.eps_hat(output, x_t, t), expected_eps, rtol=1e-5, atol=0)


def test_sigma_floor_queries_at_the_floor_below_it_and_changes_nothing_above() -> None:
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    asked: list[int] = []

    def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.extend(t.tolist())
        return torch.zeros_like(x_t)

    floored = SigmaClampedModel(model, schedule, sigma_floor=schedule.noise_to_signal(torch.tensor(100)).item())
    x_t = torch.ones(3, 1, 2, 2)
    floored(x_t, torch.tensor([10, 100, 700]))
    assert asked == [100, 100, 700]
    plain = GaussianDenoiser(schedule, 0.3)
    floored = SigmaClampedModel(plain, schedule, sigma_floor=0.1)
    t = torch.tensor([999, 800, 500])
    assert torch.equal(floored(x_t.double(), t), plain(x_t.double(), t))


def test_a_floor_in_quadrature_raises_every_level_by_its_formula() -> None:
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    floored = SigmaClampedModel(lambda x, t: x, schedule, sigma_floor=0.3, floor_shape="quadrature")
    level = torch.tensor([0.0, 0.1, 1.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(floored.level_asked(level), (level**2 + 0.09 * (1 + level**2)).sqrt())
    asked: list[int] = []

    def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.extend(t.tolist())
        return torch.zeros_like(x_t)

    times = torch.tensor([0, 100, 900])
    SigmaClampedModel(model, schedule, sigma_floor=0.3, floor_shape="quadrature")(torch.ones(3, 1, 2, 2), times)
    assert asked == schedule.timestep_at(floored.level_asked(schedule.noise_to_signal(times))).tolist()
    assert asked[0] > 0
    with pytest.raises(ValueError, match="floor_shape 'soft' is not one of hard, quadrature"):
        SigmaClampedModel(model, schedule, floor_shape="soft")


def test_the_floor_at_zero_terminal_snr_asks_step_999() -> None:
    """There is no larger level than pure noise, and no rounding to the largest finite one."""
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule, asked = NoiseSchedule.from_scheduler(scheduler), []

    def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.extend(t.tolist())
        return x_t + 1

    x_t = torch.ones(3, 1, 2, 2)
    quadrature = ({"floor_shape": "quadrature", "sigma_floor": f} for f in (0.0, 0.2))
    for settings in ({"sigma_floor": 0.2}, {"sigma_floor": math.inf}, {"sigma_scale": 2.0}, *quadrature):
        output = SigmaClampedModel(model, schedule, **settings)(x_t[:1], torch.tensor(999))
        assert torch.equal(output, x_t[:1] + 1)  # the answer of that step, unchanged
    assert set(asked) == {999}
    assert not math.isfinite(schedule.noise_to_signal(torch.tensor(999)))


def test_relabelling_shrinks_the_generated_variance_as_theory_says() -> None:
    # T7 with T3: the sampler with relabel c generates Sigma / c^2. Nearest-timestep rounding: 2 %; statistics: 1.6 %.
    images = sample(gaussian_pipeline(0.05), 128, scheduler="ddim", steps=250, sigma_scale=1.5)
    assert images.var().item() == pytest.approx(0.05 / 1.5**2, rel=0.1)


def test_the_callback_sees_every_step_and_may_move_the_state() -> None:
    pipeline, seen = tiny_pipeline(), []
    plain = sample(pipeline, 3, steps=10, batch_size=2, callback=lambda step: seen.append((step.index, step.images)))
    assert [index for index, _ in seen] == list(range(10)) * 2
    assert seen[0][1] == [0, 1]
    assert seen[-1][1] == [2]
    assert torch.equal(plain, sample(pipeline, 3, steps=10, batch_size=2))
    moved = sample(pipeline, 3, steps=10, callback=lambda step: step.x_t + 0.1 if step.index == 5 else None)
    assert not torch.allclose(plain, moved)


def test_class_labels_reach_the_network_and_are_required_by_it() -> None:
    pipeline = tiny_pipeline(classes=3)
    zero, one = (sample(pipeline, 2, steps=5, class_labels=[label] * 2) for label in (0, 1))
    assert not torch.allclose(zero, one)
    with pytest.raises(ValueError, match="class_labels"):
        sample(pipeline, 2, steps=5)
    with pytest.raises(ValueError, match="class_labels"):
        sample(tiny_pipeline(), 2, steps=5, class_labels=[0, 0])


def test_the_network_is_left_in_the_mode_it_was_in() -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.train()
    sample(pipeline, 1, steps=5)
    assert pipeline.unet.training


def test_step_counts_that_would_mis_step_are_refused_with_the_nearest_good_one() -> None:
    with pytest.raises(UsageError, match=r"`steps` 30 .*use `steps` 25"):
        make_scheduler("ddim", DDPMScheduler(num_train_timesteps=100), 30)
    with pytest.raises(UsageError, match="`scheduler` 'dim'"):
        make_scheduler("dim", DDPMScheduler(), 10)
    trailing = make_scheduler("ddim", DDPMScheduler(), 4).timesteps.tolist()
    assert trailing == [999, 749, 499, 249]
    assert largest_divisor(300, at_most=49) == 30


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sigma_floor": -1.0}, "sigma_floor"),
        ({"sigma_floor": math.nan}, "sigma_floor"),
        ({"sigma_scale": 0.5}, "sigma_scale"),
        ({"floor_shape": "quadratic"}, "floor_shape"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": 2000, "scheduler": "dpm"}, "as many or fewer"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_of_sample_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sample(tiny_pipeline(), 1, **{"steps": 10, **settings})


def test_relabelled_model_refuses_ranges_that_ask_for_more_detail() -> None:
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    for settings in ({"sigma_scale": 0.5}, {"sigma_floor": -1.0}, {"sigma_scale": math.nan}):
        with pytest.raises(ValueError, match="sigma_scale"):
            SigmaClampedModel(lambda x, t: x, schedule, **settings)


def test_grid_places_every_image() -> None:
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 3)
    grid = image_grid(images, columns=2)
    assert grid.shape == (1, 3 * 3 - 1, 2 * 4 - 1)
    assert [grid[0, 0, 0].item(), grid[0, 0, 4].item(), grid[0, 6, 0].item()] == [0, 1, 4]
    assert grid[0, 7, 6] == 128  # the empty place


# -- the command -------------------------------------------------------------------------------------


def test_sample_command_writes_pngs_and_a_grid_that_equal_the_library(run: str, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    arguments = ["sample", run, "-n", "3", "--steps", "10", "--seed", "5", "--batch-size", "2", "-o", str(output)]
    assert main.main(arguments) == 0
    expected = to_uint8(sample(load_pipeline(run), 3, seed=5, steps=10, batch_size=2))
    written = [np.array(Image.open(output / f"{i:06d}.png")) for i in range(3)]
    assert np.array_equal(np.stack(written), expected[:, 0].numpy())
    assert sorted(path.name for path in output.iterdir()) == [*(f"{i:06d}.png" for i in range(3)), "grid.png"]
    assert main.main(arguments) == 2  # nothing is replaced unasked
    assert "--overwrite" in capsys.readouterr().err
    assert main.main([*arguments, "--overwrite"]) == 0


def test_sample_command_writes_npz(run: str, tmp_path) -> None:
    output = tmp_path / "deep" / "images.npz"
    assert main.main(["sample", run, "-n", "2", "--steps", "10", "-o", str(output)]) == 0
    with np.load(output, allow_pickle=False) as arrays:
        assert arrays["images"].shape == (2, 8, 8, 1)
        assert arrays["images"].dtype == np.uint8
    assert [path.name for path in output.parent.iterdir()] == ["images.npz"]


def test_sample_command_names_its_output_as_it_was_given(run: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["sample", run, "-n", "1", "--steps", "2", "-o", "samples"]) == 0
    assert "\nsamples: 1 image and grid.png" in "\n" + capsys.readouterr().out


def test_sample_command_writes_into_the_run_by_default_and_names_what_it_did(run: str) -> None:
    message = sample_to_files(SampleConfig(run, n=1, steps=10, relabel=1.25, sigma_floor=0.1))
    assert message.startswith(f"{run}/samples/ddim-10-seed0-relabel1.25-floor0.1: 1 image")


def test_every_class_has_a_default_folder_of_its_own(tmp_path) -> None:
    tiny_pipeline(classes=2).save_pretrained(tmp_path / "run")
    for label in (None, "0", "1"):
        sample_to_files(SampleConfig(str(tmp_path / "run"), n=1, steps=10, class_label=label))
    folders = {path.name for path in (tmp_path / "run" / "samples").iterdir()}
    assert folders == {"ddim-10-seed0", "ddim-10-seed0-class-0", "ddim-10-seed0-class-1"}


def test_class_labels_in_turn_are_saved_beside_the_images(tmp_path) -> None:
    tiny_pipeline(classes=2).save_pretrained(tmp_path / "run")
    output = tmp_path / "x.npz"
    sample_to_files(SampleConfig(str(tmp_path / "run"), n=3, steps=10, output=str(output)))
    with np.load(output) as arrays:
        assert arrays["labels"].tolist() == [0, 1, 0]
    with pytest.raises(UsageError, match="`class_label` 2"):
        sample_to_files(SampleConfig(str(tmp_path / "run"), n=3, steps=10, output=str(tmp_path / "y"), class_label="2"))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["no/such/folder"], "no/such/folder"),
        (["{tmp}"], "model_index.json"),
        (["{run}", "-n", "0"], "-n"),
        (["{run}", "--steps", "0"], "--steps"),
        (["{run}", "--steps", "30"], "--steps"),
        (["{run}", "--relabel", "0.5"], "--relabel"),
        (["{run}", "--label-floor", "-1"], "--sigma-floor"),
        (["{run}", "--floor-shape", "quadrature"], "--floor-shape"),
        (["{run}", "--sigma-floor", "0.1", "--floor-shape", "soft"], "--floor-shape"),
        (["{run}", "--batch-size", "0"], "--batch-size"),
        (["{run}", "--class-label", "1"], "--class-label"),
        (["{run}", "--scheduler", "dimm"], "--scheduler"),
        (["{run}", "-o", "{tmp}"], "--output"),
        (["{run}", "-o", ""], "--output"),
        ([""], "RUN"),
    ],
)
def test_bad_input_to_sample_is_one_line_that_names_the_flag(run, tmp_path, capsys, arguments, names) -> None:
    (tmp_path / "something").write_text("of the user's")
    (tmp_path / "grid.png").write_text("also of the user's")
    filled = [argument.format(run=run, tmp=tmp_path) for argument in arguments]
    assert main.main(["sample", *filled, *(["--overwrite"] if "-o" in arguments else [])]) == 2
    error = capsys.readouterr().err
    assert names in error
    assert error.count("\n") == 1
    assert (tmp_path / "something").exists()


@pytest.mark.parametrize("name", ["deep/images.npz", "deep/images"])
def test_a_read_only_output_of_sample_is_refused_before_the_work(run, tmp_path, monkeypatch, capsys, name) -> None:
    """Tests may run as root, whom no permission stops: the system's answer is simulated."""
    original = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and original(path, mode))
    monkeypatch.setattr(sample_files, "load_pipeline", lambda _: pytest.fail("the work has begun"))
    assert main.main(["sample", run, "-n", "1", "--steps", "10", "-o", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert "--output" in error
    assert f"{tmp_path} is read-only" in error
    assert error.count("\n") == 1


def test_class_names_that_are_numbers_are_names_only(tmp_path) -> None:
    """Were 1 an index where the classes are called 3, 5 and 9, it would draw fives."""
    folder = tmp_path / "run"
    tiny_pipeline(classes=3).save_pretrained(folder)
    (folder / "data.json").write_text(json.dumps({"data": {"classes": {"3": 2, "5": 2, "9": 2}}}))
    config = SampleConfig(str(folder), n=2, steps=10, output=str(tmp_path / "x.npz"))
    sample_to_files(dataclasses.replace(config, class_label="5"))
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["labels"].tolist() == [1, 1]
    for label in ("1", "0", "7"):
        with pytest.raises(UsageError, match=rf"`class_label` {label} is not .*3, 5, 9"):
            sample_to_files(dataclasses.replace(config, class_label=label, overwrite=True))


def rewritten(folder: Path, **changes: object) -> Path:
    """A tiny pipeline with other values in ``unet/config.json``."""
    tiny_pipeline().save_pretrained(folder)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_remarks_of_diffusers_in_a_configuration_may_be_long(tmp_path) -> None:
    """``_use_default_values`` lists what newer releases have added: any number of names."""
    folder = rewritten(tmp_path / "run", _use_default_values=[f"option_{i}" for i in range(21)])
    assert load_pipeline(folder).unet.config["sample_size"] == 8


def test_a_pipeline_without_a_sample_size_is_one_plain_line(tmp_path, capsys) -> None:
    folder = rewritten(tmp_path / "run", sample_size=None)
    assert main.main(["sample", str(folder), "-n", "1", "--steps", "10", "-o", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "sample_size is missing" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "word"), [({"out_channels": 2}, "variances"), ({"class_embed_type": "timestep"}, "class numbers")]
)
def test_pipelines_that_cannot_be_sampled_are_refused_when_loaded(tmp_path, changes, word) -> None:
    pipeline = tiny_pipeline()
    kept = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    unet = UNet2DModel(**{**kept, **changes})
    DDPMPipeline(unet, pipeline.scheduler).save_pretrained(tmp_path / "run")
    with pytest.raises(UsageError, match=word):
        load_pipeline(tmp_path / "run")


def test_a_latent_pipeline_is_refused_rather_than_sampled_without_its_decoder(tmp_path) -> None:
    scheduler = DDIMScheduler()
    vae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, sample_size=8)
    LDMPipeline(vae, tiny_pipeline().unet, scheduler).save_pretrained(tmp_path / "run")
    with pytest.raises(UsageError, match="also needs vqvae"):
        load_pipeline(tmp_path / "run")


def test_a_hub_id_without_network_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main.main(["sample", "nobody/no-such-model-xyz"]) == 2
    error = capsys.readouterr().err
    assert "could not be fetched from the hub" in error
    assert error.count("\n") == 1
