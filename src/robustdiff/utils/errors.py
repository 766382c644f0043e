"""Errors that a user can mend, and warnings; each message is one line."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the user can mend; the message is one line that names the flag and the remedy."""


class DataError(UsageError):
    """The user's data cannot be used; one line that says why and what to do."""


class RobustdiffWarning(UserWarning):
    """Something went wrong that training survives; the message is one line."""
