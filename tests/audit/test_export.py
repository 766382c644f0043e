"""Files for other trainers: their own keys and no others; every image once; nothing below its noise level."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from audits import save
from robustdiff.audit import AuditResult
from robustdiff.audit.export.groups import ALL, LEFT_OUT, Stage, first_timestep, flow_sigma
from robustdiff.audit.export.trainer_files import Exported, trainers
from robustdiff.audit.export.write import Export
from robustdiff.utils.errors import UsageError

GUIDE = (Path(__file__).parents[2] / "docs" / "guide" / "their-trainers.md").read_text()
FLOORS = [0.0, 0.0, 0.2, 0.2, 0.7, 50.0, 0.0]
WEIGHTS = [1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
NAMES = ["a.png", "two/b.png", "two/c d.png", 'two/"e".png', "f.png", "g.png", "h.png"]

# Published keys, as facts: where they were read, on 2026-12-01.
KOHYA = {  # kohya-ss/sd-scripts config_README-en.md, commit 063ef100648c016b6b4d804a6de6f5afab7ebd58
    "general": {"enable_bucket", "batch_size", "resolution", "num_repeats", "caption_extension", "shuffle_caption"},
    "datasets": {"subsets", "batch_size", "resolution", "enable_bucket", "num_repeats", "skip_image_resolution"},
    "subsets": {"metadata_file", "image_dir", "num_repeats", "flip_aug", "random_crop", "caption_prefix"},
}
KOHYA_IMAGE = {"caption", "tags", "train_resolution"}  # library/train_util.py, FineTuningDataset
CONCEPT = {  # Nerogar/OneTrainer modules/util/config/ConceptConfig.py, commit 13dbd21778de4250f9d4a9f3f00afd0970967e27
    *("__version", "image", "text", "name", "path", "seed", "enabled", "validation_concept"),
    *("include_subdirectories", "image_variations", "text_variations", "balancing", "balancing_strategy"),
    "loss_weight",
}
CONCEPT_TEXT = {"prompt_source", "prompt_path", "enable_tag_shuffling", "tag_delimiter", "keep_tags_count"}
SIMPLETUNER = {  # bghira/SimpleTuner documentation/DATALOADER.md, commit 04265fc15c49322a456d5963d56f75d0f40fdd76
    *("id", "disabled", "dataset_type", "default", "cache_dir", "type", "instance_data_dir", "caption_strategy"),
    *("metadata_backend", "parquet", "cache_dir_vae", "resolution", "resolution_type", "minimum_image_size", "crop"),
    *("repeats", "delete_unwanted_images", "delete_problematic_images", "timestep_sampling_offset", "probability"),
}
SIMPLETUNER_TABLE = {
    *("path", "filename_column", "caption_column", "fallback_caption_column", "width_column", "height_column"),
    "identifier_includes_extension",
}
AI_TOOLKIT = {  # ostris/ai-toolkit toolkit/config_modules.py, DatasetConfig; config/examples/train_lora_flux_24gb.yaml
    *("folder_path", "dataset_path", "caption_ext", "resolution", "num_repeats", "loss_multiplier", "is_reg"),
    "network_weight",
}
AI_TOOLKIT_TRAIN = {"min_denoising_steps", "max_denoising_steps", "timestep_type", "content_or_style"}  # TrainConfig


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "two").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8 + number, 6), (30 * number, 0, 0)).save(root / name)
    (root / "a.txt").write_text("a red\nsquare ✓\n")
    return root


@pytest.fixture
def found() -> AuditResult:
    return replace(
        AuditResult.of_clean(len(NAMES), NAMES),
        min_sigma=torch.tensor(FLOORS, dtype=torch.float64),
        weight=torch.tensor(WEIGHTS, dtype=torch.float64),
        copies=((1, 6),),
    )


@pytest.fixture
def exported(data: Path, found: AuditResult, tmp_path: Path) -> Exported:
    return Exported(found, data, tmp_path / "audit" / "export-x")


every_trainer = pytest.mark.parametrize("name", trainers())


def parsed(name: str, text: str) -> Any:
    if name.endswith(".json"):
        return json.loads(text)
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    if name.endswith(".yaml"):
        return yaml.safe_load(text)
    if name.endswith(".toml"):
        tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
        return tomllib.loads(text)
    return text.splitlines()


def images_of(name: str, files: dict[str, str], root: Path) -> dict[str, list[str]]:
    """Names of the images that each group's own list holds, by the group."""
    listed = {}
    for file, text in files.items():
        group, _, suffix = file.rpartition(".")
        if not re.match("all-levels$|left-out$|from-", group):
            continue
        rows = parsed(file, text)
        if suffix == "json":
            rows = [Path(path).relative_to(root).as_posix() for path in rows]
        elif suffix == "jsonl":
            rows = [row["filename"] for row in rows]
        listed[group] = rows
    return listed


