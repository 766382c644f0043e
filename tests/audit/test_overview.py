"""The set at a glance: every file in exactly one line, whatever was found of it; how sure; what was not looked for."""

import json
from dataclasses import replace

import pytest
import torch

from audits import BAD, COUNT, DOUBTED, SUSPECTED, overview, result, statistics
from fields import natural
from robustdiff.audit import audit
from robustdiff.audit.finding import Action, Finding, Unasked
from robustdiff.audit.overview import DOUBT, Overview, percent, reason
from robustdiff.audit.result import AuditResult
from robustdiff.audit.summary import BRIEFLY, briefly
from robustdiff.utils.errors import DataError
from robustdiff.utils.images import to_uint8


def test_every_file_is_in_exactly_one_line_its_first() -> None:
    lines = {line.kind: (line.count, line.shown) for line in overview().lines}
    assert lines == {
        "jpeg": (4, 4),
        "noise": (3, 3),
        "duplicates": (1, 2),  # the other is compressed
        DOUBT: (1, 1),
        "nothing found": (3, 3),
        "not readable": (2, 2),
    }
    assert sum(count for count, _ in lines.values()) == overview().files == COUNT + 2
    assert "found of several kinds, and counted in the first: 1 jpeg and duplicates" in overview().notes


@pytest.mark.parametrize("found", ["nothing", "all", "too few", "no audit", "no image", "one file"])
def test_the_lines_add_up_whatever_there_is(found: str) -> None:
    unasked = {"blur": Unasked.TOO_FEW}
    made = {
        "nothing": overview(AuditResult.of_clean(5)),
        "all": overview(result(groups={"jpeg": torch.ones(COUNT, dtype=torch.bool)}, min_sigma=torch.ones(COUNT))),
        "too few": overview(replace(AuditResult.of_clean(5), unasked=unasked)),
        "no audit": Overview(statistics(tuple("abc"))),
        "no image": Overview(statistics(())),
        "one file": Overview(statistics((), BAD[:1])),
    }[found]
    assert sum(line.count for line in made.lines) == made.files
    shown = [line.split("  ") for line in made.text().splitlines() if not line.startswith("*")]
    (total,) = [[cell for cell in row if cell] for row in shown if row[0] == "all files"]
    assert int(total[1]) == made.files
    said = {
        "all": "none clean: what all images have in common is not seen",
        "too few": "not looked for: blur (fewer than 64 pictures to compare): images are trained as they are",
        "no audit": "damage: not looked for, images differ in size: add `resolution` N",
        "no image": "damage: not looked for, no image can be read",
    }
    assert found not in said or sum(said[found] in note for note in made.notes) == 1
    assert found != "too few" or made.lines[0].kind == "not compared"


def test_how_sure_is_the_median_probability_and_what_a_classifier_says() -> None:
    by = {line.kind: line for line in overview().lines}
    assert by["jpeg"].probability == pytest.approx(0.97)  # the lower middle one of four
    assert by["jpeg"].sure == "97 %, just what the others become"
    assert by["jpeg"].proof == "4 of 12 images are what the others become at JPEG quality 14"
    assert by["noise"].sure == "94 %, not quite what the others become"
    assert by["noise"].proof == ""
    assert by["duplicates"].sure == "-"  # a rule of its own: how damaged they look says nothing of it
    assert by["duplicates"].probability is None
    assert by[DOUBT].sure == "80 %"
    assert by["jpeg"].examples == ("00", "01", "02")
    assert [percent(one) for one in (1.0, 0.994, 0.5, 0.0)] == ["99 %", "99 %", "50 %", "1 %"]


def test_what_nearly_was_found_is_said_and_not_counted() -> None:
    assert overview().suspected == {"blur": [SUSPECTED]}
    assert "1 image may be blur, not surely enough to act on: counted and trained as clean" in overview().notes
    assert overview().line_of[SUSPECTED] == "nothing found"


def test_every_image_has_its_reason() -> None:
    of = overview()
    assert reason(of, 0, "jpeg") == "looks like the others at JPEG quality 12"
    assert reason(of, 7, "duplicates") == "like 03"
    assert reason(of, DOUBTED, "jpeg") == "may be what the others become at JPEG quality 30; 90 % would count"
    assert reason(of, SUSPECTED, "blur").endswith("become blurred by 2 pixels; of this set it is not believed")
    assert reason(of, 10, "jpeg") == "found clean, nearest to jpeg; 90 % would count"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_fits_and_hostile_names_are_quoted(width: int) -> None:
    names = tuple(f"holiday pictures of 2019/IMG_{place:04d}.jpg" for place in range(COUNT - 1))
    of = overview(result(names=("evil\x1b[31m\n.png", *names)))
    table = [line for line in of.text(width).splitlines() if not line.startswith("*")]
    assert max(map(len, table)) <= max(width, 72)
    assert "\x1b" not in of.text(width)
    assert sum(line.startswith(("jpeg ", "noise ", "duplicates ")) for line in table) == 3


def test_what_training_does_fits_into_a_line_for_every_action() -> None:
    for action in Action:
        for level in (None, 0.25):
            if level is not None or action not in (Action.TRAINED_WHERE_HIDDEN, Action.FILLED_IN):
                words = briefly([Finding("k", 1, "w", action, level)], (0.0, 0.125))
                assert bool(words) == (action is not Action.AS_SAID)
                assert len(words) <= 48
                assert "{" not in words
    assert BRIEFLY.keys() == set(Action)
    twice = [Finding("k", 1, "w", Action.COUNTED_ONCE)] * 2 + [Finding("k", 1, "w", Action.LEFT_ALONE)]
    assert briefly(twice, None) == "each picture counts once; left alone"


def test_it_is_json() -> None:
    told = json.loads(json.dumps(overview().as_json(), allow_nan=False))
    assert told["files"] == COUNT + 2
    assert [line["count"] for line in told["lines"]] == [4, 3, 1, 1, 3, 2]
    assert told["lines"][0] == {
        **{"kind": "jpeg", "count": 4, "shown": 4, "what": "what the others become at JPEG quality 15"},
        **{"probability": pytest.approx(0.97), "told_apart": 0.56, "action": "trained above noise level 0.4"},
        **{"proof": "4 of 12 images are what the others become at JPEG quality 14", "examples": ["00", "01", "02"]},
    }


def test_files_that_went_meanwhile_are_an_error() -> None:
    with pytest.raises(DataError, match="came or went"):
        Overview(statistics(("other",)), AuditResult.of_clean(1))


# -- what was not looked for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "why"),
    [
        (natural(20, 32), Unasked.TOO_FEW),
        (torch.cat([natural(60, 32), torch.zeros(10, 1, 32, 32)]), Unasked.TOO_FEW),  # ten hold no picture
        (natural(64, 16), Unasked.TOO_SMALL),
        (natural(64, 32).expand(-1, 2, -1, -1), Unasked.CHANNELS),
    ],
    ids=["few", "few that hold a picture", "small", "two channels"],
)
def test_the_audit_says_what_it_did_not_look_for_and_why(images: torch.Tensor, why: Unasked, tmp_path) -> None:
    found = audit(to_uint8(images))
    assert found.unasked["caption"] is why  # which only a comparison tells
    assert ("noise" in found.unasked) == (why is Unasked.TOO_FEW)  # which has a rule of its own for groups
    assert "duplicates" not in found.unasked
    rows = found.rows()
    assert ("not looked for" in rows) == ("found clean" not in rows) == (why is Unasked.TOO_FEW)
    found.save(tmp_path / "found.json")
    assert AuditResult.load(tmp_path / "found.json").unasked == found.unasked
