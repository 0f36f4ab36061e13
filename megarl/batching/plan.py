"""Batch arithmetic: how many rollouts and steps a run has, and which rows each rank takes in each of them.

Standard library alone, so that a config can be checked in milliseconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

from megarl.batching.divisors import divisors
from megarl.errors import ConfigError, Problem

Rows = tuple[int, ...]

# Gives the rows of an optimizer step to data-parallel ranks, in micro-batches, as many on every rank.
Spread = Callable[[Rows, int], tuple[tuple[Rows, ...], ...]]

_PROMPTS_KEY = "data.train_batch_size"
_N_KEY = "actor_rollout_ref.rollout.n"


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a step that holds. Everything but ``num_prompts`` counts rollouts, not prompts.

    micro_batch_size counts the rollouts of one forward/backward on one of ``dp_size`` data-parallel ranks. Where
    max_tokens is given, that many tokens bound a micro-batch instead, and micro_batch_size is how many rollouts of the
    longest kind fit.
    """

    num_prompts: int
    n: int
    mini_batch_size: int
    micro_batch_size: int
    dp_size: int
    epochs: int
    max_tokens: int | None = None

    @property
    def num_rollouts(self) -> int:
        """Rollouts of a step."""
        return self.num_prompts * self.n

    @property
    def num_mini_batches(self) -> int:
        """Mini-batches, and so optimizer steps, of one epoch over the rollouts of a step."""
        return self.num_rollouts // self.mini_batch_size

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of a step, over all its epochs."""
        return self.num_mini_batches * self.epochs

    @property
    def rollouts_per_pass(self) -> int:
        """Rollouts of one forward/backward over all data-parallel ranks."""
        return self.micro_batch_size * self.dp_size

    @property
    def num_accumulation_steps(self) -> int:
        """Micro-batches of each rank in one optimizer step; where tokens bound them, if all are the longest."""
        return -(-self.mini_batch_size // self.rollouts_per_pass)

    def describe(self, *, are_examples: bool = False) -> str:
        """Return the arithmetic as lines for people. are_examples: of supervised fine-tuning, a step of one batch."""
        lines = [
            (f"{self.num_prompts:,} x {self.n:,} = {self.num_rollouts:,} rollouts", "prompts x n"),
            (
                f"{self.num_rollouts:,} / {self.mini_batch_size:,} = {self.num_mini_batches:,} optimizer steps",
                "rollouts / mini-batch, an epoch",
            ),
        ]
        if are_examples:
            lines = [(f"{self.num_rollouts:,} examples", "a step, which is one optimizer step")]
        lines += (
            self._pass_lines("examples" if are_examples else "rollouts")
            if self.max_tokens is None
            else (self._budget_lines())
        )
        if self.epochs > 1:
            total = f"{self.num_mini_batches:,} x {self.epochs:,} = {self.num_optimizer_steps:,} optimizer steps"
            lines.insert(2, (total, "all epochs over these rollouts"))
        width = max(len(arithmetic) for arithmetic, _ in lines)
        return "\n".join(f"{arithmetic:<{width}}  ({meaning})" for arithmetic, meaning in lines)

    def _pass_lines(self, counted: str) -> list[tuple[str, str]]:
        return [
            (
                f"{self.micro_batch_size:,} x {self.dp_size:,} = {self.rollouts_per_pass:,} {counted} a pass",
                "micro-batch x data-parallel ranks",
            ),
            (
                f"{self.mini_batch_size:,} / {self.rollouts_per_pass:,} = "
                f"{self.num_accumulation_steps:,} accumulation steps",
                f"{'batch' if counted == 'examples' else 'mini-batch'} / pass",
            ),
        ]

    def _budget_lines(self) -> list[tuple[str, str]]:
        return [
            (
                f"{self.max_tokens:,} tokens a micro-batch",
                f"at most; rollouts are spread over {self.dp_size:,} data-parallel ranks by cost",
            ),
            (
                f"{self.num_accumulation_steps:,} accumulation steps",
                f"where every rollout is of the longest kind: {self.micro_batch_size:,} a micro-batch; else fewer",
            ),
        ]


def plan_batch(
    *,
    num_prompts: int,
    n: int,
    mini_batch_size: int,
    micro_batch_size: int,
    dp_size: int,
    epochs: int = 1,
    role: str = "actor_rollout_ref.actor",
    max_tokens: int | None = None,
) -> BatchPlan:
    """Return the batch arithmetic of a step.

    max_tokens: of a micro-batch, which then holds as many rollouts as fit: mini-batches need not divide by ranks.
    role: the section that the sizes were read from, for the keys in errors (``critic`` for the critic's).

    Raises ConfigError with every problem and one fix that cures them all.
    """
    assert dp_size >= 1, f"dp_size {dp_size}: the layout gives at least one data-parallel rank"
    plan = BatchPlan(num_prompts, n, mini_batch_size, micro_batch_size, dp_size, epochs, max_tokens)
    problems = _range_problems(plan, role) or _arithmetic_problems(plan, role)
    if problems:
        raise ConfigError(problems)
    return plan


def _range_problems(plan: BatchPlan, role: str) -> list[Problem]:
    sizes = {
        _PROMPTS_KEY: plan.num_prompts,
        _N_KEY: plan.n,
        f"{role}.ppo_mini_batch_size": plan.mini_batch_size,
        f"{role}.ppo_micro_batch_size_per_gpu": plan.micro_batch_size,
        f"{role}.ppo_epochs": plan.epochs,
    }
    return [Problem(key, size, "at least 1", f"{key}=1 or more") for key, size in sizes.items() if size < 1]


def _arithmetic_problems(plan: BatchPlan, role: str) -> list[Problem]:
    rollouts, mini, a_pass = plan.num_rollouts, plan.mini_batch_size, plan.rollouts_per_pass
    of_a_step = f"{_PROMPTS_KEY} {plan.num_prompts:,} x {_N_KEY} {plan.n:,} = {rollouts:,} rollouts"
    allowed = []
    if mini > rollouts:
        allowed.append(f"at most the rollouts of a step (it counts rollouts): {of_a_step} < {mini:,}")
    elif rollouts % mini:
        allowed.append(
            f"a divisor of the rollouts of a step (it counts rollouts): {of_a_step}; "
            f"{rollouts:,} / {mini:,} = {rollouts // mini:,} remainder {rollouts % mini:,}"
        )
    if plan.max_tokens is None and mini % a_pass:
        allowed.append(
            f"a multiple of micro-batch x data-parallel ranks: {role}.ppo_micro_batch_size_per_gpu "
            f"{plan.micro_batch_size:,} x {plan.dp_size:,} ranks = {a_pass:,} rollouts a pass; "
            f"{mini:,} / {a_pass:,} = {mini // a_pass:,} remainder {mini % a_pass:,}"
        )
    return [Problem(f"{role}.ppo_mini_batch_size", mini, text, _fix(plan, role)) for text in allowed]


def _fix(plan: BatchPlan, role: str) -> str:
    """Return overrides that make the arithmetic hold.

    The mini-batch alone where that is enough, with a smaller micro-batch where it isn't; more prompts as a last resort.
    """
    rollouts, mini_key = plan.num_rollouts, f"{role}.ppo_mini_batch_size"
    if plan.max_tokens is not None:
        return f"{mini_key}={_nearest_mini_batch_size(rollouts, 1, plan.mini_batch_size)}"
    if rollouts % plan.dp_size == 0:
        micro = max(n for n in divisors(rollouts // plan.dp_size) if n <= plan.micro_batch_size)
        mini = _nearest_mini_batch_size(rollouts, micro * plan.dp_size, plan.mini_batch_size)
        smaller = f" {role}.ppo_micro_batch_size_per_gpu={micro}" if micro < plan.micro_batch_size else ""
        return f"{mini_key}={mini}{smaller}"
    a_pass = plan.rollouts_per_pass
    mini = max(round(plan.mini_batch_size / a_pass), 1) * a_pass
    prompts_per_mini = mini // gcd(mini, plan.n)
    prompts = -(-plan.num_prompts // prompts_per_mini) * prompts_per_mini
    return f"{_PROMPTS_KEY}={prompts} {mini_key}={mini}"


def _nearest_mini_batch_size(rollouts: int, a_pass: int, wanted: int) -> int:
    """Return the multiple of ``a_pass`` dividing ``rollouts`` that is nearest to ``wanted``, the smaller of two."""
    sizes = [a_pass * n for n in divisors(rollouts // a_pass)]
    return min(sizes, key=lambda size: (abs(size - wanted), size))


@dataclass(frozen=True)
class MiniBatch:
    """The rows of one optimizer step: for each data-parallel rank its micro-batches, as many on every rank."""

    micro_batches_by_rank: tuple[tuple[Rows, ...], ...]

    @property
    def rows(self) -> Rows:
        """All rows of the mini-batch, rank after rank."""
        return tuple(row for rank in self.micro_batches_by_rank for micro in rank for row in micro)


def plan_update(
    num_rollouts: int,
    mini_batch_size: int,
    micro_batch_size: int,
    dp_size: int,
    epochs: int,
    shuffle_seed: int | None,
    spread: Spread | None = None,
) -> tuple[MiniBatch, ...]:
    """Return the optimizer steps over the rollouts of a step, in order; each epoch takes every row exactly once.

    The sizes are those of a ``BatchPlan``. Rows keep their order where ``shuffle_seed`` is None, else each epoch has
    an order of its own. Which rows share an optimizer step depends on neither ``dp_size`` nor ``micro_batch_size``,
    so that all layouts do the same mathematics. spread: where given, it and not ``micro_batch_size`` decides which rank
    and micro-batch has a row of an optimizer step; see ``megarl.batching.balance``.
    """
    assert num_rollouts % mini_batch_size == 0, f"{num_rollouts} rollouts in mini-batches of {mini_batch_size}"
    a_pass = micro_batch_size * dp_size
    assert spread or mini_batch_size % a_pass == 0, f"{mini_batch_size} / ({micro_batch_size} x {dp_size})"
    rng = None if shuffle_seed is None else random.Random(shuffle_seed)
    steps = []
    for _ in range(epochs):
        order = list(range(num_rollouts))
        if rng is not None:
            rng.shuffle(order)
        for rows in micro_batches(order, mini_batch_size):
            parts = spread(rows, dp_size) if spread else _even_parts(rows, micro_batch_size, dp_size)
            steps.append(MiniBatch(parts))
    return tuple(steps)


def _even_parts(rows: Rows, micro_batch_size: int, dp_size: int) -> tuple[tuple[Rows, ...], ...]:
    by_rank = micro_batches(rows, len(rows) // dp_size)
    return tuple(micro_batches(mine, micro_batch_size) for mine in by_rank)


def split_rows(num_rows: int, parts: int) -> tuple[Rows, ...]:
    """Split rows 0 .. num_rows - 1 into contiguous parts whose sizes differ by one at most, the larger first."""
    size, larger = divmod(num_rows, parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return tuple(tuple(range(start, stop)) for start, stop in pairwise(starts))


def cut(rows: Rows, size: int, count: int) -> tuple[Rows, ...]:
    """Cut rows into ``count`` micro-batches: of ``size`` if that gives as many, else near-even."""
    even = micro_batches(rows, size)
    if len(even) == count:
        return even
    return tuple(tuple(rows[i] for i in places) for places in split_rows(len(rows), count))


def micro_batches(rows: Sequence[int], size: int) -> tuple[Rows, ...]:
    """Cut rows into consecutive pieces of ``size``; the last may be shorter."""
    return tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))
