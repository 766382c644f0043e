"""``robustdiff attack`` on the smallest pipeline, and what its result file says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import small_pipeline
from robustdiff.attacks.benchmark.runner import Outcome
from robustdiff.commands import main

FAST = ("-n", "3", "--sweep-n", "2", "--steps", "2", "--iterations", "4", "--batch-size", "2", "--radius", "0.1")
FAST += ("--workers", "1")


def attack(pipeline: Path, output: Path, *more: str) -> dict[str, Any]:
    usual = FAST[:6] + FAST[8:] if "one-step" in more else FAST
    assert main.main(["attack", str(pipeline), "-o", str(output), *usual, *more]) == 0
    return result(output)


def command(run: Path, output: Path, *more: str) -> list[str]:
    usual = [word for pair in zip(FAST[::2], FAST[1::2], strict=True) if pair[0] not in more for word in pair]
    return ["attack", str(run), "-o", str(output), *usual, *more]


def result(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("attack-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def value(body: dict[str, Any], name: str) -> float:
    found: float = body["values"][name]["value"]
    return found


def raised(body: dict[str, Any]) -> set[str]:
    return {flag["name"] for flag in body["details"]["flags"] if flag["raised"]}


def stop_at(monkeypatch: pytest.MonkeyPatch, when: Callable[[list[str]], int | None]) -> list[str]:
    """Names of finished parts, as they come; the signal that ``when`` makes of them is sent to this process."""
    saves: list[str] = []
    save = Outcome.save

    def save_and_stop(self: Outcome, path: Path) -> None:
        save(self, path)
        saves.append(path.name)
        if (number := when(saves)) is not None:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Outcome, "save", save_and_stop)
    return saves


def run_folder(folder: Path, settings: dict[str, Any]) -> Path:
    small_pipeline().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    (folder / "data.json").write_text("{}")
    return folder
