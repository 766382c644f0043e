"""From flags to objects: objective, network, scheduler, and the plan a run follows; nothing is written here.

A little over 400 lines: every flag that decides what a run is, is resolved in this one place.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from robustdiff import durable
from robustdiff.baselines import InputPerturbationObjective, InvarianceObjective, PseudoHuberObjective
from robustdiff.checkpoint import find_checkpoint
from robustdiff.config import RobustdiffWarning, TrainConfig, UsageError, parse_count, parse_gate
from robustdiff.corruption import derive_seed
from robustdiff.images import ImageSet
from robustdiff.networks import (
    NETWORKS,
    build_unet,
    check_config,
    check_plausible,
    check_size,
    check_types,
    network_for,
    size_multiple,
)
from robustdiff.objective import PRESETS, Gate, PlainObjective, RobustObjective
from robustdiff.perturbation import AdversarialPerturbation
from robustdiff.process import NoiseProcess
from robustdiff.sampling import load_pipeline
from robustdiff.told import NoiseLevels

# -- from flags to objects ---------------------------------------------------------------------------

FALLBACK = 15.0
"""Strength of the regulariser where nothing can be trusted: m = 5 with uniform perturbations of radius 1, which took
half of the way from dirty to clean (experiments/README.md, gated, c = 0.15, m = 5)."""


def source_options(config: TrainConfig) -> dict[str, str | None]:
    """The flags that say which part of a data set, as :func:`robustdiff.sources.open_source` takes them."""
    return {
        "split": config.split,
        "config": config.dataset_config_name,
        "image_column": config.image_column,
        "label_column": config.label_column,
    }


def build_objective(
    config: TrainConfig, process: NoiseProcess, unknown: tuple[float, float] | None = None
) -> PlainObjective:
    """The objective that the flags describe: the preset's settings, overridden one by one.

    Args:
        config: The flags.
        process: The noise process.
        unknown: Noise levels at which ``--auto`` found no image to trust: regularised there, if no flag says what else.
    """
    if config.objective == "input-perturbation":
        return InputPerturbationObjective(process)
    if config.objective == "pseudo-huber":
        return PseudoHuberObjective(process)
    settings = dict(PRESETS[config.start])
    if unknown is not None and config.preset is None and config.perturbation is None:
        settings = {**PRESETS["gated"], "strength": Gate(*unknown, FALLBACK)}
    if config.perturbation is not None:
        settings["perturbation"] = config.perturbation
    attack = {"steps": config.attack_steps, "step_size": config.attack_step_size, "inner": config.inner}
    attack = {name: value for name, value in attack.items() if value is not None}
    if attack:
        settings["perturbation"] = AdversarialPerturbation(**attack)
    radius = {
        "exponent": config.radius_exponent,
        "scale": config.radius_scale,
        "floor": config.radius_floor,
        "random": None if config.radius_factor is None else config.radius_factor == "uniform",
    }
    changes = {name: value for name, value in radius.items() if value is not None}
    if changes:
        settings["radius"] = dataclasses.replace(settings["radius"], **changes)
    strength = settings["strength"]
    value = strength.value if isinstance(strength, Gate) else strength
    value = value if config.strength is None else config.strength
    low, high = (strength.low, strength.high) if isinstance(strength, Gate) else (0.0, math.inf)
    if config.gate is not None:
        low, high = parse_gate(config.gate)
    settings["strength"] = value if (low, high) == (0.0, math.inf) else Gate(low, high, value)
    if config.gradient is not None:
        settings["gradient"] = config.gradient
    return (InvarianceObjective if config.objective == "invariance" else RobustObjective)(process, **settings)


def check_gate(objective: PlainObjective, levels: NoiseLevels) -> None:
    """Refuse a regulariser that no image meets.

    Raises:
        UsageError: If its gate lies below the noise of every image.
    """
    gate, floor = getattr(objective, "strength", None), levels.describe()["untrained_below"]
    if isinstance(gate, Gate) and gate.high < floor:
        raise UsageError(
            f"--noise-levels: every image has more noise than {gate.high:g}, where the regulariser's gate ends, and is "
            "not trained there: use --preset plain, or widen --gate"
        )


def build_pipeline(config: TrainConfig, data: ImageSet) -> tuple[DiffusionPipeline, str]:
    """The pipeline to train (its ``unet`` and ``scheduler``), and the network's name for the plan.

    Raises:
        UsageError: If network and images do not fit, or ``--init-from`` cannot be used.
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    classes = len(data.classes) if config.class_conditional else None
    if classes == 0:
        raise UsageError(
            f"--class-conditional: DATA {config.data} has no labels: put the images of each class in a folder, or name "
            "a --label-column"
        )
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


