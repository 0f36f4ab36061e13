from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarl.algorithm.loss_specs import DemonstrationLossSpec
from megarl.batching.pack import sequences_to_batch
from megarl.batching.size import rollouts_a_pass, tokens_a_pass
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.monitor.timing import Stopwatch
from megarl.parallel.layout import Layout
from megarl.train.work import ScoreWork, Updated, UpdateWork
from megarl.types import PolicyBatch, Sequences
from tests.unit.small_roles import TRAINING, role_on
from tests.unit.stand_ins import PlainRanks

LAYOUTS = [
    Layout(1),
    Layout(4),
    Layout(4, tp=2),
    Layout(4, pp=2),
    Layout(8, tp=2, pp=2),
    Layout(8, tp=2, cp=2),
    Layout(12, cp=2, pp=2),
    Layout(8, pp=2, vpp=2),
]
LENGTHS = [9, 3, 7, 7, 2, 8, 5, 4, 9, 6, 3, 2]


def _sequences(lengths: list[int]) -> Sequences:
    """Return rows whose tokens are all different, of which the first two don't count."""
    tokens = [[100 * row + place for place in range(length)] for row, length in enumerate(lengths, start=1)]
    return sequences_to_batch(tokens, [[place > 1 for place in range(length)] for length in lengths])


def _policy_batch(lengths: list[int], *, first_is_on_policy: bool) -> PolicyBatch:
    sequences = _sequences(lengths)
    advantages_BS = torch.zeros(sequences.tokens_BS.shape)
    return PolicyBatch(**vars(sequences), advantages_BS=advantages_BS, first_is_on_policy=first_is_on_policy)


def _of_tokens(sequences: Sequences) -> Tensor:
    """Return a number for every masked token that tells which it is, zero elsewhere."""
    return torch.where(sequences.mask_BS, sequences.tokens_BS / 8, 0.0)


class Ranks:
    """What a rank's Worker does, without a model: tokens stand for their log-probs."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __call__(self, rank: int, verb: str, argument: Any) -> Any:
        """Answer on the rank that reports results."""
        answer = self.score(argument) if verb == "score" else self.update(argument)
        return answer if rank in self.layout.output_ranks() else None

    def score(self, work: ScoreWork) -> Tensor:
        """Return the tokens of every row at the temperature."""
        assert type(work.sequences) is Sequences  # a pass is sent no columns that it doesn't read
        assert sorted(row for micro in work.micro_batches for row in micro) == list(range(len(work.sequences)))
        return _of_tokens(work.sequences) * work.temperature

    def update(self, work: UpdateWork) -> Updated:
        """Return this rank's share of the tokens as a metric, and the tokens of steps on policy."""
        metrics, logprobs_BS = [], torch.zeros(work.batch.tokens_BS.shape)
        for number, step in enumerate(work.steps):
            rows = [row for micro in step.micro_batches for row in micro]
            tokens = float(work.batch.mask_BS[rows].sum())
            metrics.append({"tokens": tokens, "whole": tokens / max(step.total_tokens, 1), "lr": number + 1.0})
            if step.is_on_policy:
                logprobs_BS[rows] = _of_tokens(work.batch)[rows]
        is_wanted = any(step.is_on_policy for step in work.steps)
        return Updated(tuple(metrics), logprobs_BS if is_wanted else None)


def _actor(
    layout: Layout, budget: int | None = None, *, mini_batch_size: int = 12, epochs: int = 1, shuffle: bool = False
) -> tuple[RoleOnRanks, PlainRanks]:
    """Return an actor with micro-batches of 1 rollout, or of ``budget`` tokens, and its ranks."""
    size = rollouts_a_pass("count", 1, 9, layout) if budget is None else tokens_a_pass("budget", budget, 9, layout)
    training = replace(TRAINING, mini_batch_size=mini_batch_size, epochs=epochs, shuffle=shuffle)
    role = replace(role_on(layout), scoring=size, update=size, training=training)
    ranks = PlainRanks(layout.world_size, Ranks(layout))
    return RoleOnRanks(role, ranks, 1, Stopwatch(), DemonstrationLossSpec(), temperature=0.5), ranks


def _peers(layout: Layout, arguments: list[Any]) -> dict[int, set[int]]:
    """Return for every data-parallel rank which objects its ranks are given."""
    given: dict[int, set[int]] = {}
    for rank, argument in enumerate(arguments):
        given.setdefault(layout.coordinates(rank).dp, set()).add(id(argument))
    return given


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("budget", [None, 12])
def test_scores_come_back_in_the_order_of_the_rows_whatever_the_layout(layout: Layout, budget: int | None) -> None:
    actor, ranks = _actor(layout, budget)
    batch = _policy_batch(LENGTHS, first_is_on_policy=True)
    assert actor.logprobs(batch).equal(_of_tokens(batch) * 0.5)
    assert actor.logprobs(batch, temperature=1.0).equal(_of_tokens(batch))
    assert actor.values(batch).equal(_of_tokens(batch))  # values have no temperature
    assert ranks.verbs() == ["score"] * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=14), st.sampled_from(LAYOUTS), st.sampled_from([None, 9, 20]))
