"""Training: from a configuration to a run folder, in one loop read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from robustdiff import __version__
from robustdiff.checkpoint import TrainingState, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from robustdiff.config import TrainConfig, UsageError, check_corruptions
from robustdiff.corruption import Corruption, corrupt, derive_seed
from robustdiff.images import ImageSet, load_images, save_png
from robustdiff.objective import LossTerms
from robustdiff.planning import (
    Plan,
    build_objective,
    build_pipeline,
    check_resumable,
    claim_output,
    describe_objective,
)
from robustdiff.process import NoiseProcess, to_device
from robustdiff.recording import Metrics, Progress, TrainingError, save_pipeline, write_json, write_model_card
from robustdiff.sampling import image_grid, largest_divisor, sample, to_uint8, without_accelerator


class Interrupted(Exception):
    """Training was stopped by the user; the message says how to go on."""


# -- data, as pure functions of (seed, image counter) ------------------------------------------------


@dataclass
class Batches:
    """Training images by counter: the run's ``counter``-th image is the same on any number of processes.

    Args:
        images: The data.
        corruptions: Frozen dirt, a function of (seed, index of the image).
        seed: The run's seed.
        random_flip: Mirror left-right with probability 1/2, a function of (seed, counter).
    """

    images: ImageSet
    corruptions: tuple[Corruption, ...]
    seed: int
    random_flip: bool
    _epoch: int = -1
    _order: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def index(self, counter: int) -> int:
        """Which image the run sees as its ``counter``-th: a fresh permutation per pass over the data."""
        epoch, place = divmod(counter, len(self.images))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=generator)
        return int(self._order[place])

    def __call__(self, counters: range) -> tuple[Tensor, list[torch.Generator], Tensor | None]:
        """Images in [-1, 1], (B, C, H, W); each one's generator for every draw made on it; labels, (B,), or None."""
        rows, generators, indices = [], [], [self.index(counter) for counter in counters]
        for counter, index in zip(counters, indices, strict=True):
            x0, _ = corrupt(self.images.x0(index), self.corruptions, self.seed, index)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "draws", counter))
            if self.random_flip and torch.rand((), generator=generator) < 0.5:
                x0 = x0.flip(-1)
            rows.append(x0)
            generators.append(generator)
        labels = None if self.images.labels is None else self.images.labels[indices]
        return torch.stack(rows), generators, labels


