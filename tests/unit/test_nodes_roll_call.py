"""The roll call over loopback: all come, one doesn't, one is refused, a stranger isn't let in."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from megarl.errors import ResourceError
from megarl.nodes.channel import Channel, answer, challenge
from megarl.nodes.facts import NodeFacts
from megarl.nodes.roll_call import Meeting, Peer, answer_roll, call_roll, open_meeting
from tests.unit.test_nodes_facts import FIRST, SECOND

HOST, TOKEN = "127.0.0.1", "the token of this job"


def meeting(listener: socket.socket, names: tuple[str, ...] = ("node1", "node2"), wait_s: float = 10.0) -> Meeting:
    return Meeting(HOST, listener.getsockname()[1], TOKEN, names, wait_s)


def called(place: Meeting, listener: socket.socket, wrong: str = "") -> list[Peer]:
    def judge(nodes: Sequence[NodeFacts]) -> str:
        return wrong

    return call_roll(place, listener, FIRST, judge)


@pytest.fixture
def listener() -> socket.socket:
    return open_meeting(Meeting(HOST, 0, TOKEN, ("node1",), 1.0))


def answered(place: Meeting) -> Future[Channel]:
    return ThreadPoolExecutor(1).submit(answer_roll, place, lambda address: SECOND)


def test_all_who_come_are_known_by_rank_and_may_talk_afterwards(listener: socket.socket) -> None:
    place = meeting(listener)
    other = answered(place)
    [peer] = called(place, listener)
    assert peer.facts == SECOND
    channel = other.result(10)
    channel.send({"ended": 3})
    assert peer.channel.receive() == {"ended": 3}
    channel.close()
    with pytest.raises(OSError, match="closed the connection"):
        peer.channel.receive()


def test_one_that_does_not_come_is_named_with_those_that_did(listener: socket.socket) -> None:
    place = meeting(listener, ("node1", "node2", "node3"), wait_s=3.0)
    other = answered(place)
    said = r"node3 didn't come to 127\.0\.0\.1:\d+ in 3 s; node1, node2 did"
    with pytest.raises(ResourceError, match=said):
        called(place, listener)
    with pytest.raises(ResourceError, match=said):
        other.result(10)


def test_what_is_wrong_is_heard_by_all(listener: socket.socket) -> None:
    place = meeting(listener)
    other = answered(place)
    with pytest.raises(ResourceError, match="torch differs"):
        called(place, listener, wrong="torch differs")
    with pytest.raises(ResourceError, match="torch differs"):
        other.result(10)


def test_who_does_not_know_the_token_is_not_let_in(listener: socket.socket) -> None:
    place = meeting(listener, wait_s=1.0)
    stranger = Meeting(HOST, place.port, "another token", place.names, 1.0)
    other = ThreadPoolExecutor(1).submit(answer_roll, stranger, lambda address: SECOND)
    with pytest.raises(ResourceError, match="node2 didn't come"):
        called(place, listener)
    with pytest.raises(ResourceError, match="node1 ended the roll call"):
        other.result(10)


def test_a_first_node_that_is_not_there_is_named_with_its_place() -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ResourceError, match=rf"doesn't reach 127\.0\.0\.1:{port}, where the nodes meet, in 0\.5 s"):
        answer_roll(Meeting(HOST, port, TOKEN, ("node1", "node2"), 0.5), lambda address: SECOND)


def test_a_port_that_is_taken_is_named_with_the_variable() -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(ResourceError, match="MEGARL_PORT"):
        open_meeting(Meeting(HOST, taken.getsockname()[1], TOKEN, ("node1",), 1.0))


def test_the_proof_of_one_challenge_does_not_answer_another() -> None:
    proofs = []
    for _ in range(2):
        here, there = (Channel(end) for end in socket.socketpair())
        thread = threading.Thread(target=answer, args=(there, TOKEN))
        thread.start()
        here.send({"challenge": f"{len(proofs)}"})
        proofs.append(here.receive()["proof"])
        thread.join()
    assert proofs[0] != proofs[1]


def test_a_wrong_proof_raises() -> None:
    here, there = (Channel(end) for end in socket.socketpair())
    there.send({"proof": "guessed"})
    with pytest.raises(ConnectionError, match="doesn't know the token"):
        challenge(here, TOKEN)
