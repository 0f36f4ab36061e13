"""Runs of megarl as a user starts them: commands in processes of their own, with all that they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARKER = "MEGARL_TEST_RUN"
_SHARED_MEMORY = Path("/dev/shm")
_LEAVE_S = 20.0  # for processes that end by themselves after their parent


@dataclass(frozen=True)
class Finished:
    """A finished command. processes: command lines of what was still running. ended_s: on the clock time.time()."""

    code: int
    stdout: str
    stderr: str
    ended_s: float
    processes: tuple[str, ...]

    @property
    def output(self) -> str:
        """What a person sees, errors last."""
        return f"{self.stdout}\n{self.stderr}"


def python(*arguments: str) -> list[str]:
    """Return the command that runs Python on ``arguments``."""
    return [sys.executable, *arguments]


def torchrun(num_ranks: int, *arguments: str) -> list[str]:
    """Return the command that runs Python on ``arguments`` in so many ranks."""
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *arguments)


def run(
    command: Sequence[str],
    folder: Path,
    *,
    python_path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> Finished:
    """Run ``command`` in ``folder`` to its end, or kill it and whatever it started after ``timeout_s``.

    python_path: a folder that Python shall import from, before all others. environ: added to this process's. Output
    goes to files, since a pipe ends only when the last process that inherited it does.
    """
    marker = uuid.uuid4().hex
    environment = {**os.environ, "MEGARL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", **(environ or {}), MARKER: marker}
    if python_path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(python_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    logs = folder / f"stdout.{marker}", folder / f"stderr.{marker}"
    with logs[0].open("w") as out, logs[1].open("w") as err:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        ended_s = time.time()
        left = end_of(marker)
    return Finished(code, logs[0].read_text(), logs[1].read_text(), ended_s, left)


def end_of(marker: str) -> tuple[str, ...]:
    """Give the processes that were started with a MARKER time to end; kill and return those that don't."""
    deadline = time.monotonic() + _LEAVE_S
    while (alive := _processes(marker)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in alive:
        process.kill()
    return tuple(name for process in alive if (name := _name(process)))


def shared_memory() -> set[str]:
    """Return the names of the segments that megarl, or Ray or vLLM for it, holds on this machine."""
    return {path.name for path in _SHARED_MEMORY.iterdir() if path.name.startswith(("megarl_", "psm_", "plasma"))}


def left_in(temp: Path) -> set[str]:
    """Return what is in a run's temporary folder and in shared memory, but for torch's cache and torchrun's logs."""
    own = {path.name for path in temp.iterdir() if not path.name.startswith(("torchinductor_", "torchelastic_"))}
    return own | shared_memory()


def _processes(marker: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _environ(process).get(MARKER) == marker]


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone, or another user's
        return {}


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
