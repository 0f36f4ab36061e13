"""Seconds are added up by name, whatever happens inside a block."""

from __future__ import annotations

from itertools import count

import pytest

from megarl.monitor.timing import Stopwatch


def ticking() -> Stopwatch:
    """Return a stopwatch whose clock advances one second each time it is read."""
    seconds = count()
    return Stopwatch(lambda: float(next(seconds)))


def test_blocks_of_one_name_add_up() -> None:
    watch = ticking()
    for _ in range(3):
        with watch.timed("generate"):
            pass
    assert watch.drain() == {"generate": 3.0}


def test_an_outer_block_includes_the_inner_ones() -> None:
    watch = ticking()
    with watch.timed("step"), watch.timed("generate"):
        pass
    assert watch.drain() == {"generate": 1.0, "step": 3.0}


def test_a_listener_hears_the_innermost_block_whenever_it_changes() -> None:
    told: list[str] = []
    watch = Stopwatch(told=told.append)
    with watch.timed("step"):
        with watch.timed("generate"):
            pass
        with pytest.raises(ZeroDivisionError), watch.timed("score"):
            _ = 1 / 0
    assert told == ["step", "generate", "step", "score", "step", ""]


def test_a_block_that_raises_is_counted_and_its_error_passes() -> None:
    watch = ticking()
    with pytest.raises(ZeroDivisionError), watch.timed("score"):
        _ = 1 / 0
    assert watch.drain() == {"score": 1.0}


def test_draining_starts_again_from_zero() -> None:
    watch = ticking()
    with watch.timed("save"):
        pass
    watch.drain()
    assert watch.drain() == {}


def test_the_real_clock_moves_forward() -> None:
    watch = Stopwatch()
    with watch.timed("spin"):
        sum(range(10_000))
    assert watch.drain()["spin"] > 0
