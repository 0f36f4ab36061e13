"""Whole runs on several nodes of a real Slurm: the same numbers as on one node, and after a loss as without it."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import REPOSITORY, Cluster
from tests.tiny_task import write_tiny_task

pytestmark = pytest.mark.long
TINY, QUICKSTART = "tests/cluster/tiny.sh", "launch/quickstart.sh"
RUN_S = 900.0
# Far above the rounding errors of gradients, which Adam would blow up where a gradient is next to zero.
EPS = "actor_rollout_ref.actor.optim.eps=1e-5"


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step, without what depends on the clock and on how often a run was started."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time_s", "wall_time"))} for line in lines if line["step"]
    ]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]], within: float = 1e-6) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=within, abs=within)


def folder_of(cluster: Cluster, name: str) -> Path:
    folder = cluster.folder / name
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def quickstart(cluster: Cluster) -> Path:
    """Return the folder of a quickstart on one node: data, warm start, two steps of GRPO."""
    folder = folder_of(cluster, "quickstart")
    job = cluster.run(folder, QUICKSTART, EPS, "trainer.total_training_steps=2", MEGARL_RUN="run", timeout_s=RUN_S)
    assert job.state == "COMPLETED", job.output
    return folder


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_quickstart_on_two_nodes_computes_what_it_does_on_one(
    cluster: Cluster, quickstart: Path, launcher: str
) -> None:
    """TP within nodes, PP across them. The warm start is there: its run has no step left."""
    folder = folder_of(cluster, f"quickstart_{launcher}")
    shutil.copytree(quickstart / "run_sft", folder / "run_sft", symlinks=True)
    flags = ("--nodes=2", "0", EPS, "trainer.total_training_steps=2")
    job = cluster.run(folder, QUICKSTART, *flags, MEGARL_RUN="run", MEGARL_LAUNCHER=launcher, timeout_s=RUN_S)
    assert job.state == "COMPLETED", job.output
    assert "tp groups: neighbours, within a node; pp groups: 2 ranks apart, across nodes" in job.output
    same(metrics(folder / "run"), metrics(quickstart / "run"))
    assert cluster.slurm.processes() == []


STEPS = ("trainer.total_training_steps=5", "trainer.save_freq=1", EPS)


@pytest.fixture(scope="module")
def clean(cluster: Cluster) -> list[dict[str, Any]]:
    """Return the metrics of a run of the tiny task on two nodes that nothing happened to."""
    folder = write_tiny_task(folder_of(cluster, "clean"))
    job = cluster.run(folder, TINY, "--nodes=2", *STEPS, MEGARL_RUN="run", MEGARL_LAUNCHER="torchrun", timeout_s=RUN_S)
    assert job.state == "COMPLETED", job.output
    return metrics(folder / "run")


def started(cluster: Cluster, name: str, launcher: str, *overrides: str, **environ: str) -> tuple[Path, str]:
    """Return the folder and the job of a run that has saved a step."""
    folder, own = write_tiny_task(folder_of(cluster, name)), {"MEGARL_RUN": "run", "MEGARL_LAUNCHER": launcher}
    number = cluster.submit(folder, TINY, "--nodes=2", *STEPS, *overrides, **own, **environ)
    deadline = time.monotonic() + RUN_S
    while not (folder / "run" / "checkpoints" / "step_1").is_dir():
        state = cluster.slurm.state(number)["JobState"]
        assert time.monotonic() < deadline and state in ("PENDING", "RUNNING"), state
        time.sleep(0.1)
    return folder, number


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_run_whose_node_loses_power_goes_on_elsewhere_to_the_same_numbers(
    cluster: Cluster, clean: list[dict[str, Any]], launcher: str
) -> None:
    folder, number = started(cluster, f"power_{launcher}", launcher)
    cluster.slurm.cut_power(2)
    job = cluster.slurm.wait(number, folder, RUN_S)
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.output
    assert re.search(rf"attempt 1 of job {number} on node[134] node[134]\n", job.output)
    assert "going on after step" in job.output
    same(metrics(folder / "run"), clean)
    cluster.slurm.boot(2)
    cluster.slurm.wait_for_nodes(4)


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_run_that_is_told_to_end_saves_and_goes_on_in_another_attempt(
    cluster: Cluster, clean: list[dict[str, Any]], launcher: str
) -> None:
    folder, number = started(cluster, f"told_{launcher}", launcher)
    cluster.slurm.on_login("scancel", "--signal=USR1", "--batch", number)
    job = cluster.slurm.wait(number, folder, RUN_S)
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.output
    assert "SIGUSR1: the run saves at the end of this step, and ends" in job.output
    assert f"job {number} is queued again" in job.output and "going on after step" in job.output
    same(metrics(folder / "run"), clean)
    assert cluster.slurm.processes() == []


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_engines_on_nodes_of_their_own_give_the_same(
    cluster: Cluster, clean: list[dict[str, Any]], launcher: str
) -> None:
    """Ranks on two nodes, an engine on each of two others, which see none of the ranks' processes."""
    folder, rollout = write_tiny_task(folder_of(cluster, f"engines_{launcher}")), "actor_rollout_ref.rollout"
    placed = (f"{rollout}.placement=server", f"{rollout}.nnodes=2", f"{rollout}.tensor_model_parallel_size=1")
    checked = (*placed, "trainer.nnodes=2", f"{rollout}.verify_publish=always")
    own = {"MEGARL_RUN": "run", "MEGARL_LAUNCHER": launcher}
    job = cluster.run(folder, TINY, "--nodes=4", *STEPS, *checked, timeout_s=RUN_S, **own)
    assert job.state == "COMPLETED", job.output
    assert "engines: 2 of TP 1, on 2 nodes" in job.output
    assert ("engines are on node3 (10.231.0.13), node4 (10.231.0.14)" in job.output) == (launcher == "torchrun")
    same(metrics(folder / "run"), clean, 1e-5)
    assert cluster.slurm.processes() == []


