"""Seconds spent in the named parts of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Add up wall-clock seconds by name until they are drained.

    Names may nest; each counts its whole span, so an outer name includes the inner ones. Not safe across threads.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside the block to ``name``, also where the block raises."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def drain(self) -> dict[str, float]:
        """Return seconds by name, in order of first use, and start again from zero."""
        seconds, self._seconds = self._seconds, {}
        return seconds
