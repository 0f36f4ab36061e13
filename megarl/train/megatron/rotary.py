"""Rotary position embedding of packed sequences by the position of each token, and its frequencies.

Megatron's own unfused one asks the device for the lengths of the sequences, and waits for the answer, twice a layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megarl.train.megatron.attention import PackedSequences
from megarl.weights.model_shape import Rope


class PackedRotary(RotaryEmbedding):
    """Megatron's rotary embedding, which takes the positions of a micro-batch's tokens where they are told."""

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor,
        transformer_config: Any,
        packed_seq_params: PackedSequences | None = None,
    ) -> Any:
        """Return what Megatron hands on to ``forward``: positions [T], or the length of the padded sequences."""
        if packed_seq_params is not None and packed_seq_params.positions_T is not None:
            return packed_seq_params.positions_T
        return super().get_rotary_seq_len(
            inference_context, transformer, transformer_input, transformer_config, packed_seq_params
        )

    def forward(self, places: Tensor | int, *args: Any, **keywords: Any) -> Tensor:
        """Return the angles [T, 1, D] at ``places``, or [S, 1, 1, D] where that is a length."""
        if not isinstance(places, Tensor):
            angles: Tensor = super().forward(places, *args, **keywords)
            return angles
        half_TD = torch.outer(places.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((half_TD, half_TD), dim=-1)[:, None]


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Return the rotary frequencies [D / 2]: 1 / theta^(2 i / D), scaled as the model's config asks.

    Computed here because megatron fixes Llama 3's scaling constants. ``llama3``: wavelengths over
    original / low_freq_factor are divided by ``factor``, those under original / high_freq_factor stay, and between them
    the two are mixed (Llama 3.1 model card; transformers' modeling_rope_utils).
    """
    freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "default":
        return freq
    if rope.kind == "linear":
        return freq / rope.factor
    turns = rope.original_max_positions * freq / (2 * math.pi)  # rotations over the original context
    share = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - share) * freq / rope.factor + share * freq
