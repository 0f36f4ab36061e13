"""The pool of ranks itself: what it returns, and how it reports ranks that fail, die or hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.verify.pool import RankPool, RanksFailed
from tests.dist.ranks import cpu_pool

AT_ONCE_S = 30  # on a busy machine; the timeout of a case is 120 s


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Yield a small pool to break, so that the shared one needn't be started again."""
    pool = cpu_pool(tmp_path_factory.mktemp("fragile"), size=2)
    yield pool
    pool.stop()


def _rank_and_sum(number: int) -> tuple[int, int, float]:
    total = torch.tensor(float(dist.get_rank() + number))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def _model_parallel_sizes(tp: int, pp: int) -> tuple[int, int, int]:
    parallel_state.initialize_model_parallel(tp, pp)
    group = parallel_state.get_tensor_model_parallel_group()
    dist.all_reduce(torch.ones(1), group=group)
    return (
        group.size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def _raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"no more tea on rank {rank}")
    dist.barrier()


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def _threads() -> tuple[int, str]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def _draw() -> float:
    return torch.rand(()).item()


def _pid() -> int:
    return os.getpid()


def test_results_come_back_by_rank(ranks: RankPool) -> None:
    assert ranks.run(_rank_and_sum, 10) == [(rank, 4, 46.0) for rank in range(4)]


def test_each_case_has_a_world_of_the_size_it_asks_for(ranks: RankPool) -> None:
    worlds = [ranks.run(_rank_and_sum, 0, world_size=size) for size in (2, 4, 1, 3)]
    assert worlds == [[(rank, n, n * (n - 1) / 2) for rank in range(n)] for n in (2, 4, 1, 3)]


def test_each_case_lays_out_its_ranks_anew(ranks: RankPool) -> None:
    assert ranks.run(_model_parallel_sizes, 2, 2) == [(2, 0, 1), (2, 0, 1), (2, 1, 1), (2, 1, 1)]
    assert ranks.run(_model_parallel_sizes, 1, 2) == [(1, 0, 2), (1, 0, 2), (1, 1, 2), (1, 1, 2)]
    assert ranks.run(_model_parallel_sizes, 2, 1, world_size=2) == [(2, 0, 1), (2, 0, 1)]


def test_the_same_processes_serve_case_after_case(ranks: RankPool) -> None:
    assert ranks.run(_pid) == ranks.run(_pid)


def test_a_rank_computes_on_one_thread(ranks: RankPool) -> None:
    assert set(ranks.run(_threads)) == {(1, "1")}


def test_random_draws_do_not_depend_on_earlier_cases(ranks: RankPool) -> None:
    assert ranks.run(_draw) == ranks.run(_draw)


def test_an_exception_on_one_rank_is_reported_first_while_the_others_wait_in_a_collective(ranks: RankPool) -> None:
    start_s = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        ranks.run(_raise_on, 2)
    assert time.monotonic() - start_s < AT_ONCE_S
    first = str(failure.value).split("--- rank ")[1]
    assert first.startswith("2 Traceback")
    assert "ValueError: no more tea on rank 2" in first


def test_the_ranks_survive_an_exception(ranks: RankPool) -> None:
    before = ranks.run(_pid)
    with pytest.raises(RanksFailed):
        ranks.run(_raise_on, 0)
    assert ranks.run(_pid) == before


def test_an_exception_that_no_other_rank_notices_fails_the_case(ranks: RankPool) -> None:
    with pytest.raises(RanksFailed, match=r"1 of 1 ranks failed in .*_raise_on"):
        ranks.run(_raise_on, 0, world_size=1)


def test_a_dead_rank_is_reported_at_once_and_first(fragile: RankPool) -> None:
    assert fragile.run(_rank_and_sum, 0, world_size=2) == [(0, 2, 1.0), (1, 2, 1.0)]
    start_s = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        fragile.run(_die_on, 1, world_size=2)
    assert time.monotonic() - start_s < AT_ONCE_S
    assert str(failure.value).split("--- rank ")[1].startswith("1 died with exit code -9")


def test_after_a_death_and_after_a_hang_the_next_case_has_new_ranks(fragile: RankPool) -> None:
    before = fragile.run(_pid, world_size=2)
    with pytest.raises(RanksFailed) as failure:
        fragile.run(_hang_on, 1, world_size=2, timeout_s=1)
    assert "--- rank 1 didn't finish; it is at" in str(failure.value)
    assert "in _hang_on" in str(failure.value)
    assert not set(before) & set(fragile.run(_pid, world_size=2))


def test_a_stopped_pool_leaves_no_process_behind(fragile: RankPool) -> None:
    pids = fragile.run(_pid, world_size=2)
    fragile.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
