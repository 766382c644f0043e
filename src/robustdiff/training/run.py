"""What a run is made of while it goes: network, optimiser, moving average, metrics, and how far it is."""

from __future__ import annotations

import contextlib
import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.denoising import LossOutput
from robustdiff.training.checkpoint import TrainingState
from robustdiff.training.loader import Batch
from robustdiff.training.metrics import Metrics
from robustdiff.training.options import FitOptions
from robustdiff.training.processes import build_accelerator
from robustdiff.utils.errors import RobustdiffWarning
from robustdiff.utils.seeds import derive_seed
from robustdiff.utils.signals import PATIENCE, TOGETHER, WaitOver, ends_with_signals
from robustdiff.utils.tensors import to_device

if TYPE_CHECKING:
    from robustdiff.training.callbacks.base import Callback


class Loss(Protocol):
    """What :func:`robustdiff.training.fit` minimises."""

    def __call__(self, model: Any, x0: Tensor, **known: Any) -> LossOutput:  # noqa: ANN401 - what the batch knows
        """Per-image terms of a batch, whose ``total`` is averaged and differentiated.

        Args:
            model: ``callable(x_t, t, **kwargs)``.
            x0: Images in [-1, 1], shape (B, ...).
            **known: ``generator``, one per image, always; and what the batch has of ``t``, ``noise_level``,
                ``loss_mask`` (:class:`Batch`) and, if the network takes them, ``class_labels``.
        """
        ...


MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class TrainingRun:
    """A run while it goes. Callbacks are handed it; they may read everything, and call the methods.

    Attributes:
        options: How it is trained.
        loss: What is minimised.
        pipeline: The diffusers pipeline that the network belongs to, if there is one.
        network: The network, unwrapped: its weights, device, configuration.
        model: The same, as the loss calls it: compiled, and wrapped for several processes.
        ema: The moving average of the weights, or None.
        optimizer: The optimiser.
        lr_schedule: The learning-rate schedule, stepped once per optimiser step.
        accelerator: Device, precision, processes.
        metrics: Of the steps since the last record.
        step: Optimiser steps done.
        images: Images seen, over all processes.
        learning_rate: Of the last step.
        status: Exit status that a signal asks to end with, or 0.
        stopping: Whether a callback asked to end.
        records: What was logged.
        seconds_per_step: A measured estimate, if somebody made one.
    """

    def __init__(
        self,
        model: nn.Module | DiffusionPipeline,
        loss: Loss,
        options: FitOptions,
        callbacks: Sequence[Callback] = (),
        *,
        optimizer: MakeOptimizer | None = None,
        accelerator: Accelerator | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Put the network on the device and make what trains it; nothing is trained yet. See :func:`fit`."""
        self.options, self.loss, self.callbacks, self._say = options, loss, tuple(callbacks), say
        if accelerator is None:
            accelerator = build_accelerator(
                options.mixed_precision, gradient_accumulation_steps=options.gradient_accumulation_steps
            )
        self.accelerator = accelerator
        _check_accelerator(self.accelerator, options.mixed_precision)
        device = self.accelerator.device
        self.pipeline = None if isinstance(model, nn.Module) else model
        self.network = _network_of(model)
        self.network.train()
        if device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network.to(device)
        decay = options.ema_max_decay
        self.ema = None if decay is None else EMAModel(self.network.parameters(), decay=decay, foreach=True)
        made = (optimizer or self._adamw)(self.network.parameters())
        # Stepped once per optimiser step and not handed to accelerate: the same under accumulation and many processes.
        self.lr_schedule = get_scheduler(
            options.lr_scheduler,
            made,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.steps,
        )
        # A gate's second pass has another batch size at every step: compile once for any, not once per size.
        gated = callable(getattr(loss, "strength", None))
        compiled = torch.compile(self.network, dynamic=True if gated else None) if options.compile else self.network
        with warnings.catch_warnings():  # its successor (torch 2.13) still synchronises at the start
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*deprecated")
            self.model, self.optimizer = self.accelerator.prepare(compiled, made)
        self.fused = bool(made.defaults.get("fused"))
        self.metrics = Metrics(self.accelerator, options.on_nonfinite == "skip")
        self.noise_to_signal = _noise_to_signal(self.pipeline, loss)
        self.takes_labels = takes_labels(self.network)
        self.step = self.images = self.status = 0
        self.learning_rate: float = self.lr_schedule.get_last_lr()[0]
        self.records: list[dict[str, Any]] = []
        self.seconds_per_step: float | None = None
        self.stopping = False
        self.restart_clock()

    def _adamw(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        options = self.options
        return torch.optim.AdamW(
            parameters,
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
            fused=self.accelerator.device.type in ("cpu", "cuda"),
        )

    # -- how far it is -----------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def finished(self) -> bool:
        """Whether no step is to follow."""
        return self.step >= self.options.steps or self.status > 0 or self.stopping

    def stop(self) -> None:
        """End after this step, with a last checkpoint; in :meth:`Callback.on_setup`: at once, with nothing done.

        On several processes every one must call it, at the same step.
        """
        self.stopping = True

    def say(self, text: str) -> None:
        """Tell people, from one process of a machine."""
        if self.accelerator.is_local_main_process:
            self._say(text)

    def each(self, hook: str, *arguments: object) -> None:
        """Call one hook of every callback, in their order; one that hangs when a signal has come is left.

        Raises:
            WaitOver: If it was to save.
        """
        saves = hook in ("on_sync", "on_checkpoint")
        for callback in self.callbacks:
            try:
                with ends_with_signals(self.patience if saves else PATIENCE):
                    getattr(callback, hook)(self, *arguments)
            except WaitOver as over:
                if self.ema is not None and self.ema.temp_stored_params is not None:  # left in the middle of a swap
                    self.ema.restore(self.network.parameters())
                if saves:
                    raise
                if self.accelerator.num_processes == 1:  # several agree first
                    self.status = over.status
                message = (
                    f"{type(callback).__name__}.{hook} was left unfinished: it did not end when the run was stopped"
                )
                warnings.warn(message, RobustdiffWarning, stacklevel=2)

    @property
    def patience(self) -> float:
        """Seconds after a signal that a step, a vote or a save may take: large networks and slow steps have more."""
        millions = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        return TOGETHER + millions + 5 * (self.seconds_per_step or 0)

    # -- what a step needs -------------------------------------------------------------------------------

    def loss_of(self, batch: Batch) -> LossOutput:
        """Loss terms of one pass of this process."""
        device = self.accelerator.device
        x0 = to_device(batch.x0, device)
        if device.type == "cuda" and x0.ndim == 4:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        known: dict[str, Any] = {"t": batch.t, "noise_level": batch.noise_level, "loss_mask": batch.mask}
        if self.takes_labels and batch.labels is not None:
            known["class_labels"] = to_device(batch.labels, device)
        known = {name: value for name, value in known.items() if value is not None}
        torch.manual_seed(derive_seed(self.options.seed, "dropout", batch.first))
        with self.accelerator.autocast():
            output = self.loss(self.model, x0, generator=batch.generators, **known)
        if not isinstance(output, LossOutput):
            raise TypeError(f"loss must return a robustdiff.losses.LossOutput, got {type(output).__name__}")
        if output.total.shape != (len(x0),):
            shape = tuple(output.total.shape)
            raise ValueError(f"loss must return a total per image, shape ({len(x0)},), got shape {shape}")
        return output

    def update(self, bad: Tensor) -> None:
        """Move weights, learning rate and moving average by the gradient that has been gathered.

        Args:
            bad: Whether loss or gradient are not finite, 0 or 1, shape (): then no weight moves.
        """
        scaled = self.accelerator.scaler is not None  # the scaler skips bad steps itself
        if self.fused and not scaled:
            self.optimizer.optimizer.found_inf = bad  # the fused kernel then changes nothing, and no one waits to know
        if scaled or self.fused or not bad:
            self.optimizer.step()
        self.learning_rate = self.lr_schedule.get_last_lr()[0]
        self.lr_schedule.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.network.parameters())
        self.step += 1

    def check_finite(self) -> None:
        """Fetch the metrics of the steps that wait; whoever uses the weights calls this first, on every process.

        Raises:
            NonFinite: If a step among them was not finite, and is not to be skipped.
        """
        found, fatal = self.metrics.flush(self.noise_to_signal)
        for one in found:
            self.each("on_nonfinite", one)
            if fatal is None:
                self.say(f"skipped a step: {one}")
        if fatal is not None:
            raise fatal

    def restart_clock(self) -> None:
        """What took the time since the last record was not training."""
        self._since, self._since_images = time.perf_counter(), self.images

    def record(self) -> dict[str, Any]:
        """Means and speed since the last record; call :meth:`check_finite` first."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        record = {
            "step": self.step,
            "images": self.images,
            **self.metrics.means(),
            "learning_rate": self.learning_rate,
            "images_per_second": (self.images - self._since_images) / seconds,
            **({"skipped": self.metrics.skipped} if self.metrics.skipped else {}),
        }
        self.restart_clock()
        self.records.append(record)
        return record

    # -- weights -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with the weights that are saved and sampled, in the precision of training."""
        if self.ema is not None:
            self.ema.store(self.network.parameters())
            self.ema.copy_to(self.network.parameters())
        try:
            with self.accelerator.autocast():
                yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.network.parameters())
            self.network.train()  # sampling may have been left in the middle

    def training_state(self) -> TrainingState:
        """Everything that a checkpoint keeps."""
        extra: dict[str, Any] = {"schedule": self.lr_schedule}
        if self.accelerator.scaler is not None:
            extra["scaler"] = self.accelerator.scaler
        return TrainingState(self.network, self.optimizer.optimizer, self.ema, extra)

    def release(self) -> None:
        """Let go of what accelerate has wrapped: freed after its process group, gloo may never return."""
        self.accelerator.free_memory()
        self.model = self.network


