"""The rollout engines in processes of their own, on the host of the trainer's ranks or on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megarl.controller.engines import Ended, unheard
from megarl.controller.observer import Observer
from megarl.controller.served_engines import ServedEngines
from megarl.launchers.group import WorkerGroup, everywhere
from megarl.ranks.work import PublishWork
from megarl.ranks.worker import Worker
from megarl.rollout.served import Ask, Take
from megarl.types import GenerationRequest, Group, Sampling


@dataclass(frozen=True)
class EngineServers:
    """Engines, and the group of ranks whose weights they run.

    receiving: has the hosts of engines take in what the ranks publish in its block; gives the numbers of engines that
    were lost with their host and have another from now on.
    """

    group: WorkerGroup
    engines: ServedEngines
    receiving: Callable[[WorkerGroup], AbstractContextManager[Sequence[int]]]
    observer: Observer

    def ask(self, requests: Sequence[GenerationRequest], sampling: Sampling, ended: Ended = unheard) -> Asked:
        """Have the rollouts of every request sampled; don't wait. ended: hears of each, in a thread of its engine."""
        return Asked(self, requests, sampling, self.engines.ask(requests, sampling, ended))

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, ended: Ended = unheard
    ) -> list[Group]:
        """Return the rollouts of every request, in order. ended: as of ``ask``."""
        return self.ask(requests, sampling, ended).result()

    def collect_complete(self, asked: Sequence[Asked], least: int) -> dict[int, Group]:
        """Wait for the groups of ``least``; return all that are complete by their index in ``asked``, once each.

        asked: a single request each.
        """
        single = [asked_one.asks[0] for asked_one in asked]
        found = self.engines.collect_complete(single, least)
        groups = {place: found[ask.number] for place, ask in enumerate(single) if ask.number in found}
        for place, group in groups.items():
            self.observer.generated(asked[place].requests, asked[place].sampling, [group])
        return groups

    def rest(self) -> None:
        """Have the engines give their memory back, where it is on the trainer's devices."""
        self.engines.rest()

    def publish(self, policy_version: int, *, verify: bool) -> None:
        """Have the ranks write the actor's weights, and the engines read them; and compare checksums if asked."""
        self.engines.before_writing()
        with self.receiving(self.group) as numbers:
            self.engines.start_again(numbers)
            segments = everywhere(self.group, Worker.publish, PublishWork(policy_version, verify))
        self.engines.take(Take(policy_version, tuple(segment for segment in segments if segment is not None)))


@dataclass(frozen=True)
class Asked:
    """Rollouts that are being sampled."""

    servers: EngineServers
    requests: Sequence[GenerationRequest]
    sampling: Sampling
    asks: tuple[Ask, ...]

    def result(self) -> list[Group]:
        """Wait for the rollouts, and return those of every request, in order; once."""
        groups = self.servers.engines.collect(self.asks)
        self.servers.observer.generated(self.requests, self.sampling, groups)
        return groups
