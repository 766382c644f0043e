"""Pictures that are too dark, washed out or of a colour cast, beside the others: told to people, and not acted on.

Three numbers of every picture are what light and camera set for all of its pixels at once: its white (the brightest
value of any channel, but for stray ones), its black over its white, and how much less or more of a channel it has than
the others have. Each is judged against the set: a look is reported where a group of pictures (``mixture.py``) stands
apart from the median by robust deviations and by a step that people see. What is common is how the set is meant.

A cast is estimated twice, by the brightest value of the channel and by its mean, as each errs on other pictures; the
two are weighed by how little they scatter over the set, and a group is of a cast only if both say so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustdiff.audit import mixture
from robustdiff.audit.detector import Detector, register_detector
from robustdiff.audit.finding import Action, Finding
from robustdiff.audit.survey import FEWEST, Survey

STRAY = 0.002
"""Share of the pixels that may be darker than black and brighter than white."""
DEVIATIONS = 3.0
"""Robust deviations from the median of the set, at least."""
MOST = 0.3
"""Share of a set that may look so."""
LEAST = 0.02
"""Added to brightness in [0, 1] before logarithms, and to the scatter of estimates: five grey levels."""
DARKER = 0.6
"""Logarithm of the white of the set over that of dark pictures, at least: about half."""
LIFTED = 0.3
"""By how much the black of washed-out pictures lies nearer to their white, at least."""
COLOURED = 0.2
"""Logarithm of how much less or more of a channel pictures of a cast have, at least: a quarter less."""


@register_detector
class Looks(Detector):
    """Three looks that stand apart, each a group of its own: ``dark``, ``washed_out``, ``cast``."""

    name = "looks"
    title = "of another look than the others"
    order = 80
    acts = False

    def measure(self, survey: Survey, shows: Tensor | None) -> None:
        """Report them; training does nothing about them."""
        asked = ~survey.blank
        if int(asked.sum()) < FEWEST:
            return
        measured = survey.each(_levels).double()
        white, black, channels = measured[:, 0], measured[:, 1], measured[:, 2:]
        casts = _casts(channels.reshape(len(channels), 2, -1), asked)
        found = {
            "dark": ("darker than the others", _stands_low((white + LEAST).log(), DARKER, asked)),
            "washed_out": ("washed out, their black is grey", _stands_low(-black / (white + LEAST), LIFTED, asked)),
            "cast": ("of a colour cast", casts),
        }
        for kind, (what, members) in found.items():
            if bool(members.any()):
                survey.add(Finding(kind, int(members.sum()), what, Action.REPORTED), members)


def _levels(images: Tensor) -> Tensor:
    """White, black, the brightest value of each channel and its mean, in [0, 1], shape (B, 2 + 2 C)."""
    bright = ((images + 1) / 2).clamp(0, 1).flatten(2)
    pixels = bright.shape[2]
    stray = min(pixels, 1 + int(STRAY * pixels))
    white = bright.amax(1).kthvalue(pixels + 1 - stray, dim=1).values
    black = bright.amin(1).kthvalue(stray, dim=1).values
    return torch.cat([white[:, None], black[:, None], bright.amax(2), bright.mean(2)], 1)


def _stands_low(values: Tensor, step: float, asked: Tensor) -> Tensor:
    """Members of groups far below the median of the images asked, if they are few; bool, shape (N,)."""
    low, some = torch.zeros_like(asked), values[asked]
    middle = some.median()
    deviation = 1.4826 * (some - middle).abs().median()
    groups, places = mixture.split(some), asked.nonzero().flatten()
    for group in range(len(groups) - 1):
        if groups.mean[group] <= middle - max(DEVIATIONS * float(deviation), step):
            low[places[groups.members(group)]] = True
    return low if float(low.double().mean()) <= MOST else torch.zeros_like(low)


def _casts(channels: Tensor, asked: Tensor) -> Tensor:
    """Images that have less or more of a channel than the others, bool, shape (N,).

    Args:
        channels: The brightest value of each channel and its mean, in [0, 1], shape (N, 2, C).
        asked: Images that are judged, bool, shape (N,).
    """
    logs = (channels + LEAST).log()
    said = logs - logs.mean(2, keepdim=True)  # without brightness
    said = said - said[asked].median(0).values
    scatter = 1.4826 * said[asked].abs().median(0).values
    trust = 1 / (scatter.square().mean(1) + LEAST**2)
    gain = (said * (trust / trust.sum())[:, None]).sum(1)
    found = torch.zeros_like(asked)
    for channel in range(gain.shape[1] if gain.shape[1] > 1 else 0):
        for sign in (1, -1):
            low = _stands_low(sign * gain[:, channel], COLOURED, asked)
            agreed = bool(low.any()) and bool((sign * said[low, :, channel].median(0).values <= -COLOURED / 2).all())
            found |= low & agreed
    return found
