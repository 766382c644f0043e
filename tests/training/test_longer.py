"""Going on for longer, and with settings that are said otherwise but mean the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY_UNET
from robustdiff.commands import main
from robustdiff.training.config import TrainConfig
from robustdiff.training.trainer import train
from robustdiff.utils.errors import UsageError


@pytest.fixture
def base(photos: Path, tmp_path: Path) -> TrainConfig:
    """A run of 8 steps of 4 images, of which there are 8."""
    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET))
    return TrainConfig(
        str(photos),
        output_dir=str(tmp_path / "run"),
        images="32",
        train_batch_size=4,
        model_config_name_or_path=str(tmp_path / "unet.json"),
        learning_rate=1e-3,
        lr_warmup_steps=0,
        ddpm_num_steps=20,
        preview_images=0,
        logging_steps=1,
        checkpointing_steps=4,
    )


def go(base: TrainConfig, name: str, **changes: object) -> tuple[Path, str]:
    """The run folder, and what was said."""
    said: list[str] = []
    folder = Path(base.output_dir).with_name(name)
    return train(dataclasses.replace(base, output_dir=str(folder), **changes), said.append), "\n".join(said)


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    place = folder / "checkpoints" / f"step-{step:08d}"
    parts = ("model", "ema", "optimizer")
    return {f"{part}/{k}": v for part in parts for k, v in load_file(place / f"{part}.safetensors").items()}


# -- longer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length", [{"images": "0.064k"}, pytest.param({"images": "500k", "num_epochs": 8}, marks=pytest.mark.slow)]
)
def test_a_finished_run_goes_on_as_one_that_was_that_long_from_its_start(base: TrainConfig, length: dict) -> None:
    """With a constant rate, where the first half does not know how long it all will be: bit for bit."""
    constant = dataclasses.replace(base, lr_scheduler="constant", lr_warmup_steps=None)
    whole, _ = go(constant, "whole", images="64")
    go(constant, "run")
    longer, said = go(constant, "run", resume=True, **length)
    assert "training longer: 64 images instead of 32" in said
    assert "from here" not in said
    a, b = state(whole, 16), state(longer, 16)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((longer / "config.json").read_text())["plan"]["images"] == 64
    seen = [json.loads(line)["images"] for line in (longer / "metrics.jsonl").read_text().splitlines()]
    assert seen == [4 * step for step in range(1, 17)]
    _, said = go(constant, "run", resume=True, **length)  # the same command again: nothing to do
    assert "training longer" not in said


@pytest.mark.parametrize(
    "scheduler",
    [
        "cosine",
        pytest.param("linear", marks=pytest.mark.slow),
        pytest.param("polynomial", marks=pytest.mark.slow),
        "constant_with_warmup",
    ],
)
def test_the_learning_rate_is_that_of_the_longer_run_at_once_and_this_is_said(base, scheduler: str) -> None:
    timed = dataclasses.replace(base, lr_scheduler=scheduler, lr_warmup_steps=2)
    whole, _ = go(timed, "whole", images="64")
    go(timed, "run")
    longer, said = go(timed, "run", resume=True, images="64")
    assert rates(longer)[8:] == rates(whole)[8:]
    if scheduler == "constant_with_warmup":
        assert "from here" not in said
    else:
        assert f"learning rate: {rates(whole)[8]:.3g} from here, where the checkpoint has " in said
        assert f"{scheduler} over all 16 steps" in said


def test_a_run_that_was_stopped_may_be_made_longer_too(base: TrainConfig) -> None:
    whole, _ = go(base, "whole", images="64")
    go(base, "run")
    longer, _ = go(base, "run", resume_from_checkpoint="step-4", images="64")
    assert rates(longer)[4:] == rates(whole)[4:]


@pytest.mark.parametrize(("length", "flag"), [({"images": "16"}, "--images 16"), ({"num_epochs": 1}, "--num-epochs 1")])
def test_a_shorter_run_is_one_line_with_the_remedy(base: TrainConfig, length: dict, flag: str, capsys) -> None:
    go(base, "run")
    capsys.readouterr()
    name, value = next(iter(length.items()))
    arguments = [
        "train",
        base.data,
        "--output-dir",
        base.output_dir,
        "--resume",
        f"--{name.replace('_', '-')}",
        str(value),
    ]
    arguments += ["--train-batch-size", "4", "--model-config-name-or-path", base.model_config_name_or_path]
    arguments += ["--learning-rate", "1e-3", "--lr-warmup-steps", "0", "--ddpm-num-steps", "20"]
    assert main.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "run is a run of 32 images" in line
    assert flag in line
    assert "more to train longer" in line


# -- the same said otherwise -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"images": "0.032k"}, {"images": "32"}),
        ({"num_epochs": 4, "images": "500k"}, {"images": "32"}),
        ({"gate": "0:0.2"}, {"gate": "0.0:.20"}),
        ({"corrupt": ("gaussian:sigma=0.2,fraction=0.5",)}, {"corrupt": ("gaussian:fraction=.50,sigma=.2",)}),
        ({"corrupt": ("gaussian:sigma=0.2",)}, {"corrupt": ("gaussian:sigma=0.2,fraction=1",)}),
        ({}, {"preset": "gated"}),
        ({"preset": "gated"}, {"preset": None, "strength": 3.75, "gate": "0:0.2"}),
        ({}, {"prediction_type": "epsilon", "ddpm_beta_schedule": "linear"}),
        ({}, {"channels": 1, "resolution": 8}),
        ({"lr_warmup_steps": None}, {"lr_warmup_steps": 0}),
    ],
    ids=str,
)
def test_values_are_compared_and_not_their_spelling(base: TrainConfig, before: dict, now: dict) -> None:
    go(base, "run", **before)
    _, said = go(base, "run", **now, resume=True)
    assert "training longer" not in said


def test_the_configuration_of_the_network_may_be_named_by_another_path(base, tmp_path, monkeypatch) -> None:
    go(base, "run")
    monkeypatch.chdir(tmp_path)
    go(base, "run", model_config_name_or_path="./unet.json", resume=True)
    (tmp_path / "link").symlink_to(tmp_path)
    go(base, "run", model_config_name_or_path=str(tmp_path / "link" / "unet.json"), resume=True)


def test_what_means_something_else_is_still_refused_by_name(base: TrainConfig) -> None:
    dirty = dataclasses.replace(base, corrupt=("gaussian:sigma=0.2",))
    go(dirty, "run")
    for now in (
        {"gate": "0:0.5"},
        {"corrupt": ("gaussian:sigma=0.3",)},
        {"learning_rate": 2e-3},
        {"lr_warmup_steps": 3},
        {"prediction_type": "sample"},
        {"preset": "plain"},
        {"resolution": 4},
        {"seed": 1},
    ):
        with pytest.raises(UsageError, match=f"`{next(iter(now))}`"):
            go(dirty, "run", **now, resume=True)


@pytest.mark.parametrize("value", ["x", [5], None, {"a": 1}], ids=str)
def test_a_damaged_record_of_the_length_is_one_line(base: TrainConfig, value: object) -> None:
    folder, _ = go(base, "run")
    saved = json.loads((folder / "config.json").read_text())
    saved["plan"]["images"] = value
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=r"`resume`: .* has no readable config.json and data.json"):
        go(base, "run", resume=True)


@pytest.mark.parametrize("name", ["corrupt", "model_config_name_or_path", "gate"])
def test_a_damaged_record_of_the_settings_is_one_line(base: TrainConfig, name: str) -> None:
    folder, _ = go(base, "run")
    kept = (folder / "config.json").read_text()
    for value in (5, [5], ["x"], "\0", None, {"a": 1}):
        saved = json.loads(kept)
        saved["settings"][name] = saved["plan"]["objective"] = value
        (folder / "config.json").write_text(json.dumps(saved))
        with pytest.raises(UsageError) as error:
            go(base, "run", resume=True, strength=3.0)
        assert "\n" not in str(error.value)
