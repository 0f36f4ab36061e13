"""DeepEP's buffer on CPU: what Megatron's flex dispatcher calls of it, in plain torch over gloo.

Megatron's own dispatcher and autograd functions are real; this stands in for the kernels that DeepEP compiles.
Shape suffixes: N tokens of this rank, R tokens that it receives, H hidden size, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import fused_a2a, token_dispatcher
from torch import Tensor

CALLS = {"dispatch": 0, "combine": 0}
"""How often each was called."""

_DONE = mock.Mock()  # an event on a stream: there is nothing to wait for


@dataclass(frozen=True)
class Handle:
    """Which tokens of each rank this one received, and which of its own each rank did: true where so."""

    received: tuple[Tensor, ...]
    sent: tuple[Tensor, ...]


class Buffer:
    """Stands in for ``deep_ep.Buffer``, of which there is one for a group."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        """Return what says how large a buffer must be."""
        hints = dict.fromkeys(("get_nvl_buffer_size_hint", "get_rdma_buffer_size_hint"), lambda *_: num_ranks)
        return SimpleNamespace(**hints)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, **_: Any
    ) -> tuple[Tensor, None, Tensor, Tensor, None]:
        """Return the tokens for each rank and each expert, and which token goes to which rank."""
        size = self.group.size()
        per_rank = num_experts // size
        goes = torch.zeros(len(topk_idx), size, dtype=torch.bool)
        for k in range(topk_idx.shape[1]):
            goes[torch.arange(len(topk_idx)), topk_idx[:, k] // per_rank] = True
        return goes.sum(0), None, torch.bincount(topk_idx.flatten(), minlength=num_experts), goes, None

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        """Send each token once to every rank that has one of its experts; with a handle to those of that call again."""
        CALLS["dispatch"] += 1
        if handle is not None:
            return self._sent(x, handle.sent), None, None, [], handle, _DONE
        assert topk_idx is not None and topk_weights is not None and is_token_in_rank is not None
        assert num_tokens_per_expert is not None and topk_weights.dtype == torch.float32, "all that DeepEP takes"
        sent = tuple(is_token_in_rank.unbind(1))
        goes = self._everywhere(is_token_in_rank)
        rank = self.group.rank()
        handle = Handle(tuple(of_rank[:, rank] for of_rank in goes), sent)
        idx_RK, weights_RK = self._sent(topk_idx, sent), self._sent(topk_weights, sent)
        num_local = len(num_tokens_per_expert) // self.group.size()
        local_RK = idx_RK - num_local * rank
        is_here = (local_RK >= 0) & (local_RK < num_local)
        local_RK, weights_RK = local_RK.masked_fill(~is_here, -1), weights_RK.masked_fill(~is_here, 0.0)
        counts = torch.bincount(local_RK[is_here], minlength=num_local).tolist()
        return self._sent(x, sent), local_RK, weights_RK, counts, handle, _DONE

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None, mock.Mock]:
        """Add up what all ranks have for each token of this rank."""
        CALLS["combine"] += 1
        weights = None if topk_weights is None else self._returned(topk_weights, handle)
        return self._returned(x, handle), weights, _DONE

    def _sent(self, x: Tensor, sent: tuple[Tensor, ...]) -> Tensor:
        parts = self._exchange([x[mask].contiguous() for mask in sent])
        return torch.cat(parts)

    def _returned(self, x: Tensor, handle: Handle) -> Tensor:
        parts = self._exchange(list(x.split([int(mask.sum()) for mask in handle.received])))
        total = x.new_zeros(len(handle.sent[0]), *x.shape[1:])
        for part, mask in zip(parts, handle.sent, strict=True):
            total[mask] += part
        return total

    def _exchange(self, parts: list[Tensor]) -> list[Tensor]:
        """Give each rank its part, whatever their lengths."""
        gathered: list[Any] = [None] * self.group.size()
        dist.all_gather_object(gathered, parts, group=self.group)
        return [of_rank[self.group.rank()] for of_rank in gathered]

    def _everywhere(self, x: Tensor) -> list[Tensor]:
        gathered: list[Any] = [None] * self.group.size()
        dist.all_gather_object(gathered, x, group=self.group)
        return gathered


@contextmanager
def deep_ep_emulated() -> Iterator[None]:
    """Have Megatron find DeepEP for the duration, as if it were installed when it was imported."""

    def fused_dispatch(x: Tensor, *rest: Any, **named: Any) -> Any:
        return fused_a2a.FusedDispatch.apply(x.contiguous(), *rest, *named.values())

    def fused_combine(x: Tensor, group: Any, handle: Any, **named: Any) -> Any:
        return fused_a2a.FusedCombine.apply(x, group, handle, *named.values())

    patches = [
        mock.patch.object(fused_a2a, "Buffer", Buffer, create=True),
        mock.patch.object(fused_a2a, "EventHandle", mock.Mock(), create=True),
        mock.patch.object(fused_a2a, "EventOverlap", mock.Mock(), create=True),
        mock.patch.object(fused_a2a, "_buffer", None),
        mock.patch.object(token_dispatcher, "fused_dispatch", fused_dispatch),
        mock.patch.object(token_dispatcher, "fused_combine", fused_combine),
        mock.patch.object(token_dispatcher, "set_deepep_num_sms", return_value=None),
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
