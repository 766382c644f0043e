"""What the documents show is run: the README's snippets, the examples, the demo; links and names exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from experiments.paper import tables
from experiments.paper.errors import ImageOptions
from experiments.paper.image_grid_spec import IMAGE_EXPERIMENTS, SCALE, image_rows
from experiments.paper.image_rows import settings_of
from experiments.paper.toy_grid import rows_of
from experiments.paper.worker import row_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_the_python_of_the_readme_runs(code: str, tmp_path: Path) -> None:
    python("-W", "error::FutureWarning", "-c", code + "\nassert terms.total.shape == (16,)", cwd=tmp_path)


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    commands = [shlex.split(line) for block in blocks(README, "bash") for line in block.splitlines()]
    ours = [command for command in commands if command[0] == "robustdiff"]
    assert [command[1] for command in ours] == ["corrupt", "audit", "train", "sample"]
    for command in ours:
        shorter = [{"100k": "640", "64": "4"}.get(word, word) for word in command[1:]]
        python("-m", "robustdiff", *shorter, cwd=tmp_path)
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 4
    DiffusionPipeline.from_pretrained(tmp_path / "model")


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_the_file_tree_of_the_readme_is_the_file_tree() -> None:
    tree = README.split("## What is here")[1].split("```")[1]
    listed = set(re.findall(r"^  (\w+\.py)", tree, flags=re.MULTILINE))
    there = {path.name for path in (ROOT / "src" / "robustdiff").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert listed == there
    for folder in re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir()


DOCUMENTS = ["README.md", "experiments/README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_files_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_drop_in_example_trains_a_stock_pipeline(tmp_path: Path) -> None:
    output = python(str(ROOT / "examples" / "drop_in.py"), "--images", "256", "--output", "out", cwd=tmp_path)
    assert "256 images, loss" in output
    DiffusionPipeline.from_pretrained(tmp_path / "out")


def test_text_conditional_example_runs(tmp_path: Path) -> None:
    output = python(str(ROOT / "examples" / "text_conditional.py"), cwd=tmp_path)
    assert "step 19" in output


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_use_public_names_only_and_stay_short(example: Path) -> None:
    import robustdiff

    text = example.read_text()
    assert 35 <= len(text.splitlines()) <= 80
    for names in re.findall(r"^from robustdiff import (.*)$", text, flags=re.MULTILINE):
        assert set(names.split(", ")) <= set(robustdiff.__all__)
    assert "from robustdiff." not in text


def test_every_public_name_can_be_imported_and_is_documented() -> None:
    import robustdiff

    for name in robustdiff.__all__:
        text = getattr(robustdiff, name).__doc__
        assert text, name
        assert not text.startswith(f"{name}("), name  # what dataclasses write of themselves


def test_the_table_of_the_readme_is_the_committed_result() -> None:
    rows = json.loads((ROOT / "experiments" / "results" / "digits_demo.json").read_text())["rows"]
    for row in rows:
        numbers = f"{row['frechet']:.3f} | {row['noise']:.3f} | {row['spread']:.3f}"
        assert f"| {row['row']} | {row['told']} | {numbers} |" in README


@pytest.mark.parametrize(
    ("line", "method"),
    [
        ("plain | nothing", "plain"),
        ("the paper's (adversarial) | nothing", "adversarial"),
        ("**`--auto`** | nothing", "auto"),
        ("`--noise-levels` | the noise of every image", "told"),
        ("plain, on the clean part | which images are clean", "clean-subset"),
    ],
)
def test_the_image_table_of_the_readme_is_the_committed_result(line: str, method: str) -> None:
    cells = []
    for dirt in ("clean", "gaussian-p0.9-s0.2", "outliers-q0.1", "missing", "jpeg", "blur", "mixed"):
        path = ROOT / "experiments" / "results" / "images" / "cifar10-cpu" / f"cifar10-cpu-{dirt}-{method}.json"
        values = json.loads(path.read_text())["values"] if path.is_file() else None
        cells.append(f"{values['FD-squeezenet10_imagenet']['mean'] / 1000:.1f}k" if values else "-")
    assert f"| {line} | {' | '.join(cells)} |" in README


@pytest.mark.slow
def test_the_demo_runs_and_writes_what_it_promises(tmp_path: Path) -> None:
    script = ROOT / "experiments" / "digits_demo.py"
    python(str(script), "--output", str(tmp_path / "demo"), "--images", "256", "--samples", "80", cwd=tmp_path)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    names = [row["row"] for row in results["rows"]]
    assert names[-2:] == ["robust", "--auto"]
    assert len(names) == 9
    rows = {row["row"]: row for row in results["rows"]}
    floor, dirty = rows["clean training digits (the floor)"], rows["dirty training digits"]
    assert 0 < floor["frechet"] < dirty["frechet"]
    # sigma 0.2 on 90 % of the images, before clipping: 0.19
    assert floor["noise"] < 0.06 < dirty["noise"] < 0.19
    assert (tmp_path / "demo" / "figure.png").stat().st_size > 10_000
    table = (tmp_path / "demo" / "table.md").read_text().splitlines()
    assert len(table) == 11


def test_the_noise_experiment_runs_and_its_committed_result_says_how_it_was_got(tmp_path: Path) -> None:
    script, found = ROOT / "experiments" / "noise_estimates.py", tmp_path / "found.json"
    python(str(script), "--images", "12", "--output", str(found), cwd=tmp_path)
    now = json.loads(found.read_text())
    committed = json.loads((script.parent / "results" / "noise_estimates.json").read_text())
    assert now["protocol"] == committed["protocol"]
    assert [row["set"] for row in now["rows"]] == ["digits 8 x 8"]
    assert now["rows"][0].keys() == committed["rows"][0].keys()


def committed_rows() -> list[dict[str, Any]]:
    results = ROOT / "experiments" / "results"
    folders = [folder for kind in ("worlds", "images") for folder in sorted((results / kind).iterdir())]
    return [row for folder in folders for row in tables.load(folder)]


def test_the_numbers_of_the_experiments_are_those_of_the_committed_results() -> None:
    text = (ROOT / "experiments" / "README.md").read_text()
    assert tables.fill(text, committed_rows()) == text
    spoilt = re.sub(r"\d(<!-- plane )", lambda m: f"{(int(m[0][0]) + 1) % 10}{m[1]}", text, count=1)
    assert spoilt != text
    assert tables.fill(spoilt, committed_rows()) == text


@pytest.mark.parametrize("part", ["worlds", "images"])
def test_the_prose_about_experiments_has_no_number_that_no_result_backs(part: str) -> None:
    """Measured numbers are decimals with a reference behind them; what is set is written in backquotes."""
    text = (ROOT / "experiments" / "README.md").read_text()
    prose = text.split(f"<!-- {part} -->")[1].split(f"<!-- /{part} -->")[0]
    prose = re.sub(r"<!-- (table|detail|frontier):.*?<!-- end -->", "", prose, flags=re.DOTALL)
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.DOTALL)
    prose = re.sub(r"-?[\d.]+\**<!--.*?-->", "", prose, flags=re.DOTALL)
    loose = re.findall(r"\d*\.\d+", prose)
    assert not loose, loose


def check_image_row(row: dict[str, Any]) -> None:
    """An image row says what the grid says of it, its commands included."""
    scale = row["world"].removeprefix(f"{row['experiment']}-")
    known = {r.name: r for r in image_rows(row["experiment"], scale)}
    method = known[f"{row['world']}-{row['dirt']}-{row['method']}"]
    assert (row["title"], row["told"], row["what"]) == (method.what.title, method.what.told, method.what.what)
    assert row["settings"] == settings_of(method, SCALE[scale])


def test_the_committed_results_are_those_of_the_rows_as_they_are_now() -> None:
    for row in committed_rows():
        if row["experiment"] == "linear-gaussian":
            continue
        if row["experiment"] in IMAGE_EXPERIMENTS:
            check_image_row(row)
            continue
        known = {r.name: r for r in rows_of(row["experiment"])}
        name = f"{row['world']}-{row['dirt']}-{row['method']}"
        method = known[name].what
        assert (row["title"], row["told"], row["what"]) == (method.title, method.told, method.what), name
        assert row["settings"] == row["settings"] | json.loads(json.dumps(dict(method.settings))), name
        assert len(row["seeds"]) >= known[name].seeds, name


@pytest.mark.parametrize("experiment", ["plane", "mixture", "invariance", "subspace"])
def test_the_committed_results_were_trained_as_the_command_trains_now(experiment: str) -> None:
    """Whole: sizes, lengths and the process too, so that a run that is on disk goes on."""
    known = {row.name: row for row in rows_of(experiment)}
    committed = tables.load(ROOT / "experiments" / "results" / "worlds" / experiment)
    assert committed
    for row in committed:
        name = f"{row['world']}-{row['dirt']}-{row['method']}"
        assert row["settings"] == row_settings(known[name], False, ImageOptions()), name


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "explanation" / "reliability.md").read_text()))
    there = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert named
    assert named <= there, named - there
