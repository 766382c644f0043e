"""How right the audit is: rows anew on digits, what must hold of the committed ones, and what the documents say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers import experiment
from robustdiff.data.dataset import load_images

ROOT = Path(__file__).parents[2]
COMMITTED: dict[str, Any] = json.loads((ROOT / "experiments" / "results" / "audit.json").read_text())


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    return experiment("audit_accuracy")


@pytest.mark.parametrize("dirt", ["clean", "gaussian 0.2 on 90 %", "missing 30 % of pixels, on 90 %", "mixed"])
def test_committed_rows_are_those_of_the_audit_as_it_is(accuracy: ModuleType, dirt: str) -> None:
    (before,) = [row for row in COMMITTED["rows"] if row["dirt"] == dirt and row["set"].startswith("digits")]
    now = accuracy.row(before["set"], load_images("digits").x0(slice(None)), dirt)
    assert (now["images"], now["dirty"]) == (before["images"], before["dirty"])
    for key in ("missed", "false"):  # another processor may round an image over the border
        assert abs(now[key] - before[key]) <= 3
    assert now["levels"].keys() == before["levels"].keys()
    for part, levels in before["levels"].items():
        assert now["levels"][part] == pytest.approx(levels, rel=0.02)


def test_no_clean_set_is_called_dirty() -> None:
    clean = [row for row in COMMITTED["rows"] if row["dirt"] == "clean"]
    assert len(clean) == 5
    assert all(row["false"] == 0 for row in clean)


def test_the_committed_result_has_every_row(accuracy: ModuleType) -> None:
    assert COMMITTED["protocol"]["dirt"] == {name: list(specs) for name, specs in accuracy.DIRT.items()}
    assert len(COMMITTED["rows"]) == 5 * len(accuracy.DIRT)


def test_committed_copies_are_those_of_the_search_as_it_is(accuracy: ModuleType) -> None:
    (before,) = [row for row in COMMITTED["copies"] if row["set"].startswith("digits")]
    now = accuracy.copied(before["set"], load_images("digits").x0(slice(None)))
    assert now["own"] == before["own"] == []
    for change, count in before["found"].items():
        assert abs(now["found"][change] - count) <= 3
    assert all(set(row["own"]) <= {2, 3} for row in COMMITTED["copies"])
