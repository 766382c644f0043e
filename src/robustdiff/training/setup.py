"""From the configuration of a run to its parts: data options, loss, pipeline and network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from robustdiff.data.dataset import DataError, ImageDataset, load_images
from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.networks import (
    build_unet,
    check_config,
    check_plausible,
    check_size,
    check_types,
    network_for,
    size_multiple,
)
from robustdiff.diffusion.pipeline import load_pipeline
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.evaluation.class_proportions import counts_of
from robustdiff.evaluation.extractors import open_extractor
from robustdiff.evaluation.metrics import LEAST
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import PRESETS
from robustdiff.losses.named import LOSSES
from robustdiff.losses.perturbation import AdversarialPerturbation
from robustdiff.losses.strength import InverseRadius, SigmaRange
from robustdiff.training.annotations import NoiseLevels
from robustdiff.training.callbacks.evaluation import EvaluationCallback
from robustdiff.training.config import TrainConfig, parse_gate
from robustdiff.training.plan import Plan
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.options import parse_count
from robustdiff.utils.seeds import derive_seed

FALLBACK = 15.0
"""Strength of the regulariser where nothing can be trusted: m = 5 with uniform perturbations of radius 1, which took
half of the way from dirty to clean (experiments/README.md, gated, c = 0.15, m = 5)."""


def source_options(config: TrainConfig) -> dict[str, str | None]:
    """The flags that say which part of a data set, as :func:`robustdiff.data.sources.open.open_source` takes them."""
    return {
        "split": config.split,
        "config": config.dataset_config_name,
        "image_column": config.image_column,
        "label_column": config.label_column,
        "value_range": config.value_range,
    }


def build_objective(
    config: TrainConfig, schedule: NoiseSchedule, unknown: tuple[float, float] | None = None
) -> DenoisingLoss:
    """The objective that the flags describe: the preset's settings, overridden one by one.

    Args:
        config: The flags.
        schedule: The noise schedule.
        unknown: Noise levels at which ``auto`` found no image to trust: regularised there, if no flag says what else.
    """
    named = LOSSES[config.objective]
    if not named.regularised:
        return named.load()(schedule)
    settings = dict(PRESETS[config.start])
    if unknown is not None and config.preset is None and config.perturbation is None:
        settings = {**PRESETS["gated"], "strength": SigmaRange(*unknown, FALLBACK)}
    if config.perturbation is not None:
        settings["perturbation"] = config.perturbation
    attack: dict[str, Any] = {
        "steps": config.attack_steps,
        "step_size": config.attack_step_size,
        "inner": config.inner,
    }
    attack = {name: value for name, value in attack.items() if value is not None}
    if attack:
        settings["perturbation"] = AdversarialPerturbation(**attack)
    radius = {
        "exponent": config.radius_exponent,
        "scale": config.radius_scale,
        "floor": config.radius_floor,
        "random": None if config.radius_factor is None else config.radius_factor == "uniform",
        "units": config.radius_units,
    }
    changes = {name: value for name, value in radius.items() if value is not None}
    if changes:
        settings["radius"] = dataclasses.replace(settings["radius"], **changes)
    settings["strength"] = _strength(config, settings["strength"])
    box, gate = settings["radius"], settings["strength"]
    if settings["perturbation"] not in (None, "none"):
        if box.scale == box.floor == 0:
            raise UsageError("`radius_scale` 0 and `radius_floor` 0 perturb nothing: use `perturbation` none")
        levels = schedule.noise_to_signal(torch.arange(schedule.num_timesteps))
        if isinstance(gate, SigmaRange) and not bool(((levels >= gate.low) & (levels <= gate.high)).any()):
            raise UsageError(
                f"`gate` {gate.low:g}:{gate.high:g} holds no noise level sigma/alpha of the schedule, which has "
                f"{levels.min().item():.3g} to {levels.max().item():.3g}"
            )
    if config.normalise is not None:
        settings["normalise"] = config.normalise == "yes"
    if config.gradient is not None:
        settings["gradient"] = config.gradient
    return named.load()(schedule, **settings)


def _strength(config: TrainConfig, preset: float | SigmaRange | InverseRadius) -> float | SigmaRange | InverseRadius:
    """The preset's strength, overridden by the flags."""
    value = config.strength
    if value is None:
        value = preset.value if isinstance(preset, SigmaRange | InverseRadius) else preset
    if isinstance(preset, InverseRadius) or config.strength_beta is not None:
        beta = preset.beta if isinstance(preset, InverseRadius) else 1.0
        return InverseRadius(value, beta if config.strength_beta is None else config.strength_beta)
    low, high = (preset.low, preset.high) if isinstance(preset, SigmaRange) else (0.0, math.inf)
    if config.gate is not None:
        low, high = parse_gate(config.gate)
    return value if (low, high) == (0.0, math.inf) else SigmaRange(low, high, value)


def check_gate(objective: DenoisingLoss, levels: NoiseLevels) -> None:
    """Refuse a regulariser that no image meets.

    Raises:
        UsageError: If its gate lies below the noise of every image.
    """
    gate, floor = getattr(objective, "strength", None), levels.describe()["untrained_below"]
    if isinstance(gate, SigmaRange) and gate.high < floor:
        raise UsageError(
            f"`noise_levels`: every image has more noise than {gate.high:g}, where the regulariser's gate ends, and is "
            "not trained there: use `preset` plain, or widen `gate`"
        )


