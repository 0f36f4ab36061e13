"""Execute a reshard plan: every rank's rows to where another layout of the model has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.weights.reshard_plan import Move, cut_into_buckets

BUCKET_BYTES = 256 << 20


class Resharder:
    """Executes one plan, again and again, between this rank's source and target parameters.

    Pieces that stay on their rank are copied in place. The others travel in all-to-all exchanges of at most
    ``bucket_bytes`` a rank, in the targets' dtype, so that the extra memory is bounded.
    """

    def __init__(self, moves: Sequence[Move], *, dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.rank, self.world_size, self.dtype = dist.get_rank(), dist.get_world_size(), dtype
        self.local = [m for m in moves if m.source.rank == m.target.rank == self.rank]
        travelling = [m for m in moves if m.source.rank != m.target.rank]
        self.buckets = cut_into_buckets(travelling, bucket_bytes // dtype.itemsize)

    @torch.no_grad()
    def run(self, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], device: torch.device) -> None:
        """Fill ``targets`` in place from the ``sources`` of all ranks. Every rank must call this together."""
        for move in self.local:
            move.target.view(targets, move.length).copy_(move.source.view(sources, move.length))
        for bucket in self.buckets:
            self._exchange(bucket, sources, targets, device)

    def _exchange(
        self, bucket: Sequence[Move], sources: Mapping[str, Tensor], targets: Mapping[str, Tensor], device: torch.device
    ) -> None:
        """Carry out one all-to-all. Both ends walk the plan in the same order, so no metadata travels."""
        outgoing = sorted((m for m in bucket if m.source.rank == self.rank), key=lambda m: m.target.rank)
        incoming = sorted((m for m in bucket if m.target.rank == self.rank), key=lambda m: m.source.rank)
        send_sizes, recv_sizes = [0] * self.world_size, [0] * self.world_size
        for move in outgoing:
            send_sizes[move.target.rank] += move.numel
        for move in incoming:
            recv_sizes[move.source.rank] += move.numel
        pieces = [m.source.view(sources, m.length).to(self.dtype).reshape(-1) for m in outgoing]
        send = torch.cat(pieces) if pieces else torch.empty(0, dtype=self.dtype, device=device)
        recv = torch.empty(sum(recv_sizes), dtype=self.dtype, device=device)
        dist.all_to_all_single(recv, send.to(device), recv_sizes, send_sizes)
        offset = 0
        for move in incoming:
            view = move.target.view(targets, move.length)
            view.copy_(recv[offset : offset + move.numel].view(view.shape))
            offset += move.numel
