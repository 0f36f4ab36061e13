"""What a controller and an engine in processes of its own say to each other, and what such an engine is asked to do.

Knows no engine. Messages travel in order. An engine samples as it is asked, tells of every rollout when it ends, and
changes its weights between two tokens, where it is told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from megarl.errors import MegarlError
from megarl.types import GenerationRequest, Rollout, Sampling

if TYPE_CHECKING:
    from megarl.weights.shared import Segment


@dataclass(frozen=True)
class Ask:
    """The rollouts of a prompt that are to be sampled, by their ``indices`` in the group. number: of the group."""

    number: int
    request: GenerationRequest
    sampling: Sampling
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Take:
    """Go on with the weights of a publication. segments: by rank of the trainer."""

    policy_version: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Rest:
    """Give the memory of devices back for training. An engine takes it again when it is next told anything."""


Order = tuple[Ask, ...] | Take | Rest
"""What an engine is told. Asks that are told together are begun together."""


@dataclass(frozen=True)
class Ready:
    """The engine has started. Its weights are random."""


@dataclass(frozen=True)
class Took:
    """The engine has gone on with the weights of a publication."""

    policy_version: int


@dataclass(frozen=True)
class Rested:
    """The engine has given its memory back."""


@dataclass(frozen=True)
class Done:
    """A rollout has ended: that of ``index`` in the group of the ask ``number``."""

    number: int
    index: int
    rollout: Rollout


@dataclass(frozen=True)
class Busy:
    """The engine lives, and samples."""


@dataclass(frozen=True)
class Failed:
    """A rank of the engine ends. error: where it is one that a user can act on, which another start wouldn't heal."""

    text: str
    error: MegarlError | None


Answer = Ready | Took | Rested | Done | Busy | Failed


class StreamingEngine(Protocol):
    """One rank of an engine that samples while it is asked for more. All ranks are told the same, in the same order."""

    def add(self, ask: Ask) -> None:
        """Sample the rollouts of a prompt from the next step on. Raises DataError where it leaves no room to answer."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether rollouts are unfinished."""
        ...

    def step(self) -> Sequence[Done]:
        """Sample a token of as many rollouts as fit, and return those that have ended."""
        ...

    def take(self, order: Take) -> None:
        """Change the weights, and forget all that was computed with others. Unfinished rollouts go on with these."""
        ...

    def rest(self) -> None:
        """Give the memory of devices back, until it is told to add or to take. Nothing is unfinished."""
        ...


def samplings(sampling: Sampling) -> tuple[Sampling, ...]:
    """Return how each rollout of a group is sampled, in order: n alike, and a greedy one if asked."""
    return (sampling,) * sampling.n + (replace(sampling, temperature=0.0),) * sampling.with_greedy
