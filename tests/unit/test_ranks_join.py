"""Where ranks meet: at one address of a node, which other machines reach only where ranks are on other machines."""

from __future__ import annotations

import socket

import pytest

from megarl.ranks.join import listening


def test_a_listener_is_at_its_hosts_address_alone() -> None:
    with listening("127.0.0.1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        socket.create_connection(listener.getsockname()).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", listener.getsockname()[1]))


def test_a_listener_takes_the_port_that_it_is_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with listening("localhost", port) as listener:
        assert listener.getsockname()[1] == port


def test_a_name_that_leads_to_no_address_of_this_node_is_every_interface() -> None:
    with listening("192.0.2.200") as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
