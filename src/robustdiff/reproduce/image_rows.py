"""What a row of the image grid is: which commands, in which order, and what their results say.

Everything is done by ``robustdiff train`` and ``robustdiff evaluate`` as anybody can type them, one process each, in
the folder of the experiment; this file only says which, and reads what they wrote.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustdiff import durable
from robustdiff.checkpoint import list_checkpoints
from robustdiff.config import UsageError
from robustdiff.corruption import from_uint8
from robustdiff.noise import noise_level
from robustdiff.reproduce.grid import IMAGE_DIRTS, ImageRow, Scale
from robustdiff.reproduce.results import summary
from robustdiff.reproduce.running import digest
from robustdiff.sampling import to_uint8
from robustdiff.version import __version__

FORMAT = 1
TRAINING, REFERENCE, VALIDATION = "data/training.npy", "data/reference.npy", "data/validation.npy"
"""The images of an experiment, uint8 (N, H, W, C), relative to its folder, where every command is run."""
STRIDE = 1_000_000
"""Row seed s draws image i with seed ``s STRIDE + i``; validation draws begin half a stride on."""


@dataclass(frozen=True)
class Command:
    """One call of ``robustdiff``.

    Attributes:
        arguments: After ``robustdiff``.
        doing: For people.
    """

    arguments: tuple[str, ...]
    doing: str


@dataclass(frozen=True)
class ImageTask:
    """One training with one seed, and the rows that need it: the run's own, and free or fine-tuned ones after it.

    Attributes:
        rows: Of the same dirt; the trained one first.
        seed: Of training and draws.
        scale: How large and how long.
        extractors: As ``--extractor`` takes them; the first is what rows are ranked by.
        folder: Of the experiment.
    """

    rows: tuple[ImageRow, ...]
    seed: int
    scale: Scale
    extractors: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.rows[0].name}-seed{self.seed}"


def trained_by(row: ImageRow) -> str:
    """The method whose run a row starts from: its own, or the plain one."""
    return "plain" if row.what.free or row.what.tuned else row.method


def run_of(row: ImageRow, method: str, seed: int) -> str:
    """A run's folder, relative to the experiment's."""
    return f"runs/{row.dirt}-{method}-seed{seed}"


def train_flags(row: ImageRow, method: str, scale: Scale, seed: int) -> tuple[str, ...]:
    """The command that trains ``method`` on the row's dirt, without ``--resume``."""
    what = ImageRow(row.world, row.dirt, method, 1).what
    images, start = scale.images, ("--network", scale.network)
    if what.tuned is not None:
        images, start = round(scale.images * what.tuned), ("--init-from", run_of(row, "plain", seed))
    flags = ["train", TRAINING, "--output-dir", run_of(row, method, seed), "--images", str(images)]
    flags += ["--seed", str(seed), "--train-batch-size", str(scale.batch), *start]
    flags += ["--preview-images", "0", "--logging-steps", "100"]
    for spec in IMAGE_DIRTS[row.dirt]:
        flags += ["--corrupt", spec]
    return (*flags, *scale.flags, *what.flags)


def evaluate_flags(task: ImageTask, source: str, output: str, title: str, told: str) -> tuple[str, ...]:
    """The command that judges ``source``, a run or an array of images, on the reference."""
    flags = ["evaluate", source, "--reference", REFERENCE, "--held-out", VALIDATION, "--training", TRAINING]
    flags += ["--output", output]
    flags += ["--title", title, "--told", told, "--cache", "features"]
    for extractor in task.extractors:
        flags += ["--extractor", extractor]
    return tuple(flags)


def drawing_flags(scale: Scale, n: int, seed: int) -> tuple[str, ...]:
    """How images are drawn."""
    return ("-n", str(n), "--steps", str(scale.steps), "--seed", str(seed))


