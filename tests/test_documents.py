"""What the documents show is run: the README's commands and snippets, the examples; links, flags and names exist."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import robustdiff
from experiments.paper.config import EXPERIMENTS
from helpers import experiment
from robustdiff.commands import main
from robustdiff.commands.main import COMMANDS, known_flags
from robustdiff.data import load_images
from robustdiff.utils.images import save_png

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(path for path in ROOT.glob("docs/**/*.md"))
EXPERIMENT_PAGES = sorted(ROOT.glob("experiments/*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *PAGES, *EXPERIMENT_PAGES]
RESULTS = ROOT / "experiments" / "results"
FD = "FD-squeezenet10_imagenet"

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- what the README shows ------------------------------------------------------------------------------


def session() -> list[tuple[list[str], list[str]]]:
    """The README's session: every command, and the lines that it is shown to print."""
    (block,) = blocks(README, "console")
    parts = [part.splitlines() for part in block.split("$ ")[1:]]
    return [(shlex.split(command), printed) for command, *printed in parts]


def shown(line: str, output: str) -> bool:
    """Whether a line of the output holds the pieces of this one in their order; ``...`` stands for anything."""
    pieces = [re.escape(piece.strip()) for piece in line.split("...")]
    return re.search(rf"^\s*{'.*'.join(pieces)}", output, flags=re.MULTILINE) is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the README's commands have run, and everything that uses it does; the training is shorter than there."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command, printed in session():
            if command[0] == "robustdiff":
                words = [{"100k": "640", "64": "4"}.get(word, word) for word in command[1:]]
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    assert main.main(words) == 0
                if command[1] in ("corrupt", "audit"):
                    assert [line for line in printed if not shown(line, output.getvalue())] == []
        yield folder


@pytest.mark.slow
def test_the_commands_of_the_readme_run_and_print_what_it_shows(folder: Path) -> None:
    assert [command[:2] for command, _ in session()][1:] == [
        ["robustdiff", name] for name in ("corrupt", "audit", "train", "sample")
    ]
    assert all(printed for command, printed in session() if command[0] == "robustdiff")
    assert len(list((folder / "samples").glob("0*.png"))) == 4
    DiffusionPipeline.from_pretrained(folder / "model")


TRAIN = (ROOT / "docs" / "guide" / "train.md").read_text()
SNIPPETS = [*blocks(README, "python"), *blocks(TRAIN, "python")]


