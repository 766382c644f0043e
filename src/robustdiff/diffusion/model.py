"""Networks of any class, called one way: nothing else in the package knows their classes, arguments or outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from robustdiff.utils.tensors import to_device

Model = Callable[..., Any]
"""``model(x_t, t, **kwargs)`` returning a tensor, or an object with ``.sample``, of the shape of ``x_t``."""


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network, called as ``denoiser(x_t, t, **kwargs)`` whatever its class, and what it takes.

    Args:
        model: A network of diffusers (UNet2DModel, UNet2DConditionModel, DiT and other transformers), or any
            ``callable(x_t, t, **kwargs)``; what it takes is known of networks with a ``config`` only.
    """

    model: Any

    @classmethod
    def of(cls, source: Any) -> Denoiser:  # noqa: ANN401 - pipelines and networks share no typed base
        """The denoiser of a pipeline (its ``unet`` or ``transformer``), of a network, or of any callable.

        Raises:
            TypeError: If it is none of these.
        """
        if isinstance(source, Denoiser):
            return source
        network = (
            None if isinstance(source, nn.Module) else getattr(source, "unet", getattr(source, "transformer", None))
        )
        network = source if network is None else network
        if not callable(network):
            raise TypeError(f"{type(source).__name__} cannot be called, and has no unet or transformer")
        return cls(network)

    def __call__(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401 - passed through
        """The output for states (B, ...) at timesteps (B,) or (); see :func:`call_model`."""
        if self._names_the_timestep:
            return _tensor(self.model(x_t, timestep=t, **kwargs), x_t)
        return call_model(self.model, x_t, t, kwargs)

    @cached_property
    def _names_the_timestep(self) -> bool:
        """Whether the network has its timestep elsewhere than in second place, as many transformers do."""
        try:
            names = list(inspect.signature(getattr(self.model, "forward", self.model)).parameters)
        except (TypeError, ValueError):  # compiled functions may have no signature
            return False
        return "timestep" in names[2:]

    @property
    def channels(self) -> int:
        """Channels of the images (or latents) it takes."""
        return int(self.model.config["in_channels"])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images (or latents) it was made for."""
        side = self.model.config["sample_size"]
        height, width = (side, side) if isinstance(side, int) else side
        return int(height), int(width)

    @property
    def num_classes(self) -> int | None:
        """Number of classes it is conditional on; None if it is not."""
        config = self.model.config
        classes: int | None = config.get("num_class_embeds")
        return config.get("num_embeds_ada_norm") if classes is None else classes

    def class_kwargs(self, labels: Tensor | None) -> dict[str, Tensor]:
        """The keyword arguments that tell it the class of each image, int64, shape (B,).

        Raises:
            ValueError: If a conditional network gets no labels, or another one gets some.
        """
        if (self.num_classes is None) != (labels is None):
            raise ValueError("class_labels are needed by a class-conditional network, and by no other")
        return {} if labels is None else {"class_labels": labels}


def module_of(model: Model) -> nn.Module | None:
    """The network, if ``model`` is one or wraps one as ``.model`` (:class:`Denoiser` and ``SigmaClampedModel`` do)."""
    inner: Any = model
    while inner is not None and not isinstance(inner, nn.Module):
        inner = getattr(inner, "model", None)
    return inner


def call_model(model: Model, x_t: Tensor, t: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The model's output in the precision of ``x_t``, unwrapped from ``.sample`` if it is wrapped.

    Raises:
        ValueError: If the output does not have the shape of ``x_t`` (a network that also predicts variances, say).
    """
    return _tensor(model(x_t, t, **kwargs), x_t)


def _tensor(output: Any, x_t: Tensor) -> Tensor:  # noqa: ANN401 - a tensor, or a class of diffusers
    tensor: Tensor = output if isinstance(output, Tensor) else output.sample
    if tensor.shape != x_t.shape:
        raise ValueError(f"the model returned shape {tuple(tensor.shape)} for an input of shape {tuple(x_t.shape)}")
    return tensor.to(x_t.dtype)


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
    module = module_of(model)
    buffers = [] if module is None else list(module.buffers())
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
