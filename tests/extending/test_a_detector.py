"""A stranger adds a kind of damage: the code of docs/guide/detector.md, put into one file, is found by everything."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import robustdiff.audit.detectors as package
from fields import natural
from helpers import experiment
from robustdiff.audit import audit, detector, registered_detectors
from robustdiff.audit.parts import parts
from robustdiff.commands.main import main
from robustdiff.training.config import TrainConfig
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import to_uint8

DOCUMENT = (Path(__file__).parents[2] / "docs" / "guide" / "detector.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
COUNT = 600
HIT = torch.arange(COUNT) % 3 == 0


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The document's file among the detectors; the name of its kind."""
    assert "posterised" not in parts()
    folder = tmp_path / "detectors"
    folder.mkdir()
    (folder / "posterised.py").write_text(BLOCKS[0], encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.setattr(detector, "_registered", dict(detector._registered))
    monkeypatch.delitem(sys.modules, "robustdiff.audit.detectors.posterised", raising=False)
    yield "posterised"
    sys.modules.pop("robustdiff.audit.detectors.posterised", None)


def dirty() -> Tensor:
    """Pictures of which every third has eight grey levels, uint8."""
    (kind,) = [kind for kind in registered_detectors() if kind.name == "posterised"]
    images, generator = natural(COUNT), torch.Generator().manual_seed(0)
    for place in HIT.nonzero().flatten().tolist():
        images[place] = kind.simulate(images[place], 8, generator)
    return to_uint8(images)


def test_python_finds_it_and_says_what_the_document_says(added: str) -> None:
    result = audit(dirty())
    assert torch.equal(result.groups[added], HIT)
    assert result.summary() == BLOCKS[1].rstrip().replace("--auto", "`auto`")  # a command names its flag
    assert [row["name"] for row in result.to_rows() if added in row["groups"]] == [
        f"{place:03d}" for place in HIT.nonzero().flatten().tolist()
    ]
    assert (result.min_sigma > 0).equal(HIT)
    assert added not in audit(dirty(), without=[added]).groups


def test_the_command_and_its_files_name_it(added: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "dirty.npy", dirty()[:, 0].numpy())
    assert main(["audit", str(tmp_path / "dirty.npy"), "-o", str(tmp_path / "audit")]) == 0
    assert BLOCKS[1].rstrip() in capsys.readouterr().out
    found = json.loads((tmp_path / "audit" / "found.json").read_text())
    assert [one["part"] for one in found["findings"]] == [added]
    assert [image["groups"] for image in found["images"][:2]] == [[added], []]
    assert (tmp_path / "audit" / "found-soft.png").is_file()
    assert main(["report", str(tmp_path / "audit"), "-o", str(tmp_path / "report.html")]) == 0
    assert "of few grey levels" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_training_may_leave_it_out_and_the_accuracy_experiment_has_rows_of_it(added: str) -> None:
    TrainConfig("digits", auto=True, auto_without=(added,)).validate()
    with pytest.raises(UsageError, match=f"^`auto_without` dust: not one of cut, blur, jpeg, .*{added}, noise, holes"):
        TrainConfig("digits", auto=True, auto_without=("dust",)).validate()
    accuracy = experiment("audit_accuracy")
    assert [row for row in accuracy.simulated() if added in row] == [f"{added} 24 on 30 %", f"{added} 4 on 30 %"]
    row = accuracy.row("fields", natural(COUNT), f"{added} 4 on 30 %")
    assert 0.25 * COUNT < row["dirty"] < 0.35 * COUNT
    assert row["missed"] < 0.05 * row["dirty"]
    assert row["false"] == 0
    assert next(iter(row["levels"])) == added
    assert f"{added} 4 on 30 %" in accuracy.table([row])


def test_without_the_file_nobody_knows_it() -> None:
    assert "posterised" not in parts()
    assert not [row for row in experiment("audit_accuracy").simulated() if "posterised" in row]
