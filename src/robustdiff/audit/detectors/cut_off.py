"""Pictures that end in a flat part with a straight edge: what decoders make of a file whose rest is missing.

Most formats tell of it themselves, and such files are not read (``data/intact.py``). This is for those that do not:
BMP, uncompressed TIFF, WebP, pictures that were decoded by somebody else before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.survey import Survey

FILLS = (-1.0, 128 / 127.5 - 1)
"""What decoders fill missing rows with: zeros, or the mid grey of JPEG."""
FEWEST, SMALLEST = 3, 1 / 32
"""Rows of the flat part at least, and their share of the picture's."""
STEP, ALONG, ALONG_GREY = 0.15, 0.9, 0.5
"""How far pixels beside the edge are from the flat part, and how many of them, more beside black than beside grey,
which is near to many colours: content fades, or has ragged edges."""
NEARLY, BLENDED = 0.04, 4
"""How flat rows are that resizing has touched, and how many it touches."""
MOST = 0.3
"""Share of a set that can be cut off; where more pictures look so, that is how they are meant."""


@register_detector
class CutOff(Detector):
    """Rows missing at the bottom, or at the top where files begin with the last row."""

    name = "cut"
    title = "cut off: a flat part with a straight edge at the bottom or top"
    order = 5
    least_side = 32

    def detect(self, survey: Survey) -> Tensor:
        """Those with a flat part, if they are few."""
        shows = survey.left & (survey.each(flat_part) > 0)
        return shows if float(shows.double().mean()) <= MOST else torch.zeros_like(shows)

    def measure(self, survey: Survey, shows: Tensor | None) -> None:
        """They are left out."""
        if shows is None or not bool(shows.any()):
            return
        finding = Finding(self.name, int(shows.sum()), self.title, Action.LEFT_OUT)
        survey.add(finding, shows, weight=torch.where(shows, 0.0, survey.result.weight))


def flat_part(images: Tensor) -> Tensor:
    """Share of the rows, at the bottom or the top, that are of one colour and end in a straight edge, shape (B,).

    0 for pictures with bars at both ends, and where the colour is none that decoders fill with.

    Args:
        images: Shape (B, C, H, W) in [-1, 1].
    """
    bottom, top = _flat_rows(images), _flat_rows(images.flip(2))
    height = images.shape[2]
    cut = [
        torch.where(_straight(some, rows) & (other < rows / 2), rows, 0)
        for some, rows, other in ((images, bottom, top), (images.flip(2), top, bottom))
    ]
    return torch.maximum(*cut).double() / height


def _flat_rows(images: Tensor) -> Tensor:
    """How many rows at the bottom are of one colour that decoders fill with, shape (B,); 0 if too few, or all."""
    height = images.shape[2]
    colour = images[:, :, -1:, -1:]
    same = (images == colour).all(3).all(1)
    rows = same.flip(1).long().cumprod(1).sum(1)
    fill = torch.stack([(colour - value).abs() < 1 / 255 for value in FILLS]).all(2).any(0).flatten()
    return torch.where(fill & (rows >= max(FEWEST, height * SMALLEST)) & (rows < height), rows, 0)


def _straight(images: Tensor, rows: Tensor) -> Tensor:
    """Whether all along the edge of the flat part the picture is of another colour, bool, shape (B,).

    The last row of blocks may be filled in its right part only.
    """
    every, last = torch.arange(len(images)), images.shape[2] - 1
    away = (images - images[:, :, -1:, -1:]).abs().amax(1)
    along = torch.where(images[:, 0, -1, -1] == FILLS[0], ALONG, ALONG_GREY)
    found = torch.zeros(len(images), dtype=torch.bool)
    for blended in range(BLENDED + 1):
        edge = (last - rows - blended).clamp(min=1)
        nearly_flat = (away[every, (edge + 1).clamp(max=last)] <= NEARLY).all(1)
        row = away[every, edge - 1]
        filled = (row.flip(1) == 0).long().cumprod(1).sum(1)
        content = row.shape[1] - filled
        other = (row > STEP).sum(1) >= along * content
        found |= nearly_flat & other & (content * 16 >= row.shape[1])
    return found & (rows > 0)
