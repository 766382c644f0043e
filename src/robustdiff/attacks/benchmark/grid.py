"""Which attacks a result of ``robustdiff attack`` needs: the one asked for, and all that it is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robustdiff.attacks.config import AttackConfig
from robustdiff.attacks.optimizers import APGD, PGD, RandomSearch

Optimiser = RandomSearch | PGD | APGD
DEFAULT_RADIUS = 0.01
"""At all of 50 steps PGD-40 moves digits by 1.15 spreads, random signs by 0.1; at 0.1 images saturate (lab notes)."""
RANDOM_DRAWS = 10
RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the curve, in units of ``radius``."""
STEP_SIZES = (1.0, 6.25)
"""Of the sweep, in radii per run of PGD, beside the usual 2.5."""
STARTS = 5
"""Random starts of the short PGD that keeps the best of them."""
SWEPT = "attack on few"
"""What was asked for, on the first ``sweep_n`` images alone, where all images are attacked as one batch."""
EOT, VERDICTS = 5, 20
EOT_DRAWS = (1, 2, 5, 10, 20)
"""Of the curve over draws of the noise, beside ``eot`` and twice that."""


@dataclass(frozen=True)
class Cell:
    """One attack, on every image or the first few.

    Attributes:
        name: What files and tables call it.
        optimiser: What it does.
        factor: Its radius in units of ``radius``; None: huge.
        everywhere: Whether all images are attacked, or the first ``sweep_n``.
        eot: Draws of the noise per gradient, where the attacker does not know it; None: ``eot``.
    """

    name: str
    optimiser: Optimiser
    factor: float | None = 1.0
    everywhere: bool = False
    eot: int | None = None

    @property
    def evaluations(self) -> tuple[int, int]:
        """Evaluations of the objective with a gradient, and without."""
        if isinstance(self.optimiser, RandomSearch):
            return 0, self.optimiser.draws
        return self.optimiser.restarts * self.optimiser.steps, self.optimiser.restarts


def lengths(config: AttackConfig) -> tuple[int, int, int]:
    """Gradient steps of short, usual and long PGD."""
    usual = config.iterations or 40
    return usual // 4, usual, usual * 5 // 2


def is_joint(config: AttackConfig) -> bool:
    """Whether all images are attacked together, as one batch."""
    return config.objective in ("batch-mean", "batch-kernel")


def is_blind(config: AttackConfig) -> bool:
    """Whether the attacker does not know the sampler's noise."""
    return config.noise in ("fixed", "fresh")


def eot_draws(config: AttackConfig) -> tuple[int, ...]:
    """Draws of the noise per gradient: those asked for, then the others of the curve; none if there is nothing to draw.

    Twice the number asked for is among them: whether more would help is measured, whatever was asked.
    """
    if not is_blind(config):
        return ()
    asked = config.eot or EOT
    return (asked, *sorted({*EOT_DRAWS, 2 * asked} - {asked}))


def plan(config: AttackConfig) -> list[Cell]:
    """Every attack that a result needs: the one asked for first, then what it is measured against."""
    short, usual, long = lengths(config)
    asked: Optimiser
    if config.optimiser == "random":
        asked = RandomSearch(usual)
    elif config.optimiser == "one-step":
        asked = PGD(1, restarts=config.restarts)
    elif config.optimiser == "apgd":
        asked = APGD(usual, config.restarts)
    else:
        asked = PGD(usual, config.step_size, config.momentum, config.restarts)
    cells = [
        Cell("attack", asked, everywhere=True),
        Cell("random", RandomSearch(RANDOM_DRAWS), everywhere=True),
        Cell("one-step", PGD(1), everywhere=True),
        *(Cell(f"pgd-{steps}", PGD(steps)) for steps in (short, usual, long)),
        Cell(f"apgd-{usual}", APGD(usual)),
        Cell(f"pgd-{short} starts {STARTS}", PGD(short, restarts=STARTS)),
        *(Cell(f"pgd-{short} step {size / short:g}", PGD(short, size / short)) for size in STEP_SIZES),
        *(Cell(f"pgd-{short} radius x {factor:g}", PGD(short), factor) for factor in RADII if factor != 1),
        Cell(f"pgd-{short} huge radius", PGD(short), None),
        *(Cell(f"pgd-{short} eot {draws}", PGD(short), eot=draws) for draws in eot_draws(config)[1:]),
    ]
    if is_joint(config) and config.sweep_n < config.n:  # what a batch achieves depends on how many it is of
        cells.insert(1, Cell(SWEPT, asked))
    # what is asked for may be one of the others: it is computed once, under its own name
    same = [cell.name != SWEPT and (cell.optimiser, cell.factor, cell.eot) == (asked, 1.0, None) for cell in cells]
    return [cells[0], *(cell for cell, twice in zip(cells[1:], same[1:], strict=True) if not twice)]


def twin(cells: Sequence[Cell], name: str) -> str:
    """The cell of that name, or where that is the same, what was asked for; on the same images, if it is joint."""
    names = [cell.name for cell in cells]
    if name in names:
        return name
    return SWEPT if SWEPT in names and name.startswith(("pgd", "apgd")) else "attack"


def radius(config: AttackConfig, shape: Sequence[int]) -> float:
    """``radius``, or its default."""
    root = float(torch.Size(shape).numel()) ** 0.5
    return config.radius or (DEFAULT_RADIUS if config.norm == "linf" else DEFAULT_RADIUS * root)
