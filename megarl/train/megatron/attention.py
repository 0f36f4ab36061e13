"""Packed causal attention and RMSNorm, where Transformer Engine is absent or has no kernel for packed sequences.

Where a context-parallel rank holds a part of every sequence only, it gathers keys and values of the others.

Shape suffixes: T packed tokens, N heads, D head size, B sequences of one length, L that length, K keys of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarl.batching.zigzag import gathered_positions, num_parts, parts
from megarl.train.attention import Packing, Scoring, attend, attend_packed, bounds_of, packing_of


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch over all context ranks.

    packing: of this rank's attention, None where Transformer Engine attends. positions_T: of this rank's tokens, by
    which heads are rotated; None where they are rotated by the bounds of the sequences.
    """

    packing: Packing | None = None
    positions_T: Tensor | None = None


def describe_packing(
    lengths: list[int],
    device: torch.device,
    cp: int = 1,
    cp_rank: int = 0,
    *,
    positions_T: Tensor | None = None,
    own_attention: bool = True,
) -> PackedSequences:
    """Return the description of sequences of ``lengths`` tokens laid end to end, for one of ``cp`` context ranks.

    positions_T: of this rank's tokens, where heads are rotated by them. own_attention: whether it is CausalAttention
    that attends.
    """
    longest = max(lengths)
    # Where Megatron finds no bounds it rotates all tokens at once, by the angles that it is given.
    bounds = None if positions_T is not None else bounds_of(lengths).to(device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        packing=packing_of(lengths, device, cp, cp_rank) if own_attention else None,
        positions_T=positions_T,
    )


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run on a sequence-parallel shard (megatron's torch norm refuses that)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Megatron sums the gradients of parameters so marked over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(MegatronModule):
    """Causal ``core_attention`` on packed [T, N, D] or padded [S, B, N, D] tensors.

    Padded sequences are padded on the right, where the causal mask hides the padding from every real token. Of T or S,
    queries, keys and values have this context rank's part, and so has the result.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.context_ranks = pg_collection.cp
        if config.attention_dropout:
            raise ValueError("attention dropout is not supported: log-probs would differ between two passes")
        self.scoring = Scoring(softmax_scale or 1.0 / math.sqrt(config.kv_channels))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Return the attended values, heads flattened: [T, N D] or [S, B, N D]."""
        if self.context_ranks.size() > 1:
            both = torch.stack([key, value], 1)
            key, value = gather_from_sequence_parallel_region(both, group=self.context_ranks).unbind(1)
        if packed_seq_params is None:
            return self._padded(query, key, value).flatten(2)
        assert packed_seq_params.packing is not None
        return attend_packed(query, key, value, packed_seq_params.packing, self.scoring).flatten(1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within [S, B, N, D], where each line is a sequence."""
        cp, cp_rank = self.context_ranks.size(), self.context_ranks.rank()
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if cp == 1:
            return attend(query, key, value, self.scoring).permute(2, 0, 1, 3)
        place_S = gathered_positions([key.shape[2]], cp).to(key.device)
        key, value = key[:, :, place_S], value[:, :, place_S]
        size = len(place_S) // num_parts(cp)
        ends = [(part + 1) * size for part in parts(cp, cp_rank)]
        out = [
            attend(q, key[:, :, :end], value[:, :, :end], self.scoring)
            for q, end in zip(query.split(size, 2), ends, strict=True)
        ]
        return torch.cat(out, 2).permute(2, 0, 1, 3)
