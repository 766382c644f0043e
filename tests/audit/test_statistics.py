"""The blind noise estimate against known noise; bad files, duplicates and blank images found; the report on disk.

Long: one section per claim.
"""

import json
import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from robustdiff.audit import single_image_noise
from robustdiff.audit import statistics as module
from robustdiff.audit.files import check_output, write_audit
from robustdiff.audit.single_image_noise import noise_std
from robustdiff.audit.statistics import image_statistics, measure
from robustdiff.data.dataset import load_images
from robustdiff.data.sources.open import Source, open_source
from robustdiff.utils.errors import DataError

GREY_LEVEL = 2 / 255


def gaussian(*shape, sigma=0.2, seed=0):
    return sigma * np.random.default_rng(seed).standard_normal(shape)


def eight_bit(image):
    return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def mean_estimate(shape, count, sigma=0.2, background=0.0):
    noise = gaussian(count, *shape, sigma=sigma)
    return np.mean([noise_std(background + image) for image in noise])


def gradient(channels=3, height=48, width=48):
    """A smooth ramp from -0.6 to 0.6, steeper in each further channel, reversed in the last."""
    ramp = np.add.outer(np.linspace(-0.3, 0.3, height), np.linspace(-0.3, 0.3, width))
    return np.stack([ramp * factor for factor in (0.8, 1.0, -0.6)[:channels]])


# -- the noise estimate ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "count"),
    [((1, 5, 5), 1500), ((1, 8, 8), 800), ((3, 8, 8), 600), ((1, 16, 16), 300), ((3, 11, 14), 300), ((3, 32, 32), 60),
     ((1, 64, 40), 60), ((3, 96, 96), 12)],
)  # fmt: skip
def test_pure_noise_is_estimated_within_four_per_cent_on_average(shape, count):
    # standard error of the means: at most one per cent
    assert mean_estimate(shape, count) == pytest.approx(0.2, rel=0.04)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.3])
def test_noise_in_eight_bit_pictures_is_estimated(sigma):
    estimates = [noise_std(eight_bit(gradient() + gaussian(3, 48, 48, sigma=sigma, seed=s))) for s in range(20)]
    assert np.mean(estimates) == pytest.approx(sigma, rel=0.04)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_estimate_scales_with_the_image(channels):
    image = gradient(channels) + gaussian(channels, 48, 48)
    assert noise_std(0.25 * image) == pytest.approx(0.25 * noise_std(image), rel=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_smooth_gradient_is_not_noise(channels):
    clean = gradient(channels)
    noise = gaussian(20, channels, 48, 48, sigma=0.03)
    with_gradient = np.mean([noise_std(clean + one) for one in noise])
    assert with_gradient == pytest.approx(np.mean([noise_std(one) for one in noise]), rel=0.04)
    assert noise_std(clean) < 1e-4
    assert noise_std(eight_bit(clean)) < GREY_LEVEL / 2


def test_few_edges_hardly_move_it():
    step = np.where(np.arange(48) < 24, -0.5, 0.5) * np.ones((1, 48, 1))
    noise = gaussian(20, 1, 48, 48, sigma=0.05)
    assert np.mean([noise_std(step + one) for one in noise]) == pytest.approx(0.05, rel=0.06)


def test_a_few_spots_move_it_little():
    spots = np.zeros((1, 48, 48))
    spots[0, [5, 9, 15, 22, 27, 33, 38, 44, 12, 30], [7, 40, 21, 12, 33, 5, 42, 26, 30, 20]] = 0.8
    noise = gaussian(20, 1, 48, 48, sigma=0.05)
    assert np.mean([noise_std(spots + one) for one in noise]) < 0.06  # the eigenvalue itself says 0.076


def test_blurred_texture_leaves_a_direction_free():
    texture = gaussian(1, 52, 52, sigma=1.5, seed=5)
    for axis in (1, 2):
        for _ in range(3):
            texture = (texture + np.roll(texture, 1, axis)) / 2
    texture = texture[:, 2:-2, 2:-2]
    assert texture.std() > 0.3
    noise = gaussian(20, 1, 48, 48, sigma=0.05)
    assert np.mean([noise_std(texture + one) for one in noise]) == pytest.approx(0.05, rel=0.15)


def test_texture_shared_by_the_channels_is_not_noise():
    texture = gaussian(1, 48, 48, sigma=0.3, seed=5).repeat(3, 0) * np.array([1, 0.7, 0.4])[:, None, None]
    noise = gaussian(10, 3, 48, 48, sigma=0.05)
    assert noise_std(texture[:1]) > 0.25  # what a single channel would say
    assert np.mean([noise_std(texture + one) for one in noise]) == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (9, 128, 200)])
