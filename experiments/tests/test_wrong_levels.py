"""Noise levels told wrongly on purpose: what is told, and that the documents show what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers import experiment
from robustdiff.data.corruption import Corruption

ROOT = Path(__file__).parents[2]
COMMITTED: dict[str, Any] = json.loads((ROOT / "experiments" / "results" / "wrong_levels.json").read_text())
DIRT = Corruption.parse("gaussian:sigma=0.2,fraction=0.9")


@pytest.fixture(scope="module")
def wrong() -> ModuleType:
    return experiment("wrong_levels")


def test_what_is_told_is_the_truth_a_multiple_of_it_or_flipped_for_a_fifth(wrong: ModuleType) -> None:
    noisy = torch.tensor([DIRT.hits(3, index) for index in range(2000)])
    for row, factor in wrong.FACTORS.items():
        told = torch.tensor(wrong.levels(row, DIRT, 2000, 3))
        torch.testing.assert_close(told, 0.2 * factor * noisy.float())
    told = torch.tensor(wrong.levels(wrong.FLIPPED, DIRT, 2000, 3))
    assert told.unique().tolist() == pytest.approx([0.0, 0.2])
    for kind in (noisy, ~noisy):
        assert ((told > 0) != noisy)[kind].double().mean() == pytest.approx(0.2, abs=0.05)


def test_the_committed_result_has_every_row(wrong: ModuleType) -> None:
    assert [row["row"] for row in COMMITTED["rows"]] == list(wrong.ROWS)
    assert COMMITTED["protocol"]["dirt"] == wrong.digits_demo.DIRT


def test_a_run_that_is_there_is_not_trained_again(wrong: ModuleType, tmp_path: Path, monkeypatch) -> None:
    calls = []

    class Done:
        returncode = 0

    monkeypatch.setattr(wrong.subprocess, "run", lambda command, **_: calls.append(command) or Done())
    (tmp_path / "train.npy").touch()
    for _ in range(2):
        wrong.train("plain", tmp_path, "1k", 0)
    (command,) = calls
    assert command[1:4] == ["-m", "robustdiff", "train"]
    assert command[-2:] == ["--preset", "plain"]
    Done.returncode = 1
    with pytest.raises(SystemExit, match=r"training auto-seed0 failed, see .*auto-seed0\.log"):
        wrong.train("auto", tmp_path, "1k", 0)
