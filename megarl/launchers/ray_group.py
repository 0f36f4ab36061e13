"""The WorkerGroup on Ray: one actor a rank, on a local Ray started here or on the cluster at RAY_ADDRESS."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megarl.errors import MegarlError, ResourceError, WorkerError
from megarl.launchers.failure import failures_named
from megarl.launchers.group import everywhere
from megarl.launchers.parcels import parcels_of
from megarl.parallel.environment import platform_environment, platform_name
from megarl.ranks.join import join_ranks, start_worker
from megarl.ranks.spec import RankSpec

if TYPE_CHECKING:
    from megarl.ranks.worker import Worker

A = TypeVar("A")
T = TypeVar("T")

_OBJECT_STORE_BYTES = 200_000_000
_PLACEMENT_S = 60.0  # a cluster may be adding nodes
_DEATH_NOTICE_S = 5.0  # for Ray to notice a death, which a peer in a collective feels at once


class RankActor:
    """The process of one rank."""

    worker: Worker

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __repr__(self) -> str:
        return f"rank {self.rank}"  # what Ray puts before the lines that this process prints

    def address(self) -> tuple[str, int]:
        """Return this node's address and a free port on it, for the ranks to meet at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, environment: dict[str, str], spec: RankSpec) -> None:
        """Become the rank that ``environment`` describes."""
        os.environ.update(environment)
        with failures_named("the start"):
            self.worker = start_worker(spec, join_ranks())

    def run(self, verb: Callable[[Worker, A], T], argument: A) -> T:
        """Have the Worker run ``verb``."""
        with failures_named(verb.__name__):
            return verb(self.worker, argument)


class RayGroup:
    """One Ray actor a rank. Consecutive ranks share a node."""

    def __init__(self, spec: RankSpec, *, nnodes: int, ranks_per_node: int, dashboard: bool) -> None:
        self.world_size = nnodes * ranks_per_node
        self.actors: list[Any] = []
        _connect(self.world_size, dashboard)
        try:
            self._start(spec, nnodes, ranks_per_node)
        except BaseException:
            self.abort()
            raise

    def _start(self, spec: RankSpec, nnodes: int, ranks_per_node: int) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        placement = _place(nnodes, ranks_per_node)
        remote = ray.remote(RankActor)
        self.actors = [
            remote.options(
                num_cpus=1,
                num_gpus=1 if platform_name() == "cuda" else 0,
                runtime_env={"env_vars": platform_environment()},
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, rank // ranks_per_node),
            ).remote(rank)
            for rank in range(self.world_size)
        ]
        host, port = _get([self.actors[0].address.remote()])[0]
        _get(
            [
                actor.start.remote(self._environment(rank, ranks_per_node, host, port), spec)
                for rank, actor in enumerate(self.actors)
            ]
        )

    def _environment(self, rank: int, ranks_per_node: int, host: str, port: int) -> dict[str, str]:
        # Ray shows an actor its own GPU alone, as device 0.
        local_rank = 0 if platform_name() == "cuda" else rank % ranks_per_node
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }

    def submit(self, verb: Callable[[Worker, A], T], arguments: Sequence[A]) -> _Answers[T]:
        """Have every rank run ``verb``, as WorkerGroup says: each parcel is put into Ray's store once."""
        import ray

        parcels = parcels_of(arguments)
        stored = [ray.put(content) for content in parcels.contents]
        place = parcels.of_rank()
        return _Answers([actor.run.remote(verb, stored[place[rank]]) for rank, actor in enumerate(self.actors)])

    def shutdown(self) -> None:
        """Release the engines, then end the actors and, if it was started here, Ray."""
        from megarl.ranks.worker import Worker

        everywhere(self, Worker.shutdown, None)
        self.abort()

    def abort(self) -> None:
        """Kill the actors and, if it was started here, Ray."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        ray.shutdown()


class _Answers(Generic[T]):
    """The answers to a call on Ray."""

    def __init__(self, pending: list[Any]) -> None:
        self.pending = pending

    def result(self) -> list[T]:
        """Wait for all ranks, and return their answers by rank."""
        return _get(self.pending)


def _get(pending: list[Any]) -> list[Any]:
    """Wait for all, but raise a failure the moment it is there: the others may wait for the failed rank."""
    import ray

    waiting = list(pending)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            raise _cause(pending, error) from error
    results: list[Any] = ray.get(pending)
    return results


def _place(nnodes: int, ranks_per_node: int) -> Any:
    """Reserve a device or core for every rank. Raises ResourceError where the cluster lacks them."""
    import ray

    kind = "GPU" if platform_name() == "cuda" else "CPU"
    bundle = {"CPU": float(ranks_per_node), kind: float(ranks_per_node)}
    placement = ray.util.placement_group([bundle] * nnodes, strategy="STRICT_SPREAD" if nnodes > 1 else "STRICT_PACK")
    if not placement.wait(_PLACEMENT_S):
        found = [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]
        raise ResourceError(
            f"the run needs {nnodes} nodes with {ranks_per_node} {kind}s each (trainer.nnodes, "
            f"trainer.n_gpus_per_node); Ray's {len(found)} nodes have {', '.join(f'{n:g}' for n in found)} {kind}s, "
            "and other runs may hold some. fix: lower them, or add nodes"
        )
    return placement


def _cause(pending: Sequence[Any], first: Exception) -> MegarlError:
    """Return why a call failed: the death of a rank, if there was one, since its peers' errors only follow from it."""
    import ray

    done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_DEATH_NOTICE_S)
    for rank, call in enumerate(pending):
        if call in done and (death := _death(call)):
            return WorkerError(f"rank {rank} died: {death}")
    cause = getattr(first, "cause", None)
    return cause if isinstance(cause, MegarlError) else WorkerError(f"a rank failed: {first}")


def _death(call: Any) -> Exception | None:
    """Return the error of a finished call if it says that the actor died."""
    import ray

    try:
        ray.get(call)
    except ray.exceptions.RayActorError as error:
        death: Exception = error
        return death
    except ray.exceptions.RayError:
        return None  # an error of its own, which the caller has, or one that follows from another rank's
    return None


def _connect(num_cpus: int, dashboard: bool) -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray on the loopback interface with a token of its own."""
    local = "RAY_ADDRESS" not in os.environ
    if local:  # read by ray when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Off its platforms' name: without it Ray replaces 127.0.0.1 by an address that other machines can reach.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if not local:
        ray.init()
        return
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=dashboard,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        log_to_driver=True,
        logging_level=logging.WARNING,
    )
