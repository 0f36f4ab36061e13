from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.parallel.layout import EngineLayout, Layout
from megarl.plan.devices import device
from megarl.plan.publish import planning_cost, publish_traffic, rank_loads, rank_plan
from megarl.weights.model_facts.shipped import shipped_config
from megarl.weights.model_shape import ModelShape, parse_model_shape
from megarl.weights.name_map import hf_shapes, megatron_shards
from tests.unit.model_shapes import engines_of, layouts_of, model_shape, model_shapes

DTYPE_BYTES = 2
H100 = device("H100")


@st.composite
def publications(draw: st.DrawFn) -> tuple[ModelShape, Layout, EngineLayout]:
    """Draw a model of any family with layers of both kinds, a layout of it and of an engine on its ranks."""
    shape = draw(model_shapes())
    if shape.num_experts and shape.family != "MixtralForCausalLM":
        shape = replace(shape, dense_layers=tuple(i for i in range(shape.num_layers) if draw(st.booleans())))
    layout = draw(layouts_of(shape))
    return shape, layout, draw(engines_of(shape, [tp for tp in (1, 2, 4) if layout.world_size % tp == 0]))


@settings(max_examples=150, deadline=None)
@given(publications(), st.integers(1, 12))
def test_every_rank_keeps_and_receives_what_its_own_plan_says(
    publication: tuple[ModelShape, Layout, EngineLayout], ranks_per_node: int
) -> None:
    for rank, load in enumerate(rank_loads(*publication, ranks_per_node)):
        plan = rank_plan(*publication, ranks_per_node, rank)
        assert load.kept == sum(flow.numel for flow in plan.kept)
        near = {r for r in plan.receives if r // ranks_per_node == rank // ranks_per_node}
        assert load.received_within == sum(plan.receives[r].numel for r in near)
        assert load.received_across == sum(s.numel for r, s in plan.receives.items() if r not in near)


@settings(max_examples=300, deadline=None)
@given(publications(), st.integers(1, 12))
def test_what_all_ranks_send_is_what_all_receive_within_nodes_and_across(
    publication: tuple[ModelShape, Layout, EngineLayout], ranks_per_node: int
) -> None:
    ranks = rank_loads(*publication, ranks_per_node)
    assert sum(r.sent_within for r in ranks) == pytest.approx(sum(r.received_within for r in ranks))
    assert sum(r.sent_across for r in ranks) == pytest.approx(sum(r.received_across for r in ranks))
    if ranks_per_node >= len(ranks):
        assert not any(r.sent_across or r.received_across for r in ranks)


@settings(max_examples=100, deadline=None)
@given(publications())
def test_every_rank_of_a_node_of_its_own_receives_across_nodes_alone(
    publication: tuple[ModelShape, Layout, EngineLayout],
) -> None:
    assert not any(r.sent_within or r.received_within for r in rank_loads(*publication, 1))


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize(
    "layout", [Layout(8, tp=2, pp=2), Layout(8, tp=2), Layout(8, pp=4), Layout(8, tp=4, pp=2, ep=2, etp=2)]
)
@pytest.mark.parametrize("engine_tp", [1, 2, 4])
@pytest.mark.parametrize("ranks_per_node", [2, 8])
def test_nobody_sends_much_more_than_planned(family: str, layout: Layout, engine_tp: int, ranks_per_node: int) -> None:
    shape = replace(model_shape(family), num_layers=16, hidden_size=16, vocab_size=64)
    layout = layout if shape.num_experts else replace(layout, ep=1, etp=None)
    for rank, load in enumerate(rank_loads(shape, layout, EngineLayout(engine_tp), ranks_per_node)):
        sends = rank_plan(shape, layout, EngineLayout(engine_tp), ranks_per_node, rank).sends
        near = sum(s.numel for r, s in sends.items() if r // ranks_per_node == rank // ranks_per_node)
        across = sum(s.numel for s in sends.values()) - near
        assert (near, across) == pytest.approx((load.sent_within, load.sent_across), rel=0.01, abs=64)


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "MixtralForCausalLM"])
def test_a_rank_alone_moves_nothing(family: str) -> None:
    shape = model_shape(family)
    (load,) = rank_loads(shape, Layout(1), EngineLayout(1), 1)
    numel = sum(_numel(size) for size in hf_shapes(shape).values())
    assert (load.kept, load.sent_within, load.received_across) == (numel, 0, 0)
    traffic = publish_traffic(shape, Layout(1), EngineLayout(1), DTYPE_BYTES, 1, H100)
    assert (traffic.seconds, traffic.num_exchanges, traffic.least_exchanges) == (0, 0, 0)


def _numel(size: tuple[int, ...]) -> int:
    return size[0] * (size[1] if len(size) > 1 else 1)


@settings(max_examples=50, deadline=None)
@given(publications())
def test_a_rank_keeps_no_more_than_it_holds(publication: tuple[ModelShape, Layout, EngineLayout]) -> None:
    shape, layout, _ = publication
    for rank, load in enumerate(rank_loads(*publication, 8)):
        assert load.kept <= sum(_numel(shard.shape) for shard in megatron_shards(shape, layout, rank))


def test_stages_on_nodes_of_their_own_send_across_nodes_however_many_ranks_there_are() -> None:
    shape = replace(model_shape(), num_layers=16, hidden_size=16)
    for num_ranks in (16, 1024):
        traffic = publish_traffic(shape, Layout(num_ranks, pp=2), EngineLayout(1), DTYPE_BYTES, 8, H100)
        assert traffic.received_within == 0 < traffic.received_across
        assert traffic.seconds >= traffic.received_across / H100.inter_node_bytes_per_s


@pytest.mark.parametrize(
    ("layout", "engine_tp", "exchanges"),
    [
        (Layout(32, tp=8, pp=4, ep=8, etp=1), 16, 110),
        (Layout(128, tp=8, pp=4, ep=8, etp=1), 8, 216),
        (Layout(1024, tp=8, pp=4, ep=8, etp=1), 8, 216),
    ],
)
def test_a_model_of_235_billion_parameters_is_published_in_as_few_exchanges_as_its_bytes_need(
    layout: Layout, engine_tp: int, exchanges: int
) -> None:
    config = shipped_config("Qwen/Qwen3-235B-A22B")
    assert config is not None
    shape = parse_model_shape(config, "")
    traffic = publish_traffic(shape, layout, EngineLayout(engine_tp), DTYPE_BYTES, 8, H100)
    cost = planning_cost(shape, layout, EngineLayout(engine_tp), 8)
    assert traffic.num_exchanges == traffic.least_exchanges == exchanges
    assert cost.planning_s < 5 and 0 < cost.planning_bytes < 300e6
    assert json.loads(json.dumps(asdict(traffic)))["num_exchanges"] == exchanges
