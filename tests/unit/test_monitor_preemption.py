"""SIGTERM and SIGUSR1: the first asks a run to save and end, a second and the deadline end it at once."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

import pytest

from megarl.monitor import preemption as subject
from megarl.monitor.preemption import Limit, Preempted, Preemption

LONG = Limit(3600.0, "this test")


def until(is_so: threading.Event) -> None:
    """Wait for what a thread will do."""
    assert is_so.wait(20.0)


class Heard:
    """A Preemption, and what it told and did."""

    def __init__(self, limit: Limit | None = LONG, *, has_peers: bool = True) -> None:
        self.told: list[str] = []
        self.has_told, self.has_left = threading.Event(), threading.Event()
        self.code: int | None = None
        self.preemption = Preemption(limit, self.tell, lambda: has_peers, self.leave)

    def tell(self, text: str) -> None:
        """Keep what is told."""
        self.told.append(text)
        self.has_told.set()

    def leave(self, code: int) -> None:
        """Keep the code in place of ending this process."""
        self.code = code
        self.has_left.set()


def sent(heard: Heard, *numbers: signal.Signals) -> None:
    """Send this process signals, the second after the first was told, and wait to be interrupted."""
    for number in numbers:
        os.kill(os.getpid(), number)
        until(heard.has_told)
    time.sleep(20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks_for_the_end_and_interrupts_nothing(number: signal.Signals) -> None:
    heard = Heard()
    with heard.preemption.heard() as preemption:
        assert not preemption.is_asked
        os.kill(os.getpid(), number)
        until(heard.has_told)
        assert preemption.is_asked
    assert heard.told == [
        f"{number.name}: the run saves at the end of this step, and ends; a second signal ends it at once"
    ]


def test_a_signal_is_heard_while_the_main_thread_is_in_a_long_call_outside_of_python() -> None:
    heard, events = Heard(), []
    heard.preemption.tell = lambda text: events.append("told")
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with heard.preemption.heard():
        hashlib.pbkdf2_hmac("sha256", b"long", b"call", 800_000)
        events.append("back")
        assert heard.preemption.is_asked
    assert events == ["told", "back"]


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "SAME_S", 0.0)
    heard = Heard()
    with pytest.raises(Preempted), heard.preemption.heard():
        sent(heard, signal.SIGUSR1, signal.SIGTERM)
    assert heard.told[1:] == ["SIGTERM for the second time: ending at once, without a save"]
    assert heard.preemption.is_ending


def test_signals_that_come_together_are_one() -> None:
    heard = Heard()
    with heard.preemption.heard() as preemption:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        until(heard.has_told)
    assert len(heard.told) == 1 and not preemption.is_ending


def test_at_the_deadline_an_error_says_what_set_it_and_the_main_thread_ends() -> None:
    heard = Heard(Limit(0.1, "trainer.preempt_save_s"))
    with pytest.raises(Preempted), heard.preemption.heard():
        sent(heard, signal.SIGTERM)
    late = "ERROR: nothing new is saved 0.1 s after SIGTERM (trainer.preempt_save_s): ending at once"
    assert heard.told[1:] == [late]


def test_there_is_no_deadline_for_what_is_saved() -> None:
    heard = Heard(Limit(0.2, "this test"))
    with heard.preemption.heard() as preemption:
        preemption.ask("a signal")
        preemption.saved()
        time.sleep(0.5)
    assert len(heard.told) == 1


def test_a_main_thread_that_does_not_come_back_is_ended_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "UNWIND_S", 0.1)
    heard = Heard(Limit(0.1, "this test"))
    with heard.preemption.heard() as preemption:
        preemption.ask("a signal")
        try:
            time.sleep(20)
        except Preempted:
            until(heard.has_left)  # as a long call would let it be
    assert heard.code == 75


def test_a_rank_whose_peers_have_ended_takes_the_signal_for_the_end_of_the_run() -> None:
    heard = Heard(has_peers=False)
    with heard.preemption.heard() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        until(heard.has_left)
    assert heard.code == 1 and heard.told == [] and not preemption.is_asked


def test_what_handled_signals_before_does_so_afterwards() -> None:
    before = [signal.getsignal(number) for number in subject.SIGNALS]
    with Heard().preemption.heard():
        assert [signal.getsignal(number) for number in subject.SIGNALS] != before
    assert [signal.getsignal(number) for number in subject.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_of_the_main_thread_nothing_listens() -> None:
    before, during = signal.getsignal(signal.SIGTERM), []

    def listen() -> None:
        with Heard().preemption.heard():
            during.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert during == [before]
