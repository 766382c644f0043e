"""The envelope that every result file has around its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from robustdiff import __version__
from robustdiff.evaluation.inputs import name_of
from robustdiff.utils import atomic_io

FORMAT = "robustdiff evaluation 1"


def write_result(
    path: Path,
    kind: str,
    about: Mapping[str, str | None],
    protocol: Mapping[str, Any],
    body: Mapping[str, Any],
    seconds: float,
) -> Path:
    """Write one result of ``evaluation/``, whole or not at all.

    Args:
        path: The file; its folder is made.
        kind: ``quality``, ``memorisation``, ``few-step`` or ``attack``.
        about: ``run``, ``title`` and ``told``, as the flags say them.
        protocol: What the numbers rest on.
        body: ``values``, ``details``, ``sheets``, ``warnings``.
        seconds: What it cost.

    Returns:
        ``path``.
    """
    device = PartialState().device
    hardware = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    )
    run = name_of(about["run"] or "")
    result = {
        "format": FORMAT,
        "kind": kind,
        "run": run,
        "title": about["title"] or run,
        "told": about["told"],
        "protocol": protocol,
        **body,
        "seconds": round(seconds, 2),
        "version": __version__,
        "torch": torch.__version__.split("+")[0],
        "hardware": hardware,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(path, result)
    return path
