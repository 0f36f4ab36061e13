"""Who started a process, and what comes of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megarl.errors import ConfigError
from megarl.launchers.starter import (
    complete_local_rank,
    complete_world_of_srun,
    copies_of_command,
    grace_s,
    has_peers,
    is_torchrun,
    placed_rank,
    refusal,
)

WORLD = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
BATCH_SCRIPT = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TORCHRUN = {**WORLD, "TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "3"}


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, None),
        (TORCHRUN, 3),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, 0),
        (WORLD, 3),
        ({**WORLD, **SRUN}, 3),
        (SRUN, None),
        ({**WORLD, "RANK": "0", "WORLD_SIZE": "1"}, None),  # a container's own, where Ray is to place the ranks
        ({"RANK": "3", "WORLD_SIZE": "4"}, None),
    ],
)
def test_a_process_is_a_rank_where_all_that_a_rank_needs_is_said(environ: dict[str, str], rank: int | None) -> None:
    assert placed_rank(environ) == rank
    assert is_torchrun(environ) == ("TORCHELASTIC_RUN_ID" in environ)


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (SRUN, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "mpiexec"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "the launcher"),
    ],
)
def test_copies_of_a_command_that_are_no_ranks_are_refused_with_what_they_lack(
    environ: dict[str, str], launcher: str
) -> None:
    copies = copies_of_command(environ)
    assert copies is not None and copies.launcher == launcher
    error = str(refusal(copies, environ))
    assert f"{launcher} started {environ[copies.count]} processes of this command" in error
    assert "MASTER_ADDR, MASTER_PORT" in error and "torchrun" in error
    assert ("they lack RANK" in error) == ("RANK" not in environ)


@pytest.mark.parametrize(
    "environ", [{}, TORCHRUN, {**WORLD, **SRUN}, BATCH_SCRIPT, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}]
)
def test_a_rank_a_batch_script_and_a_step_of_one_task_are_no_copies(environ: dict[str, str]) -> None:
    assert copies_of_command(environ) is None


def test_tasks_of_srun_are_ranks_once_they_know_where_to_meet() -> None:
    environ = {**SRUN, **MEETING}
    complete_world_of_srun(environ)
    assert placed_rank(environ) == 1 and environ["WORLD_SIZE"] == "4" and copies_of_command(environ) is None


@pytest.mark.parametrize(
    "environ",
    [
        SRUN,
        BATCH_SCRIPT,
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"},
        TORCHRUN,
    ],
)
def test_tasks_that_do_not_know_where_to_meet_and_other_ranks_are_left_as_they_are(environ: dict[str, str]) -> None:
    after = dict(environ)
    complete_world_of_srun(after)
    assert after == environ


def test_the_local_rank_is_what_the_launcher_calls_it() -> None:
    for given, local in (({"LOCAL_RANK": "2"}, "2"), ({"SLURM_LOCALID": "1"}, "1")):
        environ = {**WORLD, **given}
        complete_local_rank(environ)
        assert environ["LOCAL_RANK"] == local
    with pytest.raises(ConfigError, match="LOCAL_RANK = None: rank 3 of 4 must know which device"):
        complete_local_rank(dict(WORLD))


@pytest.mark.parametrize("task", ["0", "1"])
@pytest.mark.parametrize("program", ["main_ppo", "main_sft"])
def test_under_srun_the_first_task_says_one_error_and_the_others_nothing(program: str, task: str) -> None:
    environ = {**os.environ, **SRUN, "SLURM_PROCID": task}
    command = [sys.executable, "-m", f"megarl.{program}"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ConfigError: 1 problem") if task == "0" else done.stderr == ""
    assert "Traceback" not in done.stderr


# In place of torchrun: two children, one of which asks while the other lives, is dead, and is forgotten.
AGENT = """
import os, subprocess, sys
def answer(call):
    code = f"from megarl.launchers.starter import grace_s, has_peers; print({call})"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()
if "peers" in sys.argv:
    peer = subprocess.Popen(["sleep", "60"])
    alive = answer("has_peers()")
    peer.kill()
    dead = answer("has_peers()")
    peer.wait()
    print(alive, dead, answer("has_peers()"))
else:
    print(answer("grace_s()"))
"""
RUN_BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}


def of_agent(*arguments: str, **environ: str) -> str:
    """Return what a child of torchrun, started with some arguments, says."""
    command = [sys.executable, "-c", AGENT, *arguments]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_rank_of_torchrun_sees_that_its_peers_live_or_that_one_has_died() -> None:
    assert of_agent("peers", **RUN_BY_TORCHRUN) == "True False False"


def test_where_torchrun_started_no_rank_there_is_none_to_die_and_no_grace() -> None:
    assert has_peers({}) and has_peers(WORLD)
    assert grace_s({}) is None and grace_s(WORLD) is None


@pytest.mark.parametrize(
    ("arguments", "environ", "seconds"),
    [
        ((), {}, "30.0"),
        (("--shutdown-timeout=90",), {}, "90.0"),
        (("--shutdown_timeout", "90", "script.py"), {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}, "90.0"),
        ((), {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}, "50.0"),
        ((), {"PET_SHUTDOWN_TIMEOUT": "40", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}, "40.0"),
    ],
)
def test_torchruns_patience_is_read_from_its_command_line_and_environment(
    arguments: tuple[str, ...], environ: dict[str, str], seconds: str
) -> None:
    assert of_agent(*arguments, **RUN_BY_TORCHRUN, **environ) == seconds
