"""What a row of the image grid is: which commands, in which order, and what their results say.

Everything is done by ``robustdiff train`` and ``robustdiff evaluate`` as anybody can type them, one process each, in
the folder of the experiment; this file only says which, and reads what they wrote.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.paper.image_grid_spec import FREE_FLAGS, IMAGE_DIRTS, ImageRow, Scale
from experiments.paper.results import summary
from experiments.paper.toy_training import digest
from robustdiff import __version__
from robustdiff.audit.single_image_noise import noise_std
from robustdiff.diffusion.pipeline import to_uint8
from robustdiff.training.checkpoint import list_checkpoints
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.images import from_uint8

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
        extractors: As ``--extractor`` takes them.
        names: What they are called, in that order.
        main: The measure that rows are ranked by: the Frechet distance of the first extractor.
        folder: Of the experiment.
    """

    rows: tuple[ImageRow, ...]
    seed: int
    scale: Scale
    extractors: tuple[str, ...]
    names: tuple[str, ...]
    main: str
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
    images, start = scale.images, ("--network", scale.network, *scale.schedule)
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
    about |= {"sampler": f"ddim, trailing, {scale.steps} calls, noise of the clipped image", "n": scale.samples}
    about |= {"training_images": scale.training, "reference_images": scale.reference}
    if row.what.free:
        about |= {"tried": list(row.what.tried), "tried_n": scale.choosing, "validation_images": scale.validation}
    return about


# -- the commands of a task ------------------------------------------------------------------------------


def commands(task: ImageTask) -> Iterator[Command | tuple[ImageRow, dict[str, Any]]]:
    """What has to be run, one after the other, and each row's result once its commands have.

    A generator: it goes on when the command that it gave has ended well, and what comes next may depend on that.
    """
    first = task.rows[0]
    base = trained_by(first)
    yield from _train(task, first, base)
    for row in task.rows:
        if row.what.tuned is not None:
            yield from _train(task, row, row.method)
        output, chosen = f"evaluations/{row.dirt}-{row.method}-seed{task.seed}", None
        source = run_of(row, row.method if row.what.tuned else base, task.seed)
        change: tuple[str, ...] = ()
        if row.what.free:
            chosen = yield from _choose(task, row, source)
            if row.what.free != "shrink":
                change = (*FREE_FLAGS[row.what.free], f"{chosen:g}")
        if row.what.free == "shrink":
            assert chosen is not None
            plain = f"evaluations/{row.dirt}-plain-seed{task.seed}"
            if first.method != "plain":  # else it was judged just now; what it drew is kept and not drawn again
                yield _judging(task, ImageRow(row.world, row.dirt, "plain", 1), source, plain, _drawing(task))
            source = _shrink(task, plain, chosen, f"{output}/shrunk.npy")
            drawing: tuple[str, ...] = ("--seed", str(task.seed * STRIDE))
        else:
            drawing = (*_drawing(task), *change)
        yield _judging(task, row, source, output, drawing)
        result = collect(task, row, output)
        yield row, result if chosen is None else {**result, "chosen": chosen}


def _drawing(task: ImageTask) -> tuple[str, ...]:
    """How the images of a row are drawn; the few-step curve is drawn for the first seed."""
    few = () if task.seed else ("--few-step", ",".join(map(str, task.scale.few)))
    return (*drawing_flags(task.scale, task.scale.samples, task.seed * STRIDE), *few)


def _judging(task: ImageTask, row: ImageRow, source: str, output: str, drawing: tuple[str, ...]) -> Command:
    """The command that judges a row; what an earlier one found is deleted, lest it be taken for its own."""
    _forget(task.folder / output)
    flags = evaluate_flags(task, source, output, row.what.title, row.what.told)
    return Command((*flags, *drawing), f"judging {row.name}, seed {task.seed}")


def _forget(evaluation: Path) -> None:
    for path in evaluation.glob("*.json"):
        path.unlink()


def _train(task: ImageTask, row: ImageRow, method: str) -> Iterator[Command]:
    """Train what is missing of a run: from its newest checkpoint, or from the start.

    ``runs/NAME.json``, with the run's flags, says that its command has ended well.

    Raises:
        UsageError: If the run was trained with other flags.
    """
    run, flags = run_of(row, method, task.seed), train_flags(row, method, task.scale, task.seed)
    folder, note = task.folder / run, task.folder / f"{run}.json"
    if note.is_file() and folder.is_dir():
        if read_json(note).get("arguments") != list(flags):
            raise UsageError(f"{folder} was trained with other flags: delete it and {note.name}, and run again")
        return
    if list_checkpoints(folder / "checkpoints"):
        yield Command((*flags, "--resume"), f"training {method} on {row.dirt}, seed {task.seed}, from its checkpoint")
    else:
        again = ("--overwrite",) if folder.exists() else ()
        yield Command((*flags, *again), f"training {method} on {row.dirt}, seed {task.seed}")
    atomic_io.write_json(note, {"arguments": list(flags)})


