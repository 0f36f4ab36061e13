"""The controller's side of the watch: a call that takes too long is an error that says where every rank stands."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait

import psutil

from megarl.errors import WorkerError
from megarl.ranks.watched import BEAT, START, START_S, WHERE, Member, Standing, WatchAddress

_ANSWER_S = 5.0  # for a rank to say where it stands
_BEATS = 10  # in the time after which silence is the controller's end
_LONGEST_BEAT_S = 30.0
_BACKLOG = 4096  # ranks that connect at once


class Watchdog:
    """Knows the ranks of a run. place: says which step and phase the run is in; whoever runs it sets it."""

    def __init__(self, host: str, world_size: int, timeout_s: float) -> None:
        """Listen at ``host`` for the ranks. timeout_s: that a call may take."""
        self.world_size, self.timeout_s = world_size, timeout_s
        self.place: Callable[[], str] = lambda: START
        key = secrets.token_bytes(32)
        self._listener = _listener(host, key)
        self.address = WatchAddress(host, self._listener.address[1], key, timeout_s)
        self._connections: dict[Member, Connection] = {}
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        for target in (self._accept, self._beat):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def limit_s(self, call: str) -> float:
        """Return the seconds that a call may take."""
        return max(self.timeout_s, START_S) if call == START else self.timeout_s

    def report(self, call: str) -> WorkerError:
        """Return the error of a call that took too long: where every rank stands, the odd ones out first."""
        standings = self._standings()
        lines = [
            f"{self.place()}: the ranks haven't done {call} within {self.limit_s(call):g} s (trainer.hang_timeout_s). "
            "Those that don't answer come first, then those that stand alone"
        ]
        members = sorted(self._connections.copy(), key=lambda member: member.rank)
        known = {member.rank for member in members}
        lines += [f"--- rank {rank} hasn't started" for rank in range(self.world_size) if rank not in known]
        silent = [member for member in members if member not in standings]
        lines += [f"--- rank {member.rank} doesn't answer: {_state(member)}" for member in silent]
        return WorkerError("\n".join((*lines, *_told(standings))))

    @contextmanager
    def limited(self, call: str, fail: Callable[[WorkerError], None]) -> Iterator[None]:
        """Have a thread ``fail`` with the report where the block, a call of the ranks, takes too long."""
        timer = threading.Timer(self.limit_s(call), lambda: fail(self.report(call)))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def kill_ranks_here(self) -> None:
        """Kill the ranks of this machine but this process: one that is stopped ends in no other way."""
        for process in [member.process() for member in list(self._connections)]:
            if process is not None and process.pid != os.getpid():
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def close(self) -> None:
        """Let the ranks go."""
        self._has_ended.set()
        with suppress(OSError, AuthenticationError):  # what waits for a connection notices the end by one
            Client(self._listener.address, authkey=self.address.key).close()
        self._listener.close()
        with self._lock:
            for connection in self._connections.values():
                connection.close()

    def _accept(self) -> None:
        while not self._has_ended.is_set():
            with suppress(OSError, EOFError, AuthenticationError, ValueError):  # of one that is no rank
                connection = self._listener.accept()
                member = Member(**json.loads(connection.recv_bytes()))
                with self._lock:
                    self._connections[member] = connection

    def _beat(self) -> None:
        while not self._has_ended.wait(min(self.timeout_s / _BEATS, _LONGEST_BEAT_S)):
            self._send(BEAT)

    def _send(self, message: bytes) -> None:
        with self._lock:
            for connection in self._connections.values():
                with suppress(OSError):  # of one that has died
                    connection.send_bytes(message)

    def _standings(self) -> dict[Member, Standing]:
        """Return where the ranks stand that say so in time."""
        found: dict[Member, Standing] = {}
        members = {connection: member for member, connection in self._connections.copy().items()}
        for late in members:
            with suppress(EOFError, OSError):
                while late.poll():  # the answer to an earlier question
                    late.recv_bytes()
        self._send(WHERE)
        deadline_s = time.monotonic() + _ANSWER_S
        while members and (ready := wait(list(members), max(0.0, deadline_s - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                member = members.pop(connection)
                with suppress(EOFError, OSError):
                    found[member] = Standing(**json.loads(connection.recv_bytes()))
        return found


def _told(standings: Mapping[Member, Standing]) -> list[str]:
    """Return a paragraph on all ranks that stand at the same place, for each; the smallest company first."""
    companies: dict[tuple[str, str], list[Member]] = {}
    for member in sorted(standings, key=lambda member: member.rank):
        companies.setdefault((standings[member].call, standings[member].stack), []).append(member)
    told = []
    for (call, stack), company in sorted(companies.items(), key=lambda item: len(item[1])):
        ranks = f"rank{'s' if len(company) > 1 else ''} {', '.join(str(member.rank) for member in company)}"
        told.append(f"--- {ranks}: {standings[company[0]].for_s:.0f} s in {call}\n{stack.rstrip()}")
    return told


def _state(member: Member) -> str:
    """Return the state of a process that doesn't answer, in words, as the system knows it."""
    process = member.process()
    state = "not on this machine, or gone" if process is None else str(process.status())
    return f"process {member.pid} on {member.host} is {state}"


def _listener(host: str, key: bytes) -> Listener:
    """Return a Listener at a host's address; at every interface where its name leads to no address of this node."""
    try:
        return Listener((host, 0), backlog=_BACKLOG, authkey=key)
    except OSError:
        return Listener(("", 0), backlog=_BACKLOG, authkey=key)
