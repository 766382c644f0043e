"""`robustdiff attack`: attack a pipeline while it draws."""

from __future__ import annotations

from robustdiff.attacks.config import AttackConfig
from robustdiff.commands.console import fail, quiet_libraries
from robustdiff.commands.flags import Say


def run(config: AttackConfig, say: Say) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.attacks.benchmark.run import attack
    from robustdiff.evaluation.run import summary

    quiet_libraries()
    try:
        say(summary([attack(config)]))
    except ArithmeticError as error:
        return fail(f"attack failed: {error}", 1)
    return 0
