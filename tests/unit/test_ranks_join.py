"""Where ranks meet: at one address of a node, which other machines reach only where ranks are on other machines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch doesn't list it

from megarl.ranks.join import host_threads
from megarl.ranks.meeting import interface_to, listening

NUM_RANKS = 2
# A rank that joins, adds up the ranks, and says what it listens on.
RANK = """
import json, psutil, sys
from megarl.ranks.join import join_ranks
join_ranks()
import torch
import torch.distributed as dist
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
found = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
print(json.dumps([int(total), found]))
dist.barrier()
"""


def joined(**environ: str) -> list[tuple[int, list[str]]]:
    """Return the sum of ranks and the addresses that a rank listens on, of each rank of a world."""
    processes = []
    for rank in map(str, range(NUM_RANKS)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(NUM_RANKS), "MEGARL_PLATFORM": "cpu", **environ}
        command = [sys.executable, "-c", RANK]
        processes.append(subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=400)[0] for process in processes]
    return [tuple(json.loads(line)) for line in said]  # type: ignore[misc]


def test_ranks_that_step_on_the_host_share_its_cores() -> None:
    assert host_threads(num_cores=128, num_ranks=8) == 16
    assert host_threads(num_cores=2, num_ranks=4) == 1


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


def test_ranks_meet_at_the_address_that_they_are_told_and_listen_nowhere_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    found = joined(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert [total for total, _ in found] == [3, 3]
    assert {address for _, addresses in found for address in addresses} == {"127.0.0.1"}


def test_ranks_of_torchrun_meet_apart_from_its_store_which_hears_of_a_port_alone() -> None:
    agent = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(agent.port), "LOCAL_WORLD_SIZE": str(NUM_RANKS)}
    found = joined(**address, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="1")
    assert [total for total, _ in found] == [3, 3]
    assert {address for _, addresses in found for address in addresses} == {"127.0.0.1"}
    assert [key for key in agent.list_keys() if not key.startswith("init/")] == ["megarl/port/1"]


def test_the_interface_to_this_machine_is_the_loopback_or_else_that_of_the_address() -> None:
    assert interface_to("127.0.0.1") == "lo"
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and name != "lo":
                assert interface_to(entry.address) == name
