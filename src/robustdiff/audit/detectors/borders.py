"""Pictures with bars: bands of one colour at opposite sides, as films have that were fitted to another screen.

A picture has bars if rows (or columns) of one colour lie at both ends, about as many at each, and end in a straight
edge: all along it the picture is of another colour. Margins around text and drawings end in ragged ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.survey import Survey

FLAT = 4 / 127.5
"""Root mean square by which a row of a bar is off its colour, at most: four grey levels, for compression."""
OTHER, ALONG = 14 / 127.5, 0.92
"""How far pixels beside the edge are from the colour of the bar, and how many of them are."""
BLENDED = 4
"""Rows beside the flat ones among which the edge lies: resizing and compression blend it."""
FEWEST, SMALLEST, LARGEST = 2, 1 / 32, 0.8
"""Rows of the smaller bar at least, also as a share of all, and what bars together leave to a picture."""
ALIKE = 0.5
"""Rows of the smaller bar over those of the other, at least."""
MOST = 0.3
"""Share of a set that can have bars; where more do, that is how they are meant."""
SHARED, COLOUR = 0.75, 16 / 127.5
"""Share of them that have bars of one colour, and how near to it; where colours differ, it is a matter of design."""


@register_detector
class Borders(Detector):
    """Letterboxed and pillarboxed pictures, if they are few: told to people, and not acted on."""

    name = "bars"
    title = "with bars of one colour at opposite sides"
    order = 81
    acts = False
    least_side = 16

    def measure(self, survey: Survey, shows: Tensor | None) -> None:
        """Report them; training does nothing about them."""
        found = survey.each(lambda images: torch.cat(bars(images), 1))
        has = (found[:, 0] > 0) & ~survey.blank
        if not bool(has.any()):
            return
        colour = found[:, 1:]
        near = has & ((colour - colour[has].median(0).values).abs().amax(1) <= COLOUR)
        if float(near.double().mean()) <= MOST and int(near.sum()) >= SHARED * int(has.sum()):
            survey.add(Finding(self.name, int(near.sum()), self.title, Action.REPORTED), near)


def bars(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rows or columns of the smaller bar as a share of all, 0 without, shape (B, 1), and the colour, shape (B, C).

    Args:
        images: Shape (B, C, H, W) in [-1, 1].
    """
    rows, row_colour = _bars(images)
    columns, column_colour = _bars(images.transpose(2, 3))
    return torch.maximum(rows, columns), torch.where(rows >= columns, row_colour, column_colour)


def _bars(images: Tensor) -> tuple[Tensor, Tensor]:
    """The same of bars at top and bottom."""
    height, every = images.shape[2], torch.arange(len(images))
    colour = images[:, :, :1].median(3, keepdim=True).values
    away = (images - colour).abs().amax(1)
    flat = away.square().mean(2).sqrt() <= FLAT
    other = (away > OTHER).double().mean(2)
    ends, straight = [], torch.ones(len(images), dtype=torch.bool)
    for side, beside in ((flat, other), (flat.flip(1), other.flip(1))):
        end = side.long().cumprod(1).sum(1)
        ends.append(end)
        edge = [beside[every, (end + row).clamp(max=height - 1)] for row in range(BLENDED)]
        straight &= torch.stack(edge).amax(0) >= ALONG
    least, most = torch.minimum(*ends), torch.maximum(*ends)
    has = straight & (least >= max(FEWEST, SMALLEST * height)) & (least >= ALIKE * most)
    has &= least + most <= LARGEST * height
    share = torch.where(has, least.to(images.dtype) / height, 0.0)
    return share[:, None], colour[:, :, 0, 0]
