"""Several files in given shares: like ``Order``, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megarl.data.order import permutation
from megarl.errors import DataError


@dataclass(frozen=True)
class MixedOrder:
    """Batches of row indices over files that lie end to end, each file having its share of every step.

    An epoch has as many rows as all files together. shuffle: whether the rows of a step are mixed, and each file's come
    in another order every time that it is gone through, if it is large enough; else in file order. A row comes again
    only after all others of its file have come, and so once in a step, unless the file is smaller than its share.
    Raises DataError if not even one batch can be filled.
    """

    file_sizes: tuple[int, ...]
    weights: tuple[float, ...]
    batch_size: int
    shuffle: bool
    seed: int

    def __post_init__(self) -> None:
        assert len(self.file_sizes) == len(self.weights) and all(w > 0 for w in self.weights)
        if 0 in self.file_sizes:
            raise DataError(
                f"data.train_files: file {self.file_sizes.index(0) + 1} has no rows left to take a share of"
            )
        if sum(self.file_sizes) < self.batch_size:
            raise DataError(
                f"data.train_batch_size = {self.batch_size}: there are only {sum(self.file_sizes)} rows, not enough "
                "for one step. fix: lower it, or give more data"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of full batches in an epoch."""
        return sum(self.file_sizes) // self.batch_size

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the rows that each file gives to a step on the mean; to any one step a row more or less."""
        return tuple(self.batch_size * weight / sum(self.weights) for weight in self.weights)

    def batch(self, step: int) -> tuple[int, ...]:
        """Return the row indices of a step, counted from 0 over all epochs."""
        starts, stops = (self._taken(slots * self.batch_size) for slots in (step, step + 1))
        rows: list[int] = []
        for file, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            first = sum(self.file_sizes[:file])
            rows += [first + row for row in self._rows(file, start, stop)]
        if not self.shuffle:
            return tuple(rows)
        return tuple(rows[i] for i in permutation(len(rows), self.seed, step))

    def repeating(self) -> tuple[int, ...]:
        """Return the places of the files that are smaller than their share of a step, or just as large."""
        sizes = zip(self.file_sizes, self.shares, strict=True)
        return tuple(file for file, (size, share) in enumerate(sizes) if size < share + 1)

    def _taken(self, slots: int) -> Sequence[int]:
        """Return the rows that each file gives to the first slots of the run, as counts: a file's are evenly spaced.

        Its row k stands at (k + 1/2) / weight on a line, and the first on the line are taken (Sainte-Lague).
        """
        weights = [Fraction(weight) for weight in self.weights]
        taken = [math.floor(slots * weight / sum(weights) + Fraction(1, 2)) for weight in weights]
        files = range(len(weights))
        while sum(taken) < slots:
            taken[min(files, key=lambda i: (2 * taken[i] + 1) / weights[i])] += 1
        while sum(taken) > slots:
            taken[max(reversed(files), key=lambda i: (2 * taken[i] - 1) / weights[i])] -= 1
        return taken

    def _rows(self, file: int, start: int, stop: int) -> list[int]:
        """Return rows ``start`` to ``stop`` of all that a file ever gives, as numbers in the file."""
        size, share = self.file_sizes[file], math.ceil(self.shares[file]) + 1
        turns = (divmod(position, size) for position in range(start, stop))
        if not self.shuffle:
            return [place for _, place in turns]
        return [_order_of_turn(size, self.seed + file + 1, share, turn)[place] for turn, place in turns]


@lru_cache(maxsize=16)
def _order_of_turn(size: int, seed: int, share: int, turn: int) -> tuple[int, ...]:
    """Return the order in which a file of ``size`` rows is gone through for the ``turn``-th time.

    The first ``share`` rows are none of the last of the turn before, so that a step with parts of both repeats none.
    """
    if size < 3 * share:
        return permutation(size, seed, 0)  # too small to choose from: one order, whose rows are always ``size`` apart
    order = permutation(size, seed, turn)
    if turn == 0:
        return order
    # What follows leaves the last rows where they are: those of the turn before are those of its permutation.
    last = frozenset(permutation(size, seed, turn - 1)[-share:])
    start = order[: 2 * share]
    head = [row for row in start if row not in last][:share]
    taken = frozenset(head)
    return (*head, *(row for row in start if row not in taken), *order[2 * share :])