# Ranks on one node, an engine on another.
APART = ("actor_rollout_ref.rollout.placement=server", "trainer.nnodes=1", "trainer.n_gpus_per_node=2")


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_an_engine_on_another_node_that_is_killed_is_replaced_there(
    cluster: Cluster, clean: list[dict[str, Any]], launcher: str
) -> None:
    """It takes the weights that are on its node, and samples again what it hadn't finished."""
    folder = write_tiny_task(folder_of(cluster, f"killed_engine_{launcher}"))
    kill = {
        "PYTHONPATH": str(REPOSITORY / "tests" / "fault" / "kills"),
        "MEGARL_TEST_KILL": "1:megarl.rollout.vllm_stream:VllmStream.step:12:before",
        "MEGARL_TEST_STRUCK": str(folder / "struck"),
        "MEGARL_DEVICES": "2",
        "MEGARL_LAUNCHER": launcher,
    }
    job = cluster.run(folder, TINY, "--nodes=2", *STEPS, *APART, MEGARL_RUN="run", timeout_s=RUN_S, **kill)
    assert job.state == "COMPLETED", job.output
    assert ("on 1 node of their own, in 2 processes" in job.output) == (launcher == "torchrun")
    assert ("GiB, where Ray places engines on a node of ranks" in job.output) == (launcher == "ray")
    assert (folder / "struck").is_file() and "died of signal 9" in job.output
    same(metrics(folder / "run"), clean, 1e-5)
    assert cluster.slurm.processes() == []


def test_a_host_of_engines_that_dies_ends_the_job_with_its_name_and_nothing_is_left(cluster: Cluster) -> None:
    own = {"MEGARL_DEVICES": "2"}
    folder, number = started(cluster, "killed_host", "torchrun", *APART, **own)
    cluster.slurm.on_node(2, "pkill", "--signal", "KILL", "--full", "megarl.engine_host")
    job = cluster.slurm.wait(number, folder, 120)
    assert (job.state, job.restarts) == ("FAILED", 0), job.output
    assert "no engine is left to generate" in job.output and "the engine host on node2 is gone" in job.output
    assert "the host of engines was ended by signal 9 on node2" in job.output
    assert cluster.slurm.processes() == []


def test_235b_as_it_is_trains_a_step_with_a_tiny_model_on_four_nodes(cluster: Cluster) -> None:
    """Four stages, one on each node, with devices that are none. What the tiny model lacks is overridden."""
    folder = write_tiny_task(folder_of(cluster, "235b"))
    _with_layers(folder / "model" / "config.json", 4)
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    tiny = (
        *("actor_rollout_ref.model.path=model", "actor_rollout_ref.model.init=random"),
        *("actor_rollout_ref.model.dtype=float32", "reward.path=reward.py"),
        *("data.train_files=[train.parquet]", "data.val_files=[test.parquet]", "data.train_batch_size=8"),
        *("data.val_batch_size=8", "data.max_prompt_length=16", "data.max_response_length=6"),
        *(f"{actor}.megatron.tensor_model_parallel_size=1", f"{actor}.megatron.expert_model_parallel_size=1"),
        *(f"{actor}.megatron.expert_tensor_parallel_size=null", f"{actor}.megatron.grad_offload=false"),
        *(f"{actor}.megatron.optimizer_on_host=false", f"{actor}.lr_scheduler.warmup_steps=0"),
        *(f"{rollout}.tensor_model_parallel_size=1", "trainer.total_training_steps=1"),
    )
    sizes = {"MEGARL_DEVICES": "1", "SBATCH_GPUS_PER_NODE": "1"}
    job = cluster.run(folder, "launch/235b.sh", *tiny, MEGARL_RUN="run", timeout_s=RUN_S, **sizes)
    assert job.state == "COMPLETED", job.output
    assert "actor: PP 4 on 4 ranks, 1 a node" in job.output
    assert [line["step"] for line in metrics(folder / "run")] == [1]


