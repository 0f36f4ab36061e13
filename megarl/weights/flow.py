"""What moves, as streams of elements that sender and receiver count alike, so that both can cut them without a word.

A flow is all that each rank of some peers takes from the same holders: moves in order, each move's layers and experts
in order, and of each of these its rows in order. A stream is what one rank sends another: parts of flows in order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megarl.weights.cells import Box, Window, indices


@dataclass(frozen=True, slots=True)
class Rows:
    """``num_rows`` rows, from ``first_row``, of a move's rectangle of one layer and expert."""

    move: Move
    layer: int
    expert: int
    first_row: int
    num_rows: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the rows."""
        return (self.num_rows, *self.move.sizes[1:])

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.num_rows * self.move.row_numel


@dataclass(frozen=True, slots=True)
class Move:
    """The same rectangle of every layer and expert of ``box``, from a parameter of the sender's to one of the target's.

    source: None in the plan of a rank that doesn't hold it. numel: of all rectangles.
    """

    box: Box
    source: Window | None
    target: Window
    sizes: tuple[int, ...]
    row_numel: int
    numel: int

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield the elements [start, stop), both between rows."""
        experts, num_rows = indices(self.box.experts), self.sizes[0]
        row, end = start // self.row_numel, stop // self.row_numel
        layers = indices(self.box.layers)
        while row < end:
            place, first = divmod(row, num_rows)
            count = min(num_rows - first, end - row)
            layer, expert = divmod(place, len(experts))
            yield Rows(self, layers[layer], experts[expert], first, count)
            row += count


def move_of(box: Box, source: Window | None, target: Window) -> Move:
    """Return the Move of a box."""
    sizes = tuple(stop - start for start, stop in box.spans)
    return Move(box, source, target, sizes, math.prod(sizes[1:]), box.numel)


@dataclass(frozen=True, eq=False)
class Flow:
    """Moves in order. ends: how many elements there are up to the end of each."""

    moves: tuple[Move, ...]
    ends: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.ends[-1]

    def row_start(self, position: int) -> int:
        """Return the position at which the row begins that an element is in."""
        if position >= self.numel:
            return self.numel
        at = bisect_right(self.ends, position)
        move = self.moves[at]
        return position - (position - self.ends[at] + move.numel) % move.row_numel

    def share(self, index: int, count: int) -> tuple[int, int]:
        """Return the range, as start and stop, of the ``index``-th of ``count`` equal parts, cut between rows."""
        return self.row_start(self.numel * index // count), self.row_start(self.numel * (index + 1) // count)

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield the elements [start, stop), both between rows."""
        at = bisect_right(self.ends, start)
        while start < stop:
            move = self.moves[at]
            before, end = self.ends[at] - move.numel, min(stop, self.ends[at])
            yield from move.rows(start - before, end - before)
            start, at = end, at + 1


def flow_of(moves: Sequence[Move]) -> Flow:
    """Return the Flow of moves."""
    return Flow(tuple(moves), tuple(accumulate(move.numel for move in moves)))


@dataclass(frozen=True, slots=True)
class Share:
    """The elements [start, stop) of a flow."""

    flow: Flow
    start: int
    stop: int


@dataclass(frozen=True)
class Stream:
    """All that one rank sends another: shares one after another. ends: how many elements up to the end of each."""

    shares: tuple[Share, ...]
    ends: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.ends[-1]

    @property
    def widest_row(self) -> int:
        """Elements of the longest row: a cut is at most so far from where equal parts would have it."""
        return max(move.row_numel for share in self.shares for move in share.flow.moves)

    def cut(self, index: int, count: int) -> int:
        """Return the position at which the ``index``-th of ``count`` equal parts begins, cut between rows."""
        position = self.numel * index // count
        if position >= self.numel:
            return self.numel
        at = bisect_right(self.ends, position)
        share = self.shares[at]
        shift = share.start - (self.ends[at - 1] if at else 0)
        return share.flow.row_start(position + shift) - shift

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield the elements [start, stop), both between rows."""
        at = bisect_right(self.ends, start)
        while start < stop:
            share, end = self.shares[at], min(stop, self.ends[at])
            shift = share.start - (self.ends[at - 1] if at else 0)
            yield from share.flow.rows(start + shift, end + shift)
            start, at = end, at + 1


def stream_of(shares: Sequence[Share]) -> Stream:
    """Return the Stream of shares."""
    return Stream(tuple(shares), tuple(accumulate(share.stop - share.start for share in shares)))
