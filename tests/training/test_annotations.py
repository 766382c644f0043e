"""``train --noise-levels`` and ``--clean-subset``: what a run is told of its images reaches each, or is refused."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

from helpers import TINY_UNET
from robustdiff.commands import main
from robustdiff.data.corruption import Corruption
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.training import loop, trainer
from robustdiff.training.config import TrainConfig
from robustdiff.training.loader import Batches, RankSampler, iterate_batches
from robustdiff.training.processes import check_alike
from robustdiff.utils.errors import UsageError
from robustdiff.utils.signals import Interrupted
from trained import plan_of, run, same

NAMES = [f"{'odd' if i % 2 else 'even'}/{i}.png" for i in range(8)]
LEVELS = {"even/2.png": 0.2, "odd/5.png": 0.4, "even/0.png": 0.1}
STREAMED = {"max_memory_gib": 0.0, "dataloader_num_workers": 2}


def write_photos(folder: Path, names: list[str]) -> Path:
    """8 x 8 grey images whose pixels are a function of their names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(NAMES.index(name)).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images in two folders."""
    return write_photos(tmp_path_factory.mktemp("data") / "photos", NAMES)


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> TrainConfig:
    """Six steps of two passes of two images."""
    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET))
    (tmp_path / "levels.csv").write_text("name,sigma\n" + "".join(f"{n},{s}\n" for n, s in LEVELS.items()))
    return TrainConfig(
        str(photos),
        output_dir=str(tmp_path / "run"),
        images="24",
        noise_levels=str(tmp_path / "levels.csv"),
        train_batch_size=2,
        gradient_accumulation_steps=2,
        model_config_name_or_path=str(tmp_path / "unet.json"),
        learning_rate=1e-3,
        ddpm_num_steps=50,
        ddpm_num_inference_steps=2,
        preview_images=1,
        checkpointing_steps=4,
        logging_steps=3,
    )


# -- what reaches the objective ----------------------------------------------------------------------


@pytest.mark.parametrize("feeding", [{}, STREAMED], ids=["held", "streamed_two_workers"])
def test_every_image_comes_with_its_own_level(config: TrainConfig, monkeypatch, feeding: dict) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(DenoisingLoss):
        def __call__(self, model, x0, *, noise_level=None, **more):
            seen.append((x0.clone(), noise_level.clone()))
            terms = super().__call__(model, x0, noise_level=noise_level, **more)
            assert (self.schedule.noise_to_signal(terms.t) > noise_level).all()
            return terms

    monkeypatch.setattr(trainer, "build_objective", lambda _, schedule, unknown: Watching(schedule))
    run(config, **feeding)
    data = load_images(config.data)
    met = set()
    for x0, levels in seen:
        for image, level in zip(x0, levels, strict=True):
            (place,) = [i for i in range(8) if torch.equal(data.x0(i), image)]
            assert level.item() == LEVELS.get(data.names[place], 0.0)
            met.add(place)
    assert len(met) == 8


def test_two_processes_and_workers_meet_the_levels_of_the_counter(photos: Path) -> None:
    data, sigma = load_images(photos), torch.linspace(0, 1, 8, dtype=torch.float64)
    batches = Batches(data, (), 3, True, noise_level=sigma)
    for process in range(2):
        for batch in iterate_batches(batches, RankSampler(0, 5, 6, 3, process, 2), workers=1):
            assert batch.noise_level.tolist() == [sigma[batches.index(counter)] for counter in batch.counters]
    assert Batches(data, (), 3, True)(range(3)).noise_level is None


def test_a_run_that_is_told_differs_is_fed_in_any_way_and_goes_on_exactly(config: TrainConfig, monkeypatch) -> None:
    whole = run(config, "whole")
    assert not same(whole, run(config, "untold", noise_levels=None))
    assert same(whole, run(config, "streamed", **STREAMED))

    @contextlib.contextmanager
    def stopping():
        asked = []
        yield lambda: asked.append(1) or (130 if len(asked) == 3 else 0)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_signals", stopping)
        with pytest.raises(Interrupted):
            run(config, "stopped")
    assert same(whole, run(config, "stopped", resume=True, **STREAMED))


def test_levels_are_the_same_from_csv_json_and_a_manifest(config: TrainConfig, photos: Path, tmp_path: Path) -> None:
    dirty = tmp_path / "dirty"
    command = ["corrupt", str(photos), str(dirty), "--seed", "0"]
    command += ["--corrupt", "gaussian:sigma=0.3,fraction=0.5", "--corrupt", "gaussian:sigma=0.4,fraction=0.5"]
    assert main.main(command) == 0
    manifest = json.loads((dirty / "manifest.json").read_text())
    sizes = {(): 0.0, (0,): 0.3, (1,): 0.4, (0, 1): 0.5}
    levels = {entry["file"]: sizes[tuple(entry["corruptions"])] for entry in manifest["images"]}
    assert set(levels.values()) == set(sizes.values())
    (tmp_path / "l.json").write_text(json.dumps(levels))
    (tmp_path / "l.csv").write_text("".join(f'"{n}", {s}\n\n' for n, s in levels.items() if s), encoding="utf-8-sig")
    runs = [
        run(config, f"run{i}", data=str(dirty), noise_levels=str(source))
        for i, source in enumerate((tmp_path / "l.csv", tmp_path / "l.json", dirty / "manifest.json"))
    ]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_the_word_corrupt_is_the_truth_about_this_runs_own_dirt(config: TrainConfig, photos: Path, tmp_path) -> None:
    dirt = ("gaussian:sigma=0.3,fraction=0.5", "gaussian:sigma=0.4,fraction=0.5")
    data, corruptions = load_images(photos), [Corruption.parse(spec) for spec in dirt]
    levels = {
        name: sum(c.parameters["sigma"] ** 2 for p, c in enumerate(corruptions) if c.hits(2, i, p)) ** 0.5
        for i, name in enumerate(data.names)
    }
    assert len(set(levels.values())) == 4
    (tmp_path / "truth.json").write_text(json.dumps(levels))
    told = run(config, "told", corrupt=dirt, seed=2, noise_levels="corrupt")
    assert same(told, run(config, "truth", corrupt=dirt, seed=2, noise_levels=str(tmp_path / "truth.json")))
    assert not same(told, run(config, "untold", corrupt=dirt, seed=2, noise_levels=None))


def test_processes_with_other_levels_are_refused() -> None:
    accelerator = SimpleNamespace(num_processes=2, device="cpu", gather=lambda mine: torch.cat([mine, mine + 1]))
    with pytest.raises(UsageError, match="`noise_levels` f are others on some machines than on others"):
        check_alike(accelerator, "0a" * 32, "`noise_levels` f are others")


# -- what is said of it ------------------------------------------------------------------------------


def test_plan_card_and_account_say_what_the_run_was_told(config: TrainConfig, capsys) -> None:
    run(config)
    said = f"3 of 8 images, sigma 0.1 to 0.4, median 0.2 (from {config.noise_levels}); trained at "
    assert f"noise told:     {said}" in capsys.readouterr().out
    folder = Path(str(config.output_dir))
    assert f"| noise told | {said}" in (folder / "README.md").read_text()
    account = json.loads((folder / "data.json").read_text())
    assert account["trained"] == 8
    told = account["noise_levels"]
    assert (told["count"], told["lowest"], told["median"], told["highest"]) == (3, 0.1, 0.2, 0.4)
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(50))
    above = [(schedule.noise_to_signal(torch.arange(50)) > level).double().mean().item() for level in LEVELS.values()]
    assert told["timesteps"] == pytest.approx(sum(above) / 3)
    assert told["untrained_below"] == 0


def test_where_every_image_is_noisy_the_plan_says_what_is_not_trained(config: TrainConfig, capsys) -> None:
    dirt = {"corrupt": ("gaussian:sigma=0.2",), "noise_levels": "corrupt"}
    plan = plan_of(config, capsys, preset="plain", **dirt)
    assert "8 of 8 images, sigma 0.2 (from corrupt)" in plan
    assert "not trained:    noise levels below sigma/alpha 0.2" in plan
    assert "sample with `sigma_floor` 0.2" in plan
    with pytest.raises(UsageError, match=r"more noise than 0\.1, where the regulariser's gate .*`preset` plain"):
        plan_of(config, capsys, gate="0:0.1", **dirt)
    assert "not trained" not in plan_of(config, capsys)


# -- resume ------------------------------------------------------------------------------------------


def test_other_levels_are_refused_on_resume_and_the_same_in_another_file_are_not(config, tmp_path: Path) -> None:
    whole = run(config)
    (tmp_path / "same.json").write_text(json.dumps({**LEVELS, "odd/1.png": 0}))
    (tmp_path / "other.json").write_text(json.dumps({**LEVELS, "odd/5.png": 0.41}))
    assert same(whole, run(config, resume=True, noise_levels=str(tmp_path / "same.json")))
    for source in (str(tmp_path / "other.json"), None):
        with pytest.raises(UsageError, match="`resume`: `noise_levels` are others"):
            run(config, resume=True, noise_levels=source)
    saved = tmp_path / "run" / "config.json"
    settings = json.loads(saved.read_text())
    del settings["settings"]["clean_subset"]  # a run of before there was the flag
    saved.write_text(json.dumps(settings))
    assert same(whole, run(config, resume=True))
    with pytest.raises(UsageError, match="`clean_subset`"):
        run(config, resume=True, clean_subset=True, corrupt=("blur:fraction=0.1",))


# -- the clean subset --------------------------------------------------------------------------------

DIRT = ("blur:radius=1,fraction=0.3", "impulse:amount=0.1,fraction=0.2")


def spared(photos: Path, seed: int = 0) -> list[str]:
    """Names of the images that DIRT does not hit."""
    corruptions = [Corruption.parse(spec) for spec in DIRT]
    names = load_images(photos).names
    return [n for i, n in enumerate(names) if not any(c.hits(seed, i, p) for p, c in enumerate(corruptions))]


def test_the_clean_subset_trains_as_a_folder_of_those_images_would(
    config, photos: Path, tmp_path: Path, capsys
) -> None:
    names = spared(photos)
    assert 4 <= len(names) < 8
    settings = {"noise_levels": None, "random_flip": True}
    subset = run(config, "subset", clean_subset=True, corrupt=DIRT, **settings)
    assert f"trained on:     {len(names)} images: those that `corrupt` spares" in capsys.readouterr().out
    alone = write_photos(tmp_path / "spared", names)
    assert same(subset, run(config, "alone", data=str(alone), **settings))
    assert not same(subset, run(config, "all", corrupt=DIRT, **settings))
    assert json.loads((tmp_path / "subset" / "data.json").read_text())["trained"] == len(names)
    assert f"| trained on | {len(names)} images" in (tmp_path / "subset" / "README.md").read_text()


def test_a_pass_over_the_clean_subset_is_as_long_as_it_is(config: TrainConfig, photos: Path, capsys) -> None:
    changes = {"noise_levels": None, "clean_subset": True, "corrupt": DIRT, "images": "500k", "num_epochs": 8}
    plan = plan_of(config, capsys, **changes)
    assert f"{8 * len(spared(photos)) // 4} steps of 4" in plan


def test_levels_of_images_that_are_left_out_do_not_count(config: TrainConfig, photos: Path, tmp_path, capsys) -> None:
    names = spared(photos)
    hit = next(name for name in NAMES if name not in names)
    (tmp_path / "both.csv").write_text(f"{hit},0.3\n{names[0]},0.2\n")
    (tmp_path / "hit.csv").write_text(f"{hit},0.3\n")
    changes = {"clean_subset": True, "corrupt": DIRT}
    plan = plan_of(config, capsys, noise_levels=str(tmp_path / "both.csv"), **changes)
    assert f"1 of {len(names)} images, sigma 0.2 (from" in plan
    with pytest.raises(UsageError, match="no image that is trained on has a level"):
        plan_of(config, capsys, noise_levels=str(tmp_path / "hit.csv"), **changes)


@pytest.mark.parametrize(("sigma", "told"), [(25, 1), (0.9, 0)])
def test_a_level_in_8_bit_steps_is_told(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], sigma: float, told: int
) -> None:
    (tmp_path / "levels.csv").write_text(f"even/0.png,{sigma}\n")
    arguments = [config.data, "--noise-levels", str(tmp_path / "levels.csv"), "--output-dir", str(tmp_path / "new")]
    assert main.main(["train", *arguments, "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [("--noise-levels" in line and "divide them by 127.5" in line) for line in lines] == [True] * told


# -- refused -----------------------------------------------------------------------------------------

MANIFEST = {
    "format": "robustdiff dirty copy 1",
    "corruptions": ["gaussian:sigma=0.2"],
    "clean": {"size": [8, 8], "channels": 1, "sha256": "0"},
    "images": [{"file": "even/0.png", "corruptions": [0]}],
}
GAUSSIAN = ["--corrupt", "gaussian:sigma=0.2,fraction=0.5"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("even/0.png,0.2\neven/9.png,0.2\n", ["line 2", "has no image 'even/9.png'", "like 'even/0.png'"]),
        ("name,sigma\neven/0.png,-0.2\n", ["line 2", "0 or more, not -0.2"]),
        ("even/0.png,nan\n", ["line 1", "finite number"]),
        ("even/0.png,inf\n", ["line 1", "finite number"]),
        ("\n\neven/0.png,1e6\n", ["line 3", "1e+06 is not below", "largest noise level"]),
        ("even/0.png,0.2\neven/0.png,0.2\n", ["line 2", "'even/0.png' is given twice"]),
        ("even/0.png\n", ["line 1", "not NAME,SIGMA"]),
        ("image,level\neven/0.png,0.2\n", ["line 1", "not NAME,SIGMA"]),
        ("even/0.png,0.2,3\n", ["line 1", "not NAME,SIGMA"]),
        ('"even/0.png,0.2\n', ["line 1", "unexpected end"]),
        ("\x00\x00\x01\n", ["line 1"]),
        ("", ["no image that is trained on has a level above 0", "leave the flag out"]),
        ("even/0.png,0\n", ["no image that is trained on has a level above 0"]),
        ('{"even/0.png": "0.2"}', ["'even/0.png' is '0.2', not a number"]),
        ('{"even/0.png": true}', ["'even/0.png' is True, not a number"]),
        ('{"even/0.png": -1}', ["'even/0.png'", "0 or more, not -1"]),
        ('{"even/0.png": NaN}', ["'even/0.png'", "finite"]),
        ('{"even/0.png": 1' + 400 * "0" + "}", ["'even/0.png'", "finite"]),
        ('{"even/9.png": 1}', ["has no image 'even/9.png'"]),
        ('{"even/0.png": 1, "even/0.png": 2}', ["'even/0.png' is given twice"]),
        ('{"even/0.png": ', ["Expecting value"]),
        ("{" * 100_000, ["file"]),
        (json.dumps({**MANIFEST, "corruptions": ["blur:radius=1"]}), ["hit by blur has no noise level"]),
        (json.dumps({**MANIFEST, "clean": {**MANIFEST["clean"], "size": [16, 16]}}), ["16 x 16", "--resolution"]),
        (json.dumps({**MANIFEST, "images": [{"file": "even/0.png", "corruptions": [3]}]}), ["not a whole manifest"]),
        (json.dumps({**MANIFEST, "clean": None}), ["not a whole manifest"]),
        (json.dumps({**MANIFEST, "images": 3}), ["not a whole manifest"]),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it_and_the_place(
    config: TrainConfig, photos: Path, tmp_path: Path, capsys, content: str, words: list[str]
) -> None:
    (tmp_path / "file").write_text(content)
    command = ["train", str(photos), "--noise-levels", str(tmp_path / "file"), "--dry-run"]
    assert main.main([*command, "--model-config-name-or-path", str(config.model_config_name_or_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"robustdiff: --noise-levels {tmp_path / 'file'}")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_a_manifest_beside_the_images_it_was_made_from_is_refused(config, photos: Path, tmp_path: Path) -> None:
    clean = {**MANIFEST["clean"], "sha256": load_images(photos).sha256}
    (tmp_path / "m.json").write_text(json.dumps({**MANIFEST, "clean": clean}))
    with pytest.raises(UsageError, match="is what that copy was made from"):
        run(config, noise_levels=str(tmp_path / "m.json"))


def test_an_image_that_could_not_be_read_may_be_named(config: TrainConfig, tmp_path: Path, capsys) -> None:
    folder = write_photos(tmp_path / "more", NAMES)
    (folder / "odd" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "l.csv").write_text("odd/bad.png,0.2\nodd/1.png,0.3\n")
    plan = plan_of(config, capsys, data=str(folder), noise_levels=str(tmp_path / "l.csv"))
    assert "1 of 8 images, sigma 0.3 (from" in plan


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--noise-levels", "nowhere.csv"], ["--noise-levels nowhere.csv: no such file", "say corrupt"]),
        (["--noise-levels", "."], ["--noise-levels .: ", "directory"]),
        (["--noise-levels", ""], ["--noise-levels is empty"]),
        (["--noise-levels", "corrupt"], ["needs --corrupt gaussian"]),
        (["--noise-levels", "corrupt", *GAUSSIAN, "--corrupt", "blur"], ["hit by blur has no noise level", "a file"]),
        (["--noise-levels", "corrupt", *GAUSSIAN, "--clean-subset"], ["does nothing with --clean-subset"]),
        (["--noise-levels", "corrupt", "--corrupt", "gaussian:sigma=90,fraction=0.5"], ["90 is not below"]),
        (["--noise-levels", "corrupt", "--corrupt", "gaussian:fraction=0"], ["level above 0"]),
        (["--noise-levels", "corrupt", *GAUSSIAN, "--objective", "pseudo-huber"], ["--objective pseudo-huber"]),
        (["--clean-subset"], ["--clean-subset needs --corrupt"]),
        (["--clean-subset", "--corrupt", "blur"], ["--clean-subset: --corrupt hits every image"]),
        (["--clean-subset", *GAUSSIAN], ["--clean-subset: --corrupt spares", "of 8 images, a step takes 64"]),
    ],
)
def test_flags_that_do_not_fit_are_one_line(
    config: TrainConfig, photos: Path, tmp_path: Path, capsys, monkeypatch, flags: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", str(photos), "--dry-run", "--ddpm-num-steps", "50", "--ddpm-beta-schedule", "linear"]
    command += ["--model-config-name-or-path", str(config.model_config_name_or_path)]
    assert main.main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "objective",
    ["robust", *(pytest.param(name, marks=pytest.mark.slow) for name in ("invariance", "input-perturbation"))],
)
def test_objectives_that_can_use_levels_train_with_them(config: TrainConfig, objective: str) -> None:
    assert not same(run(config, "a", objective=objective), run(config, "b", objective=objective, noise_levels=None))
