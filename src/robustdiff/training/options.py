"""How long and how :func:`robustdiff.training.fit` trains."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FitOptions:
    """How long and how to train.

    Args:
        steps: Optimiser steps, >= 1.
        batch_size: Images per forward pass and process, of an image set; a loader of your own has its own.
        gradient_accumulation_steps: Forward and backward passes per optimiser step, >= 1.
        learning_rate: Peak learning rate, > 0.
        lr_scheduler: A schedule of diffusers' ``get_scheduler``: constant, constant_with_warmup, linear, cosine ...
        lr_warmup_steps: Optimiser steps of linear warm-up, 0 to ``steps``.
        adam_beta1: Of AdamW, >= 0 and < 1.
        adam_beta2: Of AdamW, >= 0 and < 1.
        adam_weight_decay: Of AdamW, >= 0.
        adam_epsilon: Of AdamW, > 0.
        max_grad_norm: The gradient is clipped to this norm, > 0; ``inf`` for never.
        ema_max_decay: Cap of the moving average's decay, 0 to 1; at its n-th step, from 0, the decay is
            ``min(ema_max_decay, (1 + n) / (10 + n))``, and 0 at the first. None: no moving average.
        seed: Rules every draw on images, and the network's own (dropout).
        mixed_precision: Of the network's arithmetic; images, noise and loss stay float32.
        compile: Compile the network with ``torch.compile``.
        on_nonfinite: When loss or gradient is not finite: stop, or skip the step and count it; ten in a row stop all
            the same.
        log_every: Optimiser steps between records of the metrics.
        checkpoint_every: Optimiser steps between checkpoints; there is one at the end in any case. None: only there.
        workers: Processes that load an image set ahead; 0 = none.

    Raises:
        ValueError: Naming what is out of range.
    """

    steps: int
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-6
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_max_decay: float | None = 0.9999
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    compile: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    log_every: int = 50
    checkpoint_every: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        counts = ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every")
        for name in (*counts, "lr_warmup_steps", "seed", "workers"):
            value = getattr(self, name)
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not whole and not (name == "checkpoint_every" and value is None):
                raise ValueError(f"FitOptions needs {name} to be a whole number, got {value!r}")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"FitOptions needs {name} >= 1, got {value}")
        for name in ("learning_rate", "adam_epsilon"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"FitOptions needs a finite {name} > 0, got {getattr(self, name)}")
        for name in ("adam_weight_decay", "workers"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"FitOptions needs a finite {name} >= 0, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"FitOptions needs {name} >= 0 and < 1, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"FitOptions needs max_grad_norm > 0, got {self.max_grad_norm}")
        if not 0 <= self.lr_warmup_steps <= self.steps:
            raise ValueError(f"FitOptions needs lr_warmup_steps in 0 .. {self.steps}, got {self.lr_warmup_steps}")
        if self.ema_max_decay is not None and not 0 <= self.ema_max_decay <= 1:
            raise ValueError(f"FitOptions needs ema_max_decay in 0 .. 1, got {self.ema_max_decay}")
        for name, values in (("on_nonfinite", ("stop", "skip")), ("mixed_precision", ("no", "fp16", "bf16"))):
            if getattr(self, name) not in values:
                raise ValueError(f"FitOptions needs {name} to be one of {', '.join(values)}, got {getattr(self, name)}")
