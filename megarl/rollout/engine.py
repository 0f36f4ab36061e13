"""What the controller's worker asks of a rollout engine. Knows no engine, so that importing it costs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from megarl.errors import DataError, PublishError
from megarl.types import GenerationRequest, Rollout, Sampling

if TYPE_CHECKING:
    from torch import Tensor

UNPUBLISHED = -1
"""The ``policy_version`` of an engine whose weights were never published."""


def check_room(prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    """Raise DataError for a prompt that leaves an engine no room to answer. max_tokens: of the response."""
    if prompt_tokens + max_tokens > max_model_len:
        raise DataError(
            f"a prompt of {prompt_tokens} tokens and a response of up to {max_tokens} exceed the engine's "
            f"max_model_len = {max_model_len}; raise it, or lower data.max_prompt_length"
        )


def check_published(policy_version: int) -> None:
    """Raise PublishError before the first publication."""
    if policy_version == UNPUBLISHED:
        raise PublishError("an engine was asked before weights were published: its weights are random")


class RolloutEngine(Protocol):
    """One rank of an engine whose shards live in the trainer's processes.

    Replica r is the consecutive ranks [r * tp, (r + 1) * tp). Every method is called by all ranks of a replica with the
    same arguments; replicas may differ, and need not wait for each other.
    """

    @property
    def policy_version(self) -> int:
        """Number of the last publication, or ``UNPUBLISHED``."""
        ...

    @property
    def has_lost_weights(self) -> bool:
        """Whether ``sleep`` gave up the weights, and none have been published since."""
        ...

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[tuple[Rollout, ...]]:
        """Return ``sampling.n`` rollouts for each request (and a greedy one if asked) in order, the same on all ranks.

        A sample depends on its prompt, its request's seed and its index in the group alone: not on the other requests,
        their order, or the replica (up to rounding, which may differ with the shape of a batch). An engine that isn't
        built to be reproducible lets it depend on all requests.
        Raise ``PublishError`` before the first publication and while the engine ``has_lost_weights``, ``DataError`` for
        a prompt that leaves no room to answer.
        """
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's weight shards by the engine's names, to be written in place.

        Tied weights appear once. The tensors stay the same for the engine's life, across ``sleep`` and ``wake_up``.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> frozenset[str]:
        """Take this rank's part of whole tensors of a checkpoint. Return the names of the parameters that have theirs.

        ``tensors`` are taken one after the other, and none is kept.
        """
        ...

    def publish_done(self, policy_version: int) -> None:
        """Make the weights just written or loaded the policy that samples from now on.

        Forgets everything that was computed with older weights and stamps ``policy_version`` on every later rollout.
        """
        ...

    def sleep(self) -> None:
        """Free the device memory of weights and KV cache for training. No effect where none can be, or when asleep.

        The weights' values are gone with it.
        """
        ...

    def wake_weights(self) -> None:
        """Take the weights' memory back, before they are published: the trainer's own are on the device then."""
        ...

    def wake_up(self) -> None:
        """Take all memory back, before responses are generated. No effect when awake."""
        ...

    def shutdown(self) -> None:
        """Release what the engine holds. It can't be used afterwards."""
        ...
