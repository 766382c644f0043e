"""Pictures that a set holds more than once: planted copies of known kinds, and none where none were planted."""

import pytest
import torch
from torch import Tensor

from fields import loader, natural
from helpers import normal, seeded
from robustdiff.audit.detectors import duplicates
from robustdiff.audit.run import detect
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import load_images
from robustdiff.utils.images import from_uint8, to_uint8


def near(images: Tensor, asked: Tensor | None = None) -> list[list[int]]:
    asked = torch.ones(len(images), dtype=torch.bool) if asked is None else asked
    return sorted(duplicates.near(loader(images), len(images), asked))


def damaged(images: Tensor, spec: str) -> Tensor:
    return torch.stack([corrupt(x, [Corruption.parse(spec)], 0, i)[0] for i, x in enumerate(images)])


def test_digits_and_pictures_that_have_nothing_to_do_with_one_another_are_no_copies() -> None:
    assert near(load_images("digits").x0(slice(None))) == []
    assert near(natural(600)) == []
    assert near(natural(600).repeat(1, 3, 1, 1)) == []
    assert near(torch.rand(300, 1, 16, 16, generator=seeded(1))) == []


@pytest.mark.parametrize(
    "spec",
    ["jpeg:quality=40", "gaussian:sigma=0.05", "blur:radius=0.5", "missing:amount=0.003"],
)
def test_copies_with_small_damage_are_found_with_their_own_original(spec: str) -> None:
    images = natural(400)
    again = damaged(images[:40], spec)
    assert near(torch.cat([images, again])) == [[i, 400 + i] for i in range(40)]


def test_larger_copies_and_brighter_ones() -> None:
    images = natural(400, 32)
    small = torch.nn.functional.avg_pool2d(images[:20], 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    lossy = from_uint8(to_uint8(images[20:40] * 1.02))
    assert near(torch.cat([images, small, lossy])) == [[i, 400 + i] for i in range(40)]


def resized(images: Tensor, left_out: int) -> Tensor:
    edge = images.shape[2]
    inside = images[:, :, left_out : edge - left_out, left_out : edge - left_out]
    return torch.nn.functional.interpolate(inside, (edge, edge), mode="bilinear", align_corners=False)


CHANGES = {
    "brighter": lambda x: ((x + 1) * 1.1 - 1).clamp(-1, 1),
    "darker": lambda x: (x + 1) * 0.9 - 1,
    "of less contrast": lambda x: 0.8 * x,
    "mirrored": lambda x: x.flip(3),
    "mirrored and brighter": lambda x: ((x.flip(3) + 1) * 1.1 - 1).clamp(-1, 1),
    "cropped to nine tenths": lambda x: resized(x, 2),
    "cropped and mirrored": lambda x: resized(x, 2).flip(3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_copies_of_other_light_mirrored_or_cropped_are_found(what: str) -> None:
    images = natural(300, 40)
    again = from_uint8(to_uint8(CHANGES[what](images[:40])))
    found = near(torch.cat([images, again]))
    assert all(pair == [pair[0], 300 + pair[0]] for pair in found)
    assert len(found) >= (36 if "cropped" in what else 40)


@pytest.mark.parametrize("change", [lambda x: x[:, [1, 2, 0]], lambda x: -x, lambda x: 0.4 * x])
def test_the_same_shape_in_other_colours_or_another_light_is_another_picture(change) -> None:
    images = torch.cat([natural(300, 16, seed=seed) for seed in (0, 1, 2)], 1)
    assert near(torch.cat([images, change(images[:40])])) == []


def test_symmetric_pictures_are_no_copies_of_themselves() -> None:
    images = natural(300)
    assert near((images + images.flip(3)) / 2) == []


def test_groups_of_any_size_hang_together() -> None:
    images = natural(300)
    many = images[:1].repeat(30, 1, 1, 1) + 0.01 * normal(30, 1, 16, 16).float()
    pair = images[5:6] + 0.01 * normal(1, 1, 16, 16, seed=2).float()
    found = near(torch.cat([images, many, pair]))
    assert found == [[0, *range(300, 330)], [5, 330]]


def test_a_set_that_is_mostly_one_picture_has_no_yardstick_but_breaks_nothing() -> None:
    images = torch.cat([natural(100), natural(1).repeat(150, 1, 1, 1)])
    assert all(len(group) > 1 for group in near(images))


def test_images_that_are_not_asked_for_are_no_copies_and_small_sets_have_none() -> None:
    images = torch.cat([natural(300), natural(300)[:10] + 0.001])
    asked = torch.ones(310, dtype=torch.bool)
    asked[[3, 305]] = False
    assert near(images, asked) == [[i, 300 + i] for i in range(10) if i not in (3, 5)]
    assert near(images[:101][:, :, :4, :4]) == []
    assert duplicates.near(loader(images), 310, torch.zeros(310, dtype=torch.bool)) == []


def test_equal_images_are_found_by_their_pixels() -> None:
    images = natural(50)
    images[[7, 9]] = images[3].clone()
    images[20] = images[30].clone()
    images[40] = images[41] + 1e-6
    assert duplicates.equal(loader(images), 50) == [[3, 7, 9], [20, 30]]


# -- what is done about them -----------------------------------------------------------------------------


def test_few_near_copies_of_a_large_set_are_said_and_left_alone() -> None:
    images = natural(500)
    images[400] = images[7] + 0.001
    of = detect(loader(images), 500)
    assert of.copies == ((7, 400),)
    assert of.trivial
    assert of.rows()["found duplicates"] == (
        "2 images, 1 picture more than once, nearly alike: too few to matter, left alone"
    )


def test_many_near_copies_count_once_together_and_with_equal_ones() -> None:
    images = natural(300)
    images[100:103] = images[0].clone()  # equal to one another
    images[103] = images[0] + 0.001  # and nearly to this one
    images[200:204] = images[10:14] + 0.001
    images[250] = images[20].clone()
    of = detect(loader(images), 300)
    due = torch.ones(300).double()
    due[[0, 100, 101, 102, 103]] = 1 / 5
    due[10:14] = due[200:204] = 1 / 2
    due[[20, 250]] = 1 / 2
    torch.testing.assert_close(of.weight, due)
    assert of.copies[0] == (0, 100, 101, 102, 103)
    assert sorted(of.copies[1:]) == [(10, 200), (11, 201), (12, 202), (13, 203), (20, 250)]
    said = of.rows()["found duplicates"]
    assert "6 images, 2 pictures more than once: each picture counts once" in said
    assert "13 images, 5 pictures more than once, nearly alike: each picture counts once" in said


@pytest.mark.slow
def test_a_picture_that_is_there_five_times_counts_once_in_any_set() -> None:
    images = natural(1000)
    images[500:504] = images[3] + 0.001 * torch.arange(1, 5)[:, None, None, None]
    images[600] = images[9] + 0.001
    of = detect(loader(images), 1000)
    due = torch.ones(1000).double()
    due[[3, 500, 501, 502, 503]] = 1 / 5
    torch.testing.assert_close(of.weight, due)
    assert "1 picture more than once, nearly alike: too few to matter" in of.rows()["found duplicates"]
    assert detect(loader(images), 1000, ("duplicates",)).copies == ()
