"""Names and counts as people read them."""

from __future__ import annotations


def printable(name: str) -> str:
    """The name; quoted with escapes if it would upset a terminal."""
    return name if name.isprintable() else repr(name)


def counted(count: int, noun: str) -> str:
    """How many there are: "1 image", "2 images"; of nouns that take an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
