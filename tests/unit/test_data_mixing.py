from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.data.mixing import MixedOrder
from megarl.errors import DataError

FILES = st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 10)), min_size=1, max_size=4)


def _file_of(row: int, sizes: tuple[int, ...]) -> int:
    return next(i for i in range(len(sizes)) if row < sum(sizes[: i + 1]))


@given(files=FILES, shuffle=st.booleans(), seed=st.integers(0, 2**32), batch_size=st.integers(1, 30))
def test_every_step_has_each_file_s_share_and_its_rows_come_evenly(
    files: list[tuple[int, float]], shuffle: bool, seed: int, batch_size: int
) -> None:
    sizes, weights = zip(*files, strict=True)
    order = MixedOrder(sizes, weights, min(batch_size, sum(sizes)), shuffle, seed)
    by_step = [Counter(_file_of(row, sizes) for row in order.batch(step)) for step in range(20)]
    assert {by_file.total() for by_file in by_step} == {order.batch_size}
    for i, share in enumerate(order.shares):
        assert all(math.floor(share) - 2 <= by_file[i] <= math.ceil(share) + 2 for by_file in by_step)
        assert abs(sum(by_file[i] for by_file in by_step) - 20 * share) <= 2
        counts = Counter(row for step in range(20) for row in order.batch(step) if _file_of(row, sizes) == i)
        times = [counts[row] for row in range(sum(sizes[:i]), sum(sizes[: i + 1]))]
        assert max(times) - min(times) <= 1


@given(files=FILES, seed=st.integers(0, 2**32), batch_size=st.integers(1, 30), step=st.integers(0, 1000))
def test_a_row_comes_twice_in_a_step_only_where_its_file_is_smaller_than_its_share(
    files: list[tuple[int, float]], seed: int, batch_size: int, step: int
) -> None:
    sizes, weights = zip(*files, strict=True)
    for shuffle in (False, True):
        order = MixedOrder(sizes, weights, min(batch_size, sum(sizes)), shuffle, seed)
        counts = Counter(order.batch(step))
        repeating = {_file_of(row, sizes) for row, count in counts.items() if count > 1}
        assert repeating <= set(order.repeating())


def test_files_of_500_and_7000_rows_in_equal_shares_repeat_no_row_in_a_step() -> None:
    order = MixedOrder((500, 7000), (1.0, 1.0), 256, True, 0)
    steps = [order.batch(step) for step in range(3 * order.batches_per_epoch)]
    assert order.repeating() == ()
    assert all(len(set(rows)) == 256 for rows in steps)
    assert {sum(row < 500 for row in rows) for rows in steps} == {128}
    times = Counter(row for rows in steps for row in rows if row < 500)
    assert len(times) == 500 and max(times.values()) - min(times.values()) == 1
    of_file = [row for rows in steps for row in rows if row < 500]
    first, second = of_file[:384], of_file[512:896]  # whole steps of the first and of the second time through
    assert first != second


def test_in_file_order_a_file_starts_over_once_it_is_through() -> None:
    order = MixedOrder((3, 5), (1.0, 1.0), 4, False, 0)
    assert [order.batch(step) for step in range(3)] == [(0, 1, 3, 4), (2, 0, 5, 6), (1, 2, 7, 3)]


@given(files=FILES, seed=st.integers(0, 2**32), step=st.integers(0, 100))
def test_a_resumed_run_continues_with_the_same_batches(files: list[tuple[int, float]], seed: int, step: int) -> None:
    sizes, weights = zip(*files, strict=True)
    one, other = (MixedOrder(sizes, weights, 1, True, seed) for _ in range(2))
    for earlier in range(step):
        one.batch(earlier)
    assert one.batch(step) == other.batch(step)


def test_shuffled_steps_mix_the_files_and_turns_differ() -> None:
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
