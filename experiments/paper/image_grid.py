"""The image grid (cifar10, celeba, lsun), row by row, each a few commands side by side."""

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

import torch

from experiments.paper import tables
from experiments.paper.config import ReproduceConfig
from experiments.paper.image_figures import draw_images
from experiments.paper.image_folder import (
    check_claim,
    claim,
    done,
    folder_of,
    locked,
    prepared,
    read_images,
)
from experiments.paper.image_grid_spec import (
    KEY_DIRTS,
    SCALE,
    ImageRow,
    Scale,
    image_rows,
)
from experiments.paper.image_rows import (
    Command,
    ImageTask,
    commands,
    record,
    trained_by,
)
from experiments.paper.toy_grid import pick
from robustdiff.evaluation.extractors import open_extractor
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.resources import cores
from robustdiff.utils.signals import Interrupted, stop_signals

POLL = 0.2
"""Seconds between looks at the running commands."""
PATIENCE = 120.0
"""Seconds that a command has to save and end once it is told to."""


OUT_OF_TIME = 75
"""Exit status when ``--minutes`` are over and something is left to do (EX_TEMPFAIL of sysexits.h)."""


class RowFailed(Exception):
    """Commands of some rows ended with an error; the message is one line."""


def reproduce_images(config: ReproduceConfig) -> Path | None:
    """Run an image experiment, or what is missing of it; returns the page, or None with ``--list``.

    Raises:
        UsageError: If flags or images do not fit, or the folder holds results of other settings.
        Interrupted: If stopped from outside or by ``--minutes``; every finished row and seed is on disk.
        RowFailed: If a command of a row fails; the others are finished first.
    """
    deadline = None if config.minutes is None else time.monotonic() + 60 * config.minutes
    scale_name = config.scale or "cpu"
    scale = SCALE[scale_name].quick if config.quick else SCALE[scale_name]
    seeds = 2 if config.seeds is None else config.seeds
    every = image_rows(config.name, scale_name, quick=config.quick, seeds=seeds)
    rows = pick(every, config.rows)
    if config.list:
        print("\n".join(f"{row.name}  ({row.seeds} seed{'s'[: row.seeds > 1]}): {row.what.what}" for row in rows))
        return None
    # What is wrong with extractors or images is said before anything is written, or deleted
    specs = tuple(_absolute(spec) for spec in config.extractor) or ("pixels",)
    specs = specs if "pixels" in specs else (*specs, "pixels")
    extractors = [open_extractor(spec) for spec in specs]
    names = tuple(extractor.name for extractor in extractors)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two of --extractor are called {twice}: rename one of the files")
    hashes = [[extractor.name, extractor.sha256] for extractor in extractors]
    about = {"experiment": config.name, "scale": scale_name, "quick": config.quick, "extractors": hashes}
    about["data"] = Path(str(config.data)).name
    folder = folder_of(config, scale_name)
    if not config.overwrite:
        check_claim(folder, about)
    images = None if prepared(folder) and not config.overwrite else read_images(config, scale)
    with locked(folder) as lock:
        counts = claim(folder, about, images, config.overwrite)
        tasks = list(_tasks(rows, scale, specs, names, extractors[0].metric, folder))
        total, todo = sum(row.seeds for row in rows), sum(len(task.rows) for task in tasks)
        print(f"{folder}: {total} results, {total - todo} of them done, {len(tasks)} runs to go", flush=True)
        usual = 1 if torch.cuda.is_available() else scale.workers or cores()
        workers = min(config.workers or usual, max(1, len(tasks)))
        _Grid(config.name, {"extractors": dict(hashes), **counts}, tasks, workers, deadline, lock).run()
        return finish(folder, config)


def _absolute(spec: str) -> str:
    """An extractor as the commands, which run in another folder, find it."""
    kind, colon, path = spec.partition(":")
    if kind == "inception" and colon:
        return f"inception:{Path(path).expanduser().resolve()}"
    place = Path(spec).expanduser()
    return str(place.resolve()) if place.exists() else spec


