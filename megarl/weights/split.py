"""How Megatron and vLLM split a parameter over tensor-parallel ranks: which rows of which tensors a rank has."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarl.weights.model_shape import ModelShape
from megarl.weights.shard import Segment, Shard, clip

VLLM_VOCAB_MULTIPLE = 64  # vLLM pads the vocabulary to a multiple of this before it splits it


def split_shard(
    name: str, hf: Sequence[str], full: tuple[int, ...], split: str, shape: ModelShape, tp_rank: int, tp: int, by: str
) -> Shard:
    """Return the Shard that one of ``tp`` ranks has of parameter ``name``.

    hf: the tensors it is made of; full: the size of the first. split: as Entry names it. by: ``megatron`` or ``vllm``.
    """
    dim = 1 if split == "row" else 0
    if split == "replicated":
        segments: tuple[Segment, ...] = (Segment(hf[0], 0, full[0]),)
    elif split == "vocab":
        multiple = tp if by == "megatron" else math.lcm(VLLM_VOCAB_MULTIPLE, tp)
        segments = _even([Segment(hf[0], 0, full[0])], -(-full[0] // multiple) * multiple, tp_rank, tp)
    elif split == "row":
        segments = _even([Segment(hf[0], 0, full[1])], full[1], tp_rank, tp)
    elif split == "glu":
        segments = tuple(s for n in hf for s in _even([Segment(n, 0, full[0])], full[0], tp_rank, tp))
    elif by == "megatron":
        blocks = _interleaved_qkv(shape, hf)
        segments = _even(blocks, sum(b.length for b in blocks), tp_rank, tp)
    else:
        segments = _stacked_qkv(shape, hf, tp_rank, tp)
    rows = sum(s.length for s in segments)
    return Shard(name, (*full[:dim], rows, *full[dim + 1 :]), dim, segments)


def _even(blocks: list[Segment], rows: int, tp_rank: int, tp: int) -> tuple[Segment, ...]:
    """Cut the tp_rank-th of ``tp`` equal windows out of a stack of ``rows`` rows."""
    return clip(blocks, rows * tp_rank // tp, rows * (tp_rank + 1) // tp)


def _interleaved_qkv(shape: ModelShape, hf: Sequence[str]) -> list[Segment]:
    """Megatron's order: for every kv head its query heads, then its key, then its value.

    With fewer kv heads than ranks Megatron still cuts this stack evenly and gathers the whole of it after the matmul.
    """
    q, k, v = hf
    per_group, dim = shape.num_heads // shape.num_kv_heads * shape.head_dim, shape.head_dim
    blocks = []
    for g in range(shape.num_kv_heads):
        blocks.append(Segment(q, g * per_group, (g + 1) * per_group))
        blocks += [Segment(k, g * dim, (g + 1) * dim), Segment(v, g * dim, (g + 1) * dim)]
    return blocks


def _stacked_qkv(shape: ModelShape, hf: Sequence[str], tp_rank: int, tp: int) -> tuple[Segment, ...]:
    """vLLM's order: this rank's query heads, its keys, its values; kv heads are replicated where there are too few."""
    q, k, v = hf
    rows, dim = shape.num_heads * shape.head_dim, shape.head_dim
    heads = max(1, shape.num_kv_heads // tp)
    first = tp_rank * shape.num_kv_heads // tp
    kv = (first * dim, (first + heads) * dim)
    return (Segment(q, rows * tp_rank // tp, rows * (tp_rank + 1) // tp), Segment(k, *kv), Segment(v, *kv))
