"""The watch over ranks: where each stands, which doesn't answer, and a rank whose controller has stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener

import psutil
import pytest

from megarl.errors import WorkerError
from megarl.launchers.watchdog import Watchdog
from megarl.ranks.watched import WatchAddress, Watched

HOST = "127.0.0.1"
# A rank that is a process of its own, until its end is near.
RANK = """
import sys, time
from megarl.ranks.watched import Watched, WatchAddress, failed_at_once
watched = Watched(WatchAddress("127.0.0.1", int(sys.argv[1]), bytes.fromhex(sys.argv[2]), 60.0), 1, failed_at_once)
time.sleep(60)
"""


def ignore(error: WorkerError) -> None:
    """Go on."""


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    """Return a watch over three ranks."""
    watchdog = Watchdog(HOST, 3, 60.0)
    yield watchdog
    watchdog.close()


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what another thread or process will do."""
    deadline = time.monotonic() + 30.0
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(watchdog: Watchdog, *ranks: int) -> None:
    """Wait for ranks to be known."""
    until(lambda: not any(f"rank {rank} hasn't" in str(watchdog.report("a start")) for rank in ranks))


def wait_for_a_turn(watched: Watched, turn: threading.Event) -> None:
    """Be a rank that waits in an update."""
    with watched.at("update"):
        turn.wait()


def test_the_report_says_the_place_the_call_and_where_each_rank_stands_the_odd_one_first(watchdog: Watchdog) -> None:
    watchdog.place = lambda: "step 7, update_actor"
    turn, ranks = threading.Event(), [Watched(watchdog.address, rank, ignore) for rank in range(3)]
    started(watchdog, 0, 1, 2)
    with ExitStack() as stack:
        stack.callback(turn.set)
        for watched in (ranks[0], ranks[2]):
            threading.Thread(target=wait_for_a_turn, args=(watched, turn)).start()
        until(lambda: "ranks 0, 2" in str(watchdog.report("update")))
        said = str(watchdog.report("update"))
    assert said.startswith(
        "step 7, update_actor: the ranks haven't done update within 60 s (trainer.hang_timeout_s). "
        "Those that don't answer come first, then those that stand alone\n"
    )
    places = [re.sub(r"\d+ s in", "N s in", line) for line in said.splitlines() if line.startswith("---")]
    assert places == ["--- rank 1: N s in a wait for the next call", "--- ranks 0, 2: N s in update"]
    assert "in wait_for_a_turn\n    turn.wait()" in said


def test_ranks_that_have_not_started_are_named(watchdog: Watchdog) -> None:
    Watched(watchdog.address, 1, ignore)
    started(watchdog, 1)
    said = str(watchdog.report("the start"))
    assert said.startswith("the start: ")
    assert [line for line in said.splitlines() if "hasn't" in line] == [
        "--- rank 0 hasn't started",
        "--- rank 2 hasn't started",
    ]


def test_a_rank_that_is_stopped_does_not_answer_and_can_be_killed(watchdog: Watchdog) -> None:
    address = watchdog.address
    process = subprocess.Popen([sys.executable, "-c", RANK, str(address.port), address.key.hex()])
    try:
        Watched(address, 0, ignore)
        started(watchdog, 0, 1)
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
        lines = str(watchdog.report("update")).splitlines()
        assert lines[1] == "--- rank 2 hasn't started", lines
        assert re.fullmatch(rf"--- rank 1 doesn't answer: process {process.pid} on \S+ is stopped", lines[2]), lines
        assert lines[3].startswith("--- rank 0: ")
        watchdog.kill_ranks_here()
        assert process.wait(20.0) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


def test_a_call_that_takes_too_long_fails_and_one_that_is_done_does_not() -> None:
    watchdog, failed = Watchdog(HOST, 1, 0.2), threading.Event()
    errors: list[WorkerError] = []

    def fail(error: WorkerError) -> None:
        errors.append(error)
        failed.set()

    with watchdog.limited("score", fail):
        pass
    time.sleep(0.5)
    assert errors == []
    with watchdog.limited("update", fail):
        assert failed.wait(20.0)
    assert [str(error).partition(" within")[0] for error in errors] == ["the start: the ranks haven't done update"]
    watchdog.close()


def test_a_rank_goes_on_as_long_as_its_controller_lives_and_when_that_has_ended() -> None:
    watchdog, errors = Watchdog(HOST, 1, 0.5), list[WorkerError]()
    Watched(watchdog.address, 0, errors.append)
    started(watchdog, 0)
    time.sleep(1.5)
    watchdog.close()
    time.sleep(1.0)
    assert errors == []


def test_a_rank_whose_controller_has_stopped_fails_with_where_it_stands() -> None:
    errors: list[WorkerError] = []
    with Listener((HOST, 0), authkey=b"key") as listener:
        Watched(WatchAddress(HOST, listener.address[1], b"key", 0.2), 3, errors.append)
        connection = listener.accept()
        until(lambda: bool(errors))
        connection.close()
    first, place, *stack = str(errors[0]).splitlines()
    assert first == "the controller doesn't answer: nothing is heard of it for 0.2 s (trainer.hang_timeout_s)"
    assert place == "--- rank 3: 0 s in a wait for the next call"
    assert any("test_a_rank_whose_controller_has_stopped" in line for line in stack)


def test_a_rank_that_can_not_reach_its_controller_fails_with_the_address() -> None:
    errors: list[WorkerError] = []
    with Listener((HOST, 0)) as listener:
        port = listener.address[1]
    Watched(WatchAddress(HOST, port, b"key", 60.0), 3, errors.append)
    until(lambda: bool(errors))
    assert str(errors[0]).startswith(f"rank 3 can't reach its controller at {HOST}:{port}: ")


def test_who_has_not_the_key_is_nobody(watchdog: Watchdog) -> None:
    with pytest.raises(AuthenticationError):
        Client((HOST, watchdog.address.port), authkey=b"guessed")
    Watched(watchdog.address, 0, ignore)
    started(watchdog, 0)


def test_the_watch_listens_at_its_hosts_address_alone(watchdog: Watchdog) -> None:
    with pytest.raises(ConnectionRefusedError):
        Client(("127.0.0.2", watchdog.address.port), authkey=watchdog.address.key)
