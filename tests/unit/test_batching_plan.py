from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.batching.plan import BatchPlan, micro_batches, plan_batch, plan_update, split_rows
from megarl.errors import ConfigError, Problem

PROMPTS = "data.train_batch_size"
MINI = "actor_rollout_ref.actor.ppo_mini_batch_size"
MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"


def _problems(prompts: int, n: int, mini: int, micro: int, dp: int) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        plan_batch(num_prompts=prompts, n=n, mini_batch_size=mini, micro_batch_size=micro, dp_size=dp)
    return caught.value.problems


def _overrides(fix: str) -> dict[str, int]:
    """Return what a person who types the fix sets."""
    parts = [part.split("=") for part in fix.split()]
    assert {key for key, _ in parts} <= {PROMPTS, MINI, MICRO}
    return {key: int(value) for key, value in parts}


def test_the_arithmetic_of_the_gsm8k_recipe() -> None:
    plan = plan_batch(num_prompts=256, n=4, mini_batch_size=64, micro_batch_size=4, dp_size=8)
    assert plan == BatchPlan(num_prompts=256, n=4, mini_batch_size=64, micro_batch_size=4, dp_size=8, epochs=1)
    assert (plan.num_rollouts, plan.num_mini_batches, plan.num_optimizer_steps) == (1024, 16, 16)
    assert (plan.rollouts_per_pass, plan.num_accumulation_steps) == (32, 2)
    arithmetic = [line.split("  (")[0].rstrip() for line in plan.describe().splitlines()]
    assert arithmetic == [
        "256 x 4 = 1,024 rollouts",
        "1,024 / 64 = 16 optimizer steps",
        "4 x 8 = 32 rollouts a pass",
        "64 / 32 = 2 accumulation steps",
    ]


def test_several_epochs_multiply_the_optimizer_steps() -> None:
    plan = plan_batch(num_prompts=8, n=2, mini_batch_size=4, micro_batch_size=1, dp_size=2, epochs=3)
    assert (plan.num_mini_batches, plan.num_optimizer_steps) == (4, 12)
    assert "4 x 3 = 12 optimizer steps" in plan.describe()


def test_a_mini_batch_larger_than_the_step_is_an_error_that_shows_the_arithmetic() -> None:
    (problem,) = _problems(prompts=64, n=2, mini=256, micro=16, dp=1)
    assert (problem.key, problem.value) == (MINI, 256)
    assert "data.train_batch_size 64 x actor_rollout_ref.rollout.n 2 = 128 rollouts < 256" in problem.allowed
    assert problem.fix == f"{MINI}=128"


def test_a_mini_batch_that_does_not_divide_the_step_is_an_error_that_shows_the_arithmetic() -> None:
    (problem,) = _problems(prompts=256, n=4, mini=96, micro=4, dp=8)
    assert (problem.key, problem.value) == (MINI, 96)
    assert "1,024 / 96 = 10 remainder 64" in problem.allowed
    assert problem.fix == f"{MINI}=64"


def test_a_mini_batch_that_ranks_cannot_share_is_an_error_that_shows_the_arithmetic() -> None:
    (problem,) = _problems(prompts=256, n=4, mini=16, micro=4, dp=8)
    assert (problem.key, problem.value) == (MINI, 16)
    assert f"{MICRO} 4 x 8 ranks = 32 rollouts a pass; 16 / 32 = 0 remainder 16" in problem.allowed
    assert problem.fix == f"{MINI}=32"


def test_the_fix_is_the_smallest_change_that_works() -> None:
    (smaller_micro,) = _problems(prompts=6, n=4, mini=16, micro=8, dp=2)
    assert smaller_micro.fix == f"{MINI}=12 {MICRO}=6"
    problems = _problems(prompts=7, n=4, mini=17, micro=2, dp=8)
    assert {problem.fix for problem in problems} == {f"{PROMPTS}=8 {MINI}=16"}


def test_all_problems_are_reported_together() -> None:
    problems = _problems(prompts=64, n=2, mini=300, micro=16, dp=8)
    assert ["at most" in p.allowed for p in problems] == [True, False]
    assert ["a multiple of" in p.allowed for p in problems] == [False, True]
    assert [p.key for p in _problems(prompts=0, n=-1, mini=0, micro=0, dp=1)] == [
        PROMPTS,
        "actor_rollout_ref.rollout.n",
        MINI,
        MICRO,
    ]


def test_problems_of_the_critic_name_its_own_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_batch(num_prompts=4, n=1, mini_batch_size=8, micro_batch_size=1, dp_size=1, role="critic")
    assert caught.value.problems[0].key == "critic.ppo_mini_batch_size"
    assert caught.value.problems[0].fix == "critic.ppo_mini_batch_size=4"


