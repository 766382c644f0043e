"""`robustdiff purify`: denoise images that somebody else has."""

from __future__ import annotations

from robustdiff.attacks.config import PurifyConfig
from robustdiff.commands.console import quiet_libraries
from robustdiff.commands.flags import Say


def run(config: PurifyConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.attacks.purify_files import purify_to_files, summary

    quiet_libraries()
    say(summary(purify_to_files(config), str(config.output)))
    return 0
