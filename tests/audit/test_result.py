"""The result of an audit: what training asks of it, what people do, and its file."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import normal
from robustdiff.audit import run
from robustdiff.audit.detectors import missing_pixels
from robustdiff.audit.detectors.missing_pixels import Gap
from robustdiff.audit.finding import Action, Finding, Unasked
from robustdiff.audit.result import AuditResult
from robustdiff.audit.summary import action_words
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.training.curriculum import masked_below, sampler_from_audit
from robustdiff.utils.errors import DataError, UsageError

PROCESS = NoiseSchedule(torch.linspace(0.9999, 0.001, 200))
NAMES = ("a.png", "b/c.png", "d.png", "é.png")


def trusted(**changes: object) -> AuditResult:
    """Four images: clean, noisy, blurred, left out."""
    noise, least, weight = torch.tensor([[0, 0.2, 0, 0], [0, 0.2, 0.5, 0], [1, 1, 0.5, 0]]).double()
    made = AuditResult(
        names=NAMES,
        noise_std=noise,
        min_sigma=least,
        weight=weight,
        has_missing=torch.tensor([False, False, True, False]),
        sigma=noise,
        sigma_error=weight / 10,
        findings=(Finding("noise", 1, "white noise", Action.TRAINED_ABOVE, 0.2, 3.5),),
        groups={"noise": noise > 0, "blur": least > noise},
        copies=((3, 0), (1, 2)),
        signs={"lost": torch.tensor([0, 0, 0.25, 0]).double(), "oddness": torch.tensor([0.5, math.nan, 1, 2]).double()},
        lost=(Gap(0.0),),
    )
    return replace(made, **changes)


def test_visits_begin_above_the_usable_level() -> None:
    visits = sampler_from_audit(trusted(), PROCESS)
    assert visits is not None
    table = PROCESS.noise_to_signal(torch.arange(200))
    assert visits.used.tolist() == [0, 1, 2]
    for place, level in ((0, 0.0), (1, 0.2), (2, 0.5)):
        assert table[visits.first[place]] > level
        assert visits.first[place] == 0 or table[visits.first[place] - 1] <= level
    assert (
        sampler_from_audit(trusted(min_sigma=torch.zeros(4).double(), weight=torch.ones(4).double()), PROCESS) is None
    )


def test_masked_images_with_lost_pixels_are_used_at_every_level_and_their_repair_above_their_own() -> None:
    of = trusted(masked=True)
    visits, whole = sampler_from_audit(of, PROCESS), masked_below(of, PROCESS)
    assert visits is not None
    assert whole is not None
    assert visits.first.tolist() == [0, sampler_from_audit(trusted(), PROCESS).first[1], 0, 0]
    table = PROCESS.noise_to_signal(torch.arange(200))
    assert whole[[0, 1, 3]].tolist() == [0, 0, 0]
    assert table[whole[2] - 1] <= 0.5 < table[whole[2]]
    assert of.lowest.tolist() == pytest.approx([0, 0.2, 0, 0])
    assert trusted().lowest.tolist() == pytest.approx([0, 0.2, 0.5, 0])
    assert masked_below(trusted(), PROCESS) is None
    assert masked_below(trusted(masked=True, has_missing=torch.zeros(4, dtype=torch.bool)), PROCESS) is None
    far = trusted(masked=True, min_sigma=torch.tensor([0, 0.2, 1e6, 0]).double())
    assert masked_below(far, PROCESS).tolist() == [0, 0, 200, 0]
    assert sampler_from_audit(far, PROCESS).first[2] == 0


def test_a_level_beyond_the_process_leaves_the_image_out() -> None:
    beyond = sampler_from_audit(trusted(min_sigma=torch.tensor([0, 0.2, 1e6, 0]).double()), PROCESS)
    assert beyond is not None
    assert beyond.used.tolist() == [0, 1]
    with pytest.raises(UsageError, match="robustdiff audit"):
        sampler_from_audit(trusted(min_sigma=torch.full((4,), 1e6).double()), PROCESS)


def test_the_digest_is_of_everything_that_training_depends_on() -> None:
    one = trusted()
    others = [
        trusted(noise_std=one.noise_std + 1e-9),
        trusted(min_sigma=one.min_sigma + 1e-9),
        trusted(weight=one.weight / 2),
        trusted(lost=()),
        trusted(lost=(Gap(0.5),)),
        trusted(lost=(Gap(0.0, 4),)),
        trusted(masked=True),
        trusted(has_missing=~one.has_missing),
        trusted(regularise=(0.0, 0.15)),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 10
    assert trusted(findings=(), sigma=one.sigma + 1).sha256 == one.sha256


def test_only_holed_images_are_repaired() -> None:
    images = normal(4, 1, 8, 8).float()
    images[:, :, ::2, ::3] = 0.0
    of = trusted()
    mended, lost = of.repaired(images, range(4))
    assert lost is not None
    assert torch.equal(mended[[0, 1, 3]], images[[0, 1, 3]])
    assert torch.equal(lost[2:3], missing_pixels.holes(images[2:3], (Gap(0.0),)))
    assert not lost[[0, 1, 3]].any()
    assert torch.equal(mended[2:3], missing_pixels.fill(images[2:3], lost[2:3]))
    assert not torch.equal(mended[2], images[2])
    assert torch.equal(of.repaired(images[[1, 2]], [1, 2])[0], mended[[1, 2]])
    assert trusted(lost=()).repaired(images, range(4)) == (images, None)


# -- the file ----------------------------------------------------------------------------------------


def as_numbers(of: AuditResult) -> str:
    """Everything there is about a result; not a number equals itself."""
    fields = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(of).items()}
    fields |= {name: {key: some.tolist() for key, some in fields[name].items()} for name in ("groups", "signs")}
    return repr(fields)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    for one in (
        trusted(),
        trusted(regularise=(0.0, 0.1), lost=(), findings=(), groups={}, copies=(), signs={}),
        trusted(lost=(Gap(0.0, 4), Gap(1.0)), masked=True),
        trusted(findings=tuple(Finding("k", 2, "w", a, 1.0, None, 7, a) for a in Action), regularise=(0.0, 0.1)),
        trusted(sigma_error=torch.tensor([0.1, math.nan, 0.1, 0.1]).double()),
    ):
        one.save(tmp_path / "auto.json")
        again = AuditResult.load(tmp_path / "auto.json", 4)
        assert as_numbers(again) == as_numbers(one)
        assert again.sha256 == one.sha256
        assert as_numbers(AuditResult.load(tmp_path / "auto.json")) == as_numbers(one)


def test_the_file_has_the_names_and_words_it_always_had(tmp_path: Path) -> None:
    trusted(sigma_error=torch.tensor([0.1, math.nan, 0.1, 0.1]).double()).save(tmp_path / "auto.json")
    value = json.loads((tmp_path / "auto.json").read_text())
    words = {"part": "noise", "count": 1, "what": "white noise", "action": "trained above it", "level": 0.2}
    assert words.items() <= value["findings"][0].items()
    assert value["findings"][0]["decision"] == "trained-above"
    sigma = trusted().noise_std[1].item()
    numbers = {"noise": sigma, "usable": sigma, "weight": 1, "sigma": sigma, "holed": False, "sigma_error": None}
    assert value["images"][1] == value["images"][1] | {"name": "b/c.png", **numbers}
    assert (value["images"][1]["groups"], value["images"][1]["oddness"]) == (["noise"], None)
    assert value["copies"] == [["é.png", "a.png"], ["b/c.png", "d.png"]]


def test_files_of_earlier_versions_are_read_and_say_what_they_said(tmp_path: Path) -> None:
    path = tmp_path / "auto.json"
    trusted().save(path)
    value = json.loads(path.read_text())
    for one in value["images"]:
        del one["sigma_error"], one["groups"]
    for one in value["findings"]:
        for key in ("decision", "otherwise", "confidence", "measured_on"):
            del one[key]
    del value["masked"], value["lost_blocks"]
    path.write_text(json.dumps(value))
    again = AuditResult.load(path, 4)
    assert again.sha256 == trusted().sha256
    assert again.sigma_error.isnan().all()
    assert again.groups == {}
    assert again.findings[0].action is Action.AS_SAID
    assert again.rows() == trusted().rows()
    again.save(path)
    assert AuditResult.load(path, 4).rows() == trusted().rows()


def changed(**changes: object):
    return lambda text: json.dumps({**json.loads(text), **changes})


def image(**changes: object):
    def change(text: str) -> str:
        value = json.loads(text)
        value["images"][2].update(changes)
        return json.dumps(value)

    return change


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: 100_000 * "[",
        lambda text: text.replace("0.5", "NaN", 1),
        changed(format="robustdiff auto 2"),
        changed(images=None),
        changed(images=3),
        changed(images=[]),
        changed(images=[1, 2, 3, 4]),
        changed(images=["a", "b", "c", "d"]),
        changed(sha256="0"),
        changed(sha256=None),
        changed(lost_values=None),
        changed(lost_values=["a"]),
        changed(lost_values=[0.5]),
        changed(lost_blocks=[]),
        changed(lost_blocks=[4]),
        changed(masked=True),
        changed(regularise=[0.1]),
        changed(regularise=7),
        changed(regularise=[0, 0.1]),
        changed(findings=None),
        changed(findings=[3]),
        changed(findings=[{"part": "noise"}]),
        changed(findings=[{"part": "noise", "decision": "trained-above"}]),
        changed(copies=[["no.png"]]),
        image(noise="a"),
        image(noise=None),
        image(noise=0.25),
        image(usable=10**400),
        image(weight=[1]),
        image(holed=False),
        image(groups=3),
        image(groups=[["noise"]]),
        image(lost="much"),
    ],
)
def test_every_damage_to_the_file_is_one_line_that_says_what_to_do(tmp_path: Path, harm) -> None:
    path = tmp_path / "auto.json"
    trusted().save(path)
    path.write_text(harm(path.read_text()))
    with pytest.raises(DataError, match=r"auto\.json cannot be used \(") as error:
        AuditResult.load(path, 4)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_of_other_images_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        AuditResult.load(tmp_path / "auto.json", 4)
    trusted().save(tmp_path / "auto.json")
    with pytest.raises(UsageError, match="of 4 images, not 5"):
        AuditResult.load(tmp_path / "auto.json", 5)
    (tmp_path / "other.json").write_text('{"format": "robustdiff audit 1", "images": []}')
    with pytest.raises(UsageError, match=r"not robustdiff auto 1, which an audit calls found\.json"):
        AuditResult.load(tmp_path / "other.json")
    (tmp_path / "auto.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be used"):
        AuditResult.load(tmp_path / "auto.json", 4)


def test_where_no_image_is_whole_the_least_damaged_are_trained_at_every_level() -> None:
    """Blurred or compressed ones beside nothing but what is left out."""
    soft = Finding("blur", 2, "blurred", Action.TRAINED_WHERE_HIDDEN, 0.25)
    zero = torch.zeros(4).double()
    of = trusted(
        noise_std=zero, min_sigma=torch.tensor([0.25, 0.25, 0.5, 0]).double(), findings=(soft,), has_missing=zero > 0
    )
    fallen = run._fall_back(of)
    assert fallen.min_sigma.tolist() == [0, 0, 0.5, 0]
    assert fallen.rows()["found blur"].endswith(
        "above 0.25, where that no longer shows; no image is whole, so that they are trained at every noise level"
    )
    assert "not trained" in of.rows()
    assert "not trained" not in fallen.rows()
    holed = replace(of, has_missing=torch.tensor([False, False, True, False]))
    masked = run._fall_back(holed)  # the third has lost pixels, and is trained at every level by the others
    assert masked.masked
    assert torch.equal(masked.min_sigma, of.min_sigma)
    assert masked.lowest.tolist() == [0.25, 0.25, 0, 0]
    assert run._fall_back(masked) is masked


# -- for people --------------------------------------------------------------------------------------


def test_a_row_says_everything_of_an_image() -> None:
    rows = trusted().to_rows()
    assert [row["name"] for row in rows] == list(NAMES)
    assert [row["groups"] for row in rows] == [(), ("noise",), ("blur",), ()]
    assert rows[2] == {
        "name": "d.png",
        "groups": ("blur",),
        "noise_std": 0.0,
        "min_sigma": 0.5,
        "weight": 0.5,
        "has_missing": True,
        "sigma": 0.0,
        "sigma_error": 0.05,
        "lost": 0.25,
        "oddness": 1.0,
    }


def test_the_table_is_that_of_the_rows_or_one_line_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    table = trusted().to_dataframe()
    assert isinstance(table, pandas.DataFrame)
    assert table["min_sigma"].tolist() == trusted().min_sigma.tolist()
    assert table.columns.tolist() == list(trusted().to_rows()[0])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"^to_dataframe needs pandas: pip install pandas, or use to_rows\(\)$"):
        trusted().to_dataframe()


def test_the_file_keeps_the_name_of_the_features(tmp_path: Path) -> None:
    clean = AuditResult.of_clean(3)
    far = replace(clean, signs={"distance": torch.tensor([1.0, 3.0, 2.0]).double()}, features="pixels")
    far.save(tmp_path / "far.json")
    assert AuditResult.load(tmp_path / "far.json").summary() == far.summary()
    older = {key: value for key, value in json.loads((tmp_path / "far.json").read_text()).items() if key != "features"}
    (tmp_path / "far.json").write_text(json.dumps(older))
    assert AuditResult.load(tmp_path / "far.json").features == "features"


@pytest.mark.parametrize("action", [Action.TRAINED_WHERE_HIDDEN, Action.FILLED_IN])
def test_an_action_above_a_level_needs_one(action: Action) -> None:
    with pytest.raises(ValueError, match=f"^finding of dust: {action.value} needs a level$"):
        Finding("dust", 1, "w", action)


def test_every_action_has_its_words() -> None:
    words = {action_words(Finding("k", 1, "w", action, 0.25, None, 7), (0.0, 0.125)) for action in Action}
    assert len(words) == len(Action)
    assert "trained at noise levels above 0.25, where that no longer shows" in words
    assert "filled in, and trained at noise levels above 0.25, measured on 7 images" in words
    assert "no image is clean, so that noise levels below 0.125 are regularised instead" in words
    both = Finding("k", 1, "w", Action.FILLED_IN, 0.25, None, 7, Action.TRAINED_BY_OTHER_PIXELS)
    said = action_words(both, None)
    assert said.endswith(" images; no image is whole, so that below they are trained by their other pixels")


def test_the_summary_says_what_was_found_or_that_nothing_was() -> None:
    said = trusted().summary().splitlines()
    assert said == [
        "damage, and what `auto` would do about it",
        "  found noise: 1 image, white noise: trained above it",
        "  found clean: 1 of 4 images, trained at every noise level",
    ]
    clean = AuditResult.of_clean(3)
    assert clean.names == ("0", "1", "2")
    few = replace(clean, unasked={"blur": Unasked.TOO_FEW, "cut": Unasked.TOO_SMALL, "noise": Unasked.TOO_FEW})
    assert few.summary() == (
        "damage, not looked for: blur, noise (fewer than 64 pictures to compare): "
        "3 of 3 images are trained at every noise level, as they are"
    )
    assert AuditResult.of_clean(64).summary() == "damage: none stands apart; `auto` would train plainly"
    one = replace(AuditResult.of_clean(64), groups={"dust": torch.ones(64, dtype=torch.bool)})
    assert one.summary().startswith("damage, and what `auto` would do about it")
    far = replace(clean, signs={"distance": torch.tensor([1.0, 3.0, 2.0]).double()}, features="pixels")
    assert far.summary().splitlines()[1] == (
        "farthest from the others in pixels, typical 1, not acted on: 1 (3.00), 2 (2.00), 0 (1.00)"
    )
