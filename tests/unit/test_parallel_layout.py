from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.config.schema import MegatronConfig
from megarl.errors import ConfigError
from megarl.parallel.layout import Coordinates, Layout, layout_of, split_layers

layouts = st.builds(
    lambda tp, pp, dp: Layout(tp * pp * dp, tp, pp), st.integers(1, 8), st.integers(1, 6), st.integers(1, 5)
)


@given(layouts)
def test_coordinates_and_rank_are_inverse_and_every_place_is_taken_once(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    sizes = (layout.tp, layout.dp, layout.pp)
    assert all(0 <= at < size for place in places for at, size in zip(astuple(place), sizes, strict=True))
    assert len(set(places)) == layout.tp * layout.dp * layout.pp == layout.world_size


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
    layout = layout_of(MegatronConfig(tp, 2, asked), world_size=8)
    assert layout == Layout(world_size=8, tp=tp, pp=2, sequence_parallel=is_on)


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


def test_more_stages_than_layers_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match="must be at most the model's 3 layers") as caught:
        split_layers(3, 4)
    assert [(p.key, p.value) for p in caught.value.problems] == [("pipeline_model_parallel_size", 4)]