def settings_of(row: ImageRow, scale: Scale) -> dict[str, Any]:
    """Everything that a row's numbers depend on beside seed, data, extractors and versions, as JSON."""
    base = trained_by(row)
    commands = [train_flags(row, base, scale, 0)]
    if row.what.tuned is not None:
        commands.append(train_flags(row, row.method, scale, 0))
    about: dict[str, Any] = {"commands": [" ".join(("robustdiff", *c)) for c in commands]}
    about |= {"resolution": scale.resolution, "channels": scale.channels, "images": scale.images}
    about |= {"sampler": f"ddim, trailing, {scale.steps} calls", "n": scale.samples}
    about |= {"training_images": scale.training, "reference_images": scale.reference}
    if row.what.free:
        about |= {"tried": list(row.what.tried), "tried_n": scale.choosing, "validation_images": scale.validation}
    return about


# -- the commands of a task ------------------------------------------------------------------------------


def commands(task: ImageTask) -> Iterator[Command | tuple[ImageRow, dict[str, Any]]]:
    """What has to be run, one after the other, and each row's result once its commands have.

    A generator: what comes next may depend on the results of what was run before.
    """
    first = task.rows[0]
    base = trained_by(first)
    yield from _train(task, first, base)
    for row in task.rows:
        if row.what.tuned is not None:
            yield from _train(task, row, row.method)
        output = f"evaluations/{row.dirt}-{row.method}-seed{task.seed}"
        chosen: dict[str, float] = {}
        source = run_of(row, row.method if row.what.tuned else base, task.seed)
        change: tuple[str, ...] = ()
        if row.what.free:
            setting = yield from _choose(task, row, source)
            chosen = {"chosen": setting}
            if row.what.free != "shrink":
                change = (f"--{row.what.free.replace('_', '-')}", f"{setting:g}")
        scale, seed = task.scale, task.seed * STRIDE
        drawing = (*drawing_flags(scale, scale.samples, seed), *change)
        if row.what.free == "shrink":
            plain = f"evaluations/{row.dirt}-plain-seed{task.seed}"
            if not list((task.folder / plain / "drawn").glob(f"*-n{scale.samples}-*.npy")):
                flags = evaluate_flags(task, source, plain, "plain", "nothing")
                yield Command((*flags, *drawing), f"judging plain for {row.name}")
            source = _shrink(task, plain, scale.samples, chosen["chosen"], f"{output}/shrunk.npy")
            drawing = ("--seed", str(seed))
        elif task.seed == 0:
            drawing = (*drawing, "--few-step", ",".join(map(str, scale.few)))
        flags = evaluate_flags(task, source, output, row.what.title, row.what.told)
        yield Command((*flags, *drawing), f"judging {row.name}, seed {task.seed}")
        yield row, {**collect(task, row, output), **chosen}


def _train(task: ImageTask, row: ImageRow, method: str) -> Iterator[Command]:
    """Train what is missing of a run: from its newest checkpoint, or from the start."""
    folder = task.folder / run_of(row, method, task.seed)
    if _finished(folder):
        return
    flags = train_flags(row, method, task.scale, task.seed)
    if list_checkpoints(folder / "checkpoints"):
        flags = (*flags, "--resume")
    elif folder.exists():
        flags = (*flags, "--overwrite")
    yield Command(flags, f"training {method} on {row.dirt}, seed {task.seed}")


def _finished(run: Path) -> bool:
    """Whether a run is whole: its last checkpoint is that of its last step, and the pipeline was written after it."""
    found = list_checkpoints(run / "checkpoints")
    if not found or not (run / "model_index.json").is_file():
        return False
    return int(found[-1].name.rpartition("-")[2]) == int(durable.read_json(run / "config.json")["plan"]["steps"])


