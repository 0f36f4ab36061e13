"""The roll call: every node says who it is to the first one, which tells all whether the run may start."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megarl.errors import ResourceError
from megarl.nodes.channel import SILENCE_S, Channel, answer, challenge
from megarl.nodes.facts import OTHER_PORTS, NodeFacts
from megarl.ranks.meeting import reserved

_RETRY_S = 0.2


@dataclass(frozen=True)
class Peer:
    """Another node, and the channel to it."""

    facts: NodeFacts
    channel: Channel


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet. names: of all nodes, by rank. wait_s: how long for all to be there."""

    host: str
    port: int
    token: str
    names: tuple[str, ...]
    wait_s: float

    @property
    def place(self) -> str:
        """Host and port."""
        return f"{self.host}:{self.port}"


def open_meeting(meeting: Meeting) -> socket.socket:
    """Return the first node's listener. Raises ResourceError where the port is taken."""
    return reserved(meeting.host, meeting.port, OTHER_PORTS)


def call_roll(
    meeting: Meeting, listener: socket.socket, own: NodeFacts, judge: Callable[[Sequence[NodeFacts]], str]
) -> list[Peer]:
    """Return all other nodes by rank, once all are there and ``judge`` finds nothing wrong with them.

    judge: returns what keeps the nodes from running together, empty where nothing does; all of them hear it.

    Raises ResourceError with that, or with the names of the nodes that didn't come.
    """
    came: queue.SimpleQueue[Peer] = queue.SimpleQueue()
    listener.settimeout(_RETRY_S)
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + meeting.wait_s
    wrong = ""
    while len(peers) < len(meeting.names) - 1:
        if time.monotonic() > deadline:
            wrong = _missing(meeting, {0, *peers})
            break
        try:
            connection, _ = listener.accept()
            threading.Thread(target=_greet, args=(connection, meeting.token, came), daemon=True).start()
        except TimeoutError:
            pass
        while not came.empty():
            peer = came.get()
            peers[peer.facts.node_rank] = peer
    listener.close()
    found = [peers[rank] for rank in sorted(peers)]
    wrong = wrong or judge([own, *(peer.facts for peer in found)])
    for peer in found:
        peer.channel.send({"end": wrong} if wrong else {"go": True})
    if wrong:
        raise ResourceError(wrong)
    return found


def answer_roll(meeting: Meeting, read_own: Callable[[str], NodeFacts]) -> Channel:
    """Return the channel to the first node, once it says that the run may start.

    read_own: returns this node's facts, given its address as the first node sees it.

    Raises ResourceError with what is wrong, or where the first node can't be reached in time.
    """
    channel = Channel(_connected(meeting))
    try:
        answer(channel, meeting.token)
        channel.send(read_own(channel.connection.getsockname()[0]).as_dict())
        channel.connection.settimeout(meeting.wait_s + SILENCE_S)  # the first node waits no longer than that
        told = channel.receive()
    except OSError as error:
        raise ResourceError(f"{meeting.names[0]} ended the roll call at {meeting.place}: {error}") from error
    if "end" in told:
        raise ResourceError(str(told["end"]))
    channel.connection.settimeout(SILENCE_S)
    return channel


def _connected(meeting: Meeting) -> socket.socket:
    deadline = time.monotonic() + meeting.wait_s
    while True:
        try:
            return socket.create_connection((meeting.host, meeting.port), timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"{socket.gethostname()} doesn't reach {meeting.place}, where the nodes meet, in "
                    f"{meeting.wait_s:g} s: {error}. fix: MEGARL_INTERFACE=NAME of the network that all nodes share"
                ) from error
            time.sleep(_RETRY_S)


def _greet(connection: socket.socket, token: str, came: queue.SimpleQueue[Peer]) -> None:
    channel = Channel(connection)
    try:
        challenge(channel, token)
        came.put(Peer(NodeFacts(**channel.receive()), channel))
    except (OSError, TypeError):  # a stranger, or another version: not one of the nodes, which will be missed
        channel.close()


def _missing(meeting: Meeting, here: set[int]) -> str:
    absent = [name for rank, name in enumerate(meeting.names) if rank not in here]
    present = [name for rank, name in enumerate(meeting.names) if rank in here]
    return (
        f"{', '.join(absent)} didn't come to {meeting.place} in {meeting.wait_s:g} s; {', '.join(present)} did. fix: "
        "look at what these nodes printed, if anything; else exclude them (sbatch --exclude), name the network that "
        "all share (MEGARL_INTERFACE), or wait longer (MEGARL_START_S)"
    )
