"""Sequences that context-parallel ranks share, beyond what tests/dist/test_parity.py holds of every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch

from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.algorithm.rollout_correction import CorrectionSettings, Rejection
from megarl.parallel.layout import Layout
from megarl.train.attention import packing_of
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference
from megarl.verify.roles import role_on
from tests.dist.parity import PPO, TELLING, TRAINING_TOLERANCE, Job, steps_of

LAYOUTS = {"cp2": Layout(2, cp=2), "cp4": Layout(4, cp=4), "cp2xdp2": Layout(4, cp=2)}
# What a token counts depends on all tokens of its sequence, wherever they are.
GSPO = replace(
    PPO,
    name="gspo",
    settings=PolicyLossSettings(clip_low=0.05, clip_high=0.05, clip_c=3.0),
    loss_agg_mode="seq-mean-token-mean",
    kl_coef=None,
    entropy_coef=0.01,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_of_whole_sequences_sees_them_whole(
    ranks: RankPool, reference: Callable[..., Reference], layout: str
) -> None:
    """Every metric of three steps is that of one rank, each counted once."""
    found = reference(TELLING[0])
    alone, together = (
        steps_of(ranks, role_on(asked, found.folder), found.rollouts, Job(GSPO))
        for asked in (Layout(1), LAYOUTS[layout])
    )
    assert alone[1]["clip_fraction"] > 0, "no sequence tests the clip"
    for step, expected in zip(together, alone, strict=True):
        assert step == pytest.approx(expected, rel=TRAINING_TOLERANCE, abs=TRAINING_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_that_an_update_leaves_out_is_left_out_as_a_whole(
    ranks: RankPool, reference: Callable[..., Reference], layout: str
) -> None:
    """The engine's log-probs are the old ones, which are up to half a nat from the actor's."""
    found = reference(TELLING[0])
    rollouts = replace(found.rollouts, rollout_logprobs_BS=found.rollouts.old_logprobs_BS)
    correction = CorrectionSettings(rejections=(Rejection("worst_token", low=0.65),), off_policy_delta=0.0)
    alone, together = (
        steps_of(ranks, role_on(asked, found.folder), rollouts, Job(replace(PPO, correction=correction)))
        for asked in (Layout(1), LAYOUTS[layout])
    )
    assert 0 < alone[0]["masked_fraction"] < 1, "no sequence tests the correction"
    for step, expected in zip(together, alone, strict=True):
        assert step == pytest.approx(expected, rel=TRAINING_TOLERANCE, abs=TRAINING_TOLERANCE)


@pytest.mark.parametrize(("cp", "cp_rank"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_the_variable_length_kernel_is_told_of_the_same_queries_and_keys_as_sdpa(cp: int, cp_rank: int) -> None:
    packing = packing_of([16, 8, 24, 8], torch.device("cpu"), cp, cp_rank)
    queries_at, keys_at = (list(pairwise(bounds.tolist())) for bounds in packing.stretches.bounds)
    key_T = list(range(56)) if packing.stretches.key_T is None else packing.stretches.key_T.tolist()
    told = [(list(range(*q)), key_T[slice(*k)]) for q, k in zip(queries_at, keys_at, strict=True)]
    blocks = [zip(block.query_BL.tolist(), block.key_BK.tolist(), strict=True) for block in packing.blocks]
    assert sorted(told) == sorted(chain.from_iterable(blocks))
    assert packing.stretches.longest == (max(len(q) for q, _ in told), max(len(k) for _, k in told))
