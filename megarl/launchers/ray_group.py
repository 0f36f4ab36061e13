"""The WorkerGroup on Ray: one actor a rank, on a Ray of the run's own or on the cluster at RAY_ADDRESS."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megarl.errors import MegarlError, ResourceError, WorkerError
from megarl.launchers.failure import failures_named
from megarl.launchers.group import everywhere
from megarl.launchers.parcels import parcels_of
from megarl.launchers.ray_address import named_cluster, unreachable
from megarl.launchers.watchdog import Watchdog
from megarl.parallel.environment import LOCAL_PLACE, platform_environment, platform_name
from megarl.ranks.join import join_ranks, start_worker
from megarl.ranks.meeting import listening
from megarl.ranks.spec import RankSpec
from megarl.ranks.watched import START, WatchAddress, Watched, failed_at_once

if TYPE_CHECKING:
    from megarl.ranks.worker import Worker

A = TypeVar("A")
T = TypeVar("T")

_OBJECT_STORE_BYTES = 200_000_000
_PLACEMENT_S = 60.0  # a cluster may be adding nodes
_LOW_MEMORY = "low on memory"  # in what Ray says of a process that it ended for that
_MEMORY_USED = re.compile(r"[\d.]+ ?[KMG]i?B ?/ ?[\d.]+ ?[KMG]i?B")
_DEATH_NOTICE_S = 5.0  # for Ray to notice a death, which a peer in a collective feels at once


class RankActor:
    """The process of one rank."""

    worker: Worker
    watched: Watched
    listener: socket.socket | None = None

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __repr__(self) -> str:
        return f"rank {self.rank}"  # what Ray puts before the lines that this process prints

    def address(self) -> tuple[str, int]:
        """Return this node's address and the port that the ranks meet at."""
        import ray

        host = ray.util.get_node_ip_address()
        self.listener = listening(host)
        return host, self.listener.getsockname()[1]

    def start(self, environment: dict[str, str], spec: RankSpec, address: WatchAddress) -> None:
        """Become the rank that ``environment`` describes. address: of whoever watches it."""
        os.environ.update(environment)
        if platform_name() == "cuda":
            os.environ["LOCAL_RANK"] = str(_own_device())
        self.watched = Watched(address, self.rank, failed_at_once)
        with failures_named(START), self.watched.at(START):
            self.worker = start_worker(spec, join_ranks(self.listener))

    def run(self, verb: Callable[[Worker, A], T], argument: A) -> T:
        """Have the Worker run ``verb``."""
        with failures_named(verb.__name__), self.watched.at(verb.__name__):
            return verb(self.worker, argument)


