"""Where ranks and groups lie: which groups cross nodes, and what each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megarl.parallel.layout import Layout, split_layers
from megarl.roles import Role

_AXES = ("tp", "cp", "dp", "pp")
_EXPERT_AXES = ("etp", "ep", "edp")


@dataclass(frozen=True)
class Axis:
    """One parallel axis. stride: ranks from member to member of a group. crosses: whether it leaves its node."""

    name: str
    size: int
    stride: int
    crosses: bool


@dataclass(frozen=True)
class Topology:
    """The axes of one role on its nodes. layers: of every stage.

    bubble: share of an update that stages wait, 0 where nothing is trained.

    kv_copies: of every key-value head, more than 1 where TP exceeds their number.
    """

    role: str
    axes: tuple[Axis, ...]
    layers: tuple[range, ...]
    bubble: float
    kv_copies: int
    experts_per_rank: int


def topology_of(role: Role, ranks_per_node: int, num_micro_batches: int) -> Topology:
    """Return the topology of a role's groups. num_micro_batches: of an optimizer step."""
    layout, shape = role.layout, role.shape
    sizes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp}
    axes = [_axis(name, sizes[name], _stride(layout, name), layout.world_size, ranks_per_node) for name in _AXES]
    if layout.is_fsdp:
        axes = [replace(axis, name="ulysses") if axis.name == "cp" else axis for axis in axes]
    if shape.num_experts and not layout.is_fsdp:
        expert = {"etp": layout.expert_tp, "ep": layout.ep, "edp": layout.edp}
        stride = 1
        for name in _EXPERT_AXES:
            axes.append(_axis(name, expert[name], stride, layout.world_size, ranks_per_node))
            stride *= expert[name]
    return Topology(
        role.name,
        tuple(axes),
        split_layers(shape.num_layers, layout.pp),
        bubble_share(layout, num_micro_batches) if role.is_trained else 0.0,
        max(1, layout.tp // shape.num_kv_heads),
        shape.num_experts // layout.ep,
    )


def bubble_share(layout: Layout, num_micro_batches: int) -> float:
    """Return the share of a pipelined update that a stage waits: (p - 1) / (v m + p - 1).

    p stages, v chunks each, m micro-batches. Narayanan et al., arXiv:2104.04473, section 2.2.
    """
    waits = layout.pp - 1
    return waits / (layout.vpp * num_micro_batches + waits)


def _stride(layout: Layout, axis: str) -> int:
    """Return the number of ranks from one neighbour on an axis to the next."""
    origin = layout.coordinates(0)
    return layout.rank(replace(origin, **{axis: 1})) if getattr(layout, axis) > 1 else 1


def _axis(name: str, size: int, stride: int, world_size: int, ranks_per_node: int) -> Axis:
    """Return an axis; ranks first, first + stride, ... are a group, and any that leaves its node counts."""
    span = (size - 1) * stride
    firsts = (r for r in range(world_size - span) if r // stride % size == 0)
    crosses = span > 0 and any(r // ranks_per_node != (r + span) // ranks_per_node for r in firsts)
    return Axis(name, size, stride, crosses)
