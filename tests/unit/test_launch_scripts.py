"""The launch scripts, as far as they go without Slurm: what they plan, what they would submit and start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (REPOSITORY / "launch").glob("*.sh") if "#SBATCH" in path.read_text())


def launched(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Return a script after its end, started outside of a job with ``environ`` alone of its variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MEGARL", "SBATCH"))}
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "MEGARL_PLATFORM": "cpu"}
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**clean, **own, **environ}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("experiment", [(), ("experiment=qwen3_235b_4x8",), ("+experiment=qwen3_235b_4x8",)])
def test_the_plan_of_235b_fits_devices_of_80_gb_and_nodes_of_1_tib_with_room(experiment: tuple[str, ...]) -> None:
    done = launched("235b.sh", "--plan", *experiment)
    assert done.returncode == 0, done.stderr
    assert "actor: TP 8 x PP 4 x EP 8 on 32 ranks, 8 a node" in done.stdout
    host = re.search(r"host memory a node: (\d+) GiB", done.stdout)
    room = re.search(r"fits: ([\d.]+) GiB are left", done.stdout)
    assert host and int(host[1]) < 0.92 * 1024 and room and float(room[1]) > 8


def test_a_bad_config_is_refused_before_anything_is_submitted() -> None:
    done = launched("235b.sh", "--submit", "actor_rollout_ref.actor.optim.lr=-1")
    assert done.returncode == 2 and "actor_rollout_ref.actor.optim.lr = -1" in done.stderr
    assert "sbatch" not in done.stderr


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_dry_run_prints_what_is_submitted_and_what_each_node_starts(launcher: str) -> None:
    done = launched(
        "235b.sh",
        "--dry-run",
        "trainer.total_training_steps=5",
        MEGARL_LAUNCHER=launcher,
        MEGARL_ACCOUNT="physics",
        MEGARL_PARTITION="h100",
        MEGARL_TIME="2:00:00",
        MEGARL_SBATCH="--qos=long --constraint=ib",
    )
    assert (done.returncode, done.stderr) == (0, "")
    submitted, start, *nodes = done.stdout.splitlines()
    assert submitted == (
        "submit: sbatch --nodes=4 --gpus-per-node=8 --account=physics --partition=h100 --time=2:00:00 "
        "--qos=long --constraint=ib launch/235b.sh trainer.total_training_steps=5"
    )
    assert start.startswith("on all nodes: srun --ntasks-per-node=1 --nodes=4 --ntasks=4 ")
    assert [line for line in nodes if line.startswith("on ")] == [f"on node{i}:" for i in range(4)]
    text = "\n".join(nodes)
    runs = re.findall(r"megarl\.main_ppo trainer\.nnodes=4 trainer\.n_gpus_per_node=8 .*steps=5", text)
    if launcher == "torchrun":
        assert re.findall(r"--node-rank=(\d) --master-addr=node0", text) == ["0", "1", "2", "3"]
        assert text.count("--nnodes=4") == text.count("--nproc-per-node=8") == len(runs) == 4
    else:
        assert len(runs) == text.count("start --head") == 1 and text.count("start --address=node0:") == 3
        assert text.count("RAY_AUTH_TOKEN=...") == 6  # two programs more on the first node
        assert "--include-dashboard=false" in text
        assert "--no-monitor" in text and "--ray-client-server-port=20009" in text  # else at ports of all jobs


SERVED = ("trainer.nnodes=4", "actor_rollout_ref.rollout.placement=server", "actor_rollout_ref.rollout.nnodes=2")


def test_under_torchrun_the_last_nodes_of_a_job_have_the_engines() -> None:
    done = launched("235b.sh", "--dry-run", *SERVED, MEGARL_NODES="6", MEGARL_LAUNCHER="torchrun")
    assert (done.returncode, done.stderr) == (0, "")
    _, *nodes = re.split(r"^on node\d:\n", done.stdout, flags=re.MULTILINE)
    for rank, text in enumerate(nodes[:4]):
        assert text.startswith("  MEGARL_ENGINE_HOSTS=node0:20002 MEGARL_START_S=300 ")
        assert f"--nnodes=4 --node-rank={rank} --master-addr=node0 --master-port=20001" in text
    for text in nodes[4:]:
        assert re.fullmatch(r"  MEGARL_START_S=1000000 \S+ -m megarl\.engine_host node0:20002\n", text)
    assert len(nodes) == 6


def test_nodes_of_ranks_and_of_engines_that_are_not_those_of_the_job_are_refused() -> None:
    done = launched("235b.sh", "--dry-run", *SERVED, MEGARL_NODES="5", MEGARL_LAUNCHER="torchrun")
    assert done.returncode == 2
    assert "trainer.nnodes + actor_rollout_ref.rollout.nnodes = '4 + 2': must be the 5 nodes of the job" in done.stderr
    assert "fix: trainer.nnodes=3, or as many nodes, or MEGARL_LAUNCHER=ray" in done.stderr


@pytest.mark.parametrize(
    ("nodes", "launcher", "told"),
    [("1", "torchrun", "||"), ("1", "ray", "||"), ("2", "torchrun", "|job|"), ("2", "ray", "job||")],
)
def test_the_plan_of_a_job_is_told_who_will_start_its_engines(
    tmp_path: Path, nodes: str, launcher: str, told: str
) -> None:
    asked = tmp_path / "python"
    asked.write_text('#!/usr/bin/env bash\necho "$RAY_ADDRESS|$MEGARL_ENGINE_HOSTS|$*"\n')
    asked.chmod(0o755)
    environ = {"MEGARL_NODES": nodes, "MEGARL_LAUNCHER": launcher, "MEGARL_PYTHON": str(asked)}
    assert launched("235b.sh", "--plan", **environ).stdout.startswith(f"{told}-m megarl.plan --device=H100 ")


def test_sizes_come_from_the_environment() -> None:
    done = launched("235b.sh", "--dry-run", MEGARL_NODES="2", MEGARL_DEVICES="4", MEGARL_LAUNCHER="torchrun")
    assert "sbatch --nodes=2 --gpus-per-node=4 launch/235b.sh" in done.stdout
    assert done.stdout.count("--nnodes=2") == 2 and "trainer.nnodes=2 trainer.n_gpus_per_node=4" in done.stdout


def test_the_nodes_of_a_dry_run_have_the_gpus_that_are_asked_for_where_this_machine_has_none() -> None:
    done = launched("235b.sh", "--dry-run", MEGARL_PLATFORM="")
    assert done.stdout.count("--num-gpus=8") == 4


def test_a_word_that_is_no_override_is_refused() -> None:
    done = launched("235b.sh", "--plan", "models/qwen3")
    assert (done.returncode, done.stderr) == (2, "launch: models/qwen3 is no override: KEY=VALUE\n")


@pytest.mark.parametrize(("nodes", "devices"), [("2", 2), ("4", 1), ("8", 1)])
def test_the_quickstart_has_at_least_four_ranks_on_any_number_of_nodes(nodes: str, devices: int) -> None:
    done = launched("quickstart.sh", "--dry-run", MEGARL_NODES=nodes)
    assert f"trainer.nnodes={nodes} trainer.n_gpus_per_node={devices}" in done.stdout


def test_several_nodes_without_slurm_are_refused_with_the_ways_out() -> None:
    done = launched("235b.sh")
    assert done.returncode == 2
    assert done.stderr == (
        "launch: 235b is for 4 nodes: bash launch/235b.sh --submit, or sbatch launch/235b.sh; MEGARL_NODES=1 is for "
        "this machine alone\n"
    )


@pytest.mark.parametrize(
    ("environ", "started"),
    [
        ({"MEGARL_CONTAINER": "pyxis"}, r"--container-image=image --container-mounts=\S+,/data:/data \S* ?.*python -m"),
        ({"MEGARL_CONTAINER": "apptainer"}, r"apptainer exec --nv --bind \S+,/data:/data --pwd \S+ image python -m"),
    ],
)
def test_a_container_is_started_by_what_the_site_has(environ: dict[str, str], started: str) -> None:
    done = launched("235b.sh", "--dry-run", MEGARL_IMAGE="image", MEGARL_MOUNTS="/data:/data", **environ)
    line = next(line for line in done.stdout.splitlines() if line.startswith("on all nodes"))
    assert re.search(started, line.replace("\\", "")), line


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"MEGARL_CONTAINER": "docker"}, "MEGARL_CONTAINER=docker must be none, pyxis or apptainer"),
        ({"MEGARL_CONTAINER": "pyxis"}, "MEGARL_CONTAINER=pyxis needs MEGARL_IMAGE, the image"),
    ],
)
def test_a_container_that_cannot_be_is_refused(environ: dict[str, str], said: str) -> None:
    done = launched("235b.sh", "--plan", **environ)
    assert (done.returncode, done.stderr) == (2, f"launch: {said}\n")


def test_on_this_machine_a_script_starts_its_parts_by_the_launcher_that_is_asked_for() -> None:
    done = launched("quickstart.sh", "--dry-run", "3", "trainer.test_freq=5", MEGARL_LAUNCHER="torchrun")
    prepared, sft, ppo = [line for line in done.stdout.splitlines() if line.startswith(("once", "here"))]
    assert prepared.endswith("-m megarl.data.prepare verbs --out quickstart_data --seed 3")
    assert "torch.distributed.run --standalone --nproc-per-node=4 -m megarl.main_sft" in sft
    assert "experiment=quickstart_sft trainer.seed=3" in sft and "test_freq" not in sft
    assert "-m megarl.main_ppo trainer.nnodes=1 trainer.n_gpus_per_node=4" in ppo and ppo.endswith(
        "trainer.test_freq=5"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_asks_slurm_for_what_it_says_to_the_trainer(script: str) -> None:
    text = (REPOSITORY / "launch" / script).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    told = re.search(r"^job (\S+) (\d+) (\S.*) \"\$@\"$", text, re.MULTILINE)
    assert told and asked["nodes"] == told[2]
    if "gpus-per-node" in asked:
        assert asked["gpus-per-node"] == told[3]
    assert {"requeue", "exclusive", "mem", "ntasks-per-node", "time", "output", "open-mode", "signal"} <= asked.keys()
