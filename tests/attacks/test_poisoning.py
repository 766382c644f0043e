"""Adversarial dirt: against an exact denoiser it does what it must; the bound holds in files; the manifest is true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from command_line import fails, grey, tree
from helpers import experiment, normal, seeded
from linear_networks import GaussianNetwork, gaussian
from pipelines import save_broken, small_pipeline
from robustdiff.attacks.config import CorruptConfig
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import evaluate, value_and_gradient
from robustdiff.attacks.optimizers import PGD
from robustdiff.attacks.poisoning import DenoisingLossGoal, Poison
from robustdiff.commands import main
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.pipeline import load_pipeline
from robustdiff.utils.images import from_uint8, to_uint8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    small_pipeline().save_pretrained(folder)
    return folder


def levels_of(folder: str) -> Tensor:
    """The 8-bit images of a dirty copy, in the order of its manifest, as whole numbers."""
    entries = json.loads(Path(folder, "manifest.json").read_text())["images"]
    return torch.stack([torch.from_numpy(np.array(Image.open(Path(folder, e["file"])))).int() for e in entries])


def poison(photos: Path, model: Path, output: str, *flags: str) -> dict:
    command = ["corrupt", str(photos), output, "--poison", str(model), "--poison-steps", "4"]
    assert main.main([*command, *flags]) == 0
    return json.loads(Path(output, "manifest.json").read_text())


# -- the attack --------------------------------------------------------------------------------------


def truth(pipeline, x0: Tensor) -> Tensor:
    """Expected loss of the exact epsilon-network of N(0, v) at images: ``mean (1 - g s)^2 + (g a x0)^2`` over t."""
    schedule = pipeline.unet.schedule
    t = torch.arange(schedule.num_timesteps)
    a, s = schedule.alpha(t).double(), schedule.sigma(t).double()
    gain = s / (a**2 * pipeline.unet.scale.detach() + s**2)
    return ((1 - gain * s) ** 2).mean() + (gain * a).square().mean() * x0.square().flatten(1).mean(1)


class PerImage(GaussianNetwork):
    """The exact network, with a timestep for every image."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return super().forward(x_t, t.reshape(-1, 1, 1, 1))


def exact() -> tuple[Poison, Tensor]:
    pipeline = gaussian()
    pipeline.unet = PerImage(pipeline.unet.schedule, 0.05)
    return Poison(pipeline, "exact", radius=16 / 127.5, steps=20), to_uint8(0.3 * normal(16, 1, 8, 8, seed=1))


def test_the_objective_is_the_expected_loss_in_closed_form() -> None:
    attack, images = exact()
    found = attack.judge(images.repeat(40, 1, 1, 1), range(640), 0).reshape(40, 16).mean(0)
    wanted = truth(attack.pipeline, from_uint8(images).double())
    assert found == pytest.approx(wanted, rel=0.1)
    assert float(found.mean()) == pytest.approx(float(wanted.mean()), rel=0.02)


def test_an_exact_denoiser_is_worst_away_from_the_mean_and_there_it_is_pushed() -> None:
    """The loss grows with the square of every pixel: the best push is ``radius * sign(x0)``, known beforehand."""
    attack, images = exact()
    pushed, before, after = attack(images, range(16), 0)
    x0, found = from_uint8(images).double(), from_uint8(pushed).double()
    coin = torch.where(torch.rand(images.shape, generator=seeded(5)) < 0.5, -1, 1)
    random = from_uint8((images.int() + 16 * coin).clamp(0, 255).to(torch.uint8)).double()
    best = (x0 + attack.radius * x0.sign()).clamp(-1, 1)
    clean, noisy, reached, ideal = (truth(attack.pipeline, x) for x in (x0, random, found, best))
    assert (reached > clean).all()
    assert (reached > noisy).all()
    share = (reached - clean) / (ideal - clean)
    assert share.min() > 0.85
    assert share.mean() > 0.9
    assert (after > before).all()
    large = x0.abs() > 0.2
    assert ((found - x0).sign() == x0.sign())[large].double().mean() > 0.95


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_network_s_loss_rises_more_than_by_chance(prediction: str) -> None:
    images = to_uint8(0.5 * normal(8, 1, 8, 8, seed=2).clamp(-1.5, 1.5))
    attack = Poison(small_pipeline(prediction), "small", 0.2, steps=10)
    _, before, after = attack(images, range(8), 0)
    coin = torch.where(torch.rand(images.shape, generator=seeded(5)) < 0.5, -1, 1)
    random = (images.int() + attack.levels * coin).clamp(0, 255).to(torch.uint8)
    assert after.mean() > before.mean()
    assert after.mean() > attack.judge(random, range(8), 0).mean()
    assert all(p.requires_grad and p.grad is None for p in attack.pipeline.unet.parameters())


