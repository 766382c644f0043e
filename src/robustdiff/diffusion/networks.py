"""Networks: presets over diffusers' ``UNet2DModel``, and a small denoiser for points."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from diffusers import UNet2DModel

from robustdiff.utils.errors import UsageError


@dataclass(frozen=True)
class NetworkPreset:
    """Shape of a U-Net.

    Args:
        widths: Channels per level; each level but the last halves the image.
        layers: Residual blocks per level.
        attention: Levels with self-attention, counted from 0 at full size; none here means none in the middle either.
        groups: Groups of the group normalisation.
        learning_rate: Peak AdamW rate it is usually trained at.
        dropout: Of the residual blocks.
        scale_shift: Whether the time scales and shifts a block's normalised values, or is added to them.
        head_width: Channels of an attention head; None: one head.
    """

    widths: tuple[int, ...]
    layers: int = 2
    attention: tuple[int, ...] = ()
    groups: int = 32
    learning_rate: float = 2e-4
    dropout: float = 0.0
    scale_shift: bool = False
    head_width: int | None = None


NETWORKS: dict[str, NetworkPreset] = {
    "tiny": NetworkPreset((32, 64), layers=1, groups=8, learning_rate=1e-3),
    "small": NetworkPreset((32, 64, 64), layers=1, attention=(2,), groups=16, learning_rate=8e-4),
    "medium": NetworkPreset((64, 128, 192, 192), attention=(1, 2), learning_rate=3e-4),
    "base": NetworkPreset((128, 256, 256, 256), attention=(1,), learning_rate=2e-4),
    "large": NetworkPreset((128, 128, 256, 256, 512, 512), attention=(4,), learning_rate=1e-4),
    "improved-ddpm": NetworkPreset(
        (128, 256, 256, 256),
        layers=3,
        attention=(1, 2),
        learning_rate=1e-4,
        dropout=0.3,
        scale_shift=True,
        head_width=64,
    ),
}
"""``base``: the CIFAR-10 network of Ho et al. (2020), 35.7 M parameters, without its dropout, whose masks would differ
between the two branches of the regulariser; ``large``: that of diffusers' script; ``improved-ddpm``: the CIFAR-10
network of Nichol and Dhariwal (2021), with a fixed variance: four heads of attention at 16 x 16 and 8 x 8, its dropout
as published, whose masks do differ between the branches. They train it with a cosine schedule of 4,000 levels."""


def network_for(size: tuple[int, int]) -> str:
    """The preset picked for images of ``size`` = (height, width) in pixels: by size, then one that fits."""
    side = min(size)
    first = "tiny" if side <= 12 else "small" if side <= 24 else "medium" if side <= 64 else "large"
    order = ("large", "medium", "small", "tiny")
    for name in order[order.index(first) :]:  # 28 x 28 does not halve three times: take the next smaller one
        if not any(pixels % 2 ** (len(NETWORKS[name].widths) - 1) for pixels in size):
            return name
    return first


def build_unet(preset: str, channels: int, size: tuple[int, int], classes: int | None = None) -> UNet2DModel:
    """A fresh ``UNet2DModel``; initial weights are drawn from torch's global generator (seed it first).

    Args:
        preset: Name in :data:`NETWORKS`.
        channels: Image channels.
        size: Height and width in pixels.
        classes: Condition on this many classes; None = unconditional.

    Raises:
        UsageError: If the size is not divisible as often as the network halves it.
    """
    shape = NETWORKS[preset]
    levels = range(len(shape.widths))
    check_size(size, 2 ** (len(shape.widths) - 1), preset)
    return UNet2DModel(
        sample_size=size[0] if size[0] == size[1] else size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=shape.widths,
        layers_per_block=shape.layers,
        down_block_types=tuple("AttnDownBlock2D" if i in shape.attention else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i in shape.attention else "UpBlock2D" for i in reversed(levels)),
        add_attention=bool(shape.attention),
        attention_head_dim=shape.head_width,
        norm_num_groups=shape.groups,
        dropout=shape.dropout,
        resnet_time_scale_shift="scale_shift" if shape.scale_shift else "default",
        num_class_embeds=classes,
    )


def check_size(size: tuple[int, int], multiple: int, network: str) -> None:
    """Refuse image sizes that the network cannot halve and double back.

    Raises:
        UsageError: Naming ``resolution`` and the nearest sizes that work.
    """
    if size[0] % multiple or size[1] % multiple:
        side = min(size)
        below = side // multiple * multiple
        choices = " or ".join(str(n) for n in (below, below + multiple) if n)
        raise UsageError(
            f"images of {size[1]} x {size[0]} do not fit network {network!r}, which needs multiples of {multiple}: "
            f"use `resolution` {choices}, or another `network`"
        )


MAX_NUMBER, MAX_LAYERS, MAX_BLOCKS = 2**16, 32, 16
"""Larger numbers in a network's configuration are slips of the pen, or damage: building would not end."""


