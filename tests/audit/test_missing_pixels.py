"""Lost pixels on images that lost some on purpose, single ones and blocks, and their repair against a linear solve."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from fields import natural
from helpers import normal, seeded
from robustdiff.audit import audit
from robustdiff.audit.detectors import missing_pixels
from robustdiff.audit.detectors.missing_pixels import Gap, MissingPixels
from robustdiff.audit.finding import Action
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import from_uint8, load_images


def rounded(images: Tensor) -> Tensor:
    """As 8-bit files hold them."""
    return from_uint8(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def dirty(images: Tensor, spec: str) -> Tensor:
    return torch.stack([corrupt(x, [Corruption.parse(spec)], 0, index)[0] for index, x in enumerate(images)])


def of(values: list[float]) -> list[Gap]:
    return [Gap(value) for value in values]


# -- which value, and where --------------------------------------------------------------------------


def test_the_histogram_counts_grey_pixels_in_half_steps() -> None:
    x = torch.full((2, 3, 2, 2), 0.1)
    x[0, :, 0, 0] = 0.0
    x[0, :, 0, 1], x[0, :, 1, 0], x[0, :, 1, 1] = -1.0, 1.0, 1.5  # the last out of range
    x[1, 0] = 0.2  # coloured
    counts = missing_pixels.grey_histogram(x)
    assert counts.shape == (511,)
    assert counts.nonzero().flatten().tolist() == [0, 255, 510]
    assert counts.sum() == 3
    every = from_uint8(torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16))
    assert missing_pixels.grey_histogram(every)[::2].tolist() == [1] * 256


def suspected(images: Tensor) -> list[float]:
    return missing_pixels.suspected(missing_pixels.grey_histogram(images), images[:, 0].numel())


@pytest.mark.parametrize("value", [0.0, -0.498, 0.3])
@pytest.mark.parametrize("channels", [1, 3])
def test_scattered_pixels_of_a_value_are_found_to_the_pixel(value: float, channels: int) -> None:
    pictures = rounded(0.8 * natural(200)).repeat(1, channels, 1, 1)
    value = round((value + 1) * 255) / 255 - 1
    lost = torch.rand(200, 16, 16, generator=seeded(3)) < 0.2
    lost[100:] = False
    holed = torch.where(lost[:, None], torch.tensor(value).float(), pictures)
    values = suspected(holed)
    assert any(abs(v - value) < 1e-6 for v in values)
    found = missing_pixels.holes(holed, of(values))
    assert (found & ~lost)[:100].double().mean() < 0.005  # pixels that had the value before
    assert found[:100][lost[:100]].all()
    assert found[100:].flatten(1).any(1).double().mean() < 0.1  # by chance 1 in 50 of their pixels has it


@pytest.mark.parametrize("images", [rounded(0.8 * natural(200)), rounded(natural(200))], ids=["grey", "saturated"])
def test_whole_pictures_have_no_holes(images: Tensor) -> None:
    assert not missing_pixels.holes(images, of(suspected(images))).flatten(1).any(1).double().mean() > 0.01


def test_flat_areas_and_drawings_have_no_holes() -> None:
    pictures = rounded(0.8 * natural(200))
    pictures[:, :, 4:12, 4:12] = 0.0
    values = suspected(pictures)
    assert any(abs(value) < 1e-6 for value in values)
    assert not missing_pixels.holes(pictures, of(values)).any()
    digits = load_images("digits").x0(slice(0, 600))
    assert not missing_pixels.holes(digits, of(suspected(digits))).any()


def test_a_background_that_was_lifted_here_and_there_is_content() -> None:
    """Every pixel 16 levels up or down, clipped: half of the black background becomes a spike that lies scattered."""
    digits = load_images("digits").x0(slice(0, 600))
    signs = 2.0 * torch.randint(0, 2, digits.shape, generator=seeded(5)) - 1
    lifted = rounded((digits + signs * 32 / 255).clamp(-1, 1))
    assert any(abs(value + 223 / 255) < 1e-6 for value in suspected(lifted))
    assert found(lifted)[0] == ()
    assert not found(lifted)[1].any()
    lost = torch.where(torch.rand(digits.shape, generator=seeded(6)) < 0.2, torch.tensor(0.0), digits)
    gap, holed = found(lost)
    assert gap == (Gap(0.0),)
    assert holed.double().mean() > 0.99


def test_black_and_white_pixels_that_stand_alone_are_impulses() -> None:
    pictures = rounded(0.6 * natural(200))
    noisy = dirty(pictures, "impulse:amount=0.05")
    changed = (noisy != pictures)[:, 0]
    found = missing_pixels.holes(noisy, of(suspected(noisy)))
    assert found[changed].double().mean() > 0.8
    assert found[~changed].double().mean() < 0.005


def test_nothing_suspected_is_nothing_found() -> None:
    assert missing_pixels.suspected(torch.zeros(511, dtype=torch.long), 0) == []
    assert not missing_pixels.holes(torch.zeros(2, 1, 8, 8), []).any()


# -- blocks ------------------------------------------------------------------------------------------


def found(images: Tensor) -> tuple[tuple[Gap, ...], Tensor]:
    return missing_pixels.find(lambda places: images[places.start : places.stop], len(images))


def lost_by(before: Tensor, after: Tensor) -> Tensor:
    return (before != after).any(1)


@pytest.mark.parametrize(("block", "value"), [(2, 0.0), (3, 0.3), (4, 0.0), (8, -0.498), (4, -1.0), (3, 1.0)])
@pytest.mark.parametrize("size", [16, 17], ids=["16", "cut off at the edges"])
def test_blocks_of_a_value_are_found_to_the_pixel(block: int, value: float, size: int) -> None:
    pictures = rounded(0.8 * natural(300, size))
    value = round((value + 1) * 127.5) / 127.5 - 1
    holed = dirty(pictures, f"missing:amount=0.25,block={block},value={value},fraction=0.5")
    lost = lost_by(pictures, holed)
    (gap,), which = found(holed)
    assert gap == (pytest.approx(value, abs=1e-6), block)
    assert not (which & ~lost.flatten(1).any(1)).any()
    much = lost.flatten(1).double().mean(1) > 0.05
    assert which[much].double().mean() > (
        0.9 if abs(value) == 1 else 0.95
    )  # black and white ones keep company by chance
    here = missing_pixels.holes(holed, [gap])[which]
    assert not (lost[which] & ~here).any()
    assert (here & ~lost[which]).double().mean() < 0.002  # pixels that had the value before


def test_a_mark_at_its_place_a_bar_and_flat_shapes_are_content() -> None:
    pictures, n = rounded(0.8 * natural(200)), torch.arange(200)
    mark, bars, shapes = pictures.clone(), pictures.clone(), pictures.clone()
    mark[:, :, 4:12, 4:12] = 0.0
    bars[n % 2 == 0, :, :4] = 0.0
    bars[n % 2 == 1, :, 12:] = 0.0
    grid = torch.arange(16)
    for i in range(200):  # discs: ragged edges
        disc = (grid[:, None] - 4 - i % 8).square() + (grid - 3 - i % 9).square() < 16
        shapes[i, :, disc] = 0.0
    for images in (pictures, mark, bars, shapes):
        gap, which = found(images)
        assert gap == ()
        assert not which.any()


def test_enlarged_pictures_are_whole() -> None:
    """Every value of theirs fills cells."""
    small = rounded(0.8 * natural(200, 8))
    small[:, :, :3] = 0.0  # a flat sky, so that the value is a spike
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert suspected(large)
    assert found(large)[0] == ()


def test_black_sky_beside_black_blocks_is_whole() -> None:
    pictures = rounded(0.8 * natural(400))
    holed = dirty(pictures, "missing:amount=0.3,block=4,value=-1,fraction=0.5")
    hit = lost_by(pictures, holed).flatten(1).any(1)
    sky = (~hit).nonzero().flatten()[:50]
    holed[sky, :, :8] = -1.0
    (gap,), which = found(holed)
    assert gap == (-1.0, 4)
    assert not which[sky].any()


def test_few_images_with_blocks_are_none() -> None:
    pictures = rounded(0.8 * natural(200))
    few = dirty(pictures, "missing:amount=0.3,block=4,fraction=0.9")[:7]
    assert found(torch.cat([few, pictures[7:]])) == ((), pytest.approx(torch.zeros(200)))


@pytest.mark.parametrize("shape", [(5, 7), (8, 8)])
def test_whole_cells_are_those_of_a_loop(shape: tuple[int, int]) -> None:
    here = torch.rand(20, *shape, generator=seeded(2)) < 0.8
    for block in (2, 3, 4):
        cells = missing_pixels.whole_cells(here, block)
        rows, columns = -(-shape[0] // block), -(-shape[1] // block)
        assert cells.shape == (20, rows, columns)
        for y in range(rows):
            for x in range(columns):
                part = here[:, y * block : (y + 1) * block, x * block : (x + 1) * block]
                assert torch.equal(cells[:, y, x], part.flatten(1).all(1))


def test_company_counts_neighbours() -> None:
    here = torch.tensor([[[1, 1, 0], [0, 1, 1], [0, 0, 1]]]).bool()
    share, pairs, first = (x.item() for x in missing_pixels.company(here))
    assert share == pytest.approx(5 / 9)
    assert pairs == 2 + 2  # beside one another; above one another
    assert first == 3 + 4


# -- in one image ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("value", [0.0, 0.3, -1.0, 1.0])
def test_lost_pixels_show_in_a_single_image(value: float, block: int) -> None:
    pictures = rounded(0.8 * natural(60, 32)).repeat(1, 3, 1, 1)
    value = round((value + 1) * 127.5) / 127.5 - 1
    holed = dirty(pictures, f"missing:amount=0.25,block={block},value={value}")
    right = [missing_pixels.in_one(image) == [(pytest.approx(value, abs=1e-6), block)] for image in holed]
    assert np.mean(right) >= 0.9
    assert not any(missing_pixels.in_one(image) for image in pictures)


def test_content_shows_no_lost_pixels_in_a_single_image() -> None:
    """Discs and bars keep company, and fill no cells."""
    pictures, grid = rounded(0.8 * natural(40, 32)), torch.arange(32)
    discs, bars = pictures.clone(), pictures.clone()
    for i in range(40):
        discs[i, :, (grid[:, None] - 8 - i % 16).square() + (grid - 6 - i % 18).square() < 64] = -1.0
        bars[i, :, : 4 + i % 9] = 1.0
    assert not any(missing_pixels.in_one(image) for image in torch.cat([discs, bars]))


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_half_of_the_pixels_black_or_white_may_be_lost(value: float) -> None:
    """So many that hardly any stands alone: it is possible, though not which ones; not if they keep company."""
    pictures = rounded(0.8 * natural(60, 32))
    lost = torch.rand(60, 32, 32, generator=seeded(3)) < 0.5
    possible = MissingPixels().possible
    assert possible(torch.where(lost[:, None], torch.tensor(value), pictures)).double().mean() >= 0.95
    assert not possible(pictures).any()
    half = pictures.clone()
    half[:, :, :16] = value
    assert not possible(half).any()


@pytest.mark.slow
def test_a_group_of_three_is_found_and_filled() -> None:
    """Too few for a value of the set: by the image's own values, each of its own."""
    pictures = rounded(0.8 * natural(100, 32))
    images, lost = pictures.clone(), torch.zeros(100, 32, 32, dtype=torch.bool)
    for place, value in ((5, 0.2), (40, -0.4), (77, 0.6)):
        value = round((value + 1) * 127.5) / 127.5 - 1
        lost[place] = torch.rand(32, 32, generator=seeded(place)) < 0.3
        images[place, :, lost[place]] = value
    result = audit(images)
    assert result.groups["holes"].nonzero().flatten().tolist() == [5, 40, 77]
    assert torch.equal(result.has_missing, result.groups["holes"])
    found = missing_pixels.holes(images[[5, 40, 77]], result.lost)
    assert (found & ~lost[[5, 40, 77]]).double().mean() < 0.01
    assert found[lost[[5, 40, 77]]].all()
    (finding,) = [one for one in result.findings if one.kind == "holes"]
    assert finding.action is Action.FILLED_IN


