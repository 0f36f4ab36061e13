"""Engines in processes of their own on nodes of the cluster at RAY_ADDRESS: an actor on each node starts them there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from megarl.launchers.engine_processes import EngineLost, EngineProcesses
from megarl.launchers.group import WorkerGroup, everywhere
from megarl.launchers.ray_group import bundles_in_order, join_cluster, placed, placed_ranks
from megarl.parallel.environment import platform_environment, platform_name
from megarl.ranks.across import Meeting, Mirror
from megarl.ranks.spec import EngineStart
from megarl.ranks.worker import Worker
from megarl.rollout.served import Answer, Order, Take
from megarl.weights.shared import Segment

_ORDERS = "orders"  # calls that run one after another, beside all others
_MOST_ANSWERS = 256  # that travel together


class EngineHost:
    """The process of a node that its engines are started by, and that has the weights for them."""

    def __init__(self, passed: Mapping[str, str], tp: int, timeout_s: float) -> None:
        import ray

        os.environ.update(passed)
        self.tp = tp
        self.engines: dict[int, EngineProcesses] = {}
        self.mirror = Mirror(ray.util.get_node_ip_address(), timeout_s)

    def __repr__(self) -> str:
        return "engines"  # what Ray puts before the lines that this process prints

    def meeting(self) -> Meeting:
        """Return where the trainer's ranks are waited for."""
        return self.mirror.meeting

    def meet(self, segments: tuple[Segment, ...]) -> None:
        """Meet the ranks, at the same time as they do. segments: of theirs."""
        self.mirror.meet(segments)

    def receive_weights(self) -> None:
        """Take in the publication that the ranks are about to send."""
        self.mirror.receive()

    def start(self, number: int, place: int, start: EngineStart) -> None:
        """Start an engine on the devices of its ``place`` among those here. number: of its own, never used again."""
        import ray

        devices = None
        if platform_name() == "cuda":
            here = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            devices = here[place * self.tp : (place + 1) * self.tp]
        self.engines[number] = EngineProcesses(start, devices)

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


class RayEngines:
    """The nodes of a run's engines."""

    def __init__(
        self,
        start: EngineStart,
        nnodes: int,
        ranks_per_node: int,
        trainer: tuple[int, int],
        passed: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        """Reserve the nodes, of what the trainer's leave.

        start: of every engine. trainer: its nodes, and ranks of each. passed: variables. timeout_s: how long a
        publication may take.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        join_cluster()
        keys = "actor_rollout_ref.rollout.nnodes, actor_rollout_ref.rollout.n_gpus_per_node"
        of_trainer = placed_ranks(*trainer)
        placement = placed(nnodes, ranks_per_node, "beside the trainer's ranks engines need", keys)
        ray.util.remove_placement_group(of_trainer)  # for the ranks, which start later
        self._start, self._engines_per_node = start, ranks_per_node // start.spec.tensor_parallel_size
        remote = ray.remote(concurrency_groups={_ORDERS: 1})(EngineHost)
        self._hosts = [
            remote.options(
                num_cpus=ranks_per_node,
                num_gpus=ranks_per_node if platform_name() == "cuda" else 0,
                max_concurrency=2 * self._engines_per_node + 2,
                runtime_env={"env_vars": platform_environment()},
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, bundle),
            ).remote(passed, start.spec.tensor_parallel_size, timeout_s)
            for bundle in bundles_in_order(placement)
        ]
        self._numbers = count()
        self._reached: list[Any] | None = None

    def start(self, number: int) -> EngineOnHost:
        """Start the engine of a number, and return it; another of that number has ended."""
        node, place = divmod(number, self._engines_per_node)
        host, own = self._hosts[node], next(self._numbers)  # an order for the one before must not reach this one
        _answer(host.start.remote(own, place, self._start))
        return EngineOnHost(host, own)

    @contextmanager
    def receiving(self, group: WorkerGroup) -> Iterator[None]:
        """Have all nodes take in what the ranks publish in the block; a node that doesn't is lost, with its engines."""
        reached = self._met(group) if self._reached is None else self._reached
        calls = [(host, host.receive_weights.remote()) for host in reached]
        yield
        self._reached = [host for host, _ in _that_answer(calls)]

    def _met(self, group: WorkerGroup) -> list[Any]:
        """Return the nodes that the ranks have met."""
        segments = tuple(everywhere(group, Worker.segment, None))
        there = _that_answer([(host, host.meeting.remote()) for host in self._hosts])
        calls = [(host, host.meet.remote(segments)) for host, _ in there]
        everywhere(group, Worker.meet_hosts, tuple(meeting for _, meeting in there))
        return [host for host, _ in _that_answer(calls)]


@dataclass
class EngineOnHost:
    """A RunningEngine on another node."""

    host: Any
    number: int
    _answers: list[Answer] = field(default_factory=list)

    def send(self, order: Order) -> None:
        """Give the engine an order; don't wait."""
        self.host.send.options(concurrency_group=_ORDERS).remote(self.number, order)

    def receive(self, timeout_s: float) -> Answer | None:
        """Return the next answer, None where there is none in time."""
        if not self._answers:
            self._answers += _answer(self.host.receive.remote(self.number, timeout_s))
        return self._answers.pop(0) if self._answers else None

    def kill(self) -> None:
        """End all ranks. Those of a run that has left the cluster have ended."""
        import ray

        if ray.is_initialized():
            with suppress(EngineLost):
                _answer(self.host.kill.remote(self.number))


def _that_answer(calls: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return the nodes whose call went well, with what they answer; end the others, whose engines are lost by that."""
    import ray

    found = []
    for host, call in calls:
        try:
            found.append((host, ray.get(call)))
        except ray.exceptions.RayError:
            ray.kill(host)
    return found


def _answer(call: Any) -> Any:
    """Return the result of a call to a node. Raises EngineLost where that is gone, and the error it raised itself."""
    import ray

    try:
        return ray.get(call)
    except ray.exceptions.RayActorError as error:
        raise EngineLost(f"the process that had started it is gone: {error}") from error
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
