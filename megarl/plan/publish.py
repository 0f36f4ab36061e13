"""What publishing the actor's weights to the engine moves between ranks, however many there are, and in how many turns.

Who sends what is the rule of ``weights/reshard_plan``: here it is applied to whole groups of ranks, without a plan.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from dataclasses import dataclass

from megarl.parallel.layout import EngineLayout, Layout
from megarl.plan.devices import Device
from megarl.weights.cells import cells_of
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import vllm_peers
from megarl.weights.reshard_plan import BUCKET_BYTES, Load, RankPlan, asked_of, loads_of, plan_reshard
from megarl.weights.shared_plan import shared_loads
from megarl.weights.trainer_peers import trainer_peers


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank keeps, sends and receives in a publication, within its node and to others: the most of all.

    seconds: of the rank that is busy longest, at the device's bandwidths, both ways at once.
    num_exchanges: that all ranks take part in. least_exchanges: that the busiest rank's bytes need.
    """

    kept_bytes: int
    sent_within: int
    sent_across: int
    received_within: int
    received_across: int
    seconds: float
    num_exchanges: int
    least_exchanges: int


@dataclass(frozen=True)
class PlanningCost:
    """CPU seconds and the most bytes of memory that one rank takes to plan its part of a publication."""

    planning_s: float
    planning_bytes: int


def seconds_of(load: Load, dtype_bytes: int, device: Device) -> float:
    """Return the seconds, as a float, that a rank's bytes take where all ways are used at once."""
    inside = dtype_bytes * max(load.sent_within, load.received_within)
    outside = dtype_bytes * max(load.sent_across, load.received_across)
    return max(inside / device.link_bytes_per_s, outside / device.inter_node_bytes_per_s)


def publish_traffic(
    shape: ModelShape, layout: Layout, engine: EngineLayout, dtype_bytes: int, ranks_per_node: int, device: Device
) -> Traffic:
    """Return the Traffic of a publication."""
    loads = rank_loads(shape, layout, engine, ranks_per_node)
    plan = rank_plan(shape, layout, engine, ranks_per_node, 0)
    busiest_bytes = dtype_bytes * max(load.busiest_way for load in loads)
    return Traffic(
        kept_bytes=dtype_bytes * max(load.kept for load in loads),
        sent_within=round(dtype_bytes * max(load.sent_within for load in loads)),
        sent_across=round(dtype_bytes * max(load.sent_across for load in loads)),
        received_within=dtype_bytes * max(load.received_within for load in loads),
        received_across=dtype_bytes * max(load.received_across for load in loads),
        seconds=max(seconds_of(load, dtype_bytes, device) for load in loads),
        num_exchanges=plan.num_exchanges(BUCKET_BYTES // dtype_bytes),
        least_exchanges=math.ceil(busiest_bytes / BUCKET_BYTES),
    )


def handed_traffic(
    shape: ModelShape, layout: Layout, engine: EngineLayout, dtype_bytes: int, device: Device, other_nodes: int = 0
) -> Traffic:
    """Return the Traffic of a publication to engines in processes of their own, by way of the host's memory.

    A byte is sent when a rank writes it there, and received when a rank of an engine reads it; in between it crosses
    once to each of the ``other_nodes`` that have engines. Received across: by such a node.
    """
    loads = shared_loads(shape, layout, engine)
    sent = round(dtype_bytes * max(load.sent_within for load in loads))
    received = dtype_bytes * max(load.received_within for load in loads)
    arriving = round(dtype_bytes * sum(load.sent_within for load in loads)) if other_nodes else 0
    seconds = (sent + received) / device.host_link_bytes_per_s
    seconds += max(sent * other_nodes, arriving) / device.inter_node_bytes_per_s
    return Traffic(0, sent, sent * other_nodes, received, arriving, seconds, num_exchanges=0, least_exchanges=0)


def rank_loads(shape: ModelShape, layout: Layout, engine: EngineLayout, ranks_per_node: int) -> tuple[Load, ...]:
    """Return the Load of every rank, in elements."""
    sources = cells_of(trainer_peers(shape, layout), ranks_per_node)
    targets = vllm_peers(shape, engine, range(layout.world_size))
    return loads_of(asked_of(sources, targets), targets, ranks_per_node, layout.world_size)


def rank_plan(shape: ModelShape, layout: Layout, engine: EngineLayout, ranks_per_node: int, rank: int) -> RankPlan:
    """Return the RankPlan of one rank, as it plans it in a run."""
    sources = cells_of(trainer_peers(shape, layout), ranks_per_node)
    return plan_reshard(sources, vllm_peers(shape, engine, range(layout.world_size)), rank)


def planning_cost(shape: ModelShape, layout: Layout, engine: EngineLayout, ranks_per_node: int) -> PlanningCost:
    """Return the PlanningCost of rank 0, measured here: it plans twice, since counting memory takes time."""
    started_s = time.process_time()
    rank_plan(shape, layout, engine, ranks_per_node, 0)
    planning_s = time.process_time() - started_s
    tracemalloc.start()
    try:
        rank_plan(shape, layout, engine, ranks_per_node, 0)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return PlanningCost(planning_s, most_bytes)
