"""Several files in given shares: like ``Order``, a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from megarl.data.order import permutation
from megarl.errors import DataError


@dataclass(frozen=True)
class MixedOrder:
    """Batches of row indices over files that lie end to end, each file having its share of every epoch.

    An epoch has as many rows as all files together. A file gives its share of them, one row after the other, and
    starts over when it is through: a row of it comes again only after all others have come. shuffle: whether each
    file's rows come in another order every time, and the files' rows mixed; else in file order.
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
    def shares(self) -> tuple[int, ...]:
        """Return the rows that each file gives to an epoch: the weights' shares, rounded so that they add up."""
        total, ends = sum(self.file_sizes), list(accumulate(self.weights))
        bounds = [0, *(round(total * end / ends[-1]) for end in ends)]
        return tuple(stop - start for start, stop in pairwise(bounds))

    def batch(self, step: int) -> tuple[int, ...]:
        """Return the row indices of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.batches_per_epoch)
        rows = self._epoch(epoch)
        start = place * self.batch_size
        return rows[start : start + self.batch_size]

    def _epoch(self, epoch: int) -> tuple[int, ...]:
        rows: list[int] = []
        first = 0
        for file, (size, share) in enumerate(zip(self.file_sizes, self.shares, strict=True)):
            for position in range(epoch * share, (epoch + 1) * share):
                turn, place = divmod(position, size)
                order = permutation(size, self.seed + file + 1, turn) if self.shuffle else range(size)
                rows.append(first + order[place])
            first += size
        if not self.shuffle:
            return tuple(rows)
        return tuple(rows[i] for i in permutation(len(rows), self.seed, epoch))
