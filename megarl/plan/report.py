"""A plan as text for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

from megarl.config.schema import MegatronConfig, TrainedMegatronConfig
from megarl.errors import Problem
from megarl.plan import memory, step_time
from megarl.plan.advise import Advice
from megarl.plan.engine_place import EnginePlace
from megarl.plan.memory import GIB, Phase
from megarl.plan.publish import PlanningCost, Traffic, planning_cost
from megarl.plan.run_plan import RunPlan
from megarl.plan.static import num_buckets
from megarl.plan.step_time import StepTime
from megarl.plan.topology import Axis, Topology
from megarl.plan.verdict import Verdict

_GB = 1e9
_MAX_NODES = 8  # that are listed


def plan_text(plan: RunPlan, verdict: Verdict | None = None, notes: Sequence[str] = ()) -> str:
    """Return the whole plan. verdict: on a run that doesn't fit; None where nobody asked. notes: of the checks."""
    parts = [
        ("Batch", _batch_lines(plan)),
        *([("Algorithm", list(plan.algorithm))] if plan.algorithm else []),
        (
            "Layout",
            [
                *(line for t in plan.topologies for line in _layout_lines(t, plan)),
                *_engine_lines(plan),
                *_node_lines(plan),
            ],
        ),
        (_memory_title(plan), _memory_lines(plan)),
        ("Publish, checkpoint" if plan.engine else "Checkpoint", [*_publish_lines(plan), *_checkpoint_lines(plan)]),
        *([("Time of a step, roughly", [_time_words(plan.time)])] if plan.time and plan.fits else []),
        ("Verdict", _verdict_lines(plan, verdict)),
        ("Assumed", _assumed(plan)),
    ]
    if notes:
        parts.append(("Not checked here", list(notes)))
    return "\n".join(line for title, lines in parts for line in _titled(title, lines))


def no_effect_text(idle: Sequence[Problem]) -> str:
    """Return the block of lines on settings without effect, with an end; empty where there are none."""
    lines = [str(replace(problem, fix="")) for problem in idle]
    return "".join(f"{line}\n" for line in _titled("No effect in this run", lines)) if lines else ""


def _time_words(time: StepTime) -> str:
    return (
        f"{time.total:.1f} s  (generate {time.generate:.1f}, log-probs {time.score:.1f}, update {time.update:.1f}, "
        f"move {time.move:.1f}{'; the next rollouts are generated meanwhile' if time.overlaps else ''})"
    )


def _assumed(plan: RunPlan) -> list[str]:
    return [*memory.assumed(plan.engine is not None), *([step_time.ASSUMED] if plan.time and plan.fits else [])]


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)]


def _batch_lines(plan: RunPlan) -> list[str]:
    actor, *others = plan.batches.items()
    steps = f"{plan.num_steps:,}" if plan.num_steps else "not known here: they follow from the rows of data.train_files"
    lines = [*actor[1].describe(are_examples=plan.engine is None).splitlines(), f"steps of the run: {steps}"]
    if plan.engine is None:
        return lines
    for name, batch in others:
        lines += [f"{name}:", *batch.describe().splitlines()]
    share = actor[1].num_rollouts // plan.roles[0].layout.dp
    lines.append(f"{share:,} rollouts a data-parallel rank, at most {plan.tokens_per_step:,} tokens a step")
    scored, rollouts = plan.num_scored_rollouts, actor[1].num_rollouts
    lines.append(f"old log-probs: a pass over {scored:,} of {rollouts:,} rollouts" + _why_fewer(scored, rollouts))
    return lines


def _why_fewer(scored: int, rollouts: int) -> str:
    if scored == rollouts:
        return ""
    return "; the first mini-batch takes those of its own update" if scored else "; none needs one"


