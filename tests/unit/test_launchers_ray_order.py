"""Ranks follow the addresses of their nodes, and take the devices that Ray gave them."""

from __future__ import annotations

import pytest

from megarl.launchers.ray_group import device_index, in_order


def test_bundles_are_in_the_order_of_their_nodes_addresses_as_numbers() -> None:
    assert in_order({0: "10.0.0.10", 1: "10.0.0.9", 2: "10.0.1.1"}) == [1, 0, 2]
    assert in_order({0: "fd00::a", 1: "fd00::2"}) == [1, 0]


@pytest.mark.parametrize(
    ("assigned", "visible", "index"),
    [
        ("3", "3", 0),  # as Ray sets it
        ("3", None, 3),  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES on a whole node
        ("3", "", 3),
        ("5", "4,5,6,7", 1),  # the same on a part of one
        ("GPU-b", "GPU-a,GPU-b", 1),
    ],
)
def test_a_ranks_device_is_where_rays_name_of_it_stands_among_those_that_it_sees(
    assigned: str, visible: str | None, index: int
) -> None:
    assert device_index(assigned, visible) == index


def test_a_device_that_ray_gave_but_the_process_cant_see_is_an_error() -> None:
    with pytest.raises(ValueError, match="'2' is not in list"):
        device_index("2", "0,1")
