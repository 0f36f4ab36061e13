"""The pool of ranks that torchrun started: its seats are processes of their own here, each as if on another node."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megarl.errors import ResourceError, WorkerError
from megarl.ranks.meeting import listening, tcp_store
from megarl.verify.board import Board, Here
from megarl.verify.pool import RanksFailed
from megarl.verify.seat import Seat
from megarl.verify.torchrun_pool import TorchrunPool
from tests.dist.test_rank_pool import _die_on, _hang_on, _pid, _raise_on, _rank_and_sum
from tests.processes import CONTEXT

HOST = "127.0.0.1"
SEATS = (Here("0 first", "first", 0), Here("1 second", "second", 0))
LEAVE_S = 20.0


def _kill_seat(rank: int) -> None:
    """Kill the process that started that of a rank, for which the others wait."""
    seat = multiprocessing.parent_process()
    if dist.get_rank() == rank and seat is not None and seat.pid is not None:
        os.kill(seat.pid, signal.SIGKILL)
        time.sleep(60)
    dist.barrier()


def _sit(rank: int, port: int, folder: Path) -> None:
    """Be the seat of a rank, in a folder of its own."""
    os.environ.update(MEGARL_PLATFORM="cpu", CUDA_VISIBLE_DEVICES="")
    os.chdir(folder)
    board, heart = (Board(tcp_store(HOST, port)) for _ in range(2))
    Seat(rank, SEATS[rank], board, folder, lambda error: os._exit(1)).serve(heart)


@contextmanager
def _pool(folder: Path) -> Iterator[tuple[TorchrunPool, list[ForkServerProcess]]]:
    """Yield a pool of SEATS and their processes."""
    with listening(HOST) as listener:
        store = tcp_store(HOST, listener.getsockname()[1], listener)
    processes = []
    for rank in range(len(SEATS)):
        own = folder / str(rank)
        own.mkdir()
        processes.append(CONTEXT.Process(target=_sit, args=(rank, store.port, own)))
        processes[-1].start()
    try:
        yield TorchrunPool(Board(store), SEATS, with_engine=False), processes
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which each seat has a current folder of its own, named by its rank."""
    return tmp_path_factory.mktemp("seats")


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[TorchrunPool]:
    """Yield a pool that tests share."""
    with _pool(folder) as (pool, processes):
        yield pool
        pool.close()
        for process in processes:
            process.join(LEAVE_S)
        assert [process.exitcode for process in processes] == [0, 0]


def test_each_case_has_a_world_of_the_first_ranks_and_results_come_back_by_rank(pool: TorchrunPool) -> None:
    assert pool.run(_rank_and_sum, 10, world_size=2) == [(0, 2, 21.0), (1, 2, 21.0)]
    assert pool.run(_rank_and_sum, 10, world_size=1) == [(0, 1, 10.0)]
    assert pool.run(_rank_and_sum, 0, world_size=2) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_an_exception_is_told_of_once_and_the_ranks_survive_it(pool: TorchrunPool) -> None:
    before = pool.run(_pid, world_size=2)
    with pytest.raises(RanksFailed) as failure:
        pool.run(_raise_on, 1, world_size=2)
    assert str(failure.value).split("--- rank ")[1].startswith("1 Traceback")
    assert str(failure.value).count("ValueError: no more tea on rank 1\n") == 1
    assert pool.run(_pid, world_size=2) == before


def test_a_rank_that_hangs_says_where_and_the_next_case_has_new_ranks(pool: TorchrunPool) -> None:
    before = pool.run(_pid, world_size=2)
    with pytest.raises(RanksFailed) as failure:
        pool.run(_hang_on, 1, world_size=2, timeout_s=1)
    assert "--- rank 1 didn't finish; it is at" in str(failure.value) and "in _hang_on" in str(failure.value)
    assert not set(before) & set(pool.run(_pid, world_size=2))


def test_a_rank_that_dies_is_told_of_first_and_replaced(pool: TorchrunPool) -> None:
    with pytest.raises(RanksFailed) as failure:
        pool.run(_die_on, 1, world_size=2)
    assert str(failure.value).split("--- rank ")[1].startswith("1 died with exit code -9")
    assert pool.run(_rank_and_sum, 0, world_size=2) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_ranks_that_were_stopped_leave_no_process_and_start_again(pool: TorchrunPool) -> None:
    pids = pool.run(_pid, world_size=2)
    pool.stop()
    assert not any(map(psutil.pid_exists, pids))


def test_a_model_that_one_node_lacks_is_named_with_the_node(pool: TorchrunPool, folder: Path, tmp_path: Path) -> None:
    pool.check_folders(tmp_path, [tmp_path])
    (folder / "0" / "model").mkdir()
    with pytest.raises(
        ResourceError, match=r"^model isn't the same on second \(not there\) as on first \(0 files, .*\)"
    ):
        pool.check_folders(tmp_path, [Path("model")])


@pytest.mark.long
def test_a_scratch_folder_that_one_node_does_not_see_is_an_error_with_the_fix(
    pool: TorchrunPool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "0")
    Path("scratch").mkdir()
    with pytest.raises(ResourceError, match=r"^second doesn't see .* in scratch: .* --scratch=FOLDER"):
        pool.check_folders(Path("scratch"), [])


@pytest.mark.long
@pytest.mark.parametrize("is_idle", [False, True])
def test_a_seat_that_is_lost_ends_the_pool_with_its_name_and_all_that_it_started(tmp_path: Path, is_idle: bool) -> None:
    with _pool(tmp_path) as (pool, processes):
        pids = pool.run(_pid, world_size=2)
        if is_idle:
            processes[1].kill()
        with pytest.raises(WorkerError, match=r"rank 1 on second can't be reached in .*_kill_seat") as failure:
            pool.run(_kill_seat, 1, world_size=2)
        assert not isinstance(failure.value, RanksFailed)
        # The other rank, which waited for it in a collective, tells of that.
        assert is_idle or "--- rank 0 Traceback" in str(failure.value)
        pool.close()
        processes[0].join(LEAVE_S)
        assert processes[0].exitcode == 0
        deadline_s = time.monotonic() + LEAVE_S
        while any(map(psutil.pid_exists, pids)):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("nodes", "together"),
    [("aaaa", 4), ("aabb", 2), ("aaaabb", 2), ("abab", 1), ("aaabbb", 3), ("aaab", 1)],
)
def test_an_engine_may_have_as_many_ranks_as_consecutive_ones_share_a_node(nodes: str, together: int) -> None:
    with listening(HOST) as listener:
        store = tcp_store(HOST, listener.getsockname()[1], listener)
    seats = [Here(node, node, 0) for node in nodes]
    pool = TorchrunPool(Board(store), seats, with_engine=False)
    assert pool.ranks_together == together
    assert pool.num_nodes == len(set(nodes))
