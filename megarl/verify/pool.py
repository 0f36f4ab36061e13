"""A pool of rank processes that run one case after the other, each in a world of its own.

Starting four ranks takes seconds, nearly all of it imports. Giving them a new world takes milliseconds.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from megarl.errors import WorkerError
from megarl.verify.rank import Case, Outcome, serve

T = TypeVar("T")

START_TIMEOUT_S = 120.0
GRACE_S = 5.0  # for the other ranks to finish once one has failed
STACK_S = 0.3  # for a signalled rank to write its stack


class RanksFailed(WorkerError):
    """A case failed on a rank, a rank died, or ranks didn't finish. Tells of every such rank, the first one first."""


@dataclass(frozen=True)
class _Rank:
    number: int
    process: BaseProcess
    connection: Connection
    stacks: Path

    def outcome(self) -> Outcome:
        """Return the outcome that is there, or tell of the death that closed the connection."""
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            # Other ranks notice before we do; time 0 makes the death the first of the errors, which it is.
            return Outcome(error=f"died with exit code {self.process.exitcode}\n", time_s=0.0)
        return outcome


class RankPool:
    """Up to ``size`` ranks that run functions of modules. Starts with the first case, and anew after a hang."""

    def __init__(self, folder: Path, size: int, context: ForkServerContext, environ: Mapping[str, str]) -> None:
        """Take note of what to start.

        folder: for stores and stacks. context: starts the processes. environ: variables of the ranks.
        """
        self._folder = folder
        self._size = size
        self._context = context
        self._environ = dict(environ)
        self._ranks: list[_Rank] = []
        self._num_cases = 0

    def run(self, function: Callable[..., T], *args: object, world_size: int = 4, timeout_s: float = 120.0) -> list[T]:
        """Run ``function(*args)`` on every rank of a fresh world, and return the results by rank.

        function: a module-level function; it, the arguments and the results must pickle.

        Raises RanksFailed if the function raises on a rank, a rank dies, or the case takes more than ``timeout_s``.
        """
        assert 1 <= world_size <= self._size, f"the pool has {self._size} ranks, not {world_size}"
        call = pickle.dumps((function, args))
        if not self._ranks or not all(rank.process.is_alive() for rank in self._ranks):
            self._restart()
        self._num_cases += 1
        case = Case(call, world_size, self._folder / f"store{self._num_cases}", timeout_s)
        ranks = self._ranks[:world_size]
        for rank in ranks:
            rank.connection.send(case)
        outcomes = self._finish(ranks, f"{function.__module__}.{function.__qualname__}", timeout_s)
        return [pickle.loads(outcome.result) for outcome in outcomes]

    def stop(self) -> None:
        """End every rank."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.connection.close()
        self._ranks = []

    def _restart(self) -> None:
        self.stop()
        for number in range(self._size):
            here, there = self._context.Pipe()
            stacks = self._folder / f"stacks{number}"
            args = (number, there, stacks, self._environ)
            process = self._context.Process(target=serve, args=args, name=f"rank {number}", daemon=True)
            process.start()
            there.close()  # so that the rank holds the only copy, and its death closes the connection
            self._ranks.append(_Rank(number, process, here, stacks))
        self._finish(self._ranks, "the start of the ranks", START_TIMEOUT_S)

    def _finish(self, ranks: Sequence[_Rank], what: str, timeout_s: float) -> list[Outcome]:
        """Return the outcomes by rank. Stops the pool unless every rank is alive and idle again."""
        outcomes = _collect(ranks, timeout_s)
        running = [rank for rank in ranks if rank.number not in outcomes]
        outcomes |= _stacks(running)
        if running or not all(rank.process.is_alive() for rank in ranks):
            self.stop()
        failed = sorted((n for n in outcomes if outcomes[n].error), key=lambda n: outcomes[n].time_s)
        if failed:
            texts = [f"--- rank {n} {outcomes[n].error}" for n in failed]
            raise RanksFailed(f"{len(failed)} of {len(ranks)} ranks failed in {what}\n" + "".join(texts))
        return [outcomes[rank.number] for rank in ranks]


def _collect(ranks: Sequence[_Rank], timeout_s: float) -> dict[int, Outcome]:
    """Wait for outcomes by rank number, for ``timeout_s``, or ``GRACE_S`` after the first error."""
    outcomes: dict[int, Outcome] = {}
    deadline_s = time.monotonic() + timeout_s
    while waiting := {rank.connection: rank for rank in ranks if rank.number not in outcomes}:
        ready = wait(list(waiting), max(0.0, deadline_s - time.monotonic()))
        if not ready:
            break
        for rank in (waiting[connection] for connection in ready):  # type: ignore[index]
            outcomes[rank.number] = rank.outcome()
            if outcomes[rank.number].error:
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
    return outcomes


def _stacks(running: Sequence[_Rank]) -> dict[int, Outcome]:
    """Return the error of each rank that hasn't finished: where it is now."""
    for rank in running:
        if rank.process.pid is not None:
            os.kill(rank.process.pid, signal.SIGUSR1)
    if running:
        time.sleep(STACK_S)
    return {rank.number: Outcome(error=f"didn't finish; it is at\n{rank.stacks.read_text()}") for rank in running}