def check_plausible(values: object) -> None:
    """Refuse a configuration that could not be built in bearable time.

    Args:
        values: A ``UNet2DModel`` configuration as read from JSON.

    Raises:
        ValueError: With what is wrong.
    """
    for name, value in values.items() if isinstance(values, dict) else ():
        if name.startswith("_"):  # diffusers' own remarks, such as the names of what was left at its default
            continue
        items = value if isinstance(value, list | tuple) else [value]
        if len(items) > MAX_BLOCKS:
            raise ValueError(f"{name!r:.40} has {len(items)} entries")
        low, high = (1, MAX_LAYERS) if name == "layers_per_block" else (-MAX_NUMBER, MAX_NUMBER)
        for item in items:
            if isinstance(item, int | float) and not low <= item <= high:
                raise ValueError(f"{name!r:.40} is {item!r:.40}")


def check_types(kind: type, config: Mapping[str, Any]) -> None:
    """Refuse values of other types than those that a class of diffusers has for defaults, which it does not do itself.

    Raises:
        ValueError: With what is wrong.
    """
    for name, parameter in inspect.signature(kind).parameters.items():
        default, value = parameter.default, config.get(name)
        if default in (None, parameter.empty) or value is None or name == "sample_size":
            continue
        alike: Any = type(default)
        if isinstance(default, int | float) and not isinstance(default, bool):
            alike = int | float
        elif isinstance(default, list | tuple):
            alike = list | tuple
        if not isinstance(value, alike) or (alike is not bool and isinstance(value, bool)):
            raise ValueError(f"{name} is {value!r:.40}")


def check_config(config: Mapping[str, Any]) -> None:
    """Build a network without memory and run it without arithmetic, so that nothing later finds what does not fit.

    Args:
        config: A complete ``UNet2DModel`` configuration.

    Raises:
        Exception: Of any type: diffusers and torch check little.
    """
    check_plausible(config)
    check_types(UNet2DModel, config)
    side = config["sample_size"]
    if side is None:
        raise ValueError("sample_size is missing")
    shape = (1, config["in_channels"], *((side, side) if isinstance(side, int) else side))
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DModel.from_config(config)
        size = sum(parameter.nbytes for parameter in unet.parameters())
        if size > psutil.virtual_memory().total:
            raise ValueError(f"its weights would take {size / 2**30:.0f} GiB, more than the memory of this machine")
        classes = unet.config["num_class_embeds"]
        labels = None if classes is None else torch.zeros(1, dtype=torch.long)
        answer = unet(torch.zeros(shape), torch.zeros(1, dtype=torch.long), class_labels=labels).sample
    if answer.shape[2:] != shape[2:] or len(shape) != 4:
        raise ValueError(f"images of {list(shape[2:])} do not fit it")


def size_multiple(unet: UNet2DModel) -> int:
    """What image sides must be divisible by."""
    halvings = len(unet.config["block_out_channels"]) - 1
    return 1 << halvings
