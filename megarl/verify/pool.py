"""A pool of rank processes that run one case after the other, each in a world of its own.

Starting four ranks takes seconds, nearly all of it imports. Giving them a new world takes milliseconds.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol, TypeVar

from megarl.errors import WorkerError
from megarl.verify.process import STACK_S, RankProcess
from megarl.verify.rank import Case, FileMeeting, Outcome

T = TypeVar("T")

START_OF_RANKS, START_TIMEOUT_S = "the start of the ranks", 120.0
GRACE_S = 5.0  # for the other ranks to finish once one has failed


class RanksFailed(WorkerError):
    """A case failed on a rank, a rank died, or ranks didn't finish. Tells of every such rank, the first one first."""


class Pool(Protocol):
    """Ranks that run functions of modules. They start with the first case, and anew after a hang and a death."""

    def run(self, function: Callable[..., T], *args: object, world_size: int = 4, timeout_s: float = 120.0) -> list[T]:
        """Run ``function(*args)`` on every rank of a fresh world, and return the results by rank.

        function: a module-level function; it, the arguments and the results must pickle.

        Raises RanksFailed if the function raises on a rank, a rank dies, or the case takes more than ``timeout_s``.
        """
        ...

    def stop(self) -> None:
        """End every rank, until the next case."""
        ...


class RankPool:
    """A Pool of up to ``size`` ranks on this machine."""

    def __init__(self, folder: Path, size: int, context: ForkServerContext, environ: Mapping[str, str]) -> None:
        """Take note of what to start.

        folder: for stores and stacks. context: starts the processes. environ: variables of the ranks.
        """
        self._folder = folder
        self._size = size
        self._context = context
        self._environ = dict(environ)
        self._ranks: list[RankProcess] = []
        self._num_cases = 0

    def run(self, function: Callable[..., T], *args: object, world_size: int = 4, timeout_s: float = 120.0) -> list[T]:
        """Run ``function(*args)`` on every rank of a fresh world, as Pool says."""
        assert 1 <= world_size <= self._size, f"the pool has {self._size} ranks, not {world_size}"
        call = pickle.dumps((function, args))
        if not self._ranks or not all(rank.process.is_alive() for rank in self._ranks):
            self._restart()
        self._num_cases += 1
        case = Case(call, world_size, FileMeeting(self._folder / f"store{self._num_cases}"), timeout_s)
        ranks = self._ranks[:world_size]
        for rank in ranks:
            rank.send(case)
        outcomes = self._finish(ranks, name_of_call(function), timeout_s)
        return [pickle.loads(outcome.result) for outcome in outcomes]

    def stop(self) -> None:
        """End every rank."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.kill()
        self._ranks = []

    def _restart(self) -> None:
        self.stop()
        for number in range(self._size):
            self._ranks.append(RankProcess(number, number, self._folder, self._context, self._environ))
        self._finish(self._ranks, START_OF_RANKS, START_TIMEOUT_S)

    def _finish(self, ranks: Sequence[RankProcess], what: str, timeout_s: float) -> list[Outcome]:
        """Return the outcomes by rank. Stops the pool unless every rank is alive and idle again."""
        outcomes = _collect(ranks, timeout_s)
        running = [rank for rank in ranks if rank.number not in outcomes]
        outcomes |= _stacks(running)
        if running or not all(rank.process.is_alive() for rank in ranks):
            self.stop()
        return succeeded(outcomes, what)


def name_of_call(function: Callable[..., object]) -> str:
    """Return the name of a function in an error."""
    return f"{function.__module__}.{function.__qualname__}"


def succeeded(outcomes: Mapping[int, Outcome], what: str) -> list[Outcome]:
    """Return the outcomes by rank. Raises RanksFailed, with the errors of ``what`` in order of time, if there are."""
    failed = sorted((n for n in outcomes if outcomes[n].error), key=lambda n: outcomes[n].time_s)
    if failed:
        texts = [f"--- rank {n} {outcomes[n].error}" for n in failed]
        raise RanksFailed(f"{len(failed)} of {len(outcomes)} ranks failed in {what}\n" + "".join(texts))
    return [outcomes[rank] for rank in sorted(outcomes)]


def _collect(ranks: Sequence[RankProcess], timeout_s: float) -> dict[int, Outcome]:
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


def _stacks(running: Sequence[RankProcess]) -> dict[int, Outcome]:
    """Return the error of each rank that hasn't finished: where it is now."""
    for rank in running:
        rank.ask_for_stack()
    if running:
        time.sleep(STACK_S)
    return {rank.number: rank.unfinished() for rank in running}
