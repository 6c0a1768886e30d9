"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from equilibria.train.progress import Progress, readable

RECORD = {
    "step": 50,
    "loss": 2.0,
    "num_evals": 12.34,
    "relative_residual": 1.5e-3,
    "tokens_per_second": 1234.5,
}


def _shown(record: dict[str, Any]) -> dict[str, str]:
    """What a task of these tests has to say."""
    return {"score": f"{record['loss'] / 2:.1f}"}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, 200, _shown) as progress:
        progress.advance()
        progress.metrics(RECORD)
        progress.say("hello")
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("step 50/200  loss 2.000  score 1.0  NFE 12.3  residual 1.5e-03")
    assert "tok/s 1234" in first
    assert "left 0:00" in first
    assert second == "hello"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(49, 200, _shown) as progress:
        progress.advance()
        progress.metrics(RECORD)
        progress.say("hello")
    shown = terminal.getvalue()
    assert "50/200" in shown
    assert "score=1.0" in shown
    assert "hello\n" in shown


def test_a_loss_beyond_all_bounds_is_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, 100, _shown) as progress:
        progress.metrics({**RECORD, "loss": 1e6})
    assert "loss 1000000.000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0:00"), (61.0, "1:01"), (3600.0, "1:00:00"), (90061.0, "25:01:01")],
)
def test_time_left_assumes_the_speed_so_far(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    shown: str,
) -> None:
    clock = [100.0]
    monkeypatch.setattr("equilibria.train.progress.time.perf_counter", lambda: clock[0])
    with Progress(100, 300, _shown) as progress:
        clock[0] += seconds
        progress.metrics({**RECORD, "step": 200})  # half of what this process has to do
    assert capsys.readouterr().err.rstrip().endswith(f"left {shown}")


def test_an_explicit_model_shows_no_solves(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(0, 100, _shown) as progress:
        progress.metrics({"step": 1, "loss": 2.0, "tokens_per_second": 10.0})
        progress.validation({"step": 1, "loss": 1.0})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/100  loss 2.000  score 1.0  tok/s 10  left")
    assert second == "step 1: validation loss 1.0000, score 0.5"


@pytest.mark.parametrize(
    ("loss", "shown"), [(2.0, "2.000"), (0.0512, "0.051"), (3.5e-6, "3.50e-06"), (0.0, "0.00e+00")]
)
def test_small_losses_keep_their_digits(loss: float, shown: str) -> None:
    assert readable(loss) == shown
