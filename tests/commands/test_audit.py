"""`robustdiff audit` doubts a set as training does, whatever its images are; says one thing in every form it has."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import fails, grey
from fields import natural
from helpers import TINY_UNET, seeded
from robustdiff.audit.files import AUDIT_FILES, check_output
from robustdiff.commands import main
from robustdiff.utils.images import save_png, to_uint8


def noise(seed, side):
    return np.random.default_rng(seed).integers(0, 256, (side, side)).astype(np.uint8)


@pytest.mark.parametrize("sides", [(16, 16), (16, 20)], ids=["one size", "two sizes"])
@pytest.mark.parametrize("count", [4, 24])
def test_animations_that_begin_alike_are_told(tmp_path, capfd, sides, count):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(count):
        side = sides[number % 2]
        title, rest = (Image.fromarray(noise(seed, side)) for seed in (0, number + 1))
        title.save(folder / f"{number}.png", save_all=True, append_images=[rest])
    assert main.main(["audit", str(folder)]) == 0
    told = capfd.readouterr().err
    assert f"{count} of {count} animations begin with the same picture" in told
    assert told.count("animations begin") == 1


@pytest.mark.parametrize("dark", [True, False])
def test_a_sliver_is_told_of_images_of_several_sizes(tmp_path, capfd, dark):
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(noise(number, 16 + number) // (8 if dark else 1)).save(folder / f"{number}.png")
    assert main.main(["audit", str(folder)]) == 0
    assert ("--value-range" in capfd.readouterr().err) == dark


# -- for people and for scripts ------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of a hundred small pictures of which two are equal, one of one colour, and two are no pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(to_uint8(natural(100))):
        save_png(image, folder / f"{number:03d}.png")
    (folder / "copy & <b>.png").write_bytes((folder / "007.png").read_bytes())
    Image.new("L", (16, 16), 90).save(folder / "blank.png")
    (folder / "cut.png").write_bytes((folder / "008.png").read_bytes()[:60])
    (folder / "text.png").write_text("no picture")
    return folder


def lines(printed: str) -> dict[str, int]:
    """The table that was printed: images by kind."""
    table = printed[printed.index("\nkind ") :].split("\n\n")[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table[1:] if line[0] not in " *"]
    return {kind: int(count.split()[0]) for kind, count, *_ in cells}


def test_the_table_the_page_the_rows_and_the_json_agree(photos: Path, tmp_path: Path, capsys) -> None:
    out, file = tmp_path / "out", tmp_path / "new" / "audit.json"
    assert main.main(["audit", str(photos), "-o", str(out), "--json", str(file)]) == 0
    counts = lines(capsys.readouterr().out)
    assert counts.pop("all files") == sum(counts.values()) == 104
    assert counts["not readable"] == 2
    assert counts["duplicates"] == 2
    assert counts["outliers"] == 1
    assert {path.name for path in out.iterdir()} <= set(AUDIT_FILES)
    check_output(str(photos), out, overwrite=True)
    with (out / "images.csv").open(newline="") as rows:
        read = list(csv.DictReader(rows))
    assert {kind: sum(row["kind"] == kind for row in read) for kind in counts} == counts
    assert {row["name"]: row["reason"] for row in read if row["reason"]}.keys() == {"cut.png", "text.png"}
    told = json.loads(file.read_text())
    assert {line["kind"]: line["count"] for line in told["lines"]} == counts
    assert [row["name"] for row in told["images"]] == [row["name"] for row in read]
    page = (out / "index.html").read_text()
    assert "copy &amp; &lt;b&gt;.png" in page
    assert "<b>.png" not in page
    assert main.main(["audit", str(photos), "-o", str(out), "--overwrite"]) == 0


def test_json_on_standard_output_is_alone_there(photos: Path, capsys) -> None:
    assert main.main(["audit", str(photos), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == len(told["images"]) == 104
    assert main.main(["audit", str(photos.parent / "none"), "--json", "-"]) == 2
    assert capsys.readouterr().out == ""


def test_a_file_that_json_cannot_go_to_is_refused_before_the_work(photos: Path, capsys) -> None:
    assert "--json" in fails(capsys, "audit", str(photos), "--json", str(photos))
    assert "--json" in fails(capsys, "audit", str(photos), "--json", "")


def test_help_tells_the_exit_status(capsys) -> None:
    assert main.main(["audit", "--help"]) == 0
    assert "Exit status: 0 looked, whatever was found; 2 wrong usage" in " ".join(capsys.readouterr().out.split())


FEW = "not looked for: blur, jpeg, banding, blocks, camera, caption, enlarged, impulse, motion, poisson, noise"


@pytest.mark.parametrize("count", [1, 20])
def test_too_few_images_are_told_by_audit_and_training_alike(tmp_path: Path, capsys, count: int) -> None:
    folder = tmp_path / "few"
    for number in range(count):
        grey(folder / f"{number}.png", number, (32, 32))
    assert main.main(["audit", str(folder)]) == 0
    printed = capsys.readouterr().out
    said = f"{FEW} (fewer than 64 pictures to compare): {count} of {count} images are trained at every noise level"
    assert printed.count(said) == 1
    assert lines(printed) == {"not compared": count, "all files": count}
    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET))
    run = ["train", str(folder), "--auto", "--dry-run", "--images", "4", "--train-batch-size", "2"]
    run += ["--model-config-name-or-path", str(tmp_path / "unet.json"), "--output-dir", str(tmp_path / "run")]
    assert main.main(run) == 0
    printed = capsys.readouterr().out
    assert printed.count(said) == 1
    assert "found clean" not in printed


def test_images_of_many_sizes_are_told_by_audit_and_training_alike(tmp_path: Path, capsys) -> None:
    for number in range(3):
        grey(tmp_path / "mixed" / f"{number}.png", number, (16, 16 + number))
    assert main.main(["audit", str(tmp_path / "mixed")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("damage: not looked for, images differ in size: add --resolution N") == 1
    assert lines(printed) == {"not compared": 3, "all files": 3}
    run = ("train", str(tmp_path / "mixed"), "--auto", "--output-dir", str(tmp_path / "run"))
    assert "--resolution N" in fails(capsys, *run)


def test_a_set_without_a_readable_image_is_told(tmp_path: Path, capsys) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no picture")
    assert main.main(["audit", str(tmp_path / "bad")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("damage: not looked for, no image can be read") == 1
    assert lines(printed) == {"not readable": 1, "all files": 1}


def test_a_set_without_a_clean_image_is_told(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    pictures = natural(600)
    noisy = pictures + 0.2 * torch.randn(pictures.shape, generator=seeded())
    np.save(tmp_path / "noisy.npy", to_uint8(noisy)[:, 0].numpy())
    assert main.main(["audit", str(tmp_path / "noisy.npy")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  none clean: what all images have in common is not seen") == 1
    assert "regularised below noise level" in printed
    assert lines(printed)["noise"] == 600
