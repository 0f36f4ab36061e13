from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.batching.size import rank_tokens, rollouts_a_pass, tokens_a_pass
from megarl.parallel.layout import Layout


def test_the_longest_micro_batch_is_that_of_the_budget_or_of_the_longest_rollouts() -> None:
    assert tokens_a_pass("budget", 1000, 300, Layout(8)).most_tokens == 1000
    assert rollouts_a_pass("count", 16, 300, Layout(8)).most_tokens == 16 * 300


def test_a_budget_holds_as_many_of_the_longest_rollouts_as_fit_whole() -> None:
    sizes = [tokens_a_pass("budget", tokens, 300, Layout(8)).micro_batch_size for tokens in (299, 300, 599, 600, 1000)]
    assert sizes == [1, 1, 1, 2, 3]  # one that holds none is for a rule to report
    split = tokens_a_pass("budget", 303, 301, Layout(8, cp=2))
    assert (split.max_tokens, split.longest_tokens, split.micro_batch_size) == (606, 304, 1)


def test_a_device_has_its_part_of_every_sequence_so_a_rank_has_room_for_what_its_devices_have_together() -> None:
    assert rank_tokens(1000, Layout(8)) == 1000
    assert rank_tokens(1000, Layout(8, cp=4)) == 4000


def test_sequence_parallelism_splits_positions_evenly_so_a_device_has_room_for_a_multiple_of_tp_alone() -> None:
    assert rank_tokens(1003, Layout(8, tp=4)) == 1003
    assert rank_tokens(1003, Layout(8, tp=4, sequence_parallel=True)) == 1000
    assert rank_tokens(1003, Layout(8, tp=4, cp=2, sequence_parallel=True)) == 2000


def test_context_ranks_take_two_parts_of_every_sequence_each() -> None:
    assert [rollouts_a_pass("count", 1, 301, Layout(8, cp=cp)).sequence_multiple for cp in (1, 2, 4)] == [1, 4, 8]
    assert [rollouts_a_pass("count", 1, 301, Layout(8, cp=cp)).longest_tokens for cp in (1, 2, 4)] == [301, 304, 304]


@given(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 8]), st.booleans(), st.integers(1, 400))
def test_the_least_budget_holds_the_longest_rollout_and_one_less_does_not(
    cp: int, tp: int, sequence_parallel: bool, sequence: int
) -> None:
    layout = Layout(cp * tp, tp, cp=cp, sequence_parallel=sequence_parallel)
    size = tokens_a_pass("budget", 1, sequence, layout)
    assert size.longest_tokens >= sequence and size.longest_tokens % size.sequence_multiple == 0
    assert rank_tokens(size.least_value, layout) >= size.longest_tokens
    assert rank_tokens(size.least_value - 1, layout) < size.longest_tokens


@pytest.mark.parametrize("cp", [1, 2])
def test_a_count_of_rollouts_is_taken_as_it_is(cp: int) -> None:
    size = rollouts_a_pass("count", 5, 300, Layout(8, cp=cp))
    assert (size.key, size.value, size.micro_batch_size, size.max_tokens) == ("count", 5, 5, None)
