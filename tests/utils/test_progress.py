"""How far a long piece of work is, for people who look at a terminal and for those who read a log."""

from __future__ import annotations

import sys

import pytest

from robustdiff.utils import progress as module
from robustdiff.utils.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test moves."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("drawing", 1000, "image") as tell:
        for _ in range(25):  # two seconds each
            clock[0] += 2
            tell(40)
    assert capsys.readouterr().err.splitlines() == [
        f"drawing: {done} of 1000 images" for done in (200, 400, 600, 800, 1000)
    ]


def test_short_work_and_other_processes_say_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("drawing", 10, "image") as tell:
        tell(10)
    with progress("drawing", 10, "image", shown=False) as tell:
        clock[0] += 60
        tell(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_no_lines(clock: list[float], capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("drawing", 10, "image") as tell:
        clock[0] += 60
        tell(10)
    said = capsys.readouterr().err
    assert "drawing" in said
    assert "10 of 10 images" not in said
