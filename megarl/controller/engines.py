"""The rollout engines as the rest of the controller sees them, wherever their processes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megarl.types import GenerationRequest, Group, Rollout, Sampling

Ended = Callable[[int, Rollout], None]
"""Hears of a rollout that has ended, with the place of its request among those that were asked for together."""


def unheard(place: int, rollout: Rollout) -> None:
    """Do nothing with a rollout that has ended."""


class Engines(Protocol):
    """Replicas of one engine that share the prompts."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, ended: Ended = unheard
    ) -> list[Group]:
        """Return the rollouts of every request, in order.

        ended: hears of each in any thread, where the engines tell of one before all have ended.
        """
        ...

    def rest(self) -> None:
        """Let the engines give memory back that training needs. They take it again by themselves."""
        ...

    def publish(self, policy_version: int, *, verify: bool) -> None:
        """Give the engines the actor's weights, as publication ``policy_version``.

        verify: raise PublishError where an engine holds other values than were sent.
        """
        ...
