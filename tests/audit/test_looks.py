"""Dark, washed-out, cast and barred pictures: found where they are a group of their own, told, and not acted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from fields import loader, natural
from helpers import seeded
from robustdiff.audit.detectors.borders import Borders, bars
from robustdiff.audit.detectors.looks import Looks
from robustdiff.audit.finding import Action
from robustdiff.audit.result import AuditResult
from robustdiff.audit.run import detect
from robustdiff.audit.survey import Survey
from robustdiff.utils.images import from_uint8, to_uint8

COUNT, SIDE = 160, 32


def exposed(count: int = COUNT, channels: int = 3) -> Tensor:
    """Pictures from a black near 0 to a white near 1 with colours of their own, in [-1, 1]."""
    fields = torch.cat([natural(count, SIDE, seed=seed) for seed in range(channels)], 1)
    fields = fields[:, :1] + 0.3 * fields
    low, high = fields.flatten(1).amin(1), fields.flatten(1).amax(1)
    chance = torch.rand(2, count, 1, 1, 1, generator=seeded(3))
    bright = (fields - low[:, None, None, None]) / (high - low)[:, None, None, None]
    return from_uint8(to_uint8((0.1 * chance[0] + (0.9 - 0.25 * chance[1]) * bright) * 2 - 1))


def judged(images: Tensor) -> AuditResult:
    survey = Survey(loader(images), len(images))
    for kind in (Looks(), Borders()):
        kind.measure(survey, None)
    return survey.result


def cast(images: Tensor, channel: int) -> Tensor:
    factor = torch.ones(3)
    factor[channel] = 0.6
    return (images + 1) * factor[:, None, None] - 1


def boxed(images: Tensor, rows: int = 4, colour: float = -1.0) -> Tensor:
    images = images.clone()
    images[:, :, :rows] = images[:, :, -rows:] = colour
    return images


CHANGES: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a third of the light": ("dark", lambda x: (x + 1) / 3 - 1),
    "a third of the contrast": ("washed_out", lambda x: x / 3),
    "less red": ("cast", lambda x: cast(x, 0)),
    "less green": ("cast", lambda x: cast(x, 1)),
    "less blue": ("cast", lambda x: cast(x, 2)),
    "letterbox": ("bars", boxed),
    "pillarbox": ("bars", lambda x: boxed(x.transpose(2, 3)).transpose(2, 3)),
    "white bars": ("bars", lambda x: boxed(x, colour=1.0)),
}
MORE = {**CHANGES, "less of two colours": ("cast", lambda x: cast(cast(x, 1), 2))}


@pytest.mark.parametrize("share", [16, 5])
@pytest.mark.parametrize("what", MORE)
def test_pictures_that_look_otherwise_are_told_and_nothing_is_done(what: str, share: int) -> None:
    kind, change = MORE[what]
    images, hit = exposed(), torch.arange(COUNT) % share == 0
    before = judged(images)
    assert before.groups == {}
    after = judged(torch.where(hit[:, None, None, None], from_uint8(to_uint8(change(images))), images))
    assert list(after.groups) == [kind]
    assert int((after.groups[kind] & hit).sum()) >= 0.9 * int(hit.sum())
    assert int((after.groups[kind] & ~hit).sum()) <= 2
    assert [one.action for one in after.findings] == [Action.REPORTED]
    assert (after.sha256, after.trivial) == (before.sha256, True)


@pytest.mark.parametrize("what", CHANGES)
def test_what_most_or_all_pictures_look_like_is_how_they_are_meant(what: str) -> None:
    kind, change = CHANGES[what]
    images = exposed()
    assert judged(change(images)).groups == {}
    most = torch.arange(COUNT) % 5 > 0
    found = judged(torch.where(most[:, None, None, None], change(images), images)).groups
    assert not bool((found.get(kind, ~most) & most).any())


def test_grey_pictures_have_no_cast_and_few_pictures_no_look() -> None:
    assert judged(exposed(channels=1)).groups == {}
    few = exposed(60)
    few[:12] = (few[:12] + 1) / 3 - 1
    assert judged(few).groups == {}


def test_pictures_of_one_colour_are_not_judged() -> None:
    images = exposed()
    images[::8] = -0.9
    assert judged(images).groups == {}


def with_margin(images: Tensor) -> Tensor:
    """A drawing on paper, whose edge is ragged."""
    round_ = torch.linspace(-1, 1, SIDE).square()
    return torch.where((round_[:, None] + round_[None] < 0.6), images, torch.ones(()))


@pytest.mark.parametrize(
    ("change", "due"),
    [
        (lambda x: boxed(x, 1), 0),
        (lambda x: torch.cat([boxed(x)[:, :, :16], x[:, :, 16:]], 2), 0),  # at one side
        (lambda x: torch.cat([boxed(x)[:, :, :16], boxed(x, colour=1.0)[:, :, 16:]], 2), 0),  # of two colours
        (lambda x: torch.cat([boxed(x, 3)[:, :, :16], boxed(x, 8)[:, :, 16:]], 2), 0),  # of two widths
        (lambda x: boxed(x, 14), 0),  # little is left
        (with_margin, 0),
        (boxed, 4 / SIDE),
        (lambda x: boxed(x) + 0.01 * torch.randn(x.shape, generator=seeded(5)), 4 / SIDE),
    ],
)
def test_what_bars_are(change: Callable[[Tensor], Tensor], due: float) -> None:
    share, _ = bars(change(exposed(20)))
    assert float((share == due).double().mean()) >= 0.95


def test_bars_of_many_colours_are_a_matter_of_design() -> None:
    images = exposed()
    for place in range(0, COUNT, 8):
        images[place : place + 1] = boxed(images[place : place + 1], colour=place / COUNT * 2 - 1)
    assert "bars" not in judged(images).groups


def test_the_whole_audit_says_it_in_words() -> None:
    images = torch.nn.functional.avg_pool2d(exposed(66), 2)  # too small to be compared with damaged copies
    images[:9] = boxed(images[:9], 2)
    found = detect(loader(images), 66)
    assert found.rows()["found bars"] == (
        "9 images, with bars of one colour at opposite sides: reported only, training does nothing about it"
    )
