"""The audit on mixtures: damage is as strong as it says, scores count what they should, and the command goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, ndimage

import experiments.audit_mixtures.__main__ as command
from experiments.audit_mixtures import damages, measuring, others, sets, tables
from experiments.audit_mixtures.damages import DAMAGES, HALF, damaged, kinds
from experiments.audit_mixtures.scores import score
from experiments.audit_mixtures.sets import Row, Truth
from experiments.picture_sets import pictures
from robustdiff.audit.detectors.missing_pixels import Gap
from robustdiff.audit.result import AuditResult

SIDE = 96


def apply(kind: str, picture: np.ndarray, strength: float, seed: int = 0) -> np.ndarray:
    return DAMAGES[kind].apply(picture, strength, np.random.default_rng(seed))


def flat(level: float = HALF, channels: int = 3) -> np.ndarray:
    return np.full((SIDE, SIDE, channels), level)


def point() -> np.ndarray:
    """One bright pixel on black."""
    picture = flat(0.0)
    picture[SIDE // 2, SIDE // 2] = 255
    return picture


def textured() -> np.ndarray:
    """Of every colour, no two neighbours alike, never black or white."""
    return np.random.default_rng(5).uniform(40, 200, (SIDE, SIDE, 3))


def std(kind: str, strength: float, level: float = HALF) -> float:
    return float(apply(kind, flat(level), strength).std() / HALF)


def changed(kind: str, strength: float) -> float:
    """Share of pixels that are not what they were, of many pictures."""
    before = textured()
    return float(np.mean([(apply(kind, before, strength, seed) != before).any(2).mean() for seed in range(20)]))


def widths(picture: np.ndarray) -> tuple[float, float]:
    """Standard deviations of light along its shorter and its longer direction, in pixels."""
    weight = picture[..., 0] / picture[..., 0].sum()
    places = np.indices(weight.shape).reshape(2, -1)
    return tuple(np.sqrt(np.linalg.eigvalsh(np.cov(places, aweights=weight.ravel(), ddof=0))))


def length(kind: str, strength: float) -> float:
    """Of a line with the same deviation, over directions."""
    spread = [widths(apply(kind, point(), strength, seed)) for seed in range(10)]
    assert max(across for across, _ in spread) < 0.6
    return float(np.mean([along for _, along in spread]) * 12**0.5)


def factor(kind: str, strength: float) -> float:
    """Pixels of a side for each that it has of its own, where every one was repeated."""
    found = []
    for seed in range(40):
        picture = apply(kind, textured(), strength, seed)
        own = 1 + (np.diff(picture, axis=1) != 0).any((0, 2)).sum()
        if own < 0.9 * SIDE:
            found.append(SIDE / own)
    assert len(found) > 5
    return float(np.mean(found))


def quality(kind: str, strength: float) -> float:
    """The quality whose quantisation every coefficient that is not 0 is a multiple of."""
    picture = apply(kind, textured()[..., :1], strength)[..., 0] - 128
    blocks = picture.reshape(SIDE // 8, 8, SIDE // 8, 8).transpose(0, 2, 1, 3)
    found = fft.dctn(blocks, axes=(2, 3), norm="ortho").reshape(-1, 8, 8)

    def misfit(asked: int) -> float:
        file = BytesIO()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "JPEG", quality=asked)
        steps = np.array(Image.open(file).quantization[0]).reshape(8, 8)
        return float(np.abs(found / steps - np.round(found / steps))[np.abs(found) > 4].mean())

    return min(range(5, 65, 5), key=misfit)


def letters(kind: str, strength: float) -> float:
    """Height of what was written, as a share of the picture; capitals are 7 tenths of it."""
    heights = []
    for seed in range(30):
        rows = np.flatnonzero((apply(kind, flat(), strength, seed) != np.round(HALF)).any((1, 2)))
        heights.append(np.ptp(rows) / SIDE)
    return float(np.median(heights)) / 0.85


def period(kind: str, strength: float) -> float:
    spectrum = np.abs(np.fft.fft2(apply(kind, flat(), strength)[..., 0] - HALF))
    row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
    f = np.fft.fftfreq(SIDE)
    return float(1 / np.hypot(f[row], f[column]))


def apart(kind: str, strength: float) -> float:
    """Distance of the red point from the blue one."""
    red, blue = (ndimage.center_of_mass(apply(kind, point(), strength)[..., channel]) for channel in (0, 2))
    return float(np.hypot(*np.subtract(red, blue)))


def light(kind: str, strength: float) -> float:
    """Of what is not where it was."""
    picture = apply(kind, point(), strength)[..., 0]
    return float(1 - picture[SIDE // 2, SIDE // 2] / picture.sum())


MEANING: dict[str, tuple[Callable[[str, float], float], float]] = {
    "noise": (std, 0.03),
    "poisson": (std, 0.03),
    "camera": (std, 0.1),
    "impulse": (changed, 0.05),
    "holes": (changed, 0.05),
    "blur": (lambda kind, s: widths(apply(kind, point(), s))[1], 0.02),
    "motion": (length, 0.1),
    "enlarged": (factor, 0.06),
    "jpeg": (quality, 0.01),
    "banding": (lambda kind, s: len(np.unique(apply(kind, textured() * 255 / 160 - 64, s).clip(0, 255))), 0.01),
    "blocks": (changed, 0.1),
    "caption": (letters, 0.25),
    "grain": (std, 0.02),
    "halftone": (period, 0.05),
    "rain": (lambda kind, s: float(apply(kind, flat(0.0), s).mean()) / 235 / 0.75, 0.15),
    "moire": (lambda kind, s: 2 * float(apply(kind, flat(channels=1), s).std()) / HALF, 0.05),
    "chroma": (std, 0.02),
    "fringe": (apart, 0.02),
    "ghost": (light, 0.01),
    "haze": (lambda kind, s: 1 - apply(kind, textured(), s).std((0, 1)).mean() / textured().std((0, 1)).mean(), 0.1),
}
"""How strong each kind is in what it did, and how far that may be from what was asked."""


# -- damage ------------------------------------------------------------------------------------------------


def test_every_kind_has_a_meaning() -> None:
    assert MEANING.keys() == DAMAGES.keys()


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_strength_means_what_it_says(kind: str) -> None:
    measure, tolerance = MEANING[kind]
    low, high = DAMAGES[kind].strengths
    for strength in (low, (low * high) ** 0.5):
        strength = round(strength / 5) * 5 if kind == "jpeg" else round(strength) if kind == "banding" else strength
        assert measure(kind, strength) == pytest.approx(strength, rel=tolerance)


def test_photons_make_more_noise_where_it_is_bright() -> None:
    assert std("poisson", 0.1, HALF / 2) == pytest.approx(0.1 * 0.5**0.5, rel=0.05)
    assert std("noise", 0.1, HALF / 2) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_of_cameras_is_shared_by_neighbours(channels: int) -> None:
    made = apply("camera", flat(channels=channels), 0.1)[..., 0] - HALF
    assert (made[1:] * made[:-1]).mean() / made.var() > 0.25
    assert made.std() / HALF == pytest.approx(0.1, rel=0.1)


def test_noise_of_colour_leaves_brightness_alone() -> None:
    assert apply("chroma", flat(), 0.2).mean(2) == pytest.approx(HALF)


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_ends_in_8_bit_and_depends_on_the_generator_alone(channels: int) -> None:
    image = pictures("scenes", 1, 32, channels)[0]
    before = image.copy()
    for kind in kinds(channels):
        (one, strength), (again, _) = (damaged(image, kind, np.random.default_rng(3)) for _ in range(2))
        assert one.dtype == np.uint8
        assert one.shape == image.shape
        assert np.array_equal(one, again)
        assert not np.array_equal(one, image)
        low, high = DAMAGES[kind].strengths
        assert low <= strength <= high
    assert np.array_equal(image, before)


def test_grey_pictures_have_no_damage_of_colour() -> None:
    assert set(kinds(3)) - set(kinds(1)) == {"chroma", "fringe"}
    assert set(kinds(3, known=True)) | set(kinds(3, known=False)) == set(DAMAGES)


def test_weak_is_less_than_what_must_be_found() -> None:
    assert [DAMAGES["noise"].part(strength) for strength in (0.04, 0.05)] == ["weak", "judged"]
    assert [DAMAGES["jpeg"].part(quality) for quality in (30, 31)] == ["judged", "weak"]
    assert DAMAGES["caption"].part(0.01) == "judged"


def test_damage_is_made_without_the_audit() -> None:
    assert "robustdiff" not in Path(damages.__file__).read_text()


# -- sets --------------------------------------------------------------------------------------------------


def test_a_mixture_is_what_its_truth_says() -> None:
    row = Row("mixture", "pink_noise", 32, 3, 200, 0.3)
    images, truth = sets.make(row, {})
    spotless = pictures("pink_noise", 200, 32, seed=row.seed)
    assert np.array_equal(images[truth.clean], spotless[truth.clean])
    assert np.array_equal((images != spotless).any((1, 2, 3)), ~truth.clean)
    counts = [truth.kind.count(kind) for kind in kinds(3, known=True)]
    assert (sum(counts), min(counts), max(counts)) == (51, 4, 5)
    assert len(truth.clean) - truth.clean.sum() == 60
    assert np.array_equal(np.isnan(truth.strength), truth.clean)
    assert np.array_equal(sets.make(row, {})[0], images)


def test_clean_sets_have_no_damage_and_halves_two_kinds_of_pictures() -> None:
    images, truth = sets.make(Row("half", "modules", 32, 1, 20, kind="fog"), {})
    assert truth.clean.all()
    assert sum(len(np.unique(image)) <= 2 for image in images) == 10
    images, truth = sets.make(Row("single", "modules", 32, 1, 20, 0.5, "blur"), {})
    assert set(truth.kind) == {"", "blur"}
    assert (~truth.clean).sum() == 10


def photographs(folder: Path, count: int, size: int) -> Path:
    folder.mkdir()
    for number, image in enumerate(pictures("dead_leaves", count, size)):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("scale", ["small", "full"])
def test_the_plan_of_a_scale(tmp_path: Path, scale: sets.Scale) -> None:
    drawn = sets.plan({}, scale)
    folder = photographs(tmp_path / "photographs", 70, 64)
    rows = sets.plan({"photographs": folder}, scale)
    for some in (drawn, rows):
        assert len({row.name for row in some}) == len(some)
        assert len({row.seed for row in some}) == len(some)
        assert {row.group for row in some} == {"mixture", "single", "clean", "half"}
    mine = [row for row in rows if row.source == "photographs"]
    assert {row.size for row in mine} <= {32, 64}  # no larger: they would be blurred
    assert {row.count for row in mine} == {70}
    images, _ = sets.make(Row("clean", "photographs", 32, 1, 70), {"photographs": folder})
    assert images.shape == (70, 1, 32, 32)
    if scale == "full":
        assert {row.source for row in drawn if row.group == "clean"} == set(sets.KINDS)
        assert {row.dirty for row in drawn if row.group == "mixture"} == {0.05, 0.1, 0.3, 0.6, 0.9}
        assert {row.kind for row in drawn if row.group == "single"} == set(DAMAGES)


# -- scores ------------------------------------------------------------------------------------------------


def some(*places: int, count: int = 8) -> torch.Tensor:
    return torch.tensor([place in places for place in range(count)])


TRUTH = Truth(
    ("", "", "", "noise", "noise", "jpeg", "rain", "noise"), np.array([np.nan] * 3 + [0.1, 0.2, 20, 0.1, 0.04])
)
FOUND = replace(
    AuditResult.of_clean(8),
    groups={"noise": some(0, 3, 5), "duplicates": some(1, 2)},
    weight=torch.where(some(1, 2), 0.5, 1.0).double(),
    min_sigma=torch.where(some(0, 3, 4, 5), 0.3, 0.0).double(),
    signs={
        "damaged": torch.tensor([0.95, 0, 0.6, 0.99, 0.8, 0.95, 0.1, 0]).double(),
        "strength": torch.tensor([0.1, torch.nan, torch.nan, 0.11, 0.2, 0.1, 1, 1]).double(),
    },
)


def test_what_was_found_is_counted() -> None:
    images = np.zeros((8, 3, 4, 4), np.uint8)
    counts = score(FOUND, TRUTH, images, copies_are_false=False)
    assert (counts["images"], counts["damaged"]) == (8, 5)
    noise, weak = counts["kinds"]["noise"]["judged"], counts["kinds"]["noise"]["weak"]
    assert noise == {"images": 2, "found": 1, "limited": 2, "named": 1, "as": {"noise": 1}, "errors": [0.1]}
    assert (weak["images"], weak["found"]) == (1, 0)
    jpeg = counts["kinds"]["jpeg"]["judged"]
    assert (jpeg["found"], jpeg["named"], jpeg["as"]) == (1, 0, {"noise": 1})
    assert counts["kinds"]["rain"]["judged"]["found"] == 0
    assert counts["calibration"] == [[1, 0], [1, 1], [2, 1], [1, 1]]
    assert [(place, kind) for place, kind, *_ in counts["missed"]] == [(4, "noise"), (6, "rain")]
    false = counts["false"]
    assert (false["found"], false["limited"], false["either"], false["copies"]) == (1, 1, 1, 2)
    assert false["groups"] == {"noise": 1, "duplicates": 2}
    drawn = score(FOUND, TRUTH, images, copies_are_false=True)["false"]
    assert (drawn["found"], drawn["limited"], drawn["either"]) == (1, 3, 3)


def test_where_all_is_regularised_no_clean_image_is_spared() -> None:
    counts = score(
        replace(FOUND, regularise=(0.0, 0.1)), TRUTH, np.zeros((8, 3, 4, 4), np.uint8), copies_are_false=False
    )
    assert counts["false"]["either"] == 3


def test_pixels_that_are_filled_in_are_counted_in_clean_images_alone() -> None:
    images = np.full((8, 1, 8, 8), 90, np.uint8)
    images[[2, 5], :, 3, 1:7:2] = 0
    filled = replace(FOUND, has_missing=some(2, 5), lost=(Gap(-1.0),))
    assert score(filled, TRUTH, images, copies_are_false=False)["false"]["filled_pixels"] == 3
    assert score(FOUND, TRUTH, images, copies_are_false=False)["false"]["filled_pixels"] == 0


def test_the_wavelet_estimates_noise_and_its_threshold_knows_the_truth() -> None:
    rng = np.random.default_rng(0)
    images = (
        HALF
        + HALF
        * rng.normal(size=(8, 3, 64, 64))
        * np.array([0.02, 0.03, 0.02, 0.1, 0.2, 0.02, 0.02, 0.04])[:, None, None, None]
    )
    images = damages.to_bytes(images)
    assert others.wavelet_noise(images)[[3, 4]] == pytest.approx([0.1, 0.2], rel=0.05)
    found = others.wavelet(images, TRUTH)
    assert found is not None
    assert found["kinds"]["noise"] == {"judged": {"images": 2, "found": 2}, "weak": {"images": 1, "found": 1}}
    assert (found["kinds"]["jpeg"]["judged"]["found"], found["false"]) == (0, 1)
    assert others.wavelet(images, Truth(("noise",) * 8, np.full(8, 0.1))) is None


def test_cleanvision_sees_what_it_is_made_for() -> None:
    pytest.importorskip("cleanvision")
    images = np.repeat(pictures("dead_leaves", 8, 64), 1, 0)
    images[3] = 128
    found = others.cleanvision(images, TRUTH)
    assert found is not None
    assert found["kinds"]["noise"]["judged"] == {"images": 2, "found": 1}
    assert found["false"] == 0


# -- the command -------------------------------------------------------------------------------------------


def line(name: str, row: Row, counts: dict[str, object]) -> dict[str, object]:
    about = {"name": name, "group": row.group, "source": row.source, "size": row.size, "channels": row.channels}
    told = {"dirty": row.dirty, "kind": row.kind, "seconds": 1.0, "peak_mb": 100, "wavelet": None, "cleanvision": None}
    return {**about, **told, **counts}


def test_goals_are_beside_what_was_measured() -> None:
    counts = score(FOUND, TRUTH, np.zeros((8, 3, 4, 4), np.uint8), copies_are_false=False)
    mixture = line("m", Row("mixture", "photographs", 64, 3, 1000, 0.6), {**counts, "images": 1000})
    spotless = score(
        AuditResult.of_clean(8),
        Truth(("",) * 8, np.full(8, np.nan)),
        np.zeros((8, 3, 4, 4), np.uint8),
        copies_are_false=True,
    )
    text = tables.everything([mixture, line("c", Row("clean", "fog", 64, 3, 8), spotless)])
    assert "| false alarms, worst set | <= 0.5% | 0.10%; 1 of 995 of all sets | yes |" in text
    assert "| noise from 0.05 found | >= 98% | 50.0% of 2 | **no** |" in text
    assert "| jpeg to 30 found | >= 98% | 100.0% of 1 | yes |" in text
    assert "| kinds never simulated, 50% found | >= 2 kinds | 0 of 1 kinds | **no** |" in text
    assert "| strength, median error, worst kind | <= 25% | 10%, noise | yes |" in text
    assert "| clean sets of fewer: lost, worst | <= 2% | 0.0%, c; 0 of 1 beyond | yes |" in text
    assert "| clean sets: pixels filled in | 0 | 0 | yes |" in text


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["audit_mixtures", *words])
    command.main()


def test_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (Row("clean", "modules", 32, 1, count) for count in (80, 81))
    monkeypatch.setattr(command, "plan", lambda folders, scale: [first, second])
    counts = score(
        AuditResult.of_clean(8),
        Truth(("",) * 8, np.full(8, np.nan)),
        np.zeros((8, 1, 4, 4), np.uint8),
        copies_are_false=True,
    )
    ran: list[str] = []

    def apart(row: Row, folders: dict[str, Path]) -> dict[str, object]:
        ran.append(row.name)
        if row is second and ran.count(row.name) == 1:
            raise RuntimeError("killed")
        return line(row.name, row, counts)

    monkeypatch.setattr(measuring, "apart", apart)
    output = tmp_path / "out.json"
    with pytest.raises(
        SystemExit, match=r"^1 rows failed; the same command tries them again: clean modules 32 grey 81$"
    ):
        asked(monkeypatch, "--output", str(output))
    asked(monkeypatch, "--output", str(output))
    asked(monkeypatch, "--output", str(output), "--rows", "grey 80")
    assert ran == [first.name, second.name, second.name]
    assert "| clean modules 32 grey 80 | 8 | 0 | 0 | 0.0% |" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert [row["name"] for row in found["rows"]] == [first.name, second.name]
    output.write_text(json.dumps({**found, "protocol": {"format": 0}}))
    with pytest.raises(SystemExit, match="was measured with other damage: name another file"):
        asked(monkeypatch, "--output", str(output))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "nothing"], r"--rows nothing: no row has that in its name"),
        (["--workers", "0"], r"--workers must be at least 1, got 0"),
        (["--data", "a/fog"], r"--data: folders need different names, and none of line_drawings, .*"),
        (["--data", "a/x", "--data", "b/x"], r"--data: folders need different names"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        asked(monkeypatch, *words)


@pytest.mark.slow
def test_a_set_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("mixture", "scenes", 32, 3, 80, 0.5)
    monkeypatch.setattr(command, "plan", lambda folders, scale: [row])
    monkeypatch.setattr("os.environ", {**__import__("os").environ})
    asked(monkeypatch, "--output", str(tmp_path / "out.json"))
    (found,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (found["images"], found["damaged"], found["dirty"]) == (80, 40, 0.5)
    tallies = [part for kind in found["kinds"].values() for part in kind.values()]
    assert sum(part["images"] for part in tallies) == 40
    assert sum(part["found"] for part in tallies) >= 20
    assert found["false"]["either"] <= 4
    assert found["false"]["filled_pixels"] == 0
    assert found["calibration"][-1][1] >= 0.9 * found["calibration"][-1][0] > 0
    assert found["wavelet"]["false"] <= 1
    assert found["peak_mb"] > 100
    assert "| scenes 32 RGB | 80 | 50% |" in capsys.readouterr().out
