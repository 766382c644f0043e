"""Training: the run folder, resume, accumulation, fine-tuning, interruption, and what bad input gets.

Long, because the parts of a run share its fixtures: one section per claim.
"""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file

from helpers import TINY_UNET as UNET
from helpers import assert_same_but_rounding
from robustdiff.commands import main
from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.networks import build_unet
from robustdiff.diffusion.pipeline import load_pipeline, sample, to_uint8
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.baselines import InvarianceLoss
from robustdiff.losses.denoising import DenoisingLoss, LossOutput
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.strength import InverseRadius, SigmaRange
from robustdiff.training import processes, trainer
from robustdiff.training.callbacks import checkpointing, pipeline
from robustdiff.training.config import TrainConfig
from robustdiff.training.loader import Batches
from robustdiff.training.metrics import Metrics
from robustdiff.training.setup import build_objective
from robustdiff.training.trainer import train
from robustdiff.utils.errors import TrainingError, UsageError
from robustdiff.utils.seeds import derive_seed


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight 8 x 8 grey images in two folders."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    random = np.random.default_rng(0)
    for i in range(8):
        path = folder / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def unet_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "unet.json"
    path.write_text(json.dumps(UNET))
    return str(path)


@pytest.fixture
def config(photos: Path, unet_config: str, tmp_path: Path) -> TrainConfig:
    """A run of 12 steps of 4 images, with dropout-free network and previews."""
    return TrainConfig(
        str(photos),
        output_dir=str(tmp_path / "run"),
        images="48",
        train_batch_size=4,
        model_config_name_or_path=unet_config,
        learning_rate=1e-3,
        ddpm_num_steps=20,
        ddpm_num_inference_steps=5,
        preview_images=2,
        checkpointing_steps=4,
        logging_steps=4,
    )


def changed(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder: str | Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


# -- the run folder ----------------------------------------------------------------------------------


def test_the_output_folder_is_a_stock_pipeline_and_what_the_design_lists(config: TrainConfig) -> None:
    folder = train(changed(config, corrupt=("gaussian:sigma=0.2,fraction=0.5",), preset="paper-noise"))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert pipeline(batch_size=2, num_inference_steps=5).images[0].size == (8, 8)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("model_index.json", "unet", "scheduler", "README.md", "config.json", "data.json"),
        *("metrics.jsonl", "samples", "checkpoints"),
    }
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]
    assert len(list((folder / "samples").glob("*.png"))) == 3
    saved = json.loads((folder / "config.json").read_text())
    assert saved["settings"]["images"] == "48"
    assert saved["plan"]["steps"] == 12
    data = json.loads((folder / "data.json").read_text())
    assert data["data"]["count"] == 8
    assert data["corrupt"] == ["gaussian:sigma=0.2,fraction=0.5"]
    assert "gaussian:sigma=0.2" in (folder / "README.md").read_text()
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        assert line["regularised"] == 1
        assert line["radius"] > 8 / 255
        assert line["loss"] == pytest.approx(line["denoising"] + 0.3 * line["equivariance"], rel=1e-5)
        assert line["gradient_norm"] > 0


def test_the_snippets_of_the_model_card_draw(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(changed(config, images="8", preview_images=0, ddpm_num_steps=100))
    whole, fewer = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    names: dict[str, object] = {}
    exec(whole.replace("batch_size=4", "batch_size=4, num_inference_steps=5"), names)
    assert len(names["images"]) == 4
    generators = "[torch.Generator().manual_seed(7 + i) for i in range(4)]"
    exec("import torch\n" + fewer.replace("batch_size=4", f"batch_size=4, generator={generators}"), names)
    drawn = np.stack([np.array(image) for image in names["images"]])
    ours = to_uint8(sample(load_pipeline(folder), 4, seed=7, steps=50)).permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn.reshape(ours.shape).astype(int) - ours).max() <= 1  # they may part in spacing, not in kind