def _layout_lines(topology: Topology, plan: RunPlan) -> list[str]:
    axes = [a for a in topology.axes if a.size > 1]
    sizes = " x ".join(f"{a.name.upper()} {a.size}" for a in axes) or "one rank"
    lines = [f"{topology.role}: {sizes} on {plan.num_ranks} ranks, {plan.ranks_per_node} a node"]
    if axes:
        lines.append("  " + "; ".join(_axis_words(a) for a in axes))
    role = next(role for role in plan.roles if role.name == topology.role)
    layout, backend = role.layout, role.backend
    if isinstance(backend, TrainedMegatronConfig) and backend.overlap_grad_reduce:
        buckets = num_buckets(role)
        early = f"{buckets} bucket{'s' if buckets > 1 else ''} of the first stage, reduced during the backward pass"
        late = "; parameters are gathered during the next forward pass" if backend.overlap_param_gather else ""
        lines.append(f"  gradients: {early}{late}")
    if isinstance(backend, MegatronConfig) and backend.override_transformer_config:
        fields = ", ".join(f"{name} {value}" for name, value in backend.override_transformer_config.items())
        lines.append(f"  of megatron's own: {fields}")
    if layout.is_fsdp:
        copies = plan.num_ranks // layout.fsdp
        lines.append(
            f"  every tensor is cut into {layout.fsdp} by torch's fully_shard, as strategy fsdp and fsdp2 both do; "
            f"{copies} {'copies' if copies > 1 else 'copy'} of the model"
        )
    if len(topology.layers) > 1:
        layers = " ".join(
            f"{size} x {len(list(stages))}" for size, stages in groupby(len(stage) for stage in topology.layers)
        )
        waits = f"; stages wait {topology.bubble:.1%} of an update" if topology.bubble else ""
        lines.append(f"  layers a stage: {layers}{waits}")
    if topology.kv_copies > 1:
        lines.append(f"  every key-value head is on {topology.kv_copies} ranks")
    if topology.experts_per_rank:
        lines.append(f"  {topology.experts_per_rank} experts a rank and layer")
    return lines


def _engine_lines(plan: RunPlan) -> list[str]:
    """Return lines on engines that spread experts, and on those in processes of their own."""
    split, shape = plan.engine_layout, plan.roles[0].shape
    ranks = plan.num_engines * split.tp
    spread = []
    if plan.engine and shape.num_experts and split.ep > 1:
        spread = [f"engines: {shape.num_experts // split.ep} experts of a layer on each of {split.ep} ranks, whole"]
    if not plan.is_served:
        return spread
    nodes, whose = plan.engine_nodes, "of their own" if plan.engine_place.is_across else "beside the ranks"
    own = " of their own" if plan.engine_place is EnginePlace.APART else ""
    where = f"on {nodes} node{'s' if nodes > 1 else ''}{own}, " if plan.engine_place.is_across else ""
    return [
        *spread,
        f"engines: {plan.num_engines} of TP {split.tp}, {where}in {ranks} process{'es' if ranks > 1 else ''} and on "
        + (
            "the ranks' devices, where they rest while these train"
            if plan.shares_devices
            else f"as many devices {whose}; counted from rank {plan.num_ranks}"
        ),
    ]


def _node_lines(plan: RunPlan) -> list[str]:
    """Return lines that name the ranks and the actor's stages on each node; of many nodes the first and last."""
    size, actor = plan.ranks_per_node, plan.roles[0]
    nodes = range(plan.num_ranks // size)
    if len(nodes) == 1:
        return []
    lines = []
    for node in nodes:
        if len(nodes) > _MAX_NODES and node == _MAX_NODES - 1:
            lines.append("...")
        if len(nodes) <= _MAX_NODES or node < _MAX_NODES - 1 or node == nodes[-1]:
            ranks = range(node * size, (node + 1) * size)
            stages = sorted({actor.layout.coordinates(rank).pp for rank in ranks})
            where = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]} to {stages[-1]}"
            lines.append(f"node {node}: ranks {ranks[0]} to {ranks[-1]}, the actor's {where}")
    return lines


def _axis_words(axis: Axis) -> str:
    apart = "neighbours" if axis.stride == 1 else f"{axis.stride} ranks apart"
    return f"{axis.name} groups: {apart}, {'across nodes' if axis.crosses else 'within a node'}"


def _memory_title(plan: RunPlan) -> str:
    size = f"{plan.device.memory_bytes / GIB:.1f} GiB"
    return f"Memory of the fullest rank in each phase, in GiB ({plan.device.name}: {size} a rank)"


