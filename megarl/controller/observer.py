"""Watches a run without taking part in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megarl.types import GenerationRequest, Group, Prompt, Sampling

if TYPE_CHECKING:
    from megarl.algorithm.samples import Rewards
    from megarl.launchers.group import WorkerGroup


class Observer:
    """Told of the ranks, every generation and every scoring of a run; this one ignores them."""

    def opened(self, group: WorkerGroup) -> None:
        """Take note of the ranks of a run that has started."""

    def generated(self, requests: Sequence[GenerationRequest], sampling: Sampling, groups: Sequence[Group]) -> None:
        """Take note of the rollouts of some requests."""

    def scored(self, prompts: Sequence[Prompt], groups: Sequence[Group], rewards: Rewards) -> None:
        """Take note of the rewards of some rollouts."""
