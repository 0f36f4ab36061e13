"""``megarl.verify`` on two nodes of a real Slurm: the figures of one machine, and nodes that can't work together."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster
from tests.launch import python, run
from tests.tiny_task import write_tiny_task, write_weights

pytestmark = pytest.mark.long
SCRIPT = "tests/cluster/verify.sh"
LAYOUTS = ("one_rank", "tp2")
ASKED = ("verify", "--model=model", "--no-engine", f"--layouts={','.join(LAYOUTS)}")
JOB_S, LOST_S = 300.0, 120.0


@pytest.fixture(scope="module")
def task(cluster: Cluster) -> Path:
    """Return a folder with model/, which has weights, where all nodes see it."""
    folder = cluster.folder / "task"
    folder.mkdir()
    write_weights(write_tiny_task(folder) / "model")
    return folder


def _rows(page: Path) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith("| ")]


def test_two_nodes_find_the_figures_of_one_machine(cluster: Cluster, task: Path) -> None:
    job = cluster.run(task, SCRIPT, "--nodes=2", *ASKED, "--out=nodes.md", timeout_s=JOB_S)
    assert job.state == "COMPLETED", job.output
    alone = run(python("-m", "megarl", *ASKED, "--max-ranks=2", "--out=alone.md"), task)
    assert alone.code == 0, alone.output
    assert _rows(task / "nodes.md") == _rows(task / "alone.md")
    page = (task / "nodes.md").read_text()
    assert "torchrun --nnodes=2 --nproc-per-node=1 -m megarl.verify" in page and "On 2 nodes, the first with" in page
    assert cluster.slurm.processes() == []
    assert not list(task.glob("megarl_verify_*"))
    for node in (1, 2):
        assert cluster.slurm.on_node(node, "sh", "-c", "ls -d /tmp/megarl* /dev/shm/*").stdout == ""


def test_a_scratch_folder_that_one_node_does_not_see_ends_the_command_before_any_layout(
    cluster: Cluster, task: Path
) -> None:
    """The temporary folder of each node is its own."""
    job = cluster.run(task, SCRIPT, "--nodes=2", *ASKED, "--scratch=/tmp", timeout_s=JOB_S)
    assert job.state == "FAILED"
    found = re.findall(r"ResourceError: node2 doesn't see what node1 writes in /tmp/megarl_verify_\w+:", job.output)
    assert len(found) == 1 and "fix: start the command in a folder on one, or --scratch=FOLDER" in job.output
    assert "[  1/" not in job.output
    assert cluster.slurm.processes() == []


def test_a_node_without_power_ends_the_command_with_its_name(cluster: Cluster, task: Path) -> None:
    """Slurm is told to leave that to the command."""
    number = cluster.submit(task, SCRIPT, "--nodes=2", *ASKED, "--layouts=all", "--out=lost.md")
    log = task / f"verify.sh-{number}.log"

    def wait_for(said: str, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not (log.is_file() and re.search(said, log.read_text())):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)

    wait_for(r"\[  1/", JOB_S)
    cluster.slurm.cut_power(2)
    wait_for(r"WorkerError: rank 1 on node2 can't be reached in \S+examine", LOST_S)
    assert not list(task.glob("megarl_verify_*"))
    cluster.slurm.on_login("scancel", number)
    cluster.slurm.boot(2)
