"""What each node starts: torchrun's agent or a host of engines; or Ray's head, workers and the driver."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megarl.launchers.host_address import ENGINE_HOSTS, START_S

LauncherName = Literal["ray", "torchrun"]
LAUNCHERS: tuple[LauncherName, ...] = ("ray", "torchrun")
NUM_PORTS = 10
DOCTOR = "megarl.doctor.nodes"
"""What torchrun starts on every node beside the programs that train."""
_OBJECT_STORE_BYTES = 1_000_000_000
_PATIENCE_S = 30
_OF_THE_JOB_S = 1_000_000  # a host waits for the run's controller, and ends with the job


@dataclass(frozen=True)
class Run:
    """A command of megarl's on several nodes. port: the first of NUM_PORTS that are this job's. folder: of each node.

    command: a module and its arguments. token: known to all nodes of the job. address: of this node. wait_s: for
    all nodes to be there. on_gpus: whether devices are GPUs. save_s: for the last save of a run that is told to end.
    engine_nodes: how many nodes, the last ones, have engines and no ranks, where Ray places neither.
    """

    launcher: LauncherName
    num_nodes: int
    node_rank: int
    devices: int
    host: str
    port: int
    address: str
    token: str
    folder: Path
    wait_s: float
    on_gpus: bool
    command: tuple[str, ...]
    save_s: float = 0.0
    engine_nodes: int = 0


@dataclass(frozen=True)
class Program:
    """A command of one node. name: for people. environ: added to the node's own."""

    name: str
    command: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodePrograms:
    """What one node runs. service: runs as long as the run does. stages: one after the other, the run itself last."""

    service: Program | None
    stages: tuple[Program, ...]


def programs_of(run: Run) -> NodePrograms:
    """Return the NodePrograms of the node of ``run.node_rank``."""
    if run.launcher == "torchrun":
        return NodePrograms(None, (_torchrun(run),))
    if run.num_nodes == 1:
        return NodePrograms(None, (Program(run.command[0], _python("-m", *run.command)),))
    return _ray(run)


def _torchrun(run: Run) -> Program:
    nodes, hosts = run.num_nodes - run.engine_nodes, f"{run.host}:{run.port + 2}"
    if run.node_rank >= nodes:
        return Program("the host of engines", _python("-m", "megarl.engine_host", hosts), {START_S: str(_OF_THE_JOB_S)})
    place = (
        ["--standalone"]
        if nodes == 1
        else [
            f"--nnodes={nodes}",
            f"--node-rank={run.node_rank}",
            f"--master-addr={run.host}",
            f"--master-port={run.port + 1}",
        ]
    )
    patience = f"--shutdown-timeout={math.ceil(run.save_s) + _PATIENCE_S}"  # torchrun's own would cut the save short
    ranks = (f"--nproc-per-node={run.devices}", patience, "-m", *run.command)
    command = _python("-m", "torch.distributed.run", *place, *ranks)
    return Program("torchrun", command, {ENGINE_HOSTS: hosts, START_S: f"{run.wait_s:g}"} if run.engine_nodes else {})


def _ray(run: Run) -> NodePrograms:
    gcs = f"{run.host}:{run.port + 2}"
    environ = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": run.token,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    here = (
        f"--node-ip-address={run.address}",
        f"--node-manager-port={run.port + 3}",
        f"--object-manager-port={run.port + 4}",
        f"--dashboard-agent-grpc-port={run.port + 5}",
        f"--dashboard-agent-listen-port={run.port + 6}",
        f"--runtime-env-agent-port={run.port + 7}",
        f"--metrics-export-port={run.port + 8}",
        f"--num-cpus={run.devices}",
        f"--num-gpus={run.devices if run.on_gpus else 0}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
        "--block",
    )
    if run.node_rank != 0:
        worker = _python("-m", "ray.scripts.scripts", "start", f"--address={gcs}", *here)
        return NodePrograms(Program("Ray's worker", worker, environ), ())
    head = _python(
        *("-m", "ray.scripts.scripts", "start", "--head", f"--port={run.port + 2}", "--include-dashboard=false"),
        *(f"--ray-client-server-port={run.port + 9}", "--no-monitor"),  # a monitor's port is the same in all jobs
        *(f"--temp-dir={run.folder / 'ray'}", *here),
    )
    ready = _python(
        *("-m", "megarl.launchers.ray_ready", f"--nodes={run.num_nodes}", f"--devices={run.devices}"),
        *(f"--wait-s={run.wait_s:g}", *(("--gpus",) if run.on_gpus else ())),
    )
    driver = _python("-m", *run.command)
    on_cluster = environ | {"RAY_ADDRESS": gcs}
    stages = (Program("the wait for Ray's nodes", ready, on_cluster), Program(run.command[0], driver, on_cluster))
    return NodePrograms(Program("Ray's head", head, environ), stages)


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def as_text(run: Run, names: Sequence[str]) -> str:
    """Return the commands of the node of ``run`` in lines for a person, without the token."""
    programs = programs_of(run)
    lines = [f"on {names[run.node_rank]}:"]
    for program in (programs.service, *programs.stages):
        if program is not None:
            environ = [f"{name}={'...' if 'TOKEN' in name else value}" for name, value in program.environ.items()]
            lines.append("  " + " ".join([*environ, *program.command]))
    return "\n".join(lines)