def _network_of(model: nn.Module | DiffusionPipeline) -> nn.Module:
    network = Denoiser.of(model).model
    if not isinstance(network, nn.Module):
        raise TypeError(f"model is a {type(network).__name__}, which has no weights: give a network or a pipeline")
    return network


def _check_accelerator(accelerator: Accelerator, mixed_precision: str) -> None:
    if accelerator.mixed_precision != mixed_precision:
        raise ValueError(
            f"accelerator has mixed_precision {accelerator.mixed_precision}, FitOptions has {mixed_precision}: give "
            "the same to both"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerator has gradient_accumulation_steps {accelerator.gradient_accumulation_steps}: give it to "
            "FitOptions instead"
        )


def _noise_to_signal(pipeline: DiffusionPipeline | None, loss: Loss) -> Callable[[Tensor], Tensor] | None:
    """Noise levels of timesteps, as far as anybody knows them."""
    found = getattr(getattr(loss, "schedule", None), "noise_to_signal", None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    try:
        return NoiseSchedule.from_scheduler(getattr(pipeline, "scheduler", None)).noise_to_signal
    except TypeError:  # no scheduler, or one whose timesteps are no noise levels of this kind
        return None


def takes_labels(network: nn.Module) -> bool:
    """Whether a network is conditional on classes, ``class_labels``."""
    if isinstance(network, ConfigMixin):  # diffusers' networks have the argument whether they use it or not
        return Denoiser.of(network).num_classes is not None
    parameters = inspect.signature(network.forward).parameters
    return "class_labels" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
