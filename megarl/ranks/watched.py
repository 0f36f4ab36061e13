"""A rank's side of the watch: it says where it stands when it is asked, and ends when its controller has stopped."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection

import psutil

from megarl.errors import WorkerError

BEAT, WHERE = b"beat", b"where"
START = "the start"
START_S = 600.0  # at least, for ranks to start
IDLE = "a wait for the next call"


@dataclass(frozen=True)
class WatchAddress:
    """Where the controller watches from. timeout_s: how long a call may take, and silence may last."""

    host: str
    port: int
    key: bytes
    timeout_s: float


@dataclass(frozen=True)
class Member:
    """A rank's process. created_s: when it was, since another may get its number later."""

    rank: int
    pid: int
    host: str
    created_s: float

    @classmethod
    def here(cls, rank: int) -> Member:
        """Return this process as a rank's."""
        return cls(rank, os.getpid(), socket.gethostname(), psutil.Process().create_time())

    def process(self) -> psutil.Process | None:
        """Return the process where it lives on this machine, else None."""
        try:
            found = psutil.Process(self.pid)
            is_it = self.host == socket.gethostname() and found.create_time() == self.created_s
        except psutil.NoSuchProcess:
            return None
        return found if is_it else None


@dataclass(frozen=True)
class Standing:
    """Where a rank stands: in which call, for how long, and the Python stack of the thread that runs it."""

    call: str
    for_s: float
    stack: str


class Watched:
    """Answers the controller's watch in a thread of its own. fail: ends this process, with an error."""

    def __init__(self, address: WatchAddress, rank: int, fail: Callable[[WorkerError], None]) -> None:
        self.address, self.rank, self.fail = address, rank, fail
        self._call, self._since_s, self._thread = IDLE, time.monotonic(), threading.get_ident()
        threading.Thread(target=self._answer, name="watched", daemon=True).start()

    @contextmanager
    def at(self, call: str) -> Iterator[None]:
        """Have this thread be where the rank stands, in ``call`` until the end of the block."""
        self._call, self._since_s, self._thread = call, time.monotonic(), threading.get_ident()
        try:
            yield
        finally:
            self._call, self._since_s = IDLE, time.monotonic()

    def standing(self) -> Standing:
        """Return the Standing of this rank."""
        frame = sys._current_frames().get(self._thread)
        stack = "" if frame is None else "".join(traceback.format_stack(frame))
        return Standing(self._call, time.monotonic() - self._since_s, stack)

    def _answer(self) -> None:
        place = self.address.host, self.address.port
        try:
            connection = Client(place, authkey=self.address.key)
        except OSError as error:
            self.fail(WorkerError(f"rank {self.rank} can't reach its controller at {place[0]}:{place[1]}: {error}"))
            return
        with connection, suppress(EOFError, OSError):  # where the controller ends, a rank notices by other ways
            connection.send_bytes(_packed(Member.here(self.rank)))
            self._answer_until_the_end(connection)

    def _answer_until_the_end(self, connection: Connection) -> None:
        while connection.poll(self.address.timeout_s):
            if connection.recv_bytes() == WHERE:
                connection.send_bytes(_packed(self.standing()))
        here, silent_s = self.standing(), self.address.timeout_s
        self.fail(
            WorkerError(
                f"the controller doesn't answer: nothing is heard of it for {silent_s:g} s (trainer.hang_timeout_s)\n"
                f"--- rank {self.rank}: {here.for_s:.0f} s in {here.call}\n{here.stack.rstrip()}"
            )
        )


def failed_at_once(error: WorkerError) -> None:
    """End this process with an error, whatever its other threads are in."""
    print(f"WorkerError: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _packed(value: Member | Standing) -> bytes:
    return json.dumps(asdict(value)).encode()
