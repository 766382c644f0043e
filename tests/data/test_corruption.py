"""Specs, purity and statistics of the dirt; equality with scipy and Pillow."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from robustdiff.data.corruption import KINDS, Corruption, corrupt, help_text
from robustdiff.utils.images import from_uint8, to_uint8
from robustdiff.utils.seeds import derive_seed

SPECS = [
    "gaussian:sigma=0.3,fraction=0.5",
    "impulse:amount=0.2",
    "outlier:source=uniform",
    "outlier:source=constant",
    "outlier:source=checker",
    "missing:amount=0.4,value=-0.5,block=3",
    "blur:radius=1.5",
    "jpeg:quality=20",
]


def picture(height=24, width=20, channels=3, seed=0):
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


# -- specs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*SPECS, *KINDS, "gaussian:sigma=1e-7,fraction=0", "blur: radius = 0.1 , fraction=1"])
def test_the_canonical_spec_parses_back_to_an_equal_object(spec):
    corruption = Corruption.parse(spec)
    assert Corruption.parse(str(corruption)) == corruption
    assert hash(Corruption.parse(str(corruption))) == hash(corruption)
    assert str(Corruption.parse(str(corruption))) == str(corruption)


def test_the_canonical_spec_writes_every_parameter():
    assert str(Corruption.parse("missing:fraction=0.9,block=4")) == "missing:amount=0.3,value=0,block=4,fraction=0.9"
    assert Corruption("gaussian", {"sigma": 0.25}, 0.5) == Corruption.parse("gaussian:fraction=0.5,sigma=.25")
    assert Corruption.parse("gaussian:sigma=0.1") != Corruption.parse("gaussian:sigma=0.2")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gausian:sigma=0.1", ["gausian", "did you mean gaussian?", "impulse", "jpeg"]),
        ("", ["unknown corruption", "gaussian"]),
        ("gaussian:sgma=0.1", ["sgma", "did you mean sigma?", "fraction"]),
        ("jpeg:qualty=3", ["did you mean quality?"]),
        ("gaussian:sigma=-0.1", ["sigma", "[0, 100]", "-0.1"]),
        ("gaussian:sigma=nan", ["sigma", "nan"]),
        ("gaussian:sigma=inf", ["sigma", "inf"]),
        ("gaussian:sigma=big", ["sigma", "big"]),
        ("gaussian:fraction=1.1", ["fraction", "[0, 1]"]),
        ("impulse:amount=2", ["amount", "[0, 1]"]),
        ("missing:value=-1.5", ["value", "[-1, 1]"]),
        ("missing:block=2.5", ["block", "whole number"]),
        ("jpeg:quality=96", ["quality", "[1, 95]"]),
        ("outlier:source=unifrm", ["source", "did you mean uniform?", "checker"]),
        ("gaussian:", ["name=value"]),
        ("gaussian:sigma", ["name=value", "sigma"]),
        ("gaussian:sigma=", ["name=value"]),
        ("gaussian:sigma=1,,fraction=1", ["name=value"]),
        ("gaussian:sigma=1,sigma=2", ["sigma", "twice"]),
        ("gaussian:sigma=1\n2", ["sigma"]),
    ],
)
def test_a_wrong_spec_is_one_line_that_says_what_is_wrong(spec, words):
    with pytest.raises(ValueError) as caught:
        Corruption.parse(spec)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_help_names_everything_and_needs_no_torch():
    text = help_text()
    for kind, (_, parameters) in KINDS.items():
        assert kind in text
        for name, parameter in parameters.items():
            assert f"{name}={parameter.default}" in text
    code = (
        "import sys; from robustdiff.data.corruption import Corruption, help_text\n"
        "help_text(); Corruption.parse('jpeg'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# -- purity ----------------------------------------------------------------------------------------


def test_derived_seeds_are_fixed_for_ever_and_tell_keys_apart():
    # Written down once: a change would silently give every stored experiment other dirt.
    assert derive_seed("noise", 0, 1) == 8939559278842279061
    keys = [(1, 23), (12, 3), ("1", 23), (1, "23"), (123,), ("a", "b"), ("ab",), ("a,b",), (-1,), (1,), ()]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(TypeError, match="float"):
        derive_seed(0.5)


@pytest.mark.parametrize("spec", SPECS)
def test_dirt_is_a_function_of_seed_position_and_index_alone(spec):
    corruption, x0 = Corruption.parse(spec), picture()
    before = x0.clone()
    forwards = [corruption.apply(x0, 5, index, 1) for index in range(12)]
    torch.manual_seed(99)  # the global generator plays no part
    backwards = [Corruption.parse(spec).apply(x0, 5, index, 1) for index in reversed(range(12))]
    for one, other in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(x0, before)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.split(":")[0] not in ("blur", "jpeg")])
def test_other_indices_seeds_and_positions_get_other_dirt(spec):
    corruption = Corruption.parse(spec.removesuffix(",fraction=0.5"))
    keys = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1)]
    images = [corruption.apply(picture(), seed, index, position) for seed, index, position in keys]
    for i, image in enumerate(images):
        for other in images[:i]:
            assert not torch.equal(image, other)


def test_the_same_dirt_in_another_process():
    code = (
        "import torch; from robustdiff.data.corruption import Corruption\n"
        "x = Corruption.parse('gaussian:sigma=1').apply(torch.zeros(1, 4, 4), 3, 7, 2); print(x.flatten().tolist())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = Corruption.parse("gaussian:sigma=1").apply(torch.zeros(1, 4, 4), 3, 7, 2)
    assert there.strip() == str(here.flatten().tolist())


def test_neighbouring_keys_give_unrelated_noise():
    corruption, zero = Corruption.parse("gaussian:sigma=1"), torch.zeros(1, 64, 64)
    rows = [corruption.apply(zero, seed, index, place) for seed in (0, 1) for index in range(8) for place in (0, 1)]
    correlation = torch.corrcoef(torch.stack(rows).flatten(1)) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / 64  # five standard errors


def test_hits_have_the_stated_frequency_are_nested_and_independent_of_the_rest():
    indices = range(20_000)
    hit = {f: [Corruption("gaussian", {}, f).hits(1, i, 0) for i in indices] for f in (0.0, 0.1, 0.9, 1.0)}
    assert sum(hit[0.0]) == 0
    assert sum(hit[1.0]) == len(indices)
    assert abs(np.mean(hit[0.9]) - 0.9) < 5 * (0.09 / len(indices)) ** 0.5
    assert all(strong for weak, strong in zip(hit[0.1], hit[0.9], strict=True) if weak)
    for kind, seed, position in (("gaussian", 1, 1), ("gaussian", 2, 0), ("blur", 1, 0)):
        elsewhere = [Corruption(kind, {}, 0.9).hits(seed, i, position) for i in indices]
        both = np.mean([a and b for a, b in zip(hit[0.9], elsewhere, strict=True)])
        assert abs(both - 0.81) < 5 * (0.81 * 0.19 / len(indices)) ** 0.5


def test_an_image_that_is_not_hit_is_returned_as_it_is():
    x0 = picture()
    assert Corruption.parse("outlier:fraction=0").apply(x0, 0, 0) is x0
    assert corrupt(x0, [], 0, 0) == (x0, ())


def test_a_list_is_applied_in_order_each_at_its_position():
    x0 = picture()
    corruptions = [Corruption.parse(s) for s in ("gaussian:fraction=0.5", "blur:fraction=0.5", "gaussian:sigma=0.1")]
    seen = set()
    for index in range(20):
        expected, kinds = x0, []
        for position, corruption in enumerate(corruptions):
            if corruption.hits(4, index, position):
                expected = corruption.apply(expected, 4, index, position)
                kinds.append(corruption.kind)
        image, hit = corrupt(x0, corruptions, 4, index)
        assert torch.equal(image, expected)
        assert hit == tuple(kinds)
        seen.add(hit)
    assert len(seen) == 4  # every combination of the two coins has come up


def test_precision_does_not_change_the_dirt():
    x0 = picture()
    for spec in SPECS:
        corruption = Corruption.parse(spec.removesuffix(",fraction=0.5"))
        single, double = corruption.apply(x0, 0, 1), corruption.apply(x0.double(), 0, 1)
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 4, 4), torch.zeros(4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)])
def test_anything_but_one_floating_image_is_refused(wrong):
    with pytest.raises(ValueError, match="one floating-point image"):
        Corruption.parse("gaussian:fraction=0").apply(wrong, 0, 0)


# -- what each kind does ---------------------------------------------------------------------------


def test_gaussian_noise_has_the_stated_sigma_is_not_clipped_and_scales():
    x0 = torch.full((3, 128, 128), 0.95)
    noise = Corruption.parse("gaussian:sigma=0.2").apply(x0, 0, 0) - x0
    n = noise.numel()
    assert abs(noise.std().item() - 0.2) < 5 * 0.2 / (2 * n) ** 0.5
    assert abs(noise.mean().item()) < 5 * 0.2 / n**0.5
    assert (x0 + noise).max() > 1.3
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 5 / 128  # channels are independent
    double = Corruption.parse("gaussian:sigma=0.4").apply(x0, 0, 0) - x0
    torch.testing.assert_close(double, 2 * noise, rtol=0, atol=1e-6)


def test_impulse_sets_the_stated_share_to_either_end_in_all_channels():
    x0 = picture(200, 200)
    dirty = Corruption.parse("impulse:amount=0.2").apply(x0, 0, 0)
    changed = dirty != x0
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    for end in (-1, 1):
        share = (dirty == end).all(0).float().mean().item()
        assert abs(share - 0.1) < 5 * (0.09 / 40_000) ** 0.5
    assert torch.equal(dirty.abs() == 1, changed)


def test_missing_pixels_and_blocks():
    x0 = picture(200, 210)
    dirty = Corruption.parse("missing:amount=0.3,value=-0.25").apply(x0, 0, 0)
    lost = (dirty == -0.25).all(0)
    assert abs(lost.float().mean().item() - 0.3) < 5 * (0.21 / lost.numel()) ** 0.5
    assert torch.equal(dirty[:, ~lost], x0[:, ~lost])

    blocks = (Corruption.parse("missing:amount=0.3,block=20").apply(x0, 0, 0) == 0).all(0)
    cells = torch.nn.functional.pad(blocks, (0, 10)).unfold(0, 20, 20).unfold(1, 20, 20)[:, :10].flatten(2)
    assert ((cells.sum(-1) == 0) | (cells.sum(-1) == 400)).all()  # each 20 x 20 square is lost entirely or not at all
    assert 0 < cells[..., 0].float().mean() < 0.6
    for amount, share in ((0, 0), (1, 1)):
        assert (Corruption("missing", {"amount": amount, "block": 7}).apply(x0, 0, 0) == 0).float().mean() == share


def test_outliers_replace_the_image():
    x0, height = picture(64, 64), 64
    for source in ("uniform", "constant", "checker"):
        corruption = Corruption("outlier", {"source": source})
        dirty = corruption.apply(x0, 0, 0)
        assert dirty.shape == x0.shape
        assert dirty.abs().max() <= 1
        assert torch.equal(dirty, corruption.apply(-x0, 0, 0))  # nothing of the image is left
    uniform = Corruption.parse("outlier").apply(x0, 0, 0)
    assert abs(uniform.var().item() - 1 / 3) < 5 * (4 / 45 / uniform.numel()) ** 0.5
    constant = [Corruption.parse("outlier:source=constant").apply(x0, 0, i) for i in range(200)]
    assert all((image.flatten(1).std(1) == 0).all() for image in constant)
    assert abs(torch.stack([image[0, 0, 0] for image in constant]).mean().item()) < 5 * (1 / 3 / 200) ** 0.5
    checker = Corruption.parse("outlier:source=checker").apply(x0, 0, 0)
    edge = height // 4
    assert torch.equal(checker[:, :edge, :edge], checker[:, edge : 2 * edge, edge : 2 * edge])
    assert not torch.equal(checker[:, :edge, :edge], checker[:, :edge, edge : 2 * edge])


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.5, 9.0])
@pytest.mark.parametrize("shape", [(1, 17, 30), (3, 8, 8), (3, 1, 5)])
def test_blur_equals_scipy_and_keeps_the_mean(radius, shape):
    x0 = picture(*shape[1:], channels=shape[0]).double()
    ours = Corruption("blur", {"radius": radius}).apply(x0, 0, 0)
    theirs = np.stack([gaussian_filter(channel, radius, mode="reflect") for channel in x0.numpy()])
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.mean((1, 2)), x0.mean((1, 2)), rtol=0, atol=1e-12)


def test_no_blur_at_radius_zero():
    torch.testing.assert_close(Corruption("blur", {"radius": 0}).apply(picture(), 0, 0), picture(), rtol=0, atol=0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_jpeg_equals_a_round_trip_through_pillow(channels, mode):
    x0 = 1.5 * picture(channels=channels)  # beyond the range: clipped first
    pixels = np.round((np.clip(x0.numpy(), -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "JPEG", quality=20)
    decoded = Image.open(file)
    assert decoded.mode == mode
    expected = np.asarray(decoded, dtype=np.float32).reshape(pixels.shape).transpose(2, 0, 1) / 127.5 - 1
    dirty = Corruption.parse("jpeg:quality=20").apply(x0, 0, 0)
    np.testing.assert_allclose(dirty.numpy(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(dirty, from_uint8(to_uint8(x0)))


def test_jpeg_refuses_other_channel_counts():
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        Corruption.parse("jpeg").apply(torch.zeros(2, 8, 8), 0, 0)


def test_eight_bits_round_trip_round_and_clip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels)[[0, 255]].tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])).tolist() == [0, 255, 0, 1]
