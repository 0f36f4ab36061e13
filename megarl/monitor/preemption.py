"""SIGTERM and SIGUSR1: the machine is wanted back. A run saves at the end of its step and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

PREEMPTED = 75  # as sysexits.h has it: a failure that passes, try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_S = 2.0  # torchrun hands on to its ranks what a scheduler may have sent to all processes itself
UNWIND_S = 10.0  # for what is open to be closed, before the process ends with no more ado
_STOP = 0  # no signal has this number


class Preempted(KeyboardInterrupt):
    """The machine is wanted back, and the run ends. Notes say what is saved, as those of an interrupt do."""


Handler = Callable[[int, FrameType | None], None]


@contextmanager
def signals_heard(hear: Callable[[signal.Signals], None], handler: Handler) -> Iterator[None]:
    """Call ``hear`` in a thread of its own for each of SIGNALS, also while the main thread is in a long call.

    handler: called in the main thread as well, once it is back in Python. What handled the signals before does again
    afterwards. Outside of the main thread, which alone may listen, does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    thread = threading.Thread(target=_read, args=(reading, hear), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
        signal.set_wakeup_fd(wakeup)
        os.write(writing, bytes([_STOP]))
        thread.join()
        os.close(writing)
        os.close(reading)


def _read(reading: int, hear: Callable[[signal.Signals], None]) -> None:
    while True:
        for number in os.read(reading, 64):
            if number == _STOP:
                return
            if number in SIGNALS:
                hear(signal.Signals(number))


@dataclass(frozen=True)
class Limit:
    """Seconds that a run has for its last save. why: what sets them, in words."""

    seconds: float
    why: str


class Preemption:
    """Whether a run is asked to save and to end. The deadline, or a second signal, ends it at once.

    limit: until the save must be whole; None where another process looks to that. tell: tells a person. has_peers:
    whether the other ranks of this node live: torchrun sends SIGTERM also where one has died. leave: ends this process,
    for one whose main thread doesn't come back from what it is in.
    """

    def __init__(
        self,
        limit: Limit | None,
        tell: Callable[[str], None],
        has_peers: Callable[[], bool] = lambda: True,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.limit, self.tell, self.has_peers, self.leave = limit, tell, has_peers, leave
        self.is_asked = False
        self._asked_s = 0.0
        self.is_ending = self._has_raised = False
        self._deadline: threading.Timer | None = None

    @contextmanager
    def heard(self) -> Iterator[Preemption]:
        """Listen to signals meanwhile."""
        with signals_heard(self.hear, self._handle):
            try:
                yield self
            except KeyboardInterrupt as interrupt:
                if self.is_ending and not isinstance(interrupt, Preempted):  # Ray raises its own for any other
                    raise Preempted from interrupt
                raise
            finally:
                self.saved()

    def hear(self, number: signal.Signals) -> None:
        """Take note of a signal: the first asks for the end, a second ends at once."""
        if not self.has_peers():
            self.leave(1)
        elif not self.is_asked:
            self.ask(number.name)
        elif time.monotonic() - self._asked_s > SAME_S:
            self._end(f"{number.name} for the second time: ending at once, without a save")

    def ask(self, who: str) -> None:
        """Ask for the end of the run after this step. who: the signal, and where it came."""
        if self.is_asked:
            return
        self.is_asked, self._asked_s = True, time.monotonic()
        if self.limit is not None:
            limit = self.limit
            late = f"ERROR: nothing new is saved {limit.seconds:g} s after {who} ({limit.why}): ending at once"
            self._deadline = _started(limit.seconds, lambda: self._end(late))
        self.tell(f"{who}: the run saves at the end of this step, and ends; a second signal ends it at once")

    def saved(self) -> None:
        """Have no deadline any more."""
        if self._deadline is not None:
            self._deadline.cancel()

    def _end(self, why: str) -> None:
        """End at once: the main thread by an exception, and, where that can't reach it, the process."""
        if self.is_ending:
            return
        self.is_ending = True
        self.saved()
        self.tell(why)
        leave_soon(self.leave)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, SIGNALS[0])  # interrupts what waits for the system

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_ending and not self._has_raised:
            self._has_raised = True
            raise Preempted


def leave_soon(leave: Callable[[int], None]) -> threading.Timer:
    """Return the started timer that ends this process after UNWIND_S seconds, unless it is cancelled."""
    return _started(UNWIND_S, lambda: leave(PREEMPTED))


def _started(seconds: float, then: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, then)
    timer.daemon = True
    timer.start()
    return timer