def read_json(path: Path) -> dict[str, Any]:
    """A file of the experiment.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        return atomic_io.read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({atomic_io.one_line(error)}): delete it and run again") from None


def _choose(task: ImageTask, row: ImageRow, source: str) -> Generator[Command, None, float]:
    """Judge every setting of a free baseline on validation images; returns the best."""
    scale, place = task.scale, f"evaluations/{row.dirt}-{row.method}-seed{task.seed}/choosing"
    judged = ("--reference", VALIDATION, "--training", "none", "--extractor", task.extractors[0], "--cache", "features")
    drawing = drawing_flags(scale, scale.choosing, task.seed * STRIDE + STRIDE // 2)
    what = f"choosing for {row.name}, seed {task.seed}"
    if row.what.free == "shrink":
        _forget(task.folder / place / "plain")
        yield Command(("evaluate", source, *judged, *drawing, "--output", f"{place}/plain"), f"{what}: drawing")
    errors = {}
    for setting in row.what.tried:
        output, images, how = f"{place}/{setting:g}", source, drawing
        if row.what.free == "shrink":
            images, how = _shrink(task, f"{place}/plain", setting, f"{output}/shrunk.npy"), ()
        else:
            assert row.what.free is not None
            how = (*drawing, *FREE_FLAGS[row.what.free], f"{setting:g}")
        _forget(task.folder / output)
        yield Command(("evaluate", images, *judged, *how, "--output", output), f"{what}: {setting:g}")
        errors[setting] = _values(task.folder / output, "quality")[task.main]["value"]
    return min(errors, key=lambda setting: errors[setting])


def _shrink(task: ImageTask, drawn: str, factor: float, path: str) -> str:
    """Images pulled towards their mean, as an array; its path, relative to the experiment."""
    images = from_uint8(drawn_images(task.folder / drawn))
    mean = images.mean(0)
    (task.folder / path).parent.mkdir(parents=True, exist_ok=True)
    save_array(to_uint8(mean + factor * (images - mean)), task.folder / path)
    return path


def save_array(images: Tensor, path: Path) -> None:
    """Write images, uint8 (N, C, H, W), as the array (N, H, W, C) that every command reads; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    np.save(part, np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()))
    atomic_io.fsync_file(part)
    part.replace(path)


def read_array(path: Path) -> Tensor:
    """What :func:`save_array` wrote: uint8, shape (N, C, H, W)."""
    return torch.from_numpy(np.load(path, allow_pickle=False)).permute(0, 3, 1, 2)


def drawn_images(evaluation: Path) -> Tensor:
    """The images that an evaluation judged, uint8 (n, C, H, W): those among what it drew whose hash its result names.

    Raises:
        UsageError: If they are gone.
    """
    wanted = _results(evaluation, "quality")[0]["protocol"]["generated"]["sha256"]
    for path in (evaluation / "drawn").glob("[!.]*.npy"):
        images = torch.from_numpy(np.load(path, allow_pickle=False))
        if hashlib.sha256(images.contiguous().numpy().data).hexdigest() == wanted:
            return images
    raise UsageError(f"{evaluation / 'drawn'} no longer holds the images judged: delete {evaluation} and run again")


# -- what they found -------------------------------------------------------------------------------------


def _results(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
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
    main = task.main
    by_name = {result["protocol"]["extractor"]["name"]: result for result in _results(folder, "quality")}
    for name in task.names:
        for key, value in by_name[name]["values"].items():
            if key.startswith(("F", "KID")) or name == task.names[0]:
                name_here = "coverage_of_real" if key == "coverage" else key  # the plane has one of its own
                values[name_here], floor[name_here] = value["value"], value["floor"]
    copies = _values(folder, "memorisation")["near-copies"]
    values["near-copies"], floor["near-copies"] = copies["value"], copies["floor"]
    images = read_array(folder / "shrunk.npy") if row.what.free == "shrink" else None
    images = drawn_images(folder) if images is None else images
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
    return {
        "values": values,
        "floor": {key: value for key, value in floor.items() if value is not None},
        "curves": curves,
        "seconds": round(sum(spent), 2),
        "main": main,
        "hardware": by_name[task.names[0]]["hardware"],
    }


def mean_noise(images: Tensor) -> float:
    """Mean of the blind noise estimates of images, uint8 (N, C, H, W); those that say nothing are left out."""
    levels = [level for image in images if (level := noise_std(image)) == level]
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
        "hardware": "; ".join(dict.fromkeys(run["hardware"] for run in runs.values())),
        "runs": runs,
    }


def pixels_digest(images: Tensor) -> str:
    """Sixteen hexadecimal digits of an image set."""
    return digest([list(images.shape), images.double().sum(0).flatten().tolist()])
