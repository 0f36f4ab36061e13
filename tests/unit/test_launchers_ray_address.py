"""RAY_ADDRESS is looked at before Ray is."""

from __future__ import annotations

import socket
import time

import pytest

from megarl.errors import ConfigError, ResourceError
from megarl.launchers.ray_address import check_ray_address, named_cluster


@pytest.mark.parametrize("address", ["", "local", None])
def test_without_a_cluster_a_run_has_a_ray_of_its_own(address: str | None) -> None:
    environ = {} if address is None else {"RAY_ADDRESS": address}
    assert named_cluster(environ) is None
    check_ray_address(environ)


def test_a_cluster_that_answers_is_joined() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        check_ray_address({"RAY_ADDRESS": address})
        assert named_cluster({"RAY_ADDRESS": address}) == address


def test_a_dead_cluster_is_an_error_at_once_that_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
    start_s = time.monotonic()
    with pytest.raises(ResourceError, match=f"no Ray cluster can be joined at RAY_ADDRESS={address}: .*refused.*fix: "):
        check_ray_address({"RAY_ADDRESS": address})
    assert time.monotonic() - start_s < 6


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port", "http://head:8265"])
def test_an_address_of_another_form_is_an_error_that_shows_the_form(address: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port of the cluster's head"):
        check_ray_address({"RAY_ADDRESS": address})