def test_the_pipeline_holds_the_moving_average_and_the_checkpoint_holds_both(config: TrainConfig) -> None:
    folder = train(config)
    last = folder / "checkpoints" / "step-00000012"
    ema, raw = load_file(last / "ema.safetensors"), load_file(last / "model.safetensors")
    assert same(weights(folder), ema)
    assert not same(ema, raw)
    plain = train(changed(config, use_ema=False, output_dir=config.output_dir + "-raw"))
    assert same(weights(plain), raw)


def test_dry_run_writes_nothing_and_prints_the_plan(config: TrainConfig, capsys) -> None:
    folder = train(changed(config, dry_run=True))
    assert not folder.exists()
    plan = capsys.readouterr().out
    for word in ("8 images, 8 x 8 grey", "parameters", "EquivarianceLoss", "12 steps of 4", "estimated time"):
        assert word in plan


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "0.5 KiB held"),
        ({"max_memory_gib": 0.0, "dataloader_num_workers": 0}, "streamed (0.5 KiB decoded at every use)"),
        (
            {"max_memory_gib": 0.0, "dataloader_num_workers": 2},
            "streamed (0.5 KiB decoded at every use), fed by 2 workers",
        ),
    ],
)
def test_the_plan_says_where_the_images_are(config: TrainConfig, capsys, changes, line) -> None:
    train(changed(config, dry_run=True, **changes))
    assert f"\nmemory:         {line}\n" in capsys.readouterr().out


def test_a_class_name_of_two_lines_is_one_row_of_the_plan(config: TrainConfig, photos: Path, tmp_path, capsys) -> None:
    for new, old in (("odd\none", "odd"), ("even", "even")):
        shutil.copytree(photos / old, tmp_path / "named" / new)
    train(changed(config, data=str(tmp_path / "named"), class_conditional=True, dry_run=True))
    plan, _, _ = capsys.readouterr().out.partition("dry run:")
    rows = plan.splitlines()
    assert "classes:        2: even, odd one" in rows
    assert all(re.match(r"[a-z ]+: +\S", row) for row in rows), plan


