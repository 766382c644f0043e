"""The library names parameters, a command its flags; the two meet in one place."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from tyro.conf import Positional, arg

import robustdiff
from robustdiff.commands.flags import Say, flags, speak
from robustdiff.commands.main import Command, main
from robustdiff.data.dataset import DataError, load_images
from robustdiff.evaluation.extractors import open_extractor
from robustdiff.utils.errors import RobustdiffWarning, TrainingError, UsageError
from robustdiff.utils.signals import Interrupted

FOREIGN = {"--multi_gpu", "--cpu", "--num_processes", "--num", "--local-dir"}
FOREIGN |= {"--dataset_config", "--min_timestep", "--data_backend_config", "--flow_custom_timesteps"}
"""Flags of other programs, which a message may name."""


@dataclass(frozen=True)
class Shop:
    """A command."""

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """What."""
    n: Annotated[int, arg(aliases=["-n"])] = 1
    """How many."""
    bad_share: float = 0.0
    """How bad."""
    ema: bool = True
    """Whether."""
    max_memory_gib: float = 0.0
    """How large."""

    def validate(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class Other:
    """Another command."""

    label_floor: float = 0.0
    """How low."""
    n: int = 1
    """How many."""


def test_parameters_become_the_flags_of_the_command() -> None:
    say = speak(Shop, {"share": "bad_share"}, [Other])
    assert say("`bad_share` 2 of `data` x: lower `n`") == "--bad-share 2 of DATA x: lower -n"
    assert say("`share` and `max_memory` 0") == "--bad-share and --max-memory-gib 0"  # the library's names
    assert say("`ema=False` or `ema`") == "--no-ema or --ema"
    assert say("sample with `label_floor` 0.1") == "sample with --label-floor 0.1"  # another command's
    assert say("see `robustdiff audit`, `nothing`, ``n`` or n") == "see `robustdiff audit`, `nothing`, `-n` or n"
    assert flags(Other) == {"label_floor": "--label-floor", "n": "-n"}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UsageError("`share` is 2"), 2, "--bad-share is 2"),
        (TrainingError("try a lower `n`"), 1, "try a lower -n"),
        (Interrupted("go on with `data`", 143), 143, "go on with DATA"),
    ],
)
def test_all_that_a_command_says_names_flags(
    error: Exception, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Shop, say: Say) -> int:
        say("`share` of `nobody`")
        warnings.warn("`n` is small", RobustdiffWarning, stacklevel=2)
        raise error

    shop = Command(Shop, run, "", aliases={"share": "bad_share"})
    assert main(["shop", "x"], {"shop": shop, "other": shop}) == status
    heard = capsys.readouterr()
    assert heard.out == "--bad-share of `nobody`\n"
    assert heard.err == f"robustdiff: warning: -n is small\nrobustdiff: {said}\n"


def test_callers_of_the_library_read_parameters(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"digits: the built-in digits cannot use `config` x: leave it out"):
        load_images("digits", config="x")
    with pytest.raises(DataError, match=r"`max_bad_fraction` must be in \[0, 1\], got 2"):
        load_images("digits", max_bad_fraction=2)
    with pytest.raises(UsageError, match=r"^`extractor` 'resnet' is none of: "):
        open_extractor("resnet")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["audit", "digits", "--dataset-config-name", "x"], "cannot use --dataset-config-name x"),
        (["train", "digits", "--evaluate-every", "64", "--evaluate-reference", "digits", "--evaluate-extractor", "y"],
         "--evaluate-extractor 'y' is none of"),
        (["evaluate", "digits", "--reference", "digits", "--extractor", "y"], "--extractor 'y' is none of"),
        (["train", "digits", "--no-use-ema", "--ema-max-decay", "0.5"], "does nothing with --no-use-ema"),
    ],
)  # fmt: skip
def test_commands_name_their_own_flags(
    command: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert said in capsys.readouterr().err


def strings(path: Path) -> list[tuple[int, str]]:
    """All strings of a module with their lines, less help texts of settings and other names of their flags."""
    tree, spared = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            spared |= {one.value for one in node.body if isinstance(one, ast.Expr)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "arg":
            spared |= set(ast.walk(node))
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [(node.lineno, node.value) for node in texts if node not in spared]


def test_only_commands_know_flags() -> None:
    package = Path(robustdiff.__file__).parent
    found = [
        f"{path.relative_to(package)}:{line}: {flag}"
        for path in sorted(package.rglob("*.py"))
        if "commands" not in path.relative_to(package).parts
        for line, text in strings(path)
        for flag in re.findall(r"--[a-z][\w-]*", text)
        if flag not in FOREIGN | {"--help"}
    ]
    assert found == [], f"name the parameter in backticks, such as `max_bad_fraction`: {found}"
