"""Errors that a user can mend, and warnings; each message is one line."""

from __future__ import annotations

from collections.abc import Iterable


class UsageError(ValueError):
    """Something the user can mend; the message is one line that names the flag and the remedy."""


class DataError(UsageError):
    """The user's data cannot be used; one line that says why and what to do."""


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
