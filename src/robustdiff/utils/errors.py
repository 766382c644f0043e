"""Errors and warnings whose message is one line.

They name parameters of functions, and fields of configurations, in backticks: `` `max_bad_fraction` must be between 0
and 1``. A command shows its flags instead (``commands/flags.py``).
"""

from __future__ import annotations

from collections.abc import Iterable


class UsageError(ValueError):
    """Something the user can mend; the message is one line that names the parameter and the remedy."""


class DataError(UsageError):
    """The user's data cannot be used; one line that says why and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what is safe."""


class NoSuchSplit(DataError):
    """The source has no such split, or none at all."""


class RobustdiffWarning(UserWarning):
    """Something went wrong that training survives; the message is one line."""


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a word that is not one of those there are.

    Raises:
        ValueError: One line with the word, what it stands for, and the choices.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(choices)}")
