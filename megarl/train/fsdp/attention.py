"""The attention that transformers' models run in place of their own: causal, packed or padded, over Ulysses' ranks.

transformers makes no mask for an attention that it doesn't know, so that no mask and no cache can let packed sequences
see each other: which tokens belong together is said by ``Attending`` alone.

Shape suffixes: B lines, N heads, L positions of this rank, S of all ranks, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface

from megarl.train.attention import Packing, Scoring, attend, attend_packed
from megarl.train.fsdp.ulysses import heads_to_positions, positions_to_heads

NAME = "megarl"


@dataclass(frozen=True)
class Attending:
    """Who attends to whom in a micro-batch. packing: None where every line is a sequence, padded on the right."""

    packing: Packing | None
    context_ranks: dist.ProcessGroup | None


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    attending: Attending,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attended values [B, L, N, D] of queries, keys and values [B, N, L, D], as transformers wants them.

    That a model asks for nothing else is known before a run (megarl.weights.any_model).
    """
    ranks = attending.context_ranks
    if ranks is not None:
        query, key, value = (positions_to_heads(t, ranks) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, sliding_window, softcap)
    if attending.packing is None:
        out_BNSD = attend(query, key, value, scoring)
    else:
        q_SND, k_SND, v_SND = (t[0].transpose(0, 1) for t in (query, key, value))
        out_BNSD = attend_packed(q_SND, k_SND, v_SND, attending.packing, scoring).transpose(0, 1)[None]
    out_BNLD = out_BNSD if ranks is None else heads_to_positions(out_BNSD, ranks)
    return out_BNLD.transpose(1, 2), None


AttentionInterface.register(NAME, causal_attention)