def test_gradients_agree_with_finite_differences() -> None:
    attack, images = exact()
    x0, way, h = from_uint8(images).double(), normal(16, 1, 1, 8, 8, seed=3), 1e-5

    def loss() -> DenoisingLossGoal:
        return attack.loss(x0, range(16), 0, "test", 3)

    omega = 0.01 * normal(16, 1, 1, 8, 8, seed=4)
    value, gradient = value_and_gradient(loss(), omega)
    assert torch.allclose(value, evaluate(loss(), omega))
    slope = (evaluate(loss(), omega + h * way) - evaluate(loss(), omega - h * way)) / (2 * h)
    assert slope == pytest.approx((gradient * way).flatten(1).sum(1), rel=1e-4, abs=1e-9)


def test_every_part_of_the_noise_levels_is_drawn_from() -> None:
    seen = []

    def spy(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x_t

    attack, images = exact()
    loss = attack.loss(from_uint8(images).double(), range(16), 0, "test", 4)
    evaluate(DenoisingLossGoal(spy, loss.schedule, loss.images, loss.generators, 4), loss.like)
    assert [int(t.min()) // 250 for t in seen] == [int(t.max()) // 250 for t in seen] == [0, 1, 2, 3]
    assert all(len(set(t.tolist())) > 8 for t in seen)


def test_keeping_the_last_iterate_is_of_one_restart() -> None:
    attack, images = exact()
    loss = attack.loss(from_uint8(images).double(), range(16), 0, "test", 1)
    found = PGD(3, keep="last")(loss, LpBall("linf", 0.1), loss.like, seeded(1))
    assert torch.equal(found.trace[-1], found.value)  # the last value, not the luckiest so far
    assert (found.trace[:-1].amax(0) > found.value).any()
    with pytest.raises(ValueError, match="the last of one restart"):
        PGD(3, restarts=2, keep="last")
    with pytest.raises(ValueError, match="keeps best"):
        PGD(3, keep="worst")  # type: ignore[arg-type]


# -- the files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "levels"), [("16/255", 8), ("0.1", 12), ("1/127.5", 1)])
def test_the_bound_holds_in_the_files(photos, model, here, radius: str, levels: int) -> None:
    told = poison(photos, model, "new", "--poison-radius", radius)["poison"]
    clean = load_images(photos).images[:, 0].int()
    moved = (levels_of("new") - clean).abs()
    assert moved.max() == levels == told["levels"]
    assert told["radius"] == pytest.approx(CorruptConfig("x", "y", poison="m", poison_radius=radius).radius())
    assert (moved.amax((1, 2)) > 0).all()


def test_the_manifest_is_true(photos, model, here, capsys) -> None:
    manifest = poison(photos, model, "new", "--poison-fraction", "0.5", "--poison-draws", "3", "--seed", "3")
    attack = Poison(load_pipeline(model), str(model), 16 / 255, 0.5, 4, 3)
    assert manifest["poison"] == attack.describe()
    assert manifest["poison"]["objective"] == "denoising loss"
    images = load_images(photos).images
    pushed, before, after = attack(images, range(8), 3)
    found = levels_of("new")
    for index, entry in enumerate(manifest["images"]):
        hit = attack.hits(3, index, 0)
        assert bool(entry["poison"]) == hit
        assert entry["corruptions"] == []
        assert (found[index] - (pushed if hit else images)[index, 0].int()).abs().max() <= 1
        if hit:
            losses = {"loss_before": float(before[index]), "loss_after": float(after[index])}
            assert entry["poison"] == pytest.approx(losses, rel=1e-3)
    hits = sum(bool(entry["poison"]) for entry in manifest["images"])
    assert 0 < hits < 8
    assert f"{hits} of them dirty" in capsys.readouterr().out


def test_batches_change_nothing_and_seeds_do(photos, model, here) -> None:
    for size in ("1", "3"):
        poison(photos, model, f"by{size}", "--batch-size", size, "--poison-fraction", "0.6")
    poison(photos, model, "by64", "--poison-fraction", "0.6")
    poison(photos, model, "other", "--poison-fraction", "0.6", "--seed", "1")
    for folder in ("by1", "by3"):
        assert ((levels_of(folder) - levels_of("by64")) != 0).double().mean() < 0.02
    assert ((levels_of("other") - levels_of("by64")) != 0).double().mean() > 0.1


def test_no_image_and_every_image(photos, model, here) -> None:
    nothing = poison(photos, model, "none", "--poison-fraction", "0")
    assert torch.equal(levels_of("none"), load_images(photos).images[:, 0].int())
    assert not any(entry["poison"] for entry in nothing["images"])
    everything = poison(photos, model, "all", "--poison-fraction", "1")
    assert all(entry["poison"] for entry in everything["images"])
    some = poison(photos, model, "some", "--poison-fraction", "0.5")
    for index, entry in enumerate(some["images"]):  # the same push for those that are hit in both
        if entry["poison"]:
            assert ((levels_of("some")[index] - levels_of("all")[index]) != 0).double().mean() < 0.02


def test_poison_comes_last_upon_other_dirt(photos, model, here) -> None:
    flags = ("--corrupt", "gaussian:sigma=0.3,fraction=0.5", "--poison-radius", "0.1")
    manifest = poison(photos, model, "both", *flags)
    dirt, clean = [Corruption.parse(flags[1])], load_images(photos)
    dirty = torch.stack([to_uint8(corrupt(clean.x0(i), dirt, 0, i)[0])[0].int() for i in range(8)])
    assert manifest["corruptions"] == [str(dirt[0])]
    assert {len(entry["corruptions"]) for entry in manifest["images"]} == {0, 1}
    assert (levels_of("both") - dirty).abs().max() == 12
    poisoned = Poison(load_pipeline(model), "", 0.1, 0.5)
    places = [[poisoned.hits(0, i, position) for i in range(200)] for position in (0, 1)]
    assert places[0] != places[1]  # hit independently of how many kinds come before


def test_without_poison_the_manifest_is_as_it_was(photos, here) -> None:
    assert main.main(["corrupt", str(photos), "new", "--corrupt", "blur"]) == 0
    manifest = json.loads(Path("new/manifest.json").read_text())
    assert manifest.keys() == {"format", "seed", "corruptions", "range", "written", "clean", "images"}
    assert manifest["images"][0].keys() == {"index", "source", "file", "corruptions"}


def test_noise_levels_of_poisoned_images_are_refused(photos, model, here, capsys) -> None:
    poison(photos, model, "new", "--corrupt", "gaussian:sigma=0.2")
    capsys.readouterr()
    error = fails(capsys, "train", "new", "--noise-levels", "new/manifest.json", "--dry-run")
    assert "an image hit by poison has no noise level" in error


def test_the_notes_show_the_committed_result() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "experiments" / "results" / "poisoning.json").read_text())
    notes = (root / "docs" / "lab-notes.md").read_text()
    cell = experiment("poisoning").cell
    assert len(found["rows"]) == 15
    for row in found["rows"]:
        assert f"| {row['row']} | {cell(row['frechet'])} | {cell(row['noise'])} | {cell(row['spread'])} |" in notes
    for losses in found["denoising_loss"].values():
        assert all(f"{loss:.3f}".removeprefix("0") in notes for loss in losses.values())


