"""What the audit finds out: every kind of dirt on digits and on fields, what it misses and what it accuses falsely.

Shares are those of images that --corrupt hit, or spared, with a seed of 0.
"""

import functools
import math

import pytest
import torch
from torch import Tensor

from fields import gaussian_set, loader, natural, spectrum
from helpers import normal, seeded
from robustdiff.audit.detectors import missing_pixels
from robustdiff.audit.finding import Action
from robustdiff.audit.parts import parts as parts_there_are
from robustdiff.audit.result import AuditResult
from robustdiff.audit.run import detect
from robustdiff.data.corruption import Corruption, corrupt
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.training.curriculum import sampler_from_audit
from robustdiff.utils.errors import UsageError


@functools.cache
def dirty(source: str, *specs: str) -> tuple[Tensor, Tensor]:
    """Images, and which were hit."""
    images = {
        "digits": lambda: load_images("digits").x0(slice(None)),
        "fields": lambda: natural(600),
        "colour": lambda: natural(600).repeat(1, 3, 1, 1),
    }[source]()
    dirt = [Corruption.parse(spec) for spec in specs]
    hit = [any(c.hits(0, index, place) for place, c in enumerate(dirt)) for index in range(len(images))]
    if dirt:
        images = torch.stack([corrupt(x, dirt, 0, index)[0] for index, x in enumerate(images)])
    return images, torch.tensor(hit)


@functools.cache
def found(source: str, *specs: str, without: tuple[str, ...] = ()) -> tuple[AuditResult, Tensor]:
    """What is found of them."""
    images, hit = dirty(source, *specs)
    return detect(loader(images), len(images), without), hit


def parts(of: AuditResult) -> set[str]:
    return {finding.kind for finding in of.findings}


# -- each kind of dirt -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "sigma", "missed", "false"),
    [
        ("digits", 0.2, 0, 5),  # of 1,605 and 192
        ("digits", 0.05, 40, 10),
        ("fields", 0.2, 0, 0),
        ("fields", 0.1, 5, 14),  # of 529 and 71
    ],
)
def test_noisy_images_are_told_from_clean_ones(source: str, sigma: float, missed: int, false: int) -> None:
    of, hit = found(source, f"gaussian:sigma={sigma},fraction=0.9")
    assert (of.noise_std == 0)[hit].sum() <= missed
    assert (of.noise_std > 0)[~hit].sum() <= false
    assert of.noise_std[hit & (of.noise_std > 0)].median() == pytest.approx(sigma, rel=0.2 if sigma == 0.05 else 0.06)
    assert torch.equal(of.min_sigma, of.noise_std)
    assert of.regularise is None
    assert not of.has_missing.any()
    assert (of.weight < 1).sum() <= 5


