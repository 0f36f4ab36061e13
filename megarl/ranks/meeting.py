"""Where the ranks of a run find each other: a store that rank 0 serves, at one address and on one interface.

Imports the standard library and psutil alone, until a store is made.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil

from megarl.errors import ResourceError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch doesn't list it

_LOOPBACK, _LOOPBACK_INTERFACE = "127.0.0.1", "lo"


def store_of_ranks(listener: socket.socket | None) -> TCPStore:
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
) -> TCPStore:
    """Return the store at ``port`` of a host, which this process serves where it has the ``listener`` there."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch doesn't list it

    # The store closes what it listens on, so that Python must not.
    fd = None if listener is None else listener.detach()
    return TCPStore(host, port, None, fd is not None, timeout, master_listen_fd=fd)


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


def reserved(host: str, port: int, fix: str) -> socket.socket:
    """Return a socket that listens at a port, as ``listening``. Raises ResourceError with ``fix`` where it is taken."""
    try:
        return listening(host, port)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ResourceError(f"port {port} of {host} can't be had: {why}. fix: {fix}") from error


def meeting_host() -> str:
    """Return the host that the ranks meet at, where rank 0 is: MASTER_ADDR, or loopback on a single node."""
    is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return _LOOPBACK if is_one_node else os.environ["MASTER_ADDR"]


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


def _resolved(host: str, port: int) -> tuple[Any, ...]:
    """Return family, type, protocol, name and address of a host, as socket.getaddrinfo gives them."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
