"""Images from any pipeline built on ``UNet2DModel``, and the free baselines that only change how it is queried."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from robustdiff.diffusion.clipping import ClippedModel
from robustdiff.diffusion.model import Denoiser, Model, call_model
from robustdiff.diffusion.networks import check_config, check_plausible, check_types
from robustdiff.diffusion.samplers import DifferentiableSampler
from robustdiff.diffusion.schedule import NoiseSchedule
from robustdiff.diffusion.sigma_floor import FloorShape, SigmaClampedModel
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError
from robustdiff.utils.random import draw_normal, image_generators

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


@dataclass(frozen=True)
class SamplerStep:
    """What a step callback sees before the network is called.

    Attributes:
        index: Number of the step, from 0.
        t: Timestep, shape ().
        x_t: State, shape (B, C, H, W).
        images: Index of each image in the whole request, length B.
    """

    index: int
    t: Tensor
    x_t: Tensor
    images: Sequence[int]


StepCallback = Callable[[SamplerStep], Tensor | None]
"""May return a new state, which the step then starts from."""

FAR = 2.0
"""Images lie in [-1, 1]; a sampler that ends further out than this has left what the data can reach."""


def load_pipeline(source: str | Path) -> DiffusionPipeline:
    """A pipeline with a ``UNet2DModel`` and a DDPM-type scheduler, from a folder or a hub id; safetensors only.

    Raises:
        UsageError: One line, if it cannot be found or read, or is built on something else.
    """
    folder = Path(source)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(f"{source} holds no pipeline (no model_index.json): give a run folder or a hub id")
    if not folder.exists() and (str(source).count("/") != 1 or str(source).startswith((".", "/", "~"))):
        raise UsageError(f"{source} does not exist: give a run folder, or a hub id such as google/ddpm-cifar10-32")
    try:
        if folder.exists():
            _check_folder(folder)
        pipeline = DiffusionPipeline.from_pretrained(str(source), use_safetensors=True)
    except Exception as error:  # whatever hub, network or file layer failed: the user needs the one reason
        reason = textwrap.shorten(str(error) or type(error).__name__, 160)
        kind = "cannot be read" if folder.exists() else "is no folder here, and could not be fetched from the hub"
        raise UsageError(f"{source} {kind}: {reason}") from error
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DModel) or not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise UsageError(
            f"{source} is a {type(pipeline).__name__}; only pipelines of a UNet2DModel and a DDPM-type scheduler work"
        )
    others = sorted(pipeline.components.keys() - {"unet", "scheduler"})
    if others:
        names = ", ".join(others)
        raise UsageError(f"{source} also needs {names} (latent diffusion?): only pixel-space pipelines work")
    if unet.config["out_channels"] != unet.config["in_channels"]:
        raise UsageError(f"{source} also predicts variances (learned_range): only fixed variances work")
    if unet.config["class_embed_type"] is not None and unet.config["num_class_embeds"] is None:
        raise UsageError(f"{source} is conditional on something else than class numbers: only those work")
    try:
        check_types(type(pipeline.scheduler), pipeline.scheduler.config)
        NoiseSchedule.from_scheduler(pipeline.scheduler)
        if any(parameter.is_meta for parameter in unet.parameters()):
            raise ValueError("some weights are missing")
        check_config(unet.config)
    except Exception as error:
        raise UsageError(f"{source} cannot be used: {atomic_io.one_line(error)}") from error
    return pipeline


def _check_folder(folder: Path) -> None:
    """Refuse what diffusers would import from elsewhere, ask the hub for, or not finish to build.

    Raises:
        ValueError: With what is wrong; OSError or RecursionError if a file cannot be read.
    """
    for name, part in atomic_io.read_json(folder / "model_index.json").items():
        if name.startswith("_") or not isinstance(part, list) or part == [None, None]:
            continue
        if len(part) != 2 or part[0] not in ("diffusers", "transformers"):
            raise ValueError(f"model_index.json: {name!r:.40} is {part!r:.80}")
        if PurePath(name).name != name or not (folder / name).is_dir():
            raise ValueError(f"there is no folder {name!r:.40}")
    unet, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    if unet.is_file():
        check_plausible(atomic_io.read_json(unet))
    if scheduler.is_file():
        # of the rest, betas may be many, and a bound may be -Infinity
        check_plausible({"num_train_timesteps": json.loads(scheduler.read_bytes()).get("num_train_timesteps")})


def weights_sha256(pipeline: DiffusionPipeline) -> str:
    """SHA-256 over the network's weights, in the order of their names."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(pipeline.unet.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def make_scheduler(name: str, like: Any, steps: int) -> Any:  # noqa: ANN401 - schedulers share no typed base
    """A sampler by name, configured as ``like`` (a scheduler), trailing spacing, set to ``steps`` steps.

    Raises:
        UsageError: If the name is unknown, ``like`` thresholds dynamically, or the sampler would mis-step: ``ddim``
            and ``ddpm`` move by a fixed stride, which is wrong unless ``steps`` divides the number of noise levels.

    It does not clip: its model does (:class:`~robustdiff.diffusion.clipping.ClippedModel`).
    """
    if name not in SCHEDULERS:
        raise UsageError(f"`scheduler` {name!r} is not one of {', '.join(SCHEDULERS)}")
    if like.config.get("thresholding"):
        raise UsageError("the scheduler thresholds dynamically, which is not supported here: set thresholding to false")
    total = like.config.num_train_timesteps
    if not isinstance(steps, int) or steps < 1:
        raise UsageError(f"`steps` {steps} must be a whole number, at least 1")
    if steps > total:
        raise UsageError(f"`steps` {steps}: there are {total} noise levels: use as many or fewer")
    if name in ("ddim", "ddpm") and total % steps:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - steps))
        raise UsageError(f"`steps` {steps} does not divide the {total} noise levels of {name}: use `steps` {nearest}")
    unclipped = {"clip_sample": False} if name in ("ddim", "ddpm") else {}
    scheduler = SCHEDULERS[name].from_config(like.config, timestep_spacing="trailing", **unclipped)
    scheduler.set_timesteps(steps)
    return scheduler


