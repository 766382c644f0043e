"""`accelerate launch` as it is typed, on two or more processes of which one may be broken on purpose."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from robustdiff.commands import main

LIMIT = 60
"""Seconds within which all processes must have ended after one failed."""

# Put in front of every process by a sitecustomize.py. It lists which files are opened for writing, by which process,
# and breaks what FAULT says, in one process.
SITE = """
import os, sys

def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and any(mode in arguments[1] for mode in "wax+"):
        name = str(arguments[0])
        if name.startswith(os.environ["WATCHED"]):
            os.write(descriptor, f"{os.environ.get('RANK')} open {name}\\n".encode())
    elif event in ("os.mkdir", "os.rename", "shutil.rmtree") and str(arguments[0]).startswith(os.environ["WATCHED"]):
        os.write(descriptor, f"{os.environ.get('RANK')} {event} {arguments[0]}\\n".encode())

if "WATCHED" in os.environ:
    descriptor = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sys.addaudithook(hook)

fault, _, place = os.environ.get("FAULT", "").partition("@")
if fault and os.environ.get("RANK") == place:
    import dataclasses
    from robustdiff.training import loader, training_set
    from robustdiff.training.callbacks import checkpointing
    from robustdiff.utils.errors import DataError

    def in_the_sixth_step(self, counters, images, original=loader.Batches.draw):
        if counters[0] >= 20:
            raise RuntimeError("the sixth step is broken")
        return original(self, counters, images)

    def for_ever(self, counters, images, original=loader.Batches.draw):
        while counters[0] >= 20:
            print("hangs", flush=True)
            import ctypes
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        return original(self, counters, images)

    def in_loading(*_, **__):
        raise DataError("x.png: cannot be\\nread here")

    def of_another_folder(source, *_, original=training_set.load_images, **options):
        return dataclasses.replace(original(os.environ["OTHER"], **options), source=str(source))

    def in_saving(*_):
        raise OSError(28, "No space left on device")

    if fault == "hang":
        loader.Batches.draw = for_ever
    elif fault == "step":
        loader.Batches.draw = in_the_sixth_step
    elif fault == "data":
        training_set.load_images = in_loading
    elif fault == "other":
        training_set.load_images = of_another_folder
    elif fault == "save":
        checkpointing.save_checkpoint = in_saving
"""


def command(*arguments: str, processes: int) -> list[str]:
    """The command line of `accelerate launch`, as a user types it on a machine without accelerators."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--multi_gpu", "--main_process_port", str(port)] if processes > 1 else []
    fixed = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *several, *fixed, "--dynamo_backend", "no"]
    return [*launcher, *(("-m", "robustdiff") if arguments[0] in main.COMMANDS else ()), *arguments]


def environment(folder: Path | None = None, **more: str) -> dict[str, str]:
    """One thread each, no accelerator, and the sitecustomize if there is a folder for it."""
    values = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    if torch.accelerator.is_available():  # where there is none, it must work without being told
        values["ACCELERATE_USE_CPU"] = "true"
    path = [entry for entry in sys.path if entry]
    if folder is not None:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITE)
        path = [str(folder / "site"), *path]
    return {**values, "PYTHONPATH": os.pathsep.join(path)}


def launch(*arguments: str, processes: int, folder: Path | None = None, **more: str) -> str:
    """Run to the end; returns standard output. A hang fails at the time limit."""
    line = command(*arguments, processes=processes)
    done = subprocess.run(line, capture_output=True, text=True, timeout=180, env=environment(folder, **more))
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def launched(*arguments: str, folder: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """Two processes on their way; whatever is left of them at the end is killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command(*arguments, processes=2), env=environment(folder, **more), **pipes) as launcher:
        try:
            yield launcher
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
