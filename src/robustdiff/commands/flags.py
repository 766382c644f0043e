"""Names of parameters as flags: the library says `max_bad_fraction`, a command says --max-bad-fraction.

This is the one place where the two meet. Whatever a command prints goes through it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

Speak = Callable[[str], str]
"""Turns the names of parameters in a text into flags."""
Say = Callable[[str], None]
"""Prints a text, with flags for parameters."""

NAMED = re.compile(r"`([a-z]\w*)(=False)?`")
"""A parameter in a message; switched off with ``=False``."""
ALIASES = {"config": "dataset_config_name", "max_memory": "max_memory_gib"}
"""Parameters of the library that go by another name in every command."""


def flags(config: type) -> dict[str, str]:
    """Every setting of a command as it is typed: ``--max-bad-fraction``, ``-n``, and ``DATA`` where it has no flag."""
    found = {}
    for field in dataclasses.fields(config):
        shown = re.search(r"metavar=['\"](\w+)", str(field.type))
        if "Positional" in str(field.type) and shown:
            found[field.name] = shown[1]
        else:
            found[field.name] = ("-" if len(field.name) == 1 else "--") + field.name.replace("_", "-")
    return found


def speak(config: type, aliases: Mapping[str, str], others: Iterable[type]) -> Speak:
    """Turns `` `name` `` into the flag of a command.

    Args:
        config: Settings of the command.
        aliases: Settings by the names that the library gives them, where those differ.
        others: Settings of the other commands, whose flags a message may name too.

    Returns:
        The function. What is no setting of any command stays as it is, backticks and all.
    """
    known = {name: flag for other in (*others, config) for name, flag in flags(other).items()}
    known |= {name: known[field] for name, field in {**ALIASES, **aliases}.items() if field in known}

    def flag(match: re.Match[str]) -> str:
        found = known.get(match[1], match[0])
        return found.replace("--", "--no-", 1) if match[2] else found

    return lambda text: NAMED.sub(flag, text)