def test_any_number_of_rows_of_any_lengths_is_scored_in_order(
    lengths: list[int], layout: Layout, budget: int | None
) -> None:
    actor, _ = _actor(layout, budget)
    sequences = _sequences(lengths)
    assert actor.logprobs(sequences).equal(_of_tokens(sequences) * 0.5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_that_share_rows_are_given_one_object_and_others_another(layout: Layout) -> None:
    actor, ranks = _actor(layout)
    actor.logprobs(_sequences(LENGTHS))
    actor.update(_policy_batch(LENGTHS, first_is_on_policy=False), step=1)
    for _, arguments in ranks.calls:
        peers = _peers(layout, arguments)
        assert len(peers) == layout.dp and all(len(objects) == 1 for objects in peers.values())
        assert len(set.union(*peers.values())) == layout.dp


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_log_probs_of_some_rows_are_zero_in_all_others(layout: Layout) -> None:
    actor, _ = _actor(layout)
    sequences, rows = _sequences(LENGTHS), [1, 5, 6]
    expected_BS = torch.zeros(sequences.tokens_BS.shape)
    expected_BS[rows] = _of_tokens(sequences)[rows] * 0.5
    assert actor.logprobs(sequences, rows).equal(expected_BS)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=12, max_size=12),
    st.sampled_from([Layout(1), Layout(2), Layout(4, tp=2), Layout(3)]),
    st.sampled_from([None, 20]),
    st.booleans(),
    st.integers(1, 50),
)
def test_the_rows_of_the_first_mini_batch_and_the_later_ones_are_all_rows_once(
    lengths: list[int], layout: Layout, budget: int | None, shuffle: bool, step: int
) -> None:
    actor, ranks = _actor(layout, budget, mini_batch_size=6, shuffle=shuffle)
    sequences = _sequences(lengths)
    later, first = actor.later_rows(sequences, step), actor.plan(sequences, step)[0].rows
    assert sorted([*first, *later]) == list(range(12))
    assert later == sorted(later)
    # And the update takes the same rows first.
    actor.update(PolicyBatch(**vars(sequences), advantages_BS=torch.zeros(sequences.tokens_BS.shape)), step)
    works = {layout.coordinates(rank).dp: work for rank, work in enumerate(ranks.calls[-1][1])}
    taken = [
        int(work.batch.tokens_BS[row, 0]) // 100 - 1
        for work in works.values()
        for micro in work.steps[0].micro_batches
        for row in micro
    ]
    assert sorted(taken) == sorted(first)


def test_an_order_that_is_shuffled_is_another_in_every_step_and_the_same_when_it_is_asked_for_again() -> None:
    shuffled, plain = (_actor(Layout(2), mini_batch_size=6, shuffle=shuffle)[0] for shuffle in (True, False))
    sequences = _sequences(LENGTHS)
    assert shuffled.plan(sequences, 3) == shuffled.plan(sequences, 3) != shuffled.plan(sequences, 4)
    assert plain.later_rows(sequences, 3) == plain.later_rows(sequences, 4) == [6, 7, 8, 9, 10, 11]
    assert _actor(Layout(2))[0].later_rows(sequences, 3) == []  # one mini-batch


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_metrics_of_an_update_are_sums_over_data_parallel_ranks_and_means_over_optimizer_steps(layout: Layout) -> None:
    actor, _ = _actor(layout, mini_batch_size=4, epochs=2)
    batch = _policy_batch(LENGTHS, first_is_on_policy=False)
    update = actor.update(batch, step=1)
    assert update.logprobs_BS is None
    assert update.metrics == {
        "actor/tokens": pytest.approx(float(batch.mask_BS.sum()) / 3),  # of each of 3 mini-batches
        "actor/whole": pytest.approx(1.0),  # every rank normalises by the tokens of the whole mini-batch
        "actor/lr": 3.5,  # of 6 steps, each known to every rank alike
        "actor/num_optimizer_steps": 6.0,
        "actor/num_skipped": 0.0,
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("budget", [None, 12])
def test_log_probs_of_the_first_mini_batch_come_back_with_the_update_where_it_is_on_policy(
    layout: Layout, budget: int | None
) -> None:
    num_rows = 12 * layout.dp
    lengths = (LENGTHS * layout.dp)[:num_rows]
    actor, ranks = _actor(layout, budget, mini_batch_size=num_rows // 2, shuffle=True)
    batch = _policy_batch(lengths, first_is_on_policy=True)
    update = actor.update(batch, step=2)
    expected_BS = _of_tokens(batch)
    expected_BS[actor.later_rows(batch, 2)] = 0.0
    assert update.logprobs_BS is not None and update.logprobs_BS.equal(expected_BS)
    for work in ranks.calls[-1][1]:
        assert [step.is_on_policy for step in work.steps] == [True, False]


def test_only_a_role_that_is_trained_is_updated() -> None:
    frozen = RoleOnRanks(role_on(Layout(1), name="ref", training=None), PlainRanks(1), 1, Stopwatch())
    with pytest.raises(AssertionError):
        frozen.update(_sequences(LENGTHS), step=1)


def test_the_seconds_of_a_pass_are_counted_by_role() -> None:
    actor, _ = _actor(Layout(1))
    actor.logprobs(_sequences(LENGTHS))
    assert list(actor.stopwatch.drain()) == ["score_actor"]
