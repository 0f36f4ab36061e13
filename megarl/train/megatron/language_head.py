"""An output layer that leaves its matrix product to the log-probs, which compute it without keeping logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


class LanguageHead(torch.nn.Module):
    """Holds the weight [V / tp, H] of the output layer it stands for, None where the embedding on this stage is it."""

    weight: torch.nn.Parameter | None

    def __init__(self, config: Any, weight: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.sequence_parallel: bool = config.sequence_parallel
        self.register_parameter("weight", weight)

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: None = None
    ) -> tuple[Tensor, None]:
        """Return hidden states [L, B, H] of all positions, and no bias, as Megatron's output layers do.

        Their gradient, of which each tensor-parallel rank has the part of its columns, is summed over the ranks.
        """
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden), None
        return copy_to_tensor_model_parallel_region(hidden), None
