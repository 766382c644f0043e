"""The model card of a run: what the model is, what it was trained on and how, and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from robustdiff.data.dataset import ImageDataset
from robustdiff.diffusion.sample_files import in_turn
from robustdiff.training.config import TrainConfig
from robustdiff.training.plan import Plan
from robustdiff.utils import atomic_io

_UNCONDITIONAL = """It is an ordinary diffusers pipeline:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
images = pipeline(batch_size=4).images
```

With fewer steps, by DDIM; without the last argument more of them would be worse:

```python
from diffusers import DDIMPipeline

fast = DDIMPipeline(pipeline.unet, pipeline.scheduler)
images = fast(batch_size=4, num_inference_steps=50, use_clipped_model_output=True).images
```
"""


_CONDITIONAL = """It is conditional on the class. The pipeline's own call passes no class labels: draw with its parts,
or with `robustdiff sample`:

```python
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
unet, labels = pipeline.unet, torch.tensor({labels})
scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
scheduler.set_timesteps(50)
sides = unet.config.sample_size if isinstance(unet.config.sample_size, (list, tuple)) else [unet.config.sample_size] * 2
x = torch.randn(4, unet.config.in_channels, *sides)
with torch.no_grad():
    for t in scheduler.timesteps:
        output = unet(x, t, class_labels=labels).sample
        # the noise of the clipped image: without it more steps are worse
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample  # ends in [-1, 1]
```
"""


def write_model_card(
    folder: Path,
    config: TrainConfig,
    plan: Plan,
    data: ImageDataset,
    dirt: tuple[str, ...],
    told: Mapping[str, str],
    step: int,
    classes: Sequence[int],
) -> None:
    """Write ``README.md``: what the model is, what it was trained on and how, and what was not measured."""
    header = ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation", tags=["robustdiff"])
    height, width = data.size
    usage = (_CONDITIONAL if classes else _UNCONDITIONAL).format(
        name=folder.name, labels=sorted(in_turn(classes[:4], 4)) if classes else None
    )
    colours = "1 channel" if data.channels == 1 else f"{data.channels} channels"
    known = "".join(f"| {name} | {value} |\n" for name, value in told.items())
    body = f"""# {folder.name}

A diffusion model of {width} x {height} images ({colours}), trained with robustdiff.
{usage}
| | |
|---|---|
| data | {len(data)} images ({len(data.skipped)} unreadable, skipped), see `data.json` |
| dirt added for the experiment | {"; ".join(dirt) or "none"} |
{known}| network | UNet2DModel, {plan.network}, {plan.parameters:,} parameters |
| objective | `{plan.objective}` |
| classes | {", ".join(data.classes) if classes else "unconditional"} |
| images seen | {step * plan.batch:,} of {plan.images:,} |
| seed | {config.seed} |

All settings: `config.json`. Loss curves: `metrics.jsonl`. Quality, diversity and copying have not been measured.
"""
    text = f"---\n{header.to_yaml()}\n---\n\n{body}"
    text = text.encode(errors="backslashreplace").decode()  # names of files may hold bytes that are no text
    atomic_io.write_text(folder / "README.md", text)
