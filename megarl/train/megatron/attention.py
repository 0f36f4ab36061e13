"""Packed causal attention and RMSNorm for Megatron's local layer spec, where Transformer Engine is absent.

Where a context-parallel rank holds a part of every sequence only, it gathers keys and values of the others.

Shape suffixes: T packed tokens, N heads, D head size, B sequences of one length, L that length, K keys of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarl.batching.zigzag import gathered_positions, num_parts, parts


@dataclass(frozen=True)
class Block:
    """Stretches of as many queries that look at as many keys. query_BL: of this rank's tokens; key_BK: of all ranks'.

    The last query of a stretch looks at all of its keys, the one before at all but the last key, and so on.
    """

    query_BL: Tensor
    key_BK: Tensor


@dataclass(frozen=True)
class Stretches:
    """All stretches end to end, as torch's variable-length kernel wants them. key_T: token of each key.

    bounds: where each begins, and the end. longest: of all. Of each, for queries and for keys.
    """

    key_T: Tensor
    bounds: tuple[Tensor, Tensor]
    longest: tuple[int, int]


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch over all context ranks, with that of this rank's attention.

    blocks: one for every size, which lets plain SDPA run over packed tokens in batches without computing any padding.
    query_T, key_T: of all blocks, end to end. stretches: the same for the variable-length kernel.
    """

    blocks: tuple[Block, ...] = ()
    query_T: Tensor | None = None
    key_T: Tensor | None = None
    stretches: Stretches | None = None


def describe_packing(lengths: list[int], device: torch.device, cp: int = 1, cp_rank: int = 0) -> PackedSequences:
    """Return the description of sequences of ``lengths`` tokens laid end to end, for one of ``cp`` context ranks.

    Every part of a sequence that the rank holds is a stretch of queries, which looks at the sequence up to its end.
    """
    place_T = gathered_positions(lengths, cp)
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    start, num_queries = 0, 0
    for length in lengths:
        size = length // num_parts(cp)
        for part in parts(cp, cp_rank):
            queries.append(torch.arange(num_queries, num_queries + size))
            keys.append(place_T[start : start + (part + 1) * size])
            num_queries += size
        start += length
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, (query_L, key_K) in enumerate(zip(queries, keys, strict=True)):
        by_size.setdefault((len(query_L), len(key_K)), []).append(i)
    blocks = []
    for alike in by_size.values():
        query_BL = torch.stack([queries[i] for i in alike]).to(device)
        blocks.append(Block(query_BL, query_BL if cp == 1 else torch.stack([keys[i] for i in alike]).to(device)))
    bounds, longest = _bounds(lengths).to(device), max(lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        blocks=tuple(blocks),
        query_T=torch.cat([block.query_BL.flatten() for block in blocks]),
        key_T=torch.cat([block.key_BK.flatten() for block in blocks]),
        stretches=Stretches(
            torch.cat(keys).to(device),
            (_bounds(map(len, queries)).to(device), _bounds(map(len, keys)).to(device)),
            (max(map(len, queries)), max(map(len, keys))),
        ),
    )


def _bounds(lengths: Iterable[int]) -> Tensor:
    """Return where each of several stretches begins, and where the last one ends."""
    return F.pad(torch.tensor(list(lengths)).cumsum(0), (1, 0)).to(torch.int32)


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
    Of T or S, queries, keys and values have this context rank's part, and so has the result.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.context_ranks = pg_collection.cp
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
        if self.context_ranks.size() > 1:
            both = torch.stack([key, value], 1)
            key, value = gather_from_sequence_parallel_region(both, group=self.context_ranks).unbind(1)
        if packed_seq_params is None:
            return self._padded(query, key, value).flatten(2)
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
            return self._fused(query, key, value, packed_seq_params).flatten(1)
        return self._by_blocks(query, key, value, packed_seq_params).flatten(1)

    def _by_blocks(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSequences) -> Tensor:
        """Attend within each block. Tokens are put in the blocks' order and back at once, not block by block."""
        assert packing.query_T is not None and packing.key_T is not None
        num_queries, num_keys = zip(*((b.query_BL.numel(), b.key_BK.numel()) for b in packing.blocks), strict=True)
        ordered = (
            query.index_select(0, packing.query_T).split(num_queries),
            key.index_select(0, packing.key_T).split(num_keys),
            value.index_select(0, packing.key_T).split(num_keys),
        )
        outs = []
        for block, *qkv in zip(packing.blocks, *ordered, strict=True):
            q, k, v = (t.unflatten(0, (len(block.query_BL), -1)).transpose(1, 2) for t in qkv)
            outs.append(self._sdpa(q, k, v).transpose(1, 2).flatten(0, 1))
        return torch.zeros_like(query).index_copy_(0, packing.query_T, torch.cat(outs))

    def _padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within [S, B, N, D], where each line is a sequence."""
        cp, cp_rank = self.context_ranks.size(), self.context_ranks.rank()
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if cp == 1:
            return self._sdpa(query, key, value).permute(2, 0, 1, 3)
        place_S = gathered_positions([key.shape[2]], cp).to(key.device)
        key, value = key[:, :, place_S], value[:, :, place_S]
        size = len(place_S) // num_parts(cp)
        ends = [(part + 1) * size for part in parts(cp, cp_rank)]
        out = [
            self._sdpa(q, key[:, :, :end], value[:, :, :end]) for q, end in zip(query.split(size, 2), ends, strict=True)
        ]
        return torch.cat(out, 2).permute(2, 0, 1, 3)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from [B, N, L, D] to [B, N, K, D], where the last query looks at all keys."""
        length, num_keys = q.shape[2], k.shape[2]
        mask = None  # torch's own causal mask has the first query look at the first key only
        if num_keys > length:
            mask = torch.ones(length, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - length)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, packing: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        stretches = packing.stretches
        assert stretches is not None
        if self.context_ranks.size() > 1:
            k, v = k[stretches.key_T], v[stretches.key_T]
        out = varlen_attn(
            q,
            k,
            v,
            *stretches.bounds,
            *stretches.longest,
            scale=self.scale,
            window_size=(-1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        assert isinstance(out, Tensor)
        return out
