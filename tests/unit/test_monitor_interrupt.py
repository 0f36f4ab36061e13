"""Ctrl-C ends a run in a line and with its own exit code."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from megarl.monitor.interrupt import interrupts_told
from megarl.monitor.preemption import SIGNALS


@pytest.fixture(autouse=True)
def handlers_kept() -> Iterator[None]:
    """Undo that a process which has been interrupted hears no second signal, which all it starts would inherit."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def told(capsys: pytest.CaptureFixture[str], *notes: str) -> str:
    """Interrupt with some notes; return what is written."""
    interrupt = KeyboardInterrupt()
    for note in notes:
        interrupt.add_note(note)
    with pytest.raises(SystemExit) as caught, interrupts_told():
        raise interrupt
    assert caught.value.code == 130
    return capsys.readouterr().err


def test_an_interrupt_is_told_by_its_note_and_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "what is saved") == "what is saved\n"


def test_one_before_there_is_anything_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys) == "interrupted before there was a run folder: nothing was saved\n"


def test_ranks_that_serve_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert told(capsys, "what is saved") == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_of_whoever_wants_the_machine_back_has_a_code_of_its_own(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_signalled() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    with pytest.raises(SystemExit) as caught, interrupts_told():
        be_signalled()
    assert caught.value.code == 75
    assert capsys.readouterr().err == "interrupted before there was a run folder: nothing was saved\n"


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), interrupts_told():
        raise ZeroDivisionError
