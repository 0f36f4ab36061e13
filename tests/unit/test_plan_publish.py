from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.parallel.layout import Layout
from megarl.plan.devices import device
from megarl.plan.publish import publish_traffic, rank_traffic
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import megatron_shards, vllm_shards
from megarl.weights.reshard_plan import Move, plan_reshard
from tests.unit.model_shapes import layouts_of, model_shape, model_shapes

DTYPE_BYTES = 2
H100 = device("H100")


def _moves(shape: ModelShape, layout: Layout, engine_tp: int) -> tuple[Move, ...]:
    """Return the moves of the whole model, as a run plans them."""
    ranks = range(layout.world_size)
    sources = [megatron_shards(shape, layout, rank) for rank in ranks]
    return plan_reshard(sources, [vllm_shards(shape, engine_tp, rank % engine_tp) for rank in ranks])


@st.composite
def publications(draw: st.DrawFn) -> tuple[ModelShape, Layout, int]:
    """Draw a model of any family with layers of both kinds, a layout of it and the TP of an engine on its ranks."""
    shape = draw(model_shapes())
    if shape.num_experts and shape.family != "MixtralForCausalLM":
        shape = replace(shape, dense_layers=tuple(i for i in range(shape.num_layers) if draw(st.booleans())))
    layout = draw(layouts_of(shape))
    return shape, layout, draw(st.sampled_from([tp for tp in (1, 2, 4) if layout.world_size % tp == 0]))


@settings(max_examples=300, deadline=None)
@given(publications(), st.integers(1, 12))
def test_every_rank_keeps_and_receives_what_the_moves_of_the_whole_model_add_up_to(
    publication: tuple[ModelShape, Layout, int], ranks_per_node: int
) -> None:
    shape, layout, engine_tp = publication
    moves = _moves(shape, layout, engine_tp)
    for rank, traffic in enumerate(rank_traffic(shape, layout, engine_tp, DTYPE_BYTES, ranks_per_node)):
        own = [m for m in moves if m.source.rank == m.target.rank == rank]
        others = [m for m in moves if m.target.rank == rank != m.source.rank]
        assert traffic.kept == DTYPE_BYTES * sum(m.numel for m in own)
        received = traffic.received_within + traffic.received_across
        assert received == pytest.approx(DTYPE_BYTES * sum(m.numel for m in others))


@settings(max_examples=300, deadline=None)
@given(publications(), st.integers(1, 12))
def test_what_all_ranks_send_is_what_all_receive_within_nodes_and_across(
    publication: tuple[ModelShape, Layout, int], ranks_per_node: int
) -> None:
    ranks = rank_traffic(*publication, DTYPE_BYTES, ranks_per_node)
    assert sum(r.sent_within for r in ranks) == pytest.approx(sum(r.received_within for r in ranks))
    assert sum(r.sent_across for r in ranks) == pytest.approx(sum(r.received_across for r in ranks))
    if ranks_per_node >= len(ranks):
        assert not any(r.sent_across or r.received_across for r in ranks)


@settings(max_examples=100, deadline=None)
@given(publications())
def test_every_rank_of_a_node_of_its_own_receives_across_nodes_alone(
    publication: tuple[ModelShape, Layout, int],
) -> None:
    assert not any(r.sent_within or r.received_within for r in rank_traffic(*publication, DTYPE_BYTES, 1))


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize(
    "layout", [Layout(8, tp=2, pp=2), Layout(8, tp=2), Layout(8, pp=4), Layout(8, tp=4, pp=2, ep=2, etp=2)]
)
@pytest.mark.parametrize("engine_tp", [1, 2, 4])
def test_nobody_sends_much_more_than_planned(family: str, layout: Layout, engine_tp: int) -> None:
    shape = replace(model_shape(family), num_layers=16, hidden_size=16, vocab_size=64)
    layout = layout if shape.num_experts else replace(layout, ep=1, etp=None)
    moves = _moves(shape, layout, engine_tp)
    sent = [
        DTYPE_BYTES * sum(m.numel for m in moves if m.source.rank == rank != m.target.rank)
        for rank in range(layout.world_size)
    ]
    planned = publish_traffic(shape, layout, engine_tp, DTYPE_BYTES, layout.world_size, H100).sent_within
    assert planned == pytest.approx(max(sent), rel=0.1)


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "MixtralForCausalLM"])
def test_a_rank_alone_moves_nothing(family: str) -> None:
    shape = model_shape(family)
    (traffic,) = rank_traffic(shape, Layout(1), 1, DTYPE_BYTES, 1)
    numel = sum(move.numel for move in _moves(shape, Layout(1), 1))
    assert (traffic.kept, traffic.sent_within, traffic.received_across) == (DTYPE_BYTES * numel, 0, 0)
    assert publish_traffic(shape, Layout(1), 1, DTYPE_BYTES, 1, H100).seconds == 0


def test_stages_on_nodes_of_their_own_send_across_nodes_however_many_ranks_there_are() -> None:
    shape = replace(model_shape(), num_layers=16, hidden_size=16)
    for num_ranks in (16, 1024):
        traffic = publish_traffic(shape, Layout(num_ranks, pp=2), 1, DTYPE_BYTES, 8, H100)
        assert traffic.received_within == 0 < traffic.received_across
        assert traffic.seconds >= traffic.received_across / H100.inter_node_bytes_per_s
