"""How a process becomes a rank: environment, then platform, then Megatron."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megarl.parallel.environment import apply_environment
from megarl.ranks.spec import RankSpec

if TYPE_CHECKING:
    from megarl.parallel.platform import Platform
    from megarl.ranks.worker import Worker


def join_ranks() -> Platform:
    """Prepare this process and join the other ranks. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set."""
    apply_environment()
    import torch
    import torch.distributed as dist

    from megarl.parallel.platform import install_platform

    platform = install_platform()
    platform.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.backend)
    platform.agree_on_products()
    if platform.name == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return platform


def start_worker(spec: RankSpec, platform: Platform) -> Worker:
    """Return this rank's Worker, after ``join_ranks``."""
    from megarl.ranks.worker import Worker

    return Worker(spec, platform.device(int(os.environ["LOCAL_RANK"])))
