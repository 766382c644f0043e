"""The demo, small, and the estimate of noise: each is run as a person runs it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from experiments import digits_demo

ROOT = Path(__file__).parents[2]


def module(*arguments: str) -> None:
    """``python -m experiments.NAME ...`` from the root of the repository."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_takes_long_is_said_again_until_it_ends(monkeypatch, capsys) -> None:
    monkeypatch.setattr(digits_demo, "PATIENCE", 0.01)
    with digits_demo.saying("sampling"):
        time.sleep(0.2)
    first, *again = capsys.readouterr().out.splitlines()
    assert first == "  sampling"
    assert len(again) >= 3
    assert all(re.fullmatch(r"  sampling: \d+ s", line) for line in again)
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_the_demo_runs_and_writes_what_it_promises(tmp_path: Path) -> None:
    module("experiments.digits_demo", "--output", str(tmp_path / "demo"), "--images", "256", "--samples", "80")
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    names = [row["row"] for row in results["rows"]]
    assert names[-2:] == ["robust", "--auto"]
    assert len(names) == 10
    rows = {row["row"]: row for row in results["rows"]}
    floor, dirty = rows["clean training digits (the floor)"], rows["dirty training digits"]
    assert 0 < floor["frechet"] < dirty["frechet"]
    # sigma 0.2 on 90 % of the images, before clipping: 0.19
    assert floor["noise"] < 0.06 < dirty["noise"] < 0.19
    assert (tmp_path / "demo" / "figure.png").stat().st_size > 10_000
    table = (tmp_path / "demo" / "table.md").read_text().splitlines()
    assert len(table) == 12


def test_the_noise_experiment_runs_and_its_committed_result_says_how_it_was_got(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    module("experiments.noise_estimates", "--images", "12", "--output", str(found))
    now = json.loads(found.read_text())
    committed = json.loads((ROOT / "experiments" / "results" / "noise_estimates.json").read_text())
    assert now["protocol"] == committed["protocol"]
    assert [row["set"] for row in now["rows"]] == ["digits 8 x 8"]
    assert now["rows"][0].keys() == committed["rows"][0].keys()