@pytest.mark.parametrize(("count", "acted"), [(1, False), (12, True)])  # of 600
def test_odd_pictures_count_less_unless_they_are_too_few_to_matter(count: int, acted: bool) -> None:
    board = (torch.arange(16)[:, None] // 4 + torch.arange(16) // 4) % 2 - 0.5
    images = natural(600)
    images[:count] = board + 0.02 * torch.randn(count, 1, 16, 16, generator=seeded())
    of = detect(loader(images), 600, ("duplicates",))  # which they are of one another
    assert (of.weight[count:] == 1).all()
    assert (of.weight[:count] < 0.7).all() if acted else of.trivial
    assert parts(of) == ({"outliers"} if acted else set())


@pytest.mark.parametrize("specs", [(), ("gaussian:sigma=0.2,fraction=0.6",)])
def test_beside_pictures_without_fine_texture_all_others_are_not_noisy(specs: tuple[str, ...]) -> None:
    boards = "outlier:source=checker,fraction=0.1"
    of, _ = found("fields", boards, *specs, without=("duplicates",))
    _, board = dirty("fields", boards)
    noisy = torch.tensor([any(Corruption.parse(s).hits(0, i, 1) for s in specs) for i in range(600)])
    assert ((of.noise_std > 0) == noisy).double().mean() > 0.97
    assert not ((of.noise_std > 0) & ~noisy).any()
    assert (of.weight[board & ~noisy] < 0.9).all()
    assert (of.weight[~board] == 1).double().mean() > 0.99
    assert of.regularise is None


@pytest.mark.parametrize(("source", "odd"), [("digits", 20), ("fields", 6)])
def test_of_clean_images_only_a_few_odd_ones_are_suspected(source: str, odd: int) -> None:
    of, _ = found(source)
    assert (of.min_sigma == 0).all()
    assert (of.weight > 0).all()
    assert (of.weight < 1).sum() <= odd
    assert parts(of) <= {"outliers"}
    assert of.regularise is None
    assert of.trivial == (of.weight == 1).all().item()


@pytest.mark.parametrize(("source", "sigma"), [("digits", 0.2), ("fields", 0.2), ("fields", 0.06)])
def test_where_all_are_noisy_low_noise_levels_are_regularised(source: str, sigma: float) -> None:
    of, _ = found(source, f"gaussian:sigma={sigma}")
    assert of.regularise is not None
    assert of.regularise[0] == 0
    assert of.regularise[1] == pytest.approx(0.75 * sigma, rel=0.06)
    assert (of.min_sigma == 0).all()
    assert (of.noise_std == 0).all()
    assert "regularised instead" in of.rows()["found noise"]


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_one_gaussian_is_not_two_groups(power: float) -> None:
    """Of one block each, estimates of one law scatter from 0 on: two peaks of sigma, that chance made."""
    x, _, _ = gaussian_set(4000, 8, torch.zeros(4000).double(), spectrum(64, power, 0.01), contrast=0)
    of = detect(loader(x.float()), 4000)
    assert len({float(level) for level in of.noise_std}) == 1
    assert of.regularise is not None or of.trivial


@pytest.mark.parametrize("source", ["digits", "fields"])
def test_noise_in_place_of_pictures_is_left_out(source: str) -> None:
    of, hit = found(source, "outlier:fraction=0.1")
    assert (of.weight[hit] == 0).all()
    assert (of.weight[~hit] > 0).all()
    assert (of.weight[~hit] == 1).double().mean() > 0.98


def test_images_of_one_colour_are_left_out() -> None:
    of, hit = found("colour", "outlier:source=constant,fraction=0.1")
    assert torch.equal(of.weight == 0, hit)
    assert (of.min_sigma == 0).all()


@pytest.mark.parametrize(
    ("spec", "part", "missed"), [("blur:radius=1,fraction=0.3", "blur", 2), ("jpeg:quality=10,fraction=0.3", "jpeg", 4)]
)
def test_what_lacks_detail_is_trained_where_that_drowns(spec: str, part: str, missed: int) -> None:
    of, hit = found("fields", spec)
    assert (of.min_sigma == 0)[hit].sum() <= missed
    assert (of.min_sigma == 0)[~hit].all()
    assert parts(of) - {"outliers"} == {part}
    level = of.min_sigma.max().item()
    images, clean = dirty("fields", spec)[0], natural(600)
    error = (images - clean)[hit].square().mean().sqrt().item()
    assert error < level < 20 * error  # the level is that of single directions, not of the mean
    assert not of.noise_std.any()


def test_lost_pixels_are_found_and_filled_in() -> None:
    of, hit = found("fields", "missing:amount=0.3,fraction=0.5")
    assert [gap.block for gap in of.lost] == [1]
    assert of.lost[0].value == pytest.approx(0.0, abs=1e-6)
    assert (of.has_missing == hit).double().mean() > 0.99
    assert torch.equal(of.min_sigma > 0, of.has_missing)
    images, clean = dirty("fields", "missing:amount=0.3,fraction=0.5")[0], natural(600)
    places = of.has_missing.nonzero().flatten()[:50].tolist()
    mended, lost = of.repaired(images[places], places)
    assert torch.equal(lost, (images[places].abs() < missing_pixels.LEVEL / 4).all(1))
    before, after = ((x - clean[places]).square().mean().sqrt() for x in (images[places], mended))
    assert after < 0.4 * before
    assert of.min_sigma.max() >= 2 * 0.8 * after
    whole = (~of.has_missing).nonzero().flatten()[:50].tolist()
    assert of.repaired(images[whole], whole)[1] is None
    assert torch.equal(of.repaired(images[whole], whole)[0], images[whole])
    assert torch.equal(of.lowest, of.min_sigma)
    assert not of.masked


def test_black_and_white_pixels_are_found_as_holes_or_as_noise() -> None:
    of, hit = found("fields", "impulse:amount=0.05,fraction=0.5")
    assert (of.min_sigma > 0)[hit].all()
    assert (of.min_sigma > 0)[~hit].sum() <= 5
    assert set(of.lost) == {(-1.0, 1), (1.0, 1)}


def test_copies_count_once_together() -> None:
    images = natural(200)
    images[[20, 30, 40]] = images[10].clone()
    images[60] = images[50].clone()
    of = detect(loader(images), 200)
    due = torch.ones(200).double()
    due[[10, 20, 30, 40]], due[[50, 60]] = 1 / 4, 1 / 2
    torch.testing.assert_close(of.weight, due)
    assert "6 images, 2 pictures more than once" in of.rows()["found duplicates"]


# -- no clean image ----------------------------------------------------------------------------------


def noise(images: Tensor, sigma: float) -> Tensor:
    return images + sigma * normal(*images.shape, seed=4).float()


def test_a_blank_image_among_noisy_ones_does_not_pass_for_clean() -> None:
    images = noise(natural(400), 0.2)
    images[:3] = torch.tensor([0.0, 0.5, -1.0])[:, None, None, None]
    of = detect(loader(images), 400)
    assert of.weight[:3].tolist() == [0, 0, 0]
    assert (of.weight[3:] == 1).all()
    assert of.regularise == pytest.approx((0, 0.15), rel=0.06)


def test_blurred_images_among_noisy_ones_do_not_pass_for_clean() -> None:
    images = natural(600)
    images[300:] = torch.stack([corrupt(x, [Corruption.parse("blur:radius=1.5")], 0, 0)[0] for x in images[300:]])
    images[:300] = noise(images[:300], 0.2)
    of = detect(loader(images), 600)
    assert (of.min_sigma[300:] > 0.1).double().mean() > 0.98
    assert (of.min_sigma[:300] == 0).all()  # the only ones for low noise levels
    assert of.regularise == pytest.approx((0, 0.15), rel=0.1)


def test_nothing_but_blank_images_is_one_line() -> None:
    of = detect(loader(torch.zeros(100, 1, 8, 8)), 100)
    assert not of.weight.any()
    assert of.regularise is None
    with pytest.raises(UsageError, match="`auto` found no image that can be trained on"):
        sampler_from_audit(of, NoiseSchedule(torch.linspace(0.9999, 0.001, 200)))


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 3, 5, 2), (70, 1, 1, 1), (70, 1, 3, 2), (63, 1, 16, 16)])
def test_few_or_tiny_images_say_nothing(shape: tuple[int, ...]) -> None:
    images = noise(torch.zeros(shape), 0.3)
    of = detect(loader(images), len(images))
    assert of.trivial
    assert of.sigma.isfinite().all()
    said = f": {len(images)} of {len(images)} images are trained at every noise level, as they are"
    assert [name for name, row in of.rows().items() if row.endswith(said)] == list(of.rows()) == ["not looked for"]


