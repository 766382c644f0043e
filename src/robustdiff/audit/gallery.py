"""One HTML page of an audit that needs nothing else: what was found, in lines and in pictures.

Of each kind it shows the images that tell whether to believe it: the worst, those near the decision on either side,
and clean ones that come nearest.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustdiff import __version__
from robustdiff.audit.comparison import DOUBTED
from robustdiff.audit.overview import CLEAN, DOUBT, Line, Overview, percent, reason
from robustdiff.audit.result import AuditResult
from robustdiff.utils.images import thumbnail
from robustdiff.utils.pages import template
from robustdiff.utils.words import printable

WORST, BORDERLINE, NEAREST = 12, 8, 8
"""Images of a kind: the worst; those near the decision, on both sides of it; the nearest that are clean."""
SMALLEST, LARGEST = 64, 112
"""Edge of a picture on the page, in pixels: smaller images are enlarged, larger ones show their centre, never scaled
down, which would hide noise."""
BUDGET = 2_700_000
"""Characters that all pictures may take together."""
UNREADABLE = 200
"""Files that are named with what is wrong with them."""


@dataclass(frozen=True)
class Card:
    """An image on the page.

    Attributes:
        place: Of the image.
        part: ``worst`` and ``least sure`` of those found by comparison, ``in doubt``, ``clean``; of others ``found``.
        name: Of the image.
        number: What it is sorted by: the probability of damage, or the level from which on it is used.
        figures: Numbers, for people.
        reason: Why it is shown.
        by_name, by_number: Its rank among the cards of its kind, the highest number first.
        uri: The picture.
    """

    place: int
    part: str
    name: str
    number: float
    figures: str
    reason: str
    by_name: int = 0
    by_number: int = 0
    uri: str = ""


def render(overview: Overview, pixels: Callable[[Sequence[int]], Tensor]) -> str:
    """The page; safe to be written as UTF-8, whatever the names of files hold.

    Args:
        overview: What was found.
        pixels: Images by place, uint8, (B, C, H, W); asked only if there is a result.
    """
    cards = {kind: list(_cards(overview, kind)) for kind in (*overview.kinds, *overview.suspected)}
    cards = {kind: _ranked(some) for kind, some in _with_pictures(cards, pixels).items()}
    told = {line.kind: _told(line) for line in overview.lines}
    told |= dict.fromkeys(overview.suspected, "Suspected, not surely enough to act on: look yourself.")
    text = template("robustdiff.audit", "gallery.html.jinja").render(
        title=f"Audit of {printable(overview.statistics.data)}",
        version=__version__,
        overview=overview,
        sections=[(kind, told[kind], some) for kind, some in cards.items() if some],
        linked={kind for kind, some in cards.items() if some},
        printable=printable,
        unreadable=overview.statistics.unreadable[:UNREADABLE],
        more_unreadable=max(0, len(overview.statistics.unreadable) - UNREADABLE),
    )
    return text.lstrip().encode(errors="backslashreplace").decode()


def _told(line: Line) -> str:
    """What was found of a kind, what is done, and how sure that is."""
    sure = "decided by a rule of its own" if line.sure == "-" else f"how sure: {line.sure}"
    return f"{line.proof or line.what}. Training: {line.action}; {sure}."


# -- which images ------------------------------------------------------------------------------------------


def _cards(overview: Overview, kind: str) -> Iterator[Card]:
    """Of one kind, part by part, the most telling of each first."""
    result = overview.result
    assert result is not None, "kinds are those of a result"
    found = result.groups[kind].nonzero().flatten().tolist() if kind in result.groups else []
    ordered = overview.worst_first(found, kind)
    members, rest = ordered[:WORST], ordered[WORST:]
    parts = {"found": ordered[: WORST + BORDERLINE]}
    compared = kind in overview.suspected or overview.decided_by_comparison(kind)
    if compared:
        damaged = result.signs["damaged"].tolist()
        alike = [
            place
            for place, (like, line) in enumerate(zip(result.looks_like, overview.line_of, strict=True))
            if like == kind and line in (CLEAN, DOUBT)
        ]
        alike.sort(key=lambda place: -damaged[place])
        doubted = [place for place in alike if damaged[place] >= DOUBTED]
        above = sorted(rest, key=lambda place: damaged[place])[: max(BORDERLINE // 2, BORDERLINE - len(doubted))]
        parts = {
            "worst": members,
            "least sure": above,
            "in doubt": doubted[: max(BORDERLINE - len(above), 0 if found else WORST)],
            "clean": alike[len(doubted) :][:NEAREST],
        }
    for part, places in parts.items():
        for place in places:
            number, figures = _figures(result, place, compared)
            yield Card(place, part, result.names[place], number, figures, reason(overview, place, kind))


def _figures(result: AuditResult, place: int, compared: bool) -> tuple[float, str]:
    """The number of an image, and all that are told of it."""
    level, weight = float(result.min_sigma[place]), float(result.weight[place])
    texts = [f"damaged: {percent(float(result.signs['damaged'][place]))}"] if compared else []
    texts += [f"used from noise level {level:.3g} on"] if level else []
    texts += [f"weight {weight:.2g}"] if weight < 1 else []
    number = float(result.signs["damaged"][place]) if compared else level + 1 - weight
    return number, ", ".join(texts) or "used at every noise level"


def _ranked(cards: Sequence[Card]) -> list[Card]:
    by_name = {card.place: rank for rank, card in enumerate(sorted(cards, key=lambda card: card.name))}
    by_number = {card.place: rank for rank, card in enumerate(sorted(cards, key=lambda card: -card.number))}
    return [replace(card, by_name=by_name[card.place], by_number=by_number[card.place]) for card in cards]


# -- pictures ----------------------------------------------------------------------------------------------


def _with_pictures(cards: dict[str, list[Card]], pixels: Callable[[Sequence[int]], Tensor]) -> dict[str, list[Card]]:
    """As many cards of every kind and part as the budget allows, in their order: each has its first before the next."""
    parts = [[card for card in some if card.part == part] for some in cards.values() for part in _parts(some)]
    in_turn = [card for turn in zip_longest(*parts) for card in turn if card is not None]
    pictures: dict[int, str] = {}
    left = BUDGET
    kept: set[int] = set()
    for card in in_turn:
        if card.place not in pictures:
            pictures[card.place] = _uri(pixels([card.place])[0].numpy())
        left -= len(pictures[card.place])
        if left < 0:
            break
        kept.add(id(card))
    return {
        kind: [replace(card, uri=pictures[card.place]) for card in some if id(card) in kept]
        for kind, some in cards.items()
    }


def _parts(cards: Sequence[Card]) -> list[str]:
    return list(dict.fromkeys(card.part for card in cards))


def _uri(image: NDArray[np.uint8]) -> str:
    """The picture as a PNG that the page holds itself."""
    side = min(LARGEST, max(SMALLEST, *image.shape[1:]))
    file = io.BytesIO()
    small = np.broadcast_to(image, (3, *image.shape[1:]))
    Image.fromarray(np.ascontiguousarray(thumbnail(small, side).transpose(1, 2, 0))).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
