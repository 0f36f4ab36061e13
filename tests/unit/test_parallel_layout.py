from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.config.schema import MegatronConfig
from megarl.errors import ConfigError
from megarl.parallel.layout import Coordinates, Layout, layers_of_chunks, layout_of, split_layers

layouts = st.builds(
    lambda tp, pp, dp, cp: Layout(tp * pp * dp * cp, tp, pp, cp=cp),
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 4),
)
expert_layouts = st.builds(
    lambda etp, ep, edp, pp: Layout(etp * ep * edp * pp, pp=pp, ep=ep, etp=etp),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
)


@given(layouts)
def test_coordinates_and_rank_are_inverse_and_every_place_is_taken_once(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    sizes = (layout.tp, layout.dp, layout.pp, layout.cp)
    assert all(0 <= at < size for place in places for at, size in zip(astuple(place), sizes, strict=True))
    assert len(set(places)) == layout.tp * layout.cp * layout.dp * layout.pp == layout.world_size


@given(expert_layouts)
def test_every_place_among_experts_is_taken_once(layout: Layout) -> None:
    places = [layout.expert_coordinates(rank) for rank in range(layout.world_size)]
    sizes = (layout.expert_tp, layout.ep, layout.edp, layout.pp)
    assert all(0 <= at < size for place in places for at, size in zip(astuple(place), sizes, strict=True))
    assert len(set(places)) == layout.world_size
    assert [place.pp for place in places] == [layout.coordinates(rank).pp for rank in range(layout.world_size)]


def test_experts_are_split_over_their_own_axes_of_the_same_ranks() -> None:
    layout = Layout(world_size=16, tp=4, pp=2, ep=2, etp=2)
    assert (layout.dp, layout.edp, layout.expert_tp) == (2, 2, 2)
    # The groups that megatron.core.parallel_state names for 16 ranks at TP 4, PP 2, EP 2 and expert-TP 2.
    assert _expert_groups(layout, "etp")[:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert _expert_groups(layout, "ep")[:4] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert _expert_groups(layout, "edp")[:4] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def _expert_groups(layout: Layout, axis: str) -> list[list[int]]:
    """Return the ranks that differ on one axis of experts only."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        place = vars(layout.expert_coordinates(rank))
        found.setdefault(tuple(at for name, at in place.items() if name != axis), []).append(rank)
    return sorted(found.values())


def test_unless_told_experts_are_split_over_tensor_parallel_ranks_as_the_rest() -> None:
    assert Layout(8, tp=2, ep=2) != Layout(8, tp=2, ep=2, etp=1)
    assert Layout(8, tp=2, ep=2).expert_tp == 2 and Layout(8, tp=2, ep=2, etp=1).expert_tp == 1


def test_tensor_parallel_ranks_are_neighbours_and_stages_are_furthest_apart() -> None:
    layout = Layout(world_size=8, tp=2, pp=2)
    assert layout.dp == 2
    # The groups that megatron.core.parallel_state names for 8 ranks at TP 2 x PP 2.
    assert _groups(layout, "tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert _groups(layout, "dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert _groups(layout, "pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def _groups(layout: Layout, axis: str) -> list[list[int]]:
    """Return the ranks that differ on one axis only."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        place = vars(layout.coordinates(rank))
        found.setdefault(tuple(at for name, at in place.items() if name != axis), []).append(rank)
    return sorted(found.values())


@given(layouts)
def test_each_data_parallel_rank_has_one_output_rank_on_the_last_stage(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in layout.output_ranks()]
    assert places == [Coordinates(tp=0, dp=dp, pp=layout.pp - 1) for dp in range(layout.dp)]


def test_the_output_ranks_of_eight_ranks() -> None:
    assert Layout(world_size=8, tp=2, pp=2).output_ranks() == (4, 6)
    assert Layout(world_size=8, tp=8).output_ranks() == (0,)


@pytest.mark.parametrize(("tp", "asked", "is_on"), [(1, True, False), (2, True, True), (2, False, False)])
def test_sequence_parallelism_is_on_only_where_tensors_are_split(tp: int, asked: bool, is_on: bool) -> None:
    layout = layout_of(_megatron(tensor_model_parallel_size=tp, sequence_parallel=asked), world_size=8)
    assert layout == Layout(world_size=8, tp=tp, sequence_parallel=is_on)


def test_a_config_names_every_axis() -> None:
    megatron = _megatron(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        virtual_pipeline_model_parallel_size=4,
        context_parallel_size=5,
        expert_model_parallel_size=6,
        expert_tensor_parallel_size=1,
    )
    assert layout_of(megatron, world_size=90) == Layout(90, tp=2, pp=3, vpp=4, cp=5, ep=6, etp=1)


def _megatron(**sizes: Any) -> MegatronConfig:
    """Return a config of one rank on every axis but those of ``sizes``."""
    alone: dict[str, Any] = dict.fromkeys((field.name for field in fields(MegatronConfig)), 1)
    unset = {"virtual_pipeline_model_parallel_size": None, "expert_tensor_parallel_size": None}
    return MegatronConfig(**alone | unset | {"sequence_parallel": False} | sizes)


@given(st.integers(1, 12), st.integers(0, 100))
def test_stages_take_all_layers_in_order_and_the_outer_stages_no_more_than_others(stages: int, extra: int) -> None:
    num_layers = stages + extra
    split = split_layers(num_layers, stages)
    sizes = [len(layers) for layers in split]
    assert [layer for layers in split for layer in layers] == list(range(num_layers))
    assert len(split) == stages and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert all(outer <= middle for outer in (sizes[0], sizes[-1]) for middle in sizes[1:-1])
    assert sizes[-1] <= sizes[0]  # the output layer costs more than the embedding


def test_layers_that_do_not_divide_go_to_the_middle_stages() -> None:
    assert split_layers(10, 4) == (range(2), range(2, 5), range(5, 8), range(8, 10))
    assert split_layers(5, 2) == (range(3), range(3, 5))


def test_the_chunks_of_a_stage_stand_as_far_apart_as_there_are_stages() -> None:
    layout = Layout(2, pp=2, vpp=2)
    assert layers_of_chunks(8, layout, 0) == (range(2), range(4, 6))
    assert layers_of_chunks(8, layout, 1) == (range(2, 4), range(6, 8))
    assert layers_of_chunks(8, Layout(2, pp=2), 1) == (range(4, 8),)


def test_more_stages_than_layers_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match="must be at most the model's 3 layers") as caught:
        split_layers(3, 4)
    assert [(p.key, p.value) for p in caught.value.problems] == [("pipeline_model_parallel_size", 4)]
