"""Execute a reshard plan: every rank's rows to where another layout of the model has them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.environment import LOCAL_PLACE
from megarl.weights.cells import Window
from megarl.weights.checksums import check_arrived, checksums
from megarl.weights.flow import Rows, Stream
from megarl.weights.reshard_plan import BUCKET_BYTES, RankPlan

Tensors = Mapping[str, Tensor]


class Resharder:
    """Executes one rank's plan, again and again, between its source and target parameters.

    What stays on the rank is copied in place. The rest travels in ``num_exchanges`` all-to-alls, in the targets' dtype.
    In each, every stream has as large a part of what it carries in all, so that all ranks send and receive all the
    time. A rank then has one buffer to send and one to receive, each of ``bucket_bytes`` and at most a row a peer.
    """

    def __init__(self, plan: RankPlan, *, dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.plan, self.dtype = plan, dtype
        self.num_exchanges = plan.num_exchanges(max(1, bucket_bytes // dtype.itemsize))
        self._buffer_numels = tuple(self._most_numel(streams) for streams in (plan.sends, plan.receives))

    @torch.no_grad()
    def run(self, sources: Tensors, targets: Tensors, device: torch.device) -> None:
        """Fill ``targets`` in place from the ``sources`` of all ranks. Every rank must call this together."""
        for flow in self.plan.kept:
            for rows in flow.rows(0, flow.numel):
                target_of(rows, targets).copy_(source_of(rows, sources))
        if not self.num_exchanges:
            return
        send, receive = (torch.empty(n, dtype=self.dtype, device=device) for n in self._buffer_numels)
        for index in range(self.num_exchanges):
            self._exchange(index, sources, targets, send, receive)

    @torch.no_grad()
    def verify(self, sources: Tensors, targets: Tensors, device: torch.device) -> None:
        """Raise PublishError where ``targets`` don't hold what was sent. Every rank must call this together."""
        me = self.plan.rank

        def sent(rows: Rows) -> Tensor:
            return source_of(rows, sources).to(self.dtype)

        def found(rows: Rows) -> Tensor:
            return target_of(rows, targets)

        arrived = self._exchanged_checksums(sent, device) if self.num_exchanges else {}
        kept = [rows for flow in self.plan.kept for rows in flow.rows(0, flow.numel)]
        check_arrived(checksums(kept, sent), checksums(kept, found), kept, me, f"the engine on rank {me}")
        for sender, stream in self.plan.receives.items():
            rows = list(stream.rows(0, stream.numel))
            check_arrived(arrived[sender], checksums(rows, found), rows, sender, f"the engine on rank {me}")

    def _exchanged_checksums(self, sent: Callable[[Rows], Tensor], device: torch.device) -> dict[int, list[int]]:
        """Return the checksums of what each rank sends this one."""
        outgoing = {to: checksums(stream.rows(0, stream.numel), sent) for to, stream in self.plan.sends.items()}
        counts = {sender: sum(1 for _ in s.rows(0, s.numel)) for sender, s in self.plan.receives.items()}
        world = range(dist.get_world_size())
        send = torch.tensor([n for rank in world for n in outgoing.get(rank, ())], dtype=torch.int64, device=device)
        receive = torch.empty(sum(counts.values()), dtype=torch.int64, device=device)
        receive_sizes = [counts.get(rank, 0) for rank in world]
        dist.all_to_all_single(receive, send, receive_sizes, [len(outgoing.get(rank, ())) for rank in world])
        return {rank: part.tolist() for rank, part in zip(world, receive.split(receive_sizes), strict=True)}

    def _most_numel(self, streams: Mapping[int, Stream]) -> int:
        """Return the elements that an exchange has at most of all streams, as an int."""
        if not self.num_exchanges:
            return 0
        of_each = (-(-s.numel // self.num_exchanges) + s.widest_row for s in streams.values())
        return min(sum(of_each), sum(s.numel for s in streams.values()))

    def _exchange(self, index: int, sources: Tensors, targets: Tensors, send: Tensor, receive: Tensor) -> None:
        """Carry out one all-to-all. Both ends cut their stream in the same places, so no metadata travels."""
        outgoing, incoming = self._cuts(self.plan.sends, index), self._cuts(self.plan.receives, index)
        sent, received = 0, 0
        for rank, (start, stop) in outgoing.items():
            for rows in self.plan.sends[rank].rows(start, stop):
                send[sent : sent + rows.numel].view(rows.sizes).copy_(source_of(rows, sources))
                sent += rows.numel
        receive_sizes, send_sizes = _sizes(incoming), _sizes(outgoing)
        dist.all_to_all_single(receive[: sum(receive_sizes)], send[:sent], receive_sizes, send_sizes)
        for rank, (start, stop) in incoming.items():
            for rows in self.plan.receives[rank].rows(start, stop):
                target_of(rows, targets).copy_(receive[received : received + rows.numel].view(rows.sizes))
                received += rows.numel

    def _cuts(self, streams: Mapping[int, Stream], index: int) -> dict[int, tuple[int, int]]:
        """Return from where to where an exchange carries each stream, by the other rank."""
        count = self.num_exchanges
        return {rank: (stream.cut(index, count), stream.cut(index + 1, count)) for rank, stream in streams.items()}


def _sizes(cuts: Mapping[int, tuple[int, int]]) -> list[int]:
    """Return the number of elements for each rank of the world, as a list of ints."""
    sizes = [0] * dist.get_world_size()
    for rank, (start, stop) in cuts.items():
        sizes[rank] = stop - start
    return sizes


def source_of(rows: Rows, parameters: Tensors) -> Tensor:
    """Return rows as the view of their sender's parameter."""
    assert rows.move.source is not None
    return _view(rows, rows.move.source, parameters)


def target_of(rows: Rows, parameters: Tensors) -> Tensor:
    """Return rows as the view of the parameter that they are for."""
    return _view(rows, rows.move.target, parameters)


def _view(rows: Rows, window: Window, parameters: Tensors) -> Tensor:
    """Return the rows as a view of their parameter."""
    view = parameters[window.name.format(i=rows.layer, e=rows.expert)]
    view = view.narrow(0, window.starts[0] + rows.first_row, rows.num_rows)
    for dim in range(1, len(window.starts)):
        size = rows.move.sizes[dim]
        if view.shape[dim] != size:
            view = view.narrow(dim, window.starts[dim], size)
    return view


def node_size(device: torch.device) -> int:
    """Return the number of ranks on the fullest node, as an int. Collective."""
    place = os.environ.get(LOCAL_PLACE) or os.environ.get("LOCAL_RANK") or dist.get_rank()
    last = torch.tensor(int(place), device=device)
    dist.all_reduce(last, op=dist.ReduceOp.MAX)
    return int(last) + 1