def clip_bound(scheduler: Any) -> float | None:  # noqa: ANN401 - schedulers share no typed base
    """The bound on the predicted image: ``clip_sample_range``, or None where a pipeline's scheduler says not to clip.

    A scheduler that says nothing of it (Euler, DPM-Solver) clips at 1, where images end.
    """
    return float(scheduler.config.get("clip_sample_range", 1.0)) if scheduler.config.get("clip_sample", True) else None


def trajectory_of(
    pipeline: DiffusionPipeline,
    scheduler: str = "ddim",
    steps: int = 50,
    timesteps: Sequence[int] | None = None,
) -> DifferentiableSampler:
    """The sampler that :func:`sample` runs, as a differentiable function; the tests hold both equal.

    Args:
        pipeline: As for :func:`sample`; class labels go into ``kwargs`` of the result (``dataclasses.replace``).
        scheduler: ``"ddim"`` or ``"ddpm"``.
        steps: Network calls per image.
        timesteps: Falling timesteps to go through instead, in [0, T).

    Raises:
        UsageError: If there is no such trajectory of this pipeline.
    """
    if scheduler not in ("ddim", "ddpm"):
        raise UsageError(f"`scheduler` {scheduler!r} cannot be attacked: use ddim or ddpm")
    stock = make_scheduler(scheduler, pipeline.scheduler, steps if timesteps is None else 1)
    config = stock.config
    variance = config.get("variance_type", "fixed_small") if scheduler == "ddpm" else "fixed_small"
    if variance not in ("fixed_small", "fixed_large"):
        raise UsageError(f"the scheduler's variance_type {variance!r} is not supported here: use `scheduler` ddim")
    return DifferentiableSampler.of(
        pipeline.unet,
        NoiseSchedule.from_scheduler(pipeline.scheduler),
        "ddim" if scheduler == "ddim" else "ddpm",
        [int(t) for t in (stock.timesteps if timesteps is None else timesteps)],
        final_alpha_bar=float(getattr(stock, "final_alpha_cumprod", 1.0)),
        large_variance=variance == "fixed_large",
        clip=clip_bound(pipeline.scheduler),
        clamp=True,
    )


