"""`robustdiff audit --export`: an audit is made once, and told to a trainer; mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustdiff.audit import AuditResult
from robustdiff.commands import audit as command
from robustdiff.commands import main
from robustdiff.data import load_images
from robustdiff.utils.images import save_png


@pytest.fixture
def photos(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(load_images("digits").images[:70]):
        save_png(image, tmp_path / "photos" / f"{index:03}.png")
    return tmp_path / "photos"


def test_an_audit_is_made_once_and_overwritten_with_its_exports(photos, tmp_path, capfd, monkeypatch):
    assert main.main(["audit", "photos", "-o", "a", "--export", "kohya"]) == 0
    said = capfd.readouterr().out
    assert "70 images" in said
    assert "export-kohya: " in said
    found = AuditResult.load("a")
    with monkeypatch.context() as patch:
        patch.setattr(command, "look", lambda *_: pytest.fail("looked twice"))
        assert main.main(["audit", "photos", "-o", "a", "--export", "metadata"]) == 0
    said = capfd.readouterr().out
    assert "a: the audit that is there is used as it is; --overwrite looks again" in said
    assert "export-metadata: " in said
    rows = [json.loads(line) for line in (tmp_path / "a/export-metadata/metadata.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == list(found.names)
    assert [row["min_sigma"] for row in rows] == found.min_sigma.tolist()
    assert (tmp_path / "a/export-kohya").is_dir()
    assert main.main(["audit", "photos", "-o", "a", "--export", "onetrainer", "--overwrite"]) == 0
    assert "reads folders: add --export-files link, or copy" in capfd.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a").glob("export-*")) == ["export-onetrainer"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["photos", "-o", "a", "--export", "koyha"],
            "--export 'koyha' is no trainer there is a format for: use one of",
        ),
        (["digits", "-o", "a", "--export", "kohya"], "--export kohya: digits is no folder of image files"),
        (["photos", "--export", "kohya"], "--export needs the folder of the audit: add --output"),
        (["photos", "-o", "a", "--export-files", "link"], "--export-files does nothing without --export"),
        (["nowhere", "-o", "a", "--export", "kohya"], "nowhere: "),
        (["photos", "-o", "photos/a", "--export", "kohya"], "--output photos/a: lies in photos"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_looked_at(photos, tmp_path, capfd, words, told):
    assert main.main(["audit", *words]) == 2
    out, err = capfd.readouterr()
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not (tmp_path / "a").exists()


def test_images_of_several_sizes_have_no_levels(photos, tmp_path, capfd):
    save_png(load_images("digits").images[0][:, :6], photos / "other.png")
    assert main.main(["audit", "photos", "-o", "a", "--export", "kohya"]) == 2
    err = capfd.readouterr().err
    assert "--export needs what is said of every image: images of one size (--resolution), 64 at least" in err
    assert (tmp_path / "a" / "audit.json").is_file()
