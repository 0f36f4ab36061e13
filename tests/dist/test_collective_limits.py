"""A limit on collectives reaches every group that there is, whichever library made it."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.ranks.join import limit_collectives
from megarl.verify.pool import RankPool

NUM_RANKS, LIMIT_S = 2, 1.0


def _groups_that_give_up() -> list[str]:
    """Return the groups whose collective fails on rank 0, while rank 1 takes part in none."""
    parallel_state.initialize_model_parallel(NUM_RANKS)
    groups = {
        "the world": dist.group.WORLD,
        "torch": dist.new_group(range(NUM_RANKS)),
        "Megatron": parallel_state.get_tensor_model_parallel_group(),
    }
    dist.barrier()
    limit_collectives(LIMIT_S)
    if dist.get_rank() == 1:
        time.sleep((len(groups) + 2) * LIMIT_S)
        return []
    found = []
    for name, group in groups.items():
        with pytest.raises(RuntimeError, match=r"(?i)time.*out"):
            dist.all_reduce(torch.ones(1), group=group)
        found.append(name)
    return found


def test_a_rank_waits_in_no_group_for_longer_than_the_limit(ranks: RankPool) -> None:
    found, _ = ranks.run(_groups_that_give_up, world_size=NUM_RANKS, timeout_s=60.0)
    assert found == ["the world", "torch", "Megatron"]
