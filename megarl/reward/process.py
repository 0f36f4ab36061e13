"""The pool's end of a worker process."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import Pipe
from typing import IO

from megarl.errors import RewardError
from megarl.reward.registry import RewardSpec
from megarl.reward.started import MARK, end_started
from megarl.reward.worker import CONNECTION_LOST, OWN_FAILURE
from megarl.types import RewardRequest, RewardResult

_START_LIMIT_S = 120.0  # a user's file may import large libraries
_ENDS = {
    CONNECTION_LOST: "lost its connection to the run: does the function close files that it did not open?",
    OWN_FAILURE: "failed outside of the function; its traceback is with what it printed",
}


class WorkerProcess:
    """A worker, from its start to its kill.

    ready: its function is loaded. pending: numbers of the requests it has, the one it works on first. deadline: when
    its next message is due, on the monotonic clock, in seconds.
    """

    def __init__(self, spec: RewardSpec, timeout_s: float, output: IO[bytes]) -> None:
        """Start the process; ``receive`` tells when it is ready. output: takes what it prints."""
        self.ready = False
        self.pending: deque[int] = deque()
        self.deadline = time.monotonic() + _START_LIMIT_S
        self._timeout_s = timeout_s
        self._mark = secrets.token_hex(16)
        self.connection, theirs = Pipe()
        with theirs:
            # Not multiprocessing: it would run the parent's main module again in each worker, and its daemons may not
            # have children, which reward functions that run code in a process of its own need.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _command(theirs.fileno(), 2 * timeout_s + 1.0)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, MARK: self._mark},
                start_new_session=True,  # its own process group, so that a kill reaches what the function started
            )
        self.connection.send(spec)

    @property
    def active(self) -> bool:
        """Tell whether a message from it is due."""
        return bool(self.pending) or not self.ready

    @property
    def lateness(self) -> str:
        """Say what was due at the deadline."""
        return f"no result after {self._timeout_s:g} s" if self.ready else f"not ready after {_START_LIMIT_S:g} s"

    def send(self, numbers: Sequence[int], requests: Sequence[RewardRequest]) -> None:
        """Give it requests. Raises OSError if it is dead."""
        self.connection.send(requests)
        self.pending.extend(numbers)
        self._restart_clock()

    def receive(self) -> tuple[int, RewardResult] | None:
        """Take its next message: that it is ready, or a request's number and result.

        Raises EOFError or OSError if it is dead, RewardError if it can't load the function.
        """
        message = self.connection.recv()
        self._restart_clock()
        if self.ready:
            return self.pending.popleft(), message
        if message is not None:
            raise RewardError(message)
        self.ready = True
        return None

    def cause_of_death(self) -> str:
        """Say how a worker ended whose connection broke. (One that the pool killed isn't asked.)"""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code in _ENDS:
            return _ENDS[code]
        if code == -signal.SIGKILL:
            return "was killed, by the function itself or by the system where memory ran out (signal 9)"
        return f"died of signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exited with status {code}"

    def _restart_clock(self) -> None:
        self.deadline = time.monotonic() + self._timeout_s

    @staticmethod
    def kill(workers: Sequence[WorkerProcess]) -> None:
        """End workers and all processes that they started."""
        for worker in workers:
            worker.connection.close()
            # The group may outlive its leader, and is gone once all of its processes are.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker._process.pid, signal.SIGKILL)
        end_started({worker._mark for worker in workers})
        for worker in workers:
            worker._process.wait()


def _command(fd: int, orphan_deadline_s: float) -> str:
    return (
        f"import sys; sys.path[:] = {sys.path!r}; from megarl.reward.worker import main; "
        f"main({fd}, {os.getpid()}, {orphan_deadline_s})"
    )