def _memory_lines(plan: RunPlan) -> list[str]:
    lines = [f"{'phase':<14}{'device':>8}{'free':>8}{'host':>8}  rank  on the device"]
    for phase in plan.phases:
        free = plan.device.memory_bytes - phase.device_bytes
        lines.append(
            f"{phase.name:<14}{phase.device_bytes / GIB:>8.1f}{free / GIB:>8.1f}{phase.host_bytes / GIB:>8.1f}"
            f"  {phase.rank:<5} {_items_words(phase)}"
        )
    if plan.engine:
        cached, tp = plan.engine.num_cached_tokens, plan.engine_layout.tp
        lines.append(
            f"KV cache: {max(0, plan.engine.cache_bytes) / GIB:.1f} GiB a rank, {cached:,} tokens a replica of "
            f"{tp} rank{'s' if tp > 1 else ''}: {cached // plan.max_sequence:,} of the longest "
            "sequences at once"
        )
    shared = ", where Ray places engines on a node of ranks" if plan.engine_place is EnginePlace.ANYWHERE else ""
    lines.append(f"host memory a node: {plan.host_bytes_per_node / GIB:.0f} GiB{shared}")
    return lines


def _items_words(phase: Phase) -> str:
    items = sorted(phase.items, key=lambda item: -item.device_bytes)
    return ", ".join(f"{item.name} {item.device_bytes / GIB:.1f}" for item in items if item.device_bytes >= 0.05 * GIB)


def _crossing_lines(plan: RunPlan, traffic: Traffic) -> list[str]:
    """Return the line on what crosses to the nodes of engines."""
    if not plan.engine_place.is_across:
        return []
    return [
        f"  {traffic.received_across / _GB:.2f} GB cross to each node of engines where the ranks are on others, "
        f"{traffic.sent_across / _GB:.2f} of them from one rank, over TCP; a fast network is far from full with that"
    ]


def _publish_lines(plan: RunPlan) -> list[str]:
    traffic, shape = plan.traffic, plan.roles[0].shape
    if plan.engine is None:
        return []
    if traffic is None:
        return [f"publish: every rank receives up to {plan.engine.weights_bytes / _GB:.2f} GB"]
    if plan.is_served:
        return [
            f"publish, in GB at most: a rank writes {traffic.sent_within / _GB:.2f} to the host's memory, once for all "
            f"engines; a rank of an engine reads {traffic.received_within / _GB:.2f}",
            *_crossing_lines(plan, traffic),
            f"  {traffic.seconds:.2g} s at {plan.device.host_link_bytes_per_s / _GB:g} GB/s to and from the host"
            + (
                f" and {plan.device.inter_node_bytes_per_s / _GB:g} GB/s between nodes"
                if plan.engine_place.is_across
                else ""
            ),
        ]
    outside = f"{shape.family} is outside of the name map: every rank is given whole tensors, a few at a time"
    return [
        *([] if shape.is_mapped else [outside]),
        f"publish, in GB a rank at most: keeps {traffic.kept_bytes / _GB:.2f}; within its node sends "
        f"{traffic.sent_within / _GB:.2f} and receives {traffic.received_within / _GB:.2f}; to and from other nodes "
        f"{traffic.sent_across / _GB:.2f} and {traffic.received_across / _GB:.2f}",
        f"  {traffic.num_exchanges:,} exchanges between all ranks",
        f"  {traffic.seconds:.2g} s at {plan.device.link_bytes_per_s / _GB:g} GB/s within a node and "
        f"{plan.device.inter_node_bytes_per_s / _GB:g} GB/s between nodes",
    ]


def _planning_cost(plan: RunPlan) -> PlanningCost:
    actor = plan.roles[0]
    return planning_cost(actor.shape, actor.layout, plan.engine_layout, plan.ranks_per_node)


def _checkpoint_lines(plan: RunPlan) -> list[str]:
    save = plan.checkpoint
    return [
        f"checkpoint: {save.num_bytes / _GB:.1f} GB in {save.num_files} files of weights a save, "
        f"{save.state_bytes / _GB:.1f} GB of state"
    ]


