"""The processes that a node starts, and their end with all that they started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from megarl.nodes.programs import Program

_LEAVE_S, _LEFT_S = 10.0, 2.0
_OF_A_TASK = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "PMI_", "OMPI_COMM_WORLD_")
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Ended:
    """The end of a process. code: its exit code, negative for a signal."""

    name: str
    code: int

    def __str__(self) -> str:
        how = f"was ended by signal {-self.code}" if self.code < 0 else f"ended with exit code {self.code}"
        return f"{self.name} {how}"


class Children:
    """Processes of this node. Each end is told to ``tell``."""

    def __init__(self, tell: Callable[[Ended], None]) -> None:
        self.tell = tell
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, program: Program, log: Path | None = None) -> None:
        """Start a program, with its output in a file where ``log`` names one."""
        with open(log, "ab") if log is not None else contextlib.nullcontext() as output:
            process = subprocess.Popen(
                program.command,
                env={**_not_of_a_task(os.environ), **program.environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,  # a signal to this process is this process's to pass on
            )
        self.running[program.name] = process
        threading.Thread(target=self._wait, args=(program.name, process), daemon=True).start()

    def _wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.tell(Ended(name, process.wait()))

    def signal_run(self, name: str, number: int) -> None:
        """Send a signal to the controller or the ranks below a program: to what torchrun started, not to itself."""
        process = self.running.get(name)
        if process is None or process.poll() is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(process.pid)
            for target in own.children() if name == "torchrun" else [own]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    target.send_signal(number)

    def end(self) -> None:
        """End all programs, then whatever they left: asked to first, killed after some seconds."""
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        own = {process.pid for process in self.running.values()}
        psutil.wait_procs([p for p in psutil.Process().children() if p.pid in own], timeout=_LEAVE_S)
        left = psutil.Process().children(recursive=True)
        _signal(left, signal.SIGTERM)
        _, alive = psutil.wait_procs(left, timeout=_LEFT_S)
        while alive:
            _signal(alive, signal.SIGKILL)
            psutil.wait_procs(alive, timeout=_LEAVE_S)
            alive = psutil.Process().children(recursive=True)


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _not_of_a_task(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what says that a process is one of several, as this node's task is."""
    return {name: value for name, value in environ.items() if not name.startswith(_OF_A_TASK)}


def adopt_orphans() -> None:
    """Become the parent of processes below this one whose own parent ends, so that none is lost."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
