"""Training from a configuration: flags become images, pipeline, loss, options and callbacks, for ``fit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from robustdiff import __version__
from robustdiff.data.match_model import renumber
from robustdiff.diffusion.pipeline import largest_divisor
from robustdiff.diffusion.sample_files import in_turn
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.training.callbacks.base import Callback
from robustdiff.training.callbacks.checkpointing import CheckpointCallback
from robustdiff.training.callbacks.logging import LogCallback
from robustdiff.training.callbacks.pipeline import PipelineCallback, PreviewCallback
from robustdiff.training.callbacks.run_folder import PlanCallback, RunFolderCallback
from robustdiff.training.callbacks.tracking import TrackerCallback
from robustdiff.training.checkpoint import list_checkpoints, step_of
from robustdiff.training.config import TrainConfig
from robustdiff.training.loop import fit
from robustdiff.training.metrics import Metrics, NonFinite
from robustdiff.training.model_card import write_model_card
from robustdiff.training.options import FitOptions
from robustdiff.training.plan import Plan, describe_objective
from robustdiff.training.processes import build_accelerator
from robustdiff.training.resume import check_resumable, claim_output
from robustdiff.training.run import takes_labels
from robustdiff.training.setup import build_evaluation, build_objective, build_pipeline, check_gate
from robustdiff.training.training_set import TrainingSet, build_training_set, load_training_images
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import TrainingError, UsageError
from robustdiff.utils.resources import cores
from robustdiff.utils.signals import Interrupted


def train(config: TrainConfig, say: Callable[[str], None] = print) -> Path:
    """Train as configured.

    Args:
        config: Every setting; see :class:`robustdiff.TrainConfig`.
        say: Told the plan, what is found on the way, and the end.

    Returns:
        The run folder, which is a diffusers pipeline. With ``dry_run`` nothing is written.

    Raises:
        UsageError: If a setting, the data or the output folder cannot be used.
        TrainingError: If loss or gradient become non-finite.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    config.validate()
    source = Path(config.data).resolve()
    folder = Path(config.output_dir or f"runs/{source.name if source.is_dir() else source.stem}")
    found = claim_output(config, folder)
    accelerator = build_accelerator(config.mixed_precision, config.logger, folder, config.gradient_accumulation_steps)
    if not accelerator.is_local_main_process:
        say = _silent

    images = load_training_images(config, accelerator)
    pipeline, network = build_pipeline(config, images)
    if config.init_from:
        images = renumber(images, pipeline, config.init_from)
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    data = build_training_set(config, images, schedule, accelerator, folder)
    loss = build_objective(config, schedule, None if data.audit is None else data.audit.regularise)
    if data.levels is not None:
        check_gate(loss, data.levels)
    processes = accelerator.num_processes
    plan = Plan.resolve(config, images, data.count, processes, pipeline.unet, network, describe_objective(loss))
    callbacks = _callbacks(config, plan, data, pipeline, accelerator, folder, found)
    if config.resuming:
        audited = None if data.audit is None else data.audit.sha256
        conditional = takes_labels(pipeline.unet)
        length = check_resumable(config, images, data.levels, audited, plan, folder, conditional)
        if length < plan.images:
            say(f"training longer: {plan.images:,} images instead of {length:,}")

    try:
        fit(pipeline, loss, data.batches, _options(config, plan, data), callbacks, accelerator=accelerator, say=say)
    except Interrupted as stopped:
        if stopped.saved:  # else others hang, or have gone
            accelerator.end_training()
        raise
    except NonFinite as bad:
        raise TrainingError(_explained(config, folder, bad)) from None
    if config.dry_run:
        say("dry run: nothing was written")
        return folder
    accelerator.end_training()
    say(f"done: {folder} is a diffusers pipeline; draw from it with: robustdiff sample {folder}")
    return folder


