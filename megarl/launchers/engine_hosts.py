"""Engines in processes of their own on other nodes: a process on each of these starts them, as its EngineHost."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeVar, TypeVarTuple

from megarl.launchers.engine_processes import EngineLost, EngineProcesses
from megarl.launchers.group import WorkerGroup, everywhere
from megarl.launchers.sglang_environment import check_sglang
from megarl.ranks.across import Meeting, Mirror
from megarl.ranks.spec import EngineStart
from megarl.ranks.worker import Worker
from megarl.rollout.served import Answer, Order, Take
from megarl.rollout.sglang import SglangSpec
from megarl.weights.shared import Segment

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Ts = TypeVarTuple("Ts")

_MOST_ANSWERS = 256  # that travel together


@dataclass(frozen=True)
class HostPlace:
    """A node, as its engines need to know it.

    address: by which the trainer's ranks reach it. devices: names of those that are the engines', None on CPU.
    """

    address: str
    devices: tuple[str, ...] | None


class EngineHost:
    """The process of a node that its engines are started by, and that has the weights for them."""

    def __init__(self, environ: Mapping[str, str], place: Callable[[], HostPlace], tp: int, timeout_s: float) -> None:
        """Set variables, then listen for the trainer's ranks. timeout_s: how long one may keep this waiting."""
        os.environ.update(environ)
        self.tp, self.place = tp, place()
        self.engines: dict[int, EngineProcesses] = {}
        self.mirror = Mirror(self.place.address, timeout_s)
        self._lock, self._has_ended, self._has_sglang = threading.Lock(), False, False

    def __repr__(self) -> str:
        return "engines"  # what Ray puts before the lines that this process prints

    def meeting(self) -> Meeting:
        """Return where the trainer's ranks are waited for."""
        return self.mirror.meeting

    def meet(self, segments: tuple[Segment, ...]) -> None:
        """Meet the ranks, at the same time as they do. segments: of theirs. Raises EngineLost where one is missed."""
        with _weights_awaited():
            self.mirror.meet(segments)

    def receive_weights(self) -> None:
        """Take in the publication that the ranks are about to send. Raises EngineLost where it doesn't come."""
        with _weights_awaited():
            self.mirror.receive()

    def start(self, number: int, place: int, start: EngineStart) -> None:
        """Start an engine on the devices of its ``place`` among those here. number: of its own, never used again.

        Raises ConfigError where SGLang's environment isn't here as it is on the controller's node.
        """
        if isinstance(start.spec, SglangSpec) and not self._has_sglang:
            check_sglang(start.spec.python, socket.gethostname())
            self._has_sglang = True
        devices = self.place.devices
        own = None if devices is None else devices[place * self.tp : (place + 1) * self.tp]
        with self._lock:
            if not self._has_ended:
                self.engines[number] = EngineProcesses(start, own)

    def send(self, number: int, order: Order) -> None:
        """Give an engine an order, which it finds the weights of here. What has died says so by ``receive``."""
        if isinstance(order, Take):
            order = Take(order.policy_version, self.mirror.here(order.segments))
        with suppress(KeyError, EngineLost):
            self.engines[number].send(order)

    def receive(self, number: int, timeout_s: float) -> list[Answer]:
        """Return the answers of an engine that are there, after a wait for the first. Raises as ``RunningEngine``."""
        engine = self.engines[number]
        answers = [engine.receive(timeout_s)]
        while answers[-1] is not None and len(answers) < _MOST_ANSWERS:
            answers.append(engine.receive(0))
        return [answer for answer in answers if answer is not None]

    def kill(self, number: int) -> None:
        """End an engine."""
        if engine := self.engines.pop(number, None):
            engine.kill()

    def close(self) -> None:
        """End all engines, and let none start."""
        with self._lock:
            self._has_ended = True
        for number in list(self.engines):
            self.kill(number)


@contextmanager
def _weights_awaited() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise EngineLost(f"the weights of the ranks don't reach its node: {error}") from error


class Waited(Protocol[T_co]):
    """What a host is asked for, and may not have answered yet."""

    def result(self) -> T_co:
        """Return the answer. Raises EngineLost where the host is gone, and what was raised there."""
        ...


