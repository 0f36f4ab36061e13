"""How the controller and its hosts of engines meet: both prove that they know the job's token, then compare notes.

Nothing is unpickled before. Imports neither Ray nor torch.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from megarl.errors import ResourceError
from megarl.launchers.host_address import ENGINE_HOSTS, START_S, TOKEN, HostsAddress
from megarl.launchers.versions import other_versions, versions_here
from megarl.parallel.environment import platform_name, visible_devices
from megarl.ranks.meeting import reserved

OTHER_PORT = f"{ENGINE_HOSTS}=HOST:PORT with one that is free on the node of rank 0"
"""What a person does about a port that is taken."""
_RETRY_S = 0.2
_TELL_S = 10.0  # hosts that are started with the run are there by then
_GREETING_S = 30.0
_LONGEST_BYTES = 1 << 20
# A node without power says nothing, not even goodbye: 30 s of that are its end.
_SILENCE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000, "TCP_NODELAY": 1}


@dataclass(frozen=True)
class HostFacts:
    """What a host says of its node. num_devices: GPUs that it shows, None on CPU. versions: by ``versions_here``."""

    name: str
    platform: str
    num_devices: int | None
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> HostFacts:
        """Return the facts of this process."""
        platform = platform_name()
        num_devices = len(visible_devices()) if platform == "cuda" else None
        return cls(socket.gethostname(), platform, num_devices, versions_here())


@dataclass(frozen=True)
class Welcome:
    """What a host starts with. environ: variables. tp, ranks_per_node: of engines. timeout_s: see EngineHost."""

    environ: Mapping[str, str]
    tp: int
    ranks_per_node: int
    timeout_s: float


@dataclass(frozen=True)
class CameHost:
    """A host that is there, and knows the token. peer: address and port of its end of the connection."""

    facts: HostFacts
    line: socket.socket
    peer: tuple[str, int]

    @property
    def where(self) -> str:
        """Its name and address, for people."""
        return f"{self.facts.name} ({self.peer[0]})"

    def is_gone(self) -> bool:
        """Whether it has ended: it says nothing before it is welcomed."""
        try:
            return not self.line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True


def called_hosts(
    address: HostsAddress, num_hosts: int, welcome: Welcome, tell: Callable[[str], None]
) -> list[CameHost]:
    """Return as many hosts by name, once all are there and fit, and welcomed. tell: tells a person what is waited for.

    Raises ResourceError with what is wrong with one, or where they don't come in time.
    """
    with reserved(address.host, address.port, OTHER_PORT) as listener:
        there = _those_that_come(address, num_hosts, listener, tell)
    found = sorted(there, key=lambda host: (host.facts.name, host.peer))
    if wrong := answered(found, welcome):
        raise ResourceError(wrong)
    tell(f"engines are on {', '.join(host.where for host in found)}")
    return found


def answered(hosts: Sequence[CameHost], welcome: Welcome) -> str:
    """Welcome hosts that all fit, or refuse all; return what is wrong with them, empty where nothing is."""
    own = HostFacts.here()
    wrong = "\n".join(text for host in hosts for text in _differences(host.facts, own, welcome.ranks_per_node))
    for host in hosts:
        with suppress(OSError):  # of one that has ended since: the first call says so
            _send(Connection(os.dup(host.line.fileno())), {"refused": wrong} if wrong else asdict(welcome))
    return wrong


def greeted(line: socket.socket, peer: tuple[str, int], token: str) -> CameHost | None:
    """Return the host at the other end of a connection, None where it doesn't know the token, or says nothing."""
    _notice_silence(line)
    connection = Connection(os.dup(line.fileno()))
    try:
        _wait_at_most(line, _GREETING_S)
        deliver_challenge(connection, token.encode())
        answer_challenge(connection, token.encode())
        facts = HostFacts(**json.loads(connection.recv_bytes(_LONGEST_BYTES)))
        _wait_at_most(line, 0)
        return CameHost(facts, line, peer)
    except (AuthenticationError, EOFError, OSError, TypeError, ValueError):
        line.close()
        return None


def come(address: HostsAddress) -> tuple[socket.socket, Welcome]:
    """Return the connection to the controller, once it welcomes this host, and with what.

    Raises ResourceError where it isn't there in time, doesn't know the token, or refuses.
    """
    line = _reached(address)
    connection = Connection(os.dup(line.fileno()))
    try:
        _send(connection, asdict(HostFacts.here()))
        told = json.loads(connection.recv_bytes(_LONGEST_BYTES))
    except (EOFError, OSError) as error:
        raise ResourceError(f"the run at {address.place} ended before it began; it says why") from error
    if "refused" in told:
        raise ResourceError(told["refused"])
    return line, Welcome(**told)


