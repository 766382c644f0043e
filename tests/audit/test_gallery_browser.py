"""The page of an audit in a real browser: it fits, it can be read, its pictures are there, and sorting sorts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import browser
from audits import COUNT, overview, result
from robustdiff.audit import gallery

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium or Chrome on the path")
SHOWN = """[...document.querySelector(".cards").children].map(card => [card.getBoundingClientRect(), card])
    .sort(([a], [b]) => a.top - b.top || a.left - b.left).map(([_, card]) => card.querySelector("b").textContent)"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser.browser(browser.find(), tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    names = tuple(f"{(5 * place) % COUNT:02d}-{'a-very-long-name' * 5}.png" for place in range(COUNT))
    pixels = torch.randint(256, (COUNT, 3, 32, 32), dtype=torch.uint8)
    path = tmp_path_factory.mktemp("audit") / "index.html"
    path.write_text(gallery.render(overview(result(names=names)), lambda places: pixels[list(places)]))
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_and_can_be_read(window, page: Path, width: int, dark: bool) -> None:
    window.open(page.as_uri(), width=width, dark=dark)
    for wrong in (browser.WIDE, browser.UNREADABLE):
        assert window.run(wrong) == []
    assert window.run(browser.BROKEN) == 0
    assert window.seen("Log.entryAdded", "Runtime.exceptionThrown", "Network.loadingFailed") == []


def test_sorting_sorts(window, page: Path) -> None:
    window.open(page.as_uri(), width=1400)
    first = window.run(SHOWN)
    window.run("document.getElementById('by-name').click()")
    assert window.run(SHOWN) == sorted(first) != first
    window.run("document.getElementById('by-part').click()")
    assert window.run(SHOWN) == first
