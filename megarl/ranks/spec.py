"""What a rank is told to start with, and how it starts: environment, then platform, then Megatron."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megarl.config.schema import PPOConfig, SFTConfig
from megarl.parallel.environment import apply_environment

if TYPE_CHECKING:
    from megarl.parallel.platform import Platform
    from megarl.ranks.worker import Worker


@dataclass(frozen=True)
class RunSpec:
    """A run as every rank needs to know it. Folders are resolved; optimizer steps end the learning-rate schedules.

    algorithm_file: the user's own losses, resolved.
    """

    config: PPOConfig | SFTConfig
    model_folder: str
    actor_optimizer_steps: int
    critic_folder: str | None = None
    critic_optimizer_steps: int = 0
    algorithm_file: str | None = None
    reward_model_folder: str | None = None


def join_ranks() -> Platform:
    """Prepare this process and join the other ranks. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set."""
    apply_environment()
    import torch
    import torch.distributed as dist

    from megarl.parallel.platform import install_platform

    platform = install_platform()
    platform.set_device(int(os.environ["LOCAL_RANK"]))
    if platform.name == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group(platform.backend)
    return platform


def start_worker(run: RunSpec, platform: Platform) -> Worker:
    """Build this rank's Worker, after ``join_ranks``."""
    from megarl.ranks.worker import Worker

    return Worker(run, platform)
