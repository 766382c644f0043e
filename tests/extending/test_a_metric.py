"""A stranger adds a metric in one file; library, command, result file, model card and report know it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from robustdiff.commands.main import main
from robustdiff.evaluation import compute_metrics, metric
from robustdiff.evaluation.extractors import open_extractor
from robustdiff.evaluation.features import Features

FILE = '''
"""Distance of the means."""

from robustdiff.evaluation import Metric, register_metric


@register_metric
class MeanShift(Metric):
    """How far the mean of the features has moved."""

    better = {"mean shift": "lower"}

    def compute(self, fake, real, *, seed=0, progress=None):
        """Euclidean."""
        return {"mean shift": float((fake.double().mean(0) - real.double().mean(0)).norm())}

    def cost(self, n, m, d):
        """Of the means."""
        return (n + m) * d
'''
OWN = ["FD-pixels", "KID-pixels", "precision", "recall", "density", "coverage"]
OWN += ["clipped density", "clipped coverage", "vendi", "diversity"]


def load(path: Path, text: str = FILE) -> None:
    """Import a file, as a stranger would."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The metric, for one test."""
    metric.registered_metrics()
    monkeypatch.setattr(metric, "_registered", dict(metric._registered))
    load(tmp_path / "mean_shift.py")
    return "mean shift"


def pictures(count: int, seed: int, brighter: int = 0) -> np.ndarray:
    """Grey, 5 x 5."""
    return np.random.default_rng(seed).integers(0, 200, (count, 5, 5), np.uint8) + np.uint8(brighter)


def features(images: np.ndarray) -> Features:
    """The pixels themselves."""
    return Features(torch.from_numpy(images).flatten(1).double() / 255, open_extractor("pixels"), "", False)


def test_the_library_reports_it_with_its_floor_interval_and_direction(added: str) -> None:
    fake, real, more = features(pictures(40, 0, 20)), features(pictures(60, 1)), features(pictures(40, 2))
    quality = compute_metrics(fake, real, more)
    assert [value.name for value in quality.values] == [*OWN, added]
    value = quality.values[-1]
    assert value.value == pytest.approx(float((fake.values.mean(0) - real.values.mean(0)).norm()))
    assert value.floor == pytest.approx(float((more.values.mean(0) - real.values.mean(0)).norm()))
    assert value.floor < value.value / 2
    assert value.better == "lower"
    assert value.interval is not None
    assert value.interval[0] < value.value < value.interval[1]
    assert value.about == {"floor_n": [40, 60]}


def test_the_command_its_files_and_the_report_name_it(added: str, tmp_path: Path, capsys) -> None:
    for name, images in (("fake", pictures(40, 0, 20)), ("real", pictures(60, 1))):
        np.save(tmp_path / f"{name}.npy", images)
    out = tmp_path / "run" / "evaluation"
    arguments = ["--reference", str(tmp_path / "real.npy"), "--cache", "none", "--training", "none", "-o", str(out)]
    assert main(["evaluate", str(tmp_path / "fake.npy"), *arguments]) == 0
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if added in line)
    assert " floor " in line
    (path,) = out.glob("quality-*.json")
    entry = json.loads(path.read_text())["values"][added]
    assert entry["better"] == "lower"
    assert 0 < entry["floor"] < entry["value"]
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "report.html")]) == 0
    assert added in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_are_taken_once_and_a_file_read_again_replaces_its_own(added: str, tmp_path: Path) -> None:
    load(tmp_path / "mean_shift.py")
    assert sum(added in one.better for one in metric.registered_metrics()) == 1
    with pytest.raises(ValueError, match=r"metric MeanShift: mean_shift\.MeanShift has a number called 'mean shift'"):
        load(tmp_path / "another.py")
    with pytest.raises(ValueError, match="metric MeanShift needs `better`"):
        load(tmp_path / "third.py", FILE.replace("    better =", "    worse ="))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"mean shift":', '"FD-pixels":'), "metric MeanShift: 'FD-pixels' is taken"),
        (('return {"mean shift"', 'return {"shift"'), "metric MeanShift: found shift, but `better` names mean shift"),
        (("float((fake", "((fake"), None),  # a tensor of one number is one
        (("float((fake.double().mean(0) - real.double().mean(0)).norm())", "fake"), "MeanShift: found what is no num"),
    ],
)
def test_what_a_metric_finds_is_what_it_declares(
    change: tuple[str, str], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric.registered_metrics()
    monkeypatch.setattr(metric, "_registered", dict(metric._registered))
    load(tmp_path / "changed.py", FILE.replace(*change))
    fake, real = features(pictures(40, 0, 20)), features(pictures(60, 1))
    if message is None:
        assert type(compute_metrics(fake, real).values[-1].value) is float
        return
    with pytest.raises(ValueError, match=message):
        compute_metrics(fake, real)


def test_a_metric_below_zero_has_no_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric.registered_metrics()
    monkeypatch.setattr(metric, "_registered", dict(metric._registered))
    load(tmp_path / "below.py", FILE.replace("float((fake", "-float((fake"))
    value = compute_metrics(features(pictures(40, 0, 20)), features(pictures(60, 1))).values[-1]
    assert value.value < 0
    assert value.interval is None


def test_what_is_no_metric_is_not_registered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric MeanShift must be a subclass of Metric"):
        load(tmp_path / "plain.py", FILE.replace("MeanShift(Metric)", "MeanShift"))
    with pytest.raises(ValueError, match="`better` of 'mean shift' 'up' is not one of lower, higher, neither"):
        load(tmp_path / "up.py", FILE.replace('"lower"', '"up"'))


def test_without_the_file_nobody_knows_it() -> None:
    assert [name for one in metric.registered_metrics() for name in one.better][2:] == OWN[2:]
