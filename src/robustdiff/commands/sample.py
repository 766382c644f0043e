"""`robustdiff sample`: draw images."""

from __future__ import annotations

from robustdiff.commands.console import quiet_libraries
from robustdiff.commands.flags import Say
from robustdiff.diffusion.config import SampleConfig


def run(config: SampleConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.diffusion.sample_files import sample_to_files

    quiet_libraries()
    message = sample_to_files(config)
    if message:
        say(message)
    return 0
