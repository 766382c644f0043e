"""What a run leaves behind: the pipeline, metrics, the model card, and what is shown while it goes."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCardData
from torch import Tensor
from tqdm.auto import tqdm

from robustdiff.config import TrainConfig
from robustdiff.images import ImageSet
from robustdiff.objective import LossTerms
from robustdiff.planning import Plan
from robustdiff.process import NoiseProcess


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what is safe."""


class Metrics:
    """``metrics.jsonl``: means of the loss terms since the last line, fetched from the device once per line."""

    def __init__(self, path: Path, step: int) -> None:
        """Keep the lines up to ``step`` of an earlier part of the run; later ones will be written again."""
        self.path = path
        self._window: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._kept: list[str] | None = []
        for line in path.read_text().splitlines(keepends=True) if path.is_file() else []:
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):  # cut off by a crash: it is later than the checkpoint
                break
            self._kept.append(line)

    def add(self, step: int, terms: LossTerms) -> None:
        """Add a batch; no device sync."""
        active = (terms.strength > 0).to(terms.total.dtype)
        parts = [terms.total, terms.denoising, terms.equivariance, terms.radius, active]
        means = torch.stack([part.detach().mean() for part in parts])
        self._window.append((step, means, terms.total.detach(), terms.t))

    def collect(self, accelerator: Accelerator, process: NoiseProcess) -> dict[str, float]:
        """Means since the last call, over all processes.

        Raises:
            TrainingError: If a loss was not finite; names the step and the noise level.
        """
        mean = accelerator.reduce(torch.stack([means for _, means, _, _ in self._window]).mean(0), "mean").tolist()
        if not math.isfinite(mean[0]):  # the reduced value: every process stops, whichever met it
            raise TrainingError(self._where(process))
        self._window = []
        total, denoising, equivariance, radius, active = mean
        # The radius is averaged over the regularised images only.
        radius = radius / active if active else 0.0
        named = {"loss": total, "denoising": denoising, "equivariance": equivariance}
        return {**named, "radius": radius, "regularised": active}

    def _where(self, process: NoiseProcess) -> str:
        for step, _, losses, t in self._window:
            bad = ~torch.isfinite(losses).cpu()
            if bad.any():
                level = process.noise_to_signal(t.cpu()[bad][:1]).item()
                return f"the loss is not finite at step {step}, at noise level sigma/alpha = {level:.3g}"
        return f"the loss is not finite on another process, after step {self._window[0][0]}"

    def write(self, record: dict[str, float]) -> None:
        """Append one line."""
        with self.path.open("w" if self._kept is not None else "a") as file:
            file.writelines([*(self._kept or []), json.dumps(record) + "\n"])
        self._kept = None


def save_pipeline(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Write a pipeline into ``folder`` beside what is there; written aside first, then moved into place."""
    staging = folder / ".pipeline.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging, safe_serialization=True)
    for part in sorted(staging.iterdir(), key=lambda path: path.name == "model_index.json"):
        if part.is_dir():
            shutil.rmtree(folder / part.name, ignore_errors=True)
        part.replace(folder / part.name)
    staging.rmdir()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON aside and rename, so that the file is never half there."""
    staging = path.with_name(path.name + ".tmp")
    staging.write_text(json.dumps(value, indent=2) + "\n")
    staging.replace(path)


def write_model_card(
    folder: Path, config: TrainConfig, plan: Plan, data: ImageSet, dirt: tuple[str, ...], step: int
) -> None:
    """Write ``README.md``: what the model is, what it was trained on and how, and what was not measured."""
    header = ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation", tags=["robustdiff"])
    height, width = data.size
    call = f'DiffusionPipeline.from_pretrained("{folder.name}")'
    colours = "1 channel" if data.channels == 1 else f"{data.channels} channels"
    body = f"""# {folder.name}

A diffusion model of {width} x {height} images ({colours}), trained with robustdiff.
It is an ordinary diffusers pipeline:

```python
from diffusers import DiffusionPipeline

pipeline = {call}
images = pipeline(batch_size=4).images
```

| | |
|---|---|
| data | {len(data)} images ({len(data.skipped)} unreadable, skipped), see `data.json` |
| dirt added for the experiment | {"; ".join(dirt) or "none"} |
| network | UNet2DModel, {plan.network}, {plan.parameters:,} parameters |
| objective | `{plan.objective}` |
| images seen | {step * plan.batch:,} of {plan.images:,} |
| seed | {config.seed} |

All settings: `config.json`. Loss curves: `metrics.jsonl`. Quality, diversity and copying have not been measured.
"""
    (folder / "README.md").write_text(f"---\n{header.to_yaml()}\n---\n\n{body}")


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, step: int, plan: Plan, enabled: bool) -> None:
        """Start at ``step``."""
        self.total, self.first, self.started = plan.steps, step, time.perf_counter()
        self.printed, self.enabled = 0.0, enabled
        terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=plan.steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, record: dict[str, float]) -> None:
        """Show loss terms, speed and time left."""
        text = f"denoising {record['denoising']:.4f}  equivariance {record['equivariance']:.4f}"
        text += f"  {record['images_per_second']:.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        now = time.perf_counter()
        step = int(record["step"])
        if self.enabled and (now - self.printed > 10 or step == self.total):
            self.printed = now
            left = (now - self.started) / max(1, step - self.first) * (self.total - step)
            print(f"step {step}/{self.total}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()
