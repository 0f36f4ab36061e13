"""What decides a role's later updates besides its configuration: weights, Adam's moments, and counts of updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from megarl.weights.shard import Shard

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """Elements [start, stop) of a shard's parameter, counted row by row.

    values: [stop - start] of each kind: ``weight`` as the optimizer steps it, and Adam's moments once there are any.
    """

    shard: Shard
    start: int
    stop: int
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class UpdateCounts:
    """scheduled: updates that the learning rate's schedule has counted. adam: steps that Adam has taken.

    They differ by the steps that were skipped.
    """

    scheduled: int
    adam: int


class SavedState(Protocol):
    """Weights and moments of a role that were saved, on whatever layout: a TensorSource of the weights."""

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim`` of the weights of tensor ``name``."""
        ...

    def fill(self, held: Held) -> None:
        """Write the values of what a rank holds."""
        ...
