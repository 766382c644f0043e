"""The output folder of a run: whether it is one, may be taken, and can be gone on with."""

from __future__ import annotations

import dataclasses
import json
import operator
import warnings
from pathlib import Path
from typing import Any

from robustdiff.data.corruption import check_corruptions
from robustdiff.data.dataset import ImageDataset
from robustdiff.training.annotations import NoiseLevels
from robustdiff.training.checkpoint import find_checkpoint
from robustdiff.training.config import TrainConfig
from robustdiff.training.plan import Plan
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds a run of ours: only such a folder is ever deleted by ``overwrite``."""
    try:
        saved = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(saved, dict) and {"settings", "plan", "versions"} <= saved.keys()


def claim_output(config: TrainConfig, folder: Path) -> Path | None:
    """Check that ``folder`` may be written, without writing.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        UsageError: If it cannot be written, holds a run or other files, or has nothing to resume.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`output_dir` {folder} is a file: name a folder")
    if not config.dry_run and (there := atomic_io.read_only(folder)):
        raise UsageError(f"`output_dir` {folder}: {there} is read-only: name another folder")
    if config.resuming:
        damaged: list[tuple[Path, str]] = []
        found = find_checkpoint(folder / "checkpoints", config.resume_from_checkpoint or "latest", damaged)
        for path, reason in damaged:
            warnings.warn(f"{path} is damaged ({reason}): using {found.name}", RobustdiffWarning, stacklevel=2)
        return found
    here, data = folder.resolve(), Path(config.data).resolve()
    if data.exists() and (here == data or data in here.parents or here in data.parents):
        raise UsageError(f"`output_dir` {folder} and `data` {config.data} lie inside one another: name another folder")
    sources = {"`init_from`": config.init_from, "`model_config_name_or_path`": config.model_config_name_or_path}
    for flag, value in sources.items():
        place = Path(value).resolve() if value else None
        if place is not None and place.exists() and (here == place or here in place.parents):
            raise UsageError(f"{flag} {value} lies in `output_dir` {folder}: name another output folder")
    if not folder.exists() or all(path.name == ".config.json.tmp" for path in folder.iterdir()):  # killed at once
        return None
    if not is_run(folder):
        raise UsageError(f"`output_dir` {folder} is not empty and holds no run of robustdiff: name another folder")
    if not config.overwrite:
        raise UsageError(f"`output_dir` {folder} holds a run already: add `resume` to go on, or `overwrite`")
    return None


# Flags that may differ between the parts of a resumed run: they do not change what is learned.
_FREE = {
    *("resume", "resume_from_checkpoint", "overwrite", "dry_run", "output_dir", "checkpointing_steps"),
    *("checkpoints_total_limit", "logging_steps", "preview_images", "eval_batch_size", "ddpm_num_inference_steps"),
    *("evaluate_every", "evaluate_reference", "evaluate_split", "evaluate_extractor", "evaluate_n", "evaluate_metric"),
    *("logger", "compile", "max_memory_gib", "dataloader_num_workers", "on_nonfinite"),
    # The pixels, labels and noise levels themselves are compared.
    *("noise_levels", "data", "split", "dataset_config_name", "image_column", "label_column", "max_bad_fraction"),
    "value_range",
    *("train_batch_size", "gradient_accumulation_steps"),  # only their product with the processes counts: plan.batch
    *("images", "num_epochs"),  # a run may be made longer: plan.steps
}
# What flags come to, in the plan: said otherwise, or left to a default that is the same, they do not differ.
_COMES_TO = {
    "learning_rate": ("learning_rate",),
    "warmup_steps": ("lr_warmup_steps",),
    "network": ("network",),
    "objective": (
        *("preset", "objective", "perturbation", "strength", "gate", "radius_exponent", "radius_scale", "radius_floor"),
        *("radius_factor", "radius_units", "strength_beta", "normalise"),
        *("attack_steps", "attack_step_size", "inner", "gradient"),
    ),
}
_SHAPE = ("resolution", "channels")  # come to the pixels
_USUAL: dict[str, Any] = {
    **{"prediction_type": "epsilon", "ddpm_num_steps": 1000, "ddpm_beta_schedule": "linear"},  # of a new network
    **{"clean_subset": False, "auto": False, "auto_without": []},  # of runs of before there were the flags
}


