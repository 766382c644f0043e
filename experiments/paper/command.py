"""``python -m experiments.paper NAME``: rows side by side, one JSON each, resumable row by row and seed by seed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from experiments.paper import linear_gaussian, tables
from experiments.paper.config import IMAGE_GRIDS, ReproduceConfig
from experiments.paper.errors import ImageOptions, build_world, training_for
from experiments.paper.image_grid import RowFailed, reproduce_images
from experiments.paper.plot_set import draw_all
from experiments.paper.results import summary
from experiments.paper.toy_grid import DIRTS, Row, pick, rows_of
from experiments.paper.toy_training import Denoiser, digest
from experiments.paper.worker import Task, begin, row_settings, trained_network, work
from robustdiff import __version__
from robustdiff.utils import atomic_io
from robustdiff.utils.errors import UsageError
from robustdiff.utils.resources import cores
from robustdiff.utils.signals import STATUS, Interrupted, stop_signals

__all__ = ["RowFailed", "reproduce"]

FORMAT = 1


def reproduce(config: ReproduceConfig) -> Path | None:
    """Run an experiment, or what is missing of it; returns the page, or None with ``--list``.

    Raises:
        UsageError: If the flags do not fit, or the folder holds results of other settings.
        Interrupted: If stopped from outside; every finished row and seed is on disk.
    """
    if config.name in IMAGE_GRIDS:
        return reproduce_images(config)
    if config.name == "linear-gaussian":
        return _closed_forms(config)
    rows = pick(rows_of(config.name, quick=config.quick, seeds=_seeds(config)), config.rows)
    if config.list:
        print("\n".join(f"{row.name}  ({row.seeds} seed{'s'[: row.seeds > 1]}): {row.what.what}" for row in rows))
        return None
    images = ImageOptions(config.data or "digits", config.resolution, config.components or ImageOptions().components)
    for world in dict.fromkeys(row.world for row in rows):
        build_world(world, images)  # what is wrong with the images is said before anything is written
    folder = _folder(config)
    _claim(folder, {"experiment": config.name, "quick": config.quick, "images": _images(config, images)})
    tasks = list(_tasks(rows, config.quick, images, folder))
    total = sum(row.seeds for row in rows)
    todo = sum(len(task.rows) for task in tasks)
    print(f"{folder}: {total} results, {total - todo} of them done, {len(tasks)} networks to go", flush=True)
    _run(tasks, min(config.workers or cores(), max(1, len(tasks))))
    return _finish(folder, config, images)


def _seeds(config: ReproduceConfig) -> int:
    return 3 if config.seeds is None else config.seeds


def _images(config: ReproduceConfig, images: ImageOptions) -> dict[str, Any] | None:
    if config.name != "subspace":
        return None
    world = build_world("subspace", images)
    return {
        "data": Path(images.data).name,
        "resolution": images.resolution,
        "components": images.components,
        "smoothing": world.smoothing,  # type: ignore[attr-defined]
        "count": len(world.images),  # type: ignore[attr-defined]
        "pixels": digest(world.images.sum(0).flatten().tolist()),  # type: ignore[attr-defined]
        "explained_variance": round(world.explained, 4),  # type: ignore[attr-defined]
    }


def _folder(config: ReproduceConfig) -> Path:
    folder = Path(config.output or f"reproduce/{config.name}{'-quick' if config.quick else ''}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: name a folder")
    if config.overwrite and folder.exists():
        if any(folder.iterdir()) and not (folder / "experiment.json").is_file():
            raise UsageError(f"--output {folder} holds something else than an experiment: name another folder")
        atomic_io.remove(folder)
    return folder


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder this experiment's, or find that it is.

    Raises:
        UsageError: If it holds another one.
    """
    note = folder / "experiment.json"
    about = {"format": FORMAT, **about}
    if note.is_file():
        found = _read(note)
        if found != json.loads(json.dumps(about)):
            differ = ", ".join(key for key in about if found.get(key) != about[key]) or "format"
            raise UsageError(
                f"--output {folder} holds an experiment with another {differ}: name another folder, or add --overwrite"
            )
        (folder / "results").mkdir(exist_ok=True)
        return
    if folder.is_dir() and any(path.name != ".experiment.json.tmp" for path in folder.iterdir()):  # left by a kill
        raise UsageError(f"--output {folder} holds something else than an experiment: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(note, about)  # first: a folder that holds anything but has no note is a stranger's
    (folder / "results").mkdir()


def _read(path: Path) -> dict[str, Any]:
    try:
        return atomic_io.read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({atomic_io.one_line(error)}): delete it and run again") from None


# -- what comes out --------------------------------------------------------------------------------------


def _finish(folder: Path, config: ReproduceConfig, images: ImageOptions) -> Path:
    """Figures and the page, from everything that the folder holds."""
    rows = tables.load(folder / "results")
    by_name = {f"{row['world']}-{row['dirt']}-{row['method']}": row for row in rows}
    names = dict.fromkeys(row["world"] for row in rows)
    planned = {row.name: row for row in rows_of(config.name, quick=config.quick, seeds=_seeds(config))}

    def network(world: str, dirt: str, method: str) -> Denoiser | None:
        row = planned.get(f"{world}-{dirt}-{method}")
        if row is None or not (folder / "networks" / f"{row.name}-seed0.safetensors").is_file():
            return None
        return trained_network(row, 0, config.quick, images, folder)

    print("drawing", flush=True)
    worlds = {name: build_world(name, images) for name in names}
    drawn = draw_all(folder / "figures", worlds, by_name, network, config.quick)
    return _page(folder, config, rows, drawn)


def _page(folder: Path, config: ReproduceConfig, rows: list[dict[str, Any]], drawn: list[Path]) -> Path:
    notes = ["Quick run: short training, one seed. Its numbers show the mechanism and prove nothing."] * config.quick
    page = folder / "index.html"
    atomic_io.write_text(page, tables.page(rows, drawn, f"python -m experiments.paper {config.name}", notes))
    return page


def _closed_forms(config: ReproduceConfig) -> Path | None:
    """The experiment ``linear-gaussian``: one row per claim of docs/explanation/theory.md."""
    dimension, spectrum = config.dimension or 16, config.spectrum or "powerlaw"
    linear_gaussian.eigenvalues(spectrum, dimension)  # says what is wrong with them
    claims = list(linear_gaussian.CLAIMS)
    for pattern in config.rows:
        if not any(fnmatchcase(claim, pattern) for claim in claims):
            raise UsageError(f"--rows {pattern!r} matches none of: {', '.join(claims)}")
    claims = [c for c in claims if not config.rows or any(fnmatchcase(c, pattern) for pattern in config.rows)]
    if config.list:
        print("\n".join(claims))
        return None
    folder = _folder(config)
    about = {"experiment": config.name, "quick": config.quick, "dimension": dimension, "spectrum": spectrum}
    _claim(folder, about)
    with stop_signals() as stopped:
        for claim in claims:
            path = folder / "results" / f"{claim}.json"
            if path.is_file():
                print(f"{claim}: done before", flush=True)
                continue
            row = linear_gaussian.measure(claim, dimension=dimension, spectrum=spectrum, quick=config.quick, seed=0)
            atomic_io.write_json(path, row)
            print(f"{claim}: {row['seconds']:.1f} s", flush=True)
            if stopped():
                raise Interrupted("stopped; finished rows are kept: the same command goes on", stopped())
    return _page(folder, config, tables.load(folder / "results"), [])


# -- rows on disk --------------------------------------------------------------------------------------


def _done(row: Row, quick: bool, images: ImageOptions, folder: Path) -> dict[str, Any]:
    """Results by seed, as text; empty if there are none.

    Raises:
        UsageError: If the file holds results of other settings.
    """
    path = folder / "results" / f"{row.name}.json"
    if not path.is_file():
        return {}
    found = _read(path)
    if found.get("settings") != row_settings(row, quick, images) or not isinstance(found.get("runs"), dict):
        raise UsageError(f"{path} holds results of other settings: delete it, or name another --output")
    runs: dict[str, Any] = found["runs"]
    return runs


def _tasks(rows: Sequence[Row], quick: bool, images: ImageOptions, folder: Path) -> Iterator[Task]:
    """What is missing, in the order of the rows, first seeds first."""
    groups: dict[tuple[int, str, str, str], list[Row]] = {}
    for seed in range(max(row.seeds for row in rows)):
        for row in rows:
            if seed < row.seeds and str(seed) not in _done(row, quick, images, folder):
                groups.setdefault((seed, row.world, row.dirt, row.trained), []).append(row)
    for (seed, *_), members in groups.items():
        yield Task(tuple(members), seed, quick, images, folder)


def _record(row: Row, task: Task, runs: Mapping[str, Any]) -> None:
    """Write the row with all of its seeds."""
    runs = {seed: runs[seed] for seed in sorted(runs, key=int)}
    first = next(iter(runs.values()))
    about = {
        "format": FORMAT,
        "experiment": row.experiment,
        "world": row.world,
        "dirt": row.dirt,
        "dirt_spec": list(DIRTS[row.dirt]),
        "method": row.method,
        "title": row.what.title,
        "family": row.what.family,
        "what": row.what.what,
        "told": row.what.told,
        "settings": row_settings(row, task.quick, task.images),
        "seeds": [int(seed) for seed in runs],
        "n": training_for(build_world(row.world, task.images), task.quick).samples,
        "values": summary([run["values"] for run in runs.values()]),
        "floor": summary([run["floor"] for run in runs.values()]),
        "curves": first["curves"],
        "seconds": round(sum(run["seconds"] for run in runs.values()), 2),
        "version": __version__,
        "torch": torch.__version__.split("+")[0],
        "hardware": "cpu, 1 thread",
        "runs": runs,
    }
    atomic_io.write_json(task.folder / "results" / f"{row.name}.json", about)


# -- side by side ----------------------------------------------------------------------------------------


def _run(tasks: Sequence[Task], workers: int) -> None:
    """Train and judge, ``workers`` at a time; results are written as they come.

    Raises:
        Interrupted: If told to stop.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    event = context.Event()
    started, done, waiting = time.monotonic(), 0, list(tasks)
    with stop_signals() as stopped, ProcessPoolExecutor(workers, context, begin, (event,)) as pool:
        running: dict[Future[Any], Task] = {}
        try:
            while running or (waiting and not stopped()):
                if stopped():
                    event.set()  # what is in training stops; what is being judged is finished and kept
                while waiting and len(running) < workers and not stopped():
                    task = waiting.pop(0)
                    with _held_signals():
                        running[pool.submit(work, task)] = task
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    results = future.result()
                    if results is None:
                        continue
                    for row, result in zip(task.rows, results, strict=True):
                        runs = _done(row, task.quick, task.images, task.folder)
                        _record(row, task, {**runs, str(task.seed): result})
                    done += 1
                    elapsed = time.monotonic() - started
                    left = elapsed / done * (len(tasks) - done)
                    print(f"{done}/{len(tasks)} {task.name}: {elapsed:.0f} s, about {left:.0f} s to go", flush=True)
        except (BrokenProcessPool, KeyboardInterrupt) as error:
            for child in multiprocessing.active_children():
                child.kill()  # they heed no SIGTERM, which is what the pool sends; Python 3.12 would wait for ever
            if isinstance(error, KeyboardInterrupt) or not stopped():
                raise
        finally:
            event.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if stopped():
            raise Interrupted("stopped; finished rows are kept: the same command goes on", stopped())


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back: a process started meanwhile inherits that, and cannot die of one as it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
