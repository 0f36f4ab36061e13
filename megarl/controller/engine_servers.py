"""The rollout engines in processes of their own, on the host of the trainer's ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarl.controller.observer import Observer
from megarl.controller.served_engines import ServedEngines
from megarl.launchers.group import WorkerGroup, everywhere
from megarl.ranks.worker import Worker
from megarl.rollout.served import Take
from megarl.types import GenerationRequest, Group, Sampling


@dataclass(frozen=True)
class EngineServers:
    """Engines, and the group of ranks whose weights they run."""

    group: WorkerGroup
    engines: ServedEngines
    observer: Observer

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Group]:
        """Return the rollouts of every request, in order."""
        groups = self.engines.generate(requests, sampling)
        self.observer.generated(requests, sampling, groups)
        return groups

    def rest(self) -> None:
        """Do nothing: what the engines hold is on devices of their own."""

    def publish(self, policy_version: int) -> None:
        """Have the ranks write the actor's weights, and the engines read them."""
        self.engines.before_writing()
        segments = everywhere(self.group, Worker.publish, policy_version)
        self.engines.take(Take(policy_version, tuple(segment for segment in segments if segment is not None)))
