"""Processes that run a reward function under a deadline, so that no function can stop or slow the run.

A function that hangs, in Python, in C or with signals blocked, is killed with its process, and with the processes that
it started; a fresh worker takes over. The pool has no threads: it works while ``score`` runs.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self

from megarl.errors import RewardError
from megarl.reward.printed import Printed
from megarl.reward.process import WorkerProcess
from megarl.reward.registry import RewardSpec
from megarl.types import RewardRequest, RewardResult

_MAX_CHUNK = 32  # requests a message: few messages, and still an even load
_PATIENCE = 10  # workers lost in a row, for each worker, after which a batch without a deadline is given up
_NEWS_S = 60.0  # between lines about a batch that takes long
_PRINTED_BYTES = 1_000_000


@dataclass
class _Batch:
    """Requests on their way. lost_in_a_row: workers that hung or died since one last answered."""

    requests: Sequence[RewardRequest]
    tell: Callable[[str], None] | None = None
    results: dict[int, RewardResult] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    started: float = field(default_factory=time.monotonic)
    lost_in_a_row: int = 0
    num_news: int = 0

    @property
    def is_done(self) -> bool:
        """Whether every request has its result."""
        return len(self.results) == len(self.requests)

    def tell_news(self, now: float) -> None:
        """Say how far a batch is that takes long, once a minute."""
        if self.tell is not None and now - self.started > _NEWS_S * (self.num_news + 1):
            self.num_news += 1
            failed = sum(result.outcome != "ok" for result in self.results.values())
            counts = f"{len(self.results)} of {len(self.requests)} rollouts after {now - self.started:.0f} s"
            self.tell(f"reward function: {counts}, {failed} of them failed")


class RewardPool:
    """A fixed number of worker processes. It may be used as a context manager."""

    def __init__(
        self,
        num_workers: int,
        timeout_s: float,
        spec: RewardSpec,
        score_on_failure: float,
        batch_timeout_s: float | None = None,
    ) -> None:
        """Start the workers and load the reward function in each.

        timeout_s: deadline of one request, in seconds. score_on_failure: the reward where the function has none.
        batch_timeout_s: deadline of all requests of a call; None: until as many workers as would be 10 for each of
        them hung or died in a row. Raises RewardError if the function can't be loaded.
        """
        if num_workers < 1:
            raise RewardError(f"reward.num_workers = {num_workers}: allowed: at least 1")
        for key, seconds in (("timeout_s", timeout_s), ("batch_timeout_s", batch_timeout_s)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise RewardError(f"reward.{key} = {seconds}: allowed: seconds above 0")
        self._spec = spec
        self._timeout_s = timeout_s
        self._batch_timeout_s = batch_timeout_s
        self._score_on_failure = score_on_failure
        self._lock = threading.Lock()
        self._printed = Printed(_PRINTED_BYTES)
        self._workers: list[WorkerProcess] = []
        try:
            for _ in range(num_workers):
                self._workers.append(self._new_worker())
            while not all(worker.ready for worker in self._workers):
                self._wait(_Batch(()))
        except RewardError as error:
            said = self._printed.tail()
            self.close()
            raise RewardError(f"{error}{said}") from error
        except BaseException:
            self.close()
            raise

    def score(self, requests: Sequence[RewardRequest], tell: Callable[[str], None] | None = None) -> list[RewardResult]:
        """Return a result for each request, in order. A request that fails has ``score_on_failure`` and says why.

        tell: takes a line a minute where it takes long.
        """
        assert self._workers, "a closed pool can't score"
        with self._lock:
            batch = _Batch(requests, tell, queue=deque(range(len(requests))))
            try:
                while not batch.is_done:
                    self._assign(batch)
                    self._wait(batch)
                    batch.tell_news(time.monotonic())
                    self._give_up_if_due(batch)
            finally:
                self._abandon_unfinished()
        return [self._with_failure_score(batch.results[index]) for index in range(len(requests))]

    def take_printed(self) -> str:
        """Return what functions, and processes that they started, printed since the last time: 1 MB at most in all."""
        return self._printed.take()

    def close(self) -> None:
        """End every worker and whatever it started. The pool can't be used afterwards."""
        WorkerProcess.kill(self._workers)
        self._workers.clear()
        self._printed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess(self._spec, self._timeout_s, self._printed.writer)

    def _assign(self, batch: _Batch) -> None:
        """Give each idle worker its next requests. One that died idle is replaced, and nothing is held against them."""
        chunk = min(_MAX_CHUNK, math.ceil(len(batch.requests) / (4 * len(self._workers))))
        for slot, worker in enumerate(self._workers):
            if not batch.queue or not worker.ready or worker.pending:
                continue
            indices = [batch.queue.popleft() for _ in range(min(chunk, len(batch.queue)))]
            try:
                worker.send(indices, [batch.requests[index] for index in indices])
            except OSError:
                batch.queue.extendleft(reversed(indices))
                self._replace(slot)

    def _wait(self, batch: _Batch) -> None:
        """Wait for the next message or deadline, and act on every one that is due."""
        # Taken before the wait, so that a worker is late only if it was silent at a look after its deadline.
        now = time.monotonic()
        active = [worker for worker in self._workers if worker.active]
        due = [worker.deadline for worker in active] or [now]
        if self._batch_timeout_s is not None:
            due.append(batch.started + self._batch_timeout_s)
        patience = max(0.0, min(*due, now + _NEWS_S) - now)
        readable = wait([self._printed.reader.fileno(), *(worker.connection for worker in active)], patience)
        self._printed.drain()
        for slot, worker in enumerate(self._workers):
            if worker.connection in readable:
                self._receive(slot, batch)
            elif worker in active and now >= worker.deadline:
                self._fail(slot, RewardResult(math.nan, "timeout", worker.lateness, "timeout"), batch)

    def _receive(self, slot: int, batch: _Batch) -> None:
        worker = self._workers[slot]
        try:
            finished = worker.receive()
        except (EOFError, OSError):
            cause = f"the worker process {worker.cause_of_death()}"
            self._fail(slot, RewardResult(math.nan, "raised", cause, cause), batch)
        else:
            if finished:
                batch.results.update([finished])
                batch.lost_in_a_row = 0

    def _fail(self, slot: int, result: RewardResult, batch: _Batch) -> None:
        """Blame the request that a worker was at, put those after it back in the queue, and replace the worker."""
        worker = self._workers[slot]
        if not worker.ready:
            raise RewardError(f"a reward worker did not start: {result.detail}. reward: {self._spec}")
        batch.results[worker.pending.popleft()] = result
        batch.queue.extendleft(reversed(worker.pending))
        batch.lost_in_a_row += 1
        self._replace(slot)

    def _give_up_if_due(self, batch: _Batch) -> None:
        """Give the rest of a batch a result where the batch is late, or where workers hang or die and nothing else."""
        limit_s, in_a_row = self._batch_timeout_s, _PATIENCE * len(self._workers)
        if limit_s is not None and time.monotonic() > batch.started + limit_s:
            why = f"not scored within reward.batch_timeout_s = {limit_s:g} s of the batch"
        elif limit_s is None and batch.lost_in_a_row >= in_a_row:
            why = (
                f"not tried: {in_a_row} calls in a row hung or ended their process; "
                "reward.batch_timeout_s sets another deadline of a batch"
            )
        else:
            return
        for index in range(len(batch.requests)):
            batch.results.setdefault(index, RewardResult(math.nan, "timeout", why, "timeout of the batch"))

    def _replace(self, slot: int) -> None:
        WorkerProcess.kill([self._workers[slot]])
        self._workers[slot] = self._new_worker()

    def _abandon_unfinished(self) -> None:
        """Replace workers that are still busy, as they are after an interrupt: their results would come too late."""
        for slot, worker in enumerate(self._workers):
            if worker.pending:
                self._replace(slot)

    def _with_failure_score(self, result: RewardResult) -> RewardResult:
        if result.outcome == "ok":
            return result
        score = self._score_on_failure
        return replace(result, score=score, components=(score,) * len(self._spec.components))
