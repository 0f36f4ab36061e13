"""Runs whose engines are on another node without Ray: a space of processes apart, which sees no memory of the ranks.

They compute what a run does whose engines are beside its ranks, and what is killed ends with what it belongs to.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.launch import Finished, python, run, shared_memory, torchrun
from tests.run_folder import close_to, lines_of
from tests.sglang_environment import SGLANG, needs_sglang
from tests.tiny_task import NUM_RANKS

ROLLOUT = "actor_rollout_ref.rollout"
COMMAND = (
    *("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", "trainer.val_before_train=false"),
    # Far above the rounding errors of gradients, which Adam would blow up where a gradient is next to zero.
    *("actor_rollout_ref.actor.optim.eps=1e-5", f"{ROLLOUT}.placement=server", f"{ROLLOUT}.verify_publish=always"),
    *(f"{ROLLOUT}.tensor_model_parallel_size=1", f"{ROLLOUT}.n_gpus_per_node=2"),
)
KILLS = Path(__file__).parents[1] / "fault" / "kills"
NODE = ("unshare", "--user", "--map-root-user", "--pid", "--mount-proc", "--fork", "--kill-child")
WAIT_S = 120.0


def _can_start_nodes() -> bool:
    return subprocess.run([*NODE, "true"], capture_output=True, check=False).returncode == 0


IS_THERE = shutil.which(NODE[0]) is not None and _can_start_nodes()

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not IS_THERE, reason="this machine gives no process a space of processes of its own"),
]


class Nodes:
    """A task, the run that it is given to, and hosts of its engines."""

    def __init__(self, task: Path) -> None:
        self.task = task
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.place = f"127.0.0.1:{probe.getsockname()[1]}"
        self.environ = {
            "MEGARL_PLATFORM": "cpu",
            "OMP_NUM_THREADS": "1",
            "MEGARL_JOB_TOKEN": "the token of this job",
            "MEGARL_START_S": str(WAIT_S),
            "MEGARL_ENGINE_HOSTS": self.place,
        }

    @contextmanager
    def host(self, *, apart: bool = True, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
        """Have a host, ``apart`` in a space of processes that ends with it. environ: added to its variables."""
        command = [*(NODE if apart else ()), sys.executable, "-m", "megarl.engine_host", self.place]
        host = subprocess.Popen(command, cwd=self.task, env={**os.environ, **self.environ, **environ})
        try:
            yield host
        finally:
            host.kill()
            host.wait()

    def go(self, name: str, *overrides: str, launcher: str = "torchrun") -> Finished:
        """Return a run after its end, which left nothing behind."""
        before, arguments = shared_memory(), (*COMMAND, f"trainer.run_dir=runs/{name}", *overrides)
        command = torchrun(NUM_RANKS, *arguments) if launcher == "torchrun" else python(*arguments)
        finished = run(command, self.task, environ=self.environ)
        assert (finished.processes, shared_memory() - before) == ((), set()), finished.output
        return finished

    def start_long(self, name: str, *overrides: str, stderr: int) -> subprocess.Popen[str]:
        """Start a run that goes on for longer than its test."""
        arguments = (*COMMAND, f"trainer.run_dir=runs/{name}", "trainer.total_training_steps=200", *overrides)
        environ = {**os.environ, **self.environ}
        command = torchrun(NUM_RANKS, *arguments)
        return subprocess.Popen(command, cwd=self.task, env=environ, stderr=stderr, text=True)


@pytest.fixture(scope="module")
def beside(tiny_task: Path) -> Path:
    """Return the folder of a run whose engines are beside the ranks."""
    arguments = (*COMMAND, "trainer.run_dir=runs/beside")
    finished = run(torchrun(NUM_RANKS, *arguments), tiny_task)
    assert finished.code == 0, finished.output
    return tiny_task / "runs" / "beside"


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def engines_of(host: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes of the two engines of a host."""
    engines = psutil.Process(host.pid).children(recursive=True)
    assert len(engines) == 2
    return engines


@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_engines_on_another_node_give_what_they_give_beside_the_ranks(
    tiny_task: Path, beside: Path, launcher: str
) -> None:
    nodes = Nodes(tiny_task)
    with nodes.host() as host:
        finished = nodes.go(launcher, launcher=launcher)
        assert finished.code == 0, finished.output
        assert host.wait(WAIT_S) == 0
    assert f"engines are on {socket.gethostname()} (127.0.0.1)" in finished.output
    assert "engines: 2 of TP 1, on 1 node of their own, in 2 processes" in finished.output  # the plan
    close_to(tiny_task / "runs" / launcher, beside)


