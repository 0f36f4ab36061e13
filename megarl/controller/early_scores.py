"""Rewards by a function, which is called as soon as a rollout has ended, while others are still sampled."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megarl.reward.pool import RewardPool
from megarl.types import RewardRequest, RewardResult, Rollout


@dataclass(frozen=True)
class _Begun:
    """A rollout that has ended, whose reward is wanted. rollout: is held, so that no other one gets its identity."""

    rollout: Rollout
    request: Callable[[], RewardRequest]


class EarlyScores:
    """Scores what has ended in a thread of its own, and the rest when all are asked for.

    num_workers: of the pool, and rollouts that are scored at a time: a function that hangs holds those up alone. After
    one that did, none is begun before the rest is asked for, whose batch has the pool's limits.
    """

    def __init__(self, pool: RewardPool, num_workers: int) -> None:
        self._pool, self._num_workers = pool, num_workers
        self._changed = threading.Condition()
        self._waiting: dict[int, _Begun] = {}
        self._at_work: dict[int, _Begun] = {}
        self._scored: dict[int, RewardResult] = {}  # of rollouts that somebody still holds
        self._has_hung, self._has_ended = False, False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="early scores", daemon=True)
        self._thread.start()

    def begin(self, rollout: Rollout, request: Callable[[], RewardRequest]) -> None:
        """Have a rollout scored. request: makes what the function is asked, in another thread."""
        with self._changed:
            self._waiting[id(rollout)] = _Begun(rollout, request)
            self._changed.notify_all()

    def score(
        self, rollouts: Sequence[Rollout], requests: Sequence[RewardRequest], tell: Callable[[str], None]
    ) -> list[RewardResult]:
        """Return the result of each rollout, in order, as ``RewardPool.score`` does of its ``requests``."""
        names = [id(rollout) for rollout in rollouts]
        with self._changed:
            for name in names:
                self._waiting.pop(name, None)
            self._changed.wait_for(lambda: self._failure or not any(name in self._at_work for name in names))
            if self._failure is not None:
                raise self._failure
            found = {name: self._scored.pop(name) for name in names if name in self._scored}
        left = [i for i, name in enumerate(names) if name not in found]
        results = self._pool.score([requests[i] for i in left], tell)
        with self._changed:
            self._has_hung = False
            self._changed.notify_all()
        of_left = dict(zip(left, results, strict=True))
        return [of_left[i] if i in of_left else found[name] for i, name in enumerate(names)]

    def close(self) -> None:
        """Score no more; wait for what is at work."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            while batch := self._next():
                results = self._pool.score([begun.request() for begun in batch.values()])
                with self._changed:
                    for (name, begun), result in zip(batch.items(), results, strict=True):
                        self._scored[name] = result
                        weakref.finalize(begun.rollout, self._scored.pop, name, None)
                    self._has_hung = any(result.outcome == "timeout" for result in results)
                    self._at_work = {}
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - it ends the run, in the thread that asks for the scores
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next(self) -> dict[int, _Begun]:
        """Wait for rollouts to score, and return them; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or (self._waiting and not self._has_hung))
            if not self._has_ended:
                names = list(self._waiting)[: self._num_workers]
                self._at_work = {name: self._waiting.pop(name) for name in names}
            return self._at_work


@contextmanager
def early_scores(pool: RewardPool | None, num_workers: int) -> Iterator[EarlyScores | None]:
    """Score early for as long as the block lasts; yield None where no function scores."""
    if pool is None:
        yield None
        return
    scores = EarlyScores(pool, num_workers)
    try:
        yield scores
    finally:
        scores.close()
