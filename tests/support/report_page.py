"""A page as a parser sees it, and what every page must be: whole, sound, in need of nothing else."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import TypeVar

from PIL import Image

VOID = {"meta", "img", "br", "wbr", "hr", "link", "input", "line", "circle", "path"}


class Page(HTMLParser):
    """What the tests ask of a page: tags in balance, attributes, tables as text."""

    style = r"(?!)"
    """What a style attribute may hold, as a regular expression; here there may be none."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            assert "colspan" not in dict(attrs)
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def all(self, name: str) -> Iterator[str]:
        """Every value of an attribute."""
        return (value or "" for _, attributes in self.tags for key, value in attributes.items() if key == name)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def table(self, *heads: str) -> list[list[str]]:
        """The only table whose header holds all of these."""
        found = [t for t in self.tables if all(any(head in cell for cell in t[0]) for head in heads)]
        assert len(found) == 1, [t[0] for t in self.tables]
        return [[" ".join(cell.split()) for cell in row] for row in found[0]]


PageT = TypeVar("PageT", bound=Page)


def check(text: str, kind: type[PageT] = Page) -> PageT:
    """The page needs nothing else, its ids are unique, its tables rectangular, its pictures whole."""
    page = kind(text)
    ids = list(page.all("id"))
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        assert "style" not in attributes or re.fullmatch(kind.style, attributes["style"])
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
    for src in page.all("src"):
        Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2], validate=True)), formats=["PNG"]).load()
    for href in page.all("href"):
        assert not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", href)
        assert not href.startswith("#") or href[1:] in ids
    assert not re.search(r"https?:|url\(|@import", text)
    for table in page.tables:
        assert len({len(row) for row in table}) == 1
    for points in [*page.all("d"), *page.all("x"), *page.all("cx"), *page.all("x1")]:
        assert re.fullmatch(r"[ML\d.\s-]*", points), points
    return page
