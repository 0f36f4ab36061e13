"""Packed causal attention and RMSNorm for Megatron's local layer spec, where Transformer Engine is absent.

Shape suffixes: T packed tokens, N heads, D head size, B sequences of one length, L that length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, with the token indices of sequences of equal length.

    same_length: one index [B, L] for each distinct length, which lets plain SDPA run over packed tokens in batches
    without computing any padding.
    """

    same_length: tuple[Tensor, ...] = ()


def describe_packing(lengths: list[int], device: torch.device) -> PackedSequences:
    """Return the description of sequences of ``lengths`` tokens laid end to end."""
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device, torch.int32)
    rows: dict[int, list[Tensor]] = {}
    for start, length in zip(starts.tolist(), lengths, strict=True):
        rows.setdefault(length, []).append(torch.arange(start, start + length))
    longest = max(lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        same_length=tuple(torch.stack(r).to(device) for r in rows.values()),
    )


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run on a sequence-parallel shard (megatron's torch norm refuses that)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Megatron sums the gradients of parameters so marked over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CausalAttention(MegatronModule):
    """Causal ``core_attention`` on packed [T, N, D] or padded [S, B, N, D] tensors.

    Packed on CUDA in half precision: torch's fused variable-length kernel. Otherwise SDPA, over one batch per distinct
    length. Padded sequences are padded on the right, where the causal mask hides the padding from every real token.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        if config.attention_dropout:
            raise ValueError("attention dropout is not supported: log-probs would differ between two passes")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        if packed_seq_params is None:
            out = self._sdpa(*(t.permute(1, 2, 0, 3) for t in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            return self._fused(query, key, value, packed_seq_params).flatten(1)
        out_TND = torch.zeros_like(query)
        for index_BL in packed_seq_params.same_length:
            q, k, v = (t[index_BL].transpose(1, 2) for t in (query, key, value))
            out_TND = out_TND.index_put((index_BL,), self._sdpa(q, k, v).transpose(1, 2))
        return out_TND.flatten(1)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within [B, N, L, D]."""
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, packing: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = packing.cu_seqlens_q, packing.max_seqlen_q
        out = varlen_attn(
            q,
            k,
            v,
            bounds,
            bounds,
            longest,
            longest,
            scale=self.scale,
            window_size=(-1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)
        return out
