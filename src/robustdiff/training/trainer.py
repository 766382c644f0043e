"""Training: from a configuration to a run folder, in one loop read from top to bottom.

Longer than most files: the loop and what it keeps in order are one function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from robustdiff import __version__
from robustdiff.audit.files import write_sheets
from robustdiff.audit.result import AuditResult
from robustdiff.audit.run import audit
from robustdiff.data.corruption import check_corruptions
from robustdiff.data.dataset import load_images
from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.pipeline import (
    largest_divisor,
    sample,
    save_pipeline,
    to_uint8,
    without_accelerator,
)
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.denoising import LossOutput
from robustdiff.training.annotations import told_levels, trained_images
from robustdiff.training.callbacks import EvaluationCallback
from robustdiff.training.checkpoint import (
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    step_of,
)
from robustdiff.training.config import TrainConfig
from robustdiff.training.curriculum import visits_of, whole_from
from robustdiff.training.loader import Batch, Batches, RankSampler, iterate_batches
from robustdiff.training.metrics import JsonlLog, Metrics, Progress, Tracker
from robustdiff.training.model_card import write_model_card
from robustdiff.training.plan import Plan, describe_objective
from robustdiff.training.resume import check_resumable, claim_output
from robustdiff.training.setup import (
    build_objective,
    build_pipeline,
    check_gate,
    source_options,
)
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import TrainingError, UsageError
from robustdiff.utils.images import image_grid, save_png
from robustdiff.utils.resources import (
    check_launcher,
    cores,
    free_memory,
    is_out_of_memory,
)
from robustdiff.utils.seeds import derive_seed
from robustdiff.utils.signals import Interrupted, stop_signals
from robustdiff.utils.tensors import to_device

PATIENCE = timedelta(hours=2)
"""How long processes wait for the first one, which saves and draws previews; the usual 10 minutes may be few."""


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
    corruptions = check_corruptions(config.corrupt)
    source = Path(config.data).resolve()
    folder = Path(config.output_dir or f"runs/{source.name if source.is_dir() else source.stem}")
    found = claim_output(config, folder)
    accelerator = _accelerator(config, folder)
    if not accelerator.is_local_main_process:
        say = _silent

    # Data, network, objective, plan
    data = load_images(
        config.data,
        resolution=config.resolution,
        channels=config.channels,
        max_bad_fraction=config.max_bad_fraction,
        max_memory=None if config.max_memory_gib is None else int(config.max_memory_gib * 2**30),
        **source_options(config),
    )
    _check_alike(accelerator, data.sha256, f"`data` {data.source} holds other images")
    workers = config.dataloader_num_workers
    workers = (min(4, cores()) if data.streamed else 0) if workers is None else workers
    pipeline, network = build_pipeline(config, data)
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    trained, levels = trained_images(data, corruptions, config.seed, config.clean_subset), None
    batches = Batches(data, corruptions, config.seed, config.random_flip, trained)
    bare = batches
    trust = _examined(config, accelerator, batches, folder) if config.auto else None
    if config.noise_levels is not None:
        levels = told_levels(config.noise_levels, data, trained, corruptions, config.seed, schedule)
        _check_alike(accelerator, levels.sha256, f"`noise_levels` {config.noise_levels} are others")
        batches = dataclasses.replace(batches, sigma=levels.sigma, visits=levels.visits())
    objective = build_objective(config, schedule, None if trust is None else trust.regularise)
    if trust is not None:
        sigma = trust.noise_std if bool((trust.noise_std > 0).any()) else None
        repair = trust.repaired if trust.lost else None
        known = {"sigma": sigma, "visits": visits_of(trust, schedule), "repair": repair}
        batches = dataclasses.replace(batches, **known, whole_from=whole_from(trust, schedule))
    count = len(trained) if batches.visits is None else len(batches.visits.used)
    plan = Plan.resolve(
        config,
        data,
        count,
        accelerator.num_processes,
        pipeline.unet,
        network,
        describe_objective(objective),
    )
    told = {"trained on": f"{len(trained)} images: those that `corrupt` spares"} if config.clean_subset else {}
    if levels is not None:
        check_gate(objective, levels)
        told |= levels.rows()
    if trust is not None:
        told |= trust.rows()
    preview_steps = config.ddpm_num_inference_steps or largest_divisor(schedule.num_timesteps, at_most=50)
    if schedule.num_timesteps % preview_steps:
        nearest = largest_divisor(schedule.num_timesteps, at_most=preview_steps)
        raise UsageError(
            f"`ddpm_num_inference_steps` {preview_steps} does not divide the {schedule.num_timesteps} noise levels: "
            f"use {nearest}"
        )
    conditional = Denoiser.of(pipeline).num_classes is not None
    during = None
    if config.evaluate_every is not None:
        during = EvaluationCallback(config, plan, data, preview_steps, accelerator.device)
    if config.resuming:
        check_resumable(config, data, levels, None if trust is None else trust.sha256, plan, folder, conditional)
    size = config.train_batch_size

    # Model and optimiser on the device
    unet = pipeline.unet.train()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    unet.to(accelerator.device)
    ema = EMAModel(unet.parameters(), decay=config.ema_max_decay, foreach=True) if config.use_ema else None
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=plan.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=fused,
    )
    # Stepped once per optimiser step and not handed to accelerate: the same under accumulation and many processes.
    lr_schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=plan.warmup_steps, num_training_steps=plan.steps
    )
    # A gate's second pass has another batch size at every step: compile once for any, not once per size.
    gated = callable(getattr(objective, "strength", None))
    compiled = torch.compile(unet, dynamic=True if gated else None) if config.compile else unet
    with warnings.catch_warnings():  # its successor (torch 2.13) still synchronises at the start
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*deprecated")
        model, optimizer = accelerator.prepare(compiled, optimizer)
    extra = {"schedule": lr_schedule}
    if accelerator.scaler is not None:
        extra["scaler"] = accelerator.scaler
    state = TrainingState(unet, optimizer.optimizer, ema, extra)

    def terms_of(counters: range, batch: Batch) -> LossOutput:
        """Loss terms of this process's share of one pass, the images with these counters."""
        x0, generators, labels, lost = batch
        x0 = to_device(x0, accelerator.device)
        if accelerator.device.type == "cuda":
            x0 = x0.contiguous(memory_format=torch.channels_last)
        kwargs = {"class_labels": to_device(labels, accelerator.device)} if conditional and labels is not None else {}
        torch.manual_seed(derive_seed(config.seed, "dropout", counters[0]))
        t, levels = batches.timesteps(counters, generators), batches.noise_levels(counters)
        mask = batches.masks(counters, t, lost)
        with accelerator.autocast():
            return objective(model, x0, generator=generators, t=t, noise_level=levels, loss_mask=mask, **kwargs)

    # The plan, with a measured estimate; the timed steps change no weight
    for _ in range(2):
        started = time.perf_counter()
        accelerator.backward(terms_of(range(size), batches(range(size))).total.mean())
        _synchronize(accelerator.device)
        seconds = time.perf_counter() - started
    optimizer.zero_grad()
    hardware = f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
    dirt = tuple(str(corruption) for corruption in corruptions)
    seconds *= config.gradient_accumulation_steps
    slowest = accelerator.gather(torch.tensor([seconds], device=accelerator.device)).max().item()
    say(plan.text(config, data, pipeline.unet, workers, dirt, told, folder, hardware, seconds))
    if config.dry_run:
        say("dry run: nothing was written")
        return folder

    # Output folder
    step, saved = 0, {}
    if found is not None:
        saved = load_checkpoint(found, state)
        step = saved["step"]
        say(f"going on from {found}: step {step} of {plan.steps}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if config.overwrite and folder.exists():
            # Not the folder itself, which may be where a disk is mounted; last what says that it is ours.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"robustdiff": __version__, "torch": torch.__version__}
        settings = {"settings": dataclasses.asdict(config), "plan": dataclasses.asdict(plan), "versions": versions}
        atomic_io.write_json(folder / "config.json", settings)
        account = {"data": data.describe(), "corrupt": dirt, "corrupt_seed": config.seed, "trained": count}
        account["noise_levels"] = None if levels is None else levels.describe()
        account["auto"] = None if trust is None else trust.describe()
        if trust is not None and not config.resuming:
            trust.save(folder / AUTO_FILE)
            write_sheets(trust, lambda places: to_uint8(bare.images_at(places)), folder)
        atomic_io.write_json(folder / "data.json", account)
        (folder / "samples").mkdir(exist_ok=True)
    tracker = Tracker(accelerator, config.logger, dataclasses.asdict(config))
    accelerator.wait_for_everyone()
    metrics = Metrics(accelerator, config.on_nonfinite == "skip", saved.get("metrics"))
    lines, bad_lines = JsonlLog(folder / "metrics.jsonl", step), JsonlLog(folder / "nonfinite.jsonl", step - 1)
    if during is not None:
        during.begin(folder, step)

    def settle() -> None:
        """Fetch the metrics; write down what was not finite, and stop for it if it must be."""
        found, fatal = metrics.settle(schedule)
        for one in found:
            if accelerator.is_main_process:
                bad_lines.write(one.record(batches))
            if fatal is None:
                say(f"skipped a step: {one}")
        if fatal is not None:
            before = fatal.step - metrics.streak + 1  # the row
            good = [path for path in list_checkpoints(folder / "checkpoints") if step_of(path) <= before]
            row = f", {Metrics.PATIENCE} steps in a row" if config.on_nonfinite == "skip" else ""
            safe = f"last good checkpoint: {good[-1]}" if good else "no checkpoint was written yet"
            skip = "" if row else ", or `on_nonfinite` skip"
            raise TrainingError(
                f"{fatal}{row}; its images are listed in {bad_lines.path}; {safe}; try a lower `learning_rate` or "
                f"`strength`{skip}"
            )

    def preview_of(step: int) -> Path:
        return folder / "samples" / f"step-{step:08d}.png"

    def save() -> None:
        """Checkpoint, then what is made from it; all from the main process."""
        if accelerator.is_main_process:
            lines.sync()
            bad_lines.sync()
            if during is not None:
                during.lines.sync()
            counters = {"images": step * plan.batch, "metrics": metrics.state()}
            # In a row of bad steps nothing is deleted: the checkpoint before it may be the one to go back to.
            keep = sys.maxsize if metrics.streak else config.checkpoints_total_limit
            save_checkpoint(folder / "checkpoints", step, state, counters, keep)
            publish()

    @contextlib.contextmanager
    def averaged(doing: str) -> Iterator[None]:
        """The network with the weights that are saved and sampled; ``doing`` is for the message."""
        if ema is not None:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
        try:
            with accelerator.autocast():
                yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UsageError(
                f"out of memory while {doing} step {step}: lower `eval_batch_size` or `preview_images`, and go on with "
                "`resume`"
            ) from None
        finally:
            if ema is not None:
                ema.restore(unet.parameters())

    def publish() -> None:
        """Pipeline, model card and preview."""
        with averaged("drawing the preview, after saving"):
            save_pipeline(folder, pipeline)
            write_model_card(folder, config, plan, data, dirt, told, step, conditional)
            if config.preview_images:
                labels = [i % len(data.classes) for i in range(config.preview_images)] if conditional else None
                images = sample(
                    pipeline,
                    config.preview_images,
                    seed=config.seed,
                    steps=preview_steps,
                    batch_size=config.eval_batch_size,
                    class_labels=labels,
                )
                staging = folder / "samples" / ".preview.tmp"
                save_png(image_grid(to_uint8(images)), staging)
                staging.replace(preview_of(step))

    # The loop
    progress = Progress(step, plan, enabled=accelerator.is_main_process)
    since, since_step = time.perf_counter(), step
    status = 0
    agreeing = steps_between_votes(slowest)
    shares = RankSampler(step, plan.steps, plan.batch, size, accelerator.process_index, accelerator.num_processes)
    loading = iterate_batches(batches, shares, workers, pin=accelerator.device.type == "cuda")
    with stop_signals() as asked_to_stop, contextlib.closing(loading):
        if step == plan.steps:  # killed in its last save: finish that, names and pruning too
            save()
        elif found is not None and accelerator.is_main_process and not preview_of(step).exists():
            publish()  # killed between checkpoint and preview, which comes last
        while step < plan.steps and not status:
            parts: list[LossOutput] = []
            for part in range(config.gradient_accumulation_steps):
                last = part == config.gradient_accumulation_steps - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    counters, batch = next(loading)
                    parts.append(terms_of(counters, batch))
                    loss = parts[-1].total.mean()
                    # times 1, but not a number where the loss is infinite: no process may miss it in the gradient
                    loss = loss * (1 + 0 * loss.detach())
                    accelerator.backward(loss / config.gradient_accumulation_steps)
            gradient_norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            rate = lr_schedule.get_last_lr()[0]
            bad = metrics.add(step, parts, gradient_norm)
            if accelerator.scaler is None and fused:
                state.optimizer.found_inf = bad  # the fused kernel then changes nothing, and no one waits to know
            if accelerator.scaler is not None or fused or not bad:
                optimizer.step()
            lr_schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(unet.parameters())
            step += 1

            logging = step % config.logging_steps == 0 or step == plan.steps
            status = asked_to_stop()
            if accelerator.num_processes > 1:  # all stop at the same step, agreed where they meet anyway
                status = _agree(accelerator, status) if logging or step % agreeing == 0 else 0
            finished = step == plan.steps or status > 0
            saving = finished or step % plan.checkpointing_steps == 0
            evaluating = during is not None and during.due(step)
            if saving or logging or evaluating:
                settle()
            if logging:
                seconds = max(time.perf_counter() - since, 1e-9)
                record = {
                    "step": step,
                    "images": step * plan.batch,
                    **metrics.means(),
                    "learning_rate": rate,
                    "images_per_second": (step - since_step) * plan.batch / seconds,
                    **({"skipped": metrics.skipped} if metrics.skipped else {}),
                }
                if accelerator.is_main_process:
                    lines.write(record)
                tracker.log(record, step)
                progress.show(record)
                since, since_step = time.perf_counter(), step
            progress.advance(step)
            if evaluating and during is not None and accelerator.is_main_process:
                with averaged("evaluating"):
                    say(during.measure(pipeline, step))
            if saving:
                save()
            if saving or evaluating:
                since, since_step = time.perf_counter(), step
    progress.close()
    # Processes part together, and the wrapper goes before its process group: freed after it, gloo may never return.
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    model = unet
    tracker.close()
    accelerator.end_training()
    if step < plan.steps:
        raise Interrupted(
            f"stopped at step {step} of {plan.steps}, saved; go on with the same command and `resume`", status
        )
    say(f"done: {folder} is a diffusers pipeline; draw from it with: robustdiff sample {folder}")
    return folder


AUTO_FILE = "auto.json"


@dataclasses.dataclass(frozen=True)
class _AsTrained:
    """The images as training sees them, with the dirt of ``corrupt``, for the audit."""

    batches: Batches

    @property
    def names(self) -> Sequence[str]:
        """One per image."""
        return self.batches.images.names

    def __len__(self) -> int:
        """How many images."""
        return len(self.batches.images)

    def x0(self, index: Sequence[int], /) -> torch.Tensor:
        """Images with these places."""
        return self.batches.images_at(index)


def _examined(config: TrainConfig, accelerator: Accelerator, batches: Batches, folder: Path) -> AuditResult:
    """What the images can be trusted for; found by one process for all, and once for a run that goes on."""
    found: list[AuditResult | None] = [None]
    if accelerator.is_main_process:
        if config.resuming:
            try:
                found[0] = AuditResult.load(folder / AUTO_FILE, len(batches.images))
            except UsageError as error:
                remedy = "put it back, start anew, or leave out `auto` if the run began without it"
                raise UsageError(f"`resume`: {error}: {remedy}") from None
        else:
            accelerator.print(f"looking at {len(batches.images)} images", flush=True)
            memory = 0 if batches.images.streamed else free_memory() // 4
            found[0] = audit(_AsTrained(batches), without=config.auto_without, memory=memory)
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _silent(text: str) -> None:
    pass


def _check_alike(accelerator: Accelerator, digest: str, what: str) -> None:
    """Every process must have read the same, or none would notice what is trained on.

    Raises:
        UsageError: If a process has something else, from a copy on its own machine, say.
    """
    if accelerator.num_processes > 1:
        mine = torch.tensor([int(digest[:12], 16)], device=accelerator.device)
        every = accelerator.gather(mine)
        if not bool((every == every[0]).all()):
            raise UsageError(f"{what} on some machines than on others: make it the same")


def steps_between_votes(seconds: float) -> int:
    """Every how many steps of so many seconds processes ask one another whether to stop: about every other second.

    Launchers kill 30 s after they ask to stop; and every vote makes the host wait for the device.
    """
    return max(1, min(10, int(2 / max(seconds, 0.001))))  # a clock may stand still


def _agree(accelerator: Accelerator, status: int) -> int:
    """The highest exit status that any process was asked to end with."""
    asked = torch.tensor([status == 130, status == 143], dtype=torch.float32, device=accelerator.device)
    interrupt, terminate = (accelerator.reduce(asked, "sum") > 0).tolist()
    return 143 if terminate else 130 if interrupt else 0


def _accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Accelerate's device, precision and trackers; what it would ignore silently is an error here."""
    check_launcher()
    if config.logger is not None:
        available = sorted(tracker.value for tracker in get_available_trackers())
        if config.logger not in available:
            there = ", ".join(available) or "none"
            raise UsageError(
                f"`logger` {config.logger}: not installed, or not known to accelerate (installed: {there})"
            )
    # Accelerate keeps one precision per process; a second call of train() may ask for another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=without_accelerator(),
        mixed_precision=config.mixed_precision,
        log_with=config.logger,
        project_dir=str(folder),
        kwargs_handlers=[
            # A gate may leave one process without a perturbed forward pass: no collective may happen in a forward.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    sharding = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharding:
        raise UsageError(
            f"accelerate is set to {accelerator.distributed_type.value}, which splits the network: use plain data "
            "parallelism (accelerate launch --multi_gpu)"
        )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("`mixed_precision` fp16 has no effect on a CPU: use bf16 or no")
    return accelerator


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
