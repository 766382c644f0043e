"""What every command says to the terminal: one line per error, warnings without code, libraries kept quiet."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from robustdiff.commands.flags import Speak
from robustdiff.utils.errors import RobustdiffWarning
from robustdiff.utils.resources import processes, rank


def fail(message: str, status: int) -> int:
    """Say why, in one line; returns the exit status."""
    who = f"robustdiff (process {rank()})" if processes() > 1 else "robustdiff"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    return status


def show_warning(
    speak: Speak,
    message: Warning | str,
    category: type[Warning],
    *where: Any,  # noqa: ANN401
    **more: Any,  # noqa: ANN401
) -> None:
    """Our own warnings as one line, without the line of code that they come from; once for all processes."""
    if not issubclass(category, RobustdiffWarning):
        print(warnings.formatwarning(message, category, *where[:2]), end="", file=sys.stderr)
    elif rank() == 0:
        print(f"robustdiff: warning: {' '.join(speak(str(message)).split())}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep diffusers' own progress bars and warnings out of the command's output; errors still come through."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