def largest_divisor(total: int, at_most: int) -> int:
    """The largest divisor of ``total`` that is not above ``at_most`` >= 1: a step count without mis-steps."""
    return max(d for d in range(1, min(at_most, total) + 1) if total % d == 0)


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline,
    n: int | Sequence[int],
    *,
    seed: int = 0,
    scheduler: str = "ddim",
    steps: int = 50,
    batch_size: int = 64,
    sigma_scale: float = 1.0,
    sigma_floor: float = 0.0,
    floor_shape: FloorShape = "hard",
    class_labels: Sequence[int] | None = None,
    callback: StepCallback | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw images.

    Unless the pipeline's scheduler says not to (``clip_sample=False``), every sampler clips the predicted image, and
    takes the noise that goes with it. Stock ``DDIMPipeline`` does so with ``use_clipped_model_output=True``.

    Args:
        pipeline: Anything with a ``unet`` (``UNet2DModel``) and a DDPM-type ``scheduler``.
        n: Number of images, or the indices of the images wanted of a larger set.
        seed: Image i is drawn from a generator seeded with ``seed + i``, as stock pipelines do when given
            ``generator=[torch.Generator().manual_seed(seed + i) for i in range(n)]``.
        scheduler: One of :data:`SCHEDULERS`.
        steps: Network calls per image.
        batch_size: Images per call; does not change the images beyond rounding.
        sigma_scale: Query the network at this many times the noise level; see :class:`SigmaClampedModel`.
        sigma_floor: Query it at no noise level below this one; see :class:`SigmaClampedModel`.
        floor_shape: ``"hard"`` or ``"quadrature"``; see :class:`SigmaClampedModel`.
        class_labels: Class of each image, for class-conditional networks.
        callback: Called before each network call.
        progress: Called with the number of images of each finished batch.

    Returns:
        Images in [-1, 1], float32, on the CPU, shape (n, C, H, W).

    Raises:
        UsageError: If the scheduler, the steps or the batch size do not fit.
        ValueError: If a floor or factor is out of range, or if classes are missing, or given to a network without any.

    Warns:
        RobustdiffWarning: If images end far outside [-1, 1], which holding them there at last would hide.
    """
    denoiser, unet = Denoiser.of(pipeline), pipeline.unet
    indices = list(range(n)) if isinstance(n, int) else list(n)
    labels = None if class_labels is None else torch.tensor(class_labels, device=unet.device)
    denoiser.class_kwargs(labels)  # are they needed, and there?
    if labels is not None and len(labels) != len(indices):
        raise ValueError(f"got {len(labels)} class_labels for {len(indices)} images")
    model: Model = denoiser
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    if (sigma_scale, sigma_floor, floor_shape) != (1.0, 0.0, "hard"):
        model = SigmaClampedModel(denoiser, schedule, sigma_scale, sigma_floor, floor_shape)
    if (bound := clip_bound(pipeline.scheduler)) is not None:
        model = ClippedModel(model, schedule, bound)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"`batch_size` {batch_size} must be a whole number, at least 1")
    device, dtype = unet.device, unet.dtype
    shape = (denoiser.channels, *denoiser.size)
    images, furthest = [], torch.zeros(())
    was_training = unet.training
    unet.eval()
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        generators = image_generators(seed, batch)
        kwargs = denoiser.class_kwargs(None if labels is None else labels[start : start + batch_size])
        # A fresh scheduler per batch: multistep samplers keep a history.
        sampler = make_scheduler(scheduler, pipeline.scheduler, steps)
        step_takes = inspect.signature(sampler.step).parameters
        step_kwargs = {"generator": generators} if "generator" in step_takes else {}
        x_t = draw_normal(torch.empty(len(batch), *shape, device=device, dtype=dtype), generators)
        x_t = x_t * sampler.init_noise_sigma
        for index, t in enumerate(sampler.timesteps):
            if callback is not None:
                moved = callback(SamplerStep(index, t, x_t, batch))
                x_t = x_t if moved is None else moved
            output = call_model(model, sampler.scale_model_input(x_t, t), t, kwargs)
            x_t = sampler.step(output, t, x_t, **step_kwargs).prev_sample
        ended = x_t.float().cpu()
        furthest = torch.maximum(furthest, ended.abs().max())
        images.append(ended.clamp(-1, 1))
        if progress is not None:
            progress(len(batch))
    unet.train(was_training)
    if not furthest <= FAR:  # or not a number
        remedy = "use more `steps`" if bound is not None else "remove clip_sample=false from the pipeline's scheduler"
        message = (
            f"`scheduler` {scheduler} ended as far as {furthest:.4g} from 0, where images lie in [-1, 1]: {remedy}"
        )
        warnings.warn(message, RobustdiffWarning, stacklevel=3)
    return torch.cat(images) if images else torch.empty(0, *shape)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit values, rounded as diffusers' pipelines round them. Any shape."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def without_accelerator() -> bool:
    """Whether to run on the CPU: only if told so does accelerate join the processes of a launcher there."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def save_pipeline(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Write a pipeline into ``folder`` beside what is there; written aside first, then moved into place."""
    staging = folder / ".pipeline.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging, safe_serialization=True)
    for path in (staging, *staging.rglob("*")):
        if path.is_dir():
            atomic_io.fsync_folder(path)
        else:
            path.chmod(folder.stat().st_mode & 0o666)  # safetensors' own mode shuts other users out
            atomic_io.fsync_file(path)
    # The index comes last, when all that it names is there.
    for part in sorted(staging.iterdir(), key=lambda path: path.name == "model_index.json"):
        if part.is_dir():
            atomic_io.replace_folder(part, folder / part.name)
        else:
            part.replace(folder / part.name)
    atomic_io.remove(staging)  # on NFS an old file that somebody reads stays for a while
    atomic_io.fsync_folder(folder)