@pytest.mark.parametrize("share", [2, 4])
def test_clipped_and_constant_areas_do_not_hide_noise(colour, share):
    images = [eight_bit(gradient() + gaussian(3, 48, 48, sigma=0.1, seed=s)) for s in range(10)]
    for image in images:
        image[:, :, 48 // share :] = np.array(colour)[:, None, None]
    assert np.mean([noise_std(image) for image in images]) == pytest.approx(0.1, rel=0.06)


@pytest.mark.parametrize("brightness", [0.95, -0.95])
def test_areas_where_many_values_are_clipped_do_not_lower_it(brightness):
    background = np.where(np.arange(48) < 24, 0, brightness)
    noise = [background + gaussian(3, 48, 48, seed=s) for s in range(20)]
    assert np.mean([noise_std(eight_bit(image)) for image in noise]) == pytest.approx(0.2, rel=0.04)
    assert np.mean([noise_std(image.clip(-1, 1)) for image in noise]) == pytest.approx(0.2, rel=0.04)


def test_rounding_to_eight_bit_is_subtracted():
    images = [eight_bit(gaussian(1, 128, 128, sigma=GREY_LEVEL, seed=s)) for s in range(16)]
    # left in, it would add 4.1 per cent
    assert np.mean([noise_std(image) for image in images]) == pytest.approx(GREY_LEVEL, rel=0.02)


def test_grey_stored_in_colour_is_estimated_as_grey():
    grey = eight_bit(gaussian(1, 32, 32))
    expected = noise_std(grey)
    assert expected == pytest.approx(0.2, rel=0.15)
    assert noise_std(grey.repeat(3, 0)) == expected
    sepia = np.round(grey * np.array([1, 0.8, 0.6])[:, None, None]).astype(np.uint8)
    assert noise_std(sepia) == pytest.approx(expected, rel=0.02)
    # one channel follows the other only in part: both count
    assert noise_std(np.concatenate([grey, eight_bit(gaussian(1, 32, 32, seed=1))])) != expected


def test_a_missing_channel_does_not_hide_noise():
    image = eight_bit(gradient() + gaussian(3, 48, 48, sigma=0.1))
    image[1] = 0
    assert noise_std(image) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_image_has_none(value):
    assert noise_std(np.full((3, 20, 20), value, np.uint8)) == 0


@pytest.mark.parametrize(
    ("shape", "too_small"),
    [
        ((1, 5, 5), False),
        ((1, 4, 4), True),
        ((3, 8, 8), False),
        ((3, 7, 7), True),
        ((1, 1, 99), True),
        ((3, 1, 1), True),
    ],
)
def test_too_small_to_say(shape, too_small):
    assert math.isnan(noise_std(gaussian(*shape))) == too_small


def test_tensors_are_taken_and_inputs_left_alone():
    image = gradient() + gaussian(3, 48, 48)
    tensor = torch.from_numpy(eight_bit(image))
    before = tensor.clone()
    assert noise_std(tensor) == noise_std(tensor.numpy())
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 16), (3, 9, 11), (1, 4, 4), (3, 80, 70)])
@pytest.mark.parametrize("kind", ["8 bit", "float"])
def test_many_images_at_once_are_estimated_as_each_alone(shape, kind):
    images = np.stack([gradient(*shape) + gaussian(*shape, sigma=0.02 * i, seed=i) for i in range(12)])
    images = np.clip(1.5 * images, -1, 1)  # many values at the ends
    images[3] = images[3][:1]  # grey
    images[4, 0], images[5] = 0.25, 0.25  # a dead channel; nothing
    images[6, :, 2:] = images[6, :, :1, :1]  # mostly flat
    images = eight_bit(images) if kind == "8 bit" else images
    alone = [noise_std(image) for image in images]
    np.testing.assert_allclose(single_image_noise.noise_stds(images), alone, rtol=2e-3, atol=1e-5)
    order = np.random.default_rng(1).permutation(12)
    np.testing.assert_allclose(
        single_image_noise.noise_stds(images[order]), np.array(alone)[order], rtol=2e-3, atol=1e-5
    )


