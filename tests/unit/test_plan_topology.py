from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.parallel.layout import Layout, split_layers
from megarl.plan.topology import bubble_share, topology_of
from tests.unit.model_shapes import model_shape
from tests.unit.small_roles import role_on

DENSE = replace(model_shape(), num_layers=24)
EXPERTS = replace(model_shape("Qwen3MoeForCausalLM"), num_layers=24, num_experts=16)
SIZES = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw a layout of up to 256 ranks, whose experts are split by axes of their own."""
    tp, cp, pp = draw(SIZES), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4]))
    dp = draw(st.integers(1, max(1, 256 // (tp * cp * pp))))
    stage = tp * cp * dp
    etp = draw(st.sampled_from([n for n in (1, 2, 4) if stage % n == 0]))
    ep = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if stage % (n * etp) == 0]))
    return Layout(stage * pp, tp, pp, cp=cp, ep=ep, etp=etp)


def _groups(layout: Layout, axis: str) -> list[list[int]]:
    """Return the ranks that differ on one axis only, in order."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        place = vars(layout.expert_coordinates(rank) if axis in ("etp", "ep", "edp") else layout.coordinates(rank))
        found.setdefault(tuple(at for name, at in place.items() if name != axis), []).append(rank)
    return list(found.values())


@settings(max_examples=400, deadline=None)
@given(layouts(), st.sampled_from([1, 2, 4, 6, 8, 16, 72]))
def test_every_axis_has_the_size_stride_and_nodes_of_its_groups(layout: Layout, ranks_per_node: int) -> None:
    axes = topology_of(role_on(layout, EXPERTS), ranks_per_node, 4).axes
    assert [axis.name for axis in axes] == ["tp", "cp", "dp", "pp", "etp", "ep", "edp"]
    for axis in axes:
        groups = _groups(layout, axis.name)
        assert {len(group) for group in groups} == {axis.size}
        if axis.size > 1:
            steps = {b - a for group in groups for a, b in pairwise(group)}
            assert steps == {axis.stride}, axis.name
        nodes = [{rank // ranks_per_node for rank in group} for group in groups]
        assert axis.crosses == any(len(places) > 1 for places in nodes), axis.name


@given(layouts())
def test_a_model_without_experts_has_no_axes_of_them(layout: Layout) -> None:
    topology = topology_of(role_on(replace(layout, ep=1, etp=None), DENSE), 8, 4)
    assert [axis.name for axis in topology.axes] == ["tp", "cp", "dp", "pp"]
    assert topology.experts_per_rank == 0


@given(layouts())
def test_stages_take_the_layers_that_the_layout_gives_them_and_ranks_their_share_of_experts(layout: Layout) -> None:
    topology = topology_of(role_on(layout, EXPERTS), 8, 4)
    assert topology.layers == split_layers(24, layout.pp)
    assert topology.experts_per_rank * layout.ep == 16


@pytest.mark.parametrize(("tp", "copies"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_key_value_heads_are_copied_where_tp_exceeds_their_number(tp: int, copies: int) -> None:
    assert topology_of(role_on(Layout(8, tp=tp), DENSE), 8, 4).kv_copies == copies


def test_groups_that_fit_a_node_but_straddle_two_cross_nodes() -> None:
    axis = topology_of(role_on(Layout(12, tp=4), DENSE), 6, 4).axes[0]
    assert (axis.size, axis.stride, axis.crosses) == (4, 1, True)


@settings(max_examples=300)
@given(st.integers(1, 16), st.integers(1, 64), st.integers(1, 4))
def test_the_bubble_is_what_a_schedule_of_equal_chunks_leaves_idle(pp: int, micro_batches: int, vpp: int) -> None:
    """Forward passes alone: each stage runs a micro-batch's chunk as soon as it has its input; backward mirrors it."""
    if micro_batches % pp and vpp > 1:
        return  # megatron demands it of interleaved stages
    done: dict[tuple[int, int], int] = {}  # (position in the model, micro-batch): when it is ready
    free = [0] * pp
    # Interleaved 1F1B: pp micro-batches pass a stage's first chunk, then its second, then come the next ones.
    order = [(c, m) for first in range(0, micro_batches, pp) for c in range(vpp)
             for m in range(first, min(first + pp, micro_batches))]  # fmt: skip
    for chunk, micro in order:
        for stage in range(pp):
            position = chunk * pp + stage
            start = max(free[stage], done.get((position - 1, micro), 0))
            done[position, micro] = free[stage] = start + 1
    busy, length = vpp * micro_batches, max(free)
    assert bubble_share(Layout(pp, pp=pp, vpp=vpp), micro_batches) == pytest.approx(1 - busy / length)


def test_a_model_that_is_not_trained_has_no_bubble_of_updates() -> None:
    layout = Layout(8, pp=4)
    assert topology_of(role_on(layout, DENSE, training=None), 8, 1).bubble == 0
    assert topology_of(role_on(layout, DENSE), 8, 9).bubble == 3 / 12
