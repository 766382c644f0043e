"""Class-conditional training: labels from folders, arrays and tables reach the network, and samples obey them."""

import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from helpers import TINY_UNET
from robustdiff.commands import main
from robustdiff.data.dataset import ImageDataset
from robustdiff.data.match_model import renumber
from robustdiff.diffusion.config import SampleConfig
from robustdiff.diffusion.pipeline import load_pipeline, sample
from robustdiff.diffusion.sample_files import class_labels, sample_to_files, trained_classes
from robustdiff.training.callbacks import evaluation, pipeline
from robustdiff.training.config import TrainConfig
from robustdiff.training.trainer import train
from robustdiff.utils.errors import UsageError


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that no network could confuse: nearly black and nearly white images of 8 x 8."""
    folder = tmp_path_factory.mktemp("data") / "shades"
    random = np.random.default_rng(0)
    for name, low in (("black", 0), ("white", 216)):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(random.integers(low, low + 40, (8, 8), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def config(shades: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that is long enough to tell black from white."""
    path = tmp_path_factory.mktemp("config") / "unet.json"
    path.write_text(json.dumps(TINY_UNET))
    return TrainConfig(
        str(shades),
        images="1600",
        train_batch_size=8,
        class_conditional=True,
        model_config_name_or_path=str(path),
        learning_rate=1e-2,
        ema_max_decay=0.9,
        ddpm_num_steps=100,
        ddpm_beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        preset="plain",
        ddpm_num_inference_steps=10,
        preview_images=4,
        checkpointing_steps=200,
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(dataclasses.replace(config, output_dir=str(tmp_path_factory.mktemp("runs") / "run")))


@pytest.mark.slow
def test_samples_obey_the_class(run: Path) -> None:
    pipeline = load_pipeline(run)
    assert pipeline.unet.config["num_class_embeds"] == 2
    means = sample(pipeline, 8, steps=10, class_labels=[0, 1] * 4).mean(dim=(1, 2, 3))
    assert means[::2].max() < -0.4
    assert means[1::2].min() > 0.4


@pytest.mark.slow
def test_the_plan_the_account_and_the_card_name_the_classes(
    config: TrainConfig, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dataclasses.replace(config, output_dir=str(tmp_path / "x"), dry_run=True))
    assert re.search(r"classes: +2: black, white", capsys.readouterr().out)
    assert json.loads((run / "data.json").read_text())["data"]["classes"] == {"black": 4, "white": 4}
    assert "| classes | black, white |" in (run / "README.md").read_text()


@pytest.mark.slow
def test_the_snippet_of_the_model_card_draws(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(run.parent)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(code, names)
    images = names["x"]
    assert isinstance(images, torch.Tensor)
    means = images.mean(dim=(1, 2, 3))
    assert means[:2].max() < means[2:].min()


@pytest.mark.slow
def test_the_pipeline_is_a_stock_one(run: Path) -> None:
    assert type(DiffusionPipeline.from_pretrained(run)).__name__ == "DDPMPipeline"


@pytest.mark.slow
@pytest.mark.parametrize(("label", "number"), [("white", 1), ("1", 1), ("black", 0)])
def test_a_class_is_drawn_by_name_or_number(run: Path, tmp_path: Path, label: str, number: int) -> None:
    output = tmp_path / "samples.npz"
    assert main.main(["sample", str(run), "-n", "3", "--steps", "10", "--class-label", label, "-o", str(output)]) == 0
    with np.load(output) as arrays:
        assert arrays["labels"].tolist() == [number] * 3
        assert (arrays["images"].mean() > 127) == bool(number)


@pytest.mark.slow
def test_an_unknown_class_is_refused_with_the_names(run: Path, tmp_path: Path) -> None:
    for label in ("grey", "2", "-1"):
        with pytest.raises(UsageError, match=f"`class_label` {label} is not in 0 .. 1, nor one of black, white"):
            sample_to_files(SampleConfig(str(run), n=1, steps=10, output=str(tmp_path / "x"), class_label=label))


def test_labels_of_an_array_file_condition_too(config: TrainConfig, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.array([3, 5, 5, 3, 9, 9]))
    done = train(
        dataclasses.replace(config, data=str(tmp_path / "set.npz"), images="8", output_dir=str(tmp_path / "run"))
    )
    assert load_pipeline(done).unet.config["num_class_embeds"] == 3
    assert json.loads((done / "data.json").read_text())["data"]["classes"] == {"3": 2, "5": 2, "9": 2}


def test_without_labels_it_is_refused(config: TrainConfig, shades: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(UsageError, match=r"`class_conditional`: `data` .* has no labels: .* images and labels"):
        train(dataclasses.replace(config, data=str(tmp_path / "set.npy"), output_dir=str(tmp_path / "run")))
    assert not os.path.exists(tmp_path / "run")


def test_other_labels_are_not_resumed_on(config: TrainConfig, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    path = tmp_path / "set.npz"
    np.savez(path, images=images, labels=np.array([0, 1, 0, 1]))
    first = dataclasses.replace(config, data=str(path), images="8", output_dir=str(tmp_path / "run"))
    train(first)
    np.savez(path, images=images, labels=np.array([1, 0, 0, 1]))
    with pytest.raises(UsageError, match="holds other labels"):
        train(dataclasses.replace(first, resume=True))


def test_a_conditional_start_is_not_asked_of_an_unconditional_pipeline(config: TrainConfig, tmp_path: Path) -> None:
    plain = dataclasses.replace(config, class_conditional=False, images="8", output_dir=str(tmp_path / "plain"))
    train(plain)
    again = dataclasses.replace(
        config,
        init_from=str(tmp_path / "plain"),
        model_config_name_or_path=None,
        ddpm_num_steps=None,
        prediction_type=None,
        ddpm_beta_schedule=None,
    )
    with pytest.raises(UsageError, match=r"`class_conditional`: .* is not conditional"):
        train(dataclasses.replace(again, output_dir=str(tmp_path / "again")))


# -- fine-tuning: the classes are the model's --------------------------------------------------------


def classes_of(folder: Path, *names: str) -> Path:
    """A folder per class, two images in each."""
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((8, 8), 40 * place + i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def known(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ant, cat and zebra."""
    folder = tmp_path_factory.mktemp("known")
    data = classes_of(folder / "data", "ant", "cat", "zebra")
    return train(dataclasses.replace(config, data=str(data), images="8", output_dir=str(folder / "run")))


def tuned(config: TrainConfig, model: Path, data: Path, output: Path, **more: object) -> TrainConfig:
    own = {"model_config_name_or_path": None, "ddpm_num_steps": None, "prediction_type": None}
    settings = {"init_from": str(model), "data": str(data), "output_dir": str(output), "images": "16"}
    return dataclasses.replace(config, **own, ddpm_beta_schedule=None, **{**settings, **more})


def embeddings(folder: Path) -> torch.Tensor:
    return load_pipeline(folder).unet.class_embedding.weight.detach()


def test_fine_tuning_numbers_classes_as_the_model_does(config: TrainConfig, known: Path, tmp_path: Path) -> None:
    """Cat and zebra would be 0 and 1 in a set without ants: those are the model's ants and cats."""
    data = classes_of(tmp_path / "data", "cat", "zebra")
    done = train(
        tuned(config, known, data, tmp_path / "run", adam_weight_decay=0.0, use_ema=False, ema_max_decay=0.9999)
    )
    moved = (embeddings(done) != embeddings(known)).any(1)
    assert moved.tolist() == [False, True, True]
    account = json.loads((done / "data.json").read_text())["data"]
    assert account["classes"] == {"ant": 0, "cat": 2, "zebra": 2}
    assert "ant, cat, zebra" in (done / "README.md").read_text()
    for label, numbers in (("zebra", [2, 2, 2]), ("cat", [1, 1, 1]), (None, [1, 2, 1])):
        output = tmp_path / f"{label}.npz"
        sample_to_files(SampleConfig(str(done), n=3, steps=2, output=str(output), class_label=label))
        with np.load(output) as arrays:
            assert arrays["labels"].tolist() == numbers
    with pytest.raises(UsageError, match=r"`class_label` ant: .* on no image of that class: give one of cat, zebra"):
        sample_to_files(SampleConfig(str(done), n=3, steps=2, output=str(tmp_path / "x"), class_label="ant"))
    assert "torch.tensor([1, 1, 2, 2])" in (done / "README.md").read_text()
    train(
        tuned(
            config,
            known,
            data,
            tmp_path / "run",
            use_ema=False,
            ema_max_decay=0.9999,
            adam_weight_decay=0.0,
            resume=True,
        )
    )


def test_fine_tuning_again_and_from_the_best_keeps_the_names(config: TrainConfig, known: Path, tmp_path: Path) -> None:
    data = classes_of(tmp_path / "data", "cat", "zebra")
    many = {"evaluate_every": "8", "evaluate_reference": str(tmp_path / "real.npy"), "evaluate_n": 14}
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 256, (28, 8, 8), dtype=np.uint8))
    once = train(tuned(config, known, data, tmp_path / "once", **many))
    again = train(tuned(config, once / "best", data, tmp_path / "again"))
    assert json.loads((again / "data.json").read_text())["data"]["classes"] == {"ant": 0, "cat": 2, "zebra": 2}


@pytest.mark.parametrize("name", ["dog", "Cat"])
def test_a_class_that_the_model_does_not_know_is_one_line(config, known, tmp_path, name: str) -> None:
    data = classes_of(tmp_path / "data", "cat", name)
    with pytest.raises(UsageError, match=f"has a class '{name}' that .* does not know: it has ant, cat, zebra; rename"):
        train(tuned(config, known, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_without_names_is_told_classes_by_their_numbers(config: TrainConfig, known: Path, tmp_path) -> None:
    load_pipeline(known).save_pretrained(tmp_path / "nameless")
    data = classes_of(tmp_path / "data", "0", "2")
    done = train(tuned(config, tmp_path / "nameless", data, tmp_path / "run"))
    assert json.loads((done / "data.json").read_text())["data"]["classes"] == {"0": 2, "1": 0, "2": 2}
    data = classes_of(tmp_path / "more", "0", "3")
    with pytest.raises(UsageError, match=r"class number 3, .* has 0 \.\. 2"):
        train(tuned(config, tmp_path / "nameless", data, tmp_path / "other"))
    data = classes_of(tmp_path / "names", "1", "zebra")
    with pytest.raises(UsageError, match=r"a class 'zebra', and .* has no names of classes .* numbers, 0 \.\. 2"):
        train(tuned(config, tmp_path / "nameless", data, tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_labels_without_names_are_the_models_numbers(known: Path) -> None:
    """As Python can hand them over."""
    pixels, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([2, 0, 2])
    images = ImageDataset("here", pixels, ("a", "b", "c"), (), {}, labels=labels)
    for model in (str(known), "elsewhere"):
        assert renumber(images, load_pipeline(known), model).labels.tolist() == [2, 0, 2]


# -- what is drawn without a class -------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The classes that previews and evaluations ask for."""
    asked: list[list[int]] = []

    def noted(*arguments: Any, **settings: Any) -> torch.Tensor:
        asked.append(list(settings["class_labels"]))
        return sample(*arguments, **settings)

    for module in (evaluation, pipeline):
        monkeypatch.setattr(module, "sample", noted)
    return asked


def test_previews_and_evaluations_draw_what_is_trained(config, known, tmp_path, drawn) -> None:
    data = classes_of(tmp_path / "data", "ant", "zebra")
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 256, (28, 8, 8), dtype=np.uint8))
    many = {"evaluate_every": "8", "evaluate_reference": str(tmp_path / "real.npy"), "evaluate_n": 14}
    done = train(tuned(config, known, data, tmp_path / "run", images="8", **many))
    judged, shown = drawn
    assert Counter(judged) == {0: 7, 2: 7}  # as often as the training images have them: the reference has no classes
    assert shown == [0, 2] * 2
    assert class_labels(SampleConfig(str(done), n=3), 3) == [0, 2, 0]  # as attack draws, too


def test_evaluations_draw_classes_as_often_as_their_reference_has_them(config, known, tmp_path, drawn) -> None:
    data, real = classes_of(tmp_path / "data", "ant", "zebra"), tmp_path / "real"
    for name, count in (("zebra", 12), ("ant", 4)):
        (real / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng([i, count]).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(noise).save(real / name / f"{i}.png")
    many = {"evaluate_every": "8", "evaluate_reference": str(real), "evaluate_n": 16}
    train(tuned(config, known, data, tmp_path / "run", images="8", **many))
    assert Counter(drawn[0]) == {0: 4, 2: 12}


def test_a_class_whose_images_are_all_left_out_is_not_drawn(config: TrainConfig, tmp_path: Path) -> None:
    """By ``clean_subset`` here: its images count as read, and are not trained on."""
    data = classes_of(tmp_path / "data", "ant", "cat", "zebra")
    dirt = {"corrupt": ("gaussian:sigma=0.5,fraction=0.8",), "clean_subset": True, "train_batch_size": 1}
    done = train(dataclasses.replace(config, data=str(data), images="8", output_dir=str(tmp_path / "run"), **dirt))
    account = json.loads((done / "data.json").read_text())
    assert account["data"]["classes"] == {"ant": 2, "cat": 2, "zebra": 2}
    trained = account["trained_classes"]
    assert trained == [2]  # one image is spared
    sample_to_files(SampleConfig(str(done), n=4, steps=2, output=str(tmp_path / "x.npz")))
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["labels"].tolist() == trained * 4


def test_a_class_that_the_audit_leaves_out_is_not_drawn(config: TrainConfig, tmp_path: Path) -> None:
    """Of images of one colour, which hold no picture."""
    rng = np.random.default_rng(0)
    for name in ("ant", "blank", "zebra"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.full((8, 8), 90 + i) if name == "blank" else rng.integers(0, 256, (8, 8))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    done = train(
        dataclasses.replace(
            config, data=str(tmp_path / "data"), images="8", output_dir=str(tmp_path / "run"), auto=True, preset=None
        )
    )
    assert json.loads((done / "data.json").read_text())["trained_classes"] == [0, 2]


@pytest.mark.parametrize(
    ("account", "trained"),
    [
        ({"data": {"classes": {"a": 0, "b": 2, "c": 1}}}, [1, 2]),  # of before there was the list
        ({"data": {"classes": {"a": 0, "b": 2, "c": 1}}, "trained_classes": [1]}, [1]),
        ({"data": {"classes": {"a": 1, "b": 1}}}, [0, 1]),  # embeddings to spare
        ({"data": {"classes": ["a", "b", "c"]}}, [0, 1, 2]),
        ({"data": {"classes": {"a": 0, "b": 0, "c": 0}}}, [0, 1, 2]),
        ({"trained_classes": [7, "x"]}, [0, 1, 2]),
        ({"data": 5}, [0, 1, 2]),
        ([], [0, 1, 2]),
        (None, [0, 1, 2]),
    ],
    ids=str,
)
def test_which_classes_a_run_was_trained_on(tmp_path: Path, account: object, trained: list[int]) -> None:
    if account is not None:
        (tmp_path / "data.json").write_text(json.dumps(account))
    assert trained_classes(str(tmp_path), 3) == trained
