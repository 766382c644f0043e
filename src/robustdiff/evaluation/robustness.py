"""What ``robustdiff attack`` does: a pipeline in, one JSON with curves and validity flags out."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from robustdiff import durable
from robustdiff.config import AttackConfig, EvaluateConfig, RobustdiffWarning, SampleConfig, UsageError
from robustdiff.evaluation import few_step, sheets
from robustdiff.evaluation.attacking import (
    CHECKED,
    EOT,
    VERDICTS,
    Batch,
    Cell,
    Outcome,
    join,
    lengths,
    plan,
    radius,
    twin,
)
from robustdiff.evaluation.gathering import digest, name_of, output_folder
from robustdiff.evaluation.quality import NORMAL_95
from robustdiff.evaluation.results import write_result
from robustdiff.evaluation.validity import (
    Flag,
    check_gain,
    check_huge,
    check_random,
    check_rising,
)
from robustdiff.machine import check_launcher, processes
from robustdiff.sample_files import class_labels
from robustdiff.sampling import SamplerStep, load_pipeline, sample, trajectory_of, weights_sha256, without_accelerator
from robustdiff.stopping import Interrupted, stop_signals
from robustdiff.threat import NoGradient
from robustdiff.trajectory import Trajectory

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
    labels = class_labels(
        SampleConfig(config.run, n=max(config.n, SPREAD_OF)), pipeline.unet.config["num_class_embeds"]
    )
    side = pipeline.unet.config["sample_size"]
    shape = (pipeline.unet.config["in_channels"], *((side, side) if isinstance(side, int) else side))
    if radius(config, shape) > 10 * (torch.Size(shape).numel() ** 0.5 if config.norm == "l2" else 1.0):
        raise UsageError(f"--radius {config.radius} is more than ten times the noise of each value: use a smaller one")
    protocol = _protocol(config, pipeline, shape)
    name = f"attack-{config.scheduler}-{digest(protocol)}"
    cells_at = folder / "attack-cells" / name
    if config.overwrite:
        shutil.rmtree(cells_at, ignore_errors=True)
    with stop_signals() as stopped:
        run = _Run(config, pipeline, trajectory, labels, shape, device, cells_at, stopped)
        try:
            return run.write(folder / f"{name}.json", protocol)
        except NoGradient as error:
            raise UsageError(f"{config.run}: {error}: it cannot be attacked through its gradients") from None


def _protocol(config: AttackConfig, pipeline: DiffusionPipeline, shape: Sequence[int]) -> dict[str, Any]:
    blind = config.noise in ("fixed", "fresh")
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
        "step_size": config.step_size,
        "momentum": config.momentum,
        "noise": (config.noise or "known") if config.scheduler == "ddpm" else None,
        "eot": (config.eot or EOT) if blind else None,
        "verdicts": (config.verdicts or VERDICTS) if blind else None,
    }
    sampler = {
        "scheduler": config.scheduler,
        "steps": config.steps,
        "timesteps": few_step.timesteps_of(pipeline, config.scheduler, config.steps),
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
    trajectory: Trajectory
    labels: Sequence[int] | None
    shape: tuple[int, ...]
    device: torch.device
    cells_at: Path
    stopped: Callable[[], int]

    # -- computing -------------------------------------------------------------------------------------

    def _batch(self, images: Sequence[int]) -> Batch:
        kwargs = {}
        if self.labels is not None:
            kwargs["class_labels"] = torch.tensor([self.labels[i] for i in images], device=self.device)
        trajectory = dataclasses.replace(self.trajectory, kwargs=kwargs)
        following = [(i + 1) % self.config.n for i in images]
        return Batch(self.config, trajectory, images, self.shape, self.device, lambda: self._batch(following).clean)

    @cached_property
    def _sweep(self) -> int:
        """Images that every flag and curve compares."""
        return min(self.config.sweep_n, self.config.n)

    def _batches(self, count: int) -> list[Batch]:
        """The first images, in batches."""
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
        settings = {"scheduler": self.config.scheduler, "steps": self.config.steps, "batch_size": len(images)}
        return sample(self.pipeline, images, seed=self.config.seed, class_labels=labels, callback=push, **settings)

    def _cells(self, cells: Sequence[Cell], everyone: Sequence[Batch]) -> dict[str, Outcome]:
        """Every cell of every batch: from disk, or computed and kept."""
        few = self._batches(self._sweep)
        parts = [(cell, batch) for cell in cells for batch in (everyone if cell.everywhere else few)]
        kept = [self._kept(self._path(cell, batch), len(batch.images)) for cell, batch in parts]
        work = [batch.work(cell) * len(batch.images) for cell, batch in parts]
        total = sum(size for size, found in zip(work, kept, strict=True) if found is None)
        shown, started = sys.stderr.isatty(), time.perf_counter()
        with tqdm(total=total, unit="call", unit_scale=True, disable=not shown, leave=False) as bar:
            done = 0

            def tell(calls: int) -> None:
                bar.update(calls)
                if status := self.stopped():
                    finished = sum(found is not None for found in kept)
                    message = f"stopped; {finished} of {len(parts)} parts are finished, the same command goes on"
                    raise Interrupted(message, status)

            for i, (cell, batch) in enumerate(parts):
                if kept[i] is not None:
                    continue
                bar.set_description(cell.name)
                many, replay = len(batch.images), self._replay if cell.name == "attack" else None
                outcome = batch.run(cell, lambda calls, many=many: tell(calls * many), replay)
                outcome.save(self._path(cell, batch))
                kept[i] = outcome
                done += work[i]
                if not shown and done < total:
                    left = _minutes((time.perf_counter() - started) / done * (total - done))
                    print(f"robustdiff: {cell.name}: part {i + 1} of {len(parts)}, {left} left", file=sys.stderr)
        found: dict[str, list[Outcome]] = {cell.name: [] for cell in cells}
        for (cell, _), outcome_or_none in zip(parts, kept, strict=True):
            assert outcome_or_none is not None
            found[cell.name].append(outcome_or_none)
        return {name: join(row) for name, row in found.items()}

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
        means = {name: float(o.moved[: self._sweep].mean()) / unit if unit else None for name, o in found.items()}
        flags += self._flags(cells, found, means, per_pixel)
        sheet = path.with_name(f"{path.stem}-images.png")
        pictures = ((clean / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        sheets.attacked_sheet(pictures, found["attack"].images, sheet)
        for name, images in (("undisturbed", pictures), ("attacked", found["attack"].images)):
            _save(images, path.with_name(f"{path.stem}-{name}.npy"))
        body = {
            "values": self._values(cells, found, unit, per_pixel),
            "details": {"flags": [flag.to_json() for flag in flags], **self._curves(cells, found, means, unit)},
            "sheets": {"attacked": sheet.name},
            "warnings": [_sentence(flag) for flag in flags if flag.raised],
        }
        about = {"run": config.run, "title": config.title, "told": config.told}
        protocol = {
            **protocol,
            "batch_size": config.batch_size,
            "spread_of": max(config.n, SPREAD_OF),
        }
        return write_result(path, "attack", about, protocol, body, time.perf_counter() - started)

    def _flags(
        self, cells: Sequence[Cell], found: Mapping[str, Outcome], means: Mapping[str, float | None], per_pixel: float
    ) -> list[Flag]:
        """Those that compare attacks."""
        short, usual, long = lengths(self.config)
        scores = {name: float(outcome.score[: self._sweep].mean()) for name, outcome in found.items()}
        by_radius = [scores[name] for name, _ in self._radii(cells)]
        by_steps = [scores[twin(cells, f"pgd-{steps}")] for steps in (short, usual, long)]
        strongest = max(scores[cell.name] for cell in cells if cell.factor == 1)
        huge = next(cell.name for cell in cells if cell.factor is None)
        asked, random = found["attack"].score, found[twin(cells, "random")].score
        if self.config.optimiser == "random":  # what was asked for is the baseline: the others must beat it
            asked, random = found[f"pgd-{usual}"].score, random[: self._sweep]
        mismatch = float(found["attack"].mismatch)
        replayed = Flag("sampler-mismatch", mismatch)
        if mismatch != mismatch:
            replayed = Flag("sampler-mismatch", 0.0, "not replayed: the result is judged on noise of its own")
        return [
            check_random(asked, random),
            check_rising("radius-not-monotone", by_radius),
            check_huge(means[huge]),
            check_rising("steps-not-monotone", by_steps),
            check_gain("not-converged", by_steps[1], by_steps[2]),
            check_gain("other-attack-stronger", scores["attack"], strongest),
            Flag("constraint-violated", max(float(outcome.excess) for outcome in found.values())),
            replayed,
            Flag("no-spread", per_pixel),
        ]

    def _radii(self, cells: Sequence[Cell]) -> list[tuple[str, float]]:
        """Cells of the radius curve and their radii, rising."""
        short = lengths(self.config)[0]
        rows = [(cell.name, cell.factor) for cell in cells if cell.factor not in (None, 1.0)]
        rows.append((twin(cells, f"pgd-{short}"), 1.0))
        unit = radius(self.config, self.shape)
        return sorted(((name, factor * unit) for name, factor in rows if factor is not None), key=lambda row: row[1])

    def _values(
        self, cells: Sequence[Cell], found: Mapping[str, Outcome], unit: float | None, per_pixel: float
    ) -> dict[str, Any]:
        """Displacements at the radius asked for, in units of the generated spread."""
        moved = {cell.name: found[cell.name].moved for cell in cells if cell.factor == 1}
        worst = moved["attack"].clone()
        for values in moved.values():  # those on fewer images count for these
            worst[: len(values)] = torch.maximum(worst[: len(values)], values)
        rows = {"displacement": moved.pop("attack"), "displacement, strongest of all": worst}
        for name, values in moved.items():
            few = f" (first {len(values)})" if len(values) < self.config.n else ""
            rows[f"displacement, {name}{few}"] = values
        values = {name: _value(distances, unit) for name, distances in rows.items()}
        pixels = torch.Size(self.shape).numel() ** 0.5
        values["moved per pixel"] = {**_value(rows["displacement"], pixels), "better": "lower"}
        values["generated spread per pixel"] = {**_value(None, None), "value": per_pixel}
        return values

    def _curves(
        self,
        cells: Sequence[Cell],
        found: Mapping[str, Outcome],
        means: Mapping[str, float | None],
        unit: float | None,
    ) -> dict[str, Any]:
        short, usual, long = lengths(self.config)
        names = [twin(cells, f"pgd-{steps}") for steps in (short, usual, long)]
        radii = self._radii(cells)
        sizes = {cell.name: cell.optimiser for cell in cells if " step " in cell.name}
        attacked = found["attack"]
        follow = self.config.objective == "end-to-end" and unit is not None
        return {
            "spread": unit,
            "by_radius": {"radius": [r for _, r in radii], "displacement": [means[name] for name, _ in radii]},
            "by_steps": {"steps": [short, usual, long], "displacement": [means[name] for name in names]},
            "by_step_size": {
                "step_size": [*(getattr(o, "step_size", None) for o in sizes.values()), 2.5 / short],
                "displacement": [*(means[name] for name in sizes), means[names[0]]],
            },
            "by_evaluation": _mean_root(attacked.trace, unit) if follow else None,
            "by_restart": _mean_root(attacked.restarts, unit) if follow else None,
            "per_image": [round(float(x), 6) for x in attacked.moved / unit] if unit else None,
        }


def _save(images: Tensor, path: Path) -> None:
    """uint8 (n, C, H, W) as an array that ``robustdiff evaluate`` reads, whole or not at all."""
    array = images.permute(0, 2, 3, 1).numpy()
    part = path.with_name(f".{path.name}")
    np.save(part, array[..., 0] if array.shape[-1] == 1 else array)
    durable.fsync_file(part)
    part.replace(path)


# -- numbers and words -----------------------------------------------------------------------------------


def _value(moved: Tensor | None, unit: float | None) -> dict[str, Any]:
    """An entry of ``values``: the mean over the images and its 95 % interval."""
    if moved is None or unit is None:
        return {"value": None, "floor": None, "better": "neither", "interval": None, "about": {}}
    mean, error = float(moved.mean()) / unit, float(moved.std()) / len(moved) ** 0.5 / unit
    interval = [mean - NORMAL_95 * error, mean + NORMAL_95 * error]
    about = {"n": len(moved), "largest": float(moved.max()) / unit, "smallest": float(moved.min()) / unit}
    return {"value": mean, "floor": None, "better": "lower", "interval": interval, "about": about}


def _mean_root(values: Tensor, unit: float | None) -> list[float]:
    """Squared distances (rows, B) to mean distances in spreads."""
    return [float(x) for x in values.clamp(min=0).sqrt().mean(1) / (unit or 1.0)]


def _sentence(flag: Flag) -> str:
    told = flag.to_json()
    value = "not measured" if told["value"] is None else f"{told['value']:.3g}, limit {told['limit']:g}"
    weight = "the result is not valid" if told["invalid"] else "a stronger attack may exist"
    return f"flag {flag.name} ({value}): {weight}; raised when {told['raised_when']}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