def _with_layers(config: Path, number: int) -> None:
    values = json.loads(config.read_text())
    config.write_text(
        json.dumps({**values, "num_hidden_layers": number, "layer_types": None, "max_window_layers": number})
    )


def test_tasks_of_plain_srun_are_ranks_and_compute_the_same(cluster: Cluster, clean: list[dict[str, Any]]) -> None:
    folder = write_tiny_task(folder_of(cluster, "srun"))
    run = ("trainer.nnodes=2", "trainer.n_gpus_per_node=1", "trainer.run_dir=run", *STEPS)
    tasks = "srun --ntasks-per-node=1 python -m megarl.main_ppo --config-dir=. --config-name=rl"
    script = f"--wrap=MASTER_ADDR=node1 MASTER_PORT=29500 {tasks} {' '.join(run)}"
    flags = ("--nodes=2", "--job-name=srun", "--output=%x-%j.log")
    number = cluster.slurm.submit(folder, *flags, script, environ=cluster.environ())
    job = cluster.slurm.wait(number, folder, RUN_S)
    assert job.state == "COMPLETED", job.output
    same(metrics(folder / "run"), clean)


def test_engines_are_on_a_node_beside_tasks_of_plain_srun(cluster: Cluster, clean: list[dict[str, Any]]) -> None:
    folder = write_tiny_task(folder_of(cluster, "srun_engines"))
    run = (*APART, "trainer.run_dir=run", *STEPS)
    ranks = f"python -m megarl.main_ppo --config-dir=. --config-name=rl {' '.join(run)}"
    script = (
        "--wrap=export MEGARL_JOB_TOKEN=secret MEGARL_ENGINE_HOSTS=node1:29510 MASTER_ADDR=node1 MASTER_PORT=29500; "
        "srun --nodes=1 --ntasks=1 --nodelist=node2 python -m megarl.engine_host $MEGARL_ENGINE_HOSTS & "
        f"srun --nodes=1 --ntasks=2 --nodelist=node1 {ranks} && wait"
    )
    flags = ("--nodes=2", "--ntasks-per-node=2", "--job-name=srun", "--output=%x-%j.log")
    number = cluster.slurm.submit(folder, *flags, script, environ=cluster.environ())
    job = cluster.slurm.wait(number, folder, RUN_S)
    assert job.state == "COMPLETED", job.output
    assert "the run at node1:29510 has ended" in job.output
    same(metrics(folder / "run"), clean, 1e-5)
    assert cluster.slurm.processes() == []


@pytest.mark.parametrize(("node", "process", "service"), [(1, "gcs_server", "head"), (2, "raylet", "worker")])
def test_a_part_of_ray_that_dies_ends_the_job_with_its_name_and_nothing_is_left(
    cluster: Cluster, node: int, process: str, service: str
) -> None:
    folder, number = started(cluster, f"killed_{process}", "ray")
    cluster.slurm.on_node(node, "pkill", "--signal", "KILL", "--full", process)
    job = cluster.slurm.wait(number, folder, 120)
    assert (job.state, job.restarts) == ("FAILED", 0), job.output
    ended = rf"Ray's {service} (ended with exit code|was ended by signal) \d+ on node{node}; its output is in "
    assert re.search(ended, job.output), job.output
    assert cluster.slurm.processes() == []
    kept = {path.name for path in (folder / "run_logs" / "attempt_0").iterdir()}
    assert kept == {"node1_Rays_head.log", "node2_Rays_worker.log", "node1_ray", "node2_ray"}


def test_a_slurmd_that_is_started_again_leaves_the_run_alone(cluster: Cluster, clean: list[dict[str, Any]]) -> None:
    folder, number = started(cluster, "slurmd", "torchrun")
    for node in (1, 2):
        cluster.slurm.restart_slurmd(node)
    job = cluster.slurm.wait(number, folder, RUN_S)
    assert (job.state, job.restarts) == ("COMPLETED", 0), job.output
    same(metrics(folder / "run"), clean)
    assert cluster.slurm.processes() == []


def test_a_disk_that_is_full_ends_the_job_with_its_path_and_leaves_the_checkpoint_before_whole(
    cluster: Cluster,
) -> None:
    folder, run = write_tiny_task(folder_of(cluster, "full")), cluster.slurm.small / "run"
    job = cluster.run(folder, TINY, "--nodes=2", *STEPS, MEGARL_RUN=str(run), timeout_s=RUN_S)
    assert (job.state, job.restarts) == ("FAILED", 0), job.output
    assert re.search(rf"ResourceError: .*{run}/checkpoints/.* bytes free", job.output), job.output
    assert "Traceback" not in job.output and "is queued again" not in job.output
    verified = cluster.slurm.on_login(sys.executable, "-m", "megarl", "checkpoints", str(run), "--verify")
    assert verified.returncode == 0 and re.fullmatch(r"step +1 .* verified.*\n", verified.stdout), verified
    assert cluster.slurm.processes() == []
