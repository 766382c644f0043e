"""``robustdiff purify`` from end to end: what it writes, whatever the batches; that noise goes; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from command_line import fails, grey, tree
from experiments.paper import linear
from linear_networks import gaussian
from pipelines import SMALL, save_broken, small_pipeline
from robustdiff.attacks import purify_files
from robustdiff.attacks.purification import purify
from robustdiff.commands import main
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.pipeline import load_pipeline
from robustdiff.diffusion.samplers import trailing
from robustdiff.utils.images import to_uint8
from robustdiff.utils.random import place_generators


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "conditional"
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=3, **SMALL)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    (folder / "data.json").write_text(json.dumps({"data": {"classes": {"a": 1, "b": 1, "c": 1}}}))
    return folder


def written(folder: str) -> Tensor:
    """The images of a manifest, in its order."""
    entries = json.loads(Path(folder, "manifest.json").read_text())["images"]
    return torch.stack([torch.from_numpy(np.array(Image.open(Path(folder, e["file"])))) for e in entries])[:, None]


# -- what it writes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_files_are_what_the_library_computes_whatever_the_batch(photos, model, here, capsys, scheduler) -> None:
    before = tree(photos)
    flags = ["--strength", "0.3", "--steps", "4", "--scheduler", scheduler, "--seed", "5"]
    for size in ("1", "3", "64"):
        assert main.main(["purify", str(photos), str(model), "-o", f"by{size}", *flags, "--batch-size", size]) == 0
    assert "by3: 8 images purified" in capsys.readouterr().out
    images = load_images(photos)
    generators = place_generators("purified", 5, range(8))
    with torch.no_grad():
        wanted = purify(
            images.x0(slice(None)), load_pipeline(model), 0.3, steps=4, sampler=scheduler, generator=generators
        )
    for size in ("1", "3", "64"):
        difference = written(f"by{size}").int() - to_uint8(wanted).int()
        assert difference.abs().max() <= 1  # rounding where a value lies between two levels
        assert (difference != 0).double().mean() < 0.01
    assert sorted(tree(Path("by3"))) == sorted([*before, "manifest.json"])
    assert tree(photos) == before
    assert not torch.equal(written("by3"), images.images)


def test_the_manifest_says_what_was_done(photos, model, here) -> None:
    assert main.main(["purify", str(photos), str(model), "-o", "new", "--strength", "0.05", "--seed", "2"]) == 0
    manifest = json.loads(Path("new/manifest.json").read_text())
    assert manifest["format"] == "robustdiff purified 1"
    assert (manifest["model"], manifest["strength"], manifest["scheduler"]) == (str(model), 0.05, "ddim")
    assert manifest["timesteps"] == trailing(5, 5)  # 5 of 100 noise levels: no more calls than levels
    assert (manifest["steps"], manifest["seed"]) == (5, 2)
    assert len(manifest["weights_sha256"]) == 64
    assert manifest["source"]["sha256"] == load_images(photos).sha256
    assert [entry["source"] for entry in manifest["images"]] == list(load_images(photos).names)
    assert manifest["versions"].keys() == {"robustdiff", "torch"}


def test_streamed_images_and_other_seeds(photos, model, here) -> None:
    command = ["purify", str(photos), str(model)]
    assert main.main([*command, "-o", "held"]) == 0
    assert main.main([*command, "-o", "streamed", "--max-memory-gib", "0"]) == 0
    assert tree(Path("held")) == tree(Path("streamed"))
    assert main.main([*command, "-o", "streamed", "--seed", "1", "--overwrite"]) == 0
    assert tree(Path("held")) != tree(Path("streamed"))


def test_an_array_larger_than_the_model_is_brought_to_its_size(model, here) -> None:
    np.save("big.npy", np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    assert main.main(["purify", "big.npy", str(model), "-o", "new", "--resolution", "8"]) == 0
    assert written("new").shape == (3, 1, 8, 8)


def test_the_mean_of_purified_gaussians_is_the_closed_form(here, monkeypatch) -> None:
    """The exact denoiser of N(0, 0.01): every step of DDIM multiplies, so mean and variance are known."""
    pipeline, n = gaussian(0.01), 400
    monkeypatch.setattr(purify_files, "load_pipeline", lambda model: pipeline)
    np.save("flat.npy", np.full((n, 8, 8), 191, dtype=np.uint8))
    assert main.main(["purify", "flat.npy", "exact", "-o", "new"]) == 0
    times = torch.tensor(trailing(100, 10))
    alpha_bar = torch.cat([pipeline.unet.schedule.alphas_cumprod.double()[times], torch.ones(1).double()])
    gain = linear.ddim_gains(alpha_bar, linear.optimum(alpha_bar[:-1], torch.tensor([0.01]))).prod()
    found = written("new").double() / 127.5 - 1
    deviation = float(gain * (1 - alpha_bar[0]).sqrt())
    mean = float(gain * alpha_bar[0].sqrt()) * (191 / 127.5 - 1)
    assert 0.1 < mean < 0.45  # it does something, and leaves something
    assert float(found.mean()) == pytest.approx(mean, abs=5 * deviation / found.numel() ** 0.5)
    level = (1 / 127.5) ** 2 / 12  # rounding adds its own variance
    assert float(found.var()) == pytest.approx(deviation**2 + level, rel=5 * (2 / found.numel()) ** 0.5)


def test_classes_go_by_their_names(conditional, here) -> None:
    for i, name in enumerate("cb"):
        grey(Path("sorted", name, "0.png"), seed=i)
    assert main.main(["purify", "sorted", str(conditional), "-o", "new", "--strength", "0.5"]) == 0
    manifest = json.loads(Path("new/manifest.json").read_text())
    assert [(entry["file"], entry["class"]) for entry in manifest["images"]] == [("b/0.png", 1), ("c/0.png", 2)]
    pipeline, images = load_pipeline(conditional), load_images("sorted").x0(slice(None))
    with torch.no_grad():
        wanted, other = (
            purify(images, pipeline, 0.5, generator=place_generators("purified", 0, range(2)), class_labels=labels)
            for labels in (torch.tensor([1, 2]), torch.tensor([0, 0]))
        )
    assert (written("new").int() - to_uint8(wanted).int()).abs().max() <= 1
    assert (written("new").int() - to_uint8(other).int()).abs().max() > 1


@pytest.mark.slow
def test_a_model_of_clean_digits_takes_noised_ones_nearer_to_what_they_were(here) -> None:
    clean = load_images("digits").images
    np.save("train.npy", clean[500:, 0].numpy())
    dirt = [Corruption.parse("gaussian:sigma=0.4")]
    kept = torch.stack([corrupt(x, dirt, 0, i)[0] for i, x in enumerate(clean[:500].float() / 127.5 - 1)])
    np.save("noised.npy", to_uint8(kept)[:, 0].numpy())
    settings = ["--preset", "plain", "--network", "tiny", "--prediction-type", "v_prediction", "--images", "10k"]
    settings += ["--learning-rate", "2e-3", "--preview-images", "0", "--ddpm-beta-schedule", "squaredcos_cap_v2"]
    assert main.main(["train", "train.npy", "--output-dir", "run", *settings]) == 0
    assert main.main(["purify", "noised.npy", "run", "-o", "new", "--strength", "0.1", "--batch-size", "250"]) == 0

    def error(images: Tensor) -> float:
        return float((images.double() - clean[:500].double()).square().mean().sqrt() / 127.5)

    assert error(written("new")) < 0.92 * error(to_uint8(kept))


# -- what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("{photos}", "{model}"), ("--output is missing", "such as purified")),
        (("{photos}", "{model}", "-o", ""), ("--output is empty",)),
        (("{photos}",), ("purify needs DATA MODEL",)),
        (("", "{model}", "-o", "new"), ("must not be empty",)),
        (("{photos}", "{model}", "-o", "new", "--strength", "0"), ("--strength 0.0", "above 0")),
        (("{photos}", "{model}", "-o", "new", "--strength", "1.1"), ("--strength 1.1", "at most 1")),
        (("{photos}", "{model}", "-o", "new", "--strength", "nan"), ("--strength nan",)),
        (("{photos}", "{model}", "-o", "new", "--steps", "0"), ("--steps 0 must be at least 1",)),
        (("{photos}", "{model}", "-o", "new", "--batch-size", "0"), ("--batch-size 0",)),
        (("{photos}", "{model}", "-o", "new", "--seed", "-1"), ("--seed must be in",)),
        (("{photos}", "{model}", "-o", "new", "--scheduler", "euler"), ("--scheduler", "ddim, ddpm")),
        (("{photos}", "{model}", "-o", "new", "--strenth", "1"), ("did you mean --strength?",)),
        (("{photos}", "{model}", "-o", "new", "--max-bad-fraction", "2"), ("--max-bad-fraction must be",)),
        (("{photos}", "nowhere", "-o", "new"), ("nowhere does not exist", "give a run folder")),
        (("{photos}", "{photos}", "-o", "new"), ("holds no pipeline",)),
        (("nowhere", "{model}", "-o", "new"), ("no such file or folder",)),
        (("{photos}", "{model}", "-o", "{mine}"), ("not empty", "--overwrite")),
        (("{photos}", "{model}", "-o", "{mine}", "--overwrite"), ("not a folder of purified images",)),
        (("{photos}", "{model}", "-o", "{photos}/new"), ("lies inside",)),
        (("{big}", "{model}", "-o", "new"), ("16 x 12", "takes 8 x 8", "use --resolution 8")),
        (("{photos}", "{model}", "-o", "new", "--resolution", "16"), ("--resolution 16", "use --resolution 8")),
        (("{photos}", "{model}", "-o", "new", "--label-column", "x"), ("--label-column",)),
        (("{photos}", "{conditional}", "-o", "new"), ("has no labels", "one folder per class")),
        (("{strange}", "{conditional}", "-o", "new"), ("class 'zebra'", "does not know", "a, b, c")),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(
    photos: Path,
    model: Path,
    conditional: Path,
    here: Path,
    tmp_path: Path,
    capsys,
    flags: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "keep.txt").write_text("dear diary")
    grey(tmp_path / "big" / "0.png", size=(12, 16))
    grey(tmp_path / "strange" / "zebra" / "0.png")
    places = {name: tmp_path / name for name in ("mine", "big", "strange")}
    places |= {"photos": photos, "model": model, "conditional": conditional}
    before = tree(tmp_path)
    error = fails(capsys, "purify", *(flag.format(**places) for flag in flags))
    for word in words:
        assert word in error
    assert tree(tmp_path) == before


def test_labels_beyond_the_models_are_refused(here, capsys, conditional) -> None:
    np.savez("set.npz", images=np.arange(128, dtype=np.uint8).reshape(2, 8, 8), labels=np.array([0, 3]))
    load_pipeline(conditional).save_pretrained("unnamed")
    error = fails(capsys, "purify", "set.npz", "unnamed", "-o", "new")
    assert "class number 3" in error
    assert "0 .. 2" in error


def test_one_process_only(photos, model, here, capsys, monkeypatch) -> None:
    monkeypatch.setattr(purify_files, "processes", lambda: 2)
    assert "without a launcher" in fails(capsys, "purify", str(photos), str(model), "-o", "new")


def test_a_model_without_finite_weights_is_one_line_and_nothing_is_left(photos, model, here, capsys) -> None:
    save_broken(model)
    capsys.readouterr()
    assert "not finite" in fails(capsys, "purify", str(photos), "broken", "-o", "new")
    assert [path.name for path in here.iterdir()] == ["broken"]


def test_stopped_in_the_middle_it_leaves_nothing(photos, model, here, capsys, monkeypatch) -> None:
    calls = []

    def stop(*arguments: object, **settings: object) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return purify(*arguments, **settings)

    monkeypatch.setattr(purify_files, "purify", stop)
    assert main.main(["purify", str(photos), str(model), "-o", "new", "--batch-size", "3"]) == 130
    assert capsys.readouterr().err == "robustdiff: stopped at once\n"
    assert not list(here.iterdir())