# -- what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--poison", ""), ("--poison is empty",)),
        (("--poison", "nowhere"), ("nowhere does not exist",)),
        (("--poison", "{photos}"), ("holds no pipeline",)),
        (("--corrupt", "blur", "--poison-radius", "0.1"), ("--poison-radius needs --poison",)),
        (("--corrupt", "blur", "--batch-size", "2"), ("--batch-size needs --poison",)),
        (("--poison", "{model}", "--poison-radius", "0"), ("--poison-radius 0", "16/255")),
        (("--poison", "{model}", "--poison-radius", "0.001"), ("one 8-bit step",)),
        (("--poison", "{model}", "--poison-radius", "3"), ("--poison-radius 3",)),
        (("--poison", "{model}", "--poison-radius", "1/0"), ("--poison-radius 1/0",)),
        (("--poison", "{model}", "--poison-radius", "nan"), ("--poison-radius nan",)),
        (("--poison", "{model}", "--poison-radius", "far"), ("--poison-radius far",)),
        (("--poison", "{model}", "--poison-fraction", "1.5"), ("--poison-fraction 1.5",)),
        (("--poison", "{model}", "--poison-fraction", "nan"), ("--poison-fraction nan",)),
        (("--poison", "{model}", "--poison-steps", "0"), ("--poison-steps 0",)),
        (("--poison", "{model}", "--poison-draws", "0"), ("--poison-draws 0",)),
        (("--poison", "{model}", "--batch-size", "0"), ("--batch-size 0",)),
        (("--poison", "{model}", "--resolution", "16"), ("--resolution 16", "use --resolution 8")),
        (("--poison", "{model}", "--posion-steps", "2"), ("did you mean --poison-steps?",)),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(photos, model, here, capsys, flags, words) -> None:
    before = tree(photos)
    error = fails(capsys, "corrupt", str(photos), "new", *(flag.format(photos=photos, model=model) for flag in flags))
    for word in words:
        assert word in error
    assert tree(photos) == before
    assert not list(here.iterdir())


def test_images_of_another_size_are_refused(model, here, tmp_path, capsys) -> None:
    grey(tmp_path / "big" / "0.png", size=(12, 16))
    error = fails(capsys, "corrupt", str(tmp_path / "big"), "new", "--poison", str(model))
    assert "takes 8 x 8: use --resolution 8" in error


def test_a_model_that_is_not_finite_is_one_line_and_nothing_is_left(photos, model, here, capsys) -> None:
    save_broken(model)
    capsys.readouterr()
    assert "not finite" in fails(capsys, "corrupt", str(photos), "new", "--poison", "broken")
    assert [path.name for path in here.iterdir()] == ["broken"]
