"""Ranks follow the addresses of their nodes."""

from __future__ import annotations

from megarl.launchers.ray_group import in_order


def test_bundles_are_in_the_order_of_their_nodes_addresses_as_numbers() -> None:
    assert in_order({0: "10.0.0.10", 1: "10.0.0.9", 2: "10.0.1.1"}) == [1, 0, 2]
    assert in_order({0: "fd00::a", 1: "fd00::2"}) == [1, 0]
