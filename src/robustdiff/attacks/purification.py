"""Purification: drown what was done to an image in noise, and denoise; and attacks through the whole chain.

Diffusion models as a defence are easily overrated: an attacker differentiates through the chain and averages over its
noise. :class:`PurifiedLoss` is that attacker's objective; :func:`accuracy` is what is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.pipeline import trajectory_of
from robustdiff.diffusion.samplers import trailing
from robustdiff.utils.random import Generators, draw_normal
from robustdiff.utils.seeds import derive_seed

Classifier = Callable[[Tensor], Tensor]
"""Images in [-1, 1], shape (B, C, H, W), to logits, shape (B, classes)."""


@dataclass(frozen=True, eq=False)
class _Fixed:
    """A network in evaluation mode whose weights take no gradients, now and when a backward pass computes it again."""

    module: nn.Module

    def __call__(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:  # noqa: ANN401 - passed through
        """The network's answer."""
        was_training = self.module.training
        if was_training:
            self.module.eval()
        try:
            weights = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
            return functional_call(self.module, weights, (x_t, t), kwargs)
        finally:
            if was_training:
                self.module.train()


def purify(
    image: Tensor,
    pipeline: Any,  # noqa: ANN401 - pipelines share no typed base with a network
    strength: float = 0.1,
    *,
    steps: int = 10,
    sampler: str = "ddim",
    generator: Generators = None,
    class_labels: Tensor | None = None,
) -> Tensor:
    """Noise images to ``t* = strength T`` and denoise them with the pipeline.

    Differentiable in ``image``: one state per step is kept and the network is computed again in the backward pass. No
    weight receives a gradient.

    Args:
        image: In [-1, 1], shape (B, C, H, W), of the pipeline's size.
        pipeline: A pipeline with a DDPM-type ``scheduler``, as :func:`robustdiff.load_pipeline` gives it.
        strength: t* as a share of the noise levels, above 0, at most 1: more removes more, of the image too.
        steps: Network calls, >= 1; at most t* are made.
        sampler: ``"ddim"``, whose only randomness is the noise added at the start, or ``"ddpm"``.
        generator: One, or one per image.
        class_labels: Shape (B,), for class-conditional networks.

    Returns:
        In [-1, 1], shape and dtype of ``image``.

    Raises:
        ValueError: If the strength, the steps, the size or the labels do not fit.
        UsageError: If the sampler does not.

    Source: Nie et al. (2022), "Diffusion models for adversarial purification", Eq. 4 and 5, in discrete steps.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"purify needs 0 < strength <= 1, got {strength}")
    if steps < 1:
        raise ValueError(f"purify needs steps >= 1, got {steps}")
    denoiser = Denoiser.of(pipeline)
    size = (denoiser.channels, *denoiser.size)
    if image.ndim != 4 or tuple(image.shape[1:]) != size:
        raise ValueError(
            f"images of shape {tuple(image.shape)} do not fit a network for (B, {', '.join(map(str, size))})"
        )
    kwargs = denoiser.class_kwargs(class_labels)
    levels = max(1, round(strength * pipeline.scheduler.config.num_train_timesteps))
    trajectory = trajectory_of(pipeline, sampler, timesteps=trailing(levels, min(steps, levels)))
    trajectory = dataclasses.replace(trajectory, model=_Fixed(denoiser.model), kwargs=kwargs)
    x0 = image.to(device=denoiser.model.device, dtype=denoiser.model.dtype)
    t = torch.full((len(x0),), levels - 1, device=x0.device)
    noisy = trajectory.schedule.add_noise(x0, draw_normal(x0, generator), t)
    noise = trajectory.draw_noise(x0, generator)
    checkpointed = torch.is_grad_enabled() and image.requires_grad
    return trajectory.run(noisy, noise=noise, checkpointed=checkpointed).to(device=image.device, dtype=image.dtype)


@dataclass(frozen=True, eq=False)
class PurifiedLoss:
    """The classifier's loss after purification, averaged over the purifier's noise: an objective of attacks.

    Args:
        classifier: See :data:`Classifier`; its weights should take no gradients (``modules``).
        pipeline: As for :func:`purify`.
        images: In [-1, 1], shape (B, C, H, W).
        labels: Shape (B,).
        terms: Draws of the noise that are averaged (expectation over transformations), >= 1.
        fresh: New draws at every evaluation, or the same ones throughout.
        seed: Rules the draws.
        settings: ``strength``, ``steps``, ``sampler`` of :func:`purify`.

    A perturbation has shape (B, 1, C, H, W), in units of the image range [-1, 1]: the usual 8/255 of [0, 1] is 16/255.

    Source: Athalye et al. (2018), expectation over transformations; cross-entropy as in Madry et al. (2018).
    """

    classifier: Classifier
    pipeline: Any
    images: Tensor
    labels: Tensor
    terms: int = 20
    fresh: bool = False
    seed: int = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    joint: ClassVar[bool] = False
    _calls: list[int] = dataclasses.field(default_factory=lambda: [0], init=False, repr=False)

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The classifier, if it is a module, and the network."""
        return [m for m in (self.classifier, Denoiser.of(self.pipeline).model) if isinstance(m, nn.Module)]

    @property
    def like(self) -> Tensor:
        """A tensor of the shape of omega."""
        return torch.zeros_like(self.images).unsqueeze(1)

    def __call__(self, omega: Tensor, term: int) -> Tensor:
        """Cross-entropy of every image, shape (B,)."""
        draw = term
        if self.fresh:
            self._calls[0] += 1
            draw = self.terms + self._calls[0]
        logits = self._logits(omega, f"{self.seed} attack", draw)
        return nn.functional.cross_entropy(logits, self.labels, reduction="none")

    def _logits(self, omega: Tensor | None, what: str, draw: int) -> Tensor:
        image = self.images if omega is None else (self.images + omega[:, 0]).clamp(-1, 1)
        seeds = [derive_seed("purification", what, draw, i) for i in range(len(image))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.classifier(purify(image, self.pipeline, generator=generators, **self.settings))


@torch.no_grad()
def accuracy(chain: PurifiedLoss, omega: Tensor | None = None, draws: int = 20) -> tuple[float, float]:
    """Share of images classified rightly after purification, over noise that no attack has seen.

    Args:
        chain: Classifier, purifier, images, labels.
        omega: A perturbation, (B, 1, C, H, W); None: none.
        draws: Repeated verdicts, >= 1.

    Returns:
        The mean over images and draws; the share of images that are right in every draw.
    """
    right = [chain._logits(omega, f"{chain.seed} verdict", i).argmax(1) == chain.labels for i in range(draws)]
    table = torch.stack(right)
    return float(table.double().mean()), float(table.all(0).double().mean())