def test_large_images_are_looked_at_in_part(monkeypatch):
    counts = []
    kept = single_image_noise._smallest_projection
    monkeypatch.setattr(
        single_image_noise, "_smallest_projection", lambda p, k: (counts.append(p.shape[1]), kept(p, k))[1]
    )
    assert noise_std(gaussian(3, 700, 500)) == pytest.approx(0.2, rel=0.04)
    assert single_image_noise.MAX_PATCHES / 2 < counts[0] <= single_image_noise.MAX_PATCHES * 1.05


# -- one image ---------------------------------------------------------------------------------------


def test_small_images_of_many_sizes_get_the_noise_of_each_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("robustdiff.audit.statistics.SHAPES", 3)
    monkeypatch.setattr("robustdiff.audit.statistics.TOGETHER", 2)
    for i in range(24):
        size = (10 + i % 7, 12) if i % 8 else (80, 70)  # the latter are not small
        Image.fromarray(eight_bit(gaussian(1, *size, sigma=0.02 * (i + 1), seed=i))[0]).save(tmp_path / f"{i:02}.png")
    audit = image_statistics(open_source(str(tmp_path)))
    assert len(audit.records) == 24
    for record in audit.records:
        assert record.noise == pytest.approx(noise_std(np.array(Image.open(tmp_path / record.name))[None]), rel=1e-3)


def test_the_moments_are_numpys():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 14)).astype(np.uint8)
    record = measure(pixels)
    assert record.mean == pytest.approx((pixels / 255).mean((1, 2)), abs=1e-12)
    assert record.std == pytest.approx((pixels / 255).std((1, 2)), abs=1e-12)
    assert record.size == (9, 14)
    assert record.noise == noise_std(pixels)


def checkered(low, high, channels=1, side=8):
    board = np.indices((side, side)).sum(0) % 2
    return np.where(board, high, low).astype(np.uint8)[None].repeat(channels, 0)


def test_near_constant_is_a_standard_deviation_of_two_levels():
    assert measure(checkered(100, 104)).flags == ("near-constant",)  # exactly 2
    little_more = checkered(100, 104)
    little_more[0, 0, 1::2] = 106
    assert measure(little_more).std[0] * 255 == pytest.approx(2.2, abs=0.15)
    assert measure(little_more).flags == ()
    dead_pixel = checkered(30, 30, 3, 64)
    dead_pixel[:, 5, 5] = 120
    assert measure(dead_pixel).flags == ("near-constant",)
    one_channel = checkered(30, 30, 3)
    one_channel[2] = checkered(100, 110)
    assert measure(one_channel).flags == ()


# -- all images --------------------------------------------------------------------------------------


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def audit_folder(folder, **options):
    return image_statistics(open_source(folder), data=str(folder), **options)