def _initial_pipeline(config: TrainConfig, data: ImageSet) -> DiffusionPipeline:
    source = str(config.init_from)
    pipeline = load_pipeline(source)
    unet = pipeline.unet
    channels, classes = unet.config["in_channels"], unet.config["num_class_embeds"]
    if channels != data.channels:
        raise UsageError(
            f"--init-from {source} has {channels} channels, DATA {data.channels}: add --channels {channels}"
        )
    if config.class_conditional and classes is None:
        raise UsageError(f"--class-conditional: {source} is not conditional; leave one of --init-from and it out")
    _check_classes(f"--init-from {source}", classes, data)
    check_size(data.size, size_multiple(unet), source)
    side = data.size[0] if data.size[0] == data.size[1] else data.size
    unet.register_to_config(sample_size=side)
    return pipeline


def _check_classes(what: str, classes: int | None, data: ImageSet) -> None:
    if classes is not None and (data.labels is None or len(data.classes) > classes):
        have = "none" if data.labels is None else str(len(data.classes))
        raise UsageError(
            f"{what} is conditional on {classes} classes, DATA has {have}: put the images of each class in a folder, "
            "or name a --label-column"
        )


def _configured_unet(source: str, data: ImageSet, classes: int | None) -> UNet2DModel:
    channels, size = data.channels, data.size
    flag = "--model-config-name-or-path"
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    try:
        values = durable.read_json(path)
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
        reason = durable.one_line(error)
        raise UsageError(f"{flag} {source}: not a UNet2DModel configuration ({reason})") from None
    check_size(size, size_multiple(unet), source)
    _check_classes(f"{flag} {source}", unet.config["num_class_embeds"], data)
    return unet


