"""How a process becomes a rank: environment, then platform, then Megatron."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megarl.parallel.environment import apply_environment, products_name
from megarl.ranks.spec import RankSpec

if TYPE_CHECKING:
    from megarl.parallel.platform import Platform
    from megarl.ranks.worker import Worker


def join_ranks() -> Platform:
    """Prepare this process and join the other ranks. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set."""
    apply_environment()
    import torch
    import torch.distributed as dist

    from megarl.parallel.cpu.products import use_products
    from megarl.parallel.platform import install_platform

    platform = install_platform()
    platform.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.backend)
    if platform.name == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        # torchrun asks the processor of each host, which may differ: all ranks do as the first one.
        products = [products_name()]
        dist.broadcast_object_list(products)
        use_products(products[0])
    return platform


def start_worker(spec: RankSpec, platform: Platform) -> Worker:
    """Return this rank's Worker, after ``join_ranks``."""
    from megarl.ranks.worker import Worker

    return Worker(spec, platform.device(int(os.environ["LOCAL_RANK"])))