@pytest.fixture
def mixed(tmp_path):
    """Two sizes, grey and colour, a copy, a blank image and three bad files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    first = random_pixels(20, 16, 3)
    Image.fromarray(first).save(folder / "a.png")
    Image.fromarray(first).save(folder / "b.bmp")
    Image.fromarray(random_pixels(20, 16, 3, seed=1)).save(folder / "c.png")
    Image.fromarray(random_pixels(12, 12, seed=2)).save(folder / "d.png")
    Image.fromarray(np.full((20, 16, 3), 200, np.uint8)).save(folder / "e.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "text2.png").write_text("no image either")
    (folder / "notes.txt").write_text("a side-car")
    return folder


def test_mixed_sizes_and_bad_files_are_findings(mixed):
    audit = audit_folder(mixed)
    assert [record.name for record in audit.records] == ["a.png", "b.bmp", "c.png", "d.png", "e.png"]
    assert [record.index for record in audit.records] == [0, 1, 2, 3, 4]
    no_image = "not an image"
    assert audit.unreadable == (("empty.png", "empty file"), ("text.png", no_image), ("text2.png", no_image))
    found = audit.summary()
    assert (found["count"], found["unreadable"]) == (5, 3)
    assert list(found["reasons"].items()) == [("not an image", 2), ("empty file", 1)]
    assert found["sizes"] == [{"size": [20, 16], "count": 4}, {"size": [12, 12], "count": 1}]
    assert found["channels"] == [{"channels": 3, "count": 4}, {"channels": 1, "count": 1}]
    assert found["near_constant"] == ["e.png"]
    assert sum(found["conversions"].values()) == 1  # the side-car


def test_the_statistics_are_those_of_all_pixels(mixed):
    found = audit_folder(mixed).summary()
    names = ("a.png", "b.bmp", "c.png", "d.png", "e.png")
    pixels = [np.asarray(Image.open(mixed / name).convert("RGB")) / 255 for name in names]
    values = np.concatenate([image.reshape(-1, 3) for image in pixels])
    assert found["mean"] == pytest.approx(values.mean(0), abs=1e-6)
    assert found["std"] == pytest.approx(values.std(0), abs=1e-6)
    assert found["overall"]["mean"] == pytest.approx(values.mean(), abs=1e-6)
    assert found["overall"]["std"] == pytest.approx(values.std(), abs=1e-6)


def test_resolution_makes_sizes_equal(mixed):
    assert audit_folder(mixed, resolution=10).summary()["sizes"] == [{"size": [10, 10], "count": 5}]


def test_duplicates_are_equal_pixels_of_equal_shape():
    one, other = random_pixels(6, 8, 3), random_pixels(6, 8, 3, seed=1)
    grey = random_pixels(6, 8, 1, seed=2)
    images = [other, one, one.reshape(8, 6, 3), grey, grey.repeat(3, 2), one, grey, one]
    source = Source("list", [f"n{i}" for i in range(8)], images.__getitem__)
    audit = image_statistics(source)
    assert audit.duplicates == ((1, 5, 7), (3, 6))
    assert [i for i, record in enumerate(audit.records) if "duplicate" in record.flags] == [1, 3, 5, 6, 7]
    assert audit.summary()["duplicates"] == [["n1", "n5", "n7"], ["n3", "n6"]]
    assert len({audit.records[i].sha256 for i in (0, 1, 2, 3, 4)}) == 5


def noisy_source(sigmas, side=24, channels=3):
    images = [eight_bit(gaussian(side, side, channels, sigma=s, seed=i)) for i, s in enumerate(sigmas)]
    return Source("list", [f"n{i:02d}" for i in range(len(sigmas))], images.__getitem__), images


def test_the_noisiest_come_first_on_the_contact_sheet(tmp_path):
    sigmas = [0.02 * (1 + (7 * i) % 23) for i in range(23)]
    source, images = noisy_source(sigmas)
    audit = image_statistics(source)
    estimates = [record.noise for record in audit.records]
    assert audit.worst == tuple(sorted(range(23), key=lambda i: -estimates[i])[:20])
    assert sigmas.index(max(sigmas)) in audit.worst[:3]
    assert sigmas.index(min(sigmas)) not in audit.worst
    write_audit(audit, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert report["worst"] == [f"n{i:02d}" for i in audit.worst]
    sheet = np.asarray(Image.open(tmp_path / "out" / "worst.png"))
    assert sheet.shape == (4 * 65 - 1, 5 * 65 - 1, 3)  # 24 pixels doubled, on 64
    for place, i in enumerate(audit.worst):
        top, left = place // 5 * 65, place % 5 * 65
        tile = sheet[top : top + 64, left : left + 64]
        assert (tile[8:-8, 8:-8] == images[i].repeat(2, 0).repeat(2, 1)).all()
        assert (tile[:8] == 128).all()


def test_thumbnails_show_the_centre_unscaled_and_are_of_equal_size():
    large, wide, tiny = random_pixels(200, 300, 3), random_pixels(20, 150, 1), random_pixels(9, 10, 3)
    audit = image_statistics(Source("list", "abc", [large, wide, tiny].__getitem__))
    assert audit.thumbnails.shape == (3, 3, 128, 128)
    tiles = {place: audit.thumbnails[n].permute(1, 2, 0).numpy() for n, place in enumerate(audit.worst)}
    assert (tiles[0] == large[36:164, 86:214]).all()
    assert (tiles[1][54:74] == wide[:, 11:139]).all()
    assert (tiles[1][:54] == 128).all()
    assert (tiles[2][10:118, 4:124] == tiny.repeat(12, 0).repeat(12, 1)).all()


def test_a_file_that_goes_away_meanwhile_leaves_an_empty_thumbnail():
    source, images = noisy_source([0.1, 0.3])
    reads = []

    def read(index):
        reads.append(index)
        if reads.count(index) > 1 and index == 1:
            raise OSError("gone")
        return images[index]

    audit = image_statistics(Source("list", source.names, read))
    assert audit.worst == (1, 0)
    assert (audit.thumbnails[0] == 128).all()
    assert (audit.thumbnails[1] != 128).any()


def test_pixels_are_not_kept():
    def read(index):
        return random_pixels(200, 200, 3, seed=index)

    noise_std(gaussian(3, 200, 200))  # its table
    tracemalloc.start()
    try:
        audit = image_statistics(Source("list", [str(i) for i in range(300)], read))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(audit.records) == 300
    assert peak < 300 * 200 * 200 * 3  # of which decoding's own buffers take the most


def test_pixels_that_fit_are_kept_as_they_would_be_loaded(tmp_path):
    Image.fromarray(random_pixels(20, 16, 3)).save(tmp_path / "a.png")
    Image.fromarray(random_pixels(20, 16, seed=1)).save(tmp_path / "b.png")
    (tmp_path / "c.png").touch()
    Image.fromarray(random_pixels(20, 16, 4, seed=2)).save(tmp_path / "d.png")
    whole = 6 * 20 * 16 * 3
    for resolution in (None, 10):
        kept = audit_folder(tmp_path, resolution=resolution, memory=whole).images
        loaded = load_images(tmp_path, resolution=resolution, max_bad_fraction=1.0)
        assert torch.equal(kept.images, loaded.images)
        assert (kept.names, kept.skipped, kept.what) == (loaded.names, loaded.skipped, loaded.what)
    assert audit_folder(tmp_path, memory=whole - 1).images is None
    Image.fromarray(random_pixels(16, 20, 3)).save(tmp_path / "e.png")
    assert audit_folder(tmp_path, memory=2 * whole).images is None
    assert len(audit_folder(tmp_path, resolution=10, memory=2 * whole).images) == 4


def test_heavy_pixels_are_loaded_again_not_kept(tmp_path):
    Image.fromarray(random_pixels(300, 300, 3)).save(tmp_path / "a.png")
    assert audit_folder(tmp_path, memory=2**30).images is None
    assert len(audit_folder(tmp_path, memory=2**30, resolution=100).images) == 1


def test_nothing_readable_is_a_finding_too(tmp_path):
    audit = image_statistics(
        Source("list", ["x", "y"], lambda index: b"nothing", skipped=[("xx", "broken symbolic link")])
    )
    assert [name for name, _ in audit.unreadable] == ["x", "xx", "y"]
    assert audit.records == ()
    assert audit.worst == ()
    text = audit.text()
    assert "0 images" in text
    assert "2 x not an image, 1 x broken symbolic link" in text
    write_audit(audit, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["audit.json"]
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["images"] == []


# -- the report --------------------------------------------------------------------------------------


def test_the_text_names_what_was_found(mixed):
    lines = audit_folder(mixed).text().splitlines()
    assert lines[0] == f"{mixed}: 5 images (folder), 3 not readable"
    assert lines[1] == "size, width x height: 16 x 20 (4 images), 12 x 12 (1 image)"
    assert lines[2] == "channels: 3 (4 images), 1 (1 image)"
    assert "not readable: 2 x not an image, 1 x empty file" in lines
    assert "  empty.png: empty file" in lines
    place = lines.index("exact duplicates: 2 images in 1 group")
    assert lines[place + 1] == "  a.png = b.bmp"
    place = next(i for i, line in enumerate(lines) if line.startswith("near-constant"))
    assert lines[place].endswith(": 1")
    assert lines[place + 1] == "  e.png"
    bars = [re.fullmatch(r"  [\d.]+ - (?:[\d.]+|or more) +(\d+)(?: #+)?", line) for line in lines[place + 4 :]]
    assert sum(int(bar[1]) for bar in bars) == 5


def test_only_the_first_few_are_named():
    blank = np.full((6, 6, 1), 3, np.uint8)
    bad = [(f"bad{i}", "truncated") for i in range(9)]
    audit = image_statistics(Source("list", [f"n{i}" for i in range(9)], lambda index: blank, skipped=bad))
    lines = audit.text().splitlines()
    assert lines.count("  and 4 more") == 2
    assert "  bad4: truncated" in lines
    assert "  bad5: truncated" not in lines
    assert "  n0 = n1 = n2 = n3 and 5 more" in lines
    sizes = [random_pixels(6, 6 + i, 1) for i in range(7)]
    text = image_statistics(Source("list", "abcdefg", sizes.__getitem__)).text()
    assert "10 x 6 (1 image), and 2 more" in text


def test_names_cannot_upset_the_terminal():
    blank = np.full((6, 6, 1), 3, np.uint8)
    names = ["a\x1b[2J", "line\nbreak", "\udcff"]
    audit = image_statistics(
        Source("list", names, lambda index: blank, skipped=[("\x07", "empty file")]), data="d\x1bd"
    )
    text = audit.text()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"'line\nbreak'" in text
    text.encode()  # a lone surrogate could not be printed


def test_the_histogram_counts_everything_once():
    values = [0.0, 0.0004, 0.011, 0.019, 0.02, 0.0201, *[0.15] * 400, 3.0]
    lines = module._histogram(values)
    counts = [int(line.split("-")[1].replace("or more", "x").split()[1]) for line in lines]
    assert sum(counts) == len(values)
    assert lines[0].startswith("  0.00 - 0.01 ")
    assert counts[:4] == [2, 2, 2, 0]
    assert "or more" in lines[-1]
    assert counts[-1] == 401
    assert lines[-1].endswith(" " + "#" * 40)
    assert module._histogram([0.35, 0.8])[7] == "  0.35 - 0.40          1 " + "#" * 40  # 0.35 / 0.05 < 7
    assert module._histogram([0.0]) == ["  0.0000 - or more       1 " + "#" * 40]


def test_the_json_is_strict_and_complete(mixed, tmp_path):
    Image.fromarray(random_pixels(4, 4)).save(mixed / "f.png")
    write_audit(audit_folder(mixed), tmp_path / "new" / "out")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]
    text = (tmp_path / "new" / "out" / "audit.json").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads(text, parse_constant=refuse)
    assert report["format"] == "robustdiff audit 1"
    assert report["source"] == str(mixed)
    assert "[-1, 1]" in report["units"]
    assert report["summary"] == audit_folder(mixed).summary()
    assert report["unreadable"][0] == {"name": "empty.png", "reason": "empty file"}
    by_name = {entry["name"]: entry for entry in report["images"]}
    pixels = np.asarray(Image.open(mixed / "a.png")).transpose(2, 0, 1)
    record = measure(pixels)
    assert by_name["a.png"] == {
        "index": 0,
        "name": "a.png",
        "size": [20, 16],
        "mean": pytest.approx(record.mean, abs=1e-6),
        "std": pytest.approx(record.std, abs=1e-6),
        "noise": pytest.approx(record.noise, abs=1e-6),
        "sha256": record.sha256[:16],
        "flags": ["duplicate"],
        "file": {"format": "PNG", "mode": "RGB", "size": [20, 16]},
    }
    assert by_name["e.png"]["flags"] == ["near-constant"]
    assert by_name["f.png"]["noise"] is None
    assert "f.png" not in report["worst"]
    assert sum(line.startswith('  {"index"') for line in text.splitlines()) == 6


def tiny_audit(data=""):
    return image_statistics(noisy_source([0.1])[0], data=data)


def test_only_an_audit_is_overwritten(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write_audit(tiny_audit("one"), folder)  # an empty folder is nobody's
    with pytest.raises(DataError, match="`overwrite`"):
        write_audit(tiny_audit("two"), folder)
    write_audit(tiny_audit("two"), folder, overwrite=True)
    assert json.loads((folder / "audit.json").read_text())["source"] == "two"
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="spares"):
        write_audit(tiny_audit(), folder, overwrite=True)
    assert (folder / "mine.txt").exists()
    (folder / "mine.txt").unlink()
    (folder / "audit.json").write_text("[]")
    with pytest.raises(DataError, match="spares"):
        check_output("", folder, overwrite=True)
    with pytest.raises(DataError, match="not a folder"):
        check_output("", folder / "audit.json", overwrite=True)


def test_the_report_stays_out_of_the_data(mixed):
    for folder in (mixed, mixed / "deep" / "out"):
        with pytest.raises(DataError, match="would join"):
            check_output(str(mixed), folder, overwrite=True)
    check_output(str(mixed), mixed.parent / "out")


def test_a_failed_write_leaves_the_earlier_report(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    write_audit(tiny_audit("one"), folder)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robustdiff.audit.files.save_png", full)
    with pytest.raises(OSError, match="No space"):
        write_audit(tiny_audit("two"), folder, overwrite=True)
    assert json.loads((folder / "audit.json").read_text())["source"] == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
