"""From a checked config to a running group of ranks, and back to nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megarl.config.schema import PPOConfig, SFTConfig, SFTTrainerConfig
from megarl.errors import ConfigError, Problem
from megarl.launchers.group import WorkerGroup
from megarl.parallel.environment import apply_environment
from megarl.ranks.spec import RankSpec
from megarl.roles import num_ranks


def serve_if_not_controller() -> bool:
    """Serve until the run ends, if torchrun made this process a rank other than 0; return whether it was one."""
    if not _torchrun_rank():
        return False
    apply_environment()
    from megarl.launchers.torchrun_group import serve

    serve()
    end_rank()
    return True


def end_rank() -> None:
    """End a process that torchrun started, whose run went well; return in any other.

    Python's own end would run the destructors of gloo's threads, which now and then abort a process that has done all.
    """
    if _torchrun_rank() is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def dismiss_ranks() -> None:
    """Let the ranks go that wait for a run under torchrun: there is none."""
    if _torchrun_rank() is not None:
        from megarl.launchers.torchrun_group import TorchrunGroup

        TorchrunGroup.joined(None)


@contextmanager
def worker_group(spec: RankSpec, trainer: SFTTrainerConfig) -> Iterator[WorkerGroup]:
    """Start all ranks of a run, under torchrun or on Ray, and end them afterwards."""
    group: WorkerGroup
    if _torchrun_rank() is not None:
        from megarl.launchers.torchrun_group import TorchrunGroup

        joined = TorchrunGroup.joined(spec)
        assert joined is not None
        group = joined
    else:
        from megarl.launchers.ray_group import RayGroup

        group = RayGroup(
            spec, nnodes=trainer.nnodes, ranks_per_node=trainer.n_gpus_per_node, dashboard=trainer.ray_dashboard
        )
    try:
        yield group
    except BaseException:
        group.abort()
        raise
    group.shutdown()


def check_world_size(config: PPOConfig | SFTConfig) -> None:
    """Raise ConfigError where torchrun started another number of ranks than the config names."""
    if _torchrun_rank() is None:
        return
    started, named = int(os.environ["WORLD_SIZE"]), num_ranks(config)
    if started != named:
        allowed = f"torchrun started {started} ranks, the config says {named}"
        fix = f"torchrun --nproc-per-node={config.trainer.n_gpus_per_node}, or change trainer.n_gpus_per_node"
        raise ConfigError([Problem("trainer.nnodes x trainer.n_gpus_per_node", named, allowed, fix)])


def _torchrun_rank() -> int | None:
    """Return this process's rank if torchrun started it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None
