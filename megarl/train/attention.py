"""Causal attention over sequences that lie end to end, without computing any padding. Backends share it.

Shape suffixes: T packed tokens, N heads, D head size, B sequences of one length, L that length, K keys of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    """All stretches end to end, as torch's variable-length kernel wants them.

    key_T: token of each key, None where that is every token once, in order. bounds: where each stretch begins, and the
    end. longest: of all. Of each, for queries and for keys.
    """

    key_T: Tensor | None
    bounds: tuple[Tensor, Tensor]
    longest: tuple[int, int]


@dataclass(frozen=True)
class Packing:
    """The same stretches in two forms.

    blocks: one for every size, which lets plain SDPA run over packed tokens in batches. query_T, key_T: of all blocks,
    end to end. stretches: for the variable-length kernel.
    """

    blocks: tuple[Block, ...]
    query_T: Tensor
    key_T: Tensor
    stretches: Stretches


def packing_of(lengths: Sequence[int], device: torch.device, cp: int = 1, cp_rank: int = 0) -> Packing:
    """Return the Packing of sequences of ``lengths`` tokens laid end to end, for one of ``cp`` context ranks.

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
    stretches = Stretches(
        None if cp == 1 else torch.cat(keys).to(device),
        (bounds_of(map(len, queries)).to(device), bounds_of(map(len, keys)).to(device)),
        (max(map(len, queries)), max(map(len, keys))),
    )
    query_T = torch.cat([block.query_BL.flatten() for block in blocks])
    key_T = torch.cat([block.key_BK.flatten() for block in blocks])
    return Packing(tuple(blocks), query_T, key_T, stretches)


def bounds_of(lengths: Iterable[int]) -> Tensor:
    """Return the first index of each of several stretches, and the end of the last, as a tensor."""
    return F.pad(torch.tensor(list(lengths)).cumsum(0), (1, 0)).to(torch.int32)


@dataclass(frozen=True)
class Scoring:
    """How queries score keys: products times ``scale``.

    window: keys that a query looks at, itself the last of them; None where that is all before it. softcap: scores s
    become softcap * tanh(s / softcap), as in Gemma 2 (arXiv:2408.00118); None where they don't.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


def attend_packed(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, packing: Packing, scoring: Scoring) -> Tensor:
    """Return the attended values [T, N, D] of packed tokens.

    On CUDA in half precision: torch's fused variable-length kernel, which caps no scores. Otherwise one batch per
    distinct length.
    """
    if q_TND.is_cuda and q_TND.dtype in (torch.float16, torch.bfloat16) and scoring.softcap is None:
        return _fused(q_TND, k_TND, v_TND, packing.stretches, scoring)
    return _by_blocks(q_TND, k_TND, v_TND, packing, scoring)


def _by_blocks(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, packing: Packing, scoring: Scoring) -> Tensor:
    """Attend within each block. Tokens are put in the blocks' order and back at once, not block by block."""
    num_queries, num_keys = zip(*((b.query_BL.numel(), b.key_BK.numel()) for b in packing.blocks), strict=True)
    ordered = (
        q_TND.index_select(0, packing.query_T).split(num_queries),
        k_TND.index_select(0, packing.key_T).split(num_keys),
        v_TND.index_select(0, packing.key_T).split(num_keys),
    )
    outs = []
    for block, *qkv in zip(packing.blocks, *ordered, strict=True):
        q, k, v = (t.unflatten(0, (len(block.query_BL), -1)).transpose(1, 2) for t in qkv)
        outs.append(attend(q, k, v, scoring).transpose(1, 2).flatten(0, 1))
    return torch.zeros_like(q_TND).index_copy_(0, packing.query_T, torch.cat(outs))


def attend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Return the attended values [B, N, L, D] of keys [B, N, K, D], where the last query looks at all keys.

    By torch's SDPA, unless scores are capped.
    """
    length, num_keys = q.shape[2], k.shape[2]
    is_cut = scoring.window is not None and scoring.window < num_keys
    mask = None  # torch's own causal mask has the first query look at the first key only
    if num_keys > length or is_cut or scoring.softcap is not None:
        mask = torch.ones(length, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - length)
    if mask is not None and scoring.window is not None:
        mask = mask.triu(num_keys - length - scoring.window + 1)
    if mask is not None and scoring.softcap is not None:
        return _capped(q, k, v, mask, scoring.scale, scoring.softcap)
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scoring.scale, enable_gqa=is_grouped
    )


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Return the attended values [B, N, L, D] under capped scores, all of which are in memory."""
    copies = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(copies, 1) for t in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    return scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, stretches: Stretches, scoring: Scoring) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if stretches.key_T is not None:
        k, v = k[stretches.key_T], v[stretches.key_T]
    out = varlen_attn(
        q,
        k,
        v,
        *stretches.bounds,
        *stretches.longest,
        scale=scoring.scale,
        window_size=(-1 if scoring.window is None else scoring.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out
