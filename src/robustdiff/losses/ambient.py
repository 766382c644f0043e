"""Images that carry Gaussian noise of a known size, sigma_n: what they become at a noise level above it.

Of ``y = x0 + sigma_n n`` no state with less noise than that can be made, and any other can. At a timestep of level
``c = s / a``, with ``rho = (sigma_n / c)^2 < 1`` and ``z ~ N(0, I)``::

    e     = sqrt(1 - rho) z                    the noise that is added, in units of s
    x_t   = a y + s e                          distributed as a x0 + s eps
    image = (1 - rho) y - (sigma_n^2 / c) e    stands for x0 in the target p x0 + q eps, as e does for eps

    (1 - rho) output - target = -(D / s) R,    R = rho x_t / a + (1 - rho) x0_hat(x_t) - y

(p, q, D: ``diffusion/prediction.py``). Since ``E[y | x_t] = rho x_t / a + (1 - rho) E[x0 | x_t]`` (Tweedie's formula
twice), the clean denoiser has the least loss, weighted as the denoising loss weights R. Nothing is divided by a or by
1 - rho, and sigma_n = 0 gives the denoising loss bit for bit. But it holds the noise of y, and an error of ``x0_hat``
counts ``(1 - rho)^2`` times what it does for a clean image. Which timesteps an image is trained at is another matter:
see ``training/curriculum.py``.

Source: Daras et al. (2024), arXiv 2411.02780, for any prediction; docs/explanation/theory.md T13.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustdiff.diffusion.schedule import Schedule
from robustdiff.utils.tensors import expand_to, to_device


@dataclass(frozen=True)
class NoisyBatch:
    """One batch on its way through a loss: states, targets, and what counts how much; (B, ...) unless said."""

    t: Tensor  # (B,), where it was drawn (the CPU, unless the caller gave it): schedules cost no device sync
    eps: Tensor
    x_t: Tensor
    target: Tensor
    keep: Tensor | None = None  # 1 - rho, (B, 1, ...), of images that may have noise of their own
    mask: Tensor | None = None  # 1 where an element counts in the denoising term, 0 where it does not

    def kept(self, x: Tensor) -> Tensor:
        """An output, or a shift of it, damped by 1 - rho."""
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


def add_noise(schedule: Schedule, x0: Tensor, z: Tensor, t: Tensor, noise_level: Tensor | None) -> NoisyBatch:
    """State and target of images at their timesteps, by the formulas above.

    Args:
        schedule: The noise schedule.
        x0: Images, shape (B, ...): y, where they have noise of their own.
        z: Standard normal numbers of that shape.
        t: Timesteps, shape (B,), not below ``schedule.first_timesteps(noise_level)``.
        noise_level: sigma_n, in the units of ``x0``, shape (B,), or None if every image is clean.

    Returns:
        The batch; its ``eps`` is e.
    """
    if noise_level is None:
        return NoisyBatch(t, z, schedule.add_noise(x0, z, t), schedule.target(x0, z, t))
    level = to_device(noise_level, t.device).double()
    ratio = level / schedule.noise_to_signal(t).double()  # to 0 at zero terminal SNR
    keep = (1 - ratio.square()).clamp(min=0)  # in double precision: little is left of it where c is hardly above
    keep, pull = (expand_to(to_device(c.to(x0.dtype), x0.device), x0) for c in (keep, level * ratio))
    e = keep.sqrt() * z
    return NoisyBatch(t, e, schedule.add_noise(x0, e, t), schedule.target(keep * x0 - pull * e, e, t), keep)