@every_trainer
def test_every_file_is_what_its_name_says_and_every_image_is_in_one_list(name: str, exported: Exported) -> None:
    files = dict(trainers()[name].files(exported))
    assert all(parsed(file, text) for file, text in files.items())
    if name == "metadata":
        return
    listed = images_of(name, files, exported.root)
    assert sorted(image for images in listed.values() for image in images) == sorted(NAMES)
    assert set(listed["all-levels"]) == {"a.png", "two/b.png"}
    assert set(listed["from-0.2"]) == {"two/c d.png", 'two/"e".png'}
    assert set(listed["from-0.7"]) == {"f.png"}
    assert set(listed["left-out"]) == {"g.png", "h.png"}
    assert all((exported.root / image).is_file() for images in listed.values() for image in images)


@every_trainer
def test_units_are_said_and_bare_timesteps_are_not(name: str, exported: Exported) -> None:
    trainer = trainers()[name]
    notes = trainer.notes(exported)
    assert "sigma/alpha" in notes
    assert "s = c / (1 + c)" in notes
    assert str(exported.root) in notes
    for file, text in trainer.files(exported).items():
        if file.endswith((".toml", ".yaml")):
            assert text.startswith("# robustdiff, stage ")
            assert "sigma/alpha >= " in text.splitlines()[0] or "every noise level" in text.splitlines()[0]


def test_kohya_has_its_own_keys(exported: Exported) -> None:
    files = trainers()["kohya"].files(exported)
    for file, text in files.items():
        if file.endswith(".toml"):
            read = parsed(file, text)
            assert set(read) == {"general", "datasets"}
            assert set(read["general"]) <= KOHYA["general"]
            for dataset in read["datasets"]:
                assert set(dataset) <= KOHYA["datasets"]
                for subset in dataset["subsets"]:
                    assert set(subset) <= KOHYA["subsets"]
                    assert Path(subset["metadata_file"]).name in files
                    assert Path(subset["metadata_file"]).parent == exported.folder
        elif file.endswith(".json"):
            for path, row in parsed(file, text).items():
                assert set(row) <= KOHYA_IMAGE
                assert row["caption"]  # it refuses images without
                assert Path(path).is_absolute()
    assert json.loads(files["all-levels.json"])[str(exported.root / "a.png")] == {"caption": "a red\nsquare ✓"}


def test_onetrainer_has_its_own_keys(exported: Exported) -> None:
    files = trainers()["onetrainer"].files(exported)
    stages = {file: parsed(file, text) for file, text in files.items() if file.endswith(".concepts.json")}
    for concepts in stages.values():
        assert [concept["enabled"] for concept in concepts][-1] is False  # left out
        for concept in concepts:
            assert set(concept) <= CONCEPT
            assert set(concept["text"]) <= CONCEPT_TEXT
            assert concept["balancing_strategy"] in ("REPEATS", "SAMPLES")
    assert [sum(concept["enabled"] for concept in concepts) for concepts in stages.values()] == [3, 2, 1]


def test_simpletuner_has_its_own_keys(exported: Exported) -> None:
    files = trainers()["simpletuner"].files(exported)
    for file, text in files.items():
        rows = parsed(file, text)
        if file.endswith(".multidatabackend.json"):
            for row in rows:
                assert set(row) <= SIMPLETUNER
                assert set(row.get("parquet", ())) <= SIMPLETUNER_TABLE
            assert len({row["id"] for row in rows}) == len(rows)
            assert [row["dataset_type"] for row in rows].count("text_embeds") == 1
            assert [row.get("disabled") for row in rows if row["id"] == "left-out"] == [True]
            columns = {
                row["parquet"][key] for row in rows if "parquet" in row for key in row["parquet"] if "_column" in key
            }
        elif file == "all-levels.jsonl":
            assert rows[0] == {"filename": "a.png", "caption": "a red\nsquare ✓", "width": 8, "height": 6}
    assert columns == set(parsed("x.jsonl", files["from-0.2.jsonl"])[0])


def test_ai_toolkit_has_its_own_keys(exported: Exported) -> None:
    files = trainers()["ai-toolkit"].files(exported)
    for file, text in files.items():
        if file.endswith(".yaml"):
            read = parsed(file, text)
            assert set(read) == {"datasets", "train"}
            assert set(read["train"]) <= AI_TOOLKIT_TRAIN
            for dataset in read["datasets"]:
                assert set(dataset) <= AI_TOOLKIT
                assert Path(dataset["dataset_path"]).name in files


# -- what a trainer then draws, by its own rule -----------------------------------------------------------


SD = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
SD_LEVELS = ((1 - (1 - SD).cumprod(0)) / (1 - SD).cumprod(0)).sqrt()


