"""A run of 200 steps, a rank of which is killed at a random moment every 20, equals one that never was killed."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megarl.monitor.rundir import last_step
from tests.launch import Finished, left_in, run, shared_memory, torchrun
from tests.run_folder import hashes, lines_of
from tests.tiny_task import NUM_RANKS

NUM_STEPS, EVERY = 200, 20
NAME = "MEGARL_TEST_MANY_KILLS"  # of a variable that its processes have
SFT = (
    *("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft", f"trainer.total_training_steps={NUM_STEPS}"),
    *("trainer.save_freq=7", "trainer.keep_checkpoints=2", "trainer.logger=[jsonl,tensorboard]"),
)
SLACK_BYTES = 64 * 2**20


def go(tiny_task: Path, name: str, temp: str) -> Finished:
    """Start or go on."""
    command = torchrun(NUM_RANKS, *SFT, f"trainer.run_dir=runs/{name}")
    return run(command, tiny_task, environ={NAME: name, "TMPDIR": temp}, timeout_s=900)


def processes(name: str) -> Iterator[psutil.Process]:
    """Yield the processes of a run: torchrun, and the ranks."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(NAME) == name and "megarl.main_sft" in process.cmdline():
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def ranks(name: str) -> list[psutil.Process]:
    """Return the ranks of a run."""
    return [process for process in processes(name) if "RANK" in process.environ()]


def kill_at(folder: Path, step: int, chosen: random.Random, is_over: threading.Event) -> None:
    """Kill a rank of a run once it has finished a step, some way into the next one."""
    while last_step(folder) < step and not is_over.is_set():
        time.sleep(0.02)
    time.sleep(chosen.random() / 2)
    if alive := sorted(ranks(folder.name), key=lambda process: process.pid):
        os.kill(chosen.choice(alive).pid, signal.SIGKILL)


@pytest.mark.long
def test_kills_at_random_leave_a_run_as_it_is_without_and_the_machine_as_it_was(tiny_task: Path) -> None:
    chosen, before = random.Random(0), shared_memory()
    held: list[list[tuple[int, int]]] = []

    def watch(folder: Path, is_over: threading.Event) -> None:
        for step in (EVERY, NUM_STEPS - EVERY):
            while last_step(folder) < step and not is_over.is_set():
                time.sleep(0.02)
            held.append([(process.num_fds(), process.memory_info().rss) for process in ranks(folder.name)])

    with tempfile.TemporaryDirectory(dir="/tmp") as temp:
        for name, targets in (("clean", ()), ("killed", range(EVERY, NUM_STEPS, EVERY))):
            folder = tiny_task / "runs" / name
            for target in (*targets, None):
                is_over = threading.Event()
                arguments = (folder, is_over) if target is None else (folder, target, chosen, is_over)
                act = kill_at if target is not None else watch if name == "clean" else lambda *_: None
                beside = threading.Thread(target=act, args=arguments)
                beside.start()
                finished = go(tiny_task, name, temp)
                is_over.set()
                beside.join()
                assert (finished.code == 0) == (target is None), finished.output
                assert finished.processes == () and left_in(Path(temp)) - before == set()

    clean, killed = (tiny_task / "runs" / name for name in ("clean", "killed"))
    assert lines_of(killed) == lines_of(clean) and len(lines_of(killed)) == NUM_STEPS
    first, second = (hashes(folder / "checkpoints" / f"step_{NUM_STEPS}") for folder in (clean, killed))
    assert first == second and len(first) > 2
    left, expected = ({path.name for path in (folder / "checkpoints").iterdir()} for folder in (killed, clean))
    assert left == expected
    early, late = held
    assert [fds for fds, _ in late] == [fds for fds, _ in early]
    assert all(b - a < SLACK_BYTES for (_, a), (_, b) in zip(early, late, strict=True))
