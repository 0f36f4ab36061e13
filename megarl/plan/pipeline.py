"""What a pipeline stage has passed forward and not yet backward, by the order in which Megatron runs its schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from megarl.parallel.layout import Layout


@dataclass(frozen=True)
class ChunkPass:
    """One pass of one micro-batch through one chunk of a stage, both counted from 0."""

    chunk: int
    micro_batch: int
    is_forward: bool


@dataclass(frozen=True)
class Moment:
    """A stage about to run a backward pass through chunk ``chunk``. num_held: micro-batches that each chunk keeps."""

    num_held: tuple[int, ...]
    chunk: int

    def bytes_of(self, chunk_bytes: Sequence[int]) -> int:
        """Return the bytes that all chunks keep, given those that each keeps of a micro-batch."""
        return sum(held * size for held, size in zip(self.num_held, chunk_bytes, strict=True))


def chunk_passes(layout: Layout, stage: int, num_micro_batches: int) -> Iterator[ChunkPass]:
    """Yield the passes of a stage in an update, in order: 1F1B, interleaved where chunks take turns.

    Each chunk is passed by as many micro-batches as there are stages before the next chunk's turn. First come forward
    passes alone, then a forward and a backward pass by turns, then the backward passes that are left. Micro-batches
    that make up for a multiple of the stages, which the interleaved schedule needs, are numbered after the others.
    """
    pp, vpp = layout.pp, layout.vpp
    stages_after = pp - 1 - stage
    total = num_micro_batches if vpp == 1 else -(-num_micro_batches // pp) * pp
    order = [
        (chunk, micro)
        for first in range(0, total, pp)
        for chunk in range(vpp)
        for micro in range(first, min(first + pp, total))
    ]
    num_ahead = stages_after if vpp == 1 else 2 * stages_after + (vpp - 1) * pp
    for step in range(len(order) + num_ahead):
        if step < len(order):
            chunk, micro = order[step]
            yield ChunkPass(chunk, micro, is_forward=True)
        if 0 <= step - num_ahead < len(order):
            chunk, micro = order[step - num_ahead]
            yield ChunkPass(vpp - 1 - chunk, micro, is_forward=False)


@cache
def moments(layout: Layout, stage: int, num_micro_batches: int) -> tuple[Moment, ...]:
    """Return every different moment at which a stage keeps more than before and after it.

    Those are just before backward passes. Micro-batches without rows keep next to nothing and don't count.
    """
    # The schedule repeats itself once a stage has passed all chunks forward and backward by turns.
    num_micro_batches = min(num_micro_batches, 3 * layout.pp)
    held = [0] * layout.vpp
    found: dict[Moment, None] = {}
    for done in chunk_passes(layout, stage, num_micro_batches):
        if done.micro_batch >= num_micro_batches:
            continue
        if not done.is_forward:
            found[Moment(tuple(held), done.chunk)] = None
        held[done.chunk] += 1 if done.is_forward else -1
    return tuple(found)
