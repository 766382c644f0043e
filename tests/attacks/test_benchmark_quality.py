"""Quality after an attack: equal to other libraries' numbers and to `evaluate`'s, or left out and told."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import prdc
import pytest
from scipy import linalg
from sklearn.metrics.pairwise import polynomial_kernel

from attack_runs import command, result, run_folder, value
from robustdiff.attacks.benchmark import quality, run
from robustdiff.commands import main
from robustdiff.data.dataset import load_images
from robustdiff.report import collect, render

pytestmark = pytest.mark.usefixtures("few_for_the_spread")
MANY = ("-n", "16", "--batch-size", "16", "--reference", "digits", "--cache", "none")


def arrays(folder: Path) -> dict[str, Any]:
    """As pixel features, (n, 64): the files beside the result, and the digits."""
    found = {name: np.load(next(folder.glob(f"*-{name}.npy"))) for name in ("undisturbed", "attacked")}
    found["real"] = load_images("digits").images[:].numpy()
    return {name: images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1 for name, images in found.items()}


@pytest.fixture(scope="module")
def judged(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("judged") / "run" / "evaluation"
    assert main.main(command(pipeline, output, *MANY)) == 0
    return output


@pytest.mark.parametrize("which", ["undisturbed", "attacked"])
def test_the_numbers_are_those_of_other_libraries(judged: Path, which: str) -> None:
    body, found = result(judged), arrays(judged)
    a, b = found[which], found["real"]
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # eigenvalues of the product, as for a matrix root of it; many are 0, for 16 images
    cross = np.sqrt(np.clip(linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None)).sum()
    frechet = np.square(a.mean(0) - b.mean(0)).sum() + sum(np.trace(c) for c in covariances) - 2 * cross
    assert value(body, f"FD-pixels, {which}") == pytest.approx(frechet, rel=1e-6)
    precision = prdc.compute_prdc(b, a, 5)["precision"]
    assert value(body, f"precision-pixels, {which}") == pytest.approx(precision, abs=1e-12)
    kernel = body["values"][f"KID-pixels, {which}"]
    within, real, across = (polynomial_kernel(x, y, 3, 1 / 64, 1) for x, y in ((a, a), (b, b), (a, b)))
    mean_within, mean_real = ((k.sum() - np.trace(k)) / len(k) / (len(k) - 1) for k in (within, real))
    whole = mean_within + mean_real - 2 * across.mean()
    assert kernel["value"] == pytest.approx(whole, abs=4 * kernel["about"]["standard_error"])
    for name in ("FD-pixels", "KID-pixels", "precision-pixels"):
        entry = body["values"][f"{name}, {which}"]
        assert entry["floor"] is not None
        assert entry["about"]["n"] == 16
        assert entry["about"]["n_real"] == len(b)
        assert entry["about"]["floor_n"] == [16, len(b) - 16]


def test_they_are_those_of_evaluate_on_the_files_beside(judged: Path, tmp_path: Path) -> None:
    body = result(judged)
    for which in ("undisturbed", "attacked"):
        (images,) = judged.glob(f"*-{which}.npy")
        arguments = ["evaluate", str(images), "--reference", "digits", "-o", str(tmp_path / which)]
        assert main.main([*arguments, "--training", "none", "--cache", "none"]) == 0
        (path,) = (tmp_path / which).glob("quality-*.json")
        own = json.loads(path.read_text())["values"]
        for name, theirs in (
            ("FD-pixels", "FD-pixels"),
            ("KID-pixels", "KID-pixels"),
            ("precision-pixels", "precision"),
        ):
            for key in ("value", "floor", "interval", "better"):
                assert body["values"][f"{name}, {which}"][key] == own[theirs][key]


def test_what_they_rest_on_is_in_the_file_on_the_terminal_and_on_the_page(judged: Path, pipeline, capsys) -> None:
    about = result(judged)["protocol"]["quality"]
    assert (about["n_generated"], about["n_real"]) == (16, 1797)
    assert about["reference"]["source"] == "digits"
    assert about["extractors"][0]["name"] == "pixels"
    assert "16 images of the reference against the other 1781" in about["floors"]["pixels"]
    assert any("small-sample bias" in text for text in result(judged)["warnings"])
    assert main.main(command(pipeline, judged, *MANY)) == 0
    assert re.search(r"FD-pixels, attacked .* floor ", capsys.readouterr().out)
    page = render(collect([judged.parent]))
    for words in ("16 images against 1,797 of digits", "tiny: undisturbed", "tiny: attacked", "KID-pixels ↓"):
        assert words in page
    assert "FD-pixels, attacked</th>" not in page


def test_a_reference_named_later_finds_the_attacks_done(judged: Path, pipeline, tmp_path, monkeypatch) -> None:
    shutil.copytree(judged, tmp_path / "out")
    monkeypatch.setattr(run.Batch, "run", lambda *_: pytest.fail("done again"))
    (tmp_path / "real").mkdir()
    np.save(tmp_path / "real" / "images.npy", load_images("digits").images[:100, 0].numpy())
    more = ("-n", "16", "--batch-size", "16", "--reference", str(tmp_path / "real" / "images.npy"), "--cache", "none")
    assert main.main(command(pipeline, tmp_path / "out", *more)) == 0
    assert result(tmp_path / "out")["protocol"]["quality"]["n_real"] == 100


def test_the_reference_takes_a_range(judged: Path, pipeline, tmp_path, monkeypatch) -> None:
    shutil.copytree(judged, tmp_path / "out")
    monkeypatch.setattr(run.Batch, "run", lambda *_: pytest.fail("done again"))
    dark = load_images("digits").images[:100, 0].numpy() // 16
    np.save(tmp_path / "dark.npy", dark)
    more = ("-n", "16", "--batch-size", "16", "--reference", str(tmp_path / "dark.npy"), "--cache", "none")
    found = []
    for told in ((), ("--value-range", "0:15")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main.main([*command(pipeline, tmp_path / "out", *more), *told]) == 0
        found.append(result(tmp_path / "out")["values"]["FD-pixels, undisturbed"]["value"])
    assert found[0] != found[1]


@pytest.mark.slow
def test_stopped_while_it_judges_it_goes_on_and_ends_as_a_whole_one(
    judged: Path,
    pipeline: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    judge = quality.compute_metrics

    def judge_and_stop(*arguments: Any, **settings: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return judge(*arguments, **settings)

    monkeypatch.setattr(quality, "compute_metrics", judge_and_stop)
    assert main.main(command(pipeline, tmp_path / "out", *MANY)) == 143
    assert "stopped; all parts are finished" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("attack-*.json"))
    monkeypatch.setattr(quality, "compute_metrics", judge)
    monkeypatch.setattr(run.Batch, "run", lambda *_: pytest.fail("done again"))
    assert main.main(command(pipeline, tmp_path / "out", *MANY)) == 0
    for part in ("values", "details", "warnings"):
        assert result(tmp_path / "out")[part] == result(judged)[part]


@pytest.mark.slow
def test_without_a_reference_it_is_the_data_that_the_run_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "REAL", 50)
    run = run_folder(tmp_path / "run", {"data": "digits", "split": None})
    assert main.main(command(run, tmp_path / "out", "-n", "16", "--cache", "none")) == 0
    body = result(tmp_path / "out")
    assert body["protocol"]["quality"]["reference"]["used"] == body["protocol"]["quality"]["n_real"] == 50
    assert any("the images that the run was trained on" in text for text in body["warnings"])
    assert value(body, "FD-pixels, attacked") > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        (None, (), "the run does not say what it was trained on: name clean images with `reference`"),
        ({"data": "/nowhere/images"}, (), "the training images cannot be read (/nowhere/images"),
        (None, ("-n", "3"), "that takes at least 14 images: raise `n`"),
        (None, ("--reference", "none"), "as `reference` none says"),
    ],
)
def test_what_cannot_be_judged_is_left_out_and_told(settings, more, words, pipeline, tmp_path) -> None:
    run = pipeline if settings is None else run_folder(tmp_path / "run", settings)
    assert main.main(command(run, tmp_path / "out", *(more or ("-n", "16")))) == 0
    body = result(tmp_path / "out")
    assert any(words in text for text in body["warnings"])
    assert body["protocol"]["quality"] is None
    assert not any("FD" in name for name in body["values"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--reference", "digits"), "that takes at least 14 images: raise -n"),
        (("--reference", ""), "--reference is empty"),
        (("--reference", "/nowhere", "-n", "16"), "--reference /nowhere"),
        (("--extractor", "pixels", "-n", "16"), "name clean images with --reference"),
        (("--extractor", "what", "--reference", "digits", "-n", "16"), "--extractor 'what' is none of"),
        (("--extractor", "pixels", "--reference", "none"), "--extractor does nothing with --reference none"),
        (("--extractor", "pixels", "--extractor", "pixels"), "--extractor pixels is given twice"),
        (("--split", "test"), "--split needs --reference"),
        (("--value-range", "0:1"), "--value-range needs --reference"),
        (("--value-range", "0-1", "--reference", "digits", "-n", "16"), "--value-range '0-1' is not LOW:HIGH"),
        (("--max-bad-fraction", "2"), "--max-bad-fraction must be"),
    ],
)
def test_a_reference_that_cannot_be_used_is_one_line(more, words, pipeline, tmp_path, capsys) -> None:
    assert main.main(command(pipeline, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