# -- stopping ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads; a second one stops at once."""
    stopped = False

    def handle(_signal: int, _frame: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        print("\nstopping after this step; press Ctrl-C again to stop at once without saving", file=sys.stderr)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: the caller's handler stays in charge
        yield lambda: False
        return
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


# -- training ----------------------------------------------------------------------------------------


def train(config: TrainConfig) -> Path:
    """Train as configured.

    Args:
        config: Every setting; see :class:`robustdiff.TrainConfig`.

    Returns:
        The run folder, which is a diffusers pipeline. With ``dry_run`` nothing is written.

    Raises:
        UsageError: If a setting, the data or the output folder cannot be used.
        TrainingError: If the loss becomes non-finite.
        Interrupted: On Ctrl-C, after saving a checkpoint.
    """
    config.validate()
    corruptions = check_corruptions(config.corrupt)
    source = Path(config.data).resolve()
    folder = Path(config.output_dir or f"runs/{source.name if source.is_dir() else source.stem}")
    claim_output(config, folder)
    accelerator = _accelerator(config, folder)
    say = accelerator.print

    # Data, network, objective, plan
    data = load_images(
        config.data,
        resolution=config.resolution,
        channels=config.channels,
        max_bad_fraction=config.max_bad_fraction,
    )
    pipeline, network = build_pipeline(config, data)
    process = NoiseProcess.from_scheduler(pipeline.scheduler)
    objective = build_objective(config, process)
    plan = Plan.resolve(config, data, accelerator.num_processes, pipeline.unet, network, describe_objective(objective))
    preview_steps = config.ddpm_num_inference_steps or largest_divisor(process.num_timesteps, at_most=50)
    if process.num_timesteps % preview_steps:
        nearest = largest_divisor(process.num_timesteps, at_most=preview_steps)
        raise UsageError(
            f"--ddpm-num-inference-steps {preview_steps} does not divide the {process.num_timesteps} noise levels: "
            f"use {nearest}"
        )
    if config.resuming:
        check_resumable(config, data, plan, folder)
    batches = Batches(data, corruptions, config.seed, config.random_flip)
    conditional = pipeline.unet.config["num_class_embeds"] is not None

    # Model and optimiser on the device
    unet = pipeline.unet.train()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    unet.to(accelerator.device)
    ema = EMAModel(unet.parameters(), decay=config.ema_max_decay, foreach=True) if config.use_ema else None
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=plan.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    # Stepped once per optimiser step and not handed to accelerate: the same under accumulation and many processes.
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=plan.warmup_steps, num_training_steps=plan.steps
    )
    # A gate's second pass has another batch size at every step: compile once for any, not once per size.
    gated = callable(getattr(objective, "strength", None))
    compiled = torch.compile(unet, dynamic=True if gated else None) if config.compile else unet
    model, optimizer = accelerator.prepare(compiled, optimizer)
    extra = {"schedule": schedule}
    if accelerator.scaler is not None:
        extra["scaler"] = accelerator.scaler
    state = TrainingState(unet, optimizer.optimizer, ema, extra)

    def micro_batch(step: int, part: int) -> LossTerms:
        """Loss terms of this process's share of one accumulation step."""
        size = config.train_batch_size
        first = step * plan.batch + (part * accelerator.num_processes + accelerator.process_index) * size
        x0, generators, labels = batches(range(first, first + size))
        x0 = to_device(x0, accelerator.device)
        if accelerator.device.type == "cuda":
            x0 = x0.contiguous(memory_format=torch.channels_last)
        kwargs = {"class_labels": to_device(labels, accelerator.device)} if conditional and labels is not None else {}
        torch.manual_seed(derive_seed(config.seed, "dropout", first))
        with accelerator.autocast():
            return objective(model, x0, generator=generators, **kwargs)

    # The plan, with a measured estimate; the timed steps change no weight
    for _ in range(2):
        started = time.perf_counter()
        accelerator.backward(micro_batch(0, 0).total.mean())
        _synchronize(accelerator.device)
        seconds = time.perf_counter() - started
    optimizer.zero_grad()
    hardware = f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
    dirt = tuple(str(corruption) for corruption in corruptions)
    say(plan.text(config, data, dirt, folder, hardware, seconds * config.gradient_accumulation_steps))
    if config.dry_run:
        say("dry run: nothing was written")
        return folder

    # Output folder
    step = 0
    if config.resuming:
        found = find_checkpoint(folder / "checkpoints", config.resume_from_checkpoint or "latest")
        step = load_checkpoint(found, state)["step"]
        say(f"going on from {found}: step {step} of {plan.steps}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if config.overwrite and folder.exists():
            shutil.rmtree(folder)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        versions = {"robustdiff": __version__, "torch": torch.__version__}
        write_json(
            folder / "config.json",
            {"settings": dataclasses.asdict(config), "plan": dataclasses.asdict(plan), "versions": versions},
        )
        write_json(
            folder / "data.json",
            {"data": data.describe(), "corrupt": dirt, "corrupt_seed": config.seed},
        )
    if config.logger:
        accelerator.init_trackers("robustdiff", config={"settings": json.dumps(dataclasses.asdict(config))})
    accelerator.wait_for_everyone()
    metrics = Metrics(folder / "metrics.jsonl", step)

    def save() -> None:
        """Checkpoint, pipeline, model card and preview, all from the main process."""
        if not accelerator.is_main_process:
            return
        counters = {"images": step * plan.batch}
        save_checkpoint(folder / "checkpoints", step, state, counters, config.checkpoints_total_limit)
        if ema is not None:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
        save_pipeline(folder, pipeline)
        write_model_card(folder, config, plan, data, dirt, step)
        if config.preview_images:
            labels = [i % len(data.classes) for i in range(config.preview_images)] if conditional else None
            with accelerator.autocast():
                images = sample(
                    pipeline,
                    config.preview_images,
                    seed=config.seed,
                    steps=preview_steps,
                    batch_size=config.eval_batch_size,
                    class_labels=labels,
                )
            save_png(image_grid(to_uint8(images)), folder / "samples" / f"step-{step:08d}.png")
        if ema is not None:
            ema.restore(unet.parameters())

    # The loop
    progress = Progress(step, plan, enabled=accelerator.is_main_process)
    since, since_step = time.perf_counter(), step
    with _stop_on_interrupt() as stopped:
        while step < plan.steps:
            for part in range(config.gradient_accumulation_steps):
                last = part == config.gradient_accumulation_steps - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    terms = micro_batch(step, part)
                    accelerator.backward(terms.total.mean() / config.gradient_accumulation_steps)
                metrics.add(step, terms)
            gradient_norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(unet.parameters())
            step += 1

            logging = step % config.logging_steps == 0
            stopping = stopped()
            if accelerator.num_processes > 1:  # all stop at the same step, agreed where they meet anyway
                votes = torch.tensor(float(stopping), device=accelerator.device)
                stopping = logging and bool(accelerator.reduce(votes, "sum") > 0)
            finished = step == plan.steps or stopping
            saving = finished or step % plan.checkpointing_steps == 0
            if saving or logging:
                try:
                    record = metrics.collect(accelerator, process)
                    norm = float(gradient_norm)
                    if not math.isfinite(norm) and accelerator.scaler is None:  # a scaler skips such steps itself
                        raise TrainingError(f"the gradient is not finite at step {step - 1}")
                except TrainingError as error:
                    good = list_checkpoints(folder / "checkpoints")
                    safe = f"last good checkpoint: {good[-1]}" if good else "no checkpoint was written yet"
                    raise TrainingError(f"{error}; {safe}; try a lower --learning-rate or --strength") from None
                per_second = (step - since_step) * plan.batch / (time.perf_counter() - since)
                record = {"step": step, "images": step * plan.batch, **record}
                record |= {
                    "gradient_norm": norm if math.isfinite(norm) else None,
                    "learning_rate": rate,
                    "images_per_second": per_second,
                }
                if accelerator.is_main_process:
                    metrics.write(record)
                accelerator.log(record, step=step)
                progress.show(record)
                since, since_step = time.perf_counter(), step
            progress.advance(step)
            if saving:
                save()
                since, since_step = time.perf_counter(), step
            if finished:
                break
    progress.close()
    # Processes part together, and the wrapper goes before its process group: freed after it, gloo may never return.
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    model = unet
    accelerator.end_training()
    if step < plan.steps:
        raise Interrupted(f"stopped at step {step} of {plan.steps}, saved; go on with the same command and --resume")
    say(f"done: {folder} is a diffusers pipeline; draw from it with: robustdiff sample {folder}")
    return folder


def _accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Accelerate's device, precision and trackers; what it would ignore silently is an error here."""
    if config.logger is not None:
        available = sorted(tracker.value for tracker in get_available_trackers())
        if config.logger not in available:
            there = ", ".join(available) or "none"
            raise UsageError(
                f"--logger {config.logger}: not installed, or not known to accelerate (installed: {there})"
            )
    # Accelerate keeps one precision per process; a second call of train() may ask for another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=without_accelerator(),
        mixed_precision=config.mixed_precision,
        log_with=config.logger,
        project_dir=str(folder),
        # A gate may leave one process without a perturbed forward pass: no collective may happen in a forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--mixed-precision fp16 has no effect on a CPU: use bf16 or no")
    return accelerator


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
