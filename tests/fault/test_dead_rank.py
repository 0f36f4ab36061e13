"""One of two ranks is killed, or fails, in the middle of a step: the run ends at once, with the cause, and whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.launch import Finished, python, run, shared_memory, torchrun
from tests.tiny_task import NUM_RANKS

FAULTS = Path(__file__).parent / "faults"
STOP_S = 30.0  # 6 on Ray and 2 under torchrun where nothing else runs
SFT = ("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft")
RL = (
    *("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", "trainer.val_before_train=false"),
    *("data.train_shuffle=false", "reward.path=bad_reward.py", "reward.num_workers=2", "reward.timeout_s=3"),
    *("reward.score_on_failure=-0.5", "reward.try_first=false"),
)
# Of the first eight prompts, one each whose reward raises, is not a number, and never comes.
BAD_REWARD = """
import time

def compute_score(data_source, solution_str, ground_truth, extra_info):
    index = extra_info["index"]
    if index == 0:
        raise KeyError("broken by the test")
    if index == 1:
        return float("nan")
    if index == 2:
        time.sleep(3600)
    return 1.0
"""


@dataclass(frozen=True)
class Struck:
    """A run in which a fault struck. stop_s: from then to its end. left: shared memory that stayed."""

    finished: Finished
    folder: Path
    stop_s: float
    left: set[str]


def strike(tiny_task: Path, command: list[str], name: str, fault: str) -> Struck:
    """Run ``command`` with a fault, as faults/sitecustomize.py describes it."""
    (tiny_task / "bad_reward.py").write_text(BAD_REWARD)
    struck, folder = tiny_task / f"struck.{name}", tiny_task / "runs" / name
    environ = {"MEGARL_TEST_FAULT": fault, "MEGARL_TEST_STRUCK": str(struck)}
    before = shared_memory()
    finished = run([*command, f"trainer.run_dir=runs/{name}"], tiny_task, python_path=FAULTS, environ=environ)
    assert struck.is_file(), finished.output
    return Struck(finished, folder, finished.ended_s - float(struck.read_text()), shared_memory() - before)


@pytest.fixture(scope="module")
def killed(tiny_task: Path) -> Callable[[str], Struck]:
    """Return what kills rank 1 in the second step of an RL run under a launcher, or an SFT run on Ray, once each."""
    commands = {"ray": python(*RL), "torchrun": torchrun(NUM_RANKS, *RL), "sft": python(*SFT)}
    return cache(lambda name: strike(tiny_task, commands[name], f"killed_{name}", "kill:1:update:2"))


@pytest.fixture(scope="module")
def failed(tiny_task: Path) -> Callable[[str, int], Struck]:
    """Return what lets a rank fail in the second step of an SFT run, once each."""
    commands = {"ray": python(*SFT), "torchrun": torchrun(NUM_RANKS, *SFT)}
    commands["torchrun_controller"] = commands["torchrun"]
    return cache(lambda name, rank: strike(tiny_task, commands[name], f"failed_{name}", f"raise:{rank}:update:2"))


LONG = [pytest.param(launcher, marks=pytest.mark.long) for launcher in ("ray", "torchrun")]
KILLED = pytest.mark.parametrize("name", ["sft", *LONG])
OF_TORCHRUN = pytest.param("torchrun", 1), pytest.param("torchrun_controller", 0, marks=pytest.mark.long)
FAILED = pytest.mark.parametrize(("name", "rank"), [pytest.param("ray", 1, marks=pytest.mark.long), *OF_TORCHRUN])


@KILLED
def test_the_death_of_a_rank_ends_the_run_at_once(killed: Callable[[str], Struck], name: str) -> None:
    assert killed(name).finished.code == 1
    assert killed(name).stop_s < STOP_S


@KILLED
def test_nothing_is_left_after_the_death_of_a_rank(killed: Callable[[str], Struck], name: str) -> None:
    assert (killed(name).finished.processes, killed(name).left) == ((), set())


@pytest.mark.parametrize("name", ["sft", LONG[0]])
def test_ray_names_the_dead_rank_and_how_it_died(killed: Callable[[str], Struck], name: str) -> None:
    error = killed(name).finished.stderr
    assert error.startswith("WorkerError: rank 1 died in step 2, update_actor: ")
    assert "its worker process has died" in error
    assert "Traceback" not in error, "its peers' tracebacks only follow from the death"


@pytest.mark.long
def test_torchrun_names_the_dead_rank_and_how_it_died(killed: Callable[[str], Struck]) -> None:
    _, cause = killed("torchrun").finished.stderr.split("Root Cause")
    assert "rank      : 1 " in cause
    assert "Signal 9 (SIGKILL)" in cause


@pytest.mark.long  # tests/unit has each of these each time
@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_rewards_that_raise_hang_or_are_no_number_are_counted_and_the_run_goes_on(
    killed: Callable[[str], Struck], launcher: str
) -> None:
    *_before_training, step_1 = (killed(launcher).folder / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(step_1)
    outcomes = {name: metrics[f"reward/num_{name}"] for name in ("raised", "invalid", "timeout")}
    assert outcomes == {"raised": 4, "invalid": 4, "timeout": 4}
    assert metrics["reward/min"] == -0.5
    assert metrics["reward/mean"] == pytest.approx((20 * 1.0 - 12 * 0.5) / 32)


@FAILED
def test_a_failure_on_a_rank_ends_the_run_at_once(failed: Callable[[str, int], Struck], name: str, rank: int) -> None:
    assert failed(name, rank).finished.code == 1
    assert failed(name, rank).stop_s < STOP_S
    assert failed(name, rank).finished.processes == ()


@FAILED
def test_the_first_traceback_is_that_of_the_rank_that_failed(
    failed: Callable[[str, int], Struck], name: str, rank: int
) -> None:
    error = failed(name, rank).finished.stderr
    before, traceback = error.split("Traceback (most recent call last):\n", 1)
    assert before.splitlines()[-1].endswith(f"rank {rank} failed in update:")
    assert "ArithmeticError: broken by the test" in traceback


@pytest.mark.parametrize(("name", "rank"), OF_TORCHRUN)
def test_torchruns_report_at_the_end_repeats_the_cause(
    failed: Callable[[str, int], Struck], name: str, rank: int
) -> None:
    _, cause = failed(name, rank).finished.stderr.split("Root Cause")
    assert f"rank      : {rank} " in cause
    assert "ArithmeticError: broken by the test" in cause


@pytest.mark.long
def test_a_rank_that_ray_ends_for_memory_is_an_error_with_our_way_out(tiny_task: Path) -> None:
    environ = {"RAY_memory_usage_threshold": "0.01"}  # far below what the machine holds already
    finished = run([*python(*SFT), "trainer.run_dir=runs/memory"], tiny_task, environ=environ)
    assert finished.code == 1
    assert re.search(r"ResourceError: rank \d was ended since its node runs low on memory", finished.stderr)
    assert "ppo_micro_batch_size_per_gpu" in finished.stderr
    assert "RAY_" not in finished.stderr.partition("ResourceError")[2], "its threshold is nothing to move"
