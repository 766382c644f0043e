"""Threads that decode: in order, however long each takes; one that hangs in a read is not waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from robustdiff.data.decode_pool import CHUNK, _mapped, decode_all
from robustdiff.data.sources.open import open_source

HANGS = """
import signal, sys, threading
from robustdiff.commands import main
from robustdiff.data import decode

def guarded(*arguments, original=decode.guarded, **more):
    if arguments[-1] == 3:
        print("hangs", flush=True)
        threading.Event().wait()
    return original(*arguments, **more)

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells hand down that jobs in the background ignore it
decode.guarded = guarded
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", [("audit",), pytest.param(("train", "--dry-run"), marks=pytest.mark.slow)])
def test_ctrl_c_does_not_wait_for_a_thread_that_hangs_in_a_read(photos: Path, command: tuple[str, ...]) -> None:
    """Of a dead network disk, say. Nor does the interpreter's end, which joins the threads of executors."""
    line = [sys.executable, "-c", HANGS, command[0], str(photos), *command[1:]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as it:
        try:
            assert "hangs\n" in it.stdout
            time.sleep(0.2)
            it.send_signal(signal.SIGINT)
            _, error = it.communicate(timeout=20)
        finally:
            it.kill()
    assert it.returncode == 130
    assert error.startswith("robustdiff: stopped at once")
    assert error.count("\n") == 1


def test_after_an_error_the_rest_is_not_worked_on() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 0:
            raise RuntimeError("first")
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(RuntimeError, match="first"):
        _mapped(work, range(50), threads=1)
    time.sleep(0.3)
    assert len(done) < 5


def test_images_come_in_their_order(tmp_path: Path) -> None:
    count = CHUNK + 44
    pixels = np.arange(count, dtype=np.uint16)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.save(tmp_path / "set.npy", (pixels % 256).astype(np.uint8))
    source = open_source(str(tmp_path / "set.npy"))

    def first(image: np.ndarray) -> int:
        time.sleep(0.001 * (int(image[0, 0, 0]) % 3))
        return int(image[0, 0, 0])

    assert [done.value for done in decode_all(source, first)] == [i % 256 for i in range(count)]
