"""What publishing the actor's weights to the engine moves between ranks, however many there are.

Each rank takes what it holds itself and gets the rest from others, as ``reshard_plan`` says. That sends every range
from the holder that has sent least so far; here all holders of a range send the same, which is what it comes to.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from megarl.parallel.layout import Layout, split_layers
from megarl.plan.devices import Device
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import megatron_shards, vllm_shards

# Ranks with the same weights: their place on (pp, tp), or among experts on (pp, etp, ep).
Peers = tuple[int, ...]
Holders = frozenset[Peers]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank keeps, sends and receives in a publication, within its node and to others: the most of all.

    seconds: of the rank that is busy longest, at the device's bandwidths, both ways at once.
    """

    kept_bytes: int
    sent_within: int
    sent_across: int
    received_within: int
    received_across: int
    seconds: float


@dataclass
class RankTraffic:
    """What one rank keeps, sends and receives, in bytes; a share of a range may be a fraction."""

    kept: int = 0
    sent_within: float = 0
    sent_across: float = 0
    received_within: float = 0
    received_across: float = 0

    def seconds(self, device: Device) -> float:
        """Return how long that takes where all ways are used at once."""
        inside, outside = max(self.sent_within, self.received_within), max(self.sent_across, self.received_across)
        return max(inside / device.link_bytes_per_s, outside / device.inter_node_bytes_per_s)


def publish_traffic(
    shape: ModelShape, layout: Layout, engine_tp: int, dtype_bytes: int, ranks_per_node: int, device: Device
) -> Traffic:
    """Return the most of what any rank keeps, sends and receives in a publication."""
    ranks = rank_traffic(shape, layout, engine_tp, dtype_bytes, ranks_per_node)
    return Traffic(
        kept_bytes=max(rank.kept for rank in ranks),
        sent_within=round(max(rank.sent_within for rank in ranks)),
        sent_across=round(max(rank.sent_across for rank in ranks)),
        received_within=round(max(rank.received_within for rank in ranks)),
        received_across=round(max(rank.received_across for rank in ranks)),
        seconds=max(rank.seconds(device) for rank in ranks),
    )


def rank_traffic(
    shape: ModelShape, layout: Layout, engine_tp: int, dtype_bytes: int, ranks_per_node: int
) -> tuple[RankTraffic, ...]:
    """Return what every rank keeps, sends and receives."""
    peers = _peers(layout)
    needs = _needs(shape, layout, engine_tp, dtype_bytes, peers)
    ranks = tuple(RankTraffic() for _ in range(layout.world_size))
    own: list[set[Peers]] = [set() for _ in ranks]
    for name, members in peers.items():
        for rank in members:
            own[rank].add(name)
    asked: dict[Holders, Counter[int]] = defaultdict(Counter)
    for rank, traffic in enumerate(ranks):
        for holders, num_bytes in needs[rank % engine_tp].items():
            if holders.isdisjoint(own[rank]):
                asked[holders][rank] += num_bytes
            else:
                traffic.kept += num_bytes
    for holders, wanted in asked.items():
        _share(ranks, [rank for name in holders for rank in peers[name]], wanted, ranks_per_node)
    return ranks


def _share(
    ranks: Sequence[RankTraffic], senders: Sequence[int], wanted: Mapping[int, int], ranks_per_node: int
) -> None:
    """Add what each of ``senders`` sends in equal parts to the ranks that want so many bytes."""
    senders_of, wanted_by = Counter(rank // ranks_per_node for rank in senders), Counter[int]()
    for rank, num_bytes in wanted.items():
        node = rank // ranks_per_node
        inside = num_bytes * senders_of[node] / len(senders)
        ranks[rank].received_within += inside
        ranks[rank].received_across += num_bytes - inside
        wanted_by[node] += num_bytes
    everywhere = sum(wanted.values())
    for rank in senders:
        inside = wanted_by[rank // ranks_per_node] / len(senders)
        ranks[rank].sent_within += inside
        ranks[rank].sent_across += everywhere / len(senders) - inside


def _peers(layout: Layout) -> dict[Peers, list[int]]:
    """Return the ranks that hold the same weights besides experts, and those that hold the same experts."""
    peers: dict[Peers, list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        place, expert = layout.coordinates(rank), layout.expert_coordinates(rank)
        peers[place.pp, place.tp].append(rank)
        peers[expert.pp, expert.etp, expert.ep].append(rank)
    return peers


def _needs(
    shape: ModelShape, layout: Layout, engine_tp: int, dtype_bytes: int, peers: Mapping[Peers, Sequence[int]]
) -> list[Counter[Holders]]:
    """Return, for each rank of an engine, the bytes that it needs by who holds them."""
    sample, times = _sample(shape, layout.pp)
    held: dict[str, list[tuple[int, int, Peers]]] = defaultdict(list)
    for name, members in peers.items():
        for shard in megatron_shards(sample, replace(layout, vpp=1), members[0]):
            if (".experts." in shard.name) == (len(name) == 3):
                for seg in shard.segments:
                    if seg.tensor is not None:
                        held[seg.tensor].append((seg.start, seg.stop, name))
    needs = [Counter[Holders]() for _ in range(engine_tp)]
    for rank, need in enumerate(needs):
        for shard in vllm_shards(sample, engine_tp, rank):
            layer = int(shard.name.split(".layers.")[1].split(".")[0]) if ".layers." in shard.name else None
            row_bytes = math.prod(shard.shape) // shard.shape[shard.dim] * dtype_bytes
            row_bytes *= 1 if layer is None else times[layer]
            for seg in shard.segments:
                if seg.tensor is not None:
                    for rows, holders in _ranges(seg.start, seg.stop, held[seg.tensor]):
                        need[holders] += rows * row_bytes
    return needs


def _ranges(start: int, stop: int, held: Sequence[tuple[int, int, Peers]]) -> Iterator[tuple[int, Holders]]:
    """Yield the rows from ``start`` to ``stop`` in runs that the same ranks hold: how many, and who."""
    cuts = sorted({start, stop, *(cut for low, high, _ in held for cut in (low, high) if start < cut < stop)})
    for low, high in pairwise(cuts):
        yield high - low, frozenset(name for first, end, name in held if first <= low and high <= end)


def _sample(shape: ModelShape, pp: int) -> tuple[ModelShape, list[int]]:
    """Return a model with one layer a stage and kind, and how many layers of the whole model each stands for."""
    counts = [sum(map(shape.has_experts, layers)) for layers in split_layers(shape.num_layers, pp)]
    sizes = [len(layers) for layers in split_layers(shape.num_layers, pp)]
    if shape.num_experts and shape.dense_layers:
        both = [times for size, count in zip(sizes, counts, strict=True) for times in (size - count, count)]
        return replace(shape, num_layers=2 * pp, dense_layers=tuple(range(0, 2 * pp, 2))), both
    return replace(shape, num_layers=pp), sizes
