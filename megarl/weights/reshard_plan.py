"""Which rows move from which rank to which, between two layouts of the same model: a pure plan.

It intersects, for every Hugging Face tensor, the ranges that source ranks hold with the ranges that target ranks need.
Publishing to the rollout engine and exporting a checkpoint are both such moves; ``reshard.py`` executes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megarl.errors import PublishError
from megarl.weights.shard import Shard

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Rows [offset, offset + length) along ``dim`` of parameter ``name`` on ``rank``."""

    rank: int
    name: str
    dim: int
    offset: int

    def view(self, parameters: Mapping[str, Tensor], length: int) -> Tensor:
        """Return the rows of this piece as a view."""
        return parameters[self.name].narrow(self.dim, self.offset, length)


@dataclass(frozen=True)
class Move:
    """``length`` rows from one rank's parameter to another's."""

    source: Piece
    target: Piece
    length: int
    numel: int


@dataclass(frozen=True)
class _Held:
    start: int
    stop: int
    piece: Piece


def plan_reshard(sources: Sequence[Sequence[Shard]], targets: Sequence[Sequence[Shard]]) -> tuple[Move, ...]:
    """Plan the moves that fill every target shard; index of the outer sequences is the rank.

    A range that several ranks hold (data-parallel replicas, replicated norms, tied embeddings) is taken from the
    target's own rank if it is there, else from the holder that has sent least so far, so that the load spreads.

    Raises PublishError where no rank holds a range that a target needs.
    """
    held: dict[str, list[_Held]] = defaultdict(list)
    for rank, shards in enumerate(sources):
        for shard in shards:
            offset = 0
            for seg in shard.segments:
                if seg.tensor is not None:
                    piece = Piece(rank, shard.name, shard.dim, offset)
                    held[seg.tensor].append(_Held(seg.start, seg.stop, piece))
                offset += seg.length
    sent = [0] * len(sources)
    moves: list[Move] = []
    for rank, shards in enumerate(targets):
        for shard in shards:
            moves += _fill(rank, shard, held, sent)
    return tuple(moves)


def _fill(rank: int, shard: Shard, held: Mapping[str, list[_Held]], sent: list[int]) -> list[Move]:
    """Plan the moves that fill one target shard."""
    rows = shard.shape[shard.dim]
    row_numel = _numel(shard.shape) // rows
    moves, offset = [], 0
    for seg in shard.segments:
        position = seg.start
        while seg.tensor is not None and position < seg.stop:
            holders = [h for h in held.get(seg.tensor, ()) if h.start <= position < h.stop]
            if not holders:
                raise PublishError(
                    f"no rank holds row {position} of {seg.tensor}, needed by {shard.name} on rank {rank}"
                )
            assert all(h.piece.dim == shard.dim for h in holders), f"{seg.tensor} is split along different dims"
            best = min(holders, key=lambda h: (h.piece.rank != rank, sent[h.piece.rank], h.piece.rank))
            length = min(best.stop, seg.stop, *_own_starts(held[seg.tensor], rank, position)) - position
            source = Piece(best.piece.rank, best.piece.name, best.piece.dim, best.piece.offset + position - best.start)
            target = Piece(rank, shard.name, shard.dim, offset + position - seg.start)
            moves.append(Move(source, target, length, length * row_numel))
            if best.piece.rank != rank:
                sent[best.piece.rank] += length * row_numel
            position += length
        offset += seg.length
    return moves


def _own_starts(holders: Sequence[_Held], rank: int, position: int) -> list[int]:
    """Return where later ranges begin that the target's own rank holds: what comes from elsewhere ends there."""
    return [h.start for h in holders if h.piece.rank == rank and h.start > position]


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def cut_into_buckets(moves: Sequence[Move], max_numel: int) -> list[list[Move]]:
    """Cut the moves, in plan order, into runs in which no rank sends or receives more than ``max_numel``.

    A larger move is itself cut; a single row that is larger travels alone.
    """
    buckets: list[list[Move]] = []
    load: dict[tuple[str, int], int] = defaultdict(int)
    for move in (part for whole in moves for part in _parts(whole, max_numel)):
        ends = (("send", move.source.rank), ("receive", move.target.rank))
        if not buckets or any(load[end] + move.numel > max_numel for end in ends):
            buckets.append([])
            load.clear()
        buckets[-1].append(move)
        for end in ends:
            load[end] += move.numel
    return buckets


def _parts(move: Move, max_numel: int) -> Iterator[Move]:
    """Yield a move in parts of at most ``max_numel``, and of one row at least."""
    row_numel = move.numel // move.length
    step = max(1, max_numel // row_numel)
    for first in range(0, move.length, step):
        length = min(step, move.length - first)
        source = replace(move.source, offset=move.source.offset + first)
        target = replace(move.target, offset=move.target.offset + first)
        yield Move(source, target, length, length * row_numel)
