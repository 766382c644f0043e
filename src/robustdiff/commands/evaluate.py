"""`robustdiff evaluate`: judge a pipeline or a folder of images."""

from __future__ import annotations

from robustdiff.commands.console import quiet_libraries
from robustdiff.commands.flags import Say
from robustdiff.evaluation.config import EvaluateConfig


def run(config: EvaluateConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.evaluation.run import evaluate, summary

    quiet_libraries()
    written = evaluate(config)
    if written:
        say(summary(written))
    return 0
