"""``robustdiff evaluate`` from end to end: known answers, what a result carries, what it refuses, the card."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

from experiments.paper.linear import coverage_of_one_law
from helpers import TINY_UNET
from robustdiff.commands import main as cli
from robustdiff.evaluation.contact_sheets import GAP
from robustdiff.evaluation.extractors import open_extractor
from robustdiff.evaluation.features import extract
from robustdiff.evaluation.metrics import LEAST, compute_metrics
from robustdiff.evaluation.model_card import BEGIN, END, UNMEASURED, fill_card
from robustdiff.utils import progress
from robustdiff.utils.errors import UsageError

N = 60


def pictures(n: int, seed: int, *, size: int = 8) -> np.ndarray:
    """A law with structure: a bright blob at a random place on a ramp, n images, uint8 (n, size, size)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    place = random.uniform(1, size - 2, (n, 2, 1, 1))
    blob = np.exp(
        -((x - place[:, :1, 0:1, 0, None].reshape(n, 1, 1)) ** 2 + (y - place[:, 1].reshape(n, 1, 1)) ** 2) / 3
    )
    return (40 + 190 * blob + random.normal(0, 6, (n, size, size))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """Training, held-out and reference images of one law; a replay of the training images; fresh draws; noise."""
    found = {
        "training": pictures(N, 1),
        "reference": pictures(2 * N, 2),
        "fresh": pictures(N, 3),
        "held_out": pictures(N, 4),
        "replay": pictures(N, 1)[::-1].copy(),
        "noise": np.random.default_rng(5).integers(0, 256, (N, 8, 8), dtype=np.uint8),
        "one": np.repeat(pictures(1, 6), N, 0),
    }
    for name, images in found.items():
        np.save(tmp_path / f"{name}.npy", images)
    return {name: str(tmp_path / f"{name}.npy") for name in found}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two steps' training, as ``train`` leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "data.npy", pictures(N, 1))
    (folder / "unet.json").write_text(json.dumps(TINY_UNET))
    arguments = ["--images", "16", "--batch-size", "8", "--ddpm-num-steps", "100", "--ddpm-num-inference-steps", "10"]
    arguments += ["--model-config-name-or-path", str(folder / "unet.json"), "--output-dir", str(folder / "run")]
    assert cli.main(["train", str(folder / "data.npy"), *arguments]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Its copy, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluate(*arguments: str, cache: str = "none") -> int:
    return cli.main(["evaluate", *arguments, "--cache", cache])


def results(folder: Path, kind: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-*.json"))]


def values_of(generated: str, sets: dict[str, str], tmp_path: Path, kind: str = "quality", *more: str) -> dict:
    folder = tmp_path / f"out-{Path(generated).stem}"
    assert evaluate(generated, "--reference", sets["reference"], "-o", str(folder), *more) == 0
    (result,) = results(folder, kind)
    return {name: value["value"] for name, value in result["values"].items()}


def test_metrics_order_known_damage(sets, tmp_path) -> None:
    fresh, noise, one = (values_of(sets[name], sets, tmp_path) for name in ("fresh", "noise", "one"))
    assert fresh["FD-pixels"] < one["FD-pixels"] < noise["FD-pixels"]
    assert fresh["KID-pixels"] < one["KID-pixels"]
    assert fresh["coverage"] > 0.5 > 0.1 > one["coverage"]
    assert fresh["precision"] > 0.8
    assert noise["precision"] == 0
    assert fresh["recall"] > 0.8
    assert one["recall"] == 0
    assert one["diversity"] == pytest.approx(0, abs=1e-6)


def test_a_replay_is_caught_and_fresh_draws_are_not(sets, tmp_path) -> None:
    more = ("memorisation", "--training", sets["training"])
    replay = values_of(sets["replay"], sets, tmp_path, *more)
    assert replay["near-copies"] == 1
    assert replay["near-copies above null"] > 0.95
    fresh = values_of(sets["fresh"], sets, tmp_path, *more)
    assert fresh["near-copies"] <= 0.05
    assert fresh["close copies above null"] < 0.05
    (result,) = results(tmp_path / "out-replay", "memorisation")
    assert result["details"]["pairs"][0][:2] == [0, N - 1]  # replayed in reverse order
    sheet = Image.open(tmp_path / "out-replay" / result["sheets"]["pairs"])
    assert sheet.size == (4 * (2 * 64 + 1) + 3 * GAP, 5 * 64 + 4)  # twenty pairs, four in a row, shown at 64 x 64
    pixels = np.array(sheet)
    assert np.array_equal(pixels[:64, :64], pixels[:64, 65:129])  # the copy beside its original


def test_the_floor_is_real_against_real_of_the_same_size(sets) -> None:
    extractor = open_extractor("pixels")

    def features(name: str):
        return extract(extractor, torch.from_numpy(np.load(sets[name]))[:, None], cache=None)

    fresh, reference, held_out = features("fresh"), features("reference"), features("held_out")
    quality = compute_metrics(fresh, reference, held_out)
    assert quality.floor == f"{N} held-out real images against the {2 * N} of the reference"
    swapped = compute_metrics(held_out, reference, fresh)
    for value, other in zip(quality.values, swapped.values, strict=True):
        assert value.floor == pytest.approx(other.value, rel=1e-12)
        assert other.floor == pytest.approx(value.value, rel=1e-12)
    halves = compute_metrics(fresh, reference)
    assert halves.floor.startswith(f"{N} images of the reference against the other {N}; the values are of {N} against")
    assert any("too high" in text for text in halves.warnings)
    floors = {value.name: value.floor for value in halves.values}
    assert floors["coverage"] == pytest.approx(coverage_of_one_law(N), abs=0.12)
    by_name = {value.name: value for value in quality.values}
    assert by_name["FD-pixels"].about["predicted_floor"] == pytest.approx(by_name["FD-pixels"].floor, rel=0.5)
    for value in quality.values:
        if value.interval is not None:
            assert value.interval[0] <= value.value <= value.interval[1]


def test_a_part_of_a_set_is_drawn_at_random(tmp_path, capsys) -> None:
    """Of a folder with a class a subfolder, -n 30 of 60: both classes, each seed another part, said."""
    half = [pictures(N // 2, seed) // 4 + dark for seed, dark in ((1, 0), (2, 190))]
    for name, images in zip(("a", "b"), half, strict=True):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "mine" / name / f"{i:03d}.png")
    np.save(tmp_path / "real.npy", np.concatenate([pictures(N, 3) // 4, pictures(N, 4) // 4 + 190]))

    def distance(*more: str) -> tuple[float, str]:
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        arguments = ("--reference", str(tmp_path / "real.npy"), "--training", "none", "-o", str(folder), *more)
        assert evaluate(str(tmp_path / "mine"), *arguments) == 0
        (found,) = results(folder, "quality")
        return found["values"]["FD-pixels"]["value"], found["protocol"]["generated"]["sha256"]

    whole, part, other = distance(), distance("-n", "30"), distance("-n", "30", "--seed", "1")
    assert "note: 30 of the 60 images of mine are judged, drawn at random" in capsys.readouterr().out
    assert part[0] < whole[0] + 5  # one class alone is 40 away
    assert part[1] != other[1]
    assert distance("-n", "30") == part


def test_classes_are_drawn_as_often_as_the_reference_has_them(tmp_path, monkeypatch, capsys) -> None:
    """By name: a model of ant, bee and cat against 24 bees and 6 ants; by flag as in training, or equally often."""

    def folder(name: str, **classes: int) -> str:
        for place, (kind, count) in enumerate(classes.items()):
            (tmp_path / name / kind).mkdir(parents=True)
            for i, image in enumerate(pictures(count, place)):
                Image.fromarray(image).save(tmp_path / name / kind / f"{i:03d}.png")
        return str(tmp_path / name)

    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET))
    run = str(tmp_path / "run")
    arguments = ["--images", "16", "--batch-size", "8", "--ddpm-num-steps", "100", "--ddpm-num-inference-steps", "10"]
    arguments += [
        "--model-config-name-or-path",
        str(tmp_path / "unet.json"),
        "--class-conditional",
        "--output-dir",
        run,
    ]
    assert cli.main(["train", folder("data", ant=10, bee=10, cat=20), *arguments]) == 0
    reference, seen = folder("real", bee=24, ant=6, dog=2), []
    inputs = importlib.import_module("robustdiff.evaluation.inputs")
    draw = inputs.draw
    monkeypatch.setattr(
        inputs, "draw", lambda config, pipeline, labels: seen.append(labels) or draw(config, pipeline, labels)
    )

    def drawn(*more: str) -> dict[int, int]:
        out = str(tmp_path / f"out{len(seen)}")
        more = ("--reference", reference, "--training", "none", "-n", "20", "--steps", "2", "-o", out, *more)
        assert evaluate(run, *more) == 0
        return Counter(seen[-1])

    capsys.readouterr()
    assert drawn() == {0: 4, 1: 16}
    said = "note: classes are drawn as often as the reference has them (but for 2 images of classes that it was not"
    assert said in capsys.readouterr().out
    assert drawn("--class-proportions", "training") == {0: 5, 1: 5, 2: 10}
    assert drawn("--class-proportions", "equal") == {0: 7, 1: 7, 2: 6}
    reference = folder("plain", x=30)
    assert drawn() == {0: 5, 1: 5, 2: 10}  # it knows none of the classes: as in training
    assert "note: classes are drawn as often as the training images had them" in capsys.readouterr().out


def test_a_reference_all_alike_leaves_the_other_metrics(sets, tmp_path, capsys) -> None:
    values = values_of(sets["fresh"], {**sets, "reference": sets["one"]}, tmp_path)
    assert values["diversity"] is None
    assert values["FD-pixels"] > 1
    assert capsys.readouterr().out.count("diversity is not defined for these images") == 1


def test_the_same_images_on_both_sides_are_told(sets, tmp_path, capsys) -> None:
    values_of(sets["replay"], {**sets, "reference": sets["training"]}, tmp_path)
    assert f"{N} of the {N} images judged are images of the reference" in capsys.readouterr().out
    values_of(sets["fresh"], sets, tmp_path / "other")
    assert "are images of the reference" not in capsys.readouterr().out


def test_jpeg_against_png_is_told(sets, tmp_path, capsys) -> None:
    for kind in ("jpg", "png"):
        (tmp_path / kind).mkdir()
        for i, image in enumerate(pictures(N, 3)):
            Image.fromarray(image).save(tmp_path / kind / f"{i:03d}.{kind}")
    said = "100% of the images judged are JPEG files, and 0% of the reference"
    for reference, expected in (("png", 1), ("jpg", 0)):
        values_of(str(tmp_path / "jpg"), {**sets, "reference": str(tmp_path / reference)}, tmp_path / reference / "out")
        assert capsys.readouterr().out.count(said) == expected


def test_mirrored_copies_are_found(sets, tmp_path) -> None:
    mirrored = tmp_path / "mirrored.npy"
    np.save(mirrored, np.load(sets["training"])[:, :, ::-1])
    more = ("--training", sets["training"])
    values = values_of(str(mirrored), sets, tmp_path, "memorisation", *more)
    assert values["near-copies"] == 1
    assert values["near-copies above null"] > 0.9


def test_what_a_result_of_a_run_carries(run, sets, tmp_path, capsys) -> None:
    few = ("--few-step", "10,5", "--few-step-schedulers", "ddim,dpm")
    arguments = (str(run), "--reference", sets["reference"], "-n", "20", "--steps", "10", "--told", "nothing", *few)
    capsys.readouterr()
    assert evaluate(*arguments) == 0
    printed = capsys.readouterr().out
    (quality,) = results(run / "evaluation", "quality")
    protocol = quality["protocol"]
    assert quality["format"] == "robustdiff evaluation 1"
    assert quality["told"] == "nothing"
    assert protocol["extractor"]["name"] == "pixels"
    assert (protocol["n_generated"], protocol["n_real"], protocol["image"]) == (20, 2 * N, [1, 8, 8])
    assert protocol["sampler"]["timesteps"] == list(range(99, 0, -10))
    assert protocol["sampler"]["ema"] is True
    assert protocol["reference"]["source"] == "reference.npy"  # the name, no path of this machine
    assert len(protocol["generated"]["weights"]) == 64
    assert str(tmp_path) not in json.dumps(quality)
    for name, value in quality["values"].items():
        assert f"{value['value']:.5g}" in printed
        assert value["floor"] is not None, name
    nearest = Image.open(run / "evaluation" / quality["sheets"]["nearest"])
    assert nearest.size == (64 + GAP + 4 * 64 + 3, 10 * 64 + 9)
    training = np.array(Image.open(run / "evaluation" / "training.png"))
    assert training.shape == (7 * 64 + 6, 7 * 64 + 6)
    assert np.array_equal(training[:64:8, :64:8], pictures(N, 1)[0])
    assert np.array_equal(training[-64::8, -64::8], pictures(N, 1)[48 * N // 49])  # evenly spread, to the end
    (copying,) = results(run / "evaluation", "memorisation")  # the training images are those of the run
    assert copying["protocol"]["training"]["count"] == N
    (curves,) = results(run / "evaluation", "few-step")
    assert [(c["scheduler"], c["steps"]) for c in curves["details"]["curves"]] == [("ddim", [5, 10]), ("dpm", [5, 10])]
    ddim = curves["details"]["curves"][0]
    assert ddim["values"]["FD-pixels"][1] == pytest.approx(quality["values"]["FD-pixels"]["value"], rel=1e-9)
    assert ddim["timesteps"] == [[99, 79, 59, 39, 19], list(range(99, 0, -10))]
    card = (run / "README.md").read_text()
    assert UNMEASURED not in card
    assert f"{quality['values']['FD-pixels']['value']:.4g}" in card

    drawn = {path: path.stat().st_mtime_ns for path in (run / "evaluation" / "drawn").iterdir()}
    assert len(drawn) == 4
    assert evaluate(*arguments) == 0  # nothing is drawn again, the same protocol has the same name
    assert {path: path.stat().st_mtime_ns for path in (run / "evaluation" / "drawn").iterdir()} == drawn
    assert len(results(run / "evaluation", "quality")) == 1
    assert (run / "README.md").read_text() == card
    next(iter(drawn)).write_bytes(b"half")
    assert evaluate(*arguments) == 0
    assert "is damaged" in capsys.readouterr().err
    assert cli.main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    assert "FD-pixels" in (tmp_path / "report.html").read_text()


def test_the_model_itself_is_asked_whether_it_copies(run, sets, tmp_path, capsys) -> None:
    """With held-out images, which a network of two steps knows as little as those it was trained on."""
    asked = (str(run), "--reference", sets["reference"], "-n", "20", "--steps", "2")
    assert evaluate(*asked, "--held-out", sets["held_out"]) == 0
    (found,) = results(run / "evaluation", "memorisation")
    values = {name: found["values"][name] for name in ("denoising gap", "told by loss", "told by one query")}
    assert [value["floor"] for value in values.values()] == [0, 0.5, 0.5]
    for value in values.values():
        assert value["interval"][0] < value["floor"] < value["interval"][1]
        assert (value["about"]["n_training"], value["about"]["n_held_out"]) == (N, N)
    levels = found["details"]["denoising_gap"]
    assert [round(level["noise_to_signal"], 1) for level in levels][:4] == [0.1, 0.2, 0.5, 1.0]
    assert all(level["training"] > 0 and 0 <= level["told"]["area"] <= 1 for level in levels)
    assert "told by one query" in capsys.readouterr().out
    assert cli.main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    assert "denoising gap" in (tmp_path / "report.html").read_text()

    assert evaluate(*asked, "--held-out", sets["replay"], "-o", str(tmp_path / "out")) == 0
    (found,) = results(tmp_path / "out", "memorisation")
    assert "denoising gap" not in found["values"]
    said = f"the model itself was not asked whether it copies: {N} images of --held-out are among the training images"
    assert said in capsys.readouterr().out


def test_sizes_and_channels_are_brought_together(run, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(pictures(40, 7, size=16)):
        Image.fromarray(image).convert("RGB").save(folder / f"{i}.png")
    arguments = (str(run), "--reference", str(folder), "-n", "20", "--steps", "10", "--training", "none")
    assert evaluate(*arguments) == 0
    (quality,) = results(run / "evaluation", "quality")
    conversions = quality["protocol"]["reference"]["conversions"]
    assert conversions == {"reduced": 40, "colour reduced to grey": 40}
    assert any("`reference`: 40 x reduced, 40 x colour" in text for text in quality["warnings"])
    assert not results(run / "evaluation", "memorisation")


def test_a_folder_of_samples_is_judged_without_its_overview(run, sets, tmp_path) -> None:
    assert cli.main(["sample", str(run), "-n", "20", "--steps", "10", "-o", str(tmp_path / "drawn")]) == 0
    assert evaluate(str(tmp_path / "drawn"), "--reference", sets["reference"], "-o", str(tmp_path / "out")) == 0
    (of_folder,) = results(tmp_path / "out", "quality")
    assert of_folder["protocol"]["n_generated"] == 20
    assert of_folder["protocol"]["sampler"] is None
    assert of_folder["protocol"]["generated"]["source"] == "drawn"
    assert str(tmp_path) not in json.dumps(of_folder)
    assert evaluate(str(run), "--reference", sets["reference"], "-n", "20", "--steps", "10") == 0
    (of_run,) = results(run / "evaluation", "quality")
    for name, value in of_run["values"].items():
        assert of_folder["values"][name]["value"] == pytest.approx(value["value"], rel=1e-9)


def test_files_that_are_left_out_are_told(sets, tmp_path, capsys) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(pictures(20, 7)):
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "half.png").write_bytes((folder / "3.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("not an image")
    capsys.readouterr()
    assert evaluate(str(folder), "--reference", str(folder), "-o", str(tmp_path / "out")) == 0
    (result,) = results(tmp_path / "out", "quality")
    assert result["protocol"]["generated"]["skipped"] == 1
    assert result["protocol"]["generated"]["conversions"] == {"side-car files ignored (not images)": 1}
    printed = capsys.readouterr().out
    for flag in ("RUN", "--reference"):
        assert f"note: {flag}: 1 of its files left out, the first is half.png (" in printed
    assert "subsets of 10" in printed  # of KID: half of twenty images


def test_features_are_kept_by_content(sets, tmp_path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.float()
            return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    arguments = (sets["fresh"], "--reference", sets["reference"], "--extractor", str(tmp_path / "mean.pt"))
    for _ in range(2):
        assert evaluate(*arguments, "-o", str(tmp_path / "out"), cache=str(tmp_path / "cache")) == 0
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    (result,) = results(tmp_path / "out", "quality")
    assert "FD-mean" in result["values"]
    assert result["protocol"]["extractor"]["features"] == 6
    assert len(result["protocol"]["extractor"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{fresh}"], "--reference is missing"),
        (["{tmp}/none", "--reference", "{reference}"], "RUN"),
        (["{fresh}", "--reference", "{tmp}/none"], "--reference"),
        (["{fresh}", "--reference", "{reference}", "-n", "13"], "-n 13 must be at least 14"),
        (["{fresh}", "--reference", "{reference}", "-n", "61"], "has 60 images"),
        (["{fresh}", "--reference", "{reference}", "--steps", "20"], "--steps needs a pipeline"),
        (["{fresh}", "--reference", "{reference}", "--few-step", "5"], "--few-step needs a pipeline"),
        (["{run}", "--reference", "{reference}", "--few-step", "7"], "--steps 7 does not divide"),
        (["{run}", "--reference", "{reference}", "--few-step", "x"], "--few-step x is no list"),
        (["{run}", "--reference", "{reference}", "--few-step-schedulers", "ddim"], "needs --few-step"),
        (["{run}", "--reference", "{reference}", "--resolution", "16"], "the pipeline draws 8 x 8"),
        (["{fresh}", "--reference", "{small}"], "--reference has 10 images; at least"),
        (["{wide}", "--reference", "{reference}"], "--reference: its images are 8 x 8, the generated ones 12 x 8"),
        (["{fresh}", "--reference", "{reference}", "--extractor", "{tmp}/w.pt"], "w.pt"),
        (["{fresh}", "--reference", "{reference}", "--extractor", "pixel"], "--extractor 'pixel' is none of"),
        (["{fresh}", "--reference", "{reference}", "--extractor", "pixels", "--extractor", "pixels"], "given twice"),
        (["{fresh}", "--reference", "{reference}", "-o", "{fresh}"], "--output"),
        (["{fresh}", "--reference", "{reference}", "--training-split", "test"], "--training-split needs --training"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(run, sets, tmp_path, capsys, arguments, says) -> None:
    np.save(tmp_path / "small.npy", pictures(10, 8))
    np.save(tmp_path / "wide.npy", np.tile(pictures(N, 8), (1, 1, 2))[:, :, :12])
    places = {**sets, "run": run, "tmp": tmp_path, "small": tmp_path / "small.npy", "wide": tmp_path / "wide.npy"}
    capsys.readouterr()
    assert evaluate(*(argument.format(**places) for argument in arguments)) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
    assert LEAST == 14


def test_the_card_keeps_what_people_wrote(tmp_path) -> None:
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "README.md").write_text(f"# My model\n\nAll settings.{UNMEASURED}\n\nMine | too.\n")
    assert not fill_card(folder)  # nothing was measured
    protocol = {
        "sampler": None,
        "extractor": {"name": "a|b", "sha256": None},
        "reference": {"source": "real"},
        "n_generated": 20,
    }
    value = {"value": 1.25, "floor": None, "interval": None}
    result = {"kind": "quality", "protocol": protocol, "values": {"FD-a|b": value}}
    (folder / "evaluation" / "quality-a.json").write_text(json.dumps(result))
    assert fill_card(folder)
    once = (folder / "README.md").read_text()
    assert "Mine | too." in once
    assert "| FD-a\\|b | 1.25 |  | 20 | real | a\\|b | images as given |" in once
    assert fill_card(folder)
    assert (folder / "README.md").read_text() == once
    assert once.count(BEGIN) == once.count(END) == 1
    for damaged in ('{"kind": "quality"}', '{"kind"', json.dumps({**result, "values": {"FD": 1}})):
        (folder / "evaluation" / "quality-b.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"quality-b\.json is no result"):
            fill_card(folder)
        assert (folder / "README.md").read_text() == once


def test_the_neighbour_search_shows_how_far_it_is(sets, tmp_path, monkeypatch) -> None:
    """On a terminal, a bar for each long part, which ends at its total."""
    bars: list[tqdm] = []

    class Recorded(tqdm):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            bars.append(self)

    monkeypatch.setattr(progress, "tqdm", Recorded)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    more = ("--training", sets["training"], "--held-out", sets["held_out"])
    assert evaluate(sets["fresh"], "--reference", sets["reference"], *more, "-o", str(tmp_path / "out")) == 0
    found = {bar.desc.rstrip(": "): (bar.n, bar.total) for bar in bars}
    # for the values and for the floor: searches of 2 m + n and of 2 m rows, and distances within two sets;
    # n + m thrice: pixels, mirrored, features
    rows, copies = 2 * (2 * 2 * N + N) + 2 * 2 * 2 * N + 2 * (N + 2 * N), 3 * (N + 2 * N)
    assert found["neighbours"] == (rows, rows)  # a bar that is not shown counts nothing
    assert found["copies"] == (copies, copies)
