"""Every file in a row: the same in CSV, parquet and JSON, with what is known of files that cannot be read."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest

from audits import BAD, COUNT, DOUBTED, SUSPECTED, overview, result, statistics
from robustdiff.audit.file_rows import FORMAT, file_rows, report, write_csv, write_parquet
from robustdiff.audit.overview import Overview


def test_every_file_has_one_row_of_the_same_columns() -> None:
    rows = file_rows(overview())
    assert len(rows) == COUNT + len(BAD)
    assert len({tuple(row) for row in rows}) == 1
    assert list(rows[0])[:9] == [
        *("name", "decision", "kind", "groups", "probability"),
        *("strength", "min_sigma", "weight", "noise_std"),
    ]
    assert "damaged" not in rows[0]  # it is the probability
    of = {row["name"]: row for row in rows}
    assert (of["03"]["kind"], of["03"]["groups"], of["03"]["decision"]) == (
        "jpeg",
        ["jpeg", "duplicates"],
        "trained-where-hidden",
    )
    assert [of["03"][key] for key in ("probability", "strength", "min_sigma")] == pytest.approx([0.93, 18, 0.4])
    assert of["07"]["decision"] == "counted-once"
    assert of["07"]["strength"] is None
    assert of[f"{DOUBTED:02d}"]["decision"] == "in-doubt"
    assert (of[f"{SUSPECTED:02d}"]["decision"], of[f"{SUSPECTED:02d}"]["looks_like"]) == ("clean", "blur")
    assert (of["03"]["width"], of["03"]["height"], of["03"]["channels"]) == (48, 32, 3)
    assert (of["03"]["mean"], of["03"]["std"], of["03"]["sha256"]) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3], f"{3:064x}")
    for name, why in BAD:
        assert of[name]["decision"] == "unreadable"
        assert of[name]["reason"] == why
        assert of[name]["probability"] is None


@pytest.mark.parametrize("of", [Overview(statistics(("a", "b"))), Overview(statistics(()))], ids=["two sizes", "none"])
def test_without_an_audit_there_is_a_row_all_the_same(of: Overview, tmp_path: Path) -> None:
    rows = file_rows(of)
    assert [row["decision"] for row in rows] == ["not-compared"] * len(of.statistics.records) + ["unreadable"] * 2
    write_csv(rows, tmp_path / "images.csv")
    write_parquet(rows, tmp_path / "images.parquet")
    assert json.loads(json.dumps(report(of), allow_nan=False))["found"] is None


def test_the_tables_hold_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ("\udcff, a.png", '"quoted".png', *(f"{place}.png" for place in range(2, COUNT)))
    rows = file_rows(Overview(statistics(names), result(names=names)))
    write_csv(rows, tmp_path / "images.csv")
    write_parquet(rows, tmp_path / "images.parquet")
    with (tmp_path / "images.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        read = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / "images.parquet").to_pylist()
    assert len(read) == len(table) == len(rows)
    assert read[0]["name"] == names[0]  # the file's own bytes
    assert table[0]["name"] == "\\udcff, a.png"  # text
    for row, line, entry in zip(rows[1:], read[1:], table[1:], strict=True):
        assert row == entry
        assert line["name"] == row["name"]
        assert line["groups"] == ";".join(row["groups"])
        for key in ("probability", "strength", "min_sigma", "width"):
            assert float(line[key] or "nan") == pytest.approx(
                row[key] if row[key] is not None else math.nan, nan_ok=True
            )


def test_without_pyarrow_there_is_no_parquet_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write_parquet(file_rows(overview()), tmp_path / "images.parquet")
    assert not list(tmp_path.iterdir())


def test_the_report_is_strict_json_of_everything() -> None:
    rows = file_rows(overview())
    told = json.loads(json.dumps(report(overview()), allow_nan=False))
    assert set(told) == {"format", "source", "files", "lines", "notes", "found", "statistics", "images"}
    assert (told["format"], told["source"]) == (FORMAT, "photos")
    assert told["images"] == rows
    assert told["files"] == len(rows)
    assert sum(line["count"] for line in told["lines"]) == len(rows)
    assert told["found"]["copies"] == [["03", "07"]]
    assert [one["part"] for one in told["found"]["findings"]] == ["jpeg", "noise", "duplicates"]
    assert told["statistics"]["unreadable"] == 2
