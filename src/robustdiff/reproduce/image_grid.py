"""``robustdiff reproduce cifar10 | celeba | lsun``: the image grid, row by row, each a few commands side by side."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from robustdiff import durable
from robustdiff.config import ReproduceConfig, UsageError
from robustdiff.formats import DataError
from robustdiff.images import ImageSet, load_images
from robustdiff.machine import cores
from robustdiff.reproduce import tables
from robustdiff.reproduce.grid import (
    IMAGE_EXPERIMENTS,
    KEY_DIRTS,
    SCALE,
    ImageRow,
    Scale,
    image_rows,
)
from robustdiff.reproduce.image_figures import draw_images
from robustdiff.reproduce.image_rows import (
    REFERENCE,
    TRAINING,
    VALIDATION,
    Command,
    ImageTask,
    commands,
    extractor_hashes,
    pixels_digest,
    record,
    save_array,
    settings_of,
    trained_by,
)
from robustdiff.reproduce.rows import pick
from robustdiff.stopping import Interrupted, stop_signals

FORMAT = 1
POLL = 0.2
"""Seconds between looks at the running commands."""
PATIENCE = 120.0
"""Seconds that a command has to save and end once it is told to."""


class RowFailed(ArithmeticError):
    """A command of a row ended with an error; the message is one line."""


def reproduce_images(config: ReproduceConfig) -> Path | None:
    """Run an image experiment, or what is missing of it; returns the page, or None with ``--list``.

    Raises:
        UsageError: If flags or images do not fit, or the folder holds results of other settings.
        Interrupted: If stopped from outside or by ``--minutes``; every finished row and seed is on disk.
        RowFailed: If a command of a row fails; the others are finished first.
    """
    scale_name = config.scale or "cpu"
    scale = SCALE[scale_name].quick if config.quick else SCALE[scale_name]
    seeds = 2 if config.seeds is None else config.seeds
    every = image_rows(config.name, scale_name, quick=config.quick, seeds=seeds)
    rows = pick(every, config.rows)
    if config.list:
        print("\n".join(f"{row.name}  ({row.seeds} seed{'s'[: row.seeds > 1]}): {row.what.what}" for row in rows))
        return None
    extractors = tuple(str(Path(e).resolve()) if Path(e).exists() else e for e in config.extractor) or ("pixels",)
    if "pixels" not in extractors:
        extractors = (*extractors, "pixels")
    folder = _folder(config, scale_name)
    about = {
        "experiment": config.name,
        "scale": scale_name,
        "quick": config.quick,
        "extractors": extractor_hashes(extractors),
        "data": Path(str(config.data)).name,
    }
    claim(folder, about)
    counts = prepare(config, scale, folder)
    tasks = list(_tasks(rows, scale, extractors, folder))
    total, todo = sum(row.seeds for row in rows), sum(len(task.rows) for task in tasks)
    print(f"{folder}: {total} results, {total - todo} of them done, {len(tasks)} runs to go", flush=True)
    workers = config.workers or scale.workers or cores()
    deadline = None if config.minutes is None else time.monotonic() + 60 * config.minutes
    _Grid(config.name, {**about["extractors"], **counts}, tasks, workers, deadline).run()
    return finish(folder, config, scale)


def _folder(config: ReproduceConfig, scale: str) -> Path:
    folder = Path(config.output or f"reproduce/{config.name}-{scale}{'-quick' if config.quick else ''}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: name a folder")
    if config.overwrite and folder.exists():
        if any(folder.iterdir()) and not (folder / "experiment.json").is_file():
            raise UsageError(f"--output {folder} holds something else than an experiment: name another folder")
        durable.remove(folder)
    return folder


# -- what is trained on, and judged against ------------------------------------------------------------------


def prepare(config: ReproduceConfig, scale: Scale, folder: Path) -> dict[str, Any]:
    """Write the images of the experiment, or find that they are there; returns what they are, for the rows.

    Training images are the first of their split. Reference and validation images are the first of the other split; if
    there is none, or it is too small, they are the last of the training split, which are then not trained on.

    Raises:
        UsageError: If the images cannot be read or are too few.
    """
    note = folder / "data" / "data.json"
    if note.is_file():
        return durable.read_json(note)
    print("reading images", flush=True)
    first, second = IMAGE_EXPERIMENTS[config.name]
    training = _load(config, scale, first)
    judged = scale.reference + scale.validation
    other = _other(config, scale, second, judged)
    available = len(training) - (judged if other is None else 0)
    count = min(scale.training, available) if scale.training else available
    if count < scale.batch:
        raise UsageError(
            f"--data {config.data} has {len(training)} images in {first}: {judged} are needed to judge and at least "
            f"{scale.batch} to train; give more"
        )
    start = available if other is None else 0
    source = training if other is None else other
    parts: dict[str, Tensor] = {
        TRAINING: training.images[slice(0, count)],
        REFERENCE: source.images[slice(start, start + scale.reference)],
        VALIDATION: source.images[slice(start + scale.reference, start + judged)],
    }
    for name, images in parts.items():
        save_array(images, folder / name)
    about = {
        "kind": training.what,
        "judged_on": "the last images of the training split, not trained on" if other is None else other.what,
        **{Path(name).stem: len(images) for name, images in parts.items()},
        **{f"{Path(name).stem}_pixels": pixels_digest(images) for name, images in parts.items()},
    }
    durable.write_json(note, about)
    return about


def _load(config: ReproduceConfig, scale: Scale, split: str | None) -> ImageSet:
    assert config.data is not None
    try:
        return load_images(config.data, split=split, resolution=scale.resolution, channels=scale.channels)
    except DataError as error:
        if split is not None and "split" in str(error):  # digits, arrays and folders have none
            return _load(config, scale, None)
        raise UsageError(f"--data {error}") from None


def _other(config: ReproduceConfig, scale: Scale, split: str | None, count: int) -> ImageSet | None:
    """The split that rows are judged against, or None if there is none or it is too small."""
    try:
        found = load_images(str(config.data), split=split, resolution=scale.resolution, channels=scale.channels)
    except DataError as error:
        if "split" in str(error):
            return None
        raise UsageError(f"--data {error}") from None
    return found if len(found) >= count else None


# -- rows on disk --------------------------------------------------------------------------------------------


def claim(folder: Path, about: Mapping[str, Any]) -> None:
    """Make the folder this experiment's, or find that it is.

    Raises:
        UsageError: If it holds another one, or anything else.
    """
    note, about = folder / "experiment.json", {"format": FORMAT, **about}
    if note.is_file():
        found = durable.read_json(note)
        differ = [key for key in about if found.get(key) != about[key]]
        if differ:
            raise UsageError(
                f"--output {folder} holds an experiment with another {differ[0]}: name another folder, or add "
                "--overwrite"
            )
    elif folder.is_dir() and any(path.name != ".experiment.json.tmp" for path in folder.iterdir()):
        raise UsageError(f"--output {folder} holds something else than an experiment: name another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        durable.write_json(note, dict(about))
    for name in ("results", "logs"):
        (folder / name).mkdir(exist_ok=True)


def done(row: ImageRow, scale: Scale, folder: Path) -> dict[str, Any]:
    """Results by seed, as text; empty if there are none.

    Raises:
        UsageError: If the file holds results of other settings, or is damaged.
    """
    path = folder / "results" / f"{row.name}.json"
    if not path.is_file():
        return {}
    try:
        found = durable.read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({durable.one_line(error)}): delete it and run again") from None
    if found.get("settings") != settings_of(row, scale) or not isinstance(found.get("runs"), dict):
        raise UsageError(f"{path} holds results of other settings: delete it, or name another --output")
    runs: dict[str, Any] = found["runs"]
    return runs


def _tasks(rows: Sequence[ImageRow], scale: Scale, extractors: tuple[str, ...], folder: Path) -> Iterator[ImageTask]:
    """What is missing, in the order of the rows, first seeds first."""
    groups: dict[tuple[int, str, str], list[ImageRow]] = {}
    for seed in range(max(row.seeds for row in rows)):
        for row in rows:
            if seed < row.seeds and str(seed) not in done(row, scale, folder):
                groups.setdefault((seed, row.dirt, trained_by(row)), []).append(row)
    for (seed, _, method), members in groups.items():
        members.sort(key=lambda row: row.method != method)  # shrinking needs the plain run's images
        yield ImageTask(tuple(members), seed, scale, extractors, folder)


# -- side by side --------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A task under way: what it still has to do, and the command that runs now."""

    task: ImageTask
    steps: Iterator[Any]
    process: subprocess.Popen[bytes] | None = None
    command: Command | None = None
    log: IO[bytes] | None = None


