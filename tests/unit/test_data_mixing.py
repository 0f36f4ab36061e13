from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.data.mixing import MixedOrder
from megarl.errors import DataError

FILES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=4)


def _file_of(row: int, sizes: tuple[int, ...]) -> int:
    return next(i for i in range(len(sizes)) if row < sum(sizes[: i + 1]))


@given(files=FILES, shuffle=st.booleans(), seed=st.integers(0, 2**32), epochs=st.integers(1, 5))
def test_every_file_has_its_share_and_its_rows_come_evenly(
    files: list[tuple[int, float]], shuffle: bool, seed: int, epochs: int
) -> None:
    sizes, weights = zip(*files, strict=True)
    order = MixedOrder(sizes, weights, 1, shuffle, seed)
    rows = [order.batch(step)[0] for step in range(epochs * order.batches_per_epoch)]
    by_file = Counter(_file_of(row, sizes) for row in rows)
    total = epochs * sum(sizes)
    assert len(rows) == total
    for i, weight in enumerate(weights):
        assert abs(by_file[i] - total * weight / sum(weights)) <= epochs
        counts = Counter(row for row in rows if _file_of(row, sizes) == i)
        times = [counts[row] for row in range(sum(sizes[:i]), sum(sizes[: i + 1]))]
        assert max(times) - min(times) <= 1


@given(files=FILES, seed=st.integers(0, 2**32), step=st.integers(0, 100))
def test_a_resumed_run_continues_with_the_same_batches(files: list[tuple[int, float]], seed: int, step: int) -> None:
    sizes, weights = zip(*files, strict=True)
    one, other = (MixedOrder(sizes, weights, 1, True, seed) for _ in range(2))
    for earlier in range(step):
        one.batch(earlier)
    assert one.batch(step) == other.batch(step)


def test_shuffled_epochs_mix_the_files_and_differ() -> None:
    order = MixedOrder((50, 50), (1.0, 1.0), 100, True, 0)
    first, second = order.batch(0), order.batch(1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert 10 < sum(row < 50 for row in first[:50]) < 40


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="only 5 rows"):
        MixedOrder((2, 3), (1.0, 1.0), 6, False, 0)
    with pytest.raises(DataError, match="file 2 has no rows"):
        MixedOrder((2, 0), (1.0, 1.0), 1, False, 0)