@settings(deadline=None)
@given(
    prompts=st.integers(1, 200),
    n=st.integers(1, 9),
    mini=st.integers(1, 300),
    micro=st.integers(1, 20),
    dp=st.integers(1, 12),
)
def test_a_plan_either_holds_exactly_or_names_a_fix_that_works(
    prompts: int, n: int, mini: int, micro: int, dp: int
) -> None:
    try:
        plan = plan_batch(num_prompts=prompts, n=n, mini_batch_size=mini, micro_batch_size=micro, dp_size=dp)
    except ConfigError as error:
        fixes = {problem.fix for problem in error.problems}
        assert len(fixes) == 1, "one fix cures all problems"
        sizes = {PROMPTS: prompts, MINI: mini, MICRO: micro} | _overrides(fixes.pop())
        plan = plan_batch(
            num_prompts=sizes[PROMPTS], n=n, mini_batch_size=sizes[MINI], micro_batch_size=sizes[MICRO], dp_size=dp
        )
    assert plan.num_mini_batches * plan.mini_batch_size == plan.num_prompts * n
    assert plan.num_accumulation_steps * plan.micro_batch_size * dp == plan.mini_batch_size


@st.composite
def _update_sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Return rollouts, mini-batch, micro-batch and ranks whose arithmetic holds."""
    micro, dp = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    mini = micro * dp * draw(st.integers(1, 4))
    return mini * draw(st.integers(1, 4)), mini, micro, dp


@settings(deadline=None)
@given(sizes=_update_sizes(), epochs=st.integers(1, 3), seed=st.none() | st.integers(0, 2**63))
def test_every_row_is_taken_exactly_once_an_epoch_in_equal_micro_batches(
    sizes: tuple[int, int, int, int], epochs: int, seed: int | None
) -> None:
    rollouts, mini, micro, dp = sizes
    steps = plan_update(rollouts, mini, micro, dp, epochs, seed)
    per_epoch = rollouts // mini
    assert len(steps) == epochs * per_epoch
    for epoch in range(epochs):
        rows = [row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step.rows]
        assert sorted(rows) == list(range(rollouts))
    for step in steps:
        assert len(step.micro_batches_by_rank) == dp
        assert {len(rank) for rank in step.micro_batches_by_rank} == {mini // (micro * dp)}
        assert {len(rows) for rank in step.micro_batches_by_rank for rows in rank} == {micro}


@settings(deadline=None)
@given(sizes=_update_sizes(), seed=st.none() | st.integers(0, 2**63))
def test_the_rows_of_an_optimizer_step_do_not_depend_on_ranks_or_micro_batches(
    sizes: tuple[int, int, int, int], seed: int | None
) -> None:
    rollouts, mini, micro, dp = sizes
    split = plan_update(rollouts, mini, micro, dp, 2, seed)
    whole = plan_update(rollouts, mini, mini, 1, 2, seed)
    assert [set(step.rows) for step in split] == [set(step.rows) for step in whole]


def test_the_order_follows_from_the_seed_and_differs_between_epochs() -> None:
    first = plan_update(64, 8, 2, 2, epochs=2, shuffle_seed=7)
    assert first == plan_update(64, 8, 2, 2, epochs=2, shuffle_seed=7)
    assert first != plan_update(64, 8, 2, 2, epochs=2, shuffle_seed=8)
    assert first[:8] != first[8:]


def test_without_a_seed_rows_keep_their_order() -> None:
    steps = plan_update(8, 4, 1, 2, epochs=1, shuffle_seed=None)
    assert [step.micro_batches_by_rank for step in steps] == [
        (((0,), (1,)), ((2,), (3,))),
        (((4,), (5,)), ((6,), (7,))),
    ]


@settings(deadline=None)
@given(num_rows=st.integers(0, 200), parts=st.integers(1, 20))
def test_a_split_is_contiguous_complete_and_near_even(num_rows: int, parts: int) -> None:
    split = split_rows(num_rows, parts)
    sizes = [len(rows) for rows in split]
    assert [row for rows in split for row in rows] == list(range(num_rows))
    assert len(split) == parts
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_micro_batches_keep_the_order_and_the_last_may_be_short() -> None:
    assert micro_batches((5, 3, 9, 1, 4), 2) == ((5, 3), (9, 1), (4,))
    assert micro_batches((), 2) == ()


def test_importing_the_plan_loads_neither_torch_nor_ray_nor_numpy() -> None:
    check = "import sys, megarl.batching.plan; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
