"""Work side by side: all of it, an error of one ends the others, threads are shared and given back."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from robustdiff.utils.parallel import Meter, metered, side_by_side


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_everything_is_done_so_many_at_a_time(workers: int) -> None:
    lock, alive, most, done = threading.Lock(), 0, 0, []

    def piece(i: int) -> None:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.05)
        with lock:
            alive -= 1
            done.append(i)

    side_by_side([lambda i=i: piece(i) for i in range(10)], workers, threading.Event())
    assert sorted(done) == list(range(10))
    assert most == workers


def test_each_has_its_share_of_the_threads_and_the_caller_his_own_back() -> None:
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(4)
        side_by_side([lambda: seen.append(torch.get_num_threads())] * 2, 2, threading.Event())
        side_by_side([lambda: seen.append(torch.get_num_threads())], 2, threading.Event())
        assert seen == [2, 2, 4]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_ends_the_others_and_is_the_one_that_is_raised(workers: int) -> None:
    started = []

    def endless(meter: Meter) -> None:
        started.append("endless")
        while True:
            meter.tell("endless", 1)
            time.sleep(0.01)

    def fails() -> None:
        started.append("fails")
        raise ArithmeticError("not finite")

    with metered(100, lambda: None) as meter, pytest.raises(ArithmeticError, match="not finite"):
        side_by_side([fails, lambda: endless(meter), lambda: started.append("never")], workers, meter.over)
    assert "never" not in started


def test_what_the_check_raises_ends_all() -> None:
    def check() -> None:
        raise KeyboardInterrupt

    with metered(100, check) as meter, pytest.raises(KeyboardInterrupt):
        side_by_side([lambda: meter.tell("one", 1), lambda: meter.tell("two", 1)], 2, meter.over)


def test_without_a_terminal_a_line_now_and_then_says_how_long(capsys, monkeypatch) -> None:
    monkeypatch.setattr("robustdiff.utils.parallel.SPOKEN_EVERY", 0.0)
    with metered(4, lambda: None) as meter:
        for _ in range(4):
            meter.tell("attack", 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # nothing is left after the last
    assert lines[0].startswith("robustdiff: attack: 25%, ")
    assert lines[0].endswith(" left")