# -- the plan ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run will do, resolved: printed before it starts and saved as ``config.json``."""

    images: int
    batch: int
    steps: int
    warmup_steps: int
    checkpointing_steps: int
    learning_rate: float
    objective: str
    network: str
    parameters: int

    @classmethod
    def resolve(
        cls,
        config: TrainConfig,
        data: ImageSet,
        trained: int,
        processes: int,
        unet: UNet2DModel,
        network: str,
        objective: str,
    ) -> Plan:
        """Fill in every default that depends on the data, the network or the number of processes.

        ``trained`` is how many of the images are trained on.
        """
        total = parse_count(config.images, "--images")
        total = total if config.num_epochs is None else config.num_epochs * trained
        batch = config.train_batch_size * config.gradient_accumulation_steps * processes
        if config.clean_subset and trained < batch:
            raise UsageError(
                f"--clean-subset: --corrupt spares {trained} of {len(data)} images, a step takes {batch}: lower its "
                "fraction, or --train-batch-size"
            )
        steps = max(1, round(total / batch))
        warmup = min(500, steps // 20) if config.lr_warmup_steps is None else config.lr_warmup_steps
        warmup = 0 if config.lr_scheduler == "constant" else warmup
        if warmup > steps:
            raise UsageError(
                f"--lr-warmup-steps {warmup} is longer than the run of {steps} steps: make one fit the other"
            )
        rate = config.learning_rate
        if rate is None and (config.init_from or config.model_config_name_or_path):
            rate = 1e-4
        return cls(
            images=steps * batch,
            batch=batch,
            steps=steps,
            warmup_steps=warmup,
            checkpointing_steps=config.checkpointing_steps or max(1, math.ceil(steps / 10)),
            learning_rate=rate or NETWORKS[config.network or network_for(data.size)].learning_rate,
            objective=objective,
            network=network,
            parameters=sum(p.numel() for p in unet.parameters()),
        )

    def text(
        self,
        config: TrainConfig,
        data: ImageSet,
        unet: UNet2DModel,
        workers: int,
        dirt: tuple[str, ...],
        told: Mapping[str, str],
        folder: Path,
        hardware: str,
        seconds_per_step: float,
    ) -> str:
        """The plan as a person reads it, with the estimated time."""
        height, width = data.size
        colour = "grey" if data.channels == 1 else "RGB"
        size = f"{data.bytes / 2**20:.1f} MiB" if data.bytes >= 2**20 else f"{data.bytes / 2**10:.1f} KiB"
        held = f"streamed ({size} decoded at every use)" if data.streamed else f"{size} held"
        held += f", fed by {workers} workers" if workers else ""
        conditional = unet.config["num_class_embeds"] is not None
        rows = {
            "data": f"{config.data} ({data.what}): {len(data)} images, {width} x {height} {colour}",
            "memory": held,
            "classes": f"{len(data.classes)}: {_listed(data.classes)}" if conditional else "",
            "skipped": _counts(Counter(reason for _, reason in data.skipped)),
            "converted": _counts(data.notes),
            "dirt": "; ".join(dirt),
            **told,
            "network": f"UNet2DModel {self.network}, {self.parameters / 1e6:.2f} M parameters",
            "objective": self.objective,
            "length": f"{self.images:,} images = {self.steps:,} steps of {self.batch}",
            "learning rate": f"{self.learning_rate:g}, {config.lr_scheduler}, {self.warmup_steps} warm-up steps",
            "evaluation": f"every {config.evaluate_every} images" if config.evaluate_every else "",
            "hardware": hardware,
            "output": str(folder),
            "estimated time": _duration(seconds_per_step * self.steps) + ", previews and checkpoints not counted",
        }
        return "\n".join(f"{name + ':':<16}{value}" for name, value in rows.items() if value)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def describe_objective(objective: PlainObjective) -> str:
    """The objective and its settings in one line."""
    fields = dataclasses.fields(objective)
    values = {f.name: getattr(objective, f.name) for f in fields if f.name != "process"}
    if values.get("perturbation", "") is None:
        return "PlainObjective()"
    return f"{type(objective).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(" ".join(name.split()) for name in names[:10]) + (" ..." if len(names) > 10 else "")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


# -- the run folder ----------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds a run of ours: only such a folder is ever deleted by ``--overwrite``."""
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
        raise UsageError(f"--output-dir {folder} is a file: name a folder")
    if not config.dry_run and (there := durable.read_only(folder)):
        raise UsageError(f"--output-dir {folder}: {there} is read-only: name another folder")
    if config.resuming:
        damaged: list[tuple[Path, str]] = []
        found = find_checkpoint(folder / "checkpoints", config.resume_from_checkpoint or "latest", damaged)
        for path, reason in damaged:
            warnings.warn(f"{path} is damaged ({reason}): using {found.name}", RobustdiffWarning, stacklevel=2)
        return found
    here, data = folder.resolve(), Path(config.data).resolve()
    if data.exists() and (here == data or data in here.parents or here in data.parents):
        raise UsageError(f"--output-dir {folder} and DATA {config.data} lie inside one another: name another folder")
    sources = {"--init-from": config.init_from, "--model-config-name-or-path": config.model_config_name_or_path}
    for flag, value in sources.items():
        place = Path(value).resolve() if value else None
        if place is not None and place.exists() and (here == place or here in place.parents):
            raise UsageError(f"{flag} {value} lies in --output-dir {folder}: name another output folder")
    if not folder.exists() or all(path.name == ".config.json.tmp" for path in folder.iterdir()):  # killed at once
        return None
    if not is_run(folder):
        raise UsageError(f"--output-dir {folder} is not empty and holds no run of robustdiff: name another folder")
    if not config.overwrite:
        raise UsageError(f"--output-dir {folder} holds a run already: add --resume to go on, or --overwrite")
    return None


# Flags that may differ between the parts of a resumed run: they do not change what is learned.
_FREE = {
    *("resume", "resume_from_checkpoint", "overwrite", "dry_run", "output_dir", "checkpointing_steps"),
    *("checkpoints_total_limit", "logging_steps", "preview_images", "eval_batch_size", "ddpm_num_inference_steps"),
    *("evaluate_every", "evaluate_reference", "evaluate_split", "evaluate_extractor", "evaluate_n", "evaluate_metric"),
    *("logger", "compile", "max_memory_gib", "dataloader_num_workers", "on_nonfinite"),
    # The pixels, labels and noise levels themselves are compared.
    *("noise_levels", "data", "split", "dataset_config_name", "image_column", "label_column", "max_bad_fraction"),
    *("train_batch_size", "gradient_accumulation_steps"),  # only their product with the processes counts: plan.batch
}


def check_resumable(
    config: TrainConfig,
    data: ImageSet,
    levels: NoiseLevels | None,
    trust: str | None,
    plan: Plan,
    folder: Path,
    conditional: bool,
) -> None:
    """Refuse to go on with other settings, other data or other noise levels than the run was started with.

    ``trust`` is the digest of what ``--auto`` found.

    Raises:
        UsageError: Naming the flags that differ.
    """
    try:
        saved, account = durable.read_json(folder / "config.json"), durable.read_json(folder / "data.json")
        earlier, batch, before = dict(saved["settings"]), saved["plan"]["batch"], account["data"]
        pixels, labels = before["sha256"], before.get("labels_sha256")
        told = account["noise_levels"]["sha256"] if account.get("noise_levels") else None
        trusted = account["auto"]["sha256"] if account.get("auto") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = durable.one_line(error)
        raise UsageError(f"--resume: {folder} has no readable config.json and data.json ({reason})") from None
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    earlier = {
        "clean_subset": False,
        "auto": False,
        "auto_without": [],
    } | earlier  # runs of before there were the flags
    if not config.auto:  # the default has changed its name, not its meaning
        earlier["preset"], now["preset"] = earlier.get("preset") or "gated", config.start
    differing = sorted(name for name in now if name not in _FREE and now[name] != earlier.get(name))
    if differing:
        flags = ", ".join(f"--{n.replace('_', '-')} (was {earlier.get(n)!r:.80}, now {now[n]!r})" for n in differing)
        raise UsageError(f"--resume: these settings differ from those of {folder}: {flags}")
    if batch != plan.batch:
        raise UsageError(
            f"--resume: {batch!r:.40} images per step before, {plan.batch} now: keep --train-batch-size x "
            "--gradient-accumulation-steps x processes the same"
        )
    if pixels != data.sha256:
        raise UsageError(f"--resume: DATA {config.data} holds other images than those {folder} was trained on")
    if conditional and labels != data.describe()["labels_sha256"]:
        raise UsageError(f"--resume: DATA {config.data} holds other labels than those {folder} was trained on")
    if told != (None if levels is None else levels.sha256):
        raise UsageError(f"--resume: --noise-levels are others than those {folder} was trained with: give the same")
    if trusted != trust:
        raise UsageError(f"--resume: {folder / 'auto.json'} is not what the run began with: put it back, or start anew")
