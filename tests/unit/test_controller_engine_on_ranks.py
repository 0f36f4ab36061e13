from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megarl.controller.engine_on_ranks import EngineOnRanks
from megarl.controller.observer import Observer
from megarl.types import GenerationRequest, Group, Rollout, Sampling
from tests.unit.stand_ins import PlainRanks


class Watcher(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[Group]]] = []

    def generated(self, requests: Sequence[GenerationRequest], sampling: Sampling, groups: Sequence[Group]) -> None:
        self.seen.append((len(requests), list(groups)))


def _group(request: GenerationRequest) -> Group:
    return (Rollout(request.token_ids, (), "stop", 0),)


@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (4, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("num_requests", [1, 3, 8])
def test_rollouts_come_back_in_the_order_of_their_requests_however_replicas_share_them(
    ranks: int, tp: int, num_requests: int
) -> None:
    def answer(rank: int, verb: str, work: Any) -> Any:
        assert verb == "generate"
        return tuple(map(_group, work.requests)) if rank % tp == 0 else None

    group, watcher = PlainRanks(ranks, answer), Watcher()
    requests = [GenerationRequest((number,), number) for number in range(num_requests)]
    groups = EngineOnRanks(group, tp, watcher).generate(requests, Sampling())
    assert groups == [_group(request) for request in requests]
    assert watcher.seen == [(num_requests, groups)]
    [(_, works)] = group.calls
    for first in range(0, ranks, tp):  # the ranks of a replica are given one object
        assert len({id(work) for work in works[first : first + tp]}) == 1
    shares = [len(work.requests) for work in works[::tp]]
    assert max(shares) - min(shares) <= 1 and sum(shares) == num_requests


def test_engines_rest_on_all_ranks() -> None:
    group = PlainRanks(4)
    EngineOnRanks(group, 2, Observer()).rest()
    assert group.calls == [("rest", [None] * 4)]
