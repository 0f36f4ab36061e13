"""Groups: the rollouts of one prompt, which may have any size and stand in any order.

Shape suffixes: B rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The groups of a batch. Each method gives every row the statistic of its group.

    index_B: dense number of the row's group. size_B: float64, number of rows in it.
    """

    index_B: Tensor
    size_B: Tensor

    def sum(self, values_B: Tensor) -> Tensor:
        """Return the sum of the row's group. There are at most as many groups as rows."""
        return _sum(values_B, self.index_B)

    def least(self, values_B: Tensor) -> Tensor:
        """Return the least value of the row's group; NaN where one is."""
        return self._extreme(values_B, "amin")

    def largest(self, values_B: Tensor) -> Tensor:
        """Return the largest value of the row's group; NaN where one is."""
        return self._extreme(values_B, "amax")

    def has_spread(self, values_B: Tensor) -> Tensor:
        """Return True for rows whose group has two different values. A NaN is different, so that it can't go unseen."""
        return self.largest(values_B) != self.least(values_B)

    def deviation(self, values_B: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """Return each value minus the (weighted) mean of its group, exactly zero where all of a group are equal.

        Values are first shifted by the least of their group, so that equal ones cancel whatever they are. A group
        whose weights are all zero has no mean: its values are compared with the least.
        """
        shifted_B = values_B - self.least(values_B)
        weights_B = torch.ones_like(shifted_B) if weights_B is None else weights_B
        total_B = self.sum(weights_B)
        mean_B = self.sum(weights_B * shifted_B) / torch.where(total_B == 0, 1.0, total_B)
        return shifted_B - mean_B

    def std(self, values_B: Tensor) -> Tensor:
        """Return the unbiased standard deviation (divides by n - 1) of the row's group, zero in a group of one."""
        return (self.sum(self.deviation(values_B).square()) / (self.size_B - 1).clamp(min=1)).sqrt()

    def _extreme(self, values_B: Tensor, reduce: str) -> Tensor:
        start_B = torch.zeros_like(values_B)
        return start_B.scatter_reduce(0, self.index_B, values_B, reduce, include_self=False)[self.index_B]


def groups_of(group_B: Tensor) -> Groups:
    """Return the groups of a batch from the labels of its rows [B]: any integers."""
    index_B = torch.unique(group_B, return_inverse=True)[1]
    return Groups(index_B, _sum(torch.ones_like(index_B, dtype=torch.float64), index_B))


def _sum(values_B: Tensor, index_B: Tensor) -> Tensor:
    return torch.zeros_like(values_B).index_add(0, index_B, values_B)[index_B]
