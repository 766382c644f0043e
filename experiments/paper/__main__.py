"""``python -m experiments.paper NAME``: the paper's experiments, row by row; stopped, it goes on where it was."""

from __future__ import annotations

import sys

from experiments.paper.config import ReproduceConfig
from robustdiff.commands.console import fail, quiet_libraries
from robustdiff.commands.flags import Say
from robustdiff.commands.main import Command, main

MEMORY_REMEDY = "fewer --workers; for subspace, a smaller --resolution"


def run(config: ReproduceConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    from concurrent.futures.process import BrokenProcessPool

    from experiments.paper.command import RowFailed, reproduce

    quiet_libraries()
    try:
        page = reproduce(config)
    except BrokenProcessPool:
        return fail("a worker process died (out of memory?): run again with fewer --workers; finished rows are kept", 1)
    except ArithmeticError as error:
        return fail(f"training failed: {error}; finished rows are kept", 1)
    except RowFailed as error:
        return fail(f"{error}; finished rows are kept, the same command tries again", 1)
    if page is not None:
        say(str(page))
    return 0


def reproduce(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    command = Command(ReproduceConfig, run, MEMORY_REMEDY, goes_on="the same command goes on")
    return main(argv, {"experiments.paper": command}, prog="python -m experiments.paper")


if __name__ == "__main__":
    sys.exit(reproduce())
