"""Fixtures that the tests of several rooms use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import grey


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight 8 x 8 grey images in one folder."""
    for i in range(8):
        grey(tmp_path / "photos" / f"{i}.png", seed=i)
    return tmp_path / "photos"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: what a failed command writes would show up in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest pipeline, saved."""
    from pipelines import small_pipeline  # here, as tests that need no torch shall not wait for it

    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_for_the_spread() -> Iterator[None]:
    """Attacks measure how much two draws differ by eight images instead of many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustdiff.attacks.benchmark.run.SPREAD_OF", 8)
        yield
