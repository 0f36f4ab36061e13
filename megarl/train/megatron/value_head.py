"""The critic's last layer: one value a position in place of logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


class ValueHead(torch.nn.Module):
    """A linear layer from hidden states to one value, replicated over tensor-parallel ranks. Stands for output_layer.

    Under sequence parallelism each rank values its own positions, and the values, not the hidden states, are gathered.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.sequence_parallel: bool = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        # Each rank sees some positions only: Megatron then sums the weight's gradient over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, weight: None = None, runtime_gather_output: None = None) -> tuple[Tensor, None]:
        """Return values [L, B, 1] of all positions, and no bias, as Megatron's output layers do."""
        values = F.linear(hidden, self.weight)
        if self.sequence_parallel:
            # Every rank computes the whole loss from the gathered values, so each keeps its own slice of the gradient.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None
