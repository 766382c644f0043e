"""``~`` in every path of every command is the home folder, as shells do not say in ``--output=~/x``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from command_line import fails, tree
from robustdiff.commands import main
from robustdiff.commands.main import COMMANDS
from robustdiff.utils.errors import UsageError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def texts(config: type) -> list[str]:
    """Settings that may hold a path."""
    return [field.name for field in dataclasses.fields(config) if "str" in str(field.type) or "Text" in str(field.type)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_that_may_hold_a_path(command: str, home: Path) -> None:
    config = COMMANDS[command].config
    needed = {field.name: "x" for field in dataclasses.fields(config) if field.default is dataclasses.MISSING}
    assert texts(config)
    for name in texts(config):
        several = "tuple" in str(next(field.type for field in dataclasses.fields(config) if field.name == name))
        for text, meant in (("~/x", f"{home}/x"), ("~", str(home)), ("a/~/x", "a/~/x"), ("pixels", "pixels")):
            value = (text, text) if several else text
            made = config(**{**needed, name: value})
            assert getattr(made, name) == ((meant, meant) if several else meant)


@pytest.mark.parametrize("equals", [True, False])
def test_what_is_written_lands_there_and_nothing_here(home, here, photos, pipeline, capsys, equals: bool) -> None:
    photos.rename(home / "photos")
    (home / "model").symlink_to(pipeline)

    def to(flag: str, path: str) -> list[str]:
        return [f"{flag}={path}"] if equals else [flag, path]

    for arguments in (
        ["audit", "~/photos", *to("--output", "~/audit")],
        ["corrupt", "~/photos", "~/dirty", "--corrupt", "gaussian:sigma=0.1"],
        ["sample", "~/model", *to("-o", "~/samples"), "-n", "1", "--steps", "2"],
        ["purify", "~/photos", "~/model", *to("--output", "~/pure"), "--steps", "1", "--strength", "0.1"],
    ):
        assert main.main(arguments) == 0, capsys.readouterr().err
    written = {path.name for path in home.iterdir()}
    assert written == {"photos", "model", "audit", "dirty", "samples", "pure"}
    assert tree(here) == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_home_of_nobody_is_one_line(command: str, here: Path, capsys) -> None:
    """It would become a folder of that name, or a stack trace."""
    config = COMMANDS[command].config
    needed = {field.name: "x" for field in dataclasses.fields(config) if field.default is dataclasses.MISSING}
    for name in texts(config):
        several = "tuple" in str(next(field.type for field in dataclasses.fields(config) if field.name == name))
        made = config(**{**needed, name: ("~nobody9/y",) if several else "~nobody9/y"})
        if name in ("title", "told", "class_label") or name.endswith(("split", "column")):
            made.check_homes()
        else:
            with pytest.raises(
                UsageError, match=f"`{name}` ~nobody9/y: there is no user 'nobody9' here: write ./~nobody"
            ):
                made.validate()
    assert tree(here) == {}


def test_the_home_of_nobody_is_made_by_no_command(here: Path, photos: Path, capsys) -> None:
    line = fails(capsys, "audit", str(photos), "--output=~nobody9/y")
    assert line.startswith("robustdiff: --output ~nobody9/y: there is no user 'nobody9'")
    assert main.main(["audit", str(photos), "--output=./~nobody9/y"]) == 0
    assert [path.name for path in here.iterdir()] == ["~nobody9"]


@pytest.mark.parametrize("output", ["~/photos", "~/photos/run", "~"])
def test_the_data_is_no_output_under_that_name_either(home, here, photos, capsys, output: str) -> None:
    photos.rename(home / "photos")
    before = tree(home)
    assert "lie inside one another" in fails(
        capsys, "train", str(home / "photos"), f"--output-dir={output}", "--dry-run"
    )
    if output != "~":
        assert "lies in" in fails(capsys, "audit", str(home / "photos"), f"--output={output}")
    assert tree(home) == before
    assert tree(here) == {}
