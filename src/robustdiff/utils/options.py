"""What the configurations of all commands share: types of optional flags, limits, checks."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import arg

from robustdiff.utils.errors import UsageError


class Settings:
    """Base of the configurations of all commands, frozen dataclasses: in them ``~`` is the home folder.

    Shells leave it as it is where it does not begin a word, as in ``output=~/x``.
    """

    def __post_init__(self) -> None:
        """Put the home folder for the ``~``, or ``~user``, that any text begins with."""
        for name, value in list(vars(self).items()):
            if isinstance(value, str):
                object.__setattr__(self, name, _at_home(value))
            elif isinstance(value, tuple):
                parts = tuple(_at_home(part) if isinstance(part, str) else part for part in value)
                object.__setattr__(self, name, parts)

    def check_homes(self) -> None:
        """Refuse the ``~user`` of nobody, where a path may be meant: it would become a folder of that name.

        Raises:
            UsageError: In one line with the setting.
        """
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and text.startswith("~") and not WORDS.fullmatch(name):
                    user = text[1:].partition(os.sep)[0]
                    raise UsageError(
                        f"`{name}` {text}: there is no user {user!r} here: write ./{text} if that is its name"
                    )

    def check_choices(self, **known: Iterable[str]) -> None:
        """Refuse words that are none of those a setting offers: a command line does, Python does not.

        Args:
            known: The words of settings that offer what is registered, as it is now.

        Raises:
            UsageError: In one line with the setting and the words.
        """
        for name, hint in get_type_hints(type(self)).items():
            choices = tuple(known[name]) if name in known else _choices(hint)
            value = getattr(self, name)
            if choices and not any(
                value is choice or (value == choice and type(value) is type(choice)) for choice in choices
            ):
                words = ", ".join(str(choice) for choice in choices if choice is not None)
                raise UsageError(f"`{name}` {value!r} is not one of {words}")


WORDS = re.compile("title|told|class_label|.*split|.*column")
"""Settings that are no paths."""


def _at_home(text: str) -> str:
    # pathlib would take away the dot that says that it is no home
    return os.path.abspath(text) if text.startswith("./~") else os.path.expanduser(text)


def _choices(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401 - any type
    """The words of a Literal, and None if it may be missing; nothing of other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [part for part in get_args(hint) if part is not type(None)]
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        inner = _choices(parts[0]) if len(parts) == 1 else ()
        return (*inner, None) if inner else ()
    return ()


MAX_SEED = 2**32 - 1
"""torch's CPU generators use the low 32 bits only: a larger seed would repeat a smaller one."""


MAX_SIDE, MAX_BATCH, MAX_WORKERS = 2**16, 2**20, 1024
"""Larger numbers are slips of the pen that would only be noticed when memory is gone."""


OptionalText = Annotated[str | None, arg(metavar="TEXT")]


OptionalInt = Annotated[int | None, arg(metavar="INT")]


OptionalFloat = Annotated[float | None, arg(metavar="NUMBER")]


OptionalGiB = Annotated[float | None, arg(metavar="GIB")]

# -- what several commands take, said once ------------------------------------------------------------------

