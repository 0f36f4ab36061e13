"""The end of a run by Ctrl-C: one line, and an exit code of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # as shells have it: 128 + SIGINT


@contextmanager
def interrupts_told(end: Callable[[int], None] = sys.exit) -> Iterator[None]:
    """End with exit code 130 on Ctrl-C, and say what the interrupt's notes say; without notes nothing was saved.

    end: how this process ends. What is interrupted has been left by then.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one has nothing left to stop
        if os.environ.get("RANK", "0") == "0":  # torchrun's others have nothing to tell
            notes = getattr(interrupt, "__notes__", ["interrupted before there was a run folder: nothing was saved"])
            print("\n".join(notes), file=sys.stderr, flush=True)
        end(INTERRUPTED)
