"""The training loop: any network, any loss, any batches."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import Dataset

from robustdiff.data.dataset import ImageDataset
from robustdiff.losses.denoising import LossOutput
from robustdiff.training.callbacks.base import Callback
from robustdiff.training.callbacks.checkpointing import CheckpointCallback
from robustdiff.training.loader import Batch, Batches, RankSampler, iterate_batches, repeat_batches
from robustdiff.training.options import FitOptions
from robustdiff.training.processes import agree, steps_between_votes
from robustdiff.training.run import Loss, MakeOptimizer, TrainingRun
from robustdiff.utils.signals import (
    PATIENCE,
    TOGETHER,
    Interrupted,
    WaitOver,
    ends_at_last,
    ends_with_signals,
    stop_signals,
)


@dataclass(frozen=True)
class FitResult:
    """What came of a run.

    Attributes:
        network: The network that was trained, with its weights as they are.
        average: The moving average of its weights, by name, and its buffers, for ``load_state_dict``; None without one.
        steps: Optimiser steps done.
        images: Images seen.
        records: Means of the loss terms and speed, one every ``log_every`` steps, and of the last step.
    """

    network: nn.Module
    average: dict[str, Tensor] | None = field(repr=False)
    steps: int
    images: int
    records: list[dict[str, Any]] = field(repr=False)


def fit(
    model: nn.Module | DiffusionPipeline,
    loss: Loss,
    data: ImageDataset | Batches | Iterable[Any],
    options: FitOptions,
    callbacks: Sequence[Callback] = (),
    *,
    optimizer: MakeOptimizer | None = None,
    accelerator: Accelerator | None = None,
    say: Callable[[str], None] = print,
) -> FitResult:
    """Train a network; nothing is written unless a callback writes it.

    The network is left in train mode. Torch's global generator is seeded anew at every pass, from the options' seed:
    what you draw from it afterwards follows from that.

    Example::

        schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
        result = fit(UNet2DModel(...), EquivarianceLoss.preset("gated", schedule), load_images("photos/"),
                     FitOptions(steps=10_000, learning_rate=2e-4))

    Args:
        model: A network, ``model(x_t, t)``, or a diffusers pipeline with one; trained in place.
        loss: ``loss(model, x0, generator=..., ...) -> LossOutput``; see :class:`Loss`.
        data: An image set, seen in an order that the seed rules; or :class:`Batches`, which also rules what is seen
            when; or anything that gives batches again and again, such as a DataLoader: images in [-1, 1], shape
            (B, ...), or pairs of images and labels, or :class:`Batch`. On several processes each gives its own share.
        options: How long and how.
        callbacks: Called in this order; see :class:`Callback`.
        optimizer: Makes the optimiser of the parameters. Default: AdamW.
        accelerator: Device and processes, if you have made them already; what it has prepared is let go at the end.
        say: Told of skipped steps and of what callbacks have to say, on one process of a machine.

    Raises:
        NonFinite: If a loss or gradient is not finite; names the step and the noise level.
        Interrupted: On Ctrl-C or SIGTERM, after the step that was being done and a last checkpoint; without that step
            if its images do not come.
        ValueError: If ``data`` ends, or is or gives something else; if its seed is not that of the options; if the
            accelerator has another precision than the options, or accumulates gradients itself.
    """
    _check_data(data, options.seed)
    run = TrainingRun(model, loss, options, callbacks, optimizer=optimizer, accelerator=accelerator, say=say)
    last_words = partial(_stopped, run, where=", in a wait that did not end", saved=False)
    with stop_signals() as asked_to_stop, ends_at_last(run.patience, last_words):
        try:
            for callback in run.callbacks:
                with ends_with_signals(PATIENCE):
                    callback.on_setup(run)
                if run.stopping:
                    return _result(run)
            run.accelerator.wait_for_everyone()
            with contextlib.closing(_unless_stopped(_feed(run, data), run.accelerator.num_processes)) as batches:
                _train(run, batches, asked_to_stop)
        except WaitOver as over:
            raise last_words(over.status) from None
        # Processes part together, and the wrapper goes before its process group.
        run.accelerator.wait_for_everyone()
        run.release()
        run.each("on_end")
        if accelerator is None:
            run.accelerator.end_training()
    if run.status and run.step < options.steps:
        raise _stopped(run, run.status)
    return _result(run)


def _train(run: TrainingRun, batches: Iterator[Batch], asked_to_stop: Callable[[], int]) -> None:
    """The loop itself."""
    options = run.options
    run.each("on_start")
    if run.finished:  # killed in its last save: finish that
        _save(run)
    while not run.finished:
        try:
            train_step(run, batches)
            logging = run.step % options.log_every == 0 or run.step == options.steps
            run.status = _vote(run, asked_to_stop(), logging)
        except WaitOver as over:
            if run.accelerator.num_processes > 1:  # alone this one cannot save
                raise
            run.status = over.status
            run.optimizer.zero_grad()
            _save(run)  # what was done before this step
            return
        if logging:
            run.check_finite()
            run.each("on_log", run.record())
        run.each("on_step")
        if run.stopping and not logging:
            _record_last(run)
        if run.finished or run.step % (options.checkpoint_every or options.steps) == 0:
            _save(run)


def train_step(run: TrainingRun, batches: Iterator[Batch]) -> None:
    """One optimiser step: takes one batch per accumulated pass, and moves weights, average and learning rate.

    A step whose loss or gradient is not finite changes no weight; :meth:`TrainingRun.check_finite` tells of it. Nor
    does one that ends in the middle, for want of a batch.
    """
    passes = run.options.gradient_accumulation_steps
    outputs: list[LossOutput] = []
    indices: list[Tensor | None] = []
    images = 0
    with ends_with_signals(run.patience):
        for place in range(passes):
            last = place == passes - 1
            with contextlib.nullcontext() if last else run.accelerator.no_sync(run.model):
                batch = next(batches)
                outputs.append(run.loss_of(batch))
                indices.append(batch.index)
                mean = outputs[-1].total.mean()
                # times 1, but not a number where the loss is infinite: no process may miss it in the gradient
                mean = mean * (1 + 0 * mean.detach())
                run.accelerator.backward(mean / passes)
            images += len(batch.x0) * run.accelerator.num_processes
        gradient_norm = run.accelerator.clip_grad_norm_(run.network.parameters(), run.options.max_grad_norm)
    run.update(bad=run.metrics.add(run.step, outputs, gradient_norm, run.images, indices))
    run.images += images


def _check_data(data: object, seed: int) -> None:
    if isinstance(data, str | Path):
        raise ValueError(f"data is the path {data}: give what robustdiff.load_images makes of it")
    if isinstance(data, Tensor | Dataset):
        raise ValueError(f"data is a {type(data).__name__}, which has no batches: wrap it in a DataLoader")
    if isinstance(data, Batches) and data.seed not in (None, seed):
        raise ValueError(f"Batches has seed {data.seed}, FitOptions has seed {seed}: give the same, or Batches none")


def _feed(run: TrainingRun, data: ImageDataset | Batches | Iterable[Any]) -> Generator[Batch, None, None]:
    """Batches from where the run goes on."""
    options, accelerator = run.options, run.accelerator
    process, processes = accelerator.process_index, accelerator.num_processes
    batches = Batches(data, seed=options.seed) if isinstance(data, ImageDataset) else data
    if not isinstance(batches, Batches):
        return repeat_batches(batches, options.seed, run.images, process, processes, run.takes_labels)
    if batches.seed is None:
        batches = copy.copy(batches)  # the caller's has none still
        batches.seed = options.seed
    batch = options.batch_size * options.gradient_accumulation_steps * processes
    shares = RankSampler(run.step, options.steps, batch, options.batch_size, process, processes)
    return iterate_batches(batches, shares, options.workers, pin=accelerator.device.type == "cuda")


def _unless_stopped(batches: Generator[Batch, None, None], processes: int) -> Generator[Batch, None, None]:
    """The same, but that no signal waits for a batch for long.

    On several processes it may be long: those that have theirs would wait for the one that leaves.
    """
    with contextlib.closing(batches):
        while True:
            with ends_with_signals(PATIENCE if processes == 1 else TOGETHER):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _stopped(run: TrainingRun, status: int, where: str = "", saved: bool = True) -> Interrupted:
    """What a stopped run says of itself, and of how it goes on if it has checkpoints."""
    message = f"stopped at step {run.step} of {run.options.steps}{where}"
    if any(isinstance(callback, CheckpointCallback) for callback in run.callbacks):
        so_far = "saved" if saved else "nothing since the last checkpoint was saved"
        message += f", {so_far}; go on with the same command and `resume`"
    return Interrupted(message, status, saved)


def _vote(run: TrainingRun, status: int, logging: bool) -> int:
    """The exit status to stop with, or 0: all processes stop at the same step, agreed where they meet anyway."""
    if run.accelerator.num_processes == 1:
        return status
    every = 1 if run.seconds_per_step is None else steps_between_votes(run.seconds_per_step)
    with ends_with_signals(run.patience):
        return agree(run.accelerator, status) if logging or run.step % every == 0 else 0


def _record_last(run: TrainingRun) -> None:
    """For the caller only: to callbacks and checkpoints, the means go on as if the run had not been stopped."""
    run.check_finite()
    state = run.metrics.state()
    run.record()
    run.metrics.restore(state)


def _save(run: TrainingRun) -> None:
    run.check_finite()
    run.each("on_sync")
    run.each("on_checkpoint")
    run.restart_clock()


def _result(run: TrainingRun) -> FitResult:
    average: dict[str, Tensor] | None = None
    if run.ema is not None:
        means = dict(zip(map(id, run.network.parameters()), run.ema.shadow_params, strict=True))
        named = run.network.named_parameters(remove_duplicate=False)  # shared weights have several names
        average = {**run.network.state_dict(), **{name: means[id(weight)] for name, weight in named}}
    return FitResult(run.network, average, run.step, run.images, run.records)
