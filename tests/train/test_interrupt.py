"""Stopping after the current step."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from equilibria.train.interrupt import StopRequest


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_the_first_signal_is_a_wish(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as stop:
        assert (stop.signal, stop.exit_code) == (None, 0)
        os.kill(os.getpid(), number)
        assert (stop.signal, stop.exit_code) == (number, code)
    assert "stopping after this step; once more to stop at once" in capfd.readouterr().err


def test_a_second_ctrl_c_acts_as_usual() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGTERM


def test_former_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) == before[0]


def test_training_in_a_thread_keeps_the_usual_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    results: list[int] = []

    def work() -> None:
        with StopRequest() as stop:
            results.append(stop.exit_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [0]
    assert signal.getsignal(signal.SIGINT) == before
