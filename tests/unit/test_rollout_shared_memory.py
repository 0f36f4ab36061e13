"""The shared memory of vLLM's ranks on CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.errors import ResourceError
from megarl.rollout.shared_memory import check_room, job_name, remove_segments

MINE = "megarl_10.0.0.1_29500-tp:0-[2-3]-cpushm_1"
OTHERS = (
    "megarl_10.0.0.1_29500-tp:0-[2-3]-cpushm_0",  # of my peer, who may have just made it
    "megarl_10.0.0.1_29500-tp:0-[0-1]-cpushm_1",  # of another replica
    "megarl_10.0.0.1_29501-tp:0-[2-3]-cpushm_1",  # of another job
    "megarl_10x0.0.1_29500-tp:0-[2-3]-cpushm_1",
    "-tp:0-[2-3]-cpushm_1",  # of someone's vLLM
    "psm_1234",
)


def test_a_rank_removes_the_segments_it_made_and_no_others(tmp_path: Path) -> None:
    for name in (MINE, *OTHERS):
        (tmp_path / name).touch()
    removed = remove_segments("megarl_10.0.0.1_29500", [2, 3], 3, tmp_path)
    assert [path.name for path in removed] == [MINE]
    assert {path.name for path in tmp_path.iterdir()} == set(OTHERS)


def test_jobs_with_different_ports_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "fe80::1%eth/0")
    names = set()
    for port in ("29500", "29501"):
        monkeypatch.setenv("MASTER_PORT", port)
        names.add(job_name())
    assert names == {"megarl_fe80__1_eth_0_29500", "megarl_fe80__1_eth_0_29501"}


def test_too_little_shared_memory_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ResourceError, match=r"has \d+ MiB left, but 1000000 vLLM ranks of 8 threads need 32500000 MiB"):
        check_room(num_ranks=1_000_000, num_threads=8)
    check_room(num_ranks=1, num_threads=1)
