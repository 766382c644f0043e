"""A small classifier of image statistics, cross-fitted, calibrated, and corrected for how common each class is.

Source: correction for unknown shares of the classes: Saerens, Latinne and Decaestecker (2002); scaling of outputs by
one number and an offset a class: Guo et al. (2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

HIDDEN = (128, 64)
DROPOUT = (0.5, 0.1)
STEPS, BATCH, RATE, DECAY = 400, 256, 3e-3, 1e-2
ROUNDS = 200
LEAST_SHARE = 1e-4
"""Of a class, so that none can vanish for good."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """Statistics in units of their spread over some images, large ones drawn in.

    Attributes:
        centre: shape (F,); spread: shape (F,), positive.
    """

    centre: Tensor
    spread: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Scaling:
        """Medians and distances of the tenths, of features (N, F)."""
        low, middle, high = torch.quantile(features, torch.tensor([0.1, 0.5, 0.9]), dim=0)
        return cls(middle, ((high - low) / 2.56).clamp(min=1e-2))

    def __call__(self, features: Tensor) -> Tensor:
        """Of further images, (N, F) -> (N, F)."""
        z = (features - self.centre) / self.spread
        return z.sign() * z.abs().log1p()


def fit_folds(
    known: Sequence[tuple[Tensor, Tensor, Tensor]], asked: Sequence[Tensor], classes: int, seed: int
) -> list[Tensor]:
    """Train one network for each fold, all at once, and ask each.

    Args:
        known: Of each fold: inputs (N, F), classes (N,), weights (N,).
        asked: Of each fold: inputs (M, F).
        classes: How many, K.
        seed: Of all chance.

    Returns:
        Logarithms of probabilities, (M, K), of each fold.
    """
    generator = torch.Generator().manual_seed(seed)
    folds, sizes = len(known), (known[0][0].shape[1], *HIDDEN, classes)
    layers = [
        (
            (torch.randn(folds, i, o, generator=generator) * math.sqrt(2 / i)).requires_grad_(),
            torch.zeros(folds, 1, o, requires_grad=True),
        )
        for i, o in pairwise(sizes)
    ]
    parameters = [one for layer in layers for one in layer]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)

    def answer(x: Tensor, dropout: Sequence[float] = ()) -> Tensor:
        for place, (weight, bias) in enumerate(layers):
            x = torch.baddbmm(bias, x, weight)
            if place < len(HIDDEN):
                x = gelu(x)
            if place < len(dropout):
                kept = torch.rand(x.shape, generator=generator) >= dropout[place]
                x = x * kept / (1 - dropout[place])
        return x

    drawn = [
        torch.multinomial(weight, BATCH * STEPS, replacement=True, generator=generator).view(STEPS, BATCH)
        for _, _, weight in known
    ]
    for step in range(STEPS):
        x, y = (torch.stack([one[part][at[step]] for one, at in zip(known, drawn, strict=True)]) for part in (0, 1))
        loss = cross_entropy(answer(x, DROPOUT).flatten(0, 1), y.flatten()) * folds
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    most = max(len(one) for one in asked)
    padded = torch.stack([torch.cat([one, one.new_zeros(most - len(one), one.shape[1])]) for one in asked])
    with torch.no_grad():
        out = answer(padded).log_softmax(2)
    return [one[: len(part)] for one, part in zip(out, asked, strict=True)]


def calibration(logarithms: Tensor, classes: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """A factor and an offset for each class that make probabilities most likely, of examples not trained on.

    Args:
        logarithms: Of probabilities, shape (N, K).
        classes: The true ones, shape (N,).
        weights: Shape (N,).
    """
    log_factor = torch.zeros((), requires_grad=True)
    offset = torch.zeros(logarithms.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([log_factor, offset], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(logarithms * log_factor.exp() + offset, classes, reduction="none")
        total = (loss * weights).sum() / weights.sum() + 1e-3 * offset.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(log_factor.detach().exp()), offset.detach()


def with_own_shares(ratios: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities under the shares that the classes have among the images asked, found by expectation maximisation.

    Args:
        ratios: Logarithms of probabilities less those of the shares that they were trained with, shape (N, K).
        shares: To begin with, shape (K,).

    Returns:
        Logarithms of probabilities, (N, K), and the shares, (K,).
    """
    for _ in range(ROUNDS):
        shares = (ratios + shares.log()).softmax(1).mean(0).clamp(min=LEAST_SHARE)
        shares = shares / shares.sum()
    return (ratios + shares.log()).log_softmax(1), shares
