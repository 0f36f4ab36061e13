"""What a role asks of a training backend: one role's model on one rank.

Shape suffixes: N predicted tokens of a micro-batch that count, R rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megarl.batching.pack import MicroBatch
    from megarl.roles import Role
    from megarl.train.held_state import Held, SavedState, UpdateCounts
    from megarl.types import Metrics, Sequences
    from megarl.weights.shard import Peers

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """This rank's place in a role's layout. reports: whether it tells the results of its data-parallel rank."""

    dp: int
    reports: bool


@dataclass(frozen=True)
class TokenScores:
    """Log-prob of every predicted token that counts, and entropy of the distribution that it was drawn from."""

    logprobs_N: Tensor
    entropy_N: Tensor


@dataclass(frozen=True)
class Skipped:
    """An optimizer step that was not taken, since its gradient isn't finite: no parameter has changed."""

    grad_norm: float


class Output(Protocol):
    """The last stage's output for a micro-batch. It hides over how many ranks vocabulary and sequences are split."""

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        ...

    def logprobs(self, temperature: float) -> TokenScores:
        """Return the scores under softmax(logits / temperature), which the engine samples from."""
        ...

    def values(self) -> Tensor:
        """Return the value head's numbers [N] at the positions that predict a token that counts."""
        ...

    def scores(self) -> Tensor:
        """Return the value head's numbers [R] at the last token of every row."""
        ...


Loss = Callable[["MicroBatch", Output], "tuple[Tensor, dict[str, Tensor]]"]
"""Turns a micro-batch into its share of a loss, and numbers to add up over micro-batches."""


class Backend(Protocol):
    """One role's model on one rank. Making it and every method are collective over all ranks of the role's layout."""

    role: Role
    place: Place
    device: torch.device

    def pack(self, sequences: Sequences, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Lay out micro-batches of rows as this rank computes them; some without rows may follow."""
        ...

    def forward(self, micros: Sequence[MicroBatch], read: Callable[[MicroBatch, Output], T]) -> list[T]:
        """Return a list of what ``read`` makes of every micro-batch, without gradients; empty but on the last stage."""
        ...

    def step(self, micros: Sequence[MicroBatch], loss: Loss, num_sequences: int) -> Metrics | Skipped:
        """Take one optimizer step on the sum of ``loss`` over micro-batches and data-parallel ranks.

        num_sequences: of the whole mini-batch. The metrics are the sums of what ``loss`` told of this rank's
        micro-batches, with grad_norm (before clipping) and lr.
        """
        ...

    def updating(self) -> AbstractContextManager[None]:
        """Have all that optimizer steps need on the device for the duration."""
        ...

    def resident(self) -> AbstractContextManager[None]:
        """Have the parameters on the device for the duration: whoever reads or writes them does it in here."""
        ...

    def peers(self) -> tuple[Peers, ...]:
        """Return the shards of the role's model on all ranks, in rows of Hugging Face tensors, as a tuple of Peers."""
        ...

    def parameters(self) -> Mapping[str, Tensor]:
        """Return this rank's parameters by the names of its shards. They can be used while they are resident."""
        ...

    def held(self) -> Iterator[Held]:
        """Yield the Held parts of parameters that this rank's optimizer steps. They can be read while ``updating``."""
        ...

    def counts(self) -> UpdateCounts:
        """Return the UpdateCounts of the role."""
        ...

    def load(self, saved: SavedState, counts: UpdateCounts) -> None:
        """Go on from weights and moments that were saved, and from ``counts``."""
        ...

    def export(self, out: Path, *, weights: bool = True) -> None:
        """Write ``out`` as a Hugging Face folder, with config and tokenizer files of the folder that it started from.

        weights: whether the weights are in it. Raises ResourceError on every rank where the disk is too small.
        """
        ...
