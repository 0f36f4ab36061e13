"""The rollout engines as the rest of the controller sees them, wherever their processes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megarl.types import GenerationRequest, Group, Sampling


class Engines(Protocol):
    """Replicas of one engine that share the prompts."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Group]:
        """Return the rollouts of every request, in order."""
        ...

    def rest(self) -> None:
        """Let the engines give memory back that training needs. They take it again by themselves."""
        ...

    def publish(self, policy_version: int, *, verify: bool) -> None:
        """Give the engines the actor's weights, as publication ``policy_version``.

        verify: raise PublishError where an engine holds other values than were sent.
        """
        ...
