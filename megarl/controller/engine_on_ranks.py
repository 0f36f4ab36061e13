"""The rollout engine in the trainer's own ranks: its replicas share the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarl.batching.plan import split_rows
from megarl.controller.engines import Ended, unheard
from megarl.controller.observer import Observer
from megarl.launchers.group import WorkerGroup, everywhere
from megarl.ranks.work import GenerateWork, PublishWork
from megarl.ranks.worker import Worker
from megarl.types import GenerationRequest, Group, Sampling


@dataclass(frozen=True)
class EngineOnRanks:
    """The group of ranks that hold the engine. tp: ranks of a replica."""

    group: WorkerGroup
    tp: int
    observer: Observer

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, ended: Ended = unheard
    ) -> list[Group]:
        """Return the rollouts of every request, in order. Replicas share the requests evenly.

        ended: hears nothing, since a replica tells of all its rollouts at once.
        """
        num_replicas = self.group.world_size // self.tp
        shares = [tuple(requests[i] for i in rows) for rows in split_rows(len(requests), num_replicas)]
        works = [GenerateWork(share, sampling) for share in shares]
        by_rank = [works[rank // self.tp] for rank in range(self.group.world_size)]
        answers = self.group.submit(Worker.generate, by_rank).result()
        groups = [group for answer in answers[:: self.tp] for group in answer or ()]
        self.observer.generated(requests, sampling, groups)
        return groups

    def rest(self) -> None:
        """Let the engines give their memory back for training."""
        everywhere(self.group, Worker.rest, None)

    def publish(self, policy_version: int, *, verify: bool) -> None:
        """Give the engines the actor's weights, as publication ``policy_version``; compare their checksums if asked."""
        everywhere(self.group, Worker.publish, PublishWork(policy_version, verify))
