"""From rollouts to padded sequences, and from rows of those to the packed micro-batches that the model sees.

Shape suffixes: B rollouts, S sequence, T positions that the model computes, L those of them that one context rank does,
N predicted tokens that count, R rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.batching.zigzag import contiguous_positions, held_positions, num_parts
from megarl.types import Rollout, RolloutBatch, Sequences


@dataclass(frozen=True)
class MicroBatch:
    """Sequences laid out for one forward pass of one context rank.

    tokens, positions: [1, L] packed, or [rows, L / rows] padded on the right. sequences: alike, which of the rows a
    token belongs to, from 1; 0 for padding. lengths: of the packed sequences over all context ranks, with each one's
    padding, and those of the alignment padding at the end included; empty where padded. predict_N: the flat positions
    whose next token is trained on, -1 where another context rank has it; targets_N: that token; row_N, column_N: where
    it stands among the padded sequences. row_R: the rows; last_R: the flat position of each row's last token, -1
    where another context rank has it.
    """

    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    lengths: tuple[int, ...]
    predict_N: Tensor
    targets_N: Tensor
    row_N: Tensor
    column_N: Tensor
    row_R: Tensor
    last_R: Tensor

    def column(self, values_BS: Tensor) -> Tensor:
        """Return the values [N] of a per-token column of the padded sequences."""
        return values_BS[self.row_N, self.column_N]


def pack(
    batch: Sequences,
    rows: Sequence[int],
    *,
    packed: bool,
    multiple: int = 1,
    cp: int = 1,
    cp_rank: int = 0,
    contiguous: bool = False,
) -> MicroBatch:
    """Lay out ``rows`` of ``batch`` end to end (``packed``), or each on a line of its own; take a context rank's share.

    multiple: a rank's number of positions is rounded up to it (sequence parallelism splits them evenly). contiguous:
    a context rank's share is one part of the whole line in place of two of every sequence. No rows at all, as for a
    rank that only keeps step with the others, give one sequence of as few padding tokens as can be.
    """
    lengths = [int(batch.lengths_B[row]) for row in rows]
    num_shares = 1 if contiguous else num_parts(cp)
    room = [_round_up(length, num_shares) for length in lengths]
    multiple = math.lcm(num_shares, cp * multiple)
    width = _round_up(max(room, default=1), multiple)
    starts = [sum(room[:i]) if packed else i * width for i in range(len(rows))]
    size = _round_up(sum(room) or 1, multiple) if packed else max(len(rows), 1) * width
    tokens_T = torch.zeros(size, dtype=torch.int64)
    positions_T = torch.zeros(size, dtype=torch.int64)
    sequences_T = torch.zeros(size, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int64)
    predict, targets, row_index, column_index = [none], [none], [none], [none]
    for number, (row, length, start) in enumerate(zip(rows, lengths, starts, strict=True), start=1):
        tokens_T[start : start + length] = batch.tokens_BS[row, :length]
        positions_T[start : start + length] = torch.arange(length)
        sequences_T[start : start + length] = number
        columns = batch.mask_BS[row, :length].nonzero()[:, 0]
        predict.append(start + columns - 1)
        targets.append(batch.tokens_BS[row, columns])
        row_index.append(torch.full_like(columns, row))
        column_index.append(columns)
    tail = [size - sum(room)] if packed and size > sum(room) else []
    if contiguous:
        held_L = contiguous_positions([size] if packed else [width] * (size // width), cp, cp_rank)
    else:
        held_L = held_positions([*room, *tail] if packed else [width] * (size // width), cp, cp_rank)
    place_T = torch.full((size,), -1)
    place_T[held_L] = torch.arange(len(held_L))
    shape = (1, -1) if packed else (-1, width // cp)
    return MicroBatch(
        tokens=tokens_T[held_L].view(shape),
        positions=positions_T[held_L].view(shape),
        sequences=sequences_T[held_L].view(shape),
        lengths=(*room, *tail) if packed else (),
        predict_N=place_T[torch.cat(predict)],
        targets_N=torch.cat(targets),
        row_N=torch.cat(row_index),
        column_N=torch.cat(column_index),
        row_R=torch.tensor(rows, dtype=torch.int64),
        last_R=place_T[[start + length - 1 for start, length in zip(starts, lengths, strict=True)]],
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def sequences_to_batch(token_ids: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> Sequences:
    """Return right-padded Sequences of any lengths."""
    lengths_B = torch.tensor([len(ids) for ids in token_ids])
    shape = (len(token_ids), int(lengths_B.max()))
    tokens_BS = torch.zeros(shape, dtype=torch.int64)
    mask_BS = torch.zeros(shape, dtype=torch.bool)
    for row, (ids, mask) in enumerate(zip(token_ids, masks, strict=True)):
        tokens_BS[row, : len(ids)] = torch.tensor(ids)
        mask_BS[row, : len(ids)] = torch.tensor(mask)
    mask_BS[:, 0] = False  # nothing comes before the first token, so it has no log-prob
    return Sequences(tokens_BS, lengths_B, mask_BS)


def rollouts_to_batch(prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Rollout]]) -> RolloutBatch:
    """Return the rollouts of each prompt, group after group, as a RolloutBatch."""
    flat = [(list(prompt), rollout) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
    batch = sequences_to_batch(
        [prompt + list(rollout.token_ids) for prompt, rollout in flat],
        [[False] * len(prompt) + [True] * len(rollout.token_ids) for prompt, rollout in flat],
    )
    logprobs_BS = torch.zeros(batch.tokens_BS.shape)
    for row, (prompt, rollout) in enumerate(flat):
        logprobs_BS[row, len(prompt) : len(prompt) + len(rollout.logprobs)] = torch.tensor(rollout.logprobs)
    return RolloutBatch(
        tokens_BS=batch.tokens_BS,
        lengths_B=batch.lengths_B,
        mask_BS=batch.mask_BS,
        group_B=torch.tensor([g for g, group in enumerate(groups) for _ in group]),
        rollout_logprobs_BS=logprobs_BS,
        policy_version_B=torch.tensor([rollout.policy_version for _, rollout in flat]),
    )
