"""Damaged and hostile files of every kind that a user can name: 2,350, or a tenth; each a function of (kind, seed).

Whatever a file holds, it is read, or skipped with a reason, or refused in one line (``UsageError``, exit status 2).
Never another exception, output on stderr that is not ours, a process that dies, more than ``SECONDS`` or ``MEMORY``, a
word to the network, a program started, a pickle's function called, or a file written elsewhere. But for LMDB: a damaged
LSUN database may end the process, as the C library trusts its files; such ends are counted as ``died``.

How many of each kind: ``KINDS``. What was found and mended has a test of its own in ``test_hostile_files.py``.

Cases run in forked children, so that what kills, stalls or bloats one is known by kind and seed. To see one again::

    PYTHONPATH=.:tests/support python tests/data/test_fuzz.py image 17

With ``--all 20000 1000000`` it runs as many, with seeds from there on, in proportion to ``KINDS``.
"""

import faulthandler
import json
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets
import pytest
import torch

from fuzz_files import checkpoints, databases, images, quiet, runs, tables
from fuzz_kinds import CASES
from robustdiff.utils.errors import UsageError

KINDS = {
    "image": 1000,
    "npy": 150,
    "npz": 200,
    "cifar": 250,
    "celeba": 100,
    "lsun": 100,
    "parquet": 60,
    "saved": 60,
    "dirty": 50,
    "checkpoint": 150,
    "run": 30,
    "pipeline": 100,
    "network": 100,
}
"""Cases of each kind in the test."""

SECONDS, MEMORY = 10, 2 * 2**30
"""Per case; and peak resident memory of a child, in bytes."""

CHILDREN = 2

FOUND = [("saved", 2000055), ("network", 2000142)]
"""Cases that failed once: offsets of an Arrow file that lead beyond its end; a text where a list should be."""

DIES = {"lsun": (-signal.SIGABRT, -signal.SIGBUS, -signal.SIGSEGV)}
"""Kinds that may end the process, and by which signals."""


# -- children --------------------------------------------------------------------------------------


OURS = ("robustdiff: ", "step ")

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.getaddrinfo")

events: list[str] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Keeps what a case does that it must not."""
    if event in FORBIDDEN or (event == "socket.connect" and not isinstance(arguments[1], str)):
        events.append(f"{event}{arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        here = os.path.abspath(arguments[0]).startswith((os.getcwd(), "/dev/", "/proc/"))
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not here:
            events.append(f"writes {arguments[0]}")


def settle_in(folder: Path) -> None:
    """Make this process a child that runs cases in ``folder``."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    quiet()
    log = os.open("stderr", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    os.environ["FUZZ_STDERR"] = str(folder / "stderr")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    faulthandler.disable()  # pytest's would write where this process no longer does
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    sys.addaudithook(watch)


def problem_of(kind: str, seed: int) -> tuple[str, str]:
    """(outcome, problem) of one case, run in this process, which :func:`settle_in` has prepared."""
    events.clear()
    os.truncate("stderr", 0)
    place = Path.cwd() / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree("cache", ignore_errors=True)
    place.mkdir()
    outcome, problem = "", ""
    try:
        outcome = CASES[kind](random.Random(f"{kind} {seed}"), place)
    except UsageError as error:
        outcome, text = "refused", str(error)
        if not text or len(text.splitlines()) != 1 or len(text) > 2000:
            problem = f"not one line: {text!r:.600}"
    except BaseException as error:
        trace = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in trace if "robustdiff" in f.filename]
        last = f"{Path(trace[-1].filename).name}:{trace[-1].lineno}"
        problem = f"{type(error).__name__} at {ours[-1] if ours else '?'} < {last}: {str(error)!r:.400}"
    sys.stderr.flush()
    said = Path("stderr").read_text(errors="replace").splitlines()
    if not problem and (foreign := [line for line in said if not line.startswith(OURS)]):
        problem = f"on stderr: {foreign!r:.600}"
    if not problem and events:
        problem = events[0]
    if Path("caught").exists():
        os.rmdir("caught")
        problem = "a pickle was executed"
    return outcome, problem


def child(jobs: list[tuple[str, int]], folder: Path, pipe: int) -> None:
    """Run them, and tell of each when it begins and when it has ended."""
    settle_in(folder)
    with open(pipe, "w", buffering=1) as out:
        for kind, seed in jobs:
            print(json.dumps([kind, seed]), file=out)
            outcome, problem = problem_of(kind, seed)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps([kind, seed, outcome, problem, peak]), file=out)
            if peak > MEMORY:
                return


