"""Processes that run a reward function under a deadline, so that no function can stop or slow the run.

A function that hangs, in Python, in C or with signals blocked, is killed with its process, and with the processes that
it started; a fresh worker takes over. The pool has no threads: it works while ``score`` runs.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self

from megarl.errors import RewardError
from megarl.reward.process import WorkerProcess
from megarl.reward.registry import RewardSpec
from megarl.types import RewardRequest, RewardResult

_MAX_CHUNK = 32  # requests a message: few messages, and still an even load


class RewardPool:
    """A fixed number of worker processes. It may be used as a context manager."""

    def __init__(self, num_workers: int, timeout_s: float, spec: RewardSpec, score_on_failure: float) -> None:
        """Start the workers and load the reward function in each.

        timeout_s: deadline of one request, in seconds. score_on_failure: the reward where the function has none.
        Raises RewardError if the function can't be loaded.
        """
        if num_workers < 1:
            raise RewardError(f"reward.num_workers = {num_workers}: allowed: at least 1")
        if not 0 < timeout_s < math.inf:
            raise RewardError(f"reward.timeout_s = {timeout_s}: allowed: seconds above 0")
        self._spec = spec
        self._timeout_s = timeout_s
        self._score_on_failure = score_on_failure
        self._lock = threading.Lock()
        self._workers: list[WorkerProcess] = []
        try:
            for _ in range(num_workers):
                self._workers.append(WorkerProcess(spec, timeout_s))
            while not all(worker.ready for worker in self._workers):
                self._wait({}, deque())
        except BaseException:
            self.close()
            raise

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Return a result for each request, in order. A request that fails has ``score_on_failure`` and says why."""
        assert self._workers, "a closed pool can't score"
        results: dict[int, RewardResult] = {}
        queue = deque(range(len(requests)))
        chunk = min(_MAX_CHUNK, math.ceil(len(requests) / (4 * len(self._workers))))
        with self._lock:
            try:
                while len(results) < len(requests):
                    self._assign(requests, queue, chunk)
                    self._wait(results, queue)
            finally:
                self._abandon_unfinished()
        return [self._with_failure_score(results[index]) for index in range(len(requests))]

    def close(self) -> None:
        """End every worker and whatever it started. The pool can't be used afterwards."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _assign(self, requests: Sequence[RewardRequest], queue: deque[int], chunk: int) -> None:
        """Give each idle worker its next requests. One that died idle is replaced, and nothing is held against them."""
        for slot, worker in enumerate(self._workers):
            if not queue or not worker.ready or worker.pending:
                continue
            indices = [queue.popleft() for _ in range(min(chunk, len(queue)))]
            try:
                worker.send(indices, [requests[index] for index in indices])
            except OSError:
                queue.extendleft(reversed(indices))
                self._replace(slot)

    def _wait(self, results: dict[int, RewardResult], queue: deque[int]) -> None:
        """Wait for the next message or deadline, and act on every one that is due."""
        # Taken before the wait, so that a worker is late only if it was silent at a look after its deadline.
        now = time.monotonic()
        active = [worker for worker in self._workers if worker.active]
        patience = max(0.0, min((worker.deadline for worker in active), default=0.0) - now)
        readable = wait([worker.connection for worker in active], patience)
        for slot, worker in enumerate(self._workers):
            if worker.connection in readable:
                self._receive(slot, results, queue)
            elif worker in active and now >= worker.deadline:
                result = RewardResult(math.nan, "timeout", worker.lateness)
                self._fail(slot, result, results, queue)

    def _receive(self, slot: int, results: dict[int, RewardResult], queue: deque[int]) -> None:
        worker = self._workers[slot]
        try:
            finished = worker.receive()
        except (EOFError, OSError):
            result = RewardResult(math.nan, "raised", f"the worker process {worker.cause_of_death()}")
            self._fail(slot, result, results, queue)
        else:
            results.update([finished] if finished else [])

    def _fail(self, slot: int, result: RewardResult, results: dict[int, RewardResult], queue: deque[int]) -> None:
        """Blame the request that a worker was at, put those after it back in the queue, and replace the worker."""
        worker = self._workers[slot]
        if not worker.ready:
            raise RewardError(f"a reward worker did not start: {result.detail}. reward: {self._spec}")
        results[worker.pending.popleft()] = result
        queue.extendleft(reversed(worker.pending))
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = WorkerProcess(self._spec, self._timeout_s)

    def _abandon_unfinished(self) -> None:
        """Replace workers that are still busy, as they are after an interrupt: their results would come too late."""
        for slot, worker in enumerate(self._workers):
            if worker.pending:
                self._replace(slot)

    def _with_failure_score(self, result: RewardResult) -> RewardResult:
        return result if result.outcome == "ok" else replace(result, score=self._score_on_failure)
