"""What one rank keeps, sends and receives when a model goes from one layout to another: a pure plan of this rank.

Publishing to the rollout engine and exporting a checkpoint are such moves; ``reshard.py`` executes them. Who sends is a
rule that all ranks apply alike: a rank keeps what it holds itself; it takes the rest from those holders that are on its
node, or from all where none is; and from each of them the same share. So no rank needs another's plan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megarl.errors import PublishError
from megarl.weights.cells import Box, Cell, Holders, Part, Sources, indices, parts_of
from megarl.weights.flow import Flow, Move, Share, Stream, flow_of, move_of, stream_of
from megarl.weights.shard import Peers

BUCKET_BYTES = 256 << 20  # that a rank sends, and receives, in one exchange


@dataclass
class Load:
    """Elements that one rank keeps, sends and receives, within its node and across; a share may be a fraction."""

    kept: int = 0
    sent_within: float = 0
    sent_across: float = 0
    received_within: int = 0
    received_across: int = 0

    @property
    def busiest_way(self) -> float:
        """Elements sent or received, whichever is more."""
        return max(self.sent_within + self.sent_across, self.received_within + self.received_across)


@dataclass(frozen=True)
class RankPlan:
    """What ``rank`` keeps, and the streams that it sends and receives by the other rank, in order of ranks.

    busiest_numel: elements that the busiest of all ranks sends or receives, whichever is more.
    """

    rank: int
    kept: tuple[Flow, ...]
    sends: Mapping[int, Stream]
    receives: Mapping[int, Stream]
    busiest_numel: int

    def num_exchanges(self, bucket_numel: int) -> int:
        """Return the fewest exchanges, as an int, in which no rank sends or receives more than a bucket, up to rows."""
        return -(-self.busiest_numel // bucket_numel)


Asked = tuple[int, Holders]  # the index of the target peers, and who holds it


@dataclass(frozen=True)
class Overlap:
    """What of ``cell`` the target peers of index ``target`` need, as ``part`` of a parameter."""

    target: int
    part: Part
    cell: Cell
    box: Box


def overlaps(sources: Sources, targets: Sequence[Peers]) -> Iterator[Overlap]:
    """Yield each Overlap of what ranks hold and need, in the order in which it travels between any two of them.

    Raises PublishError where no rank holds a range that a target needs.
    """
    for index, peers in enumerate(targets):
        for part in parts_of(peers):
            found, cells = 0, sources.cells.get(part.tensor, ())
            for cell in cells:
                box = part.box.overlap(cell.box)
                if box is not None:
                    found += box.numel
                    yield Overlap(index, part, cell, box)
            if found != part.box.numel:
                raise _missing(part, cells, peers.ranks[0])


def asked_of(sources: Sources, targets: Sequence[Peers]) -> dict[Asked, int]:
    """Return the elements, as an int, that each rank of some target peers needs of some holders."""
    asked: dict[Asked, int] = defaultdict(int)
    for overlap in overlaps(sources, targets):
        asked[overlap.target, overlap.cell.holders] += overlap.box.numel
    return asked


def loads_of(
    asked: Mapping[Asked, int], targets: Sequence[Peers], ranks_per_node: int, world_size: int
) -> tuple[Load, ...]:
    """Return the Load of every rank."""
    loads = tuple(Load() for _ in range(world_size))
    for (index, holders), numel in asked.items():
        members, outside = frozenset(holders.ranks), 0
        by_node: dict[int, int] = defaultdict(int)
        for rank in targets[index].ranks:
            node = rank // ranks_per_node
            if rank in members:
                loads[rank].kept += numel
            elif node in holders.by_node:
                loads[rank].received_within += numel
                by_node[node] += numel
            else:
                loads[rank].received_across += numel
                outside += numel
        for node, inside in by_node.items():
            senders = holders.by_node[node]
            for rank in senders:
                loads[rank].sent_within += inside / len(senders)
        for rank in holders.ranks if outside else ():
            loads[rank].sent_across += outside / len(holders.ranks)
    return loads


def plan_reshard(sources: Sources, targets: Sequence[Peers], rank: int) -> RankPlan:
    """Return the RankPlan of ``rank``.

    Raises PublishError, on every rank, where no rank holds a range that a target needs.
    """
    asked, flows = _flows(sources, targets, rank)
    kept: list[Flow] = []
    sends, receives = defaultdict[int, list[Share]](list), defaultdict[int, list[Share]](list)
    for (index, holders), flow in flows.items():
        needs, holds = rank in targets[index].ranks, rank in holders.ranks
        ends = flow, index, targets[index], holders, rank, sources.ranks_per_node
        if needs and holds:
            kept.append(flow)
        elif needs:
            for sender, share in _shares(*ends):
                receives[sender].append(share)
        if holds:
            for target, share in _sent(*ends):
                sends[target].append(share)
    world_size = 1 + max((rank, *(r for peers in (*sources.peers, *targets) for r in peers.ranks)))
    loads = loads_of(asked, targets, sources.ranks_per_node, world_size)
    busiest = math.ceil(max(load.busiest_way for load in loads))
    return RankPlan(rank, tuple(kept), _streams(sends), _streams(receives), busiest)


def _flows(sources: Sources, targets: Sequence[Peers], rank: int) -> tuple[dict[Asked, int], dict[Asked, Flow]]:
    """Return the elements of every flow, and those flows that ``rank`` is at an end of, both in the same order."""
    asked, moves = defaultdict[Asked, int](int), defaultdict[Asked, list[Move]](list)
    held = {index for index, peers in enumerate(sources.peers) if rank in peers.ranks}
    wanted = {index for index, peers in enumerate(targets) if rank in peers.ranks}
    for overlap in overlaps(sources, targets):
        key = overlap.target, overlap.cell.holders
        asked[key] += overlap.box.numel
        own = next((part for index, part in overlap.cell.parts if index in held), None)
        if own is not None or overlap.target in wanted:
            source = None if own is None else own.window_of(overlap.box)
            moves[key].append(move_of(overlap.box, source, overlap.part.window_of(overlap.box)))
    return asked, {key: flow_of(those) for key, those in moves.items()}


def _shares(
    flow: Flow, index: int, peers: Peers, holders: Holders, rank: int, ranks_per_node: int
) -> Iterator[tuple[int, Share]]:
    """Yield who sends ``rank`` which share of what peers of ``index`` need. Senders take turns with the first share."""
    senders = holders.senders(rank // ranks_per_node)
    turn = index + peers.ranks.index(rank)
    for at, sender in enumerate(senders):
        start, stop = flow.share((at + turn) % len(senders), len(senders))
        if start < stop:
            yield sender, Share(flow, start, stop)


def _sent(
    flow: Flow, index: int, peers: Peers, holders: Holders, rank: int, ranks_per_node: int
) -> Iterator[tuple[int, Share]]:
    """Yield to whom ``rank``, one of the holders, sends which share: what ``_shares`` says of each target."""
    members, node = frozenset(holders.ranks), rank // ranks_per_node
    places = {True: holders.by_node[node].index(rank), False: holders.ranks.index(rank)}
    shares: dict[tuple[int, int], tuple[int, int]] = {}
    for position, target in enumerate(peers.ranks):
        there = target // ranks_per_node
        if target in members or (there != node and there in holders.by_node):
            continue
        count = len(holders.senders(there))
        part = (places[there == node] + index + position) % count, count
        if part not in shares:
            shares[part] = flow.share(*part)
        start, stop = shares[part]
        if start < stop:
            yield target, Share(flow, start, stop)


def _streams(shares: Mapping[int, list[Share]]) -> dict[int, Stream]:
    return {rank: stream_of(shares[rank]) for rank in sorted(shares)}


def _missing(part: Part, cells: Sequence[Cell], rank: int) -> PublishError:
    """Return the PublishError that names the first row of ``part`` that no rank holds whole."""
    first, last = part.box.spans[0]
    for layer in indices(part.box.layers):
        for expert in indices(part.box.experts):
            place = Box(1 << layer, 1 << expert, part.box.spans)
            boxes = [box for cell in cells if (box := place.overlap(cell.box))]
            cuts = sorted({first, last, *(cut for box in boxes for cut in box.spans[0])})
            for low, high in pairwise(cuts):
                rows = Box(place.layers, place.experts, ((low, high), *place.spans[1:]))
                if sum(both.numel for box in boxes if (both := rows.overlap(box))) != rows.numel:
                    names = (name.format(i=layer, e=expert) for name in (part.tensor, part.window.name))
                    tensor, name = names
                    return PublishError(f"no rank holds row {low} of {tensor}, needed by {name} on rank {rank}")
    raise AssertionError("the parts of a cell overlap")
