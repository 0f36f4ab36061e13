"""From a checked config to a running group of ranks, and back to nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from megarl.config.command_line import only_prints
from megarl.config.compose import USER_ERROR, errors_reported
from megarl.config.schema import SGLANG, PPOConfig, SFTConfig, SFTTrainerConfig
from megarl.errors import ConfigError, Problem, ResourceError
from megarl.launchers.engine_placer import are_placed_by_ray
from megarl.launchers.engine_processes import EngineProcesses, RunningEngine
from megarl.launchers.group import WorkerGroup
from megarl.launchers.host_address import ENGINE_HOSTS, named_hosts
from megarl.launchers.host_meeting import Welcome, called_hosts
from megarl.launchers.ray_address import RAY_ADDRESS, check_ray_address, named_cluster
from megarl.launchers.sglang_environment import check_sglang, sglang_python
from megarl.launchers.starter import (
    complete_local_rank,
    complete_world_of_srun,
    copies_of_command,
    grace_s,
    has_peers,
    is_torchrun,
    placed_rank,
    refusal,
)
from megarl.monitor.preemption import Limit, Preemption
from megarl.parallel.environment import (
    apply_environment,
    check_platform,
    passed_environment,
    platform_environment,
    platform_name,
    visible_devices,
)
from megarl.ranks.spec import EngineStart, RankSpec
from megarl.roles import (
    engine_ranks_per_node,
    engines_share_devices,
    in_the_trainers_ranks,
    is_served,
    num_engine_ranks,
    num_ranks,
)

_OF_THE_DASHBOARD = ("aiohttp_cors", "opencensus")  # some of requirements/ray_jobs.txt
_END_S = 5.0  # from the last save to the end of the process


def serve_a_run() -> None:
    """Be a rank of a run, other than 0, until it ends."""
    from megarl.launchers.torchrun_group import serve

    serve()


def serve_if_not_controller(serve: Callable[[], None] = serve_a_run) -> bool:
    """Serve until the controller ends, if this process was started as a rank other than 0; return whether it was one.

    Ends the process where it is one of several that were started and aren't ranks; the first of them says why. A rank
    has nothing to serve where the command only prints.
    """
    complete_world_of_srun()
    rank = placed_rank()
    with errors_reported():
        if copies := copies_of_command():
            if os.environ.get(copies.index, "0") != "0":
                sys.exit(USER_ERROR)
            raise refusal(copies)
        if rank is not None:
            complete_local_rank()
    if not rank:
        return False
    if not only_prints(sys.argv[1:]):
        apply_environment()
        serve()
    end_rank()
    return True


def end_rank() -> None:
    """End a process that was started as a rank, whose run went well; return in any other."""
    if placed_rank() is not None:
        end_process(0)


def end_process(code: int) -> None:
    """End this process with an exit code.

    A rank ends at once: Python's own end would run the destructors of gloo's threads, which now and then abort a
    process that has done all.
    """
    if placed_rank() is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def dismiss_ranks() -> None:
    """Let the ranks go that wait for a run under torchrun: there is none."""
    if placed_rank() is not None:
        from megarl.launchers.torchrun_group import TorchrunGroup

        TorchrunGroup.joined(None, Preemption(None, print))


@contextmanager
def worker_group(spec: RankSpec, trainer: SFTTrainerConfig, preemption: Preemption) -> Iterator[WorkerGroup]:
    """Start all ranks of a run, as they were placed or on Ray, and end them afterwards.

    preemption: hears of signals once all have started, also of those that reach another rank.
    """
    group: WorkerGroup
    if placed_rank() is not None:
        from megarl.launchers.torchrun_group import TorchrunGroup

        joined = TorchrunGroup.joined(spec, preemption)
        assert joined is not None
        group = joined
    else:
        from megarl.launchers.ray_group import RayGroup

        group = RayGroup(
            spec,
            nnodes=trainer.nnodes,
            ranks_per_node=trainer.n_gpus_per_node,
            dashboard=trainer.ray_dashboard,
            passed=passed_environment(trainer.pass_environment),
        )
    try:
        with preemption.heard():
            yield group
    except BaseException as error:
        group.abort(error)
        raise
    group.shutdown()


def preemption_of(trainer: SFTTrainerConfig, tell: Callable[[str], None]) -> Preemption:
    """Return the Preemption of a run's controller. tell: tells a person."""
    limit, grace = Limit(trainer.preempt_save_s, "trainer.preempt_save_s"), grace_s()
    if grace is not None and grace - _END_S < limit.seconds:
        why = f"torchrun kills ranks after {grace:g} s; its --shutdown-timeout={limit.seconds + _END_S:g} lets them be"
        limit = Limit(max(grace - _END_S, 0.0), why)
    return Preemption(limit, tell, partial(has_peers, dict(os.environ)))  # vLLM writes over LOCAL_WORLD_SIZE


