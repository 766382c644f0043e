"""The experiment that attacks U-Nets of digits: its numbers, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from helpers import experiment
from pipelines import small_pipeline
from robustdiff.commands.main import parse

ROOT = Path(__file__).parents[2]


@pytest.fixture
def attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Small enough for a test; every row's network is the same untrained one."""
    module = experiment("attacked_digits")
    monkeypatch.setattr(module, "ATTACKS", module.Attacks(calls=5, points=4, draws=16, steps=4, restarts=1))
    monkeypatch.setattr(module, "SAMPLES", 80)
    small_pipeline("v_prediction").save_pretrained(tmp_path / "network")
    monkeypatch.setattr(module, "trained", lambda *_: tmp_path / "network")
    return module


def test_rows_are_measured_kept_and_not_measured_again(
    attacked: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plain", "shrunk-0.9", "relabelled-1.2"):
        attacked.bring(name, 1, tmp_path / "work", tmp_path, attacked.ATTACKS)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("digits-*.json")}
    plain, shrunk, relabelled = (
        found[f"digits-{name}"]["runs"]["0"] for name in ("plain", "shrunk-0.9", "relabelled-1.2")
    )
    assert plain["pgd_start"] > plain["signs_start"] > 0
    assert plain["pgd_all"] > plain["signs_all"] > 0
    # shrinking moves images and their spread alike; another label moves them otherwise
    assert {key: shrunk[key] for key in plain if key not in ("error", "spread")} == {
        key: plain[key] for key in plain if key not in ("error", "spread")
    }
    assert shrunk["spread"] == pytest.approx(0.9 * plain["spread"])
    assert relabelled["pgd_start"] != plain["pgd_start"]
    assert 0 < found["digits-plain"]["floor"] < plain["error"]
    table = attacked.table(tmp_path, "digits", list(attacked.ROWS), "plain")
    assert "| plain | 1 |" in table
    assert "+0 … +0 % / +0 … +0 % |" in table
    before = (tmp_path / "digits-plain.json").read_bytes()
    monkeypatch.setattr(attacked, "measure", lambda *_: pytest.fail("measured again"))
    attacked.bring("plain", 1, tmp_path / "work", tmp_path, attacked.ATTACKS)
    assert (tmp_path / "digits-plain.json").read_bytes() == before


def test_the_strong_attack_is_another_and_says_so(attacked: ModuleType, tmp_path: Path) -> None:
    for which in ("strong", "usual"):
        (tmp_path / which).mkdir()
    strong = attacked.dataclasses.replace(attacked.STRONG, calls=5, points=4, draws=16, steps=8)
    attacked.bring("plain", 1, tmp_path / "work", tmp_path / "strong", strong)
    attacked.bring("plain", 1, tmp_path / "work", tmp_path / "usual", attacked.ATTACKS)
    found, usual = (json.loads((tmp_path / which / "digits-plain.json").read_text()) for which in ("strong", "usual"))
    assert "APGD-8 x 3" in found["settings"]["attack"]
    assert "PGD-4" in usual["settings"]["attack"]
    assert found["runs"]["0"]["apgd_start"] > 0.99 * usual["runs"]["0"]["pgd_start"]
    assert "| APGD at the start | APGD at all steps |" in attacked.table(
        tmp_path / "strong", "digits", list(attacked.ROWS), "plain", "apgd"
    )


def test_every_row_is_a_command_that_can_be_typed(attacked: ModuleType) -> None:
    for row in attacked.ROWS.values():
        assert parse(["train", "DATA", *attacked.digits_demo.COMMON, *row.flags]) is not None
