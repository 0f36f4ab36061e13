"""Rewards of rollouts that have ended while others are sampled: the same as of a whole batch, and none twice."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from megarl.controller.early_scores import EarlyScores, early_scores
from megarl.errors import RewardError
from megarl.reward.pool import RewardPool
from megarl.reward.registry import RewardSpec
from megarl.types import RewardRequest, RewardResult, Rollout

REWARD = """
def compute_score(solution_str, ground_truth, **_):
    with open(solution_str, "a") as file:
        file.write(ground_truth + "\\n")
    return 1 / float(ground_truth)
"""


def request(truth: str, solution: str = "") -> RewardRequest:
    return RewardRequest("source", "prompt", solution, truth, {})


def rollouts(count: int) -> list[Rollout]:
    """Return rollouts that are all equal."""
    return [Rollout((5,), (-0.1,), "stop", 0) for _ in range(count)]


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait until something is so; fail where it never is."""
    deadline_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_what_has_ended_is_scored_at_once_and_all_results_are_those_of_a_whole_batch(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    scored = tmp_path / "scored"
    truths = ["3", "0", "7", "none", "0.5"]
    requests, ended = [request(truth, str(scored)) for truth in truths], rollouts(5)
    with RewardPool(2, 30.0, RewardSpec(path=str(tmp_path / "reward.py")), -1.0) as pool:
        expected = pool.score(requests)
        scored.unlink()
        with early_scores(pool, 2) as early:
            assert early is not None
            for i in (3, 0, 1):
                early.begin(ended[i], partial(requests.__getitem__, i))
            eventually(lambda: scored.is_file() and len(scored.read_text().split()) == 3)
            found = early.score(ended, requests, print)
    assert [(r.score, r.outcome) for r in found] == [(r.score, r.outcome) for r in expected]
    assert [r.score for r in found] == [1 / 3, -1.0, 1 / 7, -1.0, 2.0]
    assert sorted(scored.read_text().split()) == sorted(truths)


@dataclass
class Pool:
    """Answers with the truth of each request, a hang where that is negative. batches: truths, as they were asked for.

    may_go_on: what every call waits for.
    """

    batches: list[list[float]] = field(default_factory=list)
    may_go_on: threading.Event = field(default_factory=threading.Event)

    def score(self, requests: Sequence[RewardRequest], tell: Callable[[str], None] | None = None) -> list[RewardResult]:
        truths = [float(request.ground_truth) for request in requests]
        self.batches.append(truths)
        assert self.may_go_on.wait(30)
        if 0.0 in truths:
            raise RewardError("a worker did not start")
        return [RewardResult(truth, "timeout" if truth < 0 else "ok") for truth in truths]


@contextmanager
def begun(truths: Sequence[float], num_workers: int = 2) -> Iterator[tuple[EarlyScores, Pool, list[Rollout]]]:
    """Yield what scores early, with rollouts of these truths begun, of which the first is at work."""
    pool, ended = Pool(), rollouts(len(truths))
    with early_scores(cast(RewardPool, pool), num_workers) as early:
        assert early is not None
        for i, (rollout, truth) in enumerate(zip(ended, truths, strict=True)):
            early.begin(rollout, partial(request, str(truth)))
            if i == 0:
                eventually(lambda: bool(pool.batches))
        yield early, pool, ended
        pool.may_go_on.set()


def test_a_few_are_scored_at_a_time_and_the_rest_at_once_when_all_are_asked_for() -> None:
    with begun([1, 2, 3, 4, 5]) as (early, pool, ended):
        pool.may_go_on.set()
        eventually(lambda: len(pool.batches) == 3)
        assert pool.batches == [[1], [2, 3], [4, 5]]
        results = early.score(ended, [request(str(truth)) for truth in (1, 2, 3, 4, 5)], print)
        assert [r.score for r in results] == [1, 2, 3, 4, 5]
    assert pool.batches[3:] == [[]]


def test_after_one_that_hung_none_is_begun_before_the_rest_is_asked_for_in_one_batch() -> None:
    with begun([-1, 2, 3, 4]) as (early, pool, ended):
        pool.may_go_on.set()
        time.sleep(0.1)  # in which others would be begun
        results = early.score(ended, [request(str(truth)) for truth in (-1, 2, 3, 4)], print)
    assert pool.batches == [[-1], [2, 3, 4]]
    assert [r.outcome for r in results] == ["timeout", "ok", "ok", "ok"]


def test_a_rollout_that_is_dropped_without_being_asked_for_is_held_by_nobody() -> None:
    with begun([1, 2, 3, 4, 5]) as (_, pool, ended):
        pool.may_go_on.set()
        eventually(lambda: len(pool.batches) == 3)
        first = weakref.ref(ended[0])
        ended.clear()
        eventually(lambda: first() is None)


def test_an_error_of_the_pool_reaches_who_asks_for_the_scores() -> None:
    with begun([0, 1]) as (early, pool, ended):
        pool.may_go_on.set()
        with pytest.raises(RewardError, match="a worker did not start"):
            early.score(ended, [request("0"), request("1")], print)


def test_nothing_scores_early_where_no_function_scores() -> None:
    with early_scores(None, 2) as early:
        assert early is None
