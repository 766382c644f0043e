"""Fixtures of the tests that stop, kill and starve runs: what they train on, and the run that nothing interrupts."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import command, run, write_inputs


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the processes that tests launch: equal bits on a machine with a GPU too."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images and the configuration of a tiny network."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(command(inputs, folder / "run"), folder / "log")[0] == 0
    return folder / "run"
