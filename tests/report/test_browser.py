"""The report in a real browser: nothing is fetched, nothing fails, nothing is wider than the window."""

from __future__ import annotations

from pathlib import Path

import pytest

import browser
import report_runs as made
from robustdiff.report import report

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium or Chrome on the path")
LONG = "a-very-long-name_that/breaks=nowhere" * 4


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    with browser.browser(browser.find(), profile) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Ten runs, one with long names, so that every colour and every overflow has its chance."""
    root = tmp_path_factory.mktemp("runs")
    folders = made.three_runs(root)
    for i in range(7):
        made.training_run(root / f"more-{i}", preset="gated", seed=i, lines=5, quality=15 + i)
        body = made.quality(f"{LONG}{i}" if i < 2 else f"more-{i}", 15 + i, told=LONG, warnings=[LONG])
        made.write(root / f"more-{i}" / "evaluation" / "quality.json", body)
        folders.append(root / f"more-{i}")
    made.write(root / "more-0" / "evaluation" / "memory.json", made.memorisation(LONG + "0", 0.1))
    made.write(root / "more-0" / "evaluation" / "few.json", made.few_steps(LONG + "0", 9.0, [LONG]))
    made.write(root / "more-0" / "evaluation" / f"{LONG.replace('/', '-')}.json", {"format": LONG * 3})
    return report(folders, root / "report.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_whole_quiet_readable_and_fits(window, page, width, dark):
    window.open(page.as_uri(), width=width, dark=dark)
    window.run("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    window.run("Promise.all([...document.images].map(i => i.decode()))")
    said = [event for event in window.seen("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]
    assert said == []
    asked = {event["request"]["url"] for event in window.seen("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert window.run("document.images.length") > 60
    assert window.run(browser.BROKEN) == 0
    assert window.run("document.documentElement.scrollWidth") <= width
    assert window.run(browser.WIDE) == []
    assert window.run(browser.UNREADABLE) == []
    ground = window.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")


def test_the_checks_see_what_they_are_for(window, tmp_path):
    """A page with every fault at once: each check finds its own."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body style='background:#fff'><p style='width:3000px;color:#ddd'>wide and pale</p><img src='data:image/png,x'>"
        "<img src='http://127.0.0.1:9/a.png'><script>console.error('said')</script></body>"
    )
    window.open(bad.as_uri(), width=400)
    assert window.seen("Runtime.consoleAPICalled")
    assert window.run(browser.BROKEN) == 2
    assert window.run("document.documentElement.scrollWidth") > 400
    assert any(found.startswith("P.") for found in window.run(browser.WIDE))
    assert any(found.startswith("P.") for found in window.run(browser.UNREADABLE))
    asked = {event["request"]["url"] for event in window.seen("Network.requestWillBeSent")}
    assert "http://127.0.0.1:9/a.png" in asked
