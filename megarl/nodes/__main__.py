"""One node's part of a run on several: ``python -m megarl.nodes --nodes=a,b --devices=8 ... -- megarl.main_ppo ...``.

Start it once on every node, as ``srun --ntasks-per-node=1`` does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megarl.config.build import build_config
from megarl.config.command_line import parse_command_line
from megarl.config.compose import compose, errors_reported
from megarl.config.programs import PPO, PROGRAMS, for_recipe
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, Problem, ResourceError
from megarl.launchers.host_address import DEFAULT_START_S, NO_TOKEN, TOKEN
from megarl.monitor.disk import refusals_named
from megarl.nodes.children import adopt_orphans
from megarl.nodes.facts import NodeFacts, differences, read_facts, report
from megarl.nodes.programs import DOCTOR, LAUNCHERS, NUM_PORTS, Run, as_text, programs_of
from megarl.nodes.roll_call import Meeting, answer_roll, call_roll, open_meeting
from megarl.nodes.watch import Watch, first_node, other_node
from megarl.parallel.environment import platform_name
from megarl.roles import is_served

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def main() -> int:
    """Read the command line, meet the other nodes, run, and return the exit code."""
    with errors_reported():
        asked, names, command = _arguments(sys.argv[1:])
        run = Run(
            launcher=asked.launcher,
            num_nodes=len(names),
            node_rank=asked.node_rank,
            devices=asked.devices,
            host=asked.host or names[0],
            port=asked.port,
            address="",
            token=os.environ.get(TOKEN, ""),
            folder=Path(tempfile.gettempdir()) / f"megarl_{asked.job}",
            wait_s=asked.wait_s,
            on_gpus=platform_name() == "cuda",
            command=command,
        )
        values = {} if command[0] == DOCTOR else _values(command)
        run = replace(run, engine_nodes=_engine_nodes(run, values))
        if asked.dry_run:
            for rank, name in enumerate(names):
                print(as_text(replace(run, node_rank=rank, address=name), names))
            return 0
        adopt_orphans()
        return _run(run, values, names, Path(asked.logs).absolute())


def _run(run: Run, values: Mapping[str, Any], names: tuple[str, ...], logs: Path) -> int:
    run_dir = Path(str(values["trainer"]["run_dir"])).expanduser() if values else logs / "run"
    run_folder, paths = run_dir.absolute().parent, sorted(set(_paths(values)))
    probe = run_folder / f".megarl_{hashlib.sha256(run.token.encode()).hexdigest()[:12]}"
    run = replace(run, save_s=float(values["trainer"]["preempt_save_s"]) if values else 0.0)
    meeting = Meeting(run.host, run.port, run.token, names, run.wait_s)
    logs.mkdir(parents=True, exist_ok=True)

    def own(address: str) -> NodeFacts:
        # The first is where the nodes meet, which says so itself.
        return read_facts(run.node_rank, address, paths, probe, run.folder, range(run.port + 1, run.port + NUM_PORTS))

    def judge(nodes: Sequence[NodeFacts]) -> str:
        found = list(differences(nodes, run.devices, run_folder))
        if not found and len(nodes) > 1:
            print(report(nodes), flush=True)
        return "\n".join(found)

    with _removed_at_the_end(run.folder):
        if run.node_rank != 0:
            channel = answer_roll(meeting, own)
            here = replace(run, address=channel.connection.getsockname()[0])
            return _watched(other_node(programs_of(here), names[0], channel, logs), run.folder)
        here = replace(run, address=socket.gethostbyname(run.host))
        with _file(probe):
            facts, peers = own(here.address), []
            if len(names) > 1:
                peers = call_roll(meeting, open_meeting(meeting), facts, judge)
            elif wrong := judge([facts]):
                raise ResourceError(wrong)
        return _watched(first_node(programs_of(here), peers, logs), run.folder)


def _watched(watch: Watch, folder: Path) -> int:
    """Run a node's part to the end, and return its exit code."""
    code = watch.run()
    if watch.run_code:
        _keep_ray_logs(folder, watch.logs)
    return code