class Host(Protocol):
    """The EngineHost of a node, as the controller has it."""

    @property
    def is_gone(self) -> bool:
        """Whether it has ended and another may take its place."""
        ...

    def submit(self, verb: Callable[[EngineHost, *Ts], T], *arguments: *Ts) -> Waited[T]:
        """Have the host run ``verb`` beside all else that it is asked for."""
        ...

    def tell(self, verb: Callable[[EngineHost, *Ts], None], *arguments: *Ts) -> None:
        """Have the host run ``verb`` after all that it was told before; don't wait. What is gone isn't told."""
        ...

    def end(self, why: str) -> None:
        """End the host, and with it its engines."""
        ...


class HostedEngines:
    """The engines of a run on other nodes."""

    def __init__(
        self,
        start: EngineStart,
        ranks_per_node: int,
        hosts: Sequence[Host],
        late: Callable[[], Host | None] = lambda: None,
    ) -> None:
        """start: of every engine. late: returns a host that has come since, once, to take the place of one."""
        self._start, self._hosts, self._late = start, list(hosts), late
        self._engines_per_node = ranks_per_node // start.spec.tensor_parallel_size
        self._numbers = count()
        self._reached: list[Host] | None = None

    def start(self, number: int) -> EngineOnHost:
        """Start the engine of a number, and return it; another of that number has ended."""
        node, place = divmod(number, self._engines_per_node)
        host, own = self._hosts[node], next(self._numbers)  # an order for the one before must not reach this one
        host.submit(EngineHost.start, own, place, self._start).result()
        return EngineOnHost(host, own)

    @contextmanager
    def receiving(self, group: WorkerGroup) -> Iterator[tuple[int, ...]]:
        """Have all nodes take in what the ranks publish in the block; a node that doesn't is lost, with its engines.

        Nodes of hosts that are lost are first given to those that have come since: yields the numbers of the engines
        there, which may be started again.
        """
        nodes = self._given_again()
        fresh = self._hosts if self._reached is None else [self._hosts[node] for node in nodes]
        reached = [*(self._reached or ()), *(self._met(group, fresh) if fresh else ())]
        calls = [(host, host.submit(EngineHost.receive_weights)) for host in reached]
        size = self._engines_per_node
        yield tuple(node * size + place for node in nodes if self._hosts[node] in reached for place in range(size))
        self._reached = [host for host, _ in _that_answer(calls)]

    def _given_again(self) -> list[int]:
        """Give nodes whose host is gone to hosts that have come since; return which."""
        found = []
        for node, host in enumerate(self._hosts):
            if host.is_gone and (late := self._late()) is not None:
                self._hosts[node] = late
                found.append(node)
        return found

    def _met(self, group: WorkerGroup, hosts: Sequence[Host]) -> list[Host]:
        """Return those of the nodes that the ranks have met."""
        segments = tuple(everywhere(group, Worker.segment, None))
        there = _that_answer([(host, host.submit(EngineHost.meeting)) for host in hosts])
        calls = [(host, host.submit(EngineHost.meet, segments)) for host, _ in there]
        everywhere(group, Worker.meet_hosts, tuple(meeting for _, meeting in there))
        return [host for host, _ in _that_answer(calls)]


@dataclass
class EngineOnHost:
    """A RunningEngine on another node."""

    host: Host
    number: int
    _answers: list[Answer] = field(default_factory=list)

    def send(self, order: Order) -> None:
        """Give the engine an order; don't wait."""
        self.host.tell(EngineHost.send, self.number, order)

    def receive(self, timeout_s: float) -> Answer | None:
        """Return the next answer, None where there is none in time."""
        if not self._answers:
            self._answers += self.host.submit(EngineHost.receive, self.number, timeout_s).result()
        return self._answers.pop(0) if self._answers else None

    def kill(self) -> None:
        """End all ranks. Those of a host that is gone have ended."""
        with suppress(EngineLost):
            self.host.submit(EngineHost.kill, self.number).result()


def _that_answer(calls: Sequence[tuple[Host, Waited[T]]]) -> list[tuple[Host, T]]:
    """Return the nodes whose call went well, with what they answer; end the others, whose engines are lost by that."""
    found = []
    for host, call in calls:
        try:
            found.append((host, call.result()))
        except EngineLost as lost:
            host.end(str(lost))
    return found