def _tasks(
    rows: Sequence[ImageRow], scale: Scale, extractors: tuple[str, ...], names: tuple[str, ...], main: str, folder: Path
) -> Iterator[ImageTask]:
    """What is missing, in the order of the rows, first seeds first."""
    groups: dict[tuple[int, str, str], list[ImageRow]] = {}
    for seed in range(max(row.seeds for row in rows)):
        for row in rows:
            if seed < row.seeds and str(seed) not in done(row, scale, folder):
                groups.setdefault((seed, row.dirt, trained_by(row)), []).append(row)
    for (seed, _, method), members in groups.items():
        members.sort(key=lambda row: row.method != method)  # shrinking needs the plain run's images
        yield ImageTask(tuple(members), seed, scale, extractors, names, main, folder)


# -- side by side --------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """A task under way: what it still has to do, and the command that runs now."""

    task: ImageTask
    steps: Iterator[Any]
    process: subprocess.Popen[bytes] | None = None
    command: Command | None = None
    log: IO[bytes] | None = None
    left: list[ImageRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Every row is left to do."""
        self.left = list(self.task.rows)


@dataclass
class _Grid:
    """Runs tasks side by side; the only thread, so that commands die with it."""

    experiment: str
    about: Mapping[str, Any]
    waiting: list[ImageTask]
    workers: int
    deadline: float | None
    lock: int | None = None
    running: list[_Running] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Until everything is done, or told to stop, or out of time."""
        late = False
        with stop_signals() as stopped:
            try:
                while (self.running or self.waiting) and not stopped() and not late:
                    while self.waiting and len(self.running) < self.workers:
                        task = self.waiting.pop(0)
                        one = _Running(task, commands(task))
                        self.running.append(one)
                        self._next(one)
                    time.sleep(POLL)
                    for one in list(self.running):
                        if one.process is not None and one.process.poll() is not None:
                            self._ended(one)
                    late = self.deadline is not None and time.monotonic() > self.deadline
            finally:
                self._stop()
            failed = "; ".join(self.failed)
            if stopped() or (late and (self.running or self.waiting)):
                why = "stopped" if stopped() else "out of --minutes"
                also = f"; failed: {failed}" if failed else ""
                message = f"{why}; finished rows are kept: the same command goes on{also}"
                raise Interrupted(message, stopped() or OUT_OF_TIME)
        if failed:
            raise RowFailed(failed)
        print("all done", flush=True)

    def _next(self, one: _Running) -> None:
        """Begin the task's next command; write the results that stand before it."""
        try:
            for step in one.steps:
                if isinstance(step, Command):
                    self._begin(one, step)
                    return
                row, result = step
                runs = {**done(row, one.task.scale, one.task.folder), str(one.task.seed): result}
                body = record(row, one.task, self.experiment, self.about, runs)
                atomic_io.write_json(one.task.folder / "results" / f"{row.name}.json", body)
                one.left.remove(row)
                main = result["main"]
                print(f"{row.name}, seed {one.task.seed}: {main} {result['values'][main]:.5g}", flush=True)
        except (ValueError, KeyError) as error:  # what a command wrote cannot be read, or does not hold what it should
            self._give_up(one, atomic_io.one_line(error))
            return
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
            pass_fds=() if self.lock is None else (self.lock,),
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
            self._next(one)
            return
        self._give_up(one, f"{one.command.doing} ended with status {status}")

    def _give_up(self, one: _Running, why: str) -> None:
        log = one.task.folder / "logs" / f"{one.task.name}.txt"
        lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
        last = next((line for line in reversed(lines) if line.strip() and not line.startswith("$ ")), "")
        rows = ", ".join(row.method for row in one.left)
        self.failed.append(f"{why} (see logs/{log.name}: {last[:200]}); without a result: {rows}")
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


def finish(folder: Path, config: ReproduceConfig) -> Path:
    """Figures and the page, from everything that the folder holds."""
    rows = tables.load(folder / "results")
    print("drawing", flush=True)
    drawn = draw_images(folder, rows, KEY_DIRTS)
    notes = ["Quick run: a tiny network and a few images. Its numbers prove nothing."] * config.quick
    page = folder / "index.html"
    atomic_io.write_text(page, tables.page(rows, drawn, f"python -m experiments.paper {config.name}", notes))
    return page