def _arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, tuple[str, ...], tuple[str, ...]]:
    """Return the flags, the names of the nodes by rank, and the command. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="python -m megarl.nodes", description=__doc__)
    parser.add_argument("--nodes", required=True, help="names of all nodes, with commas")
    parser.add_argument("--node-rank", type=int, default=int(os.environ.get("SLURM_NODEID", "0")))
    parser.add_argument("--devices", type=int, required=True, help="of each node")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="ray")
    parser.add_argument("--host", help="the first node's address, by which all others reach it; default its name")
    parser.add_argument("--port", type=int, default=20000, help=f"the first of {NUM_PORTS} that are this job's")
    parser.add_argument("--job", default="0", help="a name that no other job on these nodes has")
    parser.add_argument("--logs", default="logs", help="a folder on a file system that all nodes see")
    parser.add_argument("--wait-s", type=float, default=DEFAULT_START_S, help="for all nodes to be there")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started on every node")
    parser.add_argument("command", nargs="+", metavar="-- megarl.main_ppo ...")
    asked = parser.parse_args(arguments)
    names = tuple(asked.nodes.split(","))
    problems = []
    if asked.command[0] not in (DOCTOR, *(f"megarl.{program.name}" for program in PROGRAMS)):
        known = " or ".join(f"megarl.{program.name}" for program in PROGRAMS)
        problems.append(Problem("--", asked.command[0], f"must be {known}", "-- megarl.main_ppo ..."))
    if not 0 <= asked.node_rank < len(names):
        problems.append(Problem("--node-rank", asked.node_rank, f"must be from 0 to {len(names) - 1}"))
    if len(names) > 1 and not (asked.dry_run or os.environ.get(TOKEN)):
        problems.append(NO_TOKEN)
    lowest = _lowest_ephemeral_port()
    if not 1024 <= asked.port <= lowest - NUM_PORTS:
        allowed = f"must be from 1024 to {lowest - NUM_PORTS}: the kernel gives those from {lowest} to anybody"
        problems.append(Problem("--port", asked.port, allowed))
    if problems:
        raise ConfigError(problems)
    return asked, names, tuple(asked.command)


def _lowest_ephemeral_port() -> int:
    return int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.is_file() else 32768


def _values(command: Sequence[str]) -> dict[str, Any]:
    """Return the resolved config of a command."""
    program = next(program for program in PROGRAMS if command[0] == f"megarl.{program.name}")
    return compose(for_recipe(parse_command_line(command[1:], program.config_name), (program,))).values()


def _engine_nodes(run: Run, values: Mapping[str, Any]) -> int:
    """Return the number of nodes that have engines and no ranks, where Ray places neither; else 0.

    Raises ConfigError where nodes of either don't add up to those of the job.
    """
    if run.launcher == "ray" or run.num_nodes == 1 or run.command[0] != f"megarl.{PPO.name}":
        return 0
    config = build_config(PPOConfig, values)
    if not is_served(config):
        return 0
    trainer, engines = config.trainer.nnodes, config.actor_rollout_ref.rollout.nnodes
    if trainer + engines != run.num_nodes:
        allowed = f"must be the {run.num_nodes} nodes of the job: engines in processes of their own have nodes apart"
        fix = f"trainer.nnodes={max(run.num_nodes - engines, 1)}, or as many nodes, or MEGARL_LAUNCHER=ray"
        key = "trainer.nnodes + actor_rollout_ref.rollout.nnodes"
        raise ConfigError([Problem(key, f"{trainer} + {engines}", allowed, fix)])
    return engines


def _paths(values: Mapping[str, Any], within: str = "") -> Iterator[Path]:
    """Yield the paths of data files and models that a config names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, name)
        elif name in ("train_files", "val_files") or (name == "path" and within == "model"):
            texts = value if isinstance(value, list | tuple) else [value]
            yield from (Path(text).expanduser().absolute() for text in texts if isinstance(text, str))


@contextmanager
def _removed_at_the_end(folder: Path) -> Iterator[None]:
    """Remove a folder at the end of the block, where it is the user's."""
    try:
        yield
    finally:
        if folder.exists() and folder.lstat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _file(path: Path) -> Iterator[None]:
    """Have an empty file to the end of the block."""
    with refusals_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _keep_ray_logs(folder: Path, logs: Path) -> None:
    """Copy what Ray wrote on this node to the job's logs: of a run that failed, it may say why."""
    found, kept = folder / "ray" / "session_latest" / "logs", logs / f"{socket.gethostname()}_ray"
    if found.is_dir():
        try:
            shutil.copytree(found, kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        except OSError as error:
            why = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
            print(f"megarl.nodes: Ray's logs aren't all in {kept}: {why}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
