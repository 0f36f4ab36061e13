"""A limit on collectives reaches every group that there is, whichever library made it."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.parallel.groups import ParallelGroups
from megarl.parallel.layout import Layout
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


def _limits_of_a_role_s() -> tuple[float, float]:
    """Return the limits of the world and of a role's tensor-parallel group, which is made after the world's is set."""
    limit_collectives(7200.0)
    groups = ParallelGroups(Layout(world_size=NUM_RANKS, tp=NUM_RANKS))
    with groups.active():
        group = parallel_state.get_tensor_model_parallel_group()
    limits = [g._get_backend(torch.device("cpu")).options._timeout for g in (dist.group.WORLD, group)]
    return limits[0].total_seconds(), limits[1].total_seconds()


def test_groups_of_a_role_may_wait_as_long_as_the_world_while_weights_are_loaded(ranks: RankPool) -> None:
    assert ranks.run(_limits_of_a_role_s, world_size=NUM_RANKS, timeout_s=60.0) == [(7200.0, 7200.0)] * NUM_RANKS