def _choose(task: ImageTask, row: ImageRow, source: str) -> Generator[Command, None, float]:
    """Run what is needed to choose the setting of a free baseline; returns the setting."""
    scale, seed = task.scale, task.seed * STRIDE + STRIDE // 2
    judged = ("--reference", VALIDATION, "--training", "none", "--extractor", task.extractors[0], "--cache", "features")
    errors = {}
    for setting in row.what.tried:
        place = f"evaluations/{row.dirt}-{row.method}-seed{task.seed}/choosing/{setting:g}"
        drawing, images = drawing_flags(scale, scale.choosing, seed), source
        if row.what.free == "shrink":
            plain = f"evaluations/{row.dirt}-shrunk-seed{task.seed}/choosing/plain"
            if not list((task.folder / plain / "drawn").glob("*.npy")):
                yield Command(("evaluate", source, *judged, *drawing, "--output", plain), f"drawing for {row.name}")
            images, drawing = _shrink(task, plain, scale.choosing, setting, f"{place}/shrunk.npy"), ()
        else:
            assert row.what.free is not None
            drawing = (*drawing, f"--{row.what.free.replace('_', '-')}", f"{setting:g}")
        if not list((task.folder / place).glob("quality-*.json")):
            what = f"choosing for {row.name}, seed {task.seed}: {setting:g}"
            yield Command(("evaluate", images, *judged, *drawing, "--output", place), what)
        (value,) = [v for key, v in _values(task.folder / place, "quality").items() if key.startswith("F")]
        errors[setting] = value["value"]
    return min(errors, key=lambda setting: errors[setting])


def _shrink(task: ImageTask, drawn: str, n: int, factor: float, path: str) -> str:
    """Images pulled towards their mean, as an array; its path, relative to the experiment."""
    images = from_uint8(drawn_images(task.folder / drawn, n))
    mean = images.mean(0)
    (task.folder / path).parent.mkdir(parents=True, exist_ok=True)
    save_array(to_uint8(mean + factor * (images - mean)), task.folder / path)
    return path


def save_array(images: Tensor, path: Path) -> None:
    """Write images, uint8 (N, C, H, W), as the array (N, H, W, C) that every command reads; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    np.save(part, np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()))
    part.replace(path)


def read_array(path: Path) -> Tensor:
    """What :func:`save_array` wrote: uint8, shape (N, C, H, W)."""
    return torch.from_numpy(np.load(path, allow_pickle=False)).permute(0, 3, 1, 2)


def drawn_images(evaluation: Path, n: int) -> Tensor:
    """The images that an evaluation drew and kept, uint8 (n, C, H, W).

    Raises:
        UsageError: If there is not exactly one such file of the sampler that rows are judged with.
    """
    found = [path for path in (evaluation / "drawn").glob(f"*-n{n}-*.npy") if not path.name.startswith(".")]
    if not found:
        raise UsageError(f"{evaluation} has no drawn images: delete it and run again")
    # the few-step curve leaves files of fewer calls beside it
    path = max(found, key=lambda path: int(path.name.split("-")[1]))
    return torch.from_numpy(np.load(path, allow_pickle=False))


# -- what they found -------------------------------------------------------------------------------------


def _results(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [durable.read_json(path) for path in sorted(folder.glob("*.json"))]
    found = [result for result in found if result["kind"] == kind]
    if not found:
        raise UsageError(f"{folder} holds no result of the kind {kind}: delete it and run again")
    return found


def _values(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    return {key: value for result in _results(folder, kind) for key, value in result["values"].items()}


def collect(task: ImageTask, row: ImageRow, output: str) -> dict[str, Any]:
    """A row's numbers, floors and curves from what its evaluation wrote.

    Distances are of every extractor; shares and diversity of the first; near-copies, noise and spread of pixels.
    Noise is the mean blind estimate of the images, spread their standard deviation over that of the reference.
    """
    folder = task.folder / output
    values, floor = {}, {}
    curves: dict[str, Any] = {}
    main = ""
    by_name = {result["protocol"]["extractor"]["name"]: result for result in _results(folder, "quality")}
    for name, result in _ordered(by_name, task.extractors):
        for key, value in result["values"].items():
            distance = key.startswith(("F", "KID"))
            main = main or key
            if distance or name == main.partition("-")[2] or (main == "FID" and name == "inception"):
                name_here = "coverage_of_real" if key == "coverage" else key  # the plane has one of its own
                values[name_here], floor[name_here] = value["value"], value["floor"]
    copies = _values(folder, "memorisation")["near-copies"]
    values["near-copies"], floor["near-copies"] = copies["value"], copies["floor"]
    images = read_array(folder / "shrunk.npy") if row.what.free == "shrink" else None
    images = drawn_images(folder, task.scale.samples) if images is None else images
    real = read_array(task.folder / REFERENCE)
    values["noise"], floor["noise"] = mean_noise(images), mean_noise(real[: len(images)])
    values["image_spread"], floor["image_spread"] = float(images.double().std() / real.double().std()), 1.0
    if list(folder.glob("few-step-*.json")):
        (curve,) = next(
            result["details"]["curves"]
            for result in _results(folder, "few-step")
            if main in result["details"]["curves"][0]["values"]
        )
        pairs = dict(zip(curve["steps"], curve["values"][main], strict=True)) | {task.scale.steps: values[main]}
        curves = {"calls": sorted(pairs), "error_by_calls": [pairs[calls] for calls in sorted(pairs)]}
    runs = [run_of(row, trained_by(row), task.seed)] if not row.what.free else []
    runs += [run_of(row, row.method, task.seed)] if row.what.tuned is not None else []
    spent = [seconds_of(task.folder / run) for run in runs]
    hardware = next(iter(by_name.values()))["hardware"]
    return {
        "values": values,
        "floor": {key: value for key, value in floor.items() if value is not None},
        "curves": curves,
        "seconds": round(sum(spent), 2),
        "main": main,
        "hardware": hardware,
    }


def _ordered(by_name: Mapping[str, dict[str, Any]], extractors: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Results by extractor, that of the first ``--extractor`` first."""
    first = Path(extractors[0]).stem
    return sorted(by_name.items(), key=lambda item: (item[0] != first, item[0]))


