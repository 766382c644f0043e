"""What the audit decides, and what it cannot, as enums and numbers; ``summary.py`` makes the sentences."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(str, Enum):
    """What training does about images of a kind."""

    LEFT_OUT = "left-out"
    LEFT_OUT_AS_NOISE = "left-out-as-noise"
    """Left out because no picture is left under the noise."""
    TRAINED_ABOVE = "trained-above"
    """Trained above the noise level that the group shares."""
    TRAINED_ABOVE_OWN = "trained-above-own"
    """Each trained above its own noise level."""
    TRAINED_WHERE_HIDDEN = "trained-where-hidden"
    """Trained at noise levels above which the damage no longer shows."""
    FILLED_IN = "filled-in"
    """Missing pixels filled in, and trained where the repair no longer shows."""
    LESS_OFTEN = "less-often"
    COUNTED_ONCE = "counted-once"
    """Copies of a picture count as one."""
    LEFT_ALONE = "left-alone"
    """Said, and not acted on: too few to matter."""
    REPORTED = "reported"
    """Said, for people: training does nothing about it."""
    REGULARISED = "regularised"
    """No image is clean: trained everywhere, and regularised below the noise."""
    TRAINED_BY_OTHER_PIXELS = "trained-by-other-pixels"
    """No image is whole: below, the missing pixels do not count in the loss."""
    TRAINED_EVERYWHERE = "trained-everywhere"
    """No image is whole: the least damaged are trained at every noise level."""
    AS_SAID = "as-said"
    """Unknown: read from a file that says it in words only."""


class Unasked(str, Enum):
    """Why a kind was not looked for."""

    TOO_FEW = "too-few"
    """Too few pictures say nothing about one another."""
    TOO_SMALL = "too-small"
    """Images are too small for it."""
    CHANNELS = "channels"
    """Images are neither grey nor RGB."""


@dataclass(frozen=True)
class Finding:
    """One thing found in a set.

    Attributes:
        kind: Name of the detector that found it.
        count: Images it concerns.
        what: What was found, for people; nothing compares it.
        action: What training does about it.
        level: Noise level, or the level from which on the images are used, in units of [-1, 1], if it has one.
        confidence: By how many deviations (Ashman's D) a group of noisy images stands apart from the others; None
            where nothing stands apart, or where that was not measured.
        measured_on: Images that ``level`` was measured on, where these are a sample.
        otherwise: What is done beside it where no image is whole.
        told_apart: How well a classifier tells the images from what clean ones become, damaged just so, as an area
            under the curve: 0.5 is not at all, 1 always; None where that was not tested.

    Raises:
        ValueError: If the action is to train above a level, and there is none.
    """

    kind: str
    count: int
    what: str
    action: Action
    level: float | None = None
    confidence: float | None = None
    measured_on: int | None = None
    otherwise: Action | None = None
    told_apart: float | None = None

    def __post_init__(self) -> None:
        """Refuse an action whose level is not known."""
        if self.action in (Action.TRAINED_WHERE_HIDDEN, Action.FILLED_IN) and self.level is None:
            raise ValueError(f"finding of {self.kind}: {self.action.value} needs a level")
