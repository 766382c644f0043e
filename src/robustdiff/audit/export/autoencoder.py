"""The autoencoder that a trainer's model works in, and clean images to ask it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustdiff.audit.result import AuditResult
from robustdiff.data.sources.open import HUB_ID
from robustdiff.utils.atomic_io import one_line
from robustdiff.utils.errors import DataError

IMAGES, LARGEST = 8, 512
"""How many images are encoded, and how much of each, in pixels from the centre."""


def encoder(path: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """Encode images as training does, and how many pixels one latent is across.

    Args:
        path: A folder of diffusers' ``AutoencoderKL``, a pipeline with one in ``vae``, or its name on the hub.

    Raises:
        DataError: If it is none.
    """
    from diffusers import AutoencoderKL

    if not Path(path).is_dir() and not HUB_ID.fullmatch(path):
        raise DataError(f"`export_vae` {path}: there is no such folder, and a name on the hub is OWNER/NAME")
    part = "vae" if (Path(path) / "vae").is_dir() else None
    try:
        vae = AutoencoderKL.from_pretrained(path, subfolder=part, use_safetensors=True).eval()  # never a pickle
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise DataError(f"`export_vae` {path}: no AutoencoderKL of diffusers ({one_line(error)})") from None
    shift, scale = float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad():  # one by one: a batch of large ones would need too much memory
            latents = [vae.encode(image[None].to(vae.dtype)).latent_dist.mean.float() for image in images]
        return (torch.cat(latents) - shift) * scale

    return encode, int(2 ** (len(vae.config.block_out_channels) - 1))


def clean_images(found: AuditResult, paths: Sequence[Path], across: int) -> Tensor:
    """The centres of a few of the cleanest images, as RGB in [-1, 1], all of one size.

    Raises:
        DataError: If the images are smaller than a few latents.
    """
    order = found.min_sigma.argsort(stable=True)
    clean = order[: max(IMAGES, int((found.min_sigma == found.min_sigma.min()).sum()))]
    chosen = clean[torch.linspace(0, len(clean) - 1, min(IMAGES, len(clean))).long()].tolist()
    read = []
    for place in chosen:
        with Image.open(paths[place]) as image:
            read.append(np.asarray(image.convert("RGB")))
    height, width = (min(LARGEST, *(pixels.shape[axis] for pixels in read)) // across * across for axis in (0, 1))
    if min(height, width) < 4 * across:
        raise DataError(f"`export_vae` needs images of {4 * across} pixels at least; these are smaller")
    middle = []
    for pixels in read:
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        middle.append(torch.tensor(pixels[top : top + height, left : left + width]).permute(2, 0, 1))
    return torch.stack(middle).float() / 127.5 - 1
