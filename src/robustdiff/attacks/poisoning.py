"""Adversarial dirt: training images pushed, within a bound, to where a trained denoiser is worst.

Error-maximising noise: what a model of the same data fails at is meant to spoil the training of another. How much it
does is another question, and measured: docs/lab-notes.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor, nn

from robustdiff.attacks.config import CorruptConfig
from robustdiff.attacks.constraints import LpBall
from robustdiff.attacks.goals import evaluate
from robustdiff.attacks.optimizers import PGD
from robustdiff.data.corruption import is_hit
from robustdiff.data.dataset import ImageDataset
from robustdiff.data.match_model import labels_for, load_fitting
from robustdiff.diffusion.model import Denoiser, Model, call_model
from robustdiff.diffusion.pipeline import (
    load_pipeline,
    weights_sha256,
    without_accelerator,
)
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import from_uint8, to_uint8
from robustdiff.utils.random import draw_normal, draw_uniform, place_generators
from robustdiff.utils.resources import check_launcher

OBJECTIVE = "denoising loss"
VERDICTS = 32
"""Draws of timestep and noise behind the losses in the manifest, none of which the attack has seen."""


@dataclass(frozen=True, eq=False)
class DenoisingLossGoal:
    """The loss that training would have at an image, over random timesteps and noise: an objective of attacks.

    Every evaluation draws anew, one timestep from each of ``terms`` equal parts of the noise levels, so keep an
    attack's last iterate (``PGD(keep="last")``): the best one would be the luckiest.

    Args:
        model: ``callable(x_t, t, **kwargs)``.
        schedule: Its noise schedule.
        images: In [-1, 1], shape (B, C, H, W).
        generators: One per image: then no image depends on its neighbours.
        terms: Draws that are averaged per evaluation, >= 1.
        kwargs: Passed to every call of the model.

    A perturbation has shape (B, 1, C, H, W), in units of the image range [-1, 1], within which images stay.

    Source: Liang et al. (2023), "Adversarial example does good" (AdvDM), Eq. 7; the principle: Fowl et al. (2021),
    "Adversarial examples make strong poisons".
    """

    model: Model
    schedule: NoiseSchedule
    images: Tensor
    generators: Sequence[torch.Generator]
    terms: int = 4
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    joint: ClassVar[bool] = False

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The network, if it is a module."""
        return [self.model] if isinstance(self.model, nn.Module) else []

    @property
    def like(self) -> Tensor:
        """A tensor of the shape of omega."""
        return torch.zeros_like(self.images).unsqueeze(1)

    def __call__(self, omega: Tensor, term: int) -> Tensor:
        """Mean squared error of the prediction, shape (B,), at new draws."""
        x0 = (self.images + omega[:, 0]).clamp(-1, 1)
        levels = self.schedule.num_timesteps
        u = draw_uniform(self.images.flatten(1)[:, 0], self.generators)
        t = ((term + u) / self.terms * levels).long().clamp(max=levels - 1)
        eps = draw_normal(self.images, self.generators)
        output = call_model(self.model, self.schedule.add_noise(x0, eps, t), t, dict(self.kwargs))
        return (output - self.schedule.target(x0, eps, t)).square().flatten(1).mean(1)


