"""What the audit says of a set as a whole: words, lists and sheets; nothing said where nothing can be."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fields import natural
from robustdiff.audit.files import AUDIT_FILES, check_output
from robustdiff.audit.result import AuditResult
from robustdiff.commands.main import main
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import load_images
from robustdiff.training.annotations import read_levels

DIRT = (Corruption.parse("missing:amount=0.4,value=0.3,fraction=0.9"),)


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Digits as an array, nine of ten with lost pixels, two alike; and which were hit."""
    x0 = load_images("digits").x0(slice(0, 1200))
    hit = torch.zeros(len(x0), dtype=torch.bool)
    for index in range(len(x0)):
        changed, kinds = corrupt(x0[index], DIRT, 0, index)
        x0[index], hit[index] = changed, bool(kinds)
    clean = (~hit).nonzero().flatten()
    x0[clean[1]] = x0[clean[0]]
    path = tmp_path_factory.mktemp("search") / "dirty.npy"
    np.save(path, ((x0 + 1) * 127.5).round().to(torch.uint8)[:, 0].numpy())
    return path, hit


def test_the_command_says_what_it_found_and_writes_lists_and_sheets(dirty, tmp_path: Path, capsys) -> None:
    path, hit = dirty
    out = tmp_path / "audit"
    assert main(["audit", str(path), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "damage, and what --auto would do about it" in said
    assert "found holes: " in said
    assert "found duplicates: 2 images, 1 picture more than once" in said
    there = {file.name for file in out.iterdir()}
    assert {"found.json", "clean.txt", "noise.csv", "found-holed.png", "found-odd.png"} <= there <= set(AUDIT_FILES)
    assert "found-copies.png" in there
    assert len(AuditResult.load(out)) == len(hit)  # the folder, or the file in it
    found = json.loads((out / "found.json").read_text())
    names, clean = [image["name"] for image in found["images"]], (~hit).nonzero().flatten().tolist()
    assert found["copies"] == [[names[clean[0]], names[clean[1]]]]
    holed = torch.tensor([image["holed"] for image in found["images"]])
    assert (holed != hit).float().mean() < 0.05
    clean = (out / "clean.txt").read_text().splitlines()
    assert clean == [image["name"] for image in found["images"] if not image["usable"] and image["weight"]]
    sheet = Image.open(out / "found-holed.png")
    assert sheet.size[0] >= 5 * 64
    check_output(str(path), out, overwrite=True)  # an audit still
    assert main(["audit", str(path), "-o", str(out), "--overwrite"]) == 0


def test_the_command_tells_of_jpeg_files_of_low_quality(tmp_path: Path, capsys) -> None:
    (tmp_path / "photos").mkdir()
    pixels = ((natural(70) + 1) * 127.5).clamp(0, 255).to(torch.uint8)[:, 0].numpy()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i:02}.jpg", quality=20 if i % 7 == 0 else 90)
    (tmp_path / "photos" / "07.jpg").write_bytes(b"")  # names pair what both readers read
    assert main(["audit", str(tmp_path / "photos"), "-o", str(tmp_path / "audit")]) == 0
    said = capsys.readouterr().out
    assert "JPEG: 69 files, quality 20 to 90, median 90; 9 below 30\n" in said
    assert "found jpeg_quality: 9 images, of JPEG quality below 30, as their files say: reported only" in said
    found = AuditResult.load(tmp_path / "audit")
    assert found.signs["jpeg_quality"].tolist() == [20.0 if i % 7 == 0 else 90.0 for i in range(70) if i != 7]


@pytest.mark.slow
def test_the_list_of_noise_is_one_that_training_takes(tmp_path: Path, capsys) -> None:
    x0 = load_images("digits").x0(slice(0, 1797)) * 0.4  # not clipped by the noise
    noisy = Corruption.parse("gaussian:sigma=0.1,fraction=0.5")
    x0 = torch.stack([corrupt(image, (noisy,), 0, index)[0] for index, image in enumerate(x0)])
    np.save(tmp_path / "noisy.npy", ((x0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[:, 0].numpy())
    assert main(["audit", str(tmp_path / "noisy.npy"), "-o", str(tmp_path / "audit")]) == 0
    assert "found noise: " in capsys.readouterr().out
    with (tmp_path / "audit" / "noise.csv").open() as file:
        rows = list(csv.DictReader(file))
    levels = {name: sigma for name, sigma, _ in read_levels(tmp_path / "audit" / "noise.csv", load_images("digits"))}
    assert levels == {row["name"]: float(row["sigma"]) for row in rows}
    assert len(rows) == pytest.approx(1797 / 2, rel=0.1)
    assert np.median(list(levels.values())) == pytest.approx(0.1, rel=0.15)


def test_few_images_and_images_of_many_sizes_are_not_searched(tmp_path: Path, capsys) -> None:
    for index in range(3):
        Image.new("L", (8, 8 + index % 2), 40 * index).save(tmp_path / f"{index}.png")
    assert main(["audit", str(tmp_path)]) == 0
    assert "damage: not looked for, images differ in size: add --resolution N" in capsys.readouterr().out
    assert main(["audit", str(tmp_path), "--resolution", "8"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not looked for" in line]
    assert len(said) == 2  # cut off is asked of larger images only
    assert said[0].startswith("  not looked for: blur, jpeg, ")
    assert "fewer than 64 pictures to compare): 0 of 3 images are trained" in said[0]


def test_of_a_clean_set_it_says_so(tmp_path: Path, capsys) -> None:
    generator = torch.Generator().manual_seed(0)
    fields = torch.randn(100, 1, 12, 12, generator=generator).cumsum(2).cumsum(3)
    pixels = (fields - fields.mean((2, 3), keepdim=True)) / fields.std((2, 3), keepdim=True)
    np.save(tmp_path / "clean.npy", (pixels * 50 + 128).clamp(0, 255).to(torch.uint8)[:, 0].numpy())
    assert main(["audit", str(tmp_path / "clean.npy"), "-o", str(tmp_path / "audit")]) == 0
    assert "damage: none stands apart; --auto would train plainly" in capsys.readouterr().out
    assert (tmp_path / "audit" / "noise.csv").read_text().split() == ["name,sigma"]
    assert len((tmp_path / "audit" / "clean.txt").read_text().splitlines()) == 100


def test_foreign_pictures_are_shown_and_not_acted_on(tmp_path: Path, capsys) -> None:
    """Digits turned upside down have the spectrum of digits; in pixels they lie far off."""
    x0 = load_images("digits").x0(slice(0, 400))
    zeros = load_images("digits").labels[:400] == 0
    x0 = torch.cat([x0[zeros], -x0[:2]])  # and two negatives
    np.save(tmp_path / "zeros.npy", ((x0 + 1) * 127.5).round().to(torch.uint8)[:, 0].numpy().repeat(2, axis=0))
    plain = main(["audit", str(tmp_path / "zeros.npy"), "-o", str(tmp_path / "without")])
    without = json.loads((tmp_path / "without" / "found.json").read_text())
    assert (
        main(["audit", str(tmp_path / "zeros.npy"), "--extractor", "pixels", "-o", str(tmp_path / "with")])
        == plain
        == 0
    )
    said, count = capsys.readouterr().out, 2 * len(x0)
    assert "farthest from the others in pixels, typical 1, not acted on: " in said
    found = json.loads((tmp_path / "with" / "found.json").read_text())
    far = [image.pop("distance") for image in found["images"]]
    assert found.pop("features") == "pixels"
    assert found == without
    assert sorted(range(count), key=lambda i: -far[i])[:4] == sorted(range(count - 4, count), key=lambda i: -far[i])
    assert (tmp_path / "with" / "found-far.png").is_file()
    assert "distance" not in without["images"][0]
    assert main(["audit", str(tmp_path / "zeros.npy"), "--extractor", str(tmp_path / "none.pt")]) == 2
    assert "--extractor" in capsys.readouterr().err
