"""What files say of themselves, as the audit tells it: lines for a terminal, a sign and a finding, nothing acted on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fields import natural
from robustdiff.audit.file_summary import file_lines, file_summary, with_jpeg_quality
from robustdiff.audit.files import write_audit
from robustdiff.audit.finding import Action
from robustdiff.audit.result import AuditResult
from robustdiff.audit.statistics import image_statistics
from robustdiff.data.file_evidence import FileEvidence
from robustdiff.data.sources.open import open_source
from robustdiff.utils.images import to_uint8


@dataclass(frozen=True)
class InFile:
    name: str
    file: FileEvidence | None


def jpeg(quality: int, subsampling: str | None = "4:2:0", exact: bool = True) -> FileEvidence:
    return FileEvidence("JPEG", "RGB", (8, 8), quality, exact, subsampling)


PNG = FileEvidence("PNG", "RGBA", (8, 8), alpha=True)


@pytest.mark.parametrize(
    ("files", "due"),
    [
        ([], []),
        ([replace(PNG, alpha=False)], []),
        ([PNG, PNG], ["files: 2 with transparency"]),
        ([jpeg(90, "4:4:4")] * 3, ["JPEG: 3 files, quality 90"]),
        (
            [jpeg(30), jpeg(88), jpeg(95, "4:4:4")],
            ["JPEG: 3 files, quality 30 to 95, median 88; 2 with halved colour (4:2:0)"],
        ),
        (
            [jpeg(20), jpeg(88, "4:2:2"), jpeg(95, exact=False), replace(PNG, exif=True)],
            [
                "JPEG: 3 files, quality 20 to 95, median 88; 1 below 30; "
                "1 with tables of their own, judged by the nearest quality; 3 with halved colour (4:2:0: 2, 4:2:2: 1)",
                "files: 1 with transparency, 1 with EXIF data",
            ],
        ),
    ],
)
def test_lines_for_people(files: list[FileEvidence], due: list[str]) -> None:
    assert file_lines(json.loads(json.dumps(file_summary(files)))) == due


def test_files_of_low_quality_are_told_and_nothing_else_changes(tmp_path: Path) -> None:
    before = AuditResult.of_clean(4, ("d", "b", "a", "c"))
    images = [InFile("a", jpeg(29)), InFile("b", PNG), InFile("c", None), InFile("d", jpeg(30))]
    after = with_jpeg_quality(before, images)
    torch.testing.assert_close(
        after.signs["jpeg_quality"], torch.tensor([30, math.nan, 29, math.nan]).double(), equal_nan=True
    )
    assert after.groups["jpeg_quality"].tolist() == [False, False, True, False]
    assert [(one.kind, one.count, one.action) for one in after.findings] == [("jpeg_quality", 1, Action.REPORTED)]
    assert (after.sha256, after.trivial) == (before.sha256, True)
    assert after.rows()["found jpeg_quality"] == (
        "1 image, of JPEG quality below 30, as their files say: reported only, training does nothing about it"
    )
    after.save(tmp_path / "found.json")
    assert AuditResult.load(tmp_path / "found.json").summary() == after.summary()


def test_sets_without_jpeg_files_stay_as_they_are() -> None:
    before = AuditResult.of_clean(2, ("a", "b"))
    assert with_jpeg_quality(before, [InFile("a", PNG), InFile("b", None)]) is before
    assert with_jpeg_quality(before, [InFile("a", jpeg(30)), InFile("b", jpeg(31))]).findings == ()


def test_the_table_of_images_says_it_of_each(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, image in enumerate(to_uint8(natural(3, 24))):
        kind = {"quality": 20 + number} if number else {}
        Image.fromarray(image[0].numpy()).save(tmp_path / "data" / f"{number}.{'jpg' if number else 'png'}", **kind)
    statistics = image_statistics(open_source(tmp_path / "data"), resolution=16)
    assert "JPEG: 2 files, quality 21 to 22, median 21; 2 below 30" in statistics.text().splitlines()
    write_audit(statistics, tmp_path / "audit")
    written = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [image["file"].get("quality") for image in written["images"]] == [None, 21, 22]
    assert [image["file"]["size"] for image in written["images"]] == [[24, 24]] * 3
    assert written["summary"]["files"]["formats"] == {"JPEG": 2, "PNG": 1}
