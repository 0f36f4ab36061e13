"""Micro-batches by tokens change where a rollout is computed, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megarl.batching.pack import sequences_to_batch
from megarl.parallel.layout import Layout
from megarl.types import Batch
from tests.dist import parity
from tests.dist.dynamic_cases import Cut, Learnt, learn
from tests.dist.ranks import RankPool
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4, 15, 6, 10, 8, 4, 16, 11, 5, 6, 13)
PROMPT_LENGTH = 2
OPTIMIZER = parity.OPTIMIZER
LOSS = replace(parity.PPO, entropy_coef=0.01, max_tokens=20)
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LAYOUTS = {
    "dp2": Layout(2),
    "pp2xdp2": Layout(4, pp=2),
    "tp2+spxdp2": Layout(4, tp=2, sequence_parallel=True),
    "cp2xdp2": Layout(4, cp=2),
}
# Three optimizer steps of six rollouts.
STATIC = Cut(mini_batch_size=6, micro_batch_size=3)
CUTS = {"static": STATIC, "tight": replace(STATIC, max_tokens=20), "loose": replace(STATIC, max_tokens=40)}
RELATIVE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model."""
    folder = tmp_path_factory.mktemp("dynamic")
    save_tiny_model("qwen3-untied", folder)
    return folder


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Return rollouts of a policy that isn't far from the model's."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    plain = sequences_to_batch(tokens, [[place >= PROMPT_LENGTH for place in range(length)] for length in LENGTHS])

    def noise() -> torch.Tensor:
        return torch.randn(plain.mask_BS.shape, generator=generator) * plain.mask_BS

    old_BS = (noise() - 5) * plain.mask_BS
    # Advantages of one sign, or a loss next to zero would be the difference of large numbers.
    advantages_BS = (noise().abs() + 0.5) * plain.mask_BS
    return replace(plain, old_logprobs_BS=old_BS, ref_logprobs_BS=old_BS + 0.1 * noise(), advantages_BS=advantages_BS)


def _assert_same(found: Learnt, expected: Learnt) -> None:
    torch.testing.assert_close(found.before_BS, expected.before_BS, rtol=0, atol=RELATIVE * 10)
    assert len(found.metrics) == len(expected.metrics)
    for step, wanted in zip(found.metrics, expected.metrics, strict=True):
        for name in ("loss", "grad_norm"):
            assert step[name] == pytest.approx(wanted[name], rel=RELATIVE), name
        assert step == pytest.approx(wanted, rel=1e-5, abs=RELATIVE)  # in some, tokens of both signs cancel
    torch.testing.assert_close(found.after_BS, expected.after_BS, rtol=0, atol=RELATIVE * 10)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=() if name == "pp2xdp2" or mode == MODES[0] else pytest.mark.long)
        for name in LAYOUTS
        for mode in MODES
    ],
)
def test_three_updates_by_tokens_equal_those_by_count(
    ranks: RankPool, folder: Path, batch: Batch, name: str, mode: str
) -> None:
    layout, loss = LAYOUTS[name], replace(LOSS, loss_agg_mode=mode)
    answers = ranks.run(learn, folder, layout, batch, CUTS, loss, OPTIMIZER, world_size=layout.world_size)
    static, tight, loose = (answers[0][cut] for cut in CUTS)
    assert len(static.metrics) == 3
    _assert_same(tight, static)
    _assert_same(loose, static)
    sizes = {len(rows) for mini in tight.plan for micros in mini.micro_batches_by_rank for rows in micros}
    assert len(sizes) > 1, "every micro-batch has as many rollouts: nothing was spread by tokens"


def test_ranks_without_a_rollout_keep_step_and_change_nothing(ranks: RankPool, folder: Path, batch: Batch) -> None:
    few = batch.rows(list(range(6)))
    cut, layout = Cut(mini_batch_size=2), Layout(4)
    [alone] = ranks.run(learn, folder, Layout(1), few, {"one": cut}, LOSS, OPTIMIZER, world_size=1)
    by_tokens = {"one": replace(cut, max_tokens=16)}
    together = ranks.run(learn, folder, layout, few, by_tokens, LOSS, OPTIMIZER, world_size=layout.world_size)
    assert any(not row for mini in together[0]["one"].plan for micros in mini.micro_batches_by_rank for row in micros)
    _assert_same(together[0]["one"], alone["one"])
    losses = [[step["loss"] for step in rank["one"].metrics] for rank in together]
    assert losses == [losses[0]] * 4


def test_a_policy_loss_of_whole_sequences_takes_empty_micro_batches(
    ranks: RankPool, folder: Path, batch: Batch
) -> None:
    few, loss = batch.rows(list(range(6))), replace(LOSS, name="gspo", loss_agg_mode="seq-mean-token-mean")
    cut = Cut(mini_batch_size=2)
    [alone] = ranks.run(learn, folder, Layout(1), few, {"one": cut}, loss, OPTIMIZER, world_size=1)
    by_tokens = {"one": replace(cut, max_tokens=30)}
    together = ranks.run(learn, folder, Layout(4), few, by_tokens, loss, OPTIMIZER, world_size=4)
    _assert_same(together[0]["one"], alone["one"])
