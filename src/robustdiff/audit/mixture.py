"""Which groups a set of numbers falls into, if any: a mixture of Gaussians whose neighbours stand apart."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

APART = 3.0
"""Least distance of neighbouring groups, Ashman's D: sqrt(2) times the difference of means over the root of the summed
variances. At 2 two equal groups begin to show as two peaks; long tails reach 2.4 on clean pictures."""
MOST = 5
FIT = 20_000
FEWEST, LEAST_SHARE = 8, 0.003
"""Smaller groups are stragglers of their neighbour."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups by increasing mean.

    Attributes:
        label: Group of each number, int64, shape (N,).
        mean: Of each group, float64, shape (G,), as the mixture has it; std: likewise.
        apart: Ashman's D to the next group, shape (G - 1,).
    """

    label: Tensor
    mean: Tensor
    std: Tensor
    apart: Tensor

    def __len__(self) -> int:
        """How many groups."""
        return len(self.mean)

    def members(self, group: int) -> Tensor:
        """Which numbers belong to it, bool, shape (N,)."""
        return self.label == group


def split(values: Tensor) -> Groups:
    """Find the groups: as many Gaussians as the Bayesian information criterion wants, merged until all stand apart.

    Args:
        values: Finite numbers, shape (N,), at least one.

    Source: separation: Ashman, Bird & Zepf (1994); the mixture is scikit-learn's.
    """
    x = values.double().numpy()[:, None]
    sample = x[:: -(-len(x) // FIT)]
    reach, different = float(np.ptp(sample)), len(np.unique(sample))
    if reach == 0 or len(sample) < 2 * FEWEST:
        std = values.double().std(correction=0)[None]
        return Groups(torch.zeros(len(x), dtype=torch.long), values.double().mean()[None], std, torch.empty(0).double())
    with warnings.catch_warnings():  # fewer clusters than asked for: the criterion then prefers fewer
        warnings.simplefilter("ignore", ConvergenceWarning)
        models = [
            GaussianMixture(k, n_init=2, random_state=0, reg_covar=(1e-3 * reach) ** 2).fit(sample)
            for k in range(1, min(MOST, different) + 1)
        ]
    best = min(models, key=lambda model: model.bic(sample))
    order = np.argsort(best.means_[:, 0])
    weight = torch.from_numpy(best.weights_[order])
    mean, square = torch.from_numpy(best.means_[order, 0]), torch.from_numpy(best.covariances_[order, 0, 0])
    square = square + mean.square()
    parts, belongs = [[k] for k in range(len(order))], torch.from_numpy(best.predict_proba(x)[:, order])

    def labels() -> Tensor:
        return torch.stack([belongs[:, part].sum(1) for part in parts], 1).argmax(1)

    def moments() -> tuple[Tensor, Tensor, Tensor]:
        share = torch.stack([weight[part].sum() for part in parts])
        first = torch.stack([(weight * mean)[part].sum() for part in parts]) / share
        second = torch.stack([(weight * square)[part].sum() for part in parts]) / share
        return share, first, (second - first.square()).clamp(min=1e-24)

    while len(parts) > 1:
        share, first, variance = moments()
        apart = (2 / (variance[1:] + variance[:-1])).sqrt() * first.diff()
        count = torch.bincount(labels(), minlength=len(parts))
        small = ((count < FEWEST) | (share < LEAST_SHARE)).nonzero().flatten().tolist()
        if small:
            gaps = {max(0, small[0] - 1), min(len(parts) - 2, small[0])}  # between it and its neighbours
            gap = min(gaps, key=lambda k: float(first[k + 1] - first[k]))
        elif apart.min() < APART:
            gap = int(apart.argmin())
        else:
            break
        parts[gap : gap + 2] = [parts[gap] + parts[gap + 1]]
    _, first, variance = moments()
    apart = (2 / (variance[1:] + variance[:-1])).sqrt() * first.diff()
    return Groups(labels(), first, variance.sqrt(), apart)
