"""Calling a network: whatever it takes and returns, and a second time as if it had not been called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from robustdiff.utils.tensors import to_device

Model = Callable[..., Any]
"""``model(x_t, t, **kwargs)`` returning a tensor, or an object with ``.sample``, of the shape of ``x_t``."""


def call_model(model: Model, x_t: Tensor, t: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The model's output in the precision of ``x_t``, unwrapped from ``.sample`` if it is wrapped.

    Raises:
        ValueError: If the output does not have the shape of ``x_t`` (a network that also predicts variances, say).
    """
    output = model(x_t, t, **kwargs)
    output = output if isinstance(output, Tensor) else output.sample
    if output.shape != x_t.shape:
        raise ValueError(f"the model returned shape {tuple(output.shape)} for an input of shape {tuple(x_t.shape)}")
    return output.to(x_t.dtype)


def select_rows(value: Any, index: Tensor, batch: int) -> Any:  # noqa: ANN401 - whatever a model takes
    """The rows ``index`` of every batched tensor in a (possibly nested) model argument."""
    if isinstance(value, Tensor):
        return value[to_device(index, value.device)] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: select_rows(item, index, batch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [select_rows(item, index, batch) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@contextmanager
def kept_buffers(model: Model) -> Iterator[None]:
    """Put the model's buffers (batch-norm statistics, say) back on leaving."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    kept = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, kept, strict=True):
            buffer.data.copy_(old)  # .data: an earlier forward pass may have saved the buffer for its backward


@contextmanager
def kept_random_stream(device: torch.device) -> Iterator[None]:
    """Rewind torch's global random streams on leaving, so that dropout inside draws nothing from its caller."""
    devices = [device] if device.type not in ("cpu", "meta", "mps") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield
