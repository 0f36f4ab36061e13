"""Processes that reward functions started, wherever they went."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator

import psutil

MARK = "MEGARL_REWARD_WORKER"  # in the environment of a worker, which what it starts inherits
_MAX_ROUNDS = 10


def end_started(marks: Collection[str], groups: Collection[int] = (), spared: int | None = None) -> None:
    """Kill every process with one of the marks or in one of the process groups, but not ``spared``.

    A process that left its group, by setsid or as a daemon, still has the mark. One that left it and has another
    environment as well is not found.
    """
    for _ in range(_MAX_ROUNDS):  # one may start another while it is looked for
        found = [process for process in _started(marks, groups) if process.pid != spared]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        if not found:
            return
        psutil.wait_procs(found, timeout=1.0)


def _started(marks: Collection[str], groups: Collection[int]) -> Iterator[psutil.Process]:
    """Yield the running processes with a mark or in a group. Those of other users can't be read, and aren't ours."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_ours = process.environ().get(MARK) in marks or os.getpgid(process.pid) in groups
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process
