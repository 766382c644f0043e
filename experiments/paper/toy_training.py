"""A small denoiser of points: trained on any objective, kept on disk, sampled with diffusers' DDIM."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.paper.point_denoiser import PointDenoiser
from experiments.paper.toy_grid import Training
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.losses.denoising import DenoisingLoss
from robustdiff.losses.equivariance import Model
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.random import draw_normal
from robustdiff.utils.seeds import derive_seed

WARMUP = 200


def schedule_for(prediction: str) -> NoiseSchedule:
    """1000 linear betas (Ho et al. 2020)."""
    return NoiseSchedule.from_scheduler(DDPMScheduler(prediction_type=prediction))


@dataclass(frozen=True)
class Denoiser:
    """A network, or anything called like one, and the schedule that says what it predicts.

    Attributes:
        model: ``callable(x_t, t)``.
        schedule: Its noise schedule.
        seconds: What its training took.
    """

    model: Model
    schedule: NoiseSchedule
    seconds: float = 0.0

    def eps_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The predicted noise at states (n, d) and timestep ()."""
        return self.schedule.eps_hat(self.model(x_t, t), x_t, t)

    def x0_hat(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The denoised points."""
        return self.schedule.x0_hat(self.model(x_t, t), x_t, t)


class Stopped(Exception):
    """Training was told to stop; nothing of it is kept."""


def train(
    objective: DenoisingLoss, x0: Tensor, training: Training, seed: int, stop: Callable[[], bool] = lambda: False
) -> PointDenoiser:
    """Train a ``PointDenoiser`` and return its moving average.

    Args:
        objective: Of the schedule above.
        x0: Training points, shape (n, d), float32.
        training: Sizes and lengths.
        seed: Rules initial weights, batches and every draw.
        stop: Asked every 50 steps.

    Raises:
        Stopped: If ``stop`` says so.
        ArithmeticError: If the loss is not finite.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(derive_seed("initial weights", seed))
        model = _network(x0.shape[1], training)
        with torch.no_grad():
            model.first.weight.mul_(training.input_scale)
    generator = torch.Generator().manual_seed(derive_seed("training", seed))
    optimiser = torch.optim.AdamW(
        model.parameters(), training.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    lr_schedule = get_scheduler("cosine", optimiser, num_warmup_steps=WARMUP, num_training_steps=training.steps)
    average = EMAModel(model.parameters(), decay=0.999, foreach=True)
    for step in range(training.steps):
        batch = x0[torch.randint(len(x0), (training.batch_size,), generator=generator)]
        loss = objective(model, batch, generator=generator).total.mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        lr_schedule.step()
        average.step(model.parameters())
        if step % 50 == 0:
            if not torch.isfinite(loss):
                raise ArithmeticError(f"the loss is not finite at step {step} of {training.steps}")
            if stop():
                raise Stopped
    average.copy_to(model.parameters())
    return model.eval().requires_grad_(False)


def _network(dimension: int, training: Training) -> PointDenoiser:
    return PointDenoiser(dimension, training.width, training.depth, modulated=training.modulated)


def digest(settings: object) -> str:
    """Sixteen hexadecimal digits that differ when ``settings``, anything JSON can hold, do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def save(model: PointDenoiser, path: Path, settings: object, seconds: float) -> None:
    """Write the weights, whole or not at all, with a digest of the settings and the seconds of their training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(model.state_dict(), part, {"settings": digest(settings), "seconds": f"{seconds:.2f}"})
    atomic_io.fsync_file(part)
    os.replace(part, path)


def load(path: Path, dimension: int, training: Training, settings: object) -> tuple[PointDenoiser, float] | None:
    """The network at ``path`` and the seconds of its training, or None if there is none of these settings.

    Raises:
        UsageError: If the file cannot be read.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if about.get("settings") != digest(settings):
            return None
        model = _network(dimension, training)
        model.load_state_dict(load_file(path))
        seconds = float(about.get("seconds", 0))
    except Exception as error:  # safetensors and torch raise types of their own
        raise UsageError(f"{path} cannot be read ({atomic_io.one_line(error)}): delete it and run again") from None
    return model.eval().requires_grad_(False), seconds


def settings_of(training: Training, prediction: str) -> dict[str, object]:
    """The training as JSON, with the schedule; an input scale of 1 and no modulation are left out."""
    usual = {"input_scale": 1.0, "modulated": False}
    lengths = {key: value for key, value in asdict(training).items() if key not in usual or usual[key] != value}
    return {**lengths, "betas": "linear, 1000", "prediction": prediction, "sampler": "ddim, trailing"}


@torch.no_grad()
def draw(
    denoiser: Denoiser,
    n: int,
    dimension: int,
    calls: int,
    seed: int,
    watch: Callable[[Tensor, Tensor], object] | None = None,
) -> Tensor:
    """``n`` points in ``calls`` DDIM steps, shape (n, dimension); nothing is clipped.

    Args:
        denoiser: Network and schedule.
        n: Number of points; all in one batch.
        dimension: Coordinates of a point.
        calls: Must divide the 1000 noise levels.
        seed: The same for every model that is compared.
        watch: Sees every state with its timestep, (n, d) and (), before the network does.
    """
    sampler = DDIMScheduler(
        prediction_type=denoiser.schedule.prediction.name, clip_sample=False, timestep_spacing="trailing"
    )
    sampler.set_timesteps(calls)
    generator = torch.Generator().manual_seed(derive_seed("sampling", seed))
    x_t = draw_normal(torch.empty(n, dimension), generator)
    for t in sampler.timesteps:
        if watch is not None:
            watch(x_t, t)
        x_t = sampler.step(denoiser.model(x_t, t), t, x_t).prev_sample
    return x_t
