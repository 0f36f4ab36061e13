"""A timeline of a run: what the controller, the training and each engine do, in the format of Chrome's tracing.

``trace.json`` is its JSON array format, which Perfetto (https://ui.perfetto.dev) opens. An event has a line, and the
array isn't closed, so that a killed run keeps what it wrote and one that goes on adds to it.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.monitor.disk import LineFile

TIMELINE = "trace.json"
GENERATE = "generate"
_CONTROLLER, _TRAINER, _FIRST_ENGINE = 0, 1, 2
_ENGINE = "engine "
_UPDATE, _SCORE = "update_", "score_"


@dataclass(frozen=True)
class Span:
    """What was done in a row of the timeline, from when to when in seconds."""

    row: str
    name: str
    start_s: float
    end_s: float


class TraceSink:
    """Writes a timeline. Safe across threads: engines are heard in their own."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        """Open the file, or go on with one. clock: that spans are told by."""
        self._clock, self._start_s = clock, time.time() - clock()
        self._lock = threading.Lock()
        self._rows: set[int] = set()
        self._engines: dict[int, tuple[str, int, float]] = {}
        is_new = not path.is_file()
        self._file = LineFile(path)
        if is_new:
            self._file.append("[\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Mark the end of a step, with its metrics."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self._lock:
            self._write(_CONTROLLER, f"end of step {step}", ph="i", s="t", ts=self._us(self._clock()), args=finite)

    def phase(self, name: str, start_s: float, end_s: float) -> None:
        """Take a phase of the run that has ended: of the trainer's ranks, or else of the controller."""
        row = _TRAINER if name.startswith((_UPDATE, _SCORE)) else _CONTROLLER
        with self._lock:
            self._span(row, name, start_s, end_s, {})

    def engine(self, number: int, does: str, policy_version: int) -> None:
        """Take what an engine does from now on; an empty string where that is nothing. It may be told again."""
        now_s = self._clock()
        with self._lock:
            name, version, since_s = self._engines.get(number, ("", policy_version, now_s))
            if (name, version) == (does, policy_version):
                return
            if name:
                self._span(_FIRST_ENGINE + number, name, since_s, now_s, {"policy_version": version})
            self._engines[number] = (does, policy_version, now_s)

    def close(self) -> None:
        """End what the engines do, and close the file."""
        for number, (_, version, _) in list(self._engines.items()):
            self.engine(number, "", version)
        self._file.close()

    def _span(self, row: int, name: str, start_s: float, end_s: float, arguments: Mapping[str, int]) -> None:
        duration_us = round((end_s - start_s) * 1e6)
        self._write(row, name, ph="X", ts=self._us(start_s), dur=duration_us, args=arguments)

    def _write(self, row: int, name: str, **event: Any) -> None:
        """Write an event of a row, with the row's name before its first."""
        lines = [{"name": name, "pid": 0, "tid": row, **event}]
        if row not in self._rows:
            self._rows.add(row)
            lines.insert(0, {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": _row_name(row)}})
        self._file.append("".join(json.dumps(line) + ",\n" for line in lines))

    def _us(self, seconds: float) -> int:
        """Return microseconds since 1970."""
        return round((self._start_s + seconds) * 1e6)


def read_spans(path: Path) -> list[Span]:
    """Return the spans of a timeline, in the order in which they ended. A last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    events = [json.loads(line.removesuffix(",")) for line in lines if line.endswith("},")]
    return [
        Span(_row_name(e["tid"]), e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)
        for e in events
        if e["ph"] == "X"
    ]


def engines_in(spans: Sequence[Span]) -> int:
    """Return the number of engines that have a row."""
    return len({span.row for span in spans if span.row.startswith(_ENGINE)})


def training_s(spans: Sequence[Span]) -> float:
    """Return the seconds that passes and updates of all roles took."""
    return _length(_training(spans))


def overlap_share(spans: Sequence[Span], engine: int | None = None) -> float:
    """Return the share of the trainer's passes and updates in which rollouts were generated; 0 where there were none.

    engine: of this one; None: of any.
    """
    rows = None if engine is None else _row_name(_FIRST_ENGINE + engine)
    generating = [
        (span.start_s, span.end_s)
        for span in spans
        if span.name == GENERATE and span.row.startswith(_ENGINE) and rows in (None, span.row)
    ]
    training = _training(spans)
    both = [
        (max(start, other_start), min(end, other_end))
        for start, end in _union(training)
        for other_start, other_end in _union(generating)
        if max(start, other_start) < min(end, other_end)
    ]
    return _length(both) / _length(training) if training else 0.0


def _training(spans: Iterable[Span]) -> list[tuple[float, float]]:
    return [(span.start_s, span.end_s) for span in spans if span.row == _row_name(_TRAINER)]


def _length(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in _union(intervals))


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the same time as intervals in order that don't overlap."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _row_name(row: int) -> str:
    named = {_CONTROLLER: "controller", _TRAINER: "trainer"}
    return named.get(row, f"{_ENGINE}{row - _FIRST_ENGINE}")
