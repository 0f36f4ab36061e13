"""How a process becomes a rank: environment, then platform, then the store through which ranks find each other."""

from __future__ import annotations

import faulthandler
import ipaddress
import os
import socket
from collections.abc import Collection
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil

from megarl.parallel.environment import apply_environment
from megarl.parallel.importing import heavy_imports
from megarl.parallel.numa import bind_near
from megarl.ranks.spec import RankSpec
from megarl.ranks.watched import START_S

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined] # torch doesn't list it

    from megarl.parallel.platform import Platform
    from megarl.ranks.worker import Worker

_REPORT_S = 30.0  # for the controller to say first where all ranks stand
_LOOPBACK, _LOOPBACK_INTERFACE = "127.0.0.1", "lo"


def join_ranks(listener: socket.socket | None = None) -> Platform:
    """Prepare this process and join the other ranks. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set.

    listener: rank 0's, at MASTER_ADDR and MASTER_PORT; None where that is to be opened, or torchrun has.
    """
    apply_environment()
    faulthandler.enable()  # gloo ends a process whose peer sends another shape from a thread of its own
    with heavy_imports():
        import torch
        import torch.distributed as dist

        from megarl.parallel.platform import install_platform

        platform = install_platform()
    platform.set_device(int(os.environ["LOCAL_RANK"]))
    if platform.name == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    store = _store(listener)
    # Not its device: with one torch splits every later group off this one, in which all ranks must take part, and those
    # of a group for gloo, which Megatron and vLLM make, don't. Until start_worker no collective runs on devices.
    dist.init_process_group(
        platform.backend, store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    platform.agree_on_products()
    return platform


def start_worker(spec: RankSpec, platform: Platform) -> Worker:
    """Return this rank's Worker, after ``join_ranks``."""
    with heavy_imports():
        import torch

        from megarl.ranks.worker import Worker

    # NCCL's limit for the world would be ten minutes, which ranks that load from a slow disk may be apart.
    limit_collectives(max(spec.hang_timeout_s, START_S) + _REPORT_S)
    if platform.name == "cuda" and any(role.residency.optimizer_on_host for role in spec.roles):
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(host_threads(len(os.sched_getaffinity(0)), num_ranks))
    if platform.name == "cuda" and spec.numa_binding:
        bind_near(pci_address(platform.device(int(os.environ["LOCAL_RANK"]))))
    worker = Worker(spec, platform.device(int(os.environ["LOCAL_RANK"])))
    limit_collectives(spec.hang_timeout_s + _REPORT_S)
    return worker


def pci_address(device: torch.device) -> str:
    """Return where a GPU is, as the kernel names it."""
    import torch

    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def host_threads(num_cores: int, num_ranks: int) -> int:
    """Return the threads of a rank that steps on the host, as an int: its even share of the node's cores.

    Ray and torchrun set OMP_NUM_THREADS to 1, for ranks whose devices do the work.
    """
    return max(1, num_cores // num_ranks)


def limit_collectives(timeout_s: float, groups: Collection[ProcessGroup] | None = None) -> None:
    """Have a collective of some groups, of all that there are unless they are given, fail after ``timeout_s``.

    Each library gives the groups that it makes a limit of its own: torch and Megatron half an hour.
    """
    import torch.distributed as dist

    for group in dist.distributed_c10d._world.pg_map.copy() if groups is None else groups:
        for device in group._device_types:
            group._get_backend(device)._set_default_timeout(timedelta(seconds=timeout_s))


def listening(host: str, port: int = 0) -> socket.socket:
    """Return a socket that listens at a host's address and no other; at a free port where it is 0.

    torch alone would listen on every interface, and let any machine read and write what ranks tell each other. Where
    the host's name leads to no address of this node, as that of a service does, every interface it is.
    """
    family, *_, address = _resolved(host, port)
    try:
        return socket.create_server(address[:2], family=family)
    except OSError:
        return socket.create_server(("", port), family=family)


def meeting_host() -> str:
    """Return the host that the ranks meet at, where rank 0 is: MASTER_ADDR, or loopback on a single node."""
    is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return _LOOPBACK if is_one_node else os.environ["MASTER_ADDR"]


def _resolved(host: str, port: int) -> tuple[Any, ...]:
    """Return family, type, protocol, name and address of a host, as socket.getaddrinfo gives them."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]


def interface_to(host: str, port: int = 1) -> str | None:
    """Return the network interface by which this machine reaches a host, None where the kernel knows no way.

    gloo would take the one that this machine's own name leads to, which may be none that others reach.
    """
    family, _, _, _, address = _resolved(host, port)
    if ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        return _LOOPBACK_INTERFACE
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    found = [name for name, entries in psutil.net_if_addrs().items() if own in (entry.address for entry in entries)]
    return found[0] if found else None


def _store(listener: socket.socket | None) -> Store:
    """Return the store of this run's ranks."""
    host, port, is_first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # What torchrun listens on is its own affair. Its store is told where the ranks meet, and nothing else.
        host = meeting_host()
        listener = listening(host) if is_first else None
        port = _told_port(listener)
    elif is_first and listener is None:
        listener = listening(host, port)
    if interface := interface_to(host, port):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    return tcp_store(host, port, listener)


def _told_port(listener: socket.socket | None) -> int:
    """Tell the other ranks through torchrun's store where rank 0 listens, or hear it. Restarted ranks meet anew."""
    agent = tcp_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    key = f"megarl/port/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if listener is not None:
        agent.set(key, str(listener.getsockname()[1]))
    return int(agent.get(key))


def tcp_store(
    host: str, port: int, listener: socket.socket | None = None, timeout: timedelta = timedelta(minutes=30)
) -> Store:
    """Return the store at ``port`` of a host, which this process serves where it has the ``listener`` there."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch doesn't list it

    # The store closes what it listens on, so that Python must not.
    fd = None if listener is None else listener.detach()
    return TCPStore(host, port, None, fd is not None, timeout, master_listen_fd=fd)
