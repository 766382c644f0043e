"""``train --auto``: what is found of the images reaches the training, is written down, and is kept for resuming."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fields import natural
from helpers import TINY_UNET
from robustdiff.audit.parts import parts
from robustdiff.commands import main
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.equivariance import EquivarianceLoss
from robustdiff.losses.strength import SigmaRange
from robustdiff.training import loop, training_set
from robustdiff.training.config import TrainConfig
from robustdiff.training.curriculum import LevelBalancedSampler
from robustdiff.training.loader import Batches
from robustdiff.training.setup import build_objective
from robustdiff.utils.errors import UsageError
from robustdiff.utils.signals import Interrupted
from trained import plan_of, run, same

COUNT = 300
NOISY, ALL = ("gaussian:sigma=0.3,fraction=0.5",), ("gaussian:sigma=0.3",)
STREAMED = {"max_memory_gib": 0.0, "dataloader_num_workers": 2}


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 grey images of 16 x 16 in one file."""
    path = tmp_path_factory.mktemp("data") / "fields.npy"
    np.save(path, ((natural(COUNT)[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy())
    return path


@pytest.fixture
def config(fields: Path, tmp_path: Path) -> TrainConfig:
    """Four steps of two passes of four images."""
    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET))
    return TrainConfig(
        str(fields),
        auto=True,
        output_dir=str(tmp_path / "run"),
        images="32",
        train_batch_size=4,
        gradient_accumulation_steps=2,
        model_config_name_or_path=str(tmp_path / "unet.json"),
        learning_rate=1e-3,
        random_flip=True,
        ddpm_num_steps=50,
        ddpm_num_inference_steps=2,
        preview_images=0,
        checkpointing_steps=2,
        logging_steps=2,
    )


# -- training ----------------------------------------------------------------------------------------


def test_on_clean_images_it_is_plain_training_bit_for_bit(config: TrainConfig, capsys) -> None:
    found = run(config, "auto")
    out = capsys.readouterr().out
    assert f"found clean:    {COUNT} of {COUNT} images" in out
    assert "DenoisingLoss()" in out
    assert same(found, run(config, "plain", auto=False, preset="plain"))


def test_on_dirty_images_it_differs_and_says_what_was_found(config: TrainConfig, tmp_path: Path, capsys) -> None:
    assert not same(run(config, corrupt=NOISY), run(config, "plain", auto=False, preset="plain", corrupt=NOISY))
    out, folder = capsys.readouterr().out, tmp_path / "run"
    (row,) = [line for line in out.splitlines() if line.startswith("found noise:")]
    assert ", white noise, level 0.3" in row
    assert row.endswith(": trained above it")
    card = (folder / "README.md").read_text()
    assert f"| found noise | {row.removeprefix('found noise:').strip()} |" in card
    assert "| found clean |" in card

    account = json.loads((folder / "data.json").read_text())
    told, whole = account["auto"], json.loads((folder / "auto.json").read_text())
    images, copies = whole.pop("images"), whole.pop("copies")
    assert copies == []
    assert {"sharpness", "jpeg_grid", "lost", "oddness", "sigma_error"} <= images[0].keys()
    with Image.open(folder / "found-noisy.png") as sheet:
        assert sheet.width > 5 * 64
    assert not (folder / "found-holed.png").exists()
    assert whole == {"format": "robustdiff auto 1", **told}
    assert told["count"] == COUNT == len(images) == account["trained"]
    noisy = sum(image["noise"] > 0 for image in images)
    assert told["clean"] == COUNT - noisy
    (finding,) = told["findings"]
    assert (finding["part"], finding["count"]) == ("noise", noisy)
    assert f"{noisy} images" in row
    assert images[7]["name"] == "007"
    assert json.loads((tmp_path / "plain" / "data.json").read_text())["auto"] is None
    assert not (tmp_path / "plain" / "auto.json").exists()


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[torch.Tensor, torch.Tensor, NoiseSchedule]]:
    """Timesteps, an argument and the process of every call of an objective, as they come."""
    seen = []
    original = EquivarianceLoss.__call__

    def watching(self, model, x0, **arguments):
        seen.append((arguments["t"], arguments[name], self.schedule))
        return original(self, model, x0, **arguments)

    monkeypatch.setattr(EquivarianceLoss, "__call__", watching)
    return seen


