"""`robustdiff evaluate`: judge a pipeline or a folder of images."""

from __future__ import annotations

from robustdiff.commands.console import quiet_libraries
from robustdiff.evaluation.config import EvaluateConfig


def run(config: EvaluateConfig) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.evaluation.evaluate import evaluate, summary

    quiet_libraries()
    written = evaluate(config)
    if written:
        print(summary(written))
    return 0
