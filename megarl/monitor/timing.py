"""Seconds spent in the named parts of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Add up wall-clock seconds by name until they are drained.

    Names may nest; each counts its whole span, so an outer name includes the inner ones. Not safe across threads.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        told: Callable[[str], None] = lambda name: None,
        ended: Callable[[str, float, float], None] = lambda name, start_s, end_s: None,
    ) -> None:
        """Start from zero.

        told: hears the innermost name that time is spent in, whenever it changes; empty outside. ended: hears every
        name with the start and the end of its block, by the clock.
        """
        self._clock, self._told, self._ended = clock, told, ended
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside the block to ``name``, also where the block raises."""
        self._open.append(name)
        self._told(name)
        start = self._clock()
        try:
            yield
        finally:
            self._open.pop()
            self._told(self.innermost)
            end = self._clock()
            self._seconds[name] = self._seconds.get(name, 0.0) + end - start
            self._ended(name, start, end)

    @property
    def innermost(self) -> str:
        """The innermost name that time is spent in now, an empty string outside of all."""
        return self._open[-1] if self._open else ""

    def drain(self) -> dict[str, float]:
        """Return seconds by name, in order of first use, and start again from zero."""
        seconds, self._seconds = self._seconds, {}
        return seconds