def test_noisy_images_meet_their_level_and_no_timestep_below_it(config: TrainConfig, tmp_path, monkeypatch) -> None:
    seen = watched(monkeypatch, "noise_level")
    run(config, corrupt=NOISY)
    assert any((levels > 0).any() for _, levels, _ in seen)
    assert any((levels == 0).any() for _, levels, _ in seen)
    for t, levels, schedule in seen:
        assert (schedule.noise_to_signal(t) > levels).all()


@pytest.mark.slow
def test_where_every_image_lost_pixels_the_loss_spares_them_at_low_noise(config: TrainConfig, monkeypatch) -> None:
    seen = watched(monkeypatch, "loss_mask")
    config = dataclasses.replace(config, corrupt=("missing:amount=0.3",), random_flip=True)
    whole = run(config)
    found = json.loads((Path(config.output_dir) / "auto.json").read_text())
    assert found["masked"]
    level = max(image["usable"] for image in found["images"])
    spared = torch.cat([~mask.flatten(1).all(1) for _, mask, _ in seen])
    below = torch.cat([schedule.noise_to_signal(t) <= level for t, _, schedule in seen])
    assert spared.any()
    assert not spared[~below].any()
    assert spared[below].double().mean() > 0.9  # a few images lost so little that nothing was found
    share = torch.cat([(~mask).flatten(1).double().mean(1) for _, mask, _ in seen])[spared].mean()
    assert share == pytest.approx(0.3, abs=0.05)
    assert same(whole, run(config, "streamed", **STREAMED))


def test_mirrored_images_keep_their_lost_pixels(config: TrainConfig) -> None:
    images = load_images(config.data)
    sampler = LevelBalancedSampler(torch.zeros(len(images), dtype=torch.long), torch.ones(len(images)), 10)
    repair = {"sampler": sampler, "repair": lambda x, _: (x, x[:, 0] > 0.1)}
    batches = Batches(images, (), 0, True, **repair, masked_below=torch.full((len(images),), 5))
    mirrored = 0
    for first in range(0, 64, 8):
        batch = batches(range(first, first + 8))
        assert batch.mask.shape == (8, 1, *images.size)
        for x, index, t, mask in zip(batch.x0, batch.index, batch.t, batch.mask[:, 0], strict=True):
            assert torch.equal(mask, ~(x[0] > 0.1)) if t < 5 else mask.all()
            mirrored += not torch.equal(x, images.x0(int(index)))
    assert 10 < mirrored < 54
    assert Batches(images, (), 0, True, **repair)(range(8)).mask is None


@pytest.mark.slow
def test_where_all_are_noisy_the_regulariser_begins_below(config: TrainConfig, capsys) -> None:
    plan = plan_of(config, capsys, corrupt=ALL)
    assert "EquivarianceLoss(perturbation=RandomPerturbation(" in plan
    (gate,) = [line for line in plan.splitlines() if line.startswith("objective:")]
    edge = float(gate.split("SigmaRange(low=0.0, high=")[1].split(",")[0])
    assert edge == pytest.approx(0.75 * 0.3, rel=0.1)
    assert "value=15.0)" in gate
    assert f"found clean:    0 of {COUNT} images" in plan
    assert "DenoisingLoss()" in plan_of(config, capsys, corrupt=ALL, preset="plain")
    assert "value=15.0" not in plan_of(config, capsys, corrupt=ALL, preset="gated")
    assert "DenoisingLoss()" in plan_of(config, capsys, corrupt=ALL, auto_without=("regulariser", "noise"))


