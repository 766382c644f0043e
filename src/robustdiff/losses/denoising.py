"""The denoising loss, and what every loss shares: how it is called, and the per-image terms it returns.

The caller reduces them::

    terms = loss(model, x0, generator=g)      # model: diffusers' or any callable(x_t, t, **kwargs)
    terms.total.mean().backward()

A loss owns neither the model nor the optimiser, mutates nothing it is given, and keeps images, noise and losses in
float32 (or float64, if ``x0`` is) whatever precision the model computes in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustdiff.diffusion.model import Model, call_model
from robustdiff.diffusion.schedule import Schedule
from robustdiff.losses.ambient import NoisyBatch, add_noise
from robustdiff.utils.random import Generators, check_generators, draw_normal
from robustdiff.utils.tensors import to_device


@dataclass(frozen=True)
class LossOutput:
    """Losses of a batch, one number per image; every tensor has shape (B,).

    Attributes:
        total: ``denoising + strength * equivariance``, times the weight of the noise level if the loss gives it one:
            reduce this and call ``backward``.
        denoising: Mean squared error of the prediction over an image's elements.
        equivariance: Mean squared regulariser over an image's elements; 0 where the strength is 0.
        t: Timesteps drawn.
        radius: Bound on omega; 0 where the strength is 0.
        strength: lambda at each image's noise level.
    """

    total: Tensor
    denoising: Tensor
    equivariance: Tensor
    t: Tensor
    radius: Tensor
    strength: Tensor


@dataclass(frozen=True)
class DenoisingLoss:
    """The denoising loss ``||output - target||^2`` (Ho et al. 2020, Eq. 14), uniform in t.

    Args:
        schedule: The noise schedule, which also says what the model predicts.
    """

    schedule: Schedule
    takes_noise_level: ClassVar[bool] = True
    """Whether the minimum stays where it is when images are noisy and say how much."""

    def __call__(
        self,
        model: Model,
        x0: Tensor,
        *,
        generator: Generators = None,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        noise_level: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **model_kwargs: Any,  # noqa: ANN401 - passed through
    ) -> LossOutput:
        """Loss terms of a batch.

        Args:
            model: ``callable(x_t, t, **model_kwargs)``.
            x0: Images in [-1, 1], shape (B, ...), floating point; half precision is raised to float32.
            generator: Source of all draws: one generator, one per image, or None for torch's global one.
            t: Timesteps, shape (B,), if the caller draws them itself.
            eps: Noise, shape of ``x0``, if the caller draws it itself.
            noise_level: sigma_n >= 0, standard deviation of the Gaussian noise that each image carries already, in the
                units of ``x0``, shape (B,), best on the CPU. Such an image is trained only at noise levels above its
                own, and there towards the clean image (``ambient.py``); 0 is plain training, bit for bit.
            loss_mask: Which elements count in the denoising term, True or 1 where they do, of a shape (B, ...) that
                broadcasts to that of ``x0``; the term is their mean, 0 where none counts. For pixels that an image
                lacks, filled with something: the network sees the filling and is not asked for it. The regulariser
                keeps all of them, unless its target is the noise. Default: all, bit for bit.
            **model_kwargs: Passed to the model (``class_labels``, ``encoder_hidden_states`` ...).

        Raises:
            ValueError: If ``x0`` is not floating point, or ``t``, ``eps``, ``noise_level``, ``loss_mask`` or the
                model's output do not fit its shape; if a noise level is not below the largest of the schedule, or ``t``
                not above it; or if this loss cannot use noise levels.
        """
        check_generators(generator, x0.shape[0])
        if not x0.is_floating_point():
            raise ValueError(f"x0 must be floating point in [-1, 1], got {x0.dtype}")
        for name, given in (("t", t), ("noise_level", noise_level)):
            if given is not None and given.shape != x0.shape[:1]:
                raise ValueError(f"{name} must have shape ({x0.shape[0]},), got {tuple(given.shape)}")
        if eps is not None and eps.shape != x0.shape:
            raise ValueError(f"eps must have the shape of x0, {tuple(x0.shape)}, got {tuple(eps.shape)}")
        if noise_level is not None and not self.takes_noise_level:
            raise ValueError(f"{type(self).__name__} cannot use noise_level: its optimum would no longer be clean")
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        noised = self._noise(x0, generator, t, eps, noise_level)
        noised = noised if loss_mask is None else replace(noised, mask=_weights(loss_mask, x0))
        output = call_model(model, noised.x_t, to_device(noised.t, x0.device), model_kwargs)
        return self._terms(model, noised, output, generator, model_kwargs)

    # The three steps that other losses change.

    def _noise(
        self, x0: Tensor, generator: Generators, t: Tensor | None, eps: Tensor | None, noise_level: Tensor | None
    ) -> NoisyBatch:
        """States and targets; what is not given is drawn, timesteps first."""
        first = None if noise_level is None else self.schedule.first_timesteps(noise_level)
        if t is None:
            t = self.schedule.draw_timesteps(x0.shape[0], generator, first)
        elif first is not None and bool((t < to_device(first, t.device)).any()):
            raise ValueError("t is not above the noise_level of every image: draw it from first_timesteps on")
        eps = draw_normal(x0, generator) if eps is None else eps.to(x0.dtype)
        return add_noise(self.schedule, x0, eps, t, noise_level)

    def _denoising(self, noised: NoisyBatch, output: Tensor) -> Tensor:
        """The denoising term, shape (B,)."""
        return noised.mean((noised.kept(output) - noised.target).square())

    def _terms(
        self, model: Model, noised: NoisyBatch, output: Tensor, generator: Generators, kwargs: dict[str, Any]
    ) -> LossOutput:
        """All terms, given the output for the states."""
        denoising = self._denoising(noised, output)
        nothing = torch.zeros_like(denoising)
        return LossOutput(denoising, denoising, nothing, noised.t, nothing, nothing)


def _weights(mask: Tensor, x0: Tensor) -> Tensor:
    """The mask in the precision, shape and place of the images.

    Raises:
        ValueError: If its shape does not fit.
    """
    fits = mask.ndim == x0.ndim and all(m in (1, n) for m, n in zip(mask.shape[1:], x0.shape[1:], strict=True))
    if not fits or mask.shape[0] != x0.shape[0]:
        raise ValueError(f"loss_mask must broadcast to the shape of x0, {tuple(x0.shape)}, got {tuple(mask.shape)}")
    return to_device(mask, x0.device).to(x0.dtype).expand_as(x0)