@dataclass(frozen=True)
class EngineStarter:
    """How a run's engines in processes of their own are started, on this node, where Ray places them, or on hosts.

    start: starts the engine of a number. receiving: see EngineServers.
    """

    start: Callable[[int], RunningEngine]
    receiving: Callable[[WorkerGroup], AbstractContextManager[Sequence[int]]]


def engine_starter(config: PPOConfig, start: EngineStart, tell: Callable[[str], None]) -> EngineStarter:
    """Return the EngineStarter of a run, whose hosts of engines are there.

    start: what every engine starts with. tell: tells a person what is waited for.

    Raises ResourceError where a cluster has no room for its engines, and where hosts don't come or don't fit.
    """
    trainer, nodes, per_node = config.trainer, config.actor_rollout_ref.rollout.nnodes, engine_ranks_per_node(config)
    passed, tp = passed_environment(trainer.pass_environment), start.spec.tensor_parallel_size
    if are_placed_by_ray():
        from megarl.launchers.ray_engines import engines_on_ray

        ranks = trainer.nnodes, trainer.n_gpus_per_node
        engines = engines_on_ray(start, nodes, per_node, ranks, passed, trainer.hang_timeout_s)
        return EngineStarter(engines.start, engines.receiving)
    if (address := named_hosts()) is not None:
        from megarl.launchers.engine_hosts import HostedEngines
        from megarl.launchers.host_calls import RemoteHost
        from megarl.launchers.late_hosts import LateHosts

        welcome = Welcome(platform_environment() | passed, tp, per_node, trainer.hang_timeout_s)
        came = called_hosts(address, nodes, welcome, tell)
        hosts = [RemoteHost(host.line, host.facts.name, trainer.hang_timeout_s) for host in came]
        engines = HostedEngines(start, per_node, hosts, LateHosts(address, welcome, tell).next)
        return EngineStarter(engines.start, engines.receiving)
    devices = engine_devices(config)

    def start_here(number: int) -> RunningEngine:
        return EngineProcesses(start, None if devices is None else devices[number * tp : (number + 1) * tp])

    return EngineStarter(start_here, lambda group: nullcontext(()))


def engine_devices(config: PPOConfig) -> tuple[str, ...] | None:
    """Return the names of the devices of engines in processes of their own; None on CPU.

    They are those after the trainer's, or the trainer's where these are shared.

    Raises ResourceError where the node has fewer.
    """
    if platform_name() == "cpu":
        return None
    there, first = visible_devices(), config.trainer.n_gpus_per_node
    if engines_share_devices(config):
        first = 0
    needed = first + num_engine_ranks(config)
    if len(there) < needed:
        raise ResourceError(
            f"training and engines need {needed} devices of this node (trainer.n_gpus_per_node = {first}, "
            f"actor_rollout_ref.rollout.n_gpus_per_node = {num_engine_ranks(config)}), which shows {len(there)}. fix: "
            f"lower them, or {in_the_trainers_ranks(config)}"
        )
    return there[first:needed]