@pytest.mark.slow
def test_images_that_are_left_out_are_not_counted(config: TrainConfig, capsys) -> None:
    dirt = ("outlier:source=constant,fraction=0.2",)
    plan = plan_of(config, capsys, corrupt=dirt, images="500k", num_epochs=8)
    (out,) = [line for line in plan.splitlines() if line.startswith("found outliers:")]
    count = int(out.split()[2])
    assert count > 40
    assert f" = {8 * (COUNT - count) // 8} steps of 8" in plan


@pytest.mark.parametrize(
    "part",
    [
        "noise",
        pytest.param("blur", marks=pytest.mark.slow),
        pytest.param("holes", marks=pytest.mark.slow),
        pytest.param("outliers", marks=pytest.mark.slow),
    ],
)
def test_a_part_that_is_left_out_is_trained_as_if_it_were_clean(config: TrainConfig, capsys, part: str) -> None:
    dirt = {
        "noise": NOISY,
        "blur": ("blur:radius=2,fraction=0.3",),
        "holes": ("missing:amount=0.3,fraction=0.5",),
        "outliers": ("outlier:source=constant,fraction=0.2",),
    }[part]
    assert f"found {part}:" in plan_of(config, capsys, corrupt=dirt)
    without = plan_of(config, capsys, corrupt=dirt, auto_without=parts())
    assert f"found clean:    {COUNT} of {COUNT} images" in without


# -- the same run in parts, and in any way fed -------------------------------------------------------


@pytest.mark.slow
def test_it_is_fed_in_any_way_and_goes_on_exactly_with_what_it_found(config, tmp_path: Path, monkeypatch) -> None:
    """Noise and holes: levels, timesteps and repair must all survive."""
    config = dataclasses.replace(config, corrupt=("missing:amount=0.3,fraction=0.3", *NOISY))
    whole = run(config, "whole")
    assert same(whole, run(config, "streamed", **STREAMED))

    @contextlib.contextmanager
    def stopping():
        asked = []
        yield lambda: asked.append(1) or (130 if len(asked) == 3 else 0)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_signals", stopping)
        with pytest.raises(Interrupted):
            run(config, "stopped")

    def never(*_):
        raise AssertionError("looked at the images again")

    found = (tmp_path / "stopped" / "auto.json").read_bytes()
    sheets = {path.name: path.read_bytes() for path in (tmp_path / "stopped").glob("found-*.png")}
    assert {"found-noisy.png", "found-holed.png"} <= sheets.keys()
    monkeypatch.setattr(training_set, "audit", never)
    assert same(whole, run(config, "stopped", resume=True, **STREAMED))
    assert (tmp_path / "stopped" / "auto.json").read_bytes() == found
    assert {path.name: path.read_bytes() for path in (tmp_path / "stopped").glob("found-*.png")} == sheets


@pytest.mark.slow
def test_without_what_it_found_it_does_not_go_on(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, corrupt=NOISY)
    whole = run(config)
    run(config, "other", auto_without=("noise",))
    file = tmp_path / "run" / "auto.json"
    good = file.read_bytes()
    file.write_bytes((tmp_path / "other" / "auto.json").read_bytes())
    with pytest.raises(UsageError, match=r"auto\.json is not what the run began with: put it back, or start anew"):
        run(config, resume=True)
    file.write_bytes(good[:100])
    with pytest.raises(UsageError, match=r"auto\.json cannot be used .*put it back, start anew"):
        run(config, resume=True)
    file.unlink()
    with pytest.raises(UsageError, match=r"cannot be used \(No such file"):
        run(config, resume=True)
    file.write_bytes(good)
    assert same(whole, run(config, resume=True))
    for changes in ({"auto": False}, {"auto_without": ("blur",)}, {"preset": "gated"}):
        with pytest.raises(UsageError, match="these settings differ"):
            run(config, resume=True, **changes)


