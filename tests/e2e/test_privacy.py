"""What a run on one machine shows to others, and what it leaves outside its folder: nothing.

tests/fault/test_interrupt.py looks at a run on Ray each time.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megarl.rollout.shared_memory import BYTES_PER_THREAD
from tests.launch import Finished, left_in, python, run, torchrun
from tests.looking import LOOK, SECRET, TOKEN, Seen, read_seen
from tests.tiny_task import NUM_RANKS

pytestmark = pytest.mark.long

COMMAND = (
    *("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", "reward.path=looking.py"),
    *(TOKEN, "trainer.total_training_steps=1", "trainer.val_before_train=false", "reward.try_first=false"),
)
# torchrun's own store listens on every interface. With this no part of it does.
CLOSED_TORCHRUN = (
    *("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file", "--rdzv-endpoint=store"),
    *(f"--nproc-per-node={NUM_RANKS}", *COMMAND),
)
LOOKING = (
    LOOK
    + """
def compute_score(data_source, solution_str, ground_truth, extra_info, token):
    look(token)
    return float(len(solution_str))
"""
)


@dataclass(frozen=True)
class Done:
    """A finished run, and what was seen while it ran. left: what stayed in the temporary folder and in /dev/shm."""

    launcher: str
    finished: Finished
    folder: Path
    seen: Seen
    left: set[str]


def _run(tiny_task: Path, name: str, command: list[str], temp: Path, **more: str) -> Done:
    (tiny_task / "looking.py").write_text(LOOKING)
    environ = {"HF_TOKEN": SECRET, "TMPDIR": str(temp), **more}
    before = left_in(temp)
    finished = run([*command, f"trainer.run_dir=runs/{name}"], tiny_task, environ=environ)
    assert finished.code == 0, finished.output
    return Done(name, finished, tiny_task / "runs" / name, read_seen(tiny_task), left_in(temp) - before)


@contextmanager
def _another_ray(temp: Path) -> Iterator[None]:
    """Have a Ray of someone else's run on this machine, which a program that asks for none in particular would join."""
    options = ("--head", "--block", "--node-ip-address=127.0.0.1", "--port=0", "--num-cpus=1")
    command = python(
        "-m", "ray.scripts.scripts", "start", *options, "--include-dashboard=false", "--disable-usage-stats"
    )
    environ = {**os.environ, "TMPDIR": str(temp)}
    with open(temp / "another.log", "w") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (temp / "ray" / "ray_current_cluster").is_file():
            assert process.poll() is None and time.monotonic() < deadline, (temp / "another.log").read_text()
            time.sleep(0.2)
        yield
    finally:
        for started in (*psutil.Process(process.pid).children(recursive=True), process):
            started.kill()
        process.wait()


@pytest.fixture(scope="module", params=["ray", "torchrun", "closed"])
def done(request: pytest.FixtureRequest, tiny_task: Path) -> Iterator[Done]:
    """Run under a launcher with a temporary folder of the run's own; on Ray beside another Ray."""
    launcher: str = request.param
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # short, for Ray's sockets
        temp = Path(name)
        if launcher == "ray":
            with _another_ray(temp):
                yield _run(tiny_task, launcher, python(*COMMAND), temp)
        elif launcher == "torchrun":
            yield _run(tiny_task, launcher, torchrun(NUM_RANKS, *COMMAND), temp)
        else:
            yield _run(tiny_task, launcher, python(*CLOSED_TORCHRUN), temp, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def test_every_port_is_on_the_loopback_interface_but_that_of_torchruns_own_store(done: Done) -> None:
    assert len(done.seen.listening) >= NUM_RANKS, "gloo alone listens on every rank"
    assert [
        line for line in done.seen.reachable if done.launcher != "torchrun" or "torch.distributed.run" not in line
    ] == []


def test_a_secret_of_the_environment_is_in_no_file_of_the_run_and_on_no_command_line(done: Done) -> None:
    assert done.seen.telling(done.folder, done.finished.output) == []
    assert "token: ${oc.env:HF_TOKEN}" in (done.folder / "config.yaml").read_text()


def test_nothing_stays_in_the_temporary_folder_or_in_shared_memory(done: Done) -> None:
    assert done.left == set()
    assert done.finished.processes == ()


def test_ranks_take_of_shared_memory_what_is_checked_for_before(done: Done) -> None:
    of_ranks = [(name, size) for name, size in done.seen.segments if not name.startswith(("plasma", "sem."))]
    assert all("-cpushm_" in name for name, _ in of_ranks)
    # Nothing, where vLLM's build for the processor has no segments.
    assert sum(size for _, size in of_ranks) <= NUM_RANKS * BYTES_PER_THREAD


def test_a_ray_of_the_runs_own_is_in_a_folder_that_no_other_user_may_enter(done: Done) -> None:
    assert done.seen.sessions == (["0o700"] if done.launcher == "ray" else [])


def test_weights_may_be_read_by_whom_the_files_beside_them_may(done: Done) -> None:
    final = done.folder / "checkpoints" / "final"
    modes = {path.stat().st_mode for path in final.rglob("*") if path.is_file()}
    assert modes == {(final / "config.json").stat().st_mode}
    assert any(path.suffix == ".safetensors" for path in final.iterdir())
