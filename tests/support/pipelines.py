"""The smallest pipelines on disk: what they draw is nothing, how they are called is everything."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from robustdiff.diffusion.pipeline import load_pipeline

SMALL = {
    "block_out_channels": [4],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "add_attention": False,
}


def small_pipeline(prediction: str = "epsilon", classes: int | None = None) -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=classes, **SMALL)
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100, prediction_type=prediction))


def save_broken(model: Path) -> None:
    """The pipeline with a weight that is no number, in the folder ``broken`` here."""
    broken = load_pipeline(model)
    next(broken.unet.parameters()).data.fill_(torch.nan)
    broken.save_pretrained("broken")
