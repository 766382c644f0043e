"""Small things done to tensors everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_to(values: Tensor, x: Tensor) -> Tensor:
    """Reshape per-image ``values``, shape (B,), so that they broadcast against ``x``, shape (B, ...)."""
    return values.reshape(values.shape[:1] + (1,) * (x.ndim - 1))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``. From the CPU the host does not wait; back to it, it must."""
    return x.to(device, non_blocking=x.device.type == "cpu")