def test_with_no_flag_at_all_the_plan_is_complete(photos: Path, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["train", str(photos), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "UNet2DModel tiny" in plan
    assert "499,968 images" in plan
    assert "runs/photos" in plan
    assert not list(tmp_path.iterdir())


# -- the same run, whatever the path to it -----------------------------------------------------------


def test_the_seed_rules_everything(config: TrainConfig) -> None:
    one = train(config)
    torch.manual_seed(99)
    two = train(changed(config, output_dir=config.output_dir + "2"))
    other = train(changed(config, output_dir=config.output_dir + "3", seed=1))
    assert same(weights(one), weights(two))
    assert metrics(one) == metrics(two)
    assert not same(weights(one), weights(other))


@pytest.mark.parametrize("preset", ["paper", "gated"])
def test_a_resumed_run_equals_an_uninterrupted_one(config: TrainConfig, preset: str, monkeypatch) -> None:
    config = changed(config, preset=preset, random_flip=True, corrupt=("impulse:amount=0.1",))
    whole = train(changed(config, output_dir=config.output_dir + "-whole"))

    original = pipeline.save_pipeline
    saves = []

    def dies_after_the_second_checkpoint(*arguments: object) -> None:
        saves.append(1)
        if len(saves) == 2:
            raise RuntimeError("power cut")
        original(*arguments)

    monkeypatch.setattr(pipeline, "save_pipeline", dies_after_the_second_checkpoint)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config)
    monkeypatch.setattr(pipeline, "save_pipeline", original)
    resumed = train(changed(config, resume=True))
    assert same(weights(whole), weights(resumed))
    assert metrics(whole) == metrics(resumed)
    for name in ("model", "ema", "optimizer"):
        end = Path("checkpoints") / "step-00000012" / f"{name}.safetensors"
        assert same(load_file(whole / end), load_file(resumed / end))


def test_resuming_from_a_named_checkpoint(config: TrainConfig) -> None:
    whole = train(changed(config, checkpoints_total_limit=5))
    before = weights(whole)
    assert same(before, weights(train(changed(config, resume_from_checkpoint="step-4"))))
    with pytest.raises(UsageError, match=r"`resume_from_checkpoint` 'step-5'.*step-00000012"):
        train(changed(config, resume_from_checkpoint="step-5"))


def test_four_accumulation_steps_follow_the_same_schedule_and_weights_as_one(config: TrainConfig) -> None:
    one = train(changed(config, lr_warmup_steps=3, preset="paper"))
    four = train(
        changed(
            config,
            lr_warmup_steps=3,
            preset="paper",
            train_batch_size=1,
            gradient_accumulation_steps=4,
            output_dir=config.output_dir + "4",
        )
    )
    rates = [[line["learning_rate"] for line in metrics(folder)] for folder in (one, four)]
    assert rates[0] == rates[1]
    assert rates[0][0] > rates[0][1] > rates[0][2] > 0
    raw = Path("checkpoints") / "step-00000012" / "model.safetensors"
    assert_same_but_rounding(load_file(one / raw), load_file(four / raw))


def test_the_learning_rate_warms_up_peaks_and_ends_near_zero(config: TrainConfig) -> None:
    folder = train(changed(config, logging_steps=1, lr_warmup_steps=4))
    rates = [line["learning_rate"] for line in metrics(folder)]
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[-1] == pytest.approx(1e-3 * 0.5 * (1 + np.cos(np.pi * 7 / 8)), rel=1e-6)


def test_plain_training_is_the_ddpm_loop_everybody_writes(config: TrainConfig) -> None:
    """The losses of twelve steps equal those of a loop of a few lines on the same images and draws."""
    config = changed(config, perturbation="none", lr_scheduler="constant", lr_warmup_steps=0, logging_steps=1)
    folder = train(config)
    torch.manual_seed(derive_seed(0, "weights"))
    unet = UNet2DModel.from_config({**UNET, "sample_size": 8, "in_channels": 1, "out_channels": 1})
    scheduler = DDPMScheduler(num_train_timesteps=20)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-6, eps=1e-8)
    batches = Batches(load_images(config.data), (), 0, False)
    losses = []
    for step in range(12):
        batch = batches(range(4 * step, 4 * step + 4))
        x0, generators = batch.x0, batch.generators
        t = torch.stack([(torch.rand((), generator=g, dtype=torch.float64) * 20).long() for g in generators])
        eps = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators])
        loss = torch.nn.functional.mse_loss(unet(scheduler.add_noise(x0, eps, t), t).sample, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [line["loss"] for line in metrics(folder)] == pytest.approx(losses, rel=1e-4)


def test_batches_see_every_image_once_per_epoch_and_dirt_is_frozen(photos: Path) -> None:
    dirt = (Corruption.parse("gaussian:sigma=0.5"),)
    batches = Batches(load_images(str(photos)), dirt, seed=3, random_flip=False)
    first, second = ([batches.index(k) for k in range(8 * e, 8 * e + 8)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    x0 = batches(range(16)).x0
    for place, index in enumerate(first):
        assert torch.equal(x0[place], x0[8 + second.index(index)])
    again = batches(range(6, 10)).x0  # across the epoch's end, in another batch
    assert torch.equal(again, x0[6:10])


def test_flips_are_mirrored_half_of_the_time(photos: Path) -> None:
    images = load_images(str(photos))
    flipped = Batches(images, (), seed=0, random_flip=True)
    x0 = flipped(range(400)).x0
    straight = torch.stack([images.x0(flipped.index(k)) for k in range(400)])
    mirrored = [(a.flip(-1) == b).all().item() for a, b in zip(x0, straight, strict=True)]
    kept = [(a == b).all().item() for a, b in zip(x0, straight, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250  # five standard deviations


# -- objectives by flag ------------------------------------------------------------------------------


def test_objective_flags_reach_the_objective() -> None:
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 10))
    paper = build_objective(TrainConfig("x", preset="paper"), schedule)
    assert paper == EquivarianceLoss.preset("paper", schedule)
    gated = build_objective(TrainConfig("x"), schedule)
    assert gated == EquivarianceLoss.preset("gated", schedule)
    assert isinstance(gated.strength, SigmaRange)
    flags = TrainConfig(
        "x",
        preset="paper",
        strength=2.0,
        gate="0.1:0.5",
        radius_exponent=1.0,
        radius_scale=0.5,
        radius_floor=0.0,
        radius_factor="one",
        radius_units="noise",
        normalise="yes",
        attack_steps=3,
        attack_step_size=0.7,
        inner="residual",
        gradient="perturbed",
    )
    flags.validate()
    robust = build_objective(flags, schedule)
    assert robust.strength == SigmaRange(0.1, 0.5, 2.0)
    assert dataclasses.astuple(robust.radius) == (1.0, 0.5, 0.0, False, "noise")
    assert robust.normalise is True
    assert dataclasses.astuple(robust.perturbation) == (3, "residual", 0.7)
    assert robust.gradient == "perturbed"
    assert build_objective(TrainConfig("x", preset="plain"), schedule).perturbation is None
    assert build_objective(TrainConfig("x", perturbation="none"), schedule).perturbation is None
    assert build_objective(TrainConfig("x", gate="0:inf", strength=1.0), schedule).strength == 1.0
    for name in ("paper-random", "paper-noise", "paper-scaled"):
        flags = TrainConfig("x", preset=name)
        flags.validate()
        assert build_objective(flags, schedule) == EquivarianceLoss.preset(name, schedule)
    scaled = build_objective(TrainConfig("x", preset="paper-scaled", strength=2.0), schedule)
    assert scaled.strength == InverseRadius(2.0, 1.0)
    own = build_objective(TrainConfig("x", preset="paper", strength_beta=0.1, normalise="no"), schedule)
    assert (own.strength, own.normalise) == (InverseRadius(0.3, 0.1), False)
    state = build_objective(TrainConfig("x", radius_units="state"), schedule)
    assert (state.radius.units, state.normalise) == ("state", True)
    assert type(build_objective(TrainConfig("x", objective="invariance"), schedule)) is InvarianceLoss
    for name in ("input-perturbation", "pseudo-huber"):
        peer = build_objective(TrainConfig("x", objective=name), schedule)
        assert isinstance(peer, DenoisingLoss)
        assert not isinstance(peer, EquivarianceLoss)


@pytest.mark.parametrize("objective", ["invariance", "input-perturbation", "pseudo-huber"])
def test_every_objective_trains(config: TrainConfig, objective: str) -> None:
    config = changed(config, objective=objective, images="8", preview_images=0)
    assert metrics(train(config))[-1]["denoising"] > 0


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_trains_in_both_parametrisations_that_allow_it(config, prediction_type) -> None:
    config = changed(config, prediction_type=prediction_type, rescale_betas_zero_snr=True, preset="paper")
    folder = train(config)
    scheduler = DiffusionPipeline.from_pretrained(folder).scheduler
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.config.prediction_type == prediction_type
    assert all(np.isfinite(line["loss"]) for line in metrics(folder))


def test_bf16_trains(config: TrainConfig) -> None:
    reference = metrics(train(config))
    half = metrics(train(changed(config, mixed_precision="bf16", output_dir=config.output_dir + "-half")))
    assert half[0]["loss"] == pytest.approx(reference[0]["loss"], rel=0.05)
    assert half != reference


def test_a_saved_network_configuration_takes_the_channels_of_the_data(config: TrainConfig, tmp_path: Path) -> None:
    UNet2DModel(**{**UNET, "sample_size": 32}).save_config(tmp_path / "unet")  # 3 channels, by default
    folder = train(changed(config, model_config_name_or_path=str(tmp_path / "unet"), images="4"))
    assert DiffusionPipeline.from_pretrained(folder).unet.config.in_channels == 1


# -- fine-tuning -------------------------------------------------------------------------------------


def test_init_from_starts_at_the_weights_and_keeps_scheduler_and_pipeline_class(config, tmp_path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "source"
    scheduler = DDIMScheduler(num_train_timesteps=40, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    unet = UNet2DModel.from_config({**UNET, "sample_size": 8, "in_channels": 1, "out_channels": 1})
    DDIMPipeline(unet, scheduler).save_pretrained(source)
    own = {"model_config_name_or_path": None, "ddpm_num_steps": None, "init_from": str(source)}
    folder = train(changed(config, **own, images="4", learning_rate=1e-12, use_ema=False))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is DDIMPipeline
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.num_train_timesteps == 40
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(weights(folder)[name], value, atol=1e-9, rtol=0)
    moved = train(changed(config, **own, output_dir=config.output_dir + "-moved"))
    assert not same(weights(folder), weights(moved))


def test_init_from_a_class_conditional_pipeline_without_names_takes_its_numbers(config, tmp_path, photos) -> None:
    source = tmp_path / "source"
    shape = {**UNET, "sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 2}
    unet = UNet2DModel.from_config(shape)
    with torch.no_grad():
        unet.class_embedding.weight.zero_()
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(source)
    own = {"model_config_name_or_path": None, "ddpm_num_steps": None, "init_from": str(source)}
    with pytest.raises(UsageError, match="has no names of classes"):
        train(changed(config, **own))
    numbered = tmp_path / "numbered"
    for number, name in enumerate(("even", "odd")):
        shutil.copytree(photos / name, numbered / str(number))
    folder = train(changed(config, **own, data=str(numbered)))
    trained = weights(folder)["class_embedding.weight"]
    assert trained.abs().sum(1).min() > 0  # both classes were seen
    assert not torch.equal(trained[0], trained[1])
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="conditional on 2 classes"):
        train(changed(config, **own, data=str(flat), output_dir=str(tmp_path / "other")))


# -- stopping ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_resume_and_exits_130(config: TrainConfig, tmp_path: Path) -> None:
    config = changed(config, images="1200", preview_images=0, logging_steps=1, checkpointing_steps=1000)
    flags = [
        "--output-dir",
        config.output_dir,
        "--images",
        "1200",
        "--train-batch-size",
        "4",
        "--learning-rate",
        "1e-3",
    ]
    flags += ["--model-config-name-or-path", config.model_config_name_or_path, "--preview-images", "0"]
    flags += ["--ddpm-num-steps", "20", "--logging-steps", "1", "--checkpointing-steps", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "robustdiff", "train", config.data, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As many threads as this process: bitwise equality holds for equal arithmetic only.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    run, deadline = Path(config.output_dir), time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "--resume" in error
    assert "Traceback" not in error
    (checkpoint,) = (run / "checkpoints").iterdir()
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert 0 < step < 300
    assert metrics(run)[-1]["step"] == step
    DiffusionPipeline.from_pretrained(run)  # what was saved is a pipeline already

    assert main.main(["train", config.data, *flags, "--resume"]) == 0
    whole = train(changed(config, output_dir=str(tmp_path / "whole")))
    assert same(weights(run), weights(whole))
    assert metrics(run) == metrics(whole)


def test_a_non_finite_loss_stops_with_step_noise_level_and_last_good_checkpoint(config: TrainConfig, capsys) -> None:
    config = changed(config, learning_rate=1e30, lr_warmup_steps=6, lr_scheduler="constant_with_warmup")
    config = changed(config, checkpointing_steps=1, max_grad_norm=1e9)
    with pytest.raises(TrainingError, match=r"not finite at step \d+, after \d+ images, at noise level .*step-0000000"):
        train(config)
    checkpoints = sorted(Path(config.output_dir, "checkpoints").iterdir())
    assert all(torch.isfinite(v).all() for v in load_file(checkpoints[-1] / "model.safetensors").values())


def test_no_space_left_is_one_line(config: TrainConfig, monkeypatch, capsys) -> None:

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing, "save_checkpoint", full)
    flags = ["--output-dir", config.output_dir, "--images", "4", "--train-batch-size", "4", "--preview-images", "0"]
    assert main.main(["train", config.data, *flags, "--network", "tiny"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no space left" in error
    assert "--resume" in error


# -- bad input ---------------------------------------------------------------------------------------


def test_an_output_folder_with_a_run_needs_resume_or_overwrite(config: TrainConfig, tmp_path: Path) -> None:
    folder = train(changed(config, images="8"))
    before = weights(folder)
    with pytest.raises(UsageError, match=r"`resume`.*`overwrite`"):
        train(changed(config, images="8"))
    assert same(before, weights(folder))
    train(changed(config, images="8", seed=5, overwrite=True))
    assert not same(before, weights(folder))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no run of robustdiff"):
        train(changed(config, output_dir=str(tmp_path / "mine"), overwrite=True))
    assert (tmp_path / "mine" / "config.json").exists()


def test_resuming_with_other_settings_or_images_names_what_differs(config: TrainConfig, photos: Path, tmp_path) -> None:
    train(config)
    with pytest.raises(UsageError, match=r"`strength` \(was None, now 2.0\)"):
        train(changed(config, strength=2.0, resume=True))
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(other / "x.png")
    with pytest.raises(UsageError, match="other images"):
        train(changed(config, data=str(other), resume=True))
    with pytest.raises(UsageError, match=r"`resume`: no complete checkpoint"):
        train(changed(config, output_dir=str(tmp_path / "new"), resume=True))


def test_a_resumed_run_may_split_its_batch_otherwise(config: TrainConfig) -> None:
    whole = train(changed(config, output_dir=config.output_dir + "-whole", checkpoints_total_limit=5))
    train(changed(config, checkpoints_total_limit=5))
    halves = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    resumed = train(changed(config, resume_from_checkpoint="step-8", **halves))
    a, b = weights(whole), weights(resumed)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=0)
    with pytest.raises(UsageError, match="4 images per step before, 2 now"):
        train(changed(config, resume=True, train_batch_size=2))


def test_a_cut_off_line_of_metrics_does_not_stop_a_resume(config: TrainConfig) -> None:
    folder = train(config)
    before = metrics(folder)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-20])
    train(changed(config, resume_from_checkpoint="step-8"))
    assert metrics(folder) == before


def test_the_model_that_is_fine_tuned_is_never_overwritten(config: TrainConfig) -> None:
    folder = train(config)
    own = {"model_config_name_or_path": None, "ddpm_num_steps": None}
    with pytest.raises(UsageError, match=r"`init_from` .* lies in `output_dir`"):
        train(changed(config, **own, init_from=str(folder), overwrite=True))
    DiffusionPipeline.from_pretrained(folder)


def test_a_class_conditional_configuration_needs_classes(config: TrainConfig, tmp_path: Path, photos: Path) -> None:
    (tmp_path / "conditional.json").write_text(json.dumps({**UNET, "num_class_embeds": 1}))
    with pytest.raises(UsageError, match="conditional on 1 classes, `data` has 2"):
        train(changed(config, model_config_name_or_path=str(tmp_path / "conditional.json")))


def test_a_non_finite_gradient_is_never_saved(config: TrainConfig, monkeypatch) -> None:

    original = trainer.build_objective

    def poisoned(*arguments: object):
        objective, calls = original(*arguments), []

        def call(model, x0, **draws):
            terms = objective(model, x0, **draws)
            calls.append(1)
            if len(calls) == 2 + 8:  # two timed steps, then the eighth: a saving one
                terms = dataclasses.replace(terms, total=terms.total * (1 + 0 * (terms.total - terms.total).sqrt()))
            return terms

        return call

    monkeypatch.setattr(trainer, "build_objective", poisoned)
    monkeypatch.setattr(trainer, "describe_objective", lambda _: "poisoned")
    with pytest.raises(TrainingError, match=r"gradient is not finite at step 7.*step-00000004"):
        train(config)
    for name in ("model", "ema"):
        (path,) = Path(config.output_dir, "checkpoints").glob(f"*/{name}.safetensors")
        assert all(torch.isfinite(value).all() for value in load_file(path).values())


def test_metrics_that_wait_keep_no_graph_alive() -> None:
    """A graph holds the activations of its pass: those of every step since the last line would fill the memory."""
    kept = []

    class Activations:
        pass

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.activations = Activations()
            kept.append(weakref.ref(context.activations))
            return x * x

        @staticmethod
        def backward(context, gradient):
            return gradient

    metrics = Metrics(SimpleNamespace(scaler=None), skip=False)
    for step in range(3):
        values = Square.apply(torch.ones(4, requires_grad=True))
        steady = torch.ones(4)
        terms = LossOutput(values, values, values, t=torch.arange(4), radius=steady, strength=steady)
        assert kept[-1]() is not None
        assert metrics.add(step, [terms], torch.tensor(1.0)) == 0
    del values, terms
    gc.collect()
    assert [held() for held in kept] == [None] * 3


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_a_network_that_accelerate_would_split_is_refused(config: TrainConfig, monkeypatch, kind) -> None:
    monkeypatch.setattr(processes, "Accelerator", lambda **_: SimpleNamespace(distributed_type=kind))
    with pytest.raises(UsageError, match=f"{kind.value}, which splits the network: .*--multi_gpu"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_an_output_folder_inside_the_data_is_refused(config: TrainConfig, photos: Path) -> None:
    with pytest.raises(UsageError, match="lie inside one another"):
        train(changed(config, output_dir=str(photos / "run")))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--images", "0"], "--images"),
        (["--images", "many"], "--images"),
        (["--train_batch_size", "0"], "--train-batch-size"),
        (["--learning_rate", "-1"], "--learning-rate"),
        (["--learning_rate", "nan"], "--learning-rate"),
        (["--strength", "inf"], "--strength"),
        (["--gate", "1"], "--gate"),
        (["--gate", "2:1"], "--gate"),
        (["--preset", "papr"], "--preset"),
        (["--perturbation", "none", "--attack-steps", "3"], "--attack-steps"),
        (["--perturbation", "random", "--attack-steps", "3"], "--attack-steps"),
        (["--preset", "paper", "--radius-units", "pixels"], "--radius-units"),
        (["--preset", "plain", "--radius-units", "state"], "--radius-units"),
        (["--preset", "paper", "--radius-scale", "-1"], "--radius-scale"),
        (["--preset", "paper", "--strength", "inf"], "--strength"),
        (["--preset", "paper", "--strength-beta", "0"], "--strength-beta"),
        (["--strength-beta", "1"], "--strength-beta"),
        (["--preset", "paper", "--gate", "0:1", "--strength-beta", "1"], "--strength-beta"),
        (["--preset", "paper-scaled", "--gate", "0:1"], "--gate"),
        (["--preset", "paper", "--normalise", "maybe"], "--normalise"),
        (["--preset", "paper-scaled", "--radius-scale", "0", "--radius-floor", "0"], "--radius-scale 0"),
        (["--gate", "500:600"], "--gate 500:600 holds no noise level"),
        (["--preset", "paper", "--gate", "0:0.001"], "--gate"),
        (["--preset", "plain", "--normalise", "no"], "--normalise"),
        (["--perturbation", "none", "--objective", "invariance"], "--objective"),
        (["--objective", "pseudo-huber", "--strength", "1"], "--strength"),
        (["--objective", "pseudo-huber", "--preset", "paper"], "--preset"),
        (["--objective", "invariance", "--perturbation", "adversarial", "--inner", "residual"], "--inner"),
        (["--num-epochs", "1", "--images", "24"], "--num-epochs"),
        (["--no-use-ema", "--ema-max-decay", "0.5"], "--ema-max-decay"),
        (["--lr-scheduler", "constant", "--lr-warmup-steps", "3"], "--lr-warmup-steps"),
        (["--preset", "plain", "--perturbation", "random"], "--strength"),
        (["--rescale-betas-zero-snr"], "--rescale-betas-zero-snr"),
        (["--init-from", "x", "--network", "tiny"], "--network"),
        (["--init-from", "no/such/model"], "no/such/model"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--corrupt", "gausian:sigma=0.2"], "gaussian"),
        (["--corrupt", "gaussian:sigma=-1"], "sigma"),
        (["--network", "base", "--resolution", "10"], "--resolution"),
        (["--model-config-name-or-path", "nowhere.json"], "--model-config-name-or-path"),
        (["--mixed_precision", "fp17"], "--mixed-precision"),
        (["--mixed_precision", "fp16"], "--mixed-precision"),
        (["--logger", "nonesuch"], "--logger"),
        (["--ddpm-num-inference-steps", "30"], "--ddpm-num-inference-steps"),
        (["--ema-max-decay", "2"], "--ema-max-decay"),
        (["--resolution", "10000000"], "--resolution"),
        (["--train-batch-size", "1000000000000"], "--train-batch-size"),
        (["--lr-warmup-steps", "9", "--num-epochs", "1", "--train-batch-size", "1"], "--lr-warmup-steps"),
        (["--radius-exponent", "-50", "--preset", "paper"], "--radius-exponent"),
        (["--output-dir", ""], "--output-dir"),
        (["--init-from", ""], "--init-from"),
        (["--trian-batch-size", "3"], "--train-batch-size"),
        (["--output-dir", "{file}"], "--output-dir"),
    ],
)
def test_bad_input_to_train_is_one_line_that_names_the_flag(photos, tmp_path, capsys, monkeypatch, flags, names):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    assert main.main(["train", str(photos), "--dry-run", *(flag.format(file=file) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert names in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("normalise", True), ("radius_factor", "on"), ("preset", "papers"), ("objective", "robst"), ("channels", 2)],
)
def test_a_word_that_a_setting_does_not_offer_is_refused_in_python_too(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"`{name}` .* is not one of"):
        TrainConfig("x", **{name: value}).validate()


def test_a_run_whose_settings_mean_another_loss_by_now_is_not_resumed(config: TrainConfig) -> None:
    run = train(changed(config, preset="paper", images="8", preview_images=0))
    path = run / "config.json"
    saved = json.loads(path.read_text())
    now = saved["plan"]["objective"]
    saved["plan"]["objective"] = now.replace("units='state'", "units='noise'")
    assert saved["plan"]["objective"] != now
    path.write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=r"the same settings meant .*units='noise'.* name the former"):
        train(changed(config, preset="paper", images="16", preview_images=0, resume=True))
    saved["plan"]["objective"] = now
    path.write_text(json.dumps(saved))
    train(changed(config, preset="paper", images="16", preview_images=0, resume=True, radius_units="state"))


def test_diffusers_flag_names_are_accepted_with_underscores_and_dashes(photos, tmp_path, capsys) -> None:
    flags = [
        *("--train_data_dir", str(photos), "--output_dir", str(tmp_path / "run"), "--resolution", "8"),
        *("--random_flip", "--train_batch_size", "2", "--eval-batch-size=4", "--num_epochs", "2", "--use_ema"),
        *("--gradient_accumulation_steps", "2", "--learning_rate", "1e-4", "--lr_scheduler", "cosine"),
        *("--lr_warmup_steps", "1", "--adam_beta1", "0.95", "--adam_weight_decay", "1e-6", "--adam_epsilon", "1e-8"),
        *("--ema_max_decay", "0.999", "--mixed_precision", "no", "--prediction_type", "epsilon"),
        *("--ddpm_num_steps", "100", "--ddpm_num_inference_steps", "50", "--ddpm_beta_schedule", "linear"),
        *("--checkpointing_steps", "2", "--checkpoints_total_limit", "1", "--overwrite_output_dir", "--dry-run"),
    ]
    assert main.main(["train", *flags]) == 0
    assert "16 images = 4 steps of 4" in capsys.readouterr().out


def test_sizes_that_do_not_fit_name_the_nearest_that_do() -> None:
    with pytest.raises(UsageError, match=r"30 x 28 .*multiples of 8: use `resolution` 24 or 32"):
        build_unet("medium", 3, (28, 30))