class Child:
    """One forked process and what it has told."""

    def __init__(self, jobs: list[tuple[str, int]], folder: Path) -> None:
        self.jobs, self.done, self.current, self.since, self.rest = jobs, 0, "", time.monotonic(), b""
        self.pipe, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self.pipe)
                child(jobs, folder, writing)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writing)
        os.set_blocking(self.pipe, False)

    def told(self) -> tuple[list[list[object]], bool]:
        """(lines since the last call, whether it has ended)."""
        try:
            data = os.read(self.pipe, 2**16)
        except BlockingIOError:
            return [], False
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines], not data

    def resident(self) -> int:
        """Bytes it holds now."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):  # another system, or it has just ended
            return 0


# -- the hunt --------------------------------------------------------------------------------------


def hunt(jobs: Iterable[tuple[str, int]], folder: Path) -> tuple[Counter[str], list[str], int, dict[str, float]]:
    """(outcomes by kind, problems, peak memory in bytes, seconds by kind) of all cases."""
    jobs = list(jobs)
    shares = [jobs[number::CHILDREN] for number in range(CHILDREN)]
    outcomes: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    problems: list[str] = []
    peak = number = 0
    running: list[Child] = []
    selector = selectors.DefaultSelector()

    def start(share: list[tuple[str, int]]) -> None:
        nonlocal number
        if share:
            number += 1
            running.append(Child(share, folder / str(number)))
            selector.register(running[-1].pipe, selectors.EVENT_READ)

    for share in shares:
        start(share)
    while running:
        selector.select(0.05)
        for one in list(running):
            lines, ended = one.told()
            for line in lines:
                if len(line) == 2:
                    one.current, one.since = f"{line[0]} {line[1]}", time.monotonic()
                    continue
                kind, seed, outcome, problem, resident = line
                seconds[kind] = seconds.get(kind, 0.0) + time.monotonic() - one.since
                one.done, one.current = one.done + 1, ""
                peak = max(peak, resident)
                if resident > MEMORY:
                    problem = problem or f"{resident / 2**30:.1f} GiB"
                outcomes[f"{kind} {'broken' if problem else outcome}"] += 1
                if problem:
                    problems.append(f"{kind} {seed}: {problem}")
            why = ""
            if one.current and time.monotonic() - one.since > SECONDS:
                why = f"more than {SECONDS} s"
            elif one.resident() > 1.5 * MEMORY:
                why = f"{one.resident() / 2**30:.1f} GiB"
            if why:
                os.kill(one.pid, signal.SIGKILL)
            if why or ended:
                status = os.waitstatus_to_exitcode(os.waitpid(one.pid, 0)[1])
                selector.unregister(one.pipe)
                os.close(one.pipe)
                running.remove(one)
                kind = one.current.partition(" ")[0]
                if one.current and not why and status in DIES.get(kind, ()):
                    outcomes[f"{kind} died"] += 1
                    one.done += 1
                elif one.current:
                    problems.append(f"{one.current}: {why or f'the process ended with {status}'}")
                    outcomes[f"{kind} broken"] += 1
                    one.done += 1
                start(one.jobs[one.done :])
    return outcomes, problems, peak, seconds


def all_cases(total: int, first: int) -> list[tuple[str, int]]:
    """``total`` or a few more cases in the proportions of ``KINDS``."""
    whole = sum(KINDS.values())
    return [(kind, first + i) for kind, count in KINDS.items() for i in range(-(-count * total // whole))]


def prepare() -> None:
    """Write what is damaged, once, before there are children."""
    for build in (images, tables, databases, runs, checkpoints):
        build()


@pytest.mark.filterwarnings("ignore:IM image format is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "total", [pytest.param(235, marks=pytest.mark.slow), pytest.param(sum(KINDS.values()), marks=pytest.mark.long)]
)
def test_no_file_gets_more_than_a_line(total: int, tmp_path: Path) -> None:
    prepare()
    cases = all_cases(total, 0)
    outcomes, problems, peak, seconds = hunt([*FOUND, *cases], tmp_path)
    print(dict(outcomes), f"{peak / 2**20:.0f} MiB", seconds)
    assert not problems, "\n".join(problems)
    assert sum(outcomes.values()) == len(FOUND) + len(cases)
    for kind, count in Counter(kind for kind, _ in cases).items():
        if count == KINDS[kind]:  # of so many, some files are good enough and some are not
            assert outcomes[f"{kind} read"] + outcomes[f"{kind} skipped"] > 0, kind
            assert outcomes[f"{kind} refused"] > 0, kind


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        prepare()
        if arguments[0] == "--all":
            began = time.monotonic()
            outcomes, problems, peak, seconds = hunt(all_cases(int(arguments[1]), int(arguments[2])), Path(name))
            print("\n".join(problems), dict(sorted(outcomes.items())), f"{peak / 2**20:.0f} MiB", seconds, sep="\n")
            print(f"{time.monotonic() - began:.0f} s, {len(problems)} problems")
            return
        outcomes, problems, peak, _ = hunt([(arguments[0], int(seed)) for seed in arguments[1:]], Path(name))
        print(*outcomes.items(), *problems, f"{peak / 2**20:.0f} MiB", sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