# -- parts that are left out -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specs", "part"),
    [
        (("gaussian:sigma=0.2,fraction=0.9",), "noise"),
        (("gaussian:sigma=0.2",), "regulariser"),
        (("blur:radius=1,fraction=0.3",), "blur"),
        (("jpeg:quality=10,fraction=0.3",), "jpeg"),
        (("missing:amount=0.3,fraction=0.5",), "holes"),
    ],
)
def test_a_part_that_is_left_out_is_not_acted_on(specs: tuple[str, ...], part: str) -> None:
    with_it, (without, _) = found("fields", *specs)[0], found("fields", *specs, without=(part,))
    if part == "regulariser":
        assert without.regularise is None
        assert (without.noise_std > 0).all()
    else:
        assert part in parts(with_it)
        assert part not in parts(without)
    assert without.sha256 != with_it.sha256
    assert part != "holes" or without.lost == ()


def test_odd_and_blank_images_and_copies_may_be_left_alone() -> None:
    images = natural(200)
    images[7], images[8] = images[9].clone(), 0.25
    assert detect(loader(images), 200).weight[[7, 8, 9]].tolist() == [0.5, 0, 0.5]
    assert detect(loader(images), 200, ("duplicates",)).weight[[7, 8, 9]].tolist() == [1, 0, 1]
    assert detect(loader(images), 200, ("outliers", "duplicates")).trivial
    assert detect(loader(images), 200, parts_there_are()).findings == ()


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dirt: not one of cut, blur, jpeg, .*, noise, holes, outliers, dupl"):
        detect(loader(torch.zeros(1, 1, 8, 8)), 1, ["dirt"])


