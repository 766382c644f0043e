"""What the documents show is run: the README's snippets, the examples, the demo; links and names exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

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


@pytest.mark.slow
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


EXPERIMENTS = ["experiments/README.md", "experiments/findings.md", "experiments/ACCELERATOR.md", "benchmarks/README.md"]
DOCUMENTS = ["README.md", *EXPERIMENTS, *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_files_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.slow
def test_drop_in_example_trains_a_stock_pipeline(tmp_path: Path) -> None:
    output = python(str(ROOT / "examples" / "drop_in.py"), "--images", "256", "--output", "out", cwd=tmp_path)
    assert "256 images, loss" in output
    DiffusionPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
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


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "explanation" / "reliability.md").read_text()))
    there = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert named
    assert named <= there, named - there
