"""Losses by the name that ``objective`` knows: one entry each, read without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from robustdiff.losses.denoising import DenoisingLoss


@dataclass(frozen=True)
class NamedLoss:
    """Where a loss stands, and which flags have a meaning for it.

    Args:
        path: ``module:class``; made from a schedule alone unless it is ``regularised``.
        regularised: Whether it is made like ``EquivarianceLoss``: perturbation, strength, radius, gradient.
        shift_only: Whether it penalises the shift of the noise prediction: nothing without a perturbation, which then
            must ascend the same.
        takes_noise_level: Whether it has a clean optimum on images of known noise (``DenoisingLoss``).
    """

    path: str
    regularised: bool = False
    shift_only: bool = False
    takes_noise_level: bool = True

    def load(self) -> type[DenoisingLoss]:
        """The class."""
        module, name = self.path.split(":")
        found: type[DenoisingLoss] = getattr(import_module(module), name)
        return found


LOSSES = {
    "robust": NamedLoss("robustdiff.losses.equivariance:EquivarianceLoss", regularised=True),
    "invariance": NamedLoss("robustdiff.losses.baselines:InvarianceLoss", regularised=True, shift_only=True),
    "input-perturbation": NamedLoss("robustdiff.losses.baselines:InputPerturbationLoss"),
    "pseudo-huber": NamedLoss("robustdiff.losses.baselines:PseudoHuberLoss", takes_noise_level=False),
}

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]
"""The names as a command line offers them."""
