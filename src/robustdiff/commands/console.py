"""What every command says to the terminal: one line per error, warnings without code, libraries kept quiet."""

from __future__ import annotations

import re
import sys
from typing import Any

from robustdiff.commands.flags import Speak
from robustdiff.utils.errors import RobustdiffWarning
from robustdiff.utils.resources import processes, rank


def fail(message: str, status: int) -> int:
    """Say why, in one line; returns the exit status."""
    who = f"robustdiff (process {rank()})" if processes() > 1 else "robustdiff"
    sys.stderr.write(f"{who}: {' '.join(message.split())}\n")  # at once: print would let others in before the end
    return status


def show_warning(
    speak: Speak,
    message: Warning | str,
    category: type[Warning],
    *where: Any,  # noqa: ANN401
    **more: Any,  # noqa: ANN401
) -> None:
    """A warning as one line, without the line of code that it comes from; our own once for all processes.

    What a library will drop one day is for those who write programs, not for those who run them: it is not shown.
    """
    if issubclass(category, DeprecationWarning | PendingDeprecationWarning):
        return
    if not issubclass(category, RobustdiffWarning):
        library = re.sub(r".*/(site|dist)-packages/|/.*", "", str(where[0])) if where else "a library"
        print(f"robustdiff: {category.__name__} of {library}: {' '.join(str(message).split())}", file=sys.stderr)
    elif rank() == 0:
        print(f"robustdiff: warning: {' '.join(speak(str(message)).split())}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep diffusers' own progress bars and warnings out of the command's output; errors still come through."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
