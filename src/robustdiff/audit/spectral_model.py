"""How noisy each image of a set is, from what the others are like: energies along the set's principal directions.

A single image of few pixels cannot say whether its detail is texture or noise. A set can. In the eigenbasis of the
covariance of all blocks (squares of pixels), image i has mean squares ``q_ik`` along direction k, and::

    E q_ik = s_i lambda_k + v_i

with ``lambda`` the spectrum that all images share, ``s_i`` the contrast of this one and ``v_i`` the variance of the
white noise it carries. ``s_i``, ``v_i`` and ``lambda`` are fitted by maximum likelihood (Whittle's: q_ik is v_i chi
square of as many degrees of freedom as it has blocks and directions), in turns.

What cannot be known: adding a constant to ``lambda`` and taking ``s_i`` times as much from every ``v_i`` changes
nothing. The smallest ``lambda`` is taken to be almost 0 to begin with, as it is for pictures of things.

Source: scale mixtures of Gaussians, Portilla et al. (2003); Whittle's likelihood (1953); the use on sets is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

Load = Callable[[range], Tensor]
"""Images with these places, (B, C, H, W), in [-1, 1]."""
SIDES = (16, 8, 4)
BLOCKS_PER_VALUE = 16
"""Fewest blocks, per value of a block, from which directions are taken; smaller sets get smaller blocks."""
BINS = 48
FIT_IMAGES = 20_000
"""The spectrum is fitted on at most so many images, evenly spread."""
BATCH = 256
MOSTLY_CHANCE = 1.5
"""Mean square surprise up to which a group is put down to chance: 1 is expected."""


@dataclass(frozen=True, eq=False)
class Energies:
    """What the images hold along the set's principal directions, in bins of neighbouring ones, weakest first.

    Attributes:
        q: Mean squares, float64, shape (N, K).
        values: Directions in each bin, float64, shape (K,).
        blocks: Blocks of each image.
        mean: Mean block, (D,); basis: directions as columns, (D, D), weakest first; side: edge of a block in pixels.
    """

    q: Tensor
    values: Tensor
    blocks: int
    mean: Tensor
    basis: Tensor
    side: int

    def of(self, images: Tensor) -> Tensor:
        """The same of further images, (B, C, H, W) -> (B, K)."""
        pieces = cut(images, self.side).double() - self.mean
        squares = (pieces @ self.basis).square().mean(1)
        return torch.stack([part.mean(1) for part in torch.split(squares, self.values.long().tolist(), dim=1)], 1)


@dataclass(frozen=True, eq=False)
class SpectralFit:
    """Contrast and noise of every image.

    Attributes:
        scale: s, shape (N,); variance: v >= 0, (N,), squared units of the images.
        spectrum: lambda, shape (K,).
        energies: What was fitted.
    """

    scale: Tensor
    variance: Tensor
    spectrum: Tensor
    energies: Energies

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise, shape (N,)."""
        return self.variance.sqrt()

    def errors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Variances of the estimates of s and of v, and their covariance, shape (N,) each: Fisher's, at the estimate.

        The spectrum counts as known. Where v is at its bound 0 they are those of an estimate without it.
        """
        weight = self.energies.values * self.energies.blocks / 2
        weight = weight / (self.scale[:, None] * self.spectrum + self.variance[:, None]).square()
        ll, l1, one = (weight * self.spectrum**2).sum(1), (weight * self.spectrum).sum(1), weight.sum(1)
        determinant = (ll * one - l1**2).clamp(min=1e-300)
        return one / determinant, ll / determinant, -l1 / determinant

    @property
    def error(self) -> Tensor:
        """By how much sigma would be larger if v were one standard error larger, shape (N,)."""
        return (self.variance + self.errors()[1].sqrt()).sqrt() - self.sigma

    def level(self, group: Tensor) -> float:
        """The noise level that all images of a group share: v where the contrast is 0.

        What texture adds to v, or takes from it, grows with the contrast; so v is extrapolated to none, along the line
        through the medians of the outer thirds.

        Args:
            group: bool, shape (N,), at least one.
        """
        s, v = self.scale[group], self.variance[group]
        order, third = s.argsort(), max(1, len(s) // 3)
        (s0, v0), (s1, v1) = ((s[part].median(), v[part].median()) for part in (order[:third], order[-third:]))
        at_none = v0 - (v1 - v0) / (s1 - s0) * s0 if s1 > s0 else v.median()
        low, high = (v.quantile(share) for share in (0.05, 0.95))
        return float(at_none.clamp(low, high).clamp(min=0).sqrt())

    def surprise(self, group: Tensor) -> Tensor:
        """How unlike its own estimate a noise of the group's median v would be, image by image, shape (members,).

        The signed root of the likelihood ratio: standard normal if all members carry that noise, however skewed the
        estimates are (Barndorff-Nielsen 1986). Negative: less noise.

        Args:
            group: bool, shape (N,), at least one.
        """
        q, freedom = self.energies.q[group], self.energies.values * self.energies.blocks
        v = self.variance[group].median().clamp(min=1e-12)

        def deviance(s: Tensor, v: Tensor) -> Tensor:
            mean = s[:, None] * self.spectrum + v[:, None]
            return (freedom * (q / mean + mean.log())).sum(1)

        s = self.scale[group]
        for _ in range(30):
            weight = freedom / (s[:, None] * self.spectrum + v).square()
            new = (weight * self.spectrum * (q - v)).sum(1) / (weight * self.spectrum**2).sum(1)
            s = (s + new.clamp(min=1e-3)) / 2
        own = deviance(self.scale[group], self.variance[group].clamp(min=1e-12))
        ratio = (deviance(s, v.expand_as(s)) - own).clamp(min=0)
        return ratio.sqrt().copysign(self.variance[group] - v)

    def beyond_chance(self, lower: Tensor, upper: Tensor) -> float:
        """How far two groups are apart, relative to two parts of one group whose estimates differ by chance only.

        About 1 if the lower group is nothing but the share p of the images with the least :meth:`surprise`: of a
        standard normal those and the others are ``phi(z) / (p (1 - p))`` apart, z being the p quantile.

        Args:
            lower: bool, shape (N,), at least one.
            upper: Likewise.
        """
        both = lower | upper
        surprise, share = self.surprise(both), int(lower.sum()) / int(both.sum())
        normal = NormalDist()
        parts = normal.pdf(normal.inv_cdf(share)) / (share * (1 - share))
        return float(surprise[upper[both]].mean() - surprise[lower[both]].mean()) / parts

    def spread_by_chance(self, group: Tensor) -> bool:
        """Whether a group's estimates scatter as those of one noise level do."""
        return bool(self.surprise(group).square().mean() <= MOSTLY_CHANCE)

    def misfit(self) -> Tensor:
        """Log of how badly the common spectrum, its contrast and its noise describe each image, shape (N,).

        The Kullback-Leibler divergence, per direction, of Gaussians with the energies found and those fitted.
        """
        freedom = self.energies.values
        ratio = (self.energies.q / (self.scale[:, None] * self.spectrum + self.variance[:, None])).clamp(min=1e-12)
        return ((freedom * (ratio - 1 - ratio.log())).sum(1) / freedom.sum()).clamp(min=1e-12).log()

    def oddness(self, others: Tensor) -> Tensor:
        """By how many robust deviations of the others each image's :meth:`misfit` lies above their median, (N,).

        Args:
            others: bool, shape (N,), at least one.
        """
        misfit = self.misfit()
        middle = misfit[others].median()
        deviation = (misfit[others] - middle).abs().median().clamp(min=1e-6) / 0.6745
        return (misfit - middle) / deviation

    def whiteness(self, group: Tensor) -> float:
        """How white a group's excess over the common spectrum is: 1 for noise, towards 0 for texture.

        The ratio of the excess along the weakest third of the directions in which it outweighs the picture to that
        along the strongest third of them.
        """
        excess = (self.energies.q - self.scale[:, None] * self.spectrum)[group].mean(0)
        outweighs = self.variance[group].median() > self.scale[group].median() * self.spectrum
        count = max(3, int(outweighs.long().cumprod(0).sum()))
        third = count // 3
        weak, strong = excess[:third].mean(), excess[count - third : count].mean()
        return float((weak / strong).clamp(0, 2)) if strong > 0 else 0.0


