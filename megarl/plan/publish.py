"""What publishing the actor's weights to the engine moves, by the very plan that a run executes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megarl.config.model_shape import ModelShape
from megarl.model.name_map import megatron_shards, vllm_shards
from megarl.parallel.layout import Layout, split_layers
from megarl.parallel.reshard_plan import plan_reshard
from megarl.plan.devices import Device

MAX_PLANNED_RANKS = 64


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends and receives in a publication, within its node and to others, the largest of all ranks.

    seconds: the slower of both ways at the device's bandwidths. num_ranks: how many ranks were planned; larger runs
    repeat them.
    """

    kept_bytes: int
    sent_within: int
    sent_across: int
    received_within: int
    received_across: int
    seconds: float
    num_ranks: int


def publish_traffic(
    shape: ModelShape, layout: Layout, engine_tp: int, dtype_bytes: int, ranks_per_node: int, device: Device
) -> Traffic | None:
    """Return the traffic of a publication; None where a block of ranks that repeats itself is too large to plan.

    One layer a stage is planned and counted as often as the stage has layers: they are all alike.
    """
    block = math.lcm(layout.tp * layout.cp * layout.pp, layout.expert_tp * layout.ep * layout.pp, engine_tp)
    block = layout.world_size if layout.world_size <= MAX_PLANNED_RANKS else block
    if block > MAX_PLANNED_RANKS:
        return None
    small = replace(layout, world_size=block)
    times = [len(layers) for layers in split_layers(shape.num_layers, layout.pp)]
    model = replace(shape, num_layers=layout.pp, dense_layers=_dense_stages(shape, layout.pp))
    sources = [megatron_shards(model, small, rank) for rank in range(block)]
    targets = [vllm_shards(model, engine_tp, rank % engine_tp) for rank in range(block)]
    sent, received, kept = ([[0, 0] for _ in range(block)] for _ in range(3))
    for move in plan_reshard(sources, targets):
        layer = move.source.name.split(".layers.")[-1].split(".")[0] if ".layers." in move.source.name else ""
        size = move.numel * dtype_bytes * (times[int(layer)] if layer else 1)
        source, target = move.source.rank, move.target.rank
        if source == target:
            kept[target][0] += size
            continue
        across = source // ranks_per_node != target // ranks_per_node
        sent[source][across] += size
        received[target][across] += size
    seconds = max(
        max(inside / device.link_bytes_per_s, outside / device.inter_node_bytes_per_s)
        for inside, outside in (*sent, *received)
    )
    most = [max(rank[i] for rank in way) for way in (sent, received) for i in (0, 1)]
    return Traffic(max(k[0] for k in kept), most[0], most[1], most[2], most[3], seconds, block)


def _dense_stages(shape: ModelShape, pp: int) -> tuple[int, ...]:
    """Return the stages whose layers have no experts. A stage of both kinds counts as the kind that it has more of."""
    stages = split_layers(shape.num_layers, pp)
    return tuple(i for i, layers in enumerate(stages) if 2 * sum(map(shape.has_experts, layers)) < len(layers))
