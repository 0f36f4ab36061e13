"""Who started this process: nobody in particular, then Ray places the ranks; or something that started one a rank."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megarl.errors import ConfigError, Problem

_WORLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


@dataclass(frozen=True)
class Copies:
    """The processes that a launcher starts of one command. count, index: the variables that number them."""

    launcher: str
    count: str
    index: str


# A batch script has SLURM_NTASKS as well, but only srun counts the tasks of a step.
_COPIES = (
    Copies("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    Copies("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    Copies("mpiexec", "PMI_SIZE", "PMI_RANK"),
    Copies("the launcher", "WORLD_SIZE", "RANK"),
)


def is_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in environ


def placed_rank(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the rank that this process was started as, None where Ray is to place the ranks.

    torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and so do others that start one process a rank. A world
    of one may be what a container was started with: only torchrun means it.
    """
    is_one_of_many = all(name in environ for name in _WORLD) and environ["WORLD_SIZE"] != "1"
    return int(environ["RANK"]) if is_torchrun(environ) or is_one_of_many else None


def complete_world_of_srun(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK and WORLD_SIZE of a task of srun, where MASTER_ADDR and MASTER_PORT say that tasks are ranks."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "MASTER_ADDR" in environ and "MASTER_PORT" in environ and "RANK" not in environ:
        environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], tasks


def complete_local_rank(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set LOCAL_RANK of a placed rank from what its launcher calls it. Raises ConfigError where it has no such name."""
    found = next((environ[name] for name in _LOCAL_RANKS if name in environ), None)
    if found is None:
        why = f"rank {environ['RANK']} of {environ['WORLD_SIZE']} must know which device of its node is its own"
        raise ConfigError([Problem("LOCAL_RANK", None, why, "export LOCAL_RANK, counted from 0 on each node")])
    environ["LOCAL_RANK"] = found


def copies_of_command(environ: Mapping[str, str] = os.environ) -> Copies | None:
    """Return the copies that this process is one of, though none was started as a rank; None where it is alone."""
    if placed_rank(environ) is not None:
        return None
    return next((copies for copies in _COPIES if environ.get(copies.count, "1") not in ("", "0", "1")), None)


def refusal(copies: Copies, environ: Mapping[str, str] = os.environ) -> ConfigError:
    """Return the error of a command that was started in copies, each of which would be a run of its own."""
    count, lacking = environ[copies.count], [name for name in _WORLD if name not in environ]
    why = (
        f"{copies.launcher} started {count} processes of this command, and each would be a run of its own: "
        f"to be one rank each they lack {', '.join(lacking)}"
    )
    fix = (
        "start torchrun once a node (srun --ntasks-per-node=1 torchrun --nnodes=... -m megarl...), or the command once "
        f"for Ray (srun --ntasks=1), or set {', '.join(_WORLD)} and LOCAL_RANK in every process; under srun "
        "MASTER_ADDR and MASTER_PORT, the first node's and a free port there, are enough"
    )
    return ConfigError([Problem(copies.count, count, why, fix)])


def has_peers(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether all ranks that torchrun started on this node live; True where it started none.

    torchrun sends SIGTERM to its ranks where it got one, and where one of them has ended.
    """
    if not is_torchrun(environ):
        return True
    import psutil

    try:
        states = [child.status() for child in psutil.Process(os.getppid()).children()]
    except psutil.NoSuchProcess:
        return False
    num_alive: int = len(states) - states.count(psutil.STATUS_ZOMBIE)
    return num_alive >= int(environ["LOCAL_WORLD_SIZE"])


def grace_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds after which torchrun kills the ranks that it sent a signal to, None where it started none."""
    if not is_torchrun(environ):
        return None
    import psutil

    given = environ.get("PET_SHUTDOWN_TIMEOUT", environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    words = [word for part in psutil.Process(os.getppid()).cmdline() for word in part.split("=", 1)]
    for name, value in itertools.pairwise(words):
        if name in ("--shutdown-timeout", "--shutdown_timeout"):
            given = value
    return float(given)
