"""A rank's engine and the weights that it gave up: what the Worker asks of it, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from megarl.ranks.spec import RankSpec
from megarl.ranks.work import GenerateWork, PublishWork
from megarl.ranks.worker import Worker
from megarl.types import GenerationRequest, Rollout, Sampling

WORK = GenerateWork((GenerationRequest((1, 2), 0),), Sampling(max_tokens=1))


class Recorded:
    """An engine on a device, which tells what it is asked for."""

    def __init__(self) -> None:
        self.policy_version = -1
        self.has_lost_weights = False
        self.calls: list[str] = []

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[tuple[Rollout, ...]]:
        self.calls.append(f"generate with {self.policy_version}")
        return []

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> frozenset[str]:
        return frozenset()

    def publish_done(self, policy_version: int) -> None:
        self.policy_version, self.has_lost_weights = policy_version, False

    def sleep(self) -> None:
        self.has_lost_weights = True
        self.calls.append("sleep")

    def wake_weights(self) -> None:
        self.calls.append("wake weights")

    def wake_up(self) -> None:
        self.calls.append("wake up")

    def shutdown(self) -> None: ...


class RecordedPublisher:
    """Publishes nothing, and tells of it."""

    def __init__(self, engine: Recorded) -> None:
        self.engine = engine

    def publish(self, policy_version: int, *, verify: bool = False) -> None:
        self.engine.calls.append(f"publish {policy_version}" + " and verify" * verify)
        self.engine.publish_done(policy_version)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Return the Worker of a rank that is alone and holds no role."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    worker = Worker(RankSpec((), seed=0, hang_timeout_s=60.0), torch.device("cpu"))
    engine = Recorded()
    worker.engine, worker.publisher = engine, RecordedPublisher(engine)
    return worker


def calls(worker: Worker) -> list[str]:
    """Return what the engine was asked for."""
    assert isinstance(worker.engine, Recorded)
    return worker.engine.calls


def test_only_the_weights_wake_to_be_published_and_the_rest_to_generate(worker: Worker) -> None:
    worker.publish(PublishWork(0))
    worker.generate(WORK)
    assert calls(worker) == ["wake weights", "publish 0", "wake up", "generate with 0"]


def test_weights_that_were_given_up_are_published_again_under_their_number(worker: Worker) -> None:
    worker.publish(PublishWork(3, verify=True))
    worker.rest(None)
    worker.generate(WORK)
    again = ["sleep", "wake weights", "publish 3", "wake up", "generate with 3"]
    assert calls(worker) == ["wake weights", "publish 3 and verify", *again]


def test_after_a_publication_nothing_is_published_twice(worker: Worker) -> None:
    worker.publish(PublishWork(0))
    worker.rest(None)
    worker.publish(PublishWork(1))
    worker.generate(WORK)
    assert [call for call in calls(worker) if call.startswith("publish")] == ["publish 0", "publish 1"]
