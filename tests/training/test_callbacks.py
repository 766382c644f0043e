"""Evaluation during training: the same numbers as the command's, no trace in the weights, the best kept, resumed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import TINY_UNET
from robustdiff import load_images
from robustdiff.commands import main
from robustdiff.evaluation import open_extractor
from robustdiff.evaluation.metrics import compute_metrics
from robustdiff.training.callbacks import EvaluationCallback, evaluation


def digits_like(n: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (60 + 40 * random.normal(size=(n, 1, 1)) + 20 * random.normal(size=(n, 8, 8))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUSTDIFF_CACHE", str(tmp_path / "cache"))
    np.save(tmp_path / "data.npy", digits_like(40, 0))
    np.save(tmp_path / "clean.npy", digits_like(30, 1))
    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET))
    return tmp_path


def train(here: Path, name: str, *more: str, images: int = 96) -> int:
    fixed = ["--images", str(images), "--batch-size", "8", "--ddpm-num-steps", "100", "--preview-images", "0"]
    fixed += ["--model-config-name-or-path", str(here / "unet.json"), "--ddpm-num-inference-steps", "5"]
    fixed += ["--learning-rate", "0.002", "--checkpointing-steps", "4", "--checkpoints-total-limit", "9"]
    return main.main(["train", str(here / "data.npy"), "--output-dir", str(here / name), *fixed, *more])


def during(here: Path, *more: str) -> list[str]:
    reference = ["--evaluate-reference", str(here / "clean.npy"), "--evaluate-n", "20"]
    return ["--evaluate-every", "24", *reference, *more]


def lines(here: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (here / name / "evaluation" / "during.jsonl").read_text().splitlines()]


def test_numbers_are_those_of_the_command_and_the_weights_do_not_notice(here, capsys) -> None:
    assert train(here, "run", *during(here)) == 0
    assert train(here, "without") == 0
    for file in ("unet/diffusion_pytorch_model.safetensors", "metrics.jsonl"):
        ours, theirs = (here / name / file for name in ("run", "without"))
        if file.endswith("jsonl"):
            timed = ("images_per_second",)
            a, b = ([json.loads(line) for line in path.read_text().splitlines()] for path in (ours, theirs))
            assert [{k: v for k, v in line.items() if k not in timed} for line in a] == [
                {k: v for k, v in line.items() if k not in timed} for line in b
            ]
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    found = lines(here, "run")
    assert [(line["step"], line["images"]) for line in found] == [(3, 24), (6, 48), (9, 72), (12, 96)]
    assert [line["n"] for line in found] == [20] * 4
    values = [line["values"]["FD-pixels"]["value"] for line in found]
    assert len(set(values)) == 4
    printed = capsys.readouterr().out
    assert f"step 3: FD-pixels {values[0]:.4g}" in printed

    out = str(here / "out")
    arguments = ["-n", "20", "--steps", "5", "--training", "none", "--cache", "none"]
    reference = ["--reference", str(here / "clean.npy")]
    assert main.main(["evaluate", str(here / "run"), *reference, *arguments, "-o", out]) == 0
    (result,) = (json.loads(path.read_text()) for path in (here / "out").glob("quality-*.json"))
    for name, value in result["values"].items():
        assert found[-1]["values"][name]["value"] == pytest.approx(value["value"], rel=1e-9)
        assert found[-1]["values"][name]["floor"] == pytest.approx(value["floor"], rel=1e-9)

    best = json.loads((here / "run" / "evaluation" / "best.json").read_text())
    assert best["value"] == min(values)
    assert best["step"] == found[values.index(min(values))]["step"]
    assert main.main(["evaluate", str(here / "run" / "best"), *reference, *arguments, "-o", f"{out}-best"]) == 0
    (kept,) = (json.loads(path.read_text()) for path in (here / "out-best").glob("quality-*.json"))
    assert kept["values"]["FD-pixels"]["value"] == pytest.approx(min(values), rel=1e-9)
    assert main.main(["report", str(here / "run"), "-o", str(here / "report.html")]) == 0
    page = (here / "report.html").read_text()
    assert "evaluated during training" in page
    assert "not shown" not in page


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_lines_and_the_same_best(here, monkeypatch) -> None:
    assert train(here, "whole", *during(here)) == 0
    measured = EvaluationCallback.measure

    def killed(self, pipeline, step, seen):
        if step == 9:
            raise KeyboardInterrupt
        return measured(self, pipeline, step, seen)

    monkeypatch.setattr(EvaluationCallback, "measure", killed)
    assert train(here, "cut", *during(here)) == 130  # checkpoints at 4 and 8: step 6 was measured, 9 was not
    monkeypatch.setattr(EvaluationCallback, "measure", measured)
    assert [line["step"] for line in lines(here, "cut")] == [3, 6]
    assert train(here, "cut", *during(here), "--resume") == 0
    assert lines(here, "cut") == lines(here, "whole")
    for name in ("evaluation/best.json", "best/unet/config.json"):
        assert json.loads((here / "cut" / name).read_text()) == json.loads((here / "whole" / name).read_text())
    ours, theirs = (load_file(here / n / "best/unet/diffusion_pytorch_model.safetensors") for n in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    # Resumed earlier than the last line: what came later comes again, once.
    assert train(here, "cut", *during(here), "--resume-from-checkpoint", "step-4") == 0
    assert lines(here, "cut") == lines(here, "whole")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--evaluate-every", "24"], "--evaluate-every needs --evaluate-reference"),
        (["--evaluate-n", "20"], "--evaluate-n needs --evaluate-every"),
        (["--evaluate-every", "often", "--evaluate-reference", "x"], "--evaluate-every 'often'"),
        (["--evaluate-every", "24", "--evaluate-reference", "{tmp}/none"], "--evaluate-reference"),
        (["--evaluate-every", "24", "--evaluate-reference", "{tmp}/few.npy"], "has 5 images; at least 14"),
        (["--evaluate-every", "24", "--evaluate-reference", "{tmp}/clean.npy", "--evaluate-n", "9"], "at least 14"),
        (
            ["--evaluate-every", "24", "--evaluate-reference", "{tmp}/clean.npy", "--evaluate-extractor", "x.pt"],
            "--evaluate-extractor",
        ),
    ],
)
def test_bad_input_is_known_before_training(here, capsys, more, says) -> None:
    np.save(here / "few.npy", digits_like(5, 2))
    assert train(here, "run", *(text.format(tmp=here) for text in more)) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"every": 0}, "every >= 1, got 0"), ({"n": 13}, "n >= 14, got 13"), ({"metric": "is"}, "metric to be fd or kid")],
)
def test_an_evaluation_that_cannot_be_is_refused_when_it_is_made(here, changes, says) -> None:
    reference = load_images(str(here / "clean.npy"))
    with pytest.raises(ValueError, match=f"EvaluationCallback needs {says}"):
        EvaluationCallback(here, reference, open_extractor("pixels"), **{"every": 1, **changes})


def test_an_evaluation_that_fails_never_ends_training(here, monkeypatch, capfd) -> None:
    """It is said, counted, and written; the weights are those of a run without."""
    count = []

    def failing(*arguments, **settings):
        count.append(1)
        if len(count) in (2, 3):
            raise RuntimeError("no kernel image\nis available")
        return compute_metrics(*arguments, **settings)

    monkeypatch.setattr(evaluation, "compute_metrics", failing)
    assert train(here, "run", *during(here)) == 0
    found = lines(here, "run")
    assert [line.get("failed") for line in found] == [None, *["no kernel image is available"] * 2, None]
    assert [bool(line["values"]) for line in found] == [True, False, False, True]
    said = capfd.readouterr().err
    assert "step 6: the evaluation failed (no kernel image is available), 1 time so far: training goes on" in said
    assert "step 9: the evaluation failed (no kernel image is available), 2 times so far: training goes on" in said
    assert train(here, "without") == 0
    weights = [load_file(here / name / "unet/diffusion_pytorch_model.safetensors") for name in ("run", "without")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert main.main(["report", str(here / "run"), "-o", str(here / "report.html")]) == 0


def test_a_value_that_is_not_finite_is_written_as_null_and_training_goes_on(here, monkeypatch, capfd) -> None:
    def spoilt(*arguments, **settings):
        quality = compute_metrics(*arguments, **settings)
        values = tuple(replace(value, value=math.nan, floor=math.inf) for value in quality.values)
        return replace(quality, values=values)

    monkeypatch.setattr(evaluation, "compute_metrics", spoilt)
    assert train(here, "run", *during(here)) == 0
    assert [line["values"]["FD-pixels"]["value"] for line in lines(here, "run")] == [None] * 4
    assert "FD-pixels" in next(line for line in capfd.readouterr().err.splitlines() if "written as null" in line)
    assert not (here / "run" / "best").exists()
    assert (here / "run" / "checkpoints" / "step-00000012").is_dir()
