"""Ctrl-C in the second step of a run: one line says what is saved and how to go on, and nothing stays behind.

On Ray it is also seen what the run shows to others, of which tests/e2e/test_privacy.py has more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.launch import Finished, left_in, python, run, shared_memory, torchrun
from tests.looking import LOOK, SECRET, TOKEN, Seen, read_seen
from tests.tiny_task import NUM_RANKS

COMMAND = (
    *("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", "reward.path=interrupting.py"),
    *("trainer.val_before_train=false", "trainer.save_freq=1", "reward.try_first=false", TOKEN),
)
ROLLOUT = "actor_rollout_ref.rollout"
SERVED = (f"{ROLLOUT}.placement=server", f"{ROLLOUT}.tensor_model_parallel_size=1")
ASYNC = (*SERVED, "trainer.mode=async", "algorithm.rollout_correction.preset=token_tis")
# What a terminal does: all in the foreground hear of it, even if these tests run in a background that does not.
IN_FOREGROUND = (
    *("env", "--default-signal=INT"),
    *("setsid", "--wait", "bash", "-c", 'echo $$ > foreground; exec "$0" "$@"'),
)
INTERRUPTING = (
    LOOK
    + """
import pathlib, signal, time

def compute_score(data_source, solution_str, ground_truth, extra_info, metrics, token):
    if not os.path.exists("seen.json"):
        look(token)
    lines = pathlib.Path(metrics).read_text() if os.path.exists(metrics) else ""
    if '"step": 1' in lines:
        try:
            os.killpg(int(open("foreground").read()), signal.SIGINT)
        except ProcessLookupError:
            pass
        time.sleep(20)
    return float(len(solution_str))
"""
)


@dataclass(frozen=True)
class Interrupted:
    """An interrupted run, its folder, what was seen of it, and what stayed in its temporary folder and in /dev/shm."""

    finished: Finished
    folder: Path
    seen: Seen
    left: set[str]


@pytest.fixture(scope="module")
def interrupted(tiny_task: Path) -> Callable[[str], Interrupted]:
    """Return what interrupts a run under a launcher, or with engines in processes of their own, once each."""
    (tiny_task / "interrupting.py").write_text(INTERRUPTING)
    commands = {
        "ray": python(*COMMAND),
        "torchrun": torchrun(NUM_RANKS, *COMMAND),
        "served": python(*COMMAND, *SERVED),
        "async": python(*COMMAND, *ASYNC),
    }
    return cache(lambda name: _interrupted(tiny_task, name, commands[name]))


def _interrupted(tiny_task: Path, name: str, command: list[str]) -> Interrupted:
    folder, before = tiny_task / "runs" / name, shared_memory()
    (tiny_task / "seen.json").unlink(missing_ok=True)
    overrides = [f"trainer.run_dir=runs/{name}", f"reward.kwargs.metrics={folder / 'metrics.jsonl'}"]
    with tempfile.TemporaryDirectory(dir="/tmp") as temp:  # short, for Ray's sockets
        environ = {"TMPDIR": temp, "HF_TOKEN": SECRET}
        finished = run([*IN_FOREGROUND, *command, *overrides], tiny_task, environ=environ)
        left = left_in(Path(temp)) - before
    return Interrupted(finished, folder, read_seen(tiny_task), left)


def _says(done: Interrupted) -> str:
    return (
        f"interrupted after step 1; its metrics are in {done.folder}; step_1 is saved: "
        f"the same command with trainer.run_dir={done.folder} goes on after it\n"
    )


def test_on_ray_the_line_is_all_that_an_interrupted_run_says(interrupted: Callable[[str], Interrupted]) -> None:
    assert interrupted("ray").finished.code == 130
    assert interrupted("ray").finished.stderr == _says(interrupted("ray"))


@pytest.mark.long
def test_under_torchrun_the_line_is_there_and_every_traceback_is_torchruns(
    interrupted: Callable[[str], Interrupted],
) -> None:
    error = interrupted("torchrun").finished.stderr
    assert error.count(_says(interrupted("torchrun"))) == 1
    assert [line for line in error.splitlines() if line.startswith("  File ") and "/megarl/" in line] == []
    assert "terminate called" not in error


@pytest.mark.long
@pytest.mark.parametrize("placed", ["served", "async"])
def test_with_engines_in_processes_of_their_own_the_line_is_all_and_nothing_stays(
    interrupted: Callable[[str], Interrupted], placed: str
) -> None:
    done = interrupted(placed)
    # A process that Ray keeps in reserve now and then aborts as its node ends.
    said = [line for line in done.finished.stderr.splitlines(keepends=True) if "(pid=" not in line]
    assert (done.finished.code, "".join(said)) == (130, _says(done))
    assert (done.finished.processes, done.left) == ((), set())


@pytest.mark.parametrize("launcher", ["ray", pytest.param("torchrun", marks=pytest.mark.long)])
def test_nothing_stays_of_an_interrupted_run(interrupted: Callable[[str], Interrupted], launcher: str) -> None:
    assert (interrupted(launcher).finished.processes, interrupted(launcher).left) == ((), set())


def test_on_ray_every_port_is_on_the_loopback_interface(interrupted: Callable[[str], Interrupted]) -> None:
    seen = interrupted("ray").seen
    assert len(seen.listening) >= NUM_RANKS, "gloo alone listens on every rank"
    assert seen.reachable == []


def test_a_secret_of_the_environment_is_nowhere_that_others_see(interrupted: Callable[[str], Interrupted]) -> None:
    done = interrupted("ray")
    assert done.seen.telling(done.folder, done.finished.output) == []
    assert "token: ${oc.env:HF_TOKEN}" in (done.folder / "config.yaml").read_text()


def test_no_other_user_may_enter_the_folder_of_the_runs_own_ray(interrupted: Callable[[str], Interrupted]) -> None:
    assert interrupted("ray").seen.sessions == ["0o700"]