@dataclass
class _Grid:
    """Runs tasks side by side; the only thread, so that commands die with it."""

    experiment: str
    about: Mapping[str, Any]
    waiting: list[ImageTask]
    workers: int
    deadline: float | None
    running: list[_Running] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Until everything is done, or told to stop, or out of time."""
        late = False
        with stop_signals() as stopped:
            while self.running or self.waiting:
                late = self.deadline is not None and time.monotonic() > self.deadline
                if stopped() or late:
                    break
                while self.waiting and len(self.running) < self.workers:
                    task = self.waiting.pop(0)
                    one = _Running(task, commands(task))
                    self.running.append(one)
                    self._next(one)
                time.sleep(POLL)
                for one in list(self.running):
                    if one.process is not None and one.process.poll() is not None:
                        self._ended(one)
            self._stop()
            if stopped() or (late and (self.running or self.waiting)):
                status = stopped() or 0
                why = "stopped" if stopped() else "out of --minutes"
                raise Interrupted(f"{why}; finished rows are kept: the same command goes on", status)
        if self.failed:
            raise RowFailed("; ".join(self.failed))

    def _next(self, one: _Running) -> None:
        """Begin the task's next command; write the results that stand before it."""
        for step in one.steps:
            if isinstance(step, Command):
                self._begin(one, step)
                return
            row, result = step
            runs = {**done(row, one.task.scale, one.task.folder), str(one.task.seed): result}
            body = record(row, one.task, self.experiment, self.about, runs)
            durable.write_json(one.task.folder / "results" / f"{row.name}.json", body)
            main = result["main"]
            print(f"{row.name}, seed {one.task.seed}: {main} {result['values'][main]:.5g}", flush=True)
        self.running.remove(one)

    def _begin(self, one: _Running, command: Command) -> None:
        print(command.doing, flush=True)
        folder = one.task.folder
        one.command, one.log = command, open(folder / "logs" / f"{one.task.name}.txt", "ab")  # noqa: SIM115
        one.log.write(f"$ robustdiff {shlex.join(command.arguments)}\n".encode())
        one.log.flush()
        environment = dict(os.environ)
        if self.workers > 1:  # one core each: more threads would fight
            environment["OMP_NUM_THREADS"] = "1"
        one.process = subprocess.Popen(
            [sys.executable, "-m", "robustdiff", *command.arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=one.log,
            stderr=one.log,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for us, who tell it to save
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )

    def _ended(self, one: _Running) -> None:
        assert one.process is not None
        assert one.log is not None
        assert one.command is not None
        one.log.close()
        status, one.process = one.process.returncode, None
        if status == 0:
            try:
                self._next(one)
            except (OSError, ValueError, KeyError) as error:  # what a command wrote cannot be read
                self._give_up(one, durable.one_line(error))
            return
        self._give_up(one, f"{one.command.doing} ended with status {status}")

    def _give_up(self, one: _Running, why: str) -> None:
        log = f"logs/{one.task.name}.txt"
        lines = (one.task.folder / log).read_text("utf-8", "replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")
        self.failed.append(f"{why} (see {log}: {last[:200]})")
        print(f"failed: {self.failed[-1]}", flush=True)
        self.running.remove(one)

    def _stop(self) -> None:
        """Tell every command to save and end, and wait for it."""
        for one in self.running:
            if one.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    one.process.send_signal(signal.SIGTERM)
        patience = time.monotonic() + PATIENCE
        for one in self.running:
            if one.process is not None:
                try:
                    one.process.wait(max(0.1, patience - time.monotonic()))
                except subprocess.TimeoutExpired:
                    one.process.kill()
                    one.process.wait()
            if one.log is not None:
                one.log.close()


def _die_with_parent() -> None:
    """Linux: be sent SIGTERM when the grid is killed outright, so that no run goes on unseen."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# -- what comes out ------------------------------------------------------------------------------------------


def finish(folder: Path, config: ReproduceConfig, scale: Scale) -> Path:
    """Figures and the page, from everything that the folder holds."""
    rows = tables.load(folder / "results")
    print("drawing", flush=True)
    drawn = draw_images(folder, rows, KEY_DIRTS, scale.samples)
    notes = ["Quick run: a tiny network and a few images. Its numbers prove nothing."] * config.quick
    page = folder / "index.html"
    durable.write_text(page, tables.page(rows, drawn, f"robustdiff reproduce {config.name}", notes))
    return page
