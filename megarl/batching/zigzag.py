"""How context parallelism splits sequences: into 2 x cp parts of equal length, two of them for each rank.

Rank r holds part r and its mirror image, part 2 cp - 1 - r, so that early tokens, which look at few others, and late
ones are shared evenly. Megatron's rotary embedding and Transformer Engine's attention take this order for granted.

Shape suffixes: T tokens of all ranks, L tokens of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def num_parts(cp: int) -> int:
    """Return into how many parts a sequence is split: its length must be a multiple of it."""
    return 1 if cp == 1 else 2 * cp


def parts(cp: int, cp_rank: int) -> tuple[int, ...]:
    """Return the parts of every sequence that a rank holds, in its order."""
    return (0,) if cp == 1 else (cp_rank, 2 * cp - 1 - cp_rank)


def held_positions(lengths: Sequence[int], cp: int, cp_rank: int) -> Tensor:
    """Return, for sequences that lie end to end, where each token of a rank stands among all [L], in its order."""
    spans, start = [torch.empty(0, dtype=torch.int64)], 0
    for length in lengths:
        assert length % num_parts(cp) == 0, f"{length} tokens can't be split over {cp} context ranks"
        size = length // num_parts(cp)
        spans += [torch.arange(start + part * size, start + (part + 1) * size) for part in parts(cp, cp_rank)]
        start += length
    return torch.cat(spans)


def contiguous_positions(lengths: Sequence[int], cp: int, cp_rank: int) -> Tensor:
    """Return the same where a rank holds the ``cp_rank``-th of ``cp`` equal parts of each, as Ulysses has it."""
    spans, start = [torch.empty(0, dtype=torch.int64)], 0
    for length in lengths:
        size = length // cp
        spans.append(torch.arange(start + cp_rank * size, start + (cp_rank + 1) * size))
        start += length
    return torch.cat(spans)


def gathered_positions(lengths: Sequence[int], cp: int) -> Tensor:
    """Return where each token of sequences that lie end to end stands [T] once all ranks' tokens are gathered."""
    held_T = torch.cat([held_positions(lengths, cp, rank) for rank in range(cp)])
    place_T = torch.empty_like(held_T)
    place_T[held_T] = torch.arange(len(held_T))
    return place_T