Split = Annotated[
    str | None,
    arg(metavar="TEXT", help="Part of a data set that comes in parts (train, test ..., or all). Default: train."),
]
HubConfig = Annotated[str | None, arg(metavar="TEXT", help="Configuration of a hub data set that has several.")]
ImageColumn = Annotated[
    str | None, arg(metavar="TEXT", help="Column of a table that holds the images. Default: the only one that can.")
]
ValueRange = Annotated[
    str | None,
    arg(
        metavar="LOW:HIGH",
        help="Values of black and white, such as 0:4095, in files that can hold larger ones than they use (write "
        "--value-range=-1024:3071 if LOW is negative). Default: as each file declares.",
    ),
]
ReferenceSplit = Annotated[
    str | None,
    arg(metavar="TEXT", help="Part of the reference, if it comes in parts (train, test ..., or all). Default: train."),
]
ReferenceConfig = Annotated[
    str | None, arg(metavar="TEXT", help="Configuration of the reference, if it is a hub data set that has several.")
]
ReferenceColumn = Annotated[
    str | None,
    arg(
        metavar="TEXT",
        help="Column of the reference that holds the images, if it is a table. Default: the only one that can.",
    ),
]
BadFraction = Annotated[
    float, arg(help="Largest share of unreadable images that is skipped rather than an error, 0 to 1.")
]
MemoryGiB = Annotated[
    float | None,
    arg(
        metavar="GIB", help="Hold the decoded images if they take at most this much. Default: half of the free memory."
    ),
]
SamplerSteps = Annotated[
    int, arg(help="Network calls per image, trailing spacing; ddim and ddpm need a divisor of the noise levels (1000).")
]
SigmaFloor = Annotated[
    float,
    arg(
        aliases=["--label-floor"],
        help="Query the network at no noise level sigma/alpha below this one, >= 0: for no finer detail; no training.",
    ),
]
FloorShape = Annotated[
    Literal["hard", "quadrature"],
    arg(
        help="How the floor F raises a level c. hard: max(c, F); quadrature: sqrt(c^2 + F^2 (1 + c^2)), as a "
        "regulariser does whose perturbation is in units of the state (--radius-units state of `train`)."
    ),
]
Title = Annotated[str | None, arg(metavar="TEXT", help="What tables call it. Default: the name of the folder.")]
Told = Annotated[
    str | None,
    arg(metavar="TEXT", help="What the method knew beside its training images, for the tables. Default: not stated."),
]
CacheFolder = Annotated[
    str | None,
    arg(
        metavar="TEXT",
        help="Folder that keeps features by content, or `none`. Default: ~/.cache/robustdiff (see ROBUSTDIFF_CACHE).",
    ),
]


def parse_count(text: str, name: str) -> int:
    """A count with an optional suffix: ``"500k"``, ``"1.5M"``, ``"20000"``.

    Args:
        text: The number; k = thousand, M = million.
        name: Of the setting, for the error.

    Raises:
        UsageError: If it is no positive whole number.
    """
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1 and abs(value - round(value)) < 1e-6):
        raise UsageError(f"`{name}` {text!r} is not a positive number of images such as 20000, 500k or 1.5M")
    return round(value)


def require(condition: bool, message: str) -> None:
    """Raise a usage error with this message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def check_given(config: object, *names: str) -> None:
    """Of these fields none is an empty text."""
    for name in names:
        require(getattr(config, name) != "", f"`{name}` is empty: give a name, or leave the flag out")


def check_resolution(side: int | None) -> None:
    """A side in pixels, or none."""
    require(side is None or 1 <= side <= MAX_SIDE, f"`resolution` must be in 1 .. {MAX_SIDE} pixels")


def check_floor(sigma_floor: float, floor_shape: str) -> None:
    """A noise level sigma/alpha, and a shape that means something there."""
    require(math.isfinite(sigma_floor) and sigma_floor >= 0, f"`sigma_floor` {sigma_floor} must be 0 or more")
    idle = floor_shape != "hard" and sigma_floor == 0
    require(not idle, f"`floor_shape` {floor_shape} does nothing without `sigma_floor`: give one, such as 0.1")


def check_bad_fraction(share: float) -> None:
    """A share of images."""
    require(0 <= share <= 1, "`max_bad_fraction` must be between 0 and 1")


def check_extractors(names: tuple[str, ...]) -> None:
    """Names of feature extractors: none empty, none twice."""
    require("" not in names, "`extractor` is empty: name one, or leave the flag out")
    twice = [name for name in names if names.count(name) > 1]
    require(not twice, f"`extractor` {twice[0] if twice else ''} is given twice: leave one out")


def check_memory(gib: float | None) -> None:
    """GiB of memory, or none."""
    good = gib is None or (math.isfinite(gib) and gib >= 0)
    require(good, f"`max_memory_gib` {gib} must be a finite number, 0 or more")


def listed(names: list[str]) -> str:
    """Names of settings as errors name them."""
    return ", ".join(f"`{name}`" for name in names)