def mean_noise(images: Tensor) -> float:
    """Mean of the blind noise estimates of images, uint8 (N, C, H, W); those that say nothing are left out."""
    levels = [level for image in images if (level := noise_level(image)) == level]
    return statistics.fmean(levels) if levels else float("nan")


def seconds_of(run: Path) -> float:
    """What a run's training took, over all of its pieces, by its own metrics; previews and checkpoints not counted."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    counts = [0, *(line["images"] for line in lines)]
    steps = zip(counts, lines, strict=False)
    return float(sum((line["images"] - before) / line["images_per_second"] for before, line in steps))


def record(
    row: ImageRow, task: ImageTask, experiment: str, about: Mapping[str, Any], runs: Mapping[str, Any]
) -> dict[str, Any]:
    """The row's file: every seed, and their mean and deviation."""
    runs = {seed: runs[seed] for seed in sorted(runs, key=int)}
    first = next(iter(runs.values()))
    return {
        "format": FORMAT,
        "experiment": experiment,
        "world": row.world,
        "dirt": row.dirt,
        "dirt_spec": list(IMAGE_DIRTS[row.dirt]),
        "method": row.method,
        "title": row.what.title,
        "family": None,
        "what": row.what.what,
        "told": row.what.told,
        "settings": settings_of(row, task.scale),
        "data": dict(about),
        "main": first["main"],
        "seeds": [int(seed) for seed in runs],
        "n": task.scale.samples,
        "values": summary([run["values"] for run in runs.values()]),
        "floor": summary([run["floor"] for run in runs.values()]),
        "curves": first["curves"],
        "seconds": round(sum(run["seconds"] for run in runs.values()), 2),
        "version": __version__,
        "torch": torch.__version__.split("+")[0],
        "hardware": first["hardware"],
        "runs": runs,
    }


def extractor_hashes(extractors: Sequence[str]) -> dict[str, str | None]:
    """SHA-256 of each extractor's file; None for what is not a file."""
    return {Path(name).stem: durable.sha256(Path(name)) if Path(name).is_file() else None for name in extractors}


def pixels_digest(images: Tensor) -> str:
    """Sixteen hexadecimal digits of an image set."""
    return digest([list(images.shape), images.double().sum(0).flatten().tolist()])