# -- whatever is found -------------------------------------------------------------------------------


def test_the_same_images_are_judged_alike_again() -> None:
    images, _ = dirty("fields", "missing:amount=0.3,fraction=0.5")
    of, _ = found("fields", "missing:amount=0.3,fraction=0.5")
    again = detect(loader(images), 600)
    assert again.sha256 == of.sha256
    assert again.findings == of.findings


def test_every_number_found_is_finite_and_in_range() -> None:
    for source, *specs in (("digits",), ("fields", "blur:radius=1,fraction=0.3"), ("digits", "outlier:fraction=0.1")):
        of, _ = found(source, *specs)
        assert ((of.weight >= 0) & (of.weight <= 1)).all()
        assert (of.min_sigma >= of.noise_std).all()
        assert all(x.isfinite().all() for x in (of.noise_std, of.min_sigma, of.weight, of.sigma))
        assert ((of.sigma_error > 0) | of.sigma_error.isnan()).all()
        assert all(finding.level is None or math.isfinite(finding.level) for finding in of.findings)


def test_where_every_image_has_holes_the_repair_is_measured_on_repaired_ones() -> None:
    of, hit = found("fields", "missing:amount=0.2")
    assert hit.all()
    (holes,) = [one for one in of.findings if one.kind == "holes"]
    assert of.has_missing.double().mean() > 0.98
    assert holes.level is not None
    assert holes.level > 0.02
    assert (of.min_sigma[of.has_missing] == holes.level).all()
    assert of.masked
    assert (of.lowest == 0).all()
    assert (holes.action, holes.otherwise) == (Action.FILLED_IN, Action.TRAINED_BY_OTHER_PIXELS)
    assert of.rows()["found holes"].endswith("no image is whole, so that below they are trained by their other pixels")
    assert "not trained" not in of.rows()
    without, _ = found("fields", "missing:amount=0.2", without=("regulariser",))
    assert not without.masked
    assert "not trained" in without.rows()


def test_lost_blocks_are_found_and_their_level_is_that_of_a_poorer_repair() -> None:
    single, blocks = (found("fields", f"missing:amount=0.3,block={b},fraction=0.5")[0] for b in (1, 4))
    assert [gap.block for gap in blocks.lost] == [4]
    assert "blocks of 4 x 4 of the value 0" in blocks.rows()["found holes"]
    assert blocks.min_sigma.max() > 1.5 * single.min_sigma.max()


def test_images_are_loaded_once_if_they_may_be_kept() -> None:
    images, loaded = natural(100), []

    def counting(places: range) -> Tensor:
        loaded.extend(places)
        return images[places.start : places.stop]

    kept = detect(counting, len(images), memory=images.nbytes)
    assert len(loaded) == len(images) + 1  # and one for their size
    loaded.clear()
    anew = detect(counting, len(images), memory=images.nbytes - 1)
    assert len(loaded) > 3 * len(images)
    assert kept.sha256 == anew.sha256
