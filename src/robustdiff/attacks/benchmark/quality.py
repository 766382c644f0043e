"""Quality after an attack: what ``robustdiff evaluate`` says of the same images, undisturbed and attacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdiff.attacks.batch_goals import FeatureDistance
from robustdiff.attacks.benchmark.grid import is_joint
from robustdiff.attacks.config import OF_REFERENCE, AttackConfig
from robustdiff.evaluation.config import EvaluateConfig
from robustdiff.evaluation.extractors import Extractor, differentiable, open_extractor
from robustdiff.evaluation.features import Features, Images, default_cache, extract
from robustdiff.evaluation.inputs import TrainingUnread, left_out, load_real, trained_on
from robustdiff.evaluation.metrics import LEAST, compute_metrics
from robustdiff.evaluation.run import account, bar, describe
from robustdiff.utils.errors import UsageError
from robustdiff.utils.seeds import derive_seed

REAL = 2000
"""Images of the run's own data, at most, that quality is measured against where no reference is named: enough for the
few images of an attack, and quick."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images, and what turns them into features.

    Attributes:
        images: uint8 (m, C, H, W).
        about: ``reference`` of the protocol.
        extractors: What to judge by.
        remarks: What a reader must know.
    """

    images: Images
    about: Mapping[str, Any]
    extractors: Sequence[Extractor]
    remarks: Sequence[str]


def open_reference(config: AttackConfig, shape: Sequence[int], device: torch.device) -> Reference | str:
    """What ``reference`` names, or else the images that the run was trained on; or why there is nothing.

    Args:
        config: The command's flags.
        shape: Of the generated images, (C, H, W).
        device: Where extractors compute.

    Raises:
        UsageError: If something that is named cannot be used.
    """
    channels, size = shape[0], (shape[1], shape[2])
    square = size[0] if size[0] == size[1] else None
    named = config.reference is not None or bool(config.extractor)
    why = ""
    named = named or is_joint(config)
    if config.reference == "none":
        return "quality after the attack was not measured, as `reference` none says"
    if channels not in (1, 3):
        why = f"images of {channels} channels cannot be judged: leave `reference` and `extractor` out"
    elif config.n < LEAST and not is_joint(config):
        why = f"that takes at least {LEAST} images: raise `n`"
    elif config.reference is not None:
        options = {name: getattr(config, name) for name in OF_REFERENCE}
        options["max_bad_fraction"] = config.max_bad_fraction
        asked = EvaluateConfig(config.run, reference=config.reference, **options)
        real = load_real(asked, "reference", square, channels, size)
        about, remarks = account(real, config.split), left_out("`reference`", real)
        return Reference(real.images, about, _open(config, device), remarks)
    else:
        try:
            data = trained_on(config.run, square, channels, size)
        except TrainingUnread as error:
            why, data = f"the training images cannot be read ({error}): name clean images with `reference`", None
        if data is not None and len(data) < LEAST:
            why = f"the run was trained on {len(data)} images: name others with `reference`"
        elif data is not None:
            generator = torch.Generator().manual_seed(derive_seed("reference", config.seed))
            chosen = torch.randperm(len(data), generator=generator)[:REAL].sort().values
            images = torch.cat([data.images[i : i + 1] for i in chosen.tolist()])
            about = {**account(data, None), "used": len(images)}
            note = "quality after the attack is measured against the images that the run was trained on, without the "
            note += "dirt that was added to them: name held-out clean ones with `reference`"
            return Reference(images, about, _open(config, device), [note])
        why = why or "the run does not say what it was trained on: name clean images with `reference`"
    if named:
        what = f"`objective` {config.objective}" if is_joint(config) else "quality after the attack"
        raise UsageError(f"{what}: {why}")
    return f"quality after the attack was not measured: {why}"


def _open(config: AttackConfig, device: torch.device) -> list[Extractor]:
    return [open_extractor(spec, device) for spec in config.extractor or ("pixels",)]


def measure(config: AttackConfig, reference: Reference, tell: Callable[[], object]) -> FeatureDistance:
    """What the objectives ``batch-mean`` and ``batch-kernel`` make large: by the first extractor.

    Args:
        config: The command's flags.
        reference: Real images.
        tell: Called now and then; may raise, to stop.

    Raises:
        UsageError: If that extractor is not differentiable.
    """
    extractor = reference.extractors[0]
    features = differentiable(extractor, reference.images[:4])
    rows = features_of(config, extractor, reference.images, tell).values.to(extractor.device)
    return FeatureDistance(features, rows, "mean" if config.objective == "batch-mean" else "kernel")


@dataclass(frozen=True)
class AfterAttack:
    """What :func:`quality` found, ready for the result file.

    Attributes:
        values: FD, KID and precision of both sets of images, by name.
        protocol: What they rest on.
        warnings: One line each.
    """

    values: Mapping[str, Mapping[str, Any]]
    protocol: Mapping[str, Any]
    warnings: Sequence[str]


def quality(
    config: AttackConfig, reference: Reference, pictures: Mapping[str, Tensor], tell: Callable[[], object]
) -> AfterAttack:
    """Frechet and kernel distance and precision of images before and after an attack, as ``evaluate`` computes them.

    Args:
        config: The command's flags.
        reference: Real images.
        pictures: ``undisturbed`` and ``attacked``, uint8 (n, C, H, W).
        tell: Called now and then; may raise, to stop.
    """
    values: dict[str, dict[str, Any]] = {}
    floors, described, warnings = {}, [], list(reference.remarks)
    n, m = len(pictures["attacked"]), len(reference.images)
    for extractor in reference.extractors:
        real = features_of(config, extractor, reference.images, tell)
        floors[extractor.name] = ""
        described.append(describe(extractor, real))
        for which, images in pictures.items():
            tell()
            found = compute_metrics(features_of(config, extractor, images, tell), real, seed=config.seed, bars=bar)
            floors[extractor.name] = found.floor
            warnings += found.warnings
            for value in found.values:
                if value.name == extractor.metric or value.name.startswith("KID"):
                    name = value.name
                elif value.name == "precision":
                    name = f"precision-{extractor.name}"
                else:
                    continue
                entry = value.to_json()
                values[f"{name}, {which}"] = {**entry, "about": {**entry["about"], "of": which, "n": n, "n_real": m}}
    protocol = {
        "n_generated": n,
        "n_real": m,
        "reference": dict(reference.about),
        "extractors": described,
        "floors": floors,
    }
    return AfterAttack(values, protocol, list(dict.fromkeys(warnings)))


def features_of(config: AttackConfig, extractor: Extractor, images: Images, tell: Callable[[], object]) -> Features:
    """Features of a set of images, from the cache if they are there.

    Args:
        config: The command's flags.
        extractor: What makes them.
        images: uint8 (n, C, H, W).
        tell: Called after each batch; may raise, to stop.
    """
    cache = None
    if config.cache != "none":
        cache = Path(config.cache) if config.cache else default_cache()
    with bar(extractor.name, len(images), "image") as show:

        def progress(done: int) -> None:
            show(done)
            tell()

        return extract(extractor, images, batch_size=config.batch_size, cache=cache, progress=progress)
