"""The order in which rows are visited: a pure function of the step, so a resumed run needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megarl.errors import DataError


@dataclass(frozen=True)
class Order:
    """Batches of row indices, epoch after epoch.

    Each epoch has its own permutation if shuffle is set. Rows at the end of an epoch that don't fill a batch are left
    out of it; with shuffle they are other rows in each epoch. Raises DataError if not even one batch can be filled.
    """

    num_rows: int
    batch_size: int
    shuffle: bool
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"data.train_batch_size = {self.batch_size}: allowed: at least 1")
        if self.num_rows < self.batch_size:
            raise DataError(
                f"data.train_batch_size = {self.batch_size}: there are only {self.num_rows} rows, not enough for one "
                f"step. fix: set it to at most {self.num_rows}, or give more data"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of full batches in an epoch."""
        return self.num_rows // self.batch_size

    def batch(self, step: int) -> tuple[int, ...]:
        """Return the row indices of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.batches_per_epoch)
        start = place * self.batch_size
        rows = permutation(self.num_rows, self.seed, epoch) if self.shuffle else range(self.num_rows)
        return tuple(rows[start : start + self.batch_size])


@lru_cache(maxsize=16)
def permutation(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of an epoch."""
    # Philox is counter-based: neighbouring (seed, epoch) pairs give unrelated streams.
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return tuple(generator.permutation(num_rows).tolist())
