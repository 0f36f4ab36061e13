"""Engines in processes of their own on nodes of the cluster at RAY_ADDRESS: an actor on each node is their host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, TypeVarTuple

from megarl.launchers.engine_hosts import EngineHost, HostedEngines, HostPlace
from megarl.launchers.engine_processes import EngineLost
from megarl.launchers.ray_group import bundles_in_order, join_cluster, placed, placed_ranks
from megarl.parallel.environment import platform_environment, platform_name
from megarl.ranks.spec import EngineStart

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_ORDERS = "orders"  # calls that run one after another, beside all others


def engines_on_ray(
    start: EngineStart,
    nnodes: int,
    ranks_per_node: int,
    trainer: tuple[int, int],
    passed: Mapping[str, str],
    timeout_s: float,
) -> HostedEngines:
    """Return the engines of a run, on nodes that are reserved for them, of what the trainer's leave.

    start: of every engine. trainer: its nodes, and ranks of each. passed: variables. timeout_s: how long a publication
    may take.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    join_cluster()
    keys = "actor_rollout_ref.rollout.nnodes, actor_rollout_ref.rollout.n_gpus_per_node"
    of_trainer = placed_ranks(*trainer)
    placement = placed(nnodes, ranks_per_node, "beside the trainer's ranks engines need", keys)
    ray.util.remove_placement_group(of_trainer)  # for the ranks, which start later
    tp = start.spec.tensor_parallel_size
    remote = ray.remote(concurrency_groups={_ORDERS: 1})(EngineHost)
    hosts = [
        remote.options(
            num_cpus=ranks_per_node,
            num_gpus=ranks_per_node if platform_name() == "cuda" else 0,
            max_concurrency=2 * (ranks_per_node // tp) + 2,
            runtime_env={"env_vars": platform_environment()},
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, bundle),
        ).remote(passed, _place_of_actor, tp, timeout_s)
        for bundle in bundles_in_order(placement)
    ]
    return HostedEngines(start, ranks_per_node, [_RayHost(host) for host in hosts])


def _place_of_actor() -> HostPlace:
    """Return the HostPlace of the actor that this runs in."""
    import ray

    here = ray.get_runtime_context().get_accelerator_ids()["GPU"] if platform_name() == "cuda" else None
    return HostPlace(ray.util.get_node_ip_address(), None if here is None else tuple(here))


@dataclass(frozen=True)
class _RayHost:
    """A Host that is an actor."""

    actor: Any
    is_gone = False  # it isn't replaced

    def submit(self, verb: Callable[[EngineHost, *Ts], T], *arguments: *Ts) -> _RayAnswer[T]:
        """Have the host run ``verb`` beside all else that it is asked for."""
        import ray

        if not ray.is_initialized():  # the run has left the cluster
            raise EngineLost("its node has ended with the run")
        return _RayAnswer(getattr(self.actor, verb.__name__).remote(*arguments))

    def tell(self, verb: Callable[[EngineHost, *Ts], None], *arguments: *Ts) -> None:
        """Have the host run ``verb`` after all that it was told before; don't wait."""
        getattr(self.actor, verb.__name__).options(concurrency_group=_ORDERS).remote(*arguments)

    def end(self, why: str) -> None:
        """End the host, and with it its engines."""
        import ray

        ray.kill(self.actor)


@dataclass(frozen=True)
class _RayAnswer(Generic[T]):
    """The answer of an actor."""

    call: Any

    def result(self) -> T:
        """Return the answer. Raises EngineLost where the actor is gone, and what was raised there."""
        import ray

        try:
            found: T = ray.get(self.call)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise EngineLost(f"the process that had started it is gone: {error}") from error
        return found