def _those_that_come(
    address: HostsAddress, num_hosts: int, listener: socket.socket, tell: Callable[[str], None]
) -> list[CameHost]:
    """Return as many hosts. Raises ResourceError where they don't come in time."""
    came: queue.SimpleQueue[CameHost | None] = queue.SimpleQueue()
    there: list[CameHost] = []
    num_strangers, is_told, start_s = 0, False, time.monotonic()
    listener.settimeout(_RETRY_S)
    while True:
        while not came.empty():
            host = came.get()
            num_strangers += host is None
            there += [] if host is None else [host]
        there = [host for host in there if not host.is_gone()]
        if len(there) >= num_hosts:
            return there[:num_hosts]
        waited_s = time.monotonic() - start_s
        if waited_s > address.wait_s:
            raise ResourceError(_missing(address, num_hosts, there, num_strangers))
        if not is_told and waited_s > _TELL_S:
            is_told = True
            number = num_hosts - len(there)
            tell(f"waiting for {number} host{'s' if number > 1 else ''} of engines: {address.command} on each node")
        with suppress(TimeoutError):
            line, peer = listener.accept()
            threading.Thread(target=_greet, args=(line, peer[:2], address.token, came), daemon=True).start()


def _missing(address: HostsAddress, num_hosts: int, there: list[CameHost], num_strangers: int) -> str:
    who = ", ".join(host.where for host in there) or "none"
    strangers = f"; {num_strangers} came that didn't know the token" if num_strangers else ""
    return (
        f"{num_hosts} hosts of engines (actor_rollout_ref.rollout.nnodes) are waited for at {address.place}, and "
        f"{len(there)} came in {address.wait_s:g} s ({who}){strangers}. fix: type on each node of engines, with the "
        f"run's {TOKEN}: {address.command}; or wait longer: {START_S}=SECONDS"
    )


def _differences(host: HostFacts, own: HostFacts, ranks_per_node: int) -> Iterator[str]:
    """Yield a sentence for everything that keeps a host from having engines of this run."""
    if host.platform != own.platform:
        yield f"{host.name} is a {host.platform} machine, {own.name} a {own.platform} machine"
    elif host.num_devices is not None and host.num_devices < ranks_per_node:
        yield (
            f"{host.name} shows {host.num_devices} GPUs, and {ranks_per_node} are wanted of each node of engines "
            "(actor_rollout_ref.rollout.n_gpus_per_node, or the engine's tensor_model_parallel_size)"
        )
    yield from other_versions(host.name, host.versions, own.name, own.versions)


def _greet(line: socket.socket, peer: tuple[str, int], token: str, came: queue.SimpleQueue[CameHost | None]) -> None:
    """Add a host that knows the token to ``came``, None for whoever doesn't."""
    came.put(greeted(line, peer, token))


def _reached(address: HostsAddress) -> socket.socket:
    """Return a connection to the controller, whose ends have proven that they know the token."""
    deadline, why = time.monotonic() + address.wait_s, ""
    while time.monotonic() < deadline:
        try:
            line = socket.create_connection((address.host, address.port), timeout=_GREETING_S)
        except OSError as error:
            why = str(error)
            time.sleep(_RETRY_S)
            continue
        _notice_silence(line)
        connection = Connection(os.dup(line.fileno()))
        try:
            if connection.poll(_GREETING_S):
                answer_challenge(connection, address.token.encode())
                deliver_challenge(connection, address.token.encode())
                return line
            why = "it says nothing"
        except AuthenticationError as error:
            raise ResourceError(
                f"the run at {address.place} has another token. fix: {TOKEN} must be the same on all nodes of a run"
            ) from error
        except (EOFError, OSError) as error:  # it has all hosts that it needs, or has ended
            why = str(error) or "it closed the connection"
            time.sleep(_RETRY_S)
        line.close()
    raise ResourceError(
        f"no run is at {address.place} in {address.wait_s:g} s: {why}. fix: start it with "
        f"{ENGINE_HOSTS}={address.place} on the node of rank 0, or wait longer: {START_S}=SECONDS"
    )


def _send(connection: Connection, message: Mapping[str, object]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _wait_at_most(line: socket.socket, seconds: float) -> None:
    """Have whoever reads from a connection get an OSError after so long; 0: never."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))


def _notice_silence(line: socket.socket) -> None:
    """Have the end of a connection be noticed also where the other node has lost its power or its network."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SILENCE.items():
        line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