def _verdict_lines(plan: RunPlan, verdict: Verdict | None) -> list[str]:
    if plan.fits:
        return [f"fits: {plan.room_bytes / GIB:.1f} GiB are left in the fullest phase, {plan.worst.name}"]
    lines = []
    if plan.room_bytes < 0:
        lines.append(
            f"does not fit: {plan.worst.name} lacks {-plan.room_bytes / GIB:.1f} GiB on rank {plan.worst.rank}"
        )
    if plan.cache_shortage_tokens:
        lines.append(
            f"does not fit: the KV cache lacks {plan.cache_shortage_tokens:,} tokens to hold one sequence of "
            f"{plan.max_sequence:,}"
        )
    if verdict is None:
        return lines
    if verdict.changes:
        lines.append("the cheapest changes that make it fit:")
        return lines + [f"  {change}   (costs {change.cost})" for change in verdict.changes]
    lines.append("no change of up to three of its settings makes it fit. What takes the most, and what decides it:")
    lines += [f"  {cause}" for cause in verdict.causes]
    return [*lines, "more or larger devices help, or another layout: --advise searches those of an RL run"]


def advice_text(found: Sequence[Advice], plan: RunPlan, tried: int) -> str:
    """Return the layouts that fit, fastest first."""
    size = f"{plan.num_ranks} x {plan.device.name} of {plan.device.memory_bytes / GIB:.1f} GiB"
    if not found:
        return f"none of {tried} layouts fits {size}"
    lines = [f"{len(found)} fastest of {tried} layouts that were tried on {size}, by estimated seconds a step:"]
    for i, advice in enumerate(found, 1):
        lines.append(f"{i:>2}. {_time_words(advice.time)}; {advice.room_bytes / GIB:.1f} GiB left")
        lines.append(f"      {advice.change}")
    lines.append(f"assumed: {step_time.ASSUMED}")
    lines += [f"assumed: {line}" for line in memory.assumed(has_engine=True)]
    return "\n".join(lines)


def advice_json(found: Sequence[Advice], plan: RunPlan, tried: int) -> dict[str, Any]:
    """Return the same as plain values; sizes in bytes, times in seconds."""
    return {
        "device": asdict(plan.device),
        "num_ranks": plan.num_ranks,
        "tried": tried,
        "layouts": [
            {"values": dict(a.change.values), "seconds": asdict(a.time), "room_bytes": a.room_bytes} for a in found
        ],
        "assumed": [step_time.ASSUMED, *memory.assumed(has_engine=True)],
    }


def plan_json(plan: RunPlan, verdict: Verdict | None, notes: Sequence[str], idle: Sequence[Problem]) -> dict[str, Any]:
    """Return the plan as plain values; sizes in bytes. idle: what was asked for and isn't done."""
    engine = plan.engine
    return {
        "no_effect": [{"key": p.key, "value": p.value, "why": p.allowed} for p in idle],
        "device": asdict(plan.device),
        "num_ranks": plan.num_ranks,
        "ranks_per_node": plan.ranks_per_node,
        "batches": {name: asdict(batch) for name, batch in plan.batches.items()},
        "algorithm": list(plan.algorithm),
        "num_steps": plan.num_steps,
        "tokens_per_step": plan.tokens_per_step,
        "num_scored_rollouts": plan.num_scored_rollouts,
        "layout": [
            {
                "role": t.role,
                "axes": [asdict(a) for a in t.axes],
                "layers": [len(stage) for stage in t.layers],
                "bubble": t.bubble,
                "kv_copies": t.kv_copies,
                "experts_per_rank": t.experts_per_rank,
            }
            for t in plan.topologies
        ],
        "memory": [
            {
                "phase": phase.name,
                "rank": phase.rank,
                "device_bytes": phase.device_bytes,
                "host_bytes": phase.host_bytes,
                "items": [asdict(item) for item in phase.items],
            }
            for phase in plan.phases
        ],
        "engine": engine and asdict(engine) | {"num_cached_tokens": engine.num_cached_tokens},
        "host_bytes_per_node": plan.host_bytes_per_node,
        "publish": asdict(plan.traffic) | asdict(_planning_cost(plan)) if plan.traffic else None,
        "checkpoint": asdict(plan.checkpoint),
        "verdict": {
            "fits": plan.fits,
            "room_bytes": plan.room_bytes,
            "worst_phase": plan.worst.name,
            "changes": verdict and [{"values": dict(c.values), "cost": c.cost} for c in verdict.changes],
            "causes": verdict and list(verdict.causes),
        },
        "seconds": plan.time and asdict(plan.time),
        "assumed": _assumed(plan),
        "notes": list(notes),
    }
