"""A rank runs on the cores near its device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.parallel.numa import cores_near

ADDRESS = "0000:1b:00.0"
# In a process of its own, since its threads keep what they get; with a thread that was there before.
BIND = """
import json, os, sys, threading
from pathlib import Path
from megarl.parallel.numa import bind_near
stop, started = threading.Event(), threading.Event()
other = threading.Thread(target=lambda: (started.set(), stop.wait()))
other.start(); started.wait()
got = bind_near("0000:1B:00.0", Path(sys.argv[1]))
print(json.dumps([sorted(got), sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(other.native_id))]))
stop.set()
"""


def _device(folder: Path, cpulist: str) -> Path:
    (folder / ADDRESS).mkdir()
    (folder / ADDRESS / "local_cpulist").write_text(cpulist)
    return folder


@pytest.mark.parametrize(
    ("cpulist", "cores"),
    [("0-3,64-66\n", {0, 1, 2, 3, 64, 65, 66}), ("5\n", {5}), ("\n", set())],
)
def test_the_kernel_says_which_cores_are_near_a_device(tmp_path: Path, cpulist: str, cores: set[int]) -> None:
    assert cores_near(ADDRESS, _device(tmp_path, cpulist)) == cores
    assert cores_near("0000:ff:00.0", tmp_path) == set(), "a device that it doesn't know"


def _bound(folder: Path) -> list[list[int]]:
    done = subprocess.run([sys.executable, "-c", BIND, str(folder)], capture_output=True, text=True, check=True)
    answers: list[list[int]] = json.loads(done.stdout)
    return answers


def test_every_thread_runs_on_the_near_cores_of_those_that_the_process_has(tmp_path: Path) -> None:
    first = min(os.sched_getaffinity(0))
    assert _bound(_device(tmp_path, f"{first},100000\n")) == [[first]] * 3


def test_a_process_without_a_near_core_keeps_all(tmp_path: Path) -> None:
    assert _bound(_device(tmp_path, "100000-100003\n")) == [sorted(os.sched_getaffinity(0))] * 3
