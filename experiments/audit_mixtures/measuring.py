"""Measuring sets, several at once, and the file that they are kept in."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from experiments.audit_mixtures import damages
from experiments.audit_mixtures.others import cleanvision, wavelet
from experiments.audit_mixtures.scores import score
from experiments.audit_mixtures.sets import FOREIGN, Row, make
from experiments.picture_sets import KINDS
from robustdiff.audit.run import audit
from robustdiff.utils import atomic_io

MEGABYTE = 1e6
PROTOCOL: dict[str, Any] = json.loads(
    json.dumps({"format": 1, "told": "nothing", "foreign": FOREIGN, "damages": damages.protocol()})
)
"""What rows of one file have in common."""


def measured(row: Row, folders: dict[str, Path]) -> dict[str, Any]:
    """Make a set, audit it, and set what was said beside the truth."""
    images, truth = make(row, folders)
    started = time.perf_counter()
    result = audit(images)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    drawn = row.source in KINDS and row.source not in folders
    return {
        "name": row.name,
        **asdict(row),
        **score(result, truth, images, copies_are_false=drawn),
        "seconds": round(seconds, 1),
        "peak_mb": round(peak / MEGABYTE),
        "wavelet": wavelet(images, truth),
        "cleanvision": cleanvision(images, truth),
    }


def known(path: Path) -> list[dict[str, Any]]:
    """Rows that are in the output already; ends in one line if it is of another experiment."""
    if not path.exists():
        return []
    try:
        found = atomic_io.read_json(path)
        protocol, rows = found["protocol"], found["rows"]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise SystemExit(f"--output {path} cannot be read ({atomic_io.one_line(error)}): name another file") from None
    if protocol != PROTOCOL:
        raise SystemExit(f"--output {path} was measured with other damage: name another file")
    return list(rows)


def written(rows: list[dict[str, Any]]) -> str:
    """JSON with a line for each row."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"protocol": {json.dumps(PROTOCOL)},\n"rows": [\n{lines}\n]}}\n'


def begin() -> None:
    """Keep this process to one thread, also of those that the audit starts: it asks who shares the machine."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count() or 1)


def apart(row: Row, folders: dict[str, Path]) -> dict[str, Any]:
    """:func:`measured` in a process of its own, so that its memory is its own, too."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=begin) as alone:
        return alone.submit(measured, row, folders).result()


def run(rows: list[Row], folders: dict[str, Path], output: Path, workers: int) -> list[str]:
    """Measure rows, several at once, and write each as it comes; names of those that failed."""
    done, failed = known(output), []
    with ThreadPoolExecutor(workers) as slots:
        waiting = {slots.submit(apart, row, folders): row.name for row in rows}
        for future in as_completed(waiting):
            if error := future.exception():
                failed.append(waiting[future])
                print(f"{waiting[future]} failed: {atomic_io.one_line(error)}", file=sys.stderr, flush=True)
                continue
            one = future.result()
            done.append({**one, "version": version("robustdiff")})
            atomic_io.write_text(output, written(done))
            false, clean = one["false"]["either"], one["images"] - one["damaged"]
            found = sum(part["found"] for kind in one["kinds"].values() for part in kind.values())
            said = f"{found} of {one['damaged']} found, {false} of {clean} clean ones lost, {one['seconds']:.0f} s"
            print(f"{one['name']}: {said}", flush=True)
    return failed
