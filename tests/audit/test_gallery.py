"""The page of an audit: sound, whole, in need of nothing else; of every kind the images that tell."""

import base64
import io
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from audits import BAD, COUNT, overview, result, statistics
from report_page import Page, check
from robustdiff.audit import gallery
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.overview import Overview
from robustdiff.audit.result import AuditResult
from robustdiff.audit.statistics import SetStatistics

PIXELS = torch.randint(256, (COUNT, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HOSTILE = ("<script>alert(1)</script>.png", '" onerror="x', "a&b.png", "\udcff.png", "\u202egnp.exe", "new\nline.png")


class Gallery(Page):
    """A page with the cards of each section."""

    style = r"--by-name: \d+; --by-number: \d+"

    def __init__(self, text: str) -> None:
        self.cards: list[dict[str, str]] = []
        super().__init__(text)

    @property
    def cells(self) -> list[list[str]]:
        return [row for table in self.tables for row in table]

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "li" and dict(attrs).get("class") == "card":
            ranks = dict(re.findall(r"--(by-\w+): (\d+)", dict(attrs)["style"] or ""))
            self.cards.append({"name": "", "part": "", "text": "", **ranks})

    def handle_data(self, data):
        super().handle_data(data)
        if "li" in self.open and self.cards:
            self.cards[-1]["name"] += data if "bdi" in self.open else ""
            self.cards[-1]["text"] += data

    def every(self, tag: str, attribute: str) -> list[str]:
        return [
            attributes[attribute] or "" for name, attributes in self.tags if name == tag and attribute in attributes
        ]


def page(of: Overview, pixels: torch.Tensor = PIXELS) -> tuple[str, Gallery]:
    text = gallery.render(of, lambda places: pixels[list(places)])
    return text, check(text, Gallery)


def test_the_page_needs_nothing_else_and_holds_whole_pictures() -> None:
    text, found = page(overview())
    assert text.encode()
    assert "prefers-color-scheme: dark" in text
    (policy,) = [tag["content"] for _, tag in found.tags if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert all(href.startswith("#") for href in found.every("a", "href"))
    for source in found.every("img", "src"):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert picture.size == (64, 64)


def test_it_shows_every_line_and_of_each_kind_the_images_that_tell() -> None:
    _, found = page(overview())
    counts = {row[0]: row[1] for row in found.cells if len(row) == 5}
    assert counts.pop("kind") == "images"
    assert int(counts.pop("all files")) == sum(map(int, counts.values())) == COUNT + 2
    assert found.cells[-2:] == [["broken.png", "cut off"], ["text.png", "not an image"]]
    names = [card["name"] for card in found.cards]
    assert names == ["00", "01", "02", "03", "08", "10", "04", "05", "06", "11", "03", "07", "09"]
    assert "in doubt" in found.cards[4]["text"]
    assert "clean" in found.cards[5]["text"]
    assert "97 %" in found.cards[2]["text"]
    assert "at JPEG quality 16" in found.cards[2]["text"]
    assert found.every("h2", "id") == ["jpeg", "noise", "duplicates", "blur", "not-readable"]


def test_cards_are_ranked_by_name_and_by_number() -> None:
    names = tuple(f"{(5 * place) % COUNT:02d}.png" for place in range(COUNT))
    _, found = page(overview(result(names=names)))
    jpeg = found.cards[:6]
    assert [card["name"] for card in sorted(jpeg, key=lambda card: int(card["by-name"]))] == sorted(
        card["name"] for card in jpeg
    )
    by_number = [card["name"] for card in sorted(jpeg, key=lambda card: int(card["by-number"]))]
    assert by_number == [names[place] for place in (0, 1, 2, 3, 8, 10)]


def test_names_are_text_and_nothing_but_text() -> None:
    names = (*HOSTILE, *(f"{place}.png" for place in range(len(HOSTILE), COUNT)))
    of = Overview(statistics(names, ((HOSTILE[0], "<b>why</b>"),)), result(names=names))
    text, found = page(of)
    text.encode()
    assert "<script>" not in text
    assert "<b>why" not in text
    assert "\u202e" not in text
    shown = [card["name"] for card in found.cards]
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[2]} <= set(shown)
    assert "'new\\nline.png'" in shown
    assert HOSTILE[1] in found.every("img", "alt")


def test_large_sets_stay_within_the_budget_and_every_kind_keeps_some() -> None:
    count, kinds = 400, [f"kind{number}" for number in range(16)]
    groups = {kind: torch.arange(count) % 16 == number for number, kind in enumerate(kinds)}
    made = replace(
        AuditResult.of_clean(count),
        groups=groups,
        findings=tuple(Finding(kind, 25, "odd", Action.LEFT_OUT) for kind in kinds),
        weight=torch.zeros(count).double(),
    )
    noise = torch.randint(256, (count, 3, 112, 112), dtype=torch.uint8)
    text, found = page(Overview(statistics(tuple(made.names)), made), noise)
    assert len(text) < 3_000_000
    assert len(found.cards) >= 3 * len(kinds)
    assert found.every("h2", "id")[: len(kinds)] == kinds


@pytest.mark.parametrize("pixels", [torch.zeros(COUNT, 1, 5, 300, dtype=torch.uint8), PIXELS[:, :1]])
def test_grey_and_large_images_are_shown(pixels: torch.Tensor) -> None:
    _, found = page(overview(), pixels)
    assert len(found.cards) == 13


@pytest.mark.parametrize("of", [Overview(statistics(("a", "b"))), Overview(statistics(()))], ids=["two sizes", "none"])
def test_without_an_audit_it_says_so(of: Overview) -> None:
    text, found = page(of)
    assert "not looked for" in text
    assert not found.cards
    assert isinstance(of.statistics, SetStatistics)
    assert [BAD[0][0], BAD[0][1]] in found.cells
