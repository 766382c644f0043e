"""What tests of commands share: images to give them, the line that a mistake gets, what they leave on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustdiff.commands import main


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that wrong usage gets."""
    assert main.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("robustdiff: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error


def grey(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    """A grey image of seeded noise, of ``size`` = (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