def check_resumable(
    config: TrainConfig,
    data: ImageDataset,
    levels: NoiseLevels | None,
    trust: str | None,
    plan: Plan,
    folder: Path,
    conditional: bool,
) -> int:
    """Refuse to go on with other settings, other data or other noise levels than the run was started with.

    ``trust`` is the digest of what ``auto`` found.

    Returns:
        How many images the run was to see, which may be fewer than now.

    Raises:
        UsageError: Naming the flags that differ.
    """
    try:
        saved, account = atomic_io.read_json(folder / "config.json"), atomic_io.read_json(folder / "data.json")
        earlier, before, known = dict(saved["settings"]), dict(saved["plan"]), account["data"]
        length, batch = operator.index(before["images"]), operator.index(before["batch"])
        meant = {name: _value(name, value) for name, value in earlier.items()}
        pixels, labels = known["sha256"], known.get("labels_sha256")
        told = account["noise_levels"]["sha256"] if account.get("noise_levels") else None
        trusted = account["auto"]["sha256"] if account.get("auto") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = atomic_io.one_line(error)
        raise UsageError(f"`resume`: {folder} has no readable config.json and data.json ({reason})") from None
    spared = {flag for entry, flags in _COMES_TO.items() if before.get(entry) == getattr(plan, entry) for flag in flags}
    spared |= {*_FREE, *(_SHAPE if pixels == data.sha256 else ())}
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if not config.auto:  # the default has changed its name, not its meaning
        meant["preset"], now["preset"] = meant.get("preset") or "gated", config.start
    differing = sorted(n for n in now if n not in spared and _value(n, now[n]) != meant.get(n, _USUAL.get(n)))
    if differing:
        flags = ", ".join(f"`{n}` (was {earlier.get(n)!r:.80}, now {now[n]!r})" for n in differing)
        raise UsageError(f"`resume`: these settings differ from those of {folder}: {flags}")
    if _loss(before.get("objective")) != _loss(plan.objective):
        raise UsageError(
            f"`resume`: the same settings meant {before.get('objective')} when {folder} was started and mean "
            f"{plan.objective} now: name the former (`preset` paper was what paper-noise is), or start anew"
        )
    if batch != plan.batch:
        raise UsageError(
            f"`resume`: {batch} images per step before, {plan.batch} now: keep `train_batch_size` x "
            "`gradient_accumulation_steps` x processes the same"
        )
    if length > plan.images:
        flag = "images" if config.num_epochs is None else "num_epochs"
        raise UsageError(
            f"`resume`: {folder} is a run of {length:,} images, `{flag}` {getattr(config, flag)} are {plan.images:,}: "
            "give as many as before, or more to train longer"
        )
    if pixels != data.sha256:
        raise UsageError(f"`resume`: `data` {config.data} holds other images than those {folder} was trained on")
    if conditional and labels != data.describe()["labels_sha256"]:
        raise UsageError(f"`resume`: `data` {config.data} holds other labels than those {folder} was trained on")
    if told != (None if levels is None else levels.sha256):
        raise UsageError(f"`resume`: `noise_levels` are others than those {folder} was trained with: give the same")
    if trusted != trust:
        raise UsageError(f"`resume`: {folder / 'auto.json'} is not what the run began with: put it back, or start anew")
    return length


def _loss(description: object) -> str:
    """What a plan says of the loss; what runs of before there was a choice leave out is left out."""
    return str(description).replace(", units='noise'", "").replace(", normalise=False", "")


def _value(name: str, value: Any) -> Any:  # noqa: ANN401 - of any setting
    """What a setting means, however it is written."""
    if value is None:
        return _USUAL.get(name)
    if name == "corrupt":
        return [str(corruption) for corruption in check_corruptions(value)]
    if name in ("init_from", "model_config_name_or_path") and Path(value).exists():
        return str(Path(value).resolve())
    return value