@needs_sglang
def test_sglang_on_another_node_gives_what_it_gives_beside_the_ranks(tiny_task: Path) -> None:
    on_sglang = (f"{ROLLOUT}.name=sglang", f"{ROLLOUT}.sglang.python={SGLANG}")
    whole = run(torchrun(NUM_RANKS, *COMMAND, "trainer.run_dir=runs/sglang_beside", *on_sglang), tiny_task)
    assert whole.code == 0, whole.output
    nodes = Nodes(tiny_task)
    with nodes.host() as host:
        finished = nodes.go("sglang", *on_sglang)
        assert finished.code == 0, finished.output
        assert host.wait(WAIT_S) == 0
    close_to(tiny_task / "runs" / "sglang", tiny_task / "runs" / "sglang_beside")
    for line in lines_of(tiny_task / "runs" / "sglang"):
        assert float.fromhex(line["rollout_train/logprob_diff_max"]) < 1e-4


def test_an_engine_on_another_node_that_is_killed_is_replaced_there(tiny_task: Path, beside: Path) -> None:
    nodes, struck = Nodes(tiny_task), tiny_task / "struck"
    kill = {
        "PYTHONPATH": str(KILLS),
        "MEGARL_TEST_KILL": "0:megarl.rollout.vllm_stream:VllmStream.step:12:before",
        "MEGARL_TEST_STRUCK": str(struck),
    }
    with nodes.host(**kill) as host:
        finished = nodes.go("killed")
        assert finished.code == 0, finished.output
        assert host.wait(WAIT_S) == 0
    assert struck.is_file() and "died of signal 9" in finished.output and "another takes its place" in finished.output
    close_to(tiny_task / "runs" / "killed", beside)


def test_a_run_without_its_only_host_ends_with_the_name_of_that(tiny_task: Path) -> None:
    nodes = Nodes(tiny_task)
    metrics = tiny_task / "runs" / "alone" / "metrics.jsonl"
    with nodes.host(apart=False) as host:
        process = nodes.start_long("alone", stderr=subprocess.PIPE)
        until(lambda: metrics.is_file() and len(lines_of(metrics.parent)) > 1)
        engines = engines_of(host)
        host.kill()
        _, errors = process.communicate(timeout=WAIT_S)
        until(lambda: not any(engine.is_running() for engine in engines))
    assert process.returncode == 1
    assert "WorkerError: no engine is left to generate" in errors
    assert f"the engine host on {socket.gethostname()} is gone: " in errors


def test_a_host_that_is_lost_is_replaced_by_one_that_comes_within_the_run(tiny_task: Path) -> None:
    """Whose engine in the end is the only one, so that it has the weights and all that is to be sampled."""
    nodes, folder = Nodes(tiny_task), tiny_task / "runs" / "replaced"

    def goes_on() -> None:
        done = len(lines_of(folder)) if (folder / "metrics.jsonl").is_file() else 0
        until(lambda: process.poll() is not None or done + 2 < len(lines_of(folder)))
        assert process.poll() is None

    with nodes.host() as first, nodes.host() as second:
        sizes = (f"{ROLLOUT}.nnodes=2", f"{ROLLOUT}.n_gpus_per_node=1")
        process = nodes.start_long("replaced", *sizes, stderr=subprocess.DEVNULL)
        until(lambda: (folder / "metrics.jsonl").is_file())
        goes_on()
        first.kill()
        goes_on()
        with nodes.host() as late:
            until(lambda: len(psutil.Process(late.pid).children(recursive=True)) == 2)  # its host and its engine
            goes_on()
            second.kill()
            goes_on()
            [controller] = [r for r in psutil.Process(process.pid).children() if r.environ()["RANK"] == "0"]
            controller.kill()
            assert late.wait(WAIT_S) == 0
            assert process.wait(WAIT_S) != 0
    assert all(float.fromhex(line["rollout_train/logprob_diff_max"]) < 1e-4 for line in lines_of(folder))


def test_a_controller_that_is_killed_leaves_nothing_on_the_node_of_engines(tiny_task: Path) -> None:
    nodes = Nodes(tiny_task)
    metrics = tiny_task / "runs" / "left" / "metrics.jsonl"
    with nodes.host(apart=False) as host:
        process = nodes.start_long("left", stderr=subprocess.DEVNULL)
        until(lambda: metrics.is_file() and bool(lines_of(metrics.parent)))
        engines = engines_of(host)
        [controller] = [rank for rank in psutil.Process(process.pid).children() if rank.environ()["RANK"] == "0"]
        controller.kill()
        assert host.wait(WAIT_S) == 0
        until(lambda: not any(engine.is_running() for engine in engines))
        assert process.wait(WAIT_S) != 0