# -- repair ------------------------------------------------------------------------------------------


def harmonic(image: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Lost pixels the mean of their neighbours, edges mirrored: by one sparse solve."""
    height, width = image.shape
    place = np.full(image.shape, -1)
    place[lost] = np.arange(lost.sum())
    matrix, right = scipy.sparse.lil_matrix((lost.sum(), lost.sum())), np.zeros(lost.sum())
    for y, x in zip(*lost.nonzero(), strict=True):
        row = place[y, x]
        matrix[row, row] += 4
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            b, a = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
            if lost[b, a]:
                matrix[row, place[b, a]] -= 1
            else:
                right[row] += image[b, a]
    filled = image.copy()
    filled[lost] = scipy.sparse.linalg.spsolve(matrix.tocsr(), right)
    return filled


def test_lost_pixels_become_the_discrete_harmonic_function() -> None:
    images, lost = normal(4, 2, 9, 7), torch.rand(4, 9, 7, generator=seeded(1)) < 0.35
    lost[0, 0, 0] = lost[0, -1, -1] = True  # corners
    lost[3] = False
    filled = missing_pixels.fill(images, lost, rounds=2000)
    for image in range(4):
        for channel in range(2):
            wanted = harmonic(images[image, channel].numpy(), lost[image].numpy())
            np.testing.assert_allclose(filled[image, channel], wanted, atol=1e-9)
    usual = missing_pixels.fill(images, lost)
    assert (usual - filled).abs().max() < 0.05
    known = ~lost[:, None].expand_as(images)
    assert torch.equal(usual[known], images[known])
    assert torch.equal(usual[3], images[3])


def test_repair_changes_no_input_and_nothing_where_nothing_is_lost() -> None:
    images, lost = normal(2, 1, 8, 8).float(), torch.zeros(2, 8, 8, dtype=torch.bool)
    assert torch.equal(missing_pixels.fill(images, lost), images)
    before = images.clone()
    lost[0, 3, 3] = True
    assert missing_pixels.fill(images, lost).dtype == torch.float32
    assert torch.equal(images, before)
    assert missing_pixels.fill(images, torch.ones_like(lost)).isfinite().all()