class RayGroup:
    """One Ray actor a rank. Consecutive ranks share a node."""

    def __init__(
        self, spec: RankSpec, *, nnodes: int, ranks_per_node: int, dashboard: bool, passed: Mapping[str, str]
    ) -> None:
        self.world_size, self.passed = nnodes * ranks_per_node, passed
        self.actors: list[Any] = []
        with _own_sigterm():
            self._session = _connect(self.world_size, dashboard)
        self.watchdog = _watchdog(self.world_size, spec.hang_timeout_s)
        try:
            self._start(spec, nnodes, ranks_per_node)
        except BaseException as error:
            self.abort(error)
            raise

    def _start(self, spec: RankSpec, nnodes: int, ranks_per_node: int) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        placement = placed_ranks(nnodes, ranks_per_node)
        bundles = bundles_in_order(placement)
        remote = ray.remote(RankActor)
        self.actors = [
            remote.options(
                num_cpus=1,
                num_gpus=1 if platform_name() == "cuda" else 0,
                runtime_env={"env_vars": platform_environment()},
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, bundles[rank // ranks_per_node]),
            ).remote(rank)
            for rank in range(self.world_size)
        ]
        host, port = _get([self.actors[0].address.remote()], START, self.watchdog)[0]
        starts = [
            actor.start.remote(self._environment(rank, ranks_per_node, host, port), spec, self.watchdog.address)
            for rank, actor in enumerate(self.actors)
        ]
        _get(starts, START, self.watchdog)

    def _environment(self, rank: int, ranks_per_node: int, host: str, port: int) -> dict[str, str]:
        return {
            **self.passed,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % ranks_per_node),
            LOCAL_PLACE: str(rank % ranks_per_node),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
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
        pending = [actor.run.remote(verb, stored[place[rank]]) for rank, actor in enumerate(self.actors)]
        return _Answers(pending, verb.__name__, self.watchdog)

    def shutdown(self) -> None:
        """Release the engines, then end the actors and, if it was started here, Ray."""
        from megarl.ranks.worker import Worker

        everywhere(self, Worker.shutdown, None)
        self._end(keep_logs=False)

    def abort(self, cause: BaseException) -> None:
        """Kill the actors and, if it was started here, Ray, whose logs stay where a failure is the cause."""
        self._end(keep_logs=isinstance(cause, Exception))

    def _end(self, keep_logs: bool) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)
        ray.shutdown()
        self.watchdog.kill_ranks_here()  # Ray leaves one that is stopped
        self.watchdog.close()
        if self._session is not None and not keep_logs:
            shutil.rmtree(self._session, ignore_errors=True)


class _Answers(Generic[T]):
    """The answers to a call on Ray."""

    def __init__(self, pending: list[Any], call: str, watchdog: Watchdog) -> None:
        self.pending, self.call, self.watchdog = pending, call, watchdog

    def result(self) -> list[T]:
        """Wait for all ranks, and return their answers by rank."""
        return _get(self.pending, self.call, self.watchdog)


def _get(pending: list[Any], call: str, watchdog: Watchdog) -> list[Any]:
    """Wait for all, but raise a failure the moment it is there: the others may wait for the failed rank."""
    import ray

    waiting, deadline_s = list(pending), time.monotonic() + watchdog.limit_s(call)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline_s - time.monotonic()))
        if not done:
            raise watchdog.report(call)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            raise _cause(pending, error, watchdog.place()) from error
    results: list[Any] = ray.get(pending)
    return results


def _own_device() -> int:
    """Return the index, among the devices that this process sees, of the one that Ray gave it."""
    import ray

    (assigned,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return device_index(assigned, os.environ.get("CUDA_VISIBLE_DEVICES"))


def device_index(assigned: str, visible: str | None) -> int:
    """Return where Ray's name of a device stands in CUDA_VISIBLE_DEVICES; the name is its index where that is unset.

    Ray shows a process its own device alone, unless RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set.
    """
    return int(assigned) if not visible else visible.split(",").index(assigned)


def placed_ranks(nnodes: int, ranks_per_node: int) -> Any:
    """Return the placement group of the trainer's ranks. Raises ResourceError where the cluster lacks room."""
    return placed(nnodes, ranks_per_node, "the run needs", "trainer.nnodes, trainer.n_gpus_per_node")


def placed(nnodes: int, ranks_per_node: int, need: str, keys: str) -> Any:
    """Return a placement group with a device or core for every rank. Raises ResourceError where the cluster lacks them.

    need, keys: who needs that, and which keys say so, in the error.
    """
    import ray

    kind = "GPU" if platform_name() == "cuda" else "CPU"
    bundle = {"CPU": float(ranks_per_node), kind: float(ranks_per_node)}
    placement = ray.util.placement_group([bundle] * nnodes, strategy="STRICT_SPREAD" if nnodes > 1 else "STRICT_PACK")
    if not placement.wait(_PLACEMENT_S):
        found = [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]
        raise ResourceError(
            f"{need} {nnodes} nodes with {ranks_per_node} {kind}s each ({keys}); Ray's {len(found)} nodes have "
            f"{', '.join(f'{n:g}' for n in found)} {kind}s, and others may hold some. fix: lower them, or add nodes"
        )
    return placement


def bundles_in_order(placement: Any) -> list[int]:
    """Return the bundles of a placement in the order of the addresses of their nodes."""
    import ray

    places = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    bundles = ray.util.placement_group_table(placement)["bundles_to_node_id"]
    return in_order({bundle: places[node] for bundle, node in bundles.items()})


def in_order(addresses: Mapping[int, str]) -> list[int]:
    """Return keys in the order of their IP addresses, as numbers: 10.0.0.9 comes before 10.0.0.10."""
    return sorted(addresses, key=lambda key: (ipaddress.ip_address(addresses[key]).packed, key))


def _watchdog(world_size: int, timeout_s: float) -> Watchdog:
    import ray

    return Watchdog(ray.util.get_node_ip_address(), world_size, timeout_s)


def _cause(pending: Sequence[Any], first: Exception, place: str) -> MegarlError:
    """Return why a call failed: the death of a rank, if there was one, since its peers' errors only follow from it."""
    import ray

    done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_DEATH_NOTICE_S)
    for rank, call in enumerate(pending):
        if call in done and (death := _death(call)):
            is_memory = isinstance(death, ray.exceptions.OutOfMemoryError) or _LOW_MEMORY in str(death)
            how = "can't be reached" if isinstance(death, ray.exceptions.ActorUnavailableError) else "died"
            died = WorkerError(f"rank {rank} {how} in {place}: {death}")
            return out_of_memory(rank, str(death)) if is_memory else died
    cause = getattr(first, "cause", None)
    return cause if isinstance(cause, MegarlError) else WorkerError(f"a rank failed: {first}")


