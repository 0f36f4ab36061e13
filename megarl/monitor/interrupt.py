"""The end of a run by Ctrl-C, SIGTERM or SIGUSR1: one line, and an exit code of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megarl.monitor.preemption import PREEMPTED, SIGNALS, Preempted, leave_soon, signals_heard

INTERRUPTED = 130  # as shells have it: 128 + SIGINT


@contextmanager
def interrupts_told(end: Callable[[int], None] = sys.exit) -> Iterator[None]:
    """End with exit code 130 on Ctrl-C, 75 on SIGTERM and SIGUSR1; say what the exception's notes say.

    Without notes nothing was saved. end: how this process ends. What is interrupted has been left by then.
    """
    is_preempted, leaving = False, list[threading.Timer]()

    def end_at_once(number: int, frame: FrameType | None) -> None:
        nonlocal is_preempted
        is_preempted = True
        raise Preempted

    try:
        # Until something that can save listens to them.
        with signals_heard(lambda number: leaving.append(leave_soon(os._exit)), end_at_once):
            yield
    except KeyboardInterrupt as interrupt:
        for timer in leaving:
            timer.cancel()
        for number in (signal.SIGINT, *SIGNALS):  # an impatient second one has nothing left to stop
            signal.signal(number, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":  # torchrun's others have nothing to tell
            notes = getattr(interrupt, "__notes__", ["interrupted before there was a run folder: nothing was saved"])
            print("\n".join(notes), file=sys.stderr, flush=True)
        end(PREEMPTED if is_preempted or isinstance(interrupt, Preempted) else INTERRUPTED)
