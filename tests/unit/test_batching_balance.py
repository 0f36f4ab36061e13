from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.batching.balance import TokenBudget, least_loaded_first, pass_cost, spread_rows
from megarl.batching.plan import plan_batch, plan_update

COST = pass_cost(linear_size=1000, attention_width=3)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@st.composite
def budgets(draw: st.DrawFn) -> TokenBudget:
    """Draw a budget that holds every sequence of LENGTHS."""
    sequence_multiple = draw(st.sampled_from([1, 4]))
    return TokenBudget(draw(st.integers(60, 200)), COST, draw(st.integers(1, 4)), sequence_multiple)


@settings(deadline=None)
@given(lengths=LENGTHS, dp=st.integers(1, 9), budget=budgets())
def test_every_row_is_taken_once_within_the_budget_in_as_many_micro_batches_on_every_rank(
    lengths: list[int], dp: int, budget: TokenBudget
) -> None:
    by_rank = spread_rows(tuple(range(len(lengths))), lengths, dp, budget)
    assert len(by_rank) == dp
    assert sorted(row for micros in by_rank for micro in micros for row in micro) == list(range(len(lengths)))
    (count,) = {len(micros) for micros in by_rank}
    assert count % budget.multiple == 0
    for micros in by_rank:
        for micro in micros:
            multiple = budget.sequence_multiple
            assert sum(-(-lengths[row] // multiple) * multiple for row in micro) <= budget.tokens
        num_empty = sum(not micro for micro in micros)
        assert num_empty == max(0, count - sum(map(len, micros))), "empty where the rank has another row"


@settings(deadline=None)
@given(lengths=LENGTHS, dp=st.integers(1, 9), budget=budgets())
def test_no_two_ranks_differ_by_more_than_the_costliest_row(lengths: list[int], dp: int, budget: TokenBudget) -> None:
    by_rank = spread_rows(tuple(range(len(lengths))), lengths, dp, budget)
    loads = [sum(COST(lengths[row]) for micro in micros for row in micro) for micros in by_rank]
    assert max(loads) - min(loads) <= max(COST(length) for length in lengths)


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 50), min_size=1, max_size=7), parts=st.integers(1, 3))
def test_the_costliest_part_is_within_grahams_bound_of_the_best(costs: list[int], parts: int) -> None:
    found = least_loaded_first(dict(enumerate(map(float, costs))), parts)
    assert found is not None
    best = min(
        max(sum(c for c, chosen in zip(costs, choice, strict=True) if chosen == part) for part in range(parts))
        for choice in product(range(parts), repeat=len(costs))
    )
    costliest = max(sum(costs[row] for row in part) for part in found)
    assert costliest <= (4 / 3 - 1 / (3 * parts)) * best + 1e-9


@settings(deadline=None)
@given(lengths=LENGTHS, dp=st.integers(1, 9), budget=budgets(), seed=st.none() | st.integers(0, 2**63))
def test_the_rows_of_an_optimizer_step_depend_on_neither_ranks_nor_budget(
    lengths: list[int], dp: int, budget: TokenBudget, seed: int | None
) -> None:
    whole = plan_update(len(lengths) * 2, len(lengths), 1, 1, 2, seed)
    spread = budget.over(lengths * 2)
    steps = plan_update(len(lengths) * 2, len(lengths), 1, dp, 2, seed, spread)
    assert [sorted(step.rows) for step in steps] == [sorted(step.rows) for step in whole]
    assert steps == plan_update(len(lengths) * 2, len(lengths), 1, dp, 2, seed, spread)


def test_rows_are_shared_by_cost_and_not_by_count() -> None:
    budget = TokenBudget(400, cost=lambda length: float(length))
    (first,), (second,) = spread_rows(tuple(range(5)), [400, 100, 100, 100, 100], 2, budget)
    assert (first, second) == ((0,), (1, 2, 3, 4))


def test_attention_makes_one_long_row_dearer_than_many_short_ones() -> None:
    assert COST(60) > 60 * COST(1)
    assert COST(10) == 10 * 1000 + 10 * 10 * 3
    budget = TokenBudget(120, cost=lambda length: float(length**2))
    by_rank = spread_rows(tuple(range(7)), [60, 20, 20, 20, 20, 20, 20], 2, budget)
    assert by_rank == (((0,),), ((1, 2, 3, 4, 5, 6),))


def test_costly_micro_batches_run_together() -> None:
    by_rank = spread_rows(tuple(range(6)), [3, 9, 9, 3, 9, 9], 2, TokenBudget(12, cost=float))
    for micros in by_rank:
        tokens = [sum([3, 9, 9, 3, 9, 9][row] for row in micro) for micro in micros]
        assert tokens == sorted(tokens, reverse=True)


def test_fewer_rows_than_ranks_leave_ranks_with_nothing_but_keeping_step() -> None:
    assert spread_rows((7,), [5] * 8, 3, TokenBudget(10, COST, 2)) == (((7,), ()), ((), ()), ((), ()))


def test_a_budget_asks_less_of_the_mini_batch_than_a_count() -> None:
    sizes = {"num_prompts": 6, "n": 4, "mini_batch_size": 12, "micro_batch_size": 5, "dp_size": 7}
    plan = plan_batch(**sizes, max_tokens=100)  # type: ignore[arg-type]
    assert (plan.num_mini_batches, plan.num_accumulation_steps) == (2, 1)
    assert "100 tokens a micro-batch" in plan.describe()


@pytest.mark.parametrize("dp", [1, 8, 64])
def test_random_lengths_are_spread_almost_evenly(dp: int) -> None:
    lengths = [64 + (row * 7919) % 1000 for row in range(16 * dp)]
    by_rank = spread_rows(tuple(range(len(lengths))), lengths, dp, TokenBudget(2048, COST))
    loads = [sum(COST(lengths[row]) for micro in micros for row in micro) for micros in by_rank]
    assert max(loads) / (sum(loads) / dp) < 1.02


def test_a_part_without_room_is_passed_over_though_it_costs_least() -> None:
    cost, sizes = {0: 10.0, 1: 1.0, 2: 1.0}, {0: 1, 1: 3, 2: 3}
    assert least_loaded_first(cost, 2) == ((0,), (1, 2))
    assert least_loaded_first(cost, 2, sizes, limit=6) == ((0,), (1, 2))  # full to the last token
    assert least_loaded_first(cost, 2, sizes, limit=5) == ((0, 2), (1,))


def test_rows_that_no_parts_have_room_for_are_told_by_none() -> None:
    cost = dict.fromkeys(range(3), 1.0)
    assert least_loaded_first(cost, 2, dict.fromkeys(cost, 3), limit=5) is None
    assert least_loaded_first(cost, 3, dict.fromkeys(cost, 3), limit=3) == ((0,), (1,), (2,))


def test_no_more_micro_batches_are_made_than_the_fullest_rank_needs() -> None:
    budget = TokenBudget(10, float)
    assert spread_rows((0, 1, 2, 3), [5, 5, 5, 5], 2, budget) == (((0, 2),), ((1, 3),))
    assert spread_rows((0, 1, 2), [6, 6, 6], 1, budget) == (((0,), (1,), (2,)),)
    assert spread_rows((), [], 2, budget) == (((),), ((),))