def build_pipeline(config: TrainConfig, data: ImageDataset) -> tuple[DiffusionPipeline, str]:
    """The pipeline to train (its ``unet`` and ``scheduler``), and the network's name for the plan.

    That of ``init_from`` has its own classes: see :func:`robustdiff.data.match_model.renumber`.

    Raises:
        UsageError: If network and images do not fit, or ``init_from`` cannot be used.
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    classes = len(data.classes) if config.class_conditional else None
    if classes == 0:
        raise UsageError(f"`class_conditional`: `data` {config.data} has no labels: {data.unlabelled}")
    if config.init_from:
        return _initial_pipeline(config, data), f"from {config.init_from}"
    if config.model_config_name_or_path:
        name = config.model_config_name_or_path
        unet = _configured_unet(name, data, classes)
    else:
        name = config.network or network_for(data.size)
        unet = build_unet(name, data.channels, data.size, classes)
    scheduler = DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps or 1000,
        beta_schedule=config.ddpm_beta_schedule or "linear",
        prediction_type=config.prediction_type or "epsilon",
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        # Stock samplers then take even steps, and start in pure noise where the schedule ends in it.
        timestep_spacing="trailing",
    )
    return DDPMPipeline(unet=unet, scheduler=scheduler), name


def build_evaluation(
    config: TrainConfig,
    plan: Plan,
    images: ImageDataset,
    folder: Path,
    steps: int,
    classes: Sequence[int],
    device: torch.device,
) -> EvaluationCallback:
    """The evaluation that the flags describe, with its extractor and reference.

    Args:
        config: With ``evaluate_every``.
        plan: For the images per step.
        images: Training images, whose size and channels the reference is brought to.
        folder: Of the run.
        steps: Network calls per image.
        classes: Numbers of those that a conditional network is trained on; none: it is not conditional.
        device: Where features are computed.

    Raises:
        UsageError: If the extractor or the reference cannot be used.
    """
    assert config.evaluate_every is not None
    assert config.evaluate_reference is not None
    height, width = images.size
    extractor = open_extractor(config.evaluate_extractor, device)
    try:
        reference = load_images(
            config.evaluate_reference,
            resolution=height if height == width else None,
            channels=images.channels,
            split=config.evaluate_split,
        )
    except DataError as error:
        raise UsageError(f"`evaluate_reference` {error}") from None
    if reference.size != images.size:
        raise UsageError(
            f"`evaluate_reference`: its images are {reference.size[1]} x {reference.size[0]}, those trained on "
            f"{width} x {height}: bring them to one size"
        )
    if len(reference) < LEAST:
        raise UsageError(f"`evaluate_reference` has {len(reference)} images; at least {LEAST} are needed: give more")
    return EvaluationCallback(
        folder,
        reference,
        extractor,
        every=max(1, round(parse_count(config.evaluate_every, "evaluate_every") / plan.batch)),
        n=config.evaluate_n,
        metric=config.evaluate_metric,
        seed=config.seed,
        steps=steps,
        batch_size=config.eval_batch_size,
        classes=_drawn_as(reference, images, classes),
    )


def _drawn_as(reference: ImageDataset, images: ImageDataset, classes: Sequence[int]) -> dict[int, float]:
    """How often each class is drawn: as the reference has them; if its labels are others, as the training images."""
    for shown in (reference, images):
        counts = counts_of(shown, images.classes, len(images.classes)) or {}
        if trained := {number: float(count) for number, count in counts.items() if number in classes and count}:
            return trained
    return dict.fromkeys(classes, 1.0)


def _initial_pipeline(config: TrainConfig, data: ImageDataset) -> DiffusionPipeline:
    source = str(config.init_from)
    pipeline = load_pipeline(source)
    unet = pipeline.unet
    channels, classes = Denoiser.of(unet).channels, Denoiser.of(unet).num_classes
    if channels != data.channels:
        raise UsageError(
            f"`init_from` {source} has {channels} channels, `data` {data.channels}: add `channels` {channels}"
        )
    if config.class_conditional and classes is None:
        raise UsageError(f"`class_conditional`: {source} is not conditional; leave one of `init_from` and it out")
    check_size(data.size, size_multiple(unet), source)
    side = data.size[0] if data.size[0] == data.size[1] else data.size
    unet.register_to_config(sample_size=side)
    return pipeline


def _configured_unet(source: str, data: ImageDataset, classes: int | None) -> UNet2DModel:
    channels, size = data.channels, data.size
    flag = "`model_config_name_or_path`"
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    try:
        values = atomic_io.read_json(path)
        values.update(sample_size=size[0] if size[0] == size[1] else size, in_channels=channels, out_channels=channels)
        if classes is not None:
            values.setdefault("num_class_embeds", classes)
        check_plausible(values)
        check_types(UNet2DModel, values)
        multiple = 2 ** (len(values["block_out_channels"]) - 1)
        check_size(size, multiple, source)
        check_config(values)
        unet = UNet2DModel.from_config(values)
    except FileNotFoundError:
        raise UsageError(f"{flag} {source}: no such file, nor a folder with config.json") from None
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # diffusers and torch check little: what does not fit raises many types
        reason = atomic_io.one_line(error)
        raise UsageError(f"{flag} {source}: not a UNet2DModel configuration ({reason})") from None
    check_size(size, size_multiple(unet), source)
    classes = Denoiser.of(unet).num_classes
    if classes is not None and (data.labels is None or len(data.classes) > classes):
        have = "none" if data.labels is None else str(len(data.classes))
        raise UsageError(
            f"{flag} {source} is conditional on {classes} classes, `data` has {have}: put the images of each class in "
            "a folder, or name a `label_column`"
        )
    return unet
