from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.batching.pack import MicroBatch, pack, rollouts_to_batch, sequences_to_batch
from megarl.types import Rollout, RolloutBatch

Case = tuple[list[list[int]], list[list[bool]], list[int]]


@st.composite
def sequences(draw: st.DrawFn) -> Case:
    """Draw one to six sequences of distinct positive tokens, masks that may have holes or be empty, and an order."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    ids = [[100 * (row + 1) + column for column in range(length)] for row, length in enumerate(lengths)]
    masks = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    return ids, masks, draw(st.permutations(range(len(ids))))


def _lines(micro: MicroBatch) -> list[list[int]]:
    """Return the tokens of each sequence of a micro-batch, alignment padding included."""
    if micro.lengths:
        return [part.tolist() for part in micro.tokens[0].split(list(micro.lengths))]
    return micro.tokens.tolist()


def test_the_rows_of_a_batch_are_padded_on_the_right_and_their_first_token_is_not_predicted() -> None:
    batch = sequences_to_batch([[5, 6, 7], [8]], [[True, False, True], [True]])
    assert batch.tokens_BS.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.lengths_B.tolist() == [3, 1]
    assert batch.mask_BS.tolist() == [[False, False, True], [False, False, False]]
    assert (batch.tokens_BS.dtype, batch.mask_BS.dtype, len(batch)) == (torch.int64, torch.bool, 2)


def test_packed_rows_lie_end_to_end_with_positions_of_their_own() -> None:
    batch = sequences_to_batch([[5, 6, 7], [8, 9]], [[False, True, True], [False, True]])
    micro = pack(batch, [1, 0], packed=True)
    assert micro.tokens.tolist() == [[8, 9, 5, 6, 7]]
    assert micro.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert micro.lengths == (2, 3)
    assert micro.predict_N.tolist() == [0, 2, 3]
    assert micro.targets_N.tolist() == [9, 6, 7]
    assert (micro.row_N.tolist(), micro.column_N.tolist()) == ([1, 0, 0], [1, 1, 2])


def test_packed_positions_are_rounded_up_with_a_sequence_of_padding() -> None:
    batch = sequences_to_batch([[5, 6, 7], [8, 9]], [[False, True, True], [False, True]])
    micro = pack(batch, [0, 1], packed=True, multiple=4)
    assert micro.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert micro.lengths == (3, 2, 3)
    assert pack(batch, [0, 1], packed=True, multiple=5).lengths == (3, 2)


def test_padded_rows_have_a_line_each() -> None:
    batch = sequences_to_batch([[5, 6, 7], [8, 9]], [[False, True, True], [False, True]])
    micro = pack(batch, [1, 0], packed=False, multiple=4)
    assert micro.tokens.tolist() == [[8, 9, 0, 0], [5, 6, 7, 0]]
    assert micro.positions.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert micro.lengths == ()
    assert micro.predict_N.tolist() == [0, 4, 5]


def test_every_token_says_which_of_the_rows_it_belongs_to_and_padding_that_it_belongs_to_none() -> None:
    batch = sequences_to_batch([[5, 6, 7], [8, 9]], [[False, True, True], [False, True]])
    assert pack(batch, [1, 0], packed=True, multiple=4).sequences.tolist() == [[1, 1, 2, 2, 2, 0, 0, 0]]
    assert pack(batch, [1, 0], packed=False, multiple=4).sequences.tolist() == [[1, 1, 0, 0], [2, 2, 2, 0]]
    of_rank = [pack(batch, [1, 0], packed=True, cp=2, cp_rank=rank).sequences.tolist() for rank in (0, 1)]
    assert of_rank == [[[1, 0, 2, 0]], [[1, 0, 2, 2]]]


def test_a_position_that_another_context_rank_has_is_minus_one() -> None:
    batch = sequences_to_batch([[5, 6, 7, 8], [8, 9]], [[False, True, True, True], [False, True]])
    first, second = (pack(batch, [0, 1], packed=True, cp=2, cp_rank=rank) for rank in (0, 1))
    # Of four parts the first rank has the outer two, the second the inner two.
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([[5, 8, 8, 0]], [[6, 7, 9, 0]])
    assert (first.predict_N.tolist(), second.predict_N.tolist()) == ([0, -1, -1, 2], [-1, 0, 1, -1])
    assert (first.last_R.tolist(), second.last_R.tolist()) == ([1, -1], [-1, 2])


def test_a_row_may_be_left_out_and_the_longest_rows_length_does_not_matter_then() -> None:
    batch = sequences_to_batch([[1] * 9, [8, 9]], [[True] * 9, [False, True]])
    assert pack(batch, [1], packed=False).tokens.tolist() == [[8, 9]]
    assert pack(batch, [1], packed=True).tokens.tolist() == [[8, 9]]


def test_holes_in_a_mask_are_not_predicted_from_or_to() -> None:
    batch = sequences_to_batch([[1, 2, 3, 4, 5]], [[False, True, False, False, True]])
    micro = pack(batch, [0], packed=True)
    assert (micro.predict_N.tolist(), micro.targets_N.tolist()) == ([0, 3], [2, 5])
    assert micro.column_N.tolist() == [1, 4]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("multiple", [1, 4])
def test_no_rows_at_all_are_padding_that_predicts_nothing(packed: bool, multiple: int) -> None:
    micro = pack(sequences_to_batch([[5, 6]], [[False, True]]), [], packed=packed, multiple=multiple)
    assert micro.tokens.tolist() == micro.positions.tolist() == [[0] * multiple]
    assert micro.lengths == ((multiple,) if packed else ())
    assert all(len(t) == 0 for t in (micro.predict_N, micro.targets_N, micro.row_N, micro.column_N))
    assert len(micro.row_R) == len(micro.last_R) == 0
    assert {t.dtype for t in (micro.predict_N, micro.row_R, micro.last_R)} == {torch.int64}


@settings(max_examples=300, deadline=None)
@given(sequences(), st.booleans(), st.integers(1, 8))
def test_every_masked_token_is_predicted_once_from_the_token_before_it(case: Case, packed: bool, multiple: int) -> None:
    ids, masks, rows = case
    micro = pack(sequences_to_batch(ids, masks), rows, packed=packed, multiple=multiple)
    tokens = micro.tokens.flatten()
    predicted = [(r, c) for r in rows for c in range(1, len(ids[r])) if masks[r][c]]
    assert list(zip(micro.row_N.tolist(), micro.column_N.tolist(), strict=True)) == predicted
    assert micro.targets_N.tolist() == [ids[r][c] for r, c in predicted]
    assert tokens[micro.predict_N].tolist() == [ids[r][c - 1] for r, c in predicted]
    assert micro.positions.flatten()[micro.predict_N].tolist() == [c - 1 for _, c in predicted]
    assert micro.row_R.tolist() == rows
    assert tokens[micro.last_R].tolist() == [ids[row][-1] for row in rows]


@settings(max_examples=300, deadline=None)
@given(sequences(), st.booleans(), st.integers(1, 8))
def test_every_sequence_is_laid_out_whole_and_the_sizes_are_multiples(case: Case, packed: bool, multiple: int) -> None:
    ids, masks, rows = case
    micro = pack(sequences_to_batch(ids, masks), rows, packed=packed, multiple=multiple)
    lines = _lines(micro)
    assert [[token for token in line if token] for line in lines if any(line)] == [ids[row] for row in rows]
    assert micro.tokens.shape == micro.positions.shape and micro.tokens.shape[1] % multiple == 0
    if packed:
        assert sum(micro.lengths) == micro.tokens.numel() < sum(map(len, ids)) + multiple
    else:
        assert micro.tokens.shape[0] == len(ids) and micro.tokens.shape[1] < max(map(len, ids)) + multiple


@settings(max_examples=300, deadline=None)
@given(sequences(), st.booleans(), st.integers(1, 3), st.integers(2, 4))
def test_one_context_rank_predicts_each_masked_token_from_the_token_before_it(
    case: Case, packed: bool, multiple: int, cp: int
) -> None:
    ids, masks, rows = case
    batch = sequences_to_batch(ids, masks)
    shares = [pack(batch, rows, packed=packed, multiple=multiple, cp=cp, cp_rank=rank) for rank in range(cp)]
    whole = pack(batch, rows, packed=packed)
    own = [share.predict_N >= 0 for share in shares]
    assert (torch.stack(own).sum(0) == 1).all()
    for share, own_N in zip(shares, own, strict=True):
        for name in ("targets_N", "row_N", "column_N"):
            assert getattr(share, name).equal(getattr(whole, name))
        before = [ids[r][c - 1] for r, c in zip(share.row_N.tolist(), share.column_N.tolist(), strict=True)]
        assert share.tokens.flatten()[share.predict_N[own_N]].tolist() == torch.tensor(before)[own_N].tolist()
        assert share.positions.flatten()[share.predict_N].eq(share.column_N - 1)[own_N].all()
        assert share.tokens.shape == shares[0].tokens.shape and share.tokens.shape[1] % multiple == 0
    last = [share.last_R >= 0 for share in shares]
    assert (torch.stack(last).sum(0) == 1).all()
    for share, own_R in zip(shares, last, strict=True):
        assert share.row_R.tolist() == rows
        ends = torch.tensor([ids[row][-1] for row in rows])
        assert share.tokens.flatten()[share.last_R[own_R]].equal(ends[own_R])
    held = torch.cat([share.tokens.flatten() for share in shares])
    assert sorted(held[held > 0].tolist()) == sorted(token for line in ids for token in line)


def test_a_column_of_the_batch_is_read_where_tokens_are_predicted() -> None:
    batch = sequences_to_batch([[5, 6, 7], [8, 9]], [[False, False, True], [False, True]])
    values_BS = torch.arange(6.0).reshape(2, 3)
    assert pack(batch, [1, 0], packed=True).column(values_BS).tolist() == [4.0, 2.0]


def _rollout(ids: Sequence[int], version: int = 0) -> Rollout:
    return Rollout(tuple(ids), tuple(-0.5 * (i + 1) for i in range(len(ids))), "stop", version)


def test_rollouts_follow_their_prompts_and_are_masked_while_prompts_are_not() -> None:
    groups = [[_rollout([7, 8], 3), _rollout([9], 4)], [_rollout([5], 4)]]
    batch = rollouts_to_batch([[1, 2], [3]], groups)
    assert batch.tokens_BS.tolist() == [[1, 2, 7, 8], [1, 2, 9, 0], [3, 5, 0, 0]]
    assert batch.lengths_B.tolist() == [4, 3, 2]
    assert batch.mask_BS.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert batch.group_B.tolist() == [0, 0, 1]
    assert batch.policy_version_B is not None and batch.policy_version_B.tolist() == [3, 4, 4]
    assert batch.rollout_logprobs_BS is not None
    assert batch.rollout_logprobs_BS.tolist() == [[0, 0, -0.5, -1], [0, 0, -0.5, 0], [0, -0.5, 0, 0]]
    assert batch.rollout_logprobs_BS.dtype == torch.float32


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 5), min_size=1, max_size=4)), min_size=1, max_size=4)
)
def test_every_rollout_of_any_length_is_there_with_its_logprobs(shapes: list[tuple[int, list[int]]]) -> None:
    prompts = [[1 + g] * length for g, (length, _) in enumerate(shapes)]
    groups = [[_rollout(range(10, 10 + n)) for n in responses] for _, responses in shapes]
    batch = rollouts_to_batch(prompts, groups)
    flat = [(g, prompt, rollout) for g, prompt in enumerate(prompts) for rollout in groups[g]]
    assert len(batch) == len(flat) and batch.rollout_logprobs_BS is not None
    for row, (group, prompt, rollout) in enumerate(flat):
        length = int(batch.lengths_B[row])
        assert batch.tokens_BS[row, :length].tolist() == [*prompt, *rollout.token_ids]
        assert batch.tokens_BS[row, batch.mask_BS[row]].tolist() == list(rollout.token_ids)
        assert batch.rollout_logprobs_BS[row, batch.mask_BS[row]].tolist() == list(rollout.logprobs)
        assert int(batch.group_B[row]) == group
    assert not batch.rollout_logprobs_BS[~batch.mask_BS].any()


def test_rows_of_a_batch_keep_all_their_columns_in_the_order_asked_for() -> None:
    batch = rollouts_to_batch([[1], [2], [3]], [[_rollout([7, 8])], [_rollout([9])], [_rollout([])]])
    assert _columns(batch.rows([2, 0])) == [[3, 0, 0], [1, 7, 8], [1, 3], [2, 0], [0, 0, 0], [0, -0.5, -1]]
    assert len(batch.rows([])) == 0 and batch.rows([]).tokens_BS.shape == (0, 3)


def _columns(batch: RolloutBatch) -> list[list[float]]:
    return [
        *batch.tokens_BS.tolist(),
        batch.lengths_B.tolist(),
        batch.group_B.tolist(),
        *batch.rollout_logprobs_BS.tolist(),
    ]