def _check_dashboard() -> None:
    """Raise ConfigError where Ray's dashboard can't start, of which Ray itself says so in a traceback."""
    missing = [name for name in _OF_THE_DASHBOARD if find_spec(name) is None]
    if missing:
        why = f"Ray's dashboard needs packages that aren't installed ({', '.join(missing)}, ...)"
        fix = "pip install --no-deps -r requirements/ray_jobs.txt, or trainer.ray_dashboard=false"
        raise ConfigError([Problem("trainer.ray_dashboard", True, why, fix)])


def check_launch(config: PPOConfig | SFTConfig) -> None:
    """Raise where ranks can't be had, at no import of Ray or torch.

    ConfigError for another number than the config's; ResourceError without the GPUs or the Ray that were asked for.
    """
    check_platform()
    if isinstance(config, PPOConfig):
        _check_engines(config)
    if placed_rank() is None:
        check_ray_address()
        if config.trainer.ray_dashboard and named_cluster() is None:
            _check_dashboard()
        return
    started, named = int(os.environ["WORLD_SIZE"]), num_ranks(config)
    if started != named:
        who = "torchrun" if is_torchrun() else "the launcher (WORLD_SIZE)"
        allowed = f"{who} started {started} ranks, the config says {named}"
        fix = f"torchrun --nproc-per-node={config.trainer.n_gpus_per_node}, or change trainer.n_gpus_per_node"
        raise ConfigError([Problem("trainer.nnodes x trainer.n_gpus_per_node", named, allowed, fix)])


def _check_engines(config: PPOConfig) -> None:
    """Raise ConfigError or ResourceError for engines that can't be where the config says they are."""
    address = named_hosts()
    if not is_served(config):
        if address is not None:
            why = "is for engines in processes of their own, and those of this run are in the trainer's ranks"
            fix = f"actor_rollout_ref.rollout.placement=server, or unset {ENGINE_HOSTS}"
            raise ConfigError([Problem(ENGINE_HOSTS, address.place, why, fix)])
        return
    elsewhere = {RAY_ADDRESS: are_placed_by_ray(), ENGINE_HOSTS: address is not None}
    if all(elsewhere.values()):
        why = f"is for engines that nobody else places, and Ray places those of a run with {RAY_ADDRESS}"
        raise ConfigError([Problem(ENGINE_HOSTS, os.environ[ENGINE_HOSTS], why, f"unset {ENGINE_HOSTS}")])
    if not any(elsewhere.values()):
        _check_one_node(config)
        engine_devices(config)
    if config.actor_rollout_ref.rollout.name == SGLANG:
        check_sglang(sglang_python(config))
    for name, is_it in elsewhere.items():
        if is_it and engines_share_devices(config):
            key, why = "actor_rollout_ref.rollout.n_gpus_per_node", "engines there have devices of their own"
            raise ConfigError([Problem(key, 0, f"must be at least 1 with {name}: {why}", f"{key}=null")])


def _check_one_node(config: PPOConfig) -> None:
    """Raise ConfigError for engines on other nodes than this one, or ranks on other nodes than the engines."""
    why = f"must be 1 without {RAY_ADDRESS} and {ENGINE_HOSTS}: engines in processes of their own start on this node"
    sizes = {
        "trainer.nnodes": config.trainer.nnodes,
        "actor_rollout_ref.rollout.nnodes": config.actor_rollout_ref.rollout.nnodes,
    }
    fix = (
        f"{ENGINE_HOSTS}=host:port, with python -m megarl.engine_host on nodes of engines, or join a cluster "
        f"({RAY_ADDRESS}=host:port), or {in_the_trainers_ranks(config)}"
    )
    if problems := [Problem(key, nodes, why, f"{fix}, or {key}=1") for key, nodes in sizes.items() if nodes > 1]:
        raise ConfigError(problems)
