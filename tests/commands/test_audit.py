"""`robustdiff audit` doubts a set as training does, whatever the sizes of its images are."""

import numpy as np
import pytest
from PIL import Image

from robustdiff.commands import main


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
