"""A world of ranks that processes enter and leave, one after the other, without being started again."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import Store  # type: ignore[attr-defined] # torch doesn't list it

from megarl.parallel.platform import Platform


def enter_world(
    platform: Platform, rank: int, world_size: int, store: Store, timeout_s: float, local_rank: int
) -> None:
    """Join a fresh world of exactly ``world_size`` ranks.

    store: of this world alone, through which the ranks find each other. timeout_s: of each collective.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
    platform.set_device(local_rank)
    torch.manual_seed(0)  # what is drawn doesn't depend on the worlds before
    dist.init_process_group(
        platform.backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    # A rank that leaves while another is still connecting to it would leave that one waiting.
    dist.barrier()


def leave_world() -> None:
    """Leave nothing of the world behind, if there is one."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    # Models are cyclic garbage and hold their groups, whose threads would wake up a hundred times a second for good.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
