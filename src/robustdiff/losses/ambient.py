"""Images that carry Gaussian noise of a known size: the timesteps they may train, and what the loss becomes there.

Below its own noise level no state of the process can be made of an image ``y = x0 + sigma_n n``; above it, any can be.
Objectives take ``sigma_n`` as ``noise_level``. With ``L = s / a`` the level of timestep t, ``z ~ N(0, I)``,
``rho = (sigma_n / L)^2 < 1`` and::

    e     = sqrt(1 - rho) z                    the noise that is added, in units of s
    x_t   = a y + s e                          distributed as a x0 + s eps
    image = (1 - rho) y - (sigma_n^2 / L) e    stands for y in the target

the residual, whose mean square is the loss, is that of the plain loss with ``e`` and ``image`` for noise and image, and
the output damped::

    epsilon       (1 - rho) output - e                     = -(a/s) R
    sample        (1 - rho) output - image                 =        R      R = rho x_t / a + (1 - rho) x0_hat(x_t) - y
    v_prediction  (1 - rho) output - (a e - s image)       = -(1/s) R

Since ``E[y | x_t] = rho x_t / a + (1 - rho) E[x0 | x_t]`` (Tweedie's formula twice), the clean denoiser has the least
loss, and ``|residual|^2`` is ``NoiseProcess.x0_weight(t) * |R|^2``: weighted as the plain loss. Nothing is divided by a
or by 1 - rho, and sigma_n = 0 gives the plain loss bit for bit.

Left to itself, an objective draws t for each image uniformly from the timesteps above its level. Then a noisy image
trains as often as a clean one, but puts all its weight on high noise, and low noise, left to the few clean images, is
trained too seldom. :class:`Visits` evens that out. Below the level of the cleanest image nothing is trained at all
(sample with a label floor there). The loss also differs: it holds the noise of y, and an error of ``x0_hat`` counts
``(1 - rho)^2`` times what it does for a clean image.

Source: Daras et al. (2024), arXiv 2411.02780, in this package's variance-preserving notation; docs/theory.md T13.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robustdiff.process import NoiseProcess, expand_to, to_device


def first_timesteps(process: NoiseProcess, noise_level: Tensor) -> Tensor:
    """The least timestep whose noise level sigma/alpha is above that of each image.

    Args:
        process: The noise process; its levels must not fall with t.
        noise_level: sigma_n, standard deviation of the noise in each image, >= 0, in units of the data, shape (B,).

    Returns:
        int64, shape (B,), where ``noise_level`` lies; 0 for a clean image.

    Raises:
        ValueError: If a level is negative, not finite, or not below the largest one of the process.
    """
    table = process.noise_to_signal(torch.arange(process.num_timesteps, device=noise_level.device)).double()
    if not bool((table.diff().nan_to_num(0.0) >= 0).all()):  # inf - inf is no fall
        raise ValueError("noise_level needs a process whose noise grows with t: sort alphas_cumprod downwards")
    level = noise_level.double()
    bad = level[~(level.isfinite() & (level >= 0))]
    if len(bad):
        raise ValueError(f"noise_level must be finite and 0 or more, got {bad[0].item():g}")
    first = torch.searchsorted(table, level.contiguous(), right=True)
    if bool((first == process.num_timesteps).any()):
        raise ValueError(
            f"noise_level {level.max().item():.4g} is not below {table[-1].item():.4g}, the largest noise level "
            "sigma/alpha of the process: no timestep is left for such an image"
        )
    return first


MOST_OFTEN = 50
"""How many times its due an image is used at most where few others can be."""


@dataclass(frozen=True, eq=False)
class Visits:
    """Which image is used how often, and at which timesteps, if every timestep is to be trained equally often.

    Image i may be used from timestep ``first_i`` on, with a weight ``w_i``. The pair is drawn with probability in
    proportion to ``w_i / n(t)`` for ``t >= first_i``, where ``n(t)`` is the weight of all images that may be used at t:
    every timestep that has images comes equally often, and at each the images by their weights. Where ``n(t)`` is below
    a fiftieth of the whole, t comes less often, rather than the few images there still more often.

    Args:
        first: int64, shape (N,), in 0 .. T - 1.
        weight: Shape (N,), >= 0, not all 0.
        num_timesteps: T.

    Raises:
        ValueError: If shapes or ranges do not fit.
    """

    first: Tensor
    weight: Tensor
    num_timesteps: int

    def __post_init__(self) -> None:
        """Check."""
        first, weight = self.first, self.weight
        if (
            first.shape != weight.shape
            or first.ndim != 1
            or not bool(((first >= 0) & (first < self.num_timesteps)).all())
        ):
            raise ValueError(f"Visits needs first and weight of one shape (N,), first in 0 .. {self.num_timesteps - 1}")
        if not bool((weight.isfinite() & (weight >= 0)).all()) or not bool((weight > 0).any()):
            raise ValueError("Visits needs finite weights >= 0, not all of them 0")

    @cached_property
    def used(self) -> Tensor:
        """Places of the images that are used at all, int64."""
        return self.weight.nonzero().flatten()

    @cached_property
    def _rate(self) -> Tensor:
        """Sum of 1 / n(t) over the timesteps before each, float64, shape (T + 1,)."""
        counts = torch.zeros(self.num_timesteps, dtype=torch.float64)
        n = counts.index_add(0, self.first, self.weight.double()).cumsum(0)
        rate = torch.where(n > 0, 1 / n.clamp(min=float(n[-1]) / MOST_OFTEN), torch.zeros_like(n))
        return torch.cat([torch.zeros(1, dtype=torch.float64), rate.cumsum(0)])

    @property
    def share(self) -> Tensor:
        """Probability of each image, float64, shape (N,)."""
        share = self.weight.double() * (self._rate[-1] - self._rate[self.first])
        return share / share.sum()

    def order(self, generator: torch.Generator) -> Tensor:
        """Images of one pass over the data, in random order, int64: as many as are used.

        Each comes as often as its share says, rounded up or down at random (systematic sampling).
        """
        count = len(self.used)
        mark = (torch.arange(count) + torch.rand((), generator=generator, dtype=torch.float64)) / count
        edges = self.share.cumsum(0)
        places = torch.searchsorted(edges / edges[-1], mark, right=True).clamp(max=int(self.used[-1]))
        return places[torch.randperm(count, generator=generator)]

    def timesteps(self, places: Tensor, u: Tensor) -> Tensor:
        """A timestep for each visit.

        Args:
            places: The images, int64, shape (B,).
            u: Uniform numbers in [0, 1), float64, shape (B,).

        Returns:
            int64, shape (B,), not below ``first``.
        """
        first = self.first[places]
        low = self._rate[first]
        mark = low + u * (self._rate[-1] - low)
        t = torch.searchsorted(self._rate, mark, right=True) - 1
        return torch.maximum(t.clamp(max=self.num_timesteps - 1), first)


@dataclass(frozen=True)
class Noised:
    """One batch on its way through an objective."""

    t: Tensor  # (B,), where it was drawn (the CPU, unless the caller gave it): schedules cost no device sync
    eps: Tensor
    x_t: Tensor
    target: Tensor
    keep: Tensor | None = None  # 1 - rho, (B, 1, ...), of images that may have noise of their own
    mask: Tensor | None = None  # (B, ...), 1 where an element counts in the denoising term, 0 where it does not

    def kept(self, x: Tensor) -> Tensor:
        """An output, or a shift of it, (B, ...), damped as the noise of the image itself demands."""
        return x if self.keep is None else self.keep * x

    def mean(self, losses: Tensor) -> Tensor:
        """Mean over the elements that count: (B, ...) -> (B,); 0 where none does."""
        if self.mask is None:
            return losses.flatten(1).mean(1)
        return (losses * self.mask).flatten(1).sum(1) / self.mask.flatten(1).sum(1).clamp(min=1)

    def rows(self, index: Tensor, here: Tensor) -> Noised:
        """Some images; ``index`` on the device of t, ``here`` the same on that of the images."""
        keep, mask = (None if x is None else x[here] for x in (self.keep, self.mask))
        return Noised(self.t[index], self.eps[here], self.x_t[here], self.target[here], keep, mask)


def add_noise(process: NoiseProcess, x0: Tensor, z: Tensor, t: Tensor, noise_level: Tensor | None) -> Noised:
    """State and target of images at their timesteps, by the formulas above.

    Args:
        process: The noise process.
        x0: Images, shape (B, ...): y, where they have noise of their own.
        z: Standard normal numbers of that shape.
        t: Timesteps, shape (B,), not below :func:`first_timesteps`.
        noise_level: sigma_n, shape (B,), or None if every image is clean.

    Returns:
        The batch; its ``eps`` is e.
    """
    if noise_level is None:
        return Noised(t, z, process.add_noise(x0, z, t), process.target(x0, z, t))
    level = to_device(noise_level, t.device).double()
    ratio = level / process.noise_to_signal(t).double()  # to 0 at zero terminal SNR
    # 1 - rho in double precision: little is left of it where L is hardly above sigma_n
    keep, pull = (expand_to(to_device(c.to(x0.dtype), x0.device), x0) for c in (1 - ratio.square(), level * ratio))
    e = keep.sqrt() * z
    return Noised(t, e, process.add_noise(x0, e, t), process.target(keep * x0 - pull * e, e, t), keep)