@dataclass(frozen=True, eq=False)
class Poison:
    """Adversarial dirt by a pipeline, reproducible by seed and place, whatever the batch size.

    Args:
        pipeline: Anything with a ``unet`` and a DDPM-type ``scheduler``, on the device where it is to run.
        model: What the manifest calls it.
        radius: Largest change of a pixel, in units of [-1, 1]; at least 1/127.5, one 8-bit step.
        fraction: Probability in [0, 1] that an image is hit, for each independently.
        steps: Of projected sign-gradient ascent, >= 1, each of 2.5 / ``steps`` radii.
        draws: Timesteps and noises per gradient, >= 1.
        batch_size: Images per forward pass, >= 1.
        labels: Class of every image of the set, shape (N,), for class-conditional pipelines.
    """

    pipeline: Any
    model: str
    radius: float
    fraction: float = 1.0
    steps: int = 40
    draws: int = 4
    batch_size: int = 64
    labels: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        """JSON-ready account for the manifest."""
        return {
            "model": self.model,
            "weights_sha256": weights_sha256(self.pipeline),
            "objective": OBJECTIVE,
            "norm": "linf",
            "radius": self.radius,
            "levels": self.levels,
            "steps": self.steps,
            "draws": self.draws,
            "fraction": self.fraction,
            "verdicts": VERDICTS,
        }

    @property
    def levels(self) -> int:
        """Whole 8-bit steps within the radius."""
        return math.floor(127.5 * self.radius + 1e-6)

    def hits(self, seed: int, index: int, position: int) -> bool:
        """Whether image ``index`` is hit, as for the kinds of :mod:`robustdiff.data.corruption`."""
        return is_hit(self.fraction, seed, position, "poison", index)

    def __call__(self, images: Tensor, places: Sequence[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Push images.

        The result of the ascent is rounded to the nearest 8-bit value and then held within :attr:`levels` of the
        original, so that the bound holds in files.

        Args:
            images: uint8, shape (B, C, H, W).
            places: Index of each in its set.
            seed: Of the experiment.

        Returns:
            The pushed images, uint8; the model's denoising loss at each before and after, (B,).

        Raises:
            UsageError: If the model's loss is not finite.
        """
        network = Denoiser.of(self.pipeline).model
        x0 = from_uint8(images).to(device=network.device, dtype=network.dtype)
        before = self.judge(images, places, seed)
        if not bool(torch.isfinite(before).all()):
            raise UsageError(f"`model` {self.model}: its loss is not finite at some images: name another model")
        loss = self.loss(x0, places, seed, "poison", self.draws)
        generators = place_generators("poison start", seed, places)
        found = PGD(self.steps, keep="last")(loss, LpBall("linf", self.radius), loss.like, generators)
        pushed = to_uint8((x0 + found.omega[:, 0]).cpu().float()).short()
        whole = images.short()
        pushed = pushed.clamp(whole - self.levels, whole + self.levels).to(torch.uint8)
        return pushed, before, self.judge(pushed, places, seed)

    def judge(self, images: Tensor, places: Sequence[int], seed: int) -> Tensor:
        """The model's denoising loss at uint8 images (B, C, H, W), over :data:`VERDICTS` draws, shape (B,)."""
        network = Denoiser.of(self.pipeline).model
        x0 = from_uint8(images).to(device=network.device, dtype=network.dtype)
        loss = self.loss(x0, places, seed, "poison verdict", VERDICTS)
        was_training = network.training
        network.eval()
        value = evaluate(loss, loss.like)
        network.train(was_training)
        return value.cpu()

    def loss(self, x0: Tensor, places: Sequence[int], seed: int, what: str, terms: int) -> DenoisingLossGoal:
        """The objective at some images of the set."""
        schedule = NoiseSchedule.from_scheduler(self.pipeline.scheduler)
        kwargs = {} if self.labels is None else {"class_labels": self.labels[list(places)].to(x0.device)}
        network, generators = Denoiser.of(self.pipeline).model, place_generators(what, seed, places)
        return DenoisingLossGoal(network, schedule, x0, generators, terms, kwargs)


def load_poison(config: CorruptConfig, /, **settings: Any) -> tuple[ImageDataset, Poison]:  # noqa: ANN401 - passed through
    """The images of ``robustdiff corrupt`` with ``poison``, as its model takes them, and the poison.

    Args:
        config: With ``poison``.
        settings: Of :func:`robustdiff.data.dataset.load_images`.

    Raises:
        UsageError: If the model cannot be used, or does not fit the images.
    """
    check_launcher()
    model = str(config.poison)
    pipeline: Any = load_pipeline(model)
    images = load_fitting(config.source, pipeline, model, **settings)
    labels = labels_for(images, pipeline, model)
    pipeline.unet.to(PartialState(cpu=without_accelerator()).device)
    given = {"fraction": config.poison_fraction, "steps": config.poison_steps, "draws": config.poison_draws}
    given["batch_size"] = config.batch_size
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return images, Poison(pipeline, model, config.radius(), labels=labels, **chosen)
