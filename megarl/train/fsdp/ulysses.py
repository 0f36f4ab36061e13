"""Ulysses sequence parallelism (Jacobs et al., arXiv:2309.14509): a rank has some positions, in attention some heads.

Shape suffixes: B lines, N heads, L positions of this rank, S of all ranks, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_HEADS, _POSITIONS = 1, 2


class _Swap(torch.autograd.Function):
    """Splits a tensor along one dim over the ranks, and joins what they send along another. Its gradient swaps back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.split, ctx.join, ctx.group = split, join, group
        sent = torch.stack(tensor.chunk(group.size(), split))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(), join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _swapped(grads[0], ctx.join, ctx.split, ctx.group), None, None, None


def _swapped(tensor: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
    apply: Callable[..., Tensor] = _Swap.apply
    return apply(tensor, split, join, group)


def positions_to_heads(tensor_BNLD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all positions [B, N', S, D] of this rank's share of the heads.

    Where there are fewer heads than ranks, neighbours share copies of one: its gradient is the sum of theirs.
    """
    copies = -(-group.size() // tensor_BNLD.shape[_HEADS])
    if copies > 1:
        tensor_BNLD = tensor_BNLD.repeat_interleave(copies, _HEADS)
    return _swapped(tensor_BNLD, _HEADS, _POSITIONS, group)


def heads_to_positions(tensor_BNSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return all heads [B, N, L, D] of this rank's positions."""
    return _swapped(tensor_BNSD, _POSITIONS, _HEADS, group)
