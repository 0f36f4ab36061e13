"""Jobs on a real Slurm of several nodes, without a payload: what is checked, started, said and left."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY, Cluster
from tests.tiny_task import write_tiny_task

SCRIPTS = sorted(path.name for path in (REPOSITORY / "launch").glob("*.sh") if "#SBATCH" in path.read_text())
TINY = "tests/cluster/tiny.sh"


@pytest.fixture(scope="module")
def task(cluster: Cluster) -> Path:
    """Return the folder of a tiny task, where all nodes see it."""
    folder = cluster.folder / "task"
    folder.mkdir()
    return write_tiny_task(folder)


def test_the_scripts_are_those_of_the_recipes() -> None:
    assert SCRIPTS == ["235b.sh", "gsm8k_tiny.sh", "quickstart.sh", "qwen2.5_7b_8.sh", "qwen3_30b_a3b_16.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_every_script_as_it_is(cluster: Cluster, script: str) -> None:
    done = cluster.slurm.on_login("sbatch", "--test-only", str(REPOSITORY / "launch" / script))
    assert done.returncode == 0 and re.search(r"Job \d+ to start at", done.stderr), done.stderr


def test_rays_nodes_come_up_for_the_controller_and_nothing_is_left(cluster: Cluster, task: Path) -> None:
    """The controller's command prints the config: it starts when the cluster is ready, and holds no rank."""
    job = cluster.run(task, TINY, "--nodes=2", "trainer.seed=7", "--cfg", "job", MEGARL_DEVICES="2", timeout_s=300)
    assert job.state == "COMPLETED", job.output
    assert "2 nodes: node1 (10.231.0.11), node2 (10.231.0.12); cpu, Python" in job.output
    assert job.output.count("seed: 7") == 2  # of the check before, and of the controller
    assert "nnodes: 2" in job.output and "n_gpus_per_node: 2" in job.output
    logs = task / "outputs" / f"tiny_{job.number}_logs" / "attempt_0"
    assert {path.name for path in logs.iterdir()} == {"node1_Rays_head.log", "node2_Rays_worker.log"}
    assert cluster.slurm.processes() == []
    for node in (1, 2):
        assert cluster.slurm.on_node(node, "sh", "-c", "ls -d /tmp/megarl* /dev/shm/*").stdout == ""


def test_a_bad_config_ends_a_job_before_any_node_is_started(cluster: Cluster, task: Path) -> None:
    job = cluster.run(task, "launch/235b.sh", "actor_rollout_ref.actor.optim.lr=-1", "trainer.total_epoch=3")
    assert job.state == "FAILED" and job.restarts == 0
    assert "actor_rollout_ref.actor.optim.lr = -1  (command line)" in job.output
    assert re.search(r"trainer\.total_epoch\b.*\n.*total_epochs", job.output)
    assert " nodes: " not in job.output


@pytest.mark.long
def test_a_node_that_does_not_see_the_run_folder_is_named(cluster: Cluster, task: Path) -> None:
    """The temporary folder of each node is its own."""
    job = cluster.run(task, TINY, "--nodes=2", MEGARL_RUNS="/tmp/nobody_elses", timeout_s=90)
    assert job.state == "FAILED"
    assert "node2 doesn't see what node1 writes in /tmp/nobody_elses" in job.output
    assert "fix: trainer.run_dir=FOLDER" in job.output
    assert cluster.slurm.processes() == []


@pytest.mark.long
def test_a_node_without_room_in_its_temporary_folder_is_named(cluster: Cluster, task: Path) -> None:
    local = cluster.folder / "local"
    local.mkdir()
    cluster.slurm.on_node(2, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(local))
    job = cluster.run(task, TINY, "--nodes=2", TMPDIR=str(local), timeout_s=90)
    cluster.slurm.on_node(2, "umount", str(local))
    assert job.state == "FAILED" and cluster.slurm.processes() == []
    said = f"{local}/megarl_{job.number}_0 can't be written: No space left on device on node2. fix: TMPDIR=FOLDER"
    assert said in job.output, job.output


@pytest.mark.long
def test_a_node_that_does_not_come_is_named_within_the_deadline(cluster: Cluster, task: Path) -> None:
    python = task / "python"
    python.write_text('#!/bin/sh\n[ "$(hostname)" = node2 ] && exit 0\nexec python "$@"\n')
    python.chmod(0o755)
    job = cluster.run(task, TINY, "--nodes=2", MEGARL_PYTHON=str(python), MEGARL_START_S="8", timeout_s=90)
    assert job.state == "FAILED"
    assert re.search(r"node2 didn't come to 10\.231\.0\.11:\d+ in 8 s; node1 did", job.output)


@pytest.mark.long
def test_the_doctor_looks_at_all_nodes_of_an_allocation_and_between_them(cluster: Cluster, task: Path) -> None:
    flags = ("--nodes=2", "--job-name=doctor", "--output=%x-%j.log", "--wrap=python -m megarl.doctor --nodes")
    number = cluster.slurm.submit(task, *flags, environ=cluster.environ())
    output = cluster.slurm.wait(number, task, 120).output
    assert "2 nodes: node1, node2\n" in output
    assert re.search(r"^ok    python +3\.11\.\d+", output, re.MULTILINE), output
    rate = re.search(r"^node1 -> node2: ([\d.]+) GB/s$", output, re.MULTILINE)
    assert rate and float(rate[1]) > 0
    assert not list(task.glob("megarl_doctor_*")) and cluster.slurm.processes() == []


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
@pytest.mark.parametrize(
    ("node", "port", "said"),
    [
        (1, 24000, "port 24000 of 10.231.0.11 can't be had: Address already in use. fix: MEGARL_PORT=PORT"),
        (1, 24001, "another program listens on node1 at what this job would: 24001. fix: MEGARL_PORT=PORT"),
        (2, 24003, "another program listens on node2 at what this job would: 24003. fix: MEGARL_PORT=PORT"),
    ],
)
def test_a_port_that_is_taken_is_named_with_its_node(
    cluster: Cluster, task: Path, launcher: str, node: int, port: int, said: str
) -> None:
    listen = f"import socket, time; s = socket.create_server(('', {port})); print(flush=True); time.sleep(600)"
    with cluster.slurm.started_on(node, sys.executable, "-c", listen) as other:
        assert other.stdout is not None and other.stdout.readline() == "\n"
        job = cluster.run(
            task, TINY, "--nodes=2", MEGARL_LAUNCHER=launcher, MEGARL_PORT="24000", MEGARL_START_S="20", timeout_s=90
        )
    assert job.state == "FAILED" and job.restarts == 0
    assert said in job.output, job.output
    assert cluster.slurm.processes() == []


@pytest.mark.long
def test_a_node_with_another_version_of_the_package_is_named(cluster: Cluster, task: Path) -> None:
    other = task / "other"
    shutil.copytree(REPOSITORY / "megarl", other / "megarl", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "megarl" / "types.py").open("a") as source:
        source.write("# changed\n")
    python = task / "python_of_each"
    python.write_text(f'#!/bin/sh\n[ "$(hostname)" = node2 ] && export PYTHONPATH={other}\nexec python "$@"\n')
    python.chmod(0o755)
    job = cluster.run(task, TINY, "--nodes=2", MEGARL_PYTHON=str(python), timeout_s=90)
    assert job.state == "FAILED" and job.restarts == 0
    found = re.search(
        r"megarl is (\S+ \(\w{8}\)) on node2 and (\S+ \(\w{8}\)) on node1\. fix: one environment", job.output
    )
    assert found and found[1] != found[2], job.output
    assert cluster.slurm.processes() == []
