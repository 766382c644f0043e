"""Signals become a number that the loop reads; handlers come and go with the loop."""

import io
import signal
import sys
import threading

import pytest

from robustdiff.utils.signals import stop_signals


class Busy(io.StringIO):
    """A stream in the middle of a write, which Python lets nobody enter twice."""

    def write(self, _text: str) -> int:
        raise RuntimeError("reentrant call")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_a_print_is_a_status(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_signals() as asked:
        assert asked() == 0
        monkeypatch.setattr(sys, "stderr", Busy())
        signal.raise_signal(number)
        monkeypatch.undo()
        assert asked() == status
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert said.count("saving, then stopping") == 1
    assert ("Ctrl-C again" in said) == (number == signal.SIGINT)


def test_only_a_second_ctrl_c_stops_at_once() -> None:
    with stop_signals() as asked:
        for number in (signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert asked() == 143
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_terminal_that_has_gone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.write", lambda *_: (_ for _ in ()).throw(BrokenPipeError()))
    with stop_signals() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked() == 143


def test_in_another_thread_the_callers_handlers_stay() -> None:
    seen = []

    def work() -> None:
        with stop_signals() as asked:
            seen.append((asked(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]