def flow_level(s: torch.Tensor) -> torch.Tensor:
    return s / (1 - s)


def kohya_levels(run: str) -> torch.Tensor:
    """library/train_util.py, get_timesteps: randint(min_timestep, 1000)."""
    first = re.search(r"--min_timestep (\d+)", run)
    return SD_LEVELS[int(first[1]) if first else 0 :]


def onetrainer_levels(run: str, flow: bool, shift: float = 1.0) -> torch.Tensor:
    """ModelSetupNoiseMixin.py: from int(1000 * min_noising_strength) on, then the shift; s = (t + 1) / 1000."""
    strengths = re.findall(r"([\d.]+) for", run) or ["0", "0"]
    t = torch.arange(int(1000 * float(strengths[flow])), 1000).double()
    t = (1000 * shift * t / ((shift - 1) * t + 1000)).long()
    return flow_level((t + 1).double() / 1000) if flow else SD_LEVELS[t]


def simpletuner_levels(run: str) -> torch.Tensor:
    """simpletuner/helpers/models/common.py, flow_custom_timesteps: these, in units of s * 1000."""
    listed = re.search(r"--flow_custom_timesteps=([\d,]+)", run)
    assert listed
    return flow_level(torch.tensor([int(t) for t in listed[1].split(",")]).double() / 1000)


def ai_toolkit_levels(train: dict[str, Any]) -> torch.Tensor:
    """BaseSDTrainProcess.py: randint(min, max) of indices into falling timesteps, 999 at most."""
    most = min(train["max_denoising_steps"], 999)
    assert most == 999 or (train["timestep_type"], train["content_or_style"]) == ("linear", "balanced")
    return flow_level(torch.linspace(1000, 1, 1000).double()[:most] / 1000)


def test_no_stage_draws_below_the_level_of_its_images(exported: Exported) -> None:
    known = trainers()
    yamls = known["ai-toolkit"].files(exported)
    assert [stage.level for stage in exported.stages] == [0.7, 0.2, 0.0]
    for stage in exported.stages:
        lowest = stage.level
        assert all(FLOORS[place] <= lowest for group in stage.groups for place in group.places)
        said = {name: " ".join(known[name].run(exported, stage)) for name in known}
        train = parsed("x.yaml", yamls[f"{stage.slug}.yaml"])["train"]
        drawn = [
            kohya_levels(said["kohya"]),
            *(onetrainer_levels(said["onetrainer"], flow, shift) for flow, shift in ((0, 1.0), (1, 1.0), (1, 3.0))),
            ai_toolkit_levels(train),
        ]
        if stage.level:
            drawn.append(simpletuner_levels(said["simpletuner"]))
        for levels in drawn:
            assert levels.min() >= lowest
        for levels in [*drawn[:3], *drawn[4:]]:  # without a shift: and not far above (Stable Diffusion begins at 0.03)
            assert flow_sigma(levels.min().item()) <= flow_sigma(lowest) + 0.03
        if stage.level:
            text = yamls[f"{stage.slug}.yaml"]
            table = re.search(r"(\d+) for Stable Diffusion", text)
            assert table  # randint(min + 1, max - 1) of falling timesteps 999 ... 0
            drawn_there = SD_LEVELS.flip(0)[: int(table[1]) - 1].min().item()
            assert lowest <= drawn_there <= lowest + 0.03


def test_sigma_of_flow_matching_is_said_by_its_formula() -> None:
    assert flow_sigma(0.25) == pytest.approx(0.2)
    assert flow_sigma(0.25) / (1 - flow_sigma(0.25)) == pytest.approx(0.25)
    assert first_timestep(0.52) == int((SD_LEVELS <= 0.52).sum())


# -- datasets reads metadata.jsonl ----------------------------------------------------------------------------


