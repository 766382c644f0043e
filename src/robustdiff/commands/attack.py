"""`robustdiff attack`: attack a pipeline while it draws."""

from __future__ import annotations

from robustdiff.attacks.config import AttackConfig
from robustdiff.commands.console import fail, quiet_libraries


def run(config: AttackConfig) -> int:
    """Run the command; returns the exit status."""
    from robustdiff.attacks.benchmark.run import attack
    from robustdiff.evaluation.evaluate import summary
    from robustdiff.utils.signals import Interrupted

    quiet_libraries()
    try:
        print(summary([attack(config)]))
    except Interrupted as stop:
        return fail(str(stop), stop.status)
    except ArithmeticError as error:
        return fail(f"attack failed: {error}", 1)
    return 0