@pytest.mark.parametrize("code", SNIPPETS, ids=("audit", "loss", "fit", "fit in the guide"))
def test_the_python_of_the_documents_runs(code: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(load_images("digits").images[:100]):
        save_png(image, tmp_path / "photos" / f"{index:03}.png")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exec(compile(code, "snippet", "exec"), {})


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


def test_the_readme_lists_every_command_and_every_room() -> None:
    assert re.findall(r"^\* `(\w+)`: ", README.split("## Commands")[1].split("## Limits")[0], re.M) == list(
        dict.fromkeys(["train", "sample", "audit", "evaluate", "attack", "report", *COMMANDS])
    )
    rooms = re.findall(r"^\* `(\w+)`: ", README.split("## The ten rooms")[1], re.M)
    there = {path.parent.name for path in ROOT.glob("src/robustdiff/*/__init__.py")}
    assert set(rooms) == there
    assert len(rooms) == 10


def test_every_make_target_that_a_document_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {
        target for path in DOCUMENTS for target in re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), re.MULTILINE)
    }
    assert {"test", "test-all", "demo", "docs"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


# -- numbers in the documents are those of the committed results -------------------------------------------


def image_row(dirt: str, method: str) -> dict[str, Any] | None:
    path = RESULTS / "images" / "cifar10-cpu-old-sampler" / f"cifar10-cpu-{dirt}-{method}.json"
    return json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.parametrize(
    ("title", "dirt"),
    [
        ("clean", "clean"),
        ("noise of sigma 0.2", "gaussian-p0.9-s0.2"),
        ("outliers, 10 %", "outliers-q0.1"),
        ("lost pixels, 30 %", "missing"),
        ("JPEG 15", "jpeg"),
        ("blur, 1 pixel", "blur"),
        ("a mixture", "mixed"),
    ],
)
def test_the_table_of_the_readme_is_the_committed_result(title: str, dirt: str) -> None:
    cells = []
    for method in ("plain", "adversarial", "auto", "told", "clean-subset"):
        row = image_row(dirt, method)
        cell = f"{row['values'][FD]['mean'] / 1000:.1f}k" if row else "-"
        cells.append(f"**{cell}**" if method == "auto" else cell)
    assert f"| {title} | {' | '.join(cells)} |" in README


def world(name: str, method: str, measure: str = "w2") -> float:
    room = {"plane": "plane", "ring": "mixture", "grid": "mixture", "subspace": "subspace"}[name.split("-")[0]]
    values = json.loads((RESULTS / "worlds" / room / f"{name}-{method}.json").read_text())["values"]
    return values[measure]["mean"]


def fd(dirt: str, method: str) -> float:
    row = image_row(dirt, method)
    assert row is not None
    return row["values"][FD]["mean"] / 1000


def text_of(path: str) -> str:
    return " ".join((ROOT / path).read_text().split())


def test_the_prices_that_the_documents_name_are_those_of_the_results() -> None:
    readme, method = text_of("README.md"), text_of("docs/explanation/method.md")
    seconds = json.loads((RESULTS / "digits_demo.json").read_text())["training_seconds"]
    slower = f"{seconds['robust'] / seconds['plain']:.2f} times"
    strong = f"{fd('clean', 'gated-strong') / fd('clean', 'plain'):.2f} times"
    assert f"(a strong gate: {strong}), {slower} the time on digits" in readme
    assert f"{slower[:-6]} times as long" in method
    ring = [f"{world('ring-outliers', name):.3f}" for name in ("gated-strong", "gated-low", "plain")]
    grid = [f"{world('grid-outliers', name):.3f}" for name in ("gated-strong", "gated-low", "plain")]
    assert f"{ring[0][1:]} to {ring[1][1:]} for {ring[2][1:]}" in readme
    assert f"ring {ring[0]} and {ring[1]} (two gates) against {ring[2]} for plain training" in method
    assert f"grid {grid[0]} and {grid[1]} against {grid[2]}" in method
    clean = [f"{fd('clean', name):.1f}k" for name in ("plain", "gated", "gated-strong")]
    assert (
        f"plain {clean[0]}, the preset `gated` {clean[1]} (a third more), a strong gate {clean[2]} ({strong})" in method
    )
    assert 1.3 < fd("clean", "gated") / fd("clean", "plain") < 1.4


def test_the_free_remedies_are_as_good_as_the_method_page_says() -> None:
    text, noised = text_of("docs/explanation/method.md"), "gaussian-p0.9-s0.2"
    names = ("label-floor", "gated-strong", "gated", "plain")
    floor, strong, gated, plain = (f"{fd(noised, name):.1f}k" for name in names)
    assert f"noised CIFAR-10 {floor} against {strong} for the strong gate, {gated} for `gated` and {plain}" in text
    assert f"at {fd('clean', 'label-floor'):.1f}k on clean data" in text
    relabelled, huber, plain_w2 = (
        {name: f"{world(f'{name}-outliers', method):.3f}" for name in ("plane", "ring", "grid")}
        for method in ("relabelled", "pseudo-huber", "plain")
    )
    assert f"(Wasserstein distance {relabelled['plane']} against {plain_w2['plane']})" in text
    assert f"({relabelled['ring']} against {plain_w2['ring']}, {relabelled['grid']} against {plain_w2['grid']})" in text
    assert f"the plane ({huber['plane']}) and worse than plain training on ring ({huber['ring']})" in text
    assert f"and grid ({huber['grid']})" in text
    subspace = {
        method: f"{world('subspace-outliers', method, 'frechet'):.2f}"
        for method in ("relabelled", "pseudo-huber", "plain")
    }
    assert f"({subspace['relabelled']} against {subspace['plain']})" in text
    assert f"on the subspace ({subspace['pseudo-huber']})" in text


def test_the_table_of_what_the_audit_finds_is_the_committed_result() -> None:
    text = (ROOT / "docs" / "explanation" / "audit-results.md").read_text()
    rows = json.loads((RESULTS / "audit.json").read_text())["rows"]

    def share(part: int, whole: int) -> str:
        if not whole or part in (0, whole):
            return "-" if not whole else str(100 * part // whole)
        percent = 100 * part / whole
        return "<0.1" if percent < 0.05 else f"{percent:.1f}" if percent < 10 else f"{percent:.0f}"

    for damage in dict.fromkeys(row["dirt"] for row in rows):
        cells = [
            f"{share(row['missed'], row['dirty'])} / {share(row['false'], row['images'] - row['dirty'])}"
            for row in rows
            if row["dirt"] == damage
        ]
        assert f"| {damage} | {' | '.join(cells)} |" in text


# -- names in the documents exist --------------------------------------------------------------------------


@document
def test_lines_are_short(path: Path) -> None:
    assert [line for line in path.read_text().splitlines() if len(line) > 120] == []


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@document
def test_links_between_files_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", path.read_text()):
        if target.startswith("https://"):
            continue
        there = path.parent / target if target else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def command_lines(text: str) -> list[list[str]]:
    """The ``robustdiff`` commands of a text, in blocks or inline, as words."""
    code = [
        line for block in re.findall(r"^```.*?\n(.*?)^```", text, flags=re.DOTALL | re.M) for line in block.split("\n")
    ]
    code += re.findall(r"`([^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))
    found = []
    for line in code:
        match = re.search(r"(?:^|\$ |-m )robustdiff (.*)", " ".join(line.split("#")[0].split()))
        if match:
            found.append(match[1].split())
    return found


@document
def test_commands_and_their_flags_exist(path: Path) -> None:
    for name, *words in command_lines(path.read_text()):
        if not re.fullmatch("[a-z]+", name) or (path.name == "CHANGELOG.md" and name == "reproduce"):
            continue  # robustdiff COMMAND; the old name of an experiment
        if re.fullmatch(r"(\w+ )?\d", " ".join(words)):
            continue  # the name of a file format, such as robustdiff audit 1
        assert name in COMMANDS
        flags = {*known_flags(COMMANDS[name].config), "--help"}
        flags |= {flag.replace("--", "--no-", 1) for flag in flags}
        given = {word.split("=")[0] for word in words if re.match("--?[a-z]", word)}
        assert given <= flags, (name, given - flags)


OTHERS = {
    *("--multi_gpu", "--num_processes", "--nproc_per_node", "--cpu"),  # launchers
    *("--extra-index-url", "--from-mixture"),
    *("--train-data-dir", "--dataset-name", "--version"),
    *("--dataset_config", "--min_timestep", "--data_backend_config", "--flow_custom_timesteps"),  # other trainers
}
"""Flags of other programs, and those that the command takes in other names."""


def experiment_flags() -> set[str]:
    """What the experiments take: their argument parsers, read as text, and the paper's."""
    texts = (
        [path.read_text() for path in ROOT.glob("experiments/**/*.py")]
        + [path.read_text() for path in ROOT.glob("benchmarks/*.py")]
        + [path.read_text() for path in ROOT.glob("examples/*.py")]
    )
    flags = {flag for text in texts for flag in re.findall(r"\"(--[a-z][\w-]*)\"", text)}
    config = importlib.import_module("experiments.paper.config").ReproduceConfig
    return flags | {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config)}


@document
def test_flags_exist(path: Path) -> None:
    if path.name == "lab-notes.md":
        return  # it names what was
    known = {flag for command in COMMANDS.values() for flag in known_flags(command.config)}
    known |= {flag.replace("--", "--no-", 1) for flag in known} | {"--help"} | OTHERS | experiment_flags()
    named = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", path.read_text()))
    assert named <= known, named - known


@document
def test_experiments_that_are_named_exist(path: Path) -> None:
    for name, argument in re.findall(r"python -m experiments\.([a-z]\w*) ?([a-z][\w-]*)?", path.read_text()):
        module: ModuleType = experiment(name)
        assert module.__doc__
        if name == "paper" and argument:
            assert argument in EXPERIMENTS


@document
def test_dotted_names_exist(path: Path) -> None:
    if path.name in ("CHANGELOG.md", "lab-notes.md"):
        return  # they name what was
    for name in set(re.findall(r"\brobustdiff((?:\.[A-Za-z_]\w*)+)\b", path.read_text())):
        thing: Any = robustdiff
        for part in name.strip(".").split("."):
            thing = getattr(thing, part, None) or importlib.import_module(f"{thing.__name__}.{part}")


def test_files_that_the_code_names_exist() -> None:
    for source in [path for room in ("src", "experiments", "tests") for path in ROOT.glob(f"{room}/**/*.py")]:
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", source.read_text()):
            assert (ROOT / name).is_file(), (source.name, name)


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "explanation" / "reliability.md").read_text()))
    texts = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    there = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.M)}
    assert named
    assert named <= there, named - there


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"^ +- (?:[\w ]+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    written = [name for name in navigation if not name.startswith("reference/")]
    assert sorted(written) == sorted(str(path.relative_to(ROOT / "docs")) for path in PAGES)


# -- examples, public names --------------------------------------------------------------------------------


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
    text = example.read_text()
    assert 35 <= len(text.splitlines()) <= 80
    (names,) = re.findall(r"^from robustdiff import (.*)$", text, flags=re.MULTILINE)
    assert set(names.split(", ")) <= set(robustdiff.__all__)
    assert "from robustdiff." not in text


def test_every_public_name_can_be_imported_and_is_documented() -> None:
    for name in robustdiff.__all__:
        text = getattr(robustdiff, name).__doc__
        assert text, name
        assert not text.startswith(f"{name}("), name  # what dataclasses write of themselves