def out_of_memory(rank: int, said: str) -> ResourceError:
    """Return the error of a rank that Ray ended for lack of memory. said: by Ray, whose own advice isn't for a run."""
    used = _MEMORY_USED.search(said)
    found = f" ({used[0]})" if used else ""
    return ResourceError(
        f"rank {rank} was ended since its node runs low on memory{found}. fix: a smaller micro-batch "
        "(actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu or ppo_max_token_len_per_gpu; in SFT "
        "data.micro_batch_size_per_gpu), then shorter responses, fewer ranks on the node (trainer.n_gpus_per_node), or "
        "end what else holds memory there; python -m megarl.plan says what takes it"
    )


def _death(call: Any) -> Exception | None:
    """Return the error of a finished call if it says that the actor died."""
    import ray

    try:
        ray.get(call)
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        death: Exception = error
        return death
    except ray.exceptions.RayError:
        return None  # an error of its own, which the caller has, or one that follows from another rank's
    return None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does on SIGTERM: Ray's start has it exit with code 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def join_cluster() -> None:
    """Join the cluster at RAY_ADDRESS, if this process hasn't."""
    import ray

    cluster = named_cluster()
    assert cluster is not None
    if not ray.is_initialized():
        try:
            ray.init(cluster, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise unreachable(cluster, str(error)) from error


def _connect(num_cpus: int, dashboard: bool) -> Path | None:
    """Join the cluster at RAY_ADDRESS, or start a Ray of the run's own and return the folder of its session.

    Its own is on the loopback interface, with a token, and its sockets and logs are for the user alone.
    """
    cluster = named_cluster()
    if cluster is None:  # read by ray when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Off its platforms' name: without it Ray replaces 127.0.0.1 by an address that other machines can reach.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if cluster is not None:
        join_cluster()
        return None
    session = Path(tempfile.mkdtemp(prefix="megarl_", dir=os.environ.get("RAY_TMPDIR")))
    ray.init(
        address="local",  # not one that happens to run on this machine
        num_cpus=num_cpus,
        include_dashboard=dashboard,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(session / "ray"),  # Ray opens the folder to all, but not the one that it is in
        log_to_driver=True,
        logging_level=logging.WARNING,
    )
    return session