def _options(config: TrainConfig, plan: Plan, data: TrainingSet) -> FitOptions:
    """The flags that say how long and how, with the defaults that the plan has filled in."""
    workers = config.dataloader_num_workers
    if workers is None:
        workers = min(4, cores()) if data.images.streamed else 0
    return FitOptions(
        steps=plan.steps,
        batch_size=config.train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=plan.learning_rate,
        lr_scheduler=config.lr_scheduler,
        lr_warmup_steps=plan.warmup_steps,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_weight_decay=config.adam_weight_decay,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        ema_max_decay=config.ema_max_decay if config.use_ema else None,
        seed=config.seed,
        mixed_precision=config.mixed_precision,
        compile=config.compile,
        on_nonfinite=config.on_nonfinite,
        log_every=config.logging_steps,
        checkpoint_every=plan.checkpointing_steps,
        workers=workers,
    )


def _callbacks(
    config: TrainConfig,
    plan: Plan,
    data: TrainingSet,
    pipeline: DiffusionPipeline,
    accelerator: Accelerator,
    folder: Path,
    found: Path | None,
) -> list[Callback]:
    """What happens beside the steps, in this order."""
    conditional, told, images = takes_labels(pipeline.unet), data.rows(), data.images
    sampler_steps = _sampler_steps(config, pipeline.scheduler.config.num_train_timesteps)
    hardware = f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
    workers = _options(config, plan, data).workers

    def plan_text(seconds: float) -> str:
        return plan.text(config, images, pipeline.unet, workers, data.dirt, told, folder, hardware, seconds)

    def write_files() -> None:
        versions = {"robustdiff": __version__, "torch": torch.__version__}
        settings = {"settings": dataclasses.asdict(config), "plan": dataclasses.asdict(plan), "versions": versions}
        atomic_io.write_json(folder / "config.json", settings)  # first: it says that the folder is a run's
        if not config.resuming:
            data.write_audit(folder)
        atomic_io.write_json(folder / "data.json", data.describe())

    classes = data.classes if conditional else []

    def write_card(step: int) -> None:
        write_model_card(folder, config, plan, images, data.dirt, told, step, classes)

    evaluation = []
    if config.evaluate_every is not None:
        evaluation = [build_evaluation(config, plan, images, folder, sampler_steps, classes, accelerator.device)]
    preview = None
    if config.preview_images:
        labels = in_turn(classes, config.preview_images) if conditional else None
        preview = PreviewCallback(
            folder,
            config.preview_images,
            steps=sampler_steps,
            seed=config.seed,
            batch_size=config.eval_batch_size,
            class_labels=labels,
        )
    return [
        PlanCallback(data.batches, plan_text, stop=config.dry_run),
        CheckpointCallback(folder / "checkpoints", config.checkpoints_total_limit, found),
        RunFolderCallback(folder, write_files, config.overwrite),
        *([TrackerCallback(config.logger, dataclasses.asdict(config))] if config.logger else []),
        LogCallback(folder, images.names),
        *evaluation,
        PipelineCallback(folder, write_card, preview),
    ]


def _sampler_steps(config: TrainConfig, timesteps: int) -> int:
    """Network calls per image of previews and evaluations.

    Raises:
        UsageError: If they do not divide the noise levels.
    """
    steps = config.ddpm_num_inference_steps or largest_divisor(timesteps, at_most=50)
    if timesteps % steps:
        raise UsageError(
            f"`ddpm_num_inference_steps` {steps} does not divide the {timesteps} noise levels: use "
            f"{largest_divisor(timesteps, at_most=steps)}"
        )
    return steps


def _silent(text: str) -> None:
    pass


def _explained(config: TrainConfig, folder: Path, bad: NonFinite) -> str:
    """What to do about a loss or a gradient that is not finite."""
    before = bad.step - bad.in_a_row + 1  # the row
    good = [path for path in list_checkpoints(folder / "checkpoints") if step_of(path) <= before]
    row = f", {Metrics.PATIENCE} steps in a row" if config.on_nonfinite == "skip" else ""
    safe = f"last good checkpoint: {good[-1]}" if good else "no checkpoint was written yet"
    skip = "" if row else ", or `on_nonfinite` skip"
    return (
        f"{bad}{row}; its images are listed in {folder / 'nonfinite.jsonl'}; {safe}; try a lower `learning_rate` or "
        f"`strength`{skip}"
    )