@pytest.mark.slow
def test_a_run_of_before_there_was_the_flag_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, auto=False)
    whole = run(config)
    saved = tmp_path / "run" / "config.json"
    value = json.loads(saved.read_text())
    assert value["settings"]["preset"] is None
    value["settings"]["preset"] = "gated"
    del value["settings"]["auto"], value["settings"]["auto_without"]
    saved.write_text(json.dumps(value))
    assert same(whole, run(config, resume=True))  # and writes the settings of today
    assert same(whole, run(config, resume=True, preset="gated"))
    with pytest.raises(UsageError, match=r"`preset` \(was 'gated', now 'plain'\)"):
        run(config, resume=True, preset="plain")
    with pytest.raises(UsageError, match="leave out `auto` if the run began without it"):
        run(config, resume=True, auto=True)


# -- flags -------------------------------------------------------------------------------------------


def test_the_objective_starts_from_gated_or_with_auto_from_plain() -> None:
    assert TrainConfig("x").start == "gated"
    assert TrainConfig("x", auto=True).start == "plain"
    for preset in ("paper", "gated", "plain"):
        assert TrainConfig("x", preset=preset).start == TrainConfig("x", auto=True, preset=preset).start == preset


def test_levels_that_nothing_is_known_of_are_regularised_unless_flags_say_what_else() -> None:
    schedule, unknown = NoiseSchedule(torch.linspace(0.999, 0.01, 100)), (0.0, 0.15)
    plain = build_objective(TrainConfig("x", auto=True), schedule)
    assert plain == EquivarianceLoss.preset("plain", schedule)
    fallen = build_objective(TrainConfig("x", auto=True), schedule, unknown)
    assert fallen == EquivarianceLoss.preset("gated", schedule, strength=SigmaRange(0.0, 0.15, 15.0))
    paper = build_objective(TrainConfig("x", auto=True, preset="paper"), schedule, unknown)
    assert paper == EquivarianceLoss.preset("paper", schedule)
    own = TrainConfig("x", auto=True, perturbation="random", strength=2.0, gate="0:0.4")
    assert build_objective(own, schedule, unknown).strength == SigmaRange(0.0, 0.4, 2.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--auto", "--noise-levels", "l.csv"], ["--auto finds out what --noise-levels says", "give one"]),
        (["--auto", "--clean-subset", "--corrupt", "blur"], ["--auto finds out what --clean-subset says"]),
        (["--auto", "--objective", "pseudo-huber"], ["--auto has no clean optimum", "--objective pseudo-huber"]),
        (["--auto-without", "blur"], ["--auto-without needs --auto"]),
        (["--auto", "--auto-without", "dust"], ["--auto-without", "dust"]),
        (["--auto", "--strength", "2"], ["without a perturbation --strength would do nothing"]),
        (["--auto", "--perturbation", "random"], ["--auto has no strength for --perturbation random"]),
        (["--auto", "--objective", "invariance"], ["needs --perturbation random"]),
    ],
)
def test_flags_that_do_not_fit_are_one_line(fields: Path, capsys, flags: list[str], words: list[str]) -> None:
    assert main.main(["train", str(fields), "--dry-run", *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert error.count("\n") == 1


def test_parts_are_given_one_by_one(config: TrainConfig, fields: Path, capsys) -> None:
    command = ["train", str(fields), "--auto", "--dry-run", "--corrupt", NOISY[0], "--images", "32"]
    command += ["--model-config-name-or-path", str(config.model_config_name_or_path), "--train-batch-size", "4"]
    assert main.main([*command, "--auto-without", "noise", "--auto-without", "outliers"]) == 0
    assert f"found clean:    {COUNT} of {COUNT}" in capsys.readouterr().out


@pytest.mark.slow
def test_another_objective_trains_with_what_is_found(config: TrainConfig) -> None:
    config = dataclasses.replace(config, objective="input-perturbation", corrupt=NOISY)
    assert not same(run(config, "a"), run(config, "b", auto_without=("noise",)))