def test_imagefolder_reads_the_metadata(exported: Exported, tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    (exported.root / "metadata.jsonl").write_text(trainers()["metadata"].files(exported)["metadata.jsonl"])
    read = datasets.load_dataset(
        "imagefolder", data_dir=str(exported.root), split="train", cache_dir=str(tmp_path / "cache")
    )
    rows = {row["name"]: row for row in read}
    assert set(rows) == set(NAMES)
    for place, name in enumerate(NAMES):
        assert rows[name]["min_sigma"] == FLOORS[place]
        assert rows[name]["weight"] == WEIGHTS[place]
        assert rows[name]["image"].size == (8 + place, 6)
    assert rows["a.png"]["group"] == ALL
    assert rows["g.png"]["group"] == rows["h.png"]["group"] == LEFT_OUT
    assert rows["f.png"]["group"] == "high noise only, sigma/alpha >= 0.7"


# -- writing -------------------------------------------------------------------------------------------------


@every_trainer
@pytest.mark.parametrize("files", ["list", "link", "copy"])
def test_files_are_written_beside_the_audit_and_nothing_into_the_data(name, files, data, found, tmp_path) -> None:
    before = sorted(data.rglob("*"))
    save(found, tmp_path / "audit", data)
    for _ in range(2):  # again: in its place
        said = Export(name, str(data), str(tmp_path / "audit"), files).write()
    folder = tmp_path / "audit" / f"export-{name}"
    assert str(folder) in said
    assert ("reads folders" in said) == (name == "onetrainer" and files == "list")
    assert sorted(entry.name for entry in (tmp_path / "audit").iterdir()) == ["audit.json", folder.name, "found.json"]
    assert (folder / "images").exists() == (files != "list")
    if files != "list":
        made = {p.relative_to(folder / "images").as_posix(): p for p in (folder / "images").rglob("*") if p.is_file()}
        assert set(made) == {
            *("all-levels/a.png", "all-levels/a.txt", "all-levels/two/b.png", "from-0.7/f.png"),
            *("from-0.2/two/c d.png", 'from-0.2/two/"e".png'),
        }
        assert all(path.is_symlink() == (files == "link") for path in made.values())
        assert made["from-0.7/f.png"].read_bytes() == (data / "f.png").read_bytes()
    assert sorted(data.rglob("*")) == before


def test_what_cannot_be_exported_is_said_in_one_line(data: Path, found: AuditResult, tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    with pytest.raises(
        UsageError, match="`export` 'koyha' is no trainer there is a format for: use one of ai-toolkit, "
    ):
        Export("koyha", str(data), str(audit))
    with pytest.raises(UsageError, match="`export` kohya: digits is no folder of image files"):
        Export("kohya", "digits", str(audit))
    with pytest.raises(UsageError, match="nowhere"):
        Export("kohya", str(tmp_path / "nowhere"), str(audit))
    with pytest.raises(UsageError, match="`export` needs what is said of every image"):
        Export("kohya", str(data), str(audit)).write()
    save(replace(found, names=["x.png", *NAMES[1:]]), audit, data)
    with pytest.raises(UsageError, match=r"an audit of other images: x\.png is not in .* \(1 of 7 are not\)"):
        Export("kohya", str(data), str(audit)).write()
    save(found, audit, data)
    save(found, data / "audit", data)
    with pytest.raises(UsageError, match=r"`output` .*: lies in "):
        Export("kohya", str(data), str(data / "audit"))
    (audit / "export-kohya").mkdir()
    (audit / "export-kohya" / "mine.toml").touch()
    with pytest.raises(UsageError, match="exists and is no export"):
        Export("kohya", str(data), str(audit)).write()
    assert (audit / "export-kohya" / "mine.toml").exists()


def test_an_audit_is_taken_for_its_own_folder_only(data: Path, found: AuditResult, tmp_path: Path, monkeypatch) -> None:
    other, audit = shutil.copytree(data, tmp_path / "others"), tmp_path / "audit"
    save(found, audit, other)
    with pytest.raises(UsageError, match=r"audit is an audit of .*others, not of .*photos: choose another folder, or "):
        Export("kohya", str(data), str(audit)).write()
    monkeypatch.chdir(tmp_path)
    for same in ("others", "others/", "photos/../others", str(other)):
        assert "export-kohya: " in Export("kohya", same, str(audit)).write()
    for lost in ("{}", "[]", "no JSON"):
        (audit / "audit.json").write_text(lost)
        with pytest.raises(UsageError, match=r"no audit\.json tells what its found\.json is of"):
            Export("kohya", "others", str(audit)).write()


@pytest.mark.skipif(sys.platform == "win32" or sys.platform == "darwin", reason="names are text there")
def test_a_name_that_is_no_text_can_be_listed(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (tmp_path / "photos").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "photos" / name)
    exported = Exported(AuditResult.of_clean(1, [name]), tmp_path / "photos", tmp_path / "audit")
    for trainer in trainers().values():
        for text in trainer.files(exported).values():
            text.encode("utf-8", "surrogateescape")


def test_the_guide_has_a_section_for_every_trainer() -> None:
    for name, trainer in trainers().items():
        assert f"`--export {name}`" in GUIDE
        assert re.split("[/ ]", trainer.title)[-1] in GUIDE
        assert not isinstance(trainer.honours, str)
        assert trainer.honours


def test_a_set_judged_clean_is_one_group_and_one_stage(data: Path, tmp_path: Path) -> None:
    exported = Exported(AuditResult.of_clean(len(NAMES), NAMES), data, tmp_path)
    assert [(group.kind, len(group.places)) for group in exported.groups] == [(ALL, len(NAMES))]
    assert exported.stages == (Stage(1, 0.0, exported.groups),)
    assert math.isfinite(exported.groups[0].level)
