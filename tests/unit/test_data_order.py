from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.data.order import Order
from megarl.errors import DataError

SIZES = st.tuples(st.integers(1, 20), st.integers(0, 60)).map(lambda sizes: (sizes[0], sum(sizes)))


@given(sizes=SIZES, shuffle=st.booleans(), seed=st.integers(0, 2**63), epoch=st.integers(0, 3))
def test_an_epoch_visits_no_row_twice_and_leaves_out_less_than_a_batch(
    sizes: tuple[int, int], shuffle: bool, seed: int, epoch: int
) -> None:
    batch_size, num_rows = sizes
    order = Order(num_rows, batch_size, shuffle, seed)
    first = epoch * order.batches_per_epoch
    batches = [order.batch(first + i) for i in range(order.batches_per_epoch)]
    visited = [row for batch in batches for row in batch]
    assert all(len(batch) == batch_size for batch in batches)
    assert len(set(visited)) == len(visited) > num_rows - batch_size
    assert set(visited) <= set(range(num_rows))


@given(sizes=SIZES, seed=st.integers(0, 2**32), step=st.integers(0, 200))
def test_a_resumed_run_continues_with_the_same_batches(sizes: tuple[int, int], seed: int, step: int) -> None:
    batch_size, num_rows = sizes
    whole = [Order(num_rows, batch_size, True, seed).batch(i) for i in range(step, step + 3)]
    resumed = Order(num_rows, batch_size, True, seed)
    assert [resumed.batch(i) for i in range(step, step + 3)] == whole


def test_without_shuffle_rows_come_in_file_order_in_every_epoch() -> None:
    order = Order(num_rows=7, batch_size=3, shuffle=False, seed=0)
    assert [order.batch(step) for step in range(4)] == [(0, 1, 2), (3, 4, 5), (0, 1, 2), (3, 4, 5)]


def test_epochs_and_seeds_have_their_own_order() -> None:
    first, second = Order(100, 100, True, seed=0), Order(100, 100, True, seed=1)
    orders = [first.batch(0), first.batch(1), second.batch(0), second.batch(1)]
    assert len(set(orders)) == 4


def test_shuffle_leaves_out_other_rows_in_each_epoch() -> None:
    order = Order(num_rows=5, batch_size=4, shuffle=True, seed=0)
    assert {row for step in range(20) for row in order.batch(step)} == set(range(5))


def test_the_order_is_pinned_so_that_an_upgrade_cannot_change_a_resumed_run() -> None:
    assert Order(num_rows=10, batch_size=10, shuffle=True, seed=7).batch(3) == (0, 9, 3, 6, 5, 1, 8, 7, 4, 2)


def test_another_process_has_the_same_order() -> None:
    code = "from megarl.data.order import Order; print(Order(50, 8, True, 3).batch(9))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(Order(50, 8, True, 3).batch(9))


def test_more_rows_in_a_batch_than_there_are_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.train_batch_size = 8: there are only 7 rows"):
        Order(num_rows=7, batch_size=8, shuffle=True, seed=0)


def test_an_empty_batch_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.train_batch_size = 0: allowed: at least 1"):
        Order(num_rows=7, batch_size=0, shuffle=True, seed=0)
