"""What ``robustdiff attack`` does: a pipeline in, one JSON with curves and validity flags out."""

from __future__ import annotations

import dataclasses
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor

from robustdiff.attacks.batch_goals import FeatureDistance
from robustdiff.attacks.benchmark.grid import (
    EOT,
    VERDICTS,
    Cell,
    is_blind,
    is_joint,
    lengths,
    plan,
    radius,
)
from robustdiff.attacks.benchmark.quality import (
    Reference,
    measure,
    open_reference,
    quality,
)
from robustdiff.attacks.benchmark.runner import CHECKED, Batch, Outcome, join
from robustdiff.attacks.benchmark.summary import Summary, sentence
from robustdiff.attacks.config import AttackConfig
from robustdiff.attacks.goals import NoGradient
from robustdiff.diffusion.config import SampleConfig
from robustdiff.diffusion.model import Denoiser
from robustdiff.diffusion.pipeline import (
    SamplerStep,
    load_pipeline,
    sample,
    trajectory_of,
    weights_sha256,
    without_accelerator,
)
from robustdiff.diffusion.sample_files import class_labels
from robustdiff.diffusion.samplers import DifferentiableSampler, frozen
from robustdiff.evaluation import contact_sheets
from robustdiff.evaluation.config import EvaluateConfig
from robustdiff.evaluation.inputs import digest, name_of, output_folder
from robustdiff.evaluation.metrics import LEAST, timesteps_of
from robustdiff.evaluation.result_file import write_result
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import RobustdiffWarning, UsageError
from robustdiff.utils.parallel import metered, side_by_side
from robustdiff.utils.resources import check_launcher, free_memory, processes
from robustdiff.utils.signals import Interrupted, stop_signals

HELD = 6
"""Tensors of the size of all pushes that an optimiser has at a time: iterate, gradient, best, and what it steps by."""
MOST_WORKERS = 4
"""Attacks side by side, unless ``workers`` says otherwise."""
SPREAD_OF = 256
"""Undisturbed images, at least, whose spread displacements are measured by."""


def attack(config: AttackConfig) -> Path:
    """Attack as ``robustdiff attack`` does, and write the result.

    Returns:
        The JSON file.

    Raises:
        UsageError: In one line, if anything named cannot be used.
        Interrupted: On Ctrl-C or SIGTERM; what is finished is on disk, and the same command goes on.
    """
    config.validate()
    check_launcher()
    if processes() > 1:
        raise UsageError("attack runs in one process: start it without a launcher")
    folder = output_folder(EvaluateConfig(config.run, output=config.output))
    pipeline = load_pipeline(config.run)
    trajectory = trajectory_of(pipeline, config.scheduler, config.steps)
    device = PartialState(cpu=without_accelerator()).device
    pipeline.unet.to(device)
    denoiser = Denoiser.of(pipeline)
    labels = class_labels(SampleConfig(config.run, n=max(config.n, SPREAD_OF)), denoiser.num_classes)
    shape = (denoiser.channels, *denoiser.size)
    if radius(config, shape) > 10 * (torch.Size(shape).numel() ** 0.5 if config.norm == "l2" else 1.0):
        raise UsageError(f"`radius` {config.radius} is more than ten times the noise of each value: use a smaller one")
    reference = open_reference(config, shape, device)
    protocol = _protocol(config, pipeline, shape)
    measured = None
    if is_joint(config):
        assert isinstance(reference, Reference)  # it was asked for, and refused if there is none
        _check_memory(config, shape, device)
        measured = measure(config, reference, lambda: None)
        real = {name: reference.about[name] for name in ("sha256", "used") if name in reference.about}
        extractor = reference.extractors[0]
        protocol["attack"]["away_from"] = {**real, "extractor": extractor.name, "weights": extractor.sha256}
    name = f"attack-{config.scheduler}-{digest(protocol)}"
    cells_at = folder / "attack-cells" / name
    if config.overwrite:
        shutil.rmtree(cells_at, ignore_errors=True)
    with stop_signals() as stopped:
        run = _Run(config, pipeline, trajectory, labels, shape, device, reference, measured, cells_at, stopped)
        try:
            return run.write(folder / f"{name}.json", protocol)
        except NoGradient as error:
            raise UsageError(f"{config.run}: {error}: it cannot be attacked through its gradients") from None


def _check_memory(config: AttackConfig, shape: Sequence[int], device: torch.device) -> None:
    """A batch is attacked whole: its images are computed a few at a time, but all pushes are held at once.

    Raises:
        UsageError: If they will not fit.
    """
    needed = HELD * config.n * len(config.attacked()) * torch.Size(shape).numel() * 4
    if device.type == "cpu" and needed > (free := free_memory()):
        raise UsageError(
            f"`objective` {config.objective} holds the pushes of all {config.n} images at once, "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: lower `n`, or push fewer steps with `at` "
            "(`batch_size` does not help)"
        )