def cut(images: Tensor, side: int) -> Tensor:
    """Blocks without overlap, (B, C, H, W) -> (B, P, C side^2); a rest at the lower and right edges is left out."""
    blocks = images.unfold(2, side, side).unfold(3, side, side)
    return blocks.permute(0, 2, 3, 1, 4, 5).reshape(len(images), -1, images.shape[1] * side * side)


def block_side(count: int, shape: tuple[int, int, int]) -> int:
    """Edge of the blocks of ``count`` images of shape (C, H, W): the largest that leaves enough of them."""
    channels, height, width = shape
    for side in SIDES:
        there = count * (height // side) * (width // side)
        if there and there >= BLOCKS_PER_VALUE * channels * side * side:
            return side
    return min(SIDES[-1], height, width)


def batches(count: int) -> Iterator[range]:
    """The places 0 .. count - 1 in pieces that fit in memory."""
    for start in range(0, count, BATCH):
        yield range(start, min(start + BATCH, count))


def held(load: Load, count: int, memory: int) -> Load:
    """The same images, loaded once if they fit into ``memory`` bytes rather than at every pass."""
    if count * load(range(1)).nbytes > memory:
        return load
    images = torch.cat([load(places) for places in batches(count)])
    return lambda places: images[places.start : places.stop]


def energies_of(load: Load, count: int, of: Tensor | None = None) -> Energies:
    """Two passes over the images: directions, then energies along them.

    Args:
        load: The images.
        count: N >= 1.
        of: Images that directions are taken from, bool, shape (N,), at least one. Default: all.

    The side of the blocks depends on N alone.
    """
    first = load(range(1))
    side = block_side(count, (first.shape[1], first.shape[2], first.shape[3]))
    size = first.shape[1] * side * side
    total, square, seen = torch.zeros(size).double(), torch.zeros(size, size).double(), 0
    for places in batches(count):
        images = load(places) if of is None else load(places)[of[list(places)]]
        if not len(images):
            continue
        pieces = cut(images, side).flatten(0, 1).double()
        total, square, seen = total + pieces.sum(0), square + pieces.T @ pieces, seen + len(pieces)
    mean = total / seen
    _, basis = torch.linalg.eigh(square / seen - mean[:, None] * mean)
    edges = torch.linspace(0, size, min(BINS, size) + 1).round().long()
    blocks = (first.shape[2] // side) * (first.shape[3] // side)
    empty = Energies(torch.empty(0), edges.diff().double(), blocks, mean, basis, side)
    q = torch.cat([empty.of(load(places)) for places in batches(count)])
    return Energies(q, empty.values, blocks, mean, basis, side)


def fit(q: Tensor, freedom: Tensor, spectrum: Tensor, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """Contrast and noise of images, the spectrum being known, by damped Fisher scoring.

    Args:
        q: Mean squares, shape (N, K).
        freedom: Degrees of freedom of each, shape (K,): weights of the likelihood.
        spectrum: lambda > 0, shape (K,).
        rounds: Steps.

    Returns:
        s >= 0.001 and v >= 0, shape (N,) each.
    """
    top = max(1, len(spectrum) // 12)
    s = (q[:, -top:].mean(1) / spectrum[-top:].mean()).clamp(min=1e-6)
    v = q[:, :top].mean(1) / 2 + 1e-8
    for _ in range(rounds):
        weight = freedom / (s[:, None] * spectrum + v[:, None]).square()
        ll, l1, one = (weight * spectrum**2).sum(1), (weight * spectrum).sum(1), weight.sum(1)
        lq, q1 = (weight * spectrum * q).sum(1), (weight * q).sum(1)
        determinant = (ll * one - l1**2).clamp(min=1e-300)
        new_s, new_v = (one * lq - l1 * q1) / determinant, (ll * q1 - l1 * lq) / determinant
        # at a bound the other alone
        new_s, new_v = torch.where(new_v < 0, lq / ll, new_s), torch.where(new_s < 1e-3, q1 / one, new_v)
        s, v = (s + new_s.clamp(min=1e-3)) / 2, (v + new_v.clamp(min=0)) / 2
    return s, v


def separate(energies: Energies, of: Tensor | None = None, rounds: int = 12, floor: float = 0.02) -> SpectralFit:
    """Fit spectrum, contrasts and noise in turns.

    Args:
        energies: Of all images.
        of: Images that the spectrum is fitted on, bool, shape (N,), at least one. Default: all.
        rounds: Turns.
        floor: Share of the weakest median energy that the spectrum starts with there: the rest may be noise.
    """
    freedom = energies.values * energies.blocks
    q = energies.q if of is None else energies.q[of]
    q = q[:: -(-len(q) // FIT_IMAGES)]
    typical = q.median(0).values.clamp(min=1e-12)
    spectrum = typical - (1 - floor) * typical.min()
    for _ in range(rounds):
        s, v = fit(q, freedom, spectrum)
        s, v, some = s[:, None], v[:, None], q[s > 0.02]
        weight, rest = (s / (s * spectrum + v)).square()[s[:, 0] > 0.02], (q - v) / s
        if not len(some):
            break
        spectrum = ((weight * rest[s[:, 0] > 0.02]).sum(0) / weight.sum(0)).clamp(min=1e-9)
        spectrum = spectrum * (typical.mean() / spectrum.mean())
    s, v = fit(energies.q, freedom, spectrum)
    return SpectralFit(s, v, spectrum, energies)


def same_above(clean: Tensor, damaged: Tensor, values: Tensor, nats: float = 0.5) -> float:
    """The noise level above which damaged images can hardly be told from clean ones.

    The least sigma at which a block of Gaussian images of the one spectrum, noised, has a Kullback-Leibler divergence
    of at most ``nats`` from one of the other.

    Args:
        clean: Mean energies, shape (K,).
        damaged: Likewise.
        values: Directions in each bin, shape (K,).
        nats: Of one block.

    Returns:
        sigma, in the units of the images; 0 if they are alike as they are.
    """
    low, high = 0.0, float((clean + damaged).max().sqrt()) * 10 + 1e-6

    def divergence(sigma: float) -> float:
        ratio = ((damaged + sigma**2) / (clean + sigma**2).clamp(min=1e-12)).clamp(min=1e-12)
        return float((values * (ratio - 1 - ratio.log())).sum() / 2)

    if divergence(1e-3) <= nats:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if divergence(middle) <= nats else (middle, high)
    return high
