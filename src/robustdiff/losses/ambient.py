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
loss, and ``|residual|^2`` is ``NoiseSchedule.x0_weight(t) * |R|^2``: weighted as the plain loss. Nothing is divided by
a or by 1 - rho, and sigma_n = 0 gives the plain loss bit for bit.

Left to itself, an objective draws t for each image uniformly from the timesteps above its level. Then a noisy image
trains as often as a clean one, but puts all its weight on high noise, and low noise, left to the few clean images, is
trained too seldom. ``training.curriculum`` evens that out. Below the level of the cleanest image nothing is trained at
all (sample with a label floor there). The loss also differs: it holds the noise of y, and an error of ``x0_hat`` counts
``(1 - rho)^2`` times what it does for a clean image.

Source: Daras et al. (2024), arXiv 2411.02780, in this package's variance-preserving notation;
docs/explanation/theory.md T13.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.utils.tensors import expand_to, to_device


def first_timesteps(schedule: NoiseSchedule, noise_level: Tensor) -> Tensor:
    """The least timestep whose noise level sigma/alpha is above that of each image.

    Args:
        schedule: The noise schedule; its levels must not fall with t.
        noise_level: sigma_n, standard deviation of the noise in each image, >= 0, in units of the data, shape (B,).

    Returns:
        int64, shape (B,), where ``noise_level`` lies; 0 for a clean image.

    Raises:
        ValueError: If a level is negative, not finite, or not below the largest one of the schedule.
    """
    table = schedule.noise_to_signal(torch.arange(schedule.num_timesteps, device=noise_level.device)).double()
    if not bool((table.diff().nan_to_num(0.0) >= 0).all()):  # inf - inf is no fall
        raise ValueError("noise_level needs a schedule whose noise grows with t: sort alphas_cumprod downwards")
    level = noise_level.double()
    bad = level[~(level.isfinite() & (level >= 0))]
    if len(bad):
        raise ValueError(f"noise_level must be finite and 0 or more, got {bad[0].item():g}")
    first = torch.searchsorted(table, level.contiguous(), right=True)
    if bool((first == schedule.num_timesteps).any()):
        raise ValueError(
            f"noise_level {level.max().item():.4g} is not below {table[-1].item():.4g}, the largest noise level "
            "sigma/alpha of the schedule: no timestep is left for such an image"
        )
    return first


@dataclass(frozen=True)
class NoisyBatch:
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

    def rows(self, index: Tensor, here: Tensor) -> NoisyBatch:
        """Some images; ``index`` on the device of t, ``here`` the same on that of the images."""
        keep, mask = (None if x is None else x[here] for x in (self.keep, self.mask))
        return NoisyBatch(self.t[index], self.eps[here], self.x_t[here], self.target[here], keep, mask)


def add_noise(schedule: NoiseSchedule, x0: Tensor, z: Tensor, t: Tensor, noise_level: Tensor | None) -> NoisyBatch:
    """State and target of images at their timesteps, by the formulas above.

    Args:
        schedule: The noise schedule.
        x0: Images, shape (B, ...): y, where they have noise of their own.
        z: Standard normal numbers of that shape.
        t: Timesteps, shape (B,), not below :func:`first_timesteps`.
        noise_level: sigma_n, shape (B,), or None if every image is clean.

    Returns:
        The batch; its ``eps`` is e.
    """
    if noise_level is None:
        return NoisyBatch(t, z, schedule.add_noise(x0, z, t), schedule.target(x0, z, t))
    level = to_device(noise_level, t.device).double()
    ratio = level / schedule.noise_to_signal(t).double()  # to 0 at zero terminal SNR
    # 1 - rho in double precision: little is left of it where L is hardly above sigma_n
    keep, pull = (expand_to(to_device(c.to(x0.dtype), x0.device), x0) for c in (1 - ratio.square(), level * ratio))
    e = keep.sqrt() * z
    return NoisyBatch(t, e, schedule.add_noise(x0, e, t), schedule.target(keep * x0 - pull * e, e, t), keep)