def _free_memory(device: torch.device) -> int:
    """Bytes; 0 where nobody can tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() if device.type == "cpu" else 0


def _protocol(config: AttackConfig, pipeline: DiffusionPipeline, shape: Sequence[int]) -> dict[str, Any]:
    blind = is_blind(config)
    attacker = {
        "knows": "weights, sampler" + ("" if blind else ", noise"),
        "norm": config.norm,
        "radius": radius(config, shape),
        "unit": "noise scale of each attacked sampler step",
        "at": list(config.attacked()),
        "objective": config.objective,
        "optimiser": config.optimiser,
        "iterations": None if config.optimiser == "one-step" else lengths(config)[1],
        "restarts": config.restarts,
        "starts": "random, the same for every attack of the run",
        "step_size": config.step_size,
        "momentum": config.momentum,
        "noise": (config.noise or "known") if config.scheduler == "ddpm" else None,
        "eot": (config.eot or EOT) if blind else None,
        "verdicts": (config.verdicts or VERDICTS) if blind else None,
    }
    sampler = {
        "scheduler": config.scheduler,
        "steps": config.steps,
        "timesteps": timesteps_of(pipeline, config.scheduler, config.steps),
        "seed": config.seed,
    }
    return {
        "attack": attacker,
        "n_generated": config.n,
        "n_sweep": min(config.sweep_n, config.n),
        "image": list(shape),
        "generated": {"source": name_of(config.run), "weights": weights_sha256(pipeline)},
        "sampler": sampler,
        "seeds": [config.seed],
    }


@dataclass(frozen=True, eq=False)
class _Run:
    config: AttackConfig
    pipeline: DiffusionPipeline
    trajectory: DifferentiableSampler
    labels: Sequence[int] | None
    shape: tuple[int, ...]
    device: torch.device
    reference: Reference | str
    measure: FeatureDistance | None
    cells_at: Path
    stopped: Callable[[], int]

    # -- computing -------------------------------------------------------------------------------------

    @cached_property
    def _graph_of_a_step(self) -> int:
        """Bytes that the gradient of one sampler step of a whole batch holds."""
        kwargs = {} if self.labels is None else {"class_labels": torch.tensor(self.labels[:1], device=self.device)}
        one = dataclasses.replace(self.trajectory, kwargs=kwargs)
        image = torch.zeros(1, *self.shape, device=self.device)
        return one.graph_bytes(image, self.config.attacked()[0]) * min(self.config.batch_size, self.config.n)

    @cached_property
    def workers(self) -> int:
        """Attacks side by side; by default no more than half of the free memory has room for."""
        if self.config.workers is not None or self.device.type != "cpu":
            return self.config.workers or 1
        room = _free_memory(self.device) // 2 // max(1, self._graph_of_a_step)
        return max(1, min(torch.get_num_threads(), MOST_WORKERS, room))

    @cached_property
    def checkpointed(self) -> bool:
        """Whether the network is computed again for gradients, because its graph through all steps is too large."""
        if self.config.gradient_checkpointing != "auto" or self.config.objective in ("shift", "residual"):
            return self.config.gradient_checkpointing == "always"
        steps = len(self.trajectory.steps) - self.config.attacked()[0]
        return self._graph_of_a_step * steps * self.workers > _free_memory(self.device) // 2

    def _batch(self, images: Sequence[int]) -> Batch:
        kwargs = {}
        if self.labels is not None:
            kwargs["class_labels"] = torch.tensor([self.labels[i] for i in images], device=self.device)
        trajectory = dataclasses.replace(self.trajectory, kwargs=kwargs)
        following = [(i + 1) % self.config.n for i in images]
        return Batch(
            self.config,
            trajectory,
            images,
            self.shape,
            self.device,
            lambda: self._batch(following).clean,
            self.measure,
            self.checkpointed,
        )

    def _batches(self, count: int) -> list[Batch]:
        """The first images, in batches; as one where they are attacked together."""
        if self.measure is not None:
            return [self._batch(range(count))]
        return [
            self._batch(range(start, min(start + self.config.batch_size, count)))
            for start in range(0, count, self.config.batch_size)
        ]

    def _replay(self, images: Sequence[int], omega: Tensor) -> Tensor:
        """The stock sampler, pushed through its step callback."""
        attacked, sigmas = self.config.attacked(), self.trajectory.sigmas(self.config.attacked(), omega)

        def push(step: SamplerStep) -> Tensor | None:
            if step.index not in attacked:
                return None
            k = attacked.index(step.index)
            return step.x_t + sigmas[k] * omega[:, k]

        labels = None if self.labels is None else [self.labels[i] for i in images]
        return sample(
            self.pipeline,
            images,
            seed=self.config.seed,
            scheduler=self.config.scheduler,
            steps=self.config.steps,
            batch_size=len(images),
            class_labels=labels,
            callback=push,
        )

    def _cells(self, cells: Sequence[Cell], everyone: Sequence[Batch]) -> dict[str, Outcome]:
        """Every cell of every batch: from disk, or computed and kept."""
        few = self._batches(min(self.config.sweep_n, self.config.n))
        parts = [(cell, batch) for cell in cells for batch in (everyone if cell.everywhere else few)]
        kept = [self._kept(self._path(cell, batch), len(batch.images)) for cell, batch in parts]
        missing = [i for i, outcome in enumerate(kept) if outcome is None]
        work = {i: parts[i][1].work(parts[i][0]) * len(parts[i][1].images) for i in missing}

        def check() -> None:
            self._check_stopped(f"{sum(outcome is not None for outcome in kept)} of {len(parts)}")

        def compute(i: int) -> None:
            cell, batch = parts[i]
            many, replay = len(batch.images), self._replay if cell.name == "attack" else None
            outcome = batch.run(cell, lambda calls: meter.tell(cell.name, calls * many), replay)
            outcome.save(self._path(cell, batch))
            kept[i] = outcome
            check()

        longest_first = sorted(missing, key=lambda i: -work[i])
        # frozen here, so that no worker that ends thaws what another still uses
        with metered(sum(work.values()), check) as meter, frozen(self.trajectory.modules):
            side_by_side([partial(compute, i) for i in longest_first], self.workers, meter.over)
        found: dict[str, list[Outcome]] = {cell.name: [] for cell in cells}
        for (cell, _), outcome_or_none in zip(parts, kept, strict=True):
            assert outcome_or_none is not None
            found[cell.name].append(outcome_or_none)
        return {name: join(row) for name, row in found.items()}

    def _check_stopped(self, finished: str) -> None:
        """Raises: Interrupted, if a signal has come."""
        if status := self.stopped():
            raise Interrupted(f"stopped; {finished} parts are finished, the same command goes on", status)

    def _path(self, cell: Cell, batch: Batch) -> Path:
        images = f"{batch.images[0]:06d}-{batch.images[-1]:06d}"
        return self.cells_at / f"{cell.name.replace(' ', '_')}-{images}.safetensors"

    def _kept(self, path: Path, count: int) -> Outcome | None:
        try:
            return Outcome.load(path, count)
        except ValueError as error:
            warnings.warn(f"{path} is damaged ({error}): it is computed again", RobustdiffWarning, stacklevel=2)
            return None

    def _spread(self, clean: Tensor) -> tuple[float, Tensor]:
        """Root of the summed variances of undisturbed images, with more of them if the attacked ones are few."""
        images = [clean]
        for start in range(self.config.n, SPREAD_OF, self.config.batch_size):
            more = list(range(start, min(start + self.config.batch_size, SPREAD_OF)))
            images.append(self._batch(more).clean.cpu())
        everything = torch.cat(images).double().flatten(1)
        return float(everything.var(0).sum().sqrt()), everything.var(0)

    # -- the result ------------------------------------------------------------------------------------

    def write(self, path: Path, protocol: Mapping[str, Any]) -> Path:
        """Compute what is missing, and write the JSON and its picture."""
        started, config = time.perf_counter(), self.config
        batches, cells = self._batches(config.n), plan(config)
        flags = self._batch(range(min(CHECKED, config.n))).check()
        found = self._cells(cells, batches)
        clean = torch.cat([batch.clean.cpu() for batch in batches])
        spread, variance = self._spread(clean)
        per_pixel = float(variance.mean().sqrt())
        unit = spread if per_pixel > 1e-4 else None
        away = batches[0].undisturbed_distance if self.measure is not None else None
        summary = Summary(config, self.shape, cells, found, per_pixel, unit, away)
        flags += summary.flags()
        sheet = path.with_name(f"{path.stem}-images.png")
        pictures = ((clean / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        contact_sheets.attacked_sheet(pictures, found["attack"].images, sheet)
        for name, images in (("undisturbed", pictures), ("attacked", found["attack"].images)):
            _save(images, path.with_name(f"{path.stem}-{name}.npy"))
        values, told = summary.values(), [sentence(flag) for flag in flags if flag.raised]
        judged, unjudged = None, self.reference
        if isinstance(self.reference, Reference) and config.n >= LEAST:
            shown = {"undisturbed": pictures, "attacked": found["attack"].images}
            judged = quality(config, self.reference, shown, lambda: self._check_stopped("all"))
            values |= judged.values
        elif isinstance(self.reference, Reference):
            unjudged = f"quality after the attack was not measured: that takes at least {LEAST} images: raise `n`"
        body = {
            "values": values,
            "details": {"flags": [flag.to_json() for flag in flags], **summary.curves()},
            "sheets": {"attacked": sheet.name},
            "warnings": [*told, *(judged.warnings if judged else [str(unjudged)])],
        }
        about = {"run": config.run, "title": config.title, "told": config.told}
        protocol = {
            **protocol,
            "batch_size": config.batch_size,
            "gradient_checkpointing": self.checkpointed,
            "workers": self.workers,
            "spread_of": max(config.n, SPREAD_OF),
            "quality": None if judged is None else judged.protocol,
        }
        return write_result(path, "attack", about, protocol, body, time.perf_counter() - started)


def _save(images: Tensor, path: Path) -> None:
    """uint8 (n, C, H, W) as an array that ``robustdiff evaluate`` reads, whole or not at all."""
    array = images.permute(0, 2, 3, 1).numpy()
    part = path.with_name(f".{path.name}")
    np.save(part, array[..., 0] if array.shape[-1] == 1 else array)
    atomic_io.fsync_file(part)
    part.replace(path)
