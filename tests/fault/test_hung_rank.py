"""A rank hangs, or does other than its peers: the run ends within trainer.hang_timeout_s and says who stood where."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import Finished, left_in, python, run, shared_memory, torchrun
from tests.tiny_task import NUM_RANKS

FAULTS = Path(__file__).parent / "faults"
SFT = ("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft", "trainer.hang_timeout_s=15")
COMMANDS = {"ray": python(*SFT), "torchrun": torchrun(NUM_RANKS, *SFT)}
SUMS_OVER_TP = (
    *("megatron.pipeline_model_parallel_size=1", "megatron.tensor_model_parallel_size=2"),
    "megatron.sequence_parallel=false",
)
STOP_S = 15.0 + 60.0  # of which torchrun waits for 30 where it can't end a rank that has stopped
LAUNCHERS = pytest.mark.parametrize("launcher", ["ray", "torchrun"])


@dataclass(frozen=True)
class Hung:
    """A run with a fault. stop_s: from that to its end. left: what stayed in its temporary folder and in /dev/shm."""

    finished: Finished
    stop_s: float
    left: set[str]


def hung(tiny_task: Path, launcher: str, fault: str, *overrides: str) -> Hung:
    """Run with a fault, as faults/sitecustomize.py describes it."""
    name = f"{launcher}.{fault}"
    struck, before = tiny_task / f"struck.{name}", shared_memory()
    with tempfile.TemporaryDirectory(dir="/tmp") as temp:  # short, for Ray's sockets
        environ = {"MEGARL_TEST_FAULT": fault, "MEGARL_TEST_STRUCK": str(struck), "TMPDIR": temp}
        command = [*COMMANDS[launcher], f"trainer.run_dir=runs/{name}", *overrides]
        finished = run(command, tiny_task, python_path=FAULTS, environ=environ)
        left = left_in(Path(temp)) - before
    assert struck.is_file(), finished.output
    return Hung(finished, finished.ended_s - float(struck.read_text()), left)


def check_end(found: Hung) -> None:
    """Check that a run failed in time and left nothing, but for Ray's logs."""
    assert found.finished.code == 1, found.finished.output
    assert found.stop_s < STOP_S
    assert found.finished.processes == ()
    assert not {name for name in found.left if not name.startswith("megarl_")}


@pytest.mark.long
@LAUNCHERS
def test_a_rank_that_is_stopped_is_named_with_its_step_and_where_the_others_stand(
    tiny_task: Path, launcher: str
) -> None:
    found = hung(tiny_task, launcher, "stop:1:update:2")
    check_end(found)
    said = found.finished.stderr
    first = "WorkerError: step 2, update_actor: the ranks haven't done update within 15 s (trainer.hang_timeout_s)"
    assert first in said
    silent, stack = said.index("--- rank 1 doesn't answer: process"), said.index("--- rank 0: ")
    assert said.index(first) < silent < stack
    assert re.search(r"process \d+ on \S+ is stopped", said)
    assert re.search(r"--- rank 0: \d+ s in update\n(.*\n)+? +File \".*/megarl/train/", said[stack:])


@pytest.mark.long
@LAUNCHERS
def test_a_rank_that_leaves_a_call_out_is_told_apart_from_those_that_wait_for_it(
    tiny_task: Path, launcher: str
) -> None:
    found = hung(tiny_task, launcher, "skip:1:update:2")
    check_end(found)
    assert "step 2, update_actor: the ranks haven't done update within 15 s" in found.finished.stderr
    assert re.search(r"--- rank 0: \d+ s in update", found.finished.stderr)
    assert re.search(r"--- rank 1: \d+ s in (update|a wait for the next call)", found.finished.stderr)


@pytest.mark.long
@LAUNCHERS
def test_ranks_whose_shapes_differ_end_the_run_with_what_gloo_says_and_a_stack(tiny_task: Path, launcher: str) -> None:
    found = hung(tiny_task, launcher, "shape:1:update:2", *SUMS_OVER_TP)
    check_end(found)
    cause = {"ray": r"WorkerError: rank \d died in step 2, update_actor: ", "torchrun": r"Signal 6 \(SIGABRT\)"}[
        launcher
    ]
    assert re.search(cause, found.finished.stderr)
    assert "gloo" in found.finished.output
    assert re.search(r'File ".*/megarl/train/.*", line \d+ in step', found.finished.output)


@pytest.mark.long
def test_ranks_end_by_themselves_where_the_controller_has_stopped(tiny_task: Path) -> None:
    found = hung(tiny_task, "torchrun", "stop:0:update:2")
    check_end(found)
    assert "WorkerError: the controller doesn't answer: nothing is heard of it for 15 s" in found.finished.stderr
    assert re.search(r"--- rank 1: \d+ s in update", found.finished.stderr)
