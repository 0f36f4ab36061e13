"""The loss of an optimizer step, on a backend whose model is a table: a logit of its own for every token of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.algorithm.loss_specs import PolicyLossSpec
from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.algorithm.rollout_correction import CorrectionSettings, Rejection
from megarl.batching.pack import MicroBatch, pack
from megarl.train.actor import Actor
from megarl.train.backend import Backend, Loss, Place, TokenScores
from megarl.train.work import OptimizerStep, Updated, UpdateWork
from megarl.types import Metrics, PolicyBatch, Sequences

WITHOUT = PolicyLossSpec(PolicyLossSettings(), "token-mean", kl_coef=None, kl_type="kl", temperature=1.0)
DELTA = CorrectionSettings(off_policy_delta=0.15)
REJECTION = CorrectionSettings(rejections=(Rejection("geometric", 0.9, 1.1),))


@dataclass(frozen=True)
class TableOutput:
    """The log-probs of a micro-batch, read from the table."""

    logprobs_N: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def logprobs(self, temperature: float) -> TokenScores:
        return TokenScores(self.logprobs_N, torch.zeros_like(self.logprobs_N))


@dataclass
class Table:
    """A backend that adds up losses and their gradient, and leaves the table as it is. asked: rollouts of the step."""

    logprobs_BS: Tensor
    place: Place = field(default_factory=lambda: Place(0, True))
    asked: int = 0

    def pack(self, sequences: Sequences, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        return [pack(sequences, rows, packed=True) for rows in micro_batches]

    def step(self, micros: Sequence[MicroBatch], loss: Loss, num_sequences: int) -> Metrics:
        told: Metrics = {}
        self.asked = num_sequences
        for micro in micros:
            output = TableOutput(micro.column(self.logprobs_BS))
            total, metrics = loss(micro, cast(Any, output))
            total.backward()
            told = {name: told.get(name, 0.0) + float(value) for name, value in metrics.items()}
        return told

    def updating(self) -> AbstractContextManager[None]:
        return nullcontext()


def _batch() -> PolicyBatch:
    """Return three rows: advantages -1, -1, 2; the engine's log-probs are the old ones, all -1."""
    mask_BS = torch.tensor([[False, True, True, True], [False, True, True, False], [False, True, True, False]])
    engine_BS = torch.where(mask_BS, -1.0, 0.0)
    return PolicyBatch(
        tokens_BS=torch.ones(3, 4, dtype=torch.int64),
        lengths_B=torch.tensor([4, 3, 3]),
        mask_BS=mask_BS,
        advantages_BS=torch.tensor([-1.0, -1.0, 2.0])[:, None] * mask_BS,
        old_logprobs_BS=engine_BS,
        rollout_logprobs_BS=engine_BS,
    )


def _updated(
    spec: PolicyLossSpec,
    change: Callable[[PolicyBatch], PolicyBatch] = lambda b: b,
    micros: Sequence[Any] = ((0, 1, 2),),
    dtype: torch.dtype = torch.float64,
) -> tuple[Updated, Tensor]:
    """Return what an optimizer step tells, and the gradient by log-prob; rows have moved by -0.2, -0.1, -0.2."""
    batch = change(_batch())
    moved_BS = torch.where(batch.mask_BS, -1.0 - torch.tensor([0.2, 0.1, 0.2])[:, None], 0.0)
    leaf = moved_BS.to(dtype).requires_grad_()
    is_on_policy = batch.old_logprobs_BS is None
    totals = mini_batch_totals(batch.mask_BS.sum(-1))
    step = OptimizerStep(tuple(map(tuple, micros)), *totals, len(batch), is_on_policy)
    table = Table(leaf)
    told = Actor(cast(Backend, table)).update(UpdateWork("actor", batch, (step,), spec))
    assert leaf.grad is not None
    assert table.asked == 3, "the losses of routers are of all sequences, whether or not they are trained on"
    return told, leaf.grad


def test_the_off_policy_mask_takes_the_loss_of_a_row_and_the_mean_still_counts_its_tokens() -> None:
    """The first row is worse than expected and 0.2 nats a token less likely; the second 0.1; the third was better."""
    told, gradient_BS = _updated(replace(WITHOUT, correction=DELTA))
    plain, plain_BS = _updated(WITHOUT)
    assert not gradient_BS[0].any() and plain_BS[0].any()
    assert gradient_BS[1:].equal(plain_BS[1:])
    (metrics,), ratio = told.metrics, torch.tensor([-0.1, -0.2]).double().exp()
    assert metrics["loss"] == pytest.approx(float(2 * ratio[0] * 1 - 2 * ratio[1] * 2) / 7)
    assert metrics["masked_fraction"] == pytest.approx(3 / 7)
    assert metrics["engine_weight"] == pytest.approx(4 / 7)
    assert metrics["engine_kl"] == pytest.approx((3 * 0.2 + 2 * 0.1 + 2 * 0.2) / 7)
    assert not {"masked_fraction", "engine_weight", "engine_kl"} & set(plain.metrics[0])


def test_a_rejection_beside_a_bypass_takes_what_has_gone_too_far_since_whatever_its_advantage() -> None:
    _, gradient_BS = _updated(replace(WITHOUT, correction=REJECTION))
    _, plain_BS = _updated(WITHOUT)
    assert not gradient_BS[0].any() and not gradient_BS[2].any()
    assert gradient_BS[1].equal(plain_BS[1])


def test_weights_beside_a_bypass_multiply_a_loss_without_a_ratio() -> None:
    """Of gpg, whose gradient is minus the advantage: with weights it is that of the ratio to the engine."""
    _, gradient_BS = _updated(replace(WITHOUT, name="gpg", correction=CorrectionSettings("token", cap=0.85)))
    expected_B = torch.tensor([0.2, 0.1, 0.2]).double().neg().exp().clamp(max=0.85) * torch.tensor([1.0, 1.0, -2.0]) / 7
    torch.testing.assert_close(gradient_BS, expected_B[:, None] * _batch().mask_BS)


@pytest.mark.parametrize("correction", [DELTA, REJECTION])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_micro_batches_do_not_show_in_a_corrected_step(correction: CorrectionSettings, mode: str) -> None:
    spec = replace(WITHOUT, correction=correction, loss_agg_mode=mode)
    together, gradient_BS = _updated(spec)
    apart, other_BS = _updated(spec, micros=((2,), (0, 1), ()))
    torch.testing.assert_close(other_BS, gradient_BS)
    assert apart.metrics[0] == pytest.approx(together.metrics[0])


def test_a_step_on_its_own_log_probs_compares_those_with_the_engines() -> None:
    def without_old(batch: PolicyBatch) -> PolicyBatch:
        return replace(batch, old_logprobs_BS=None, first_is_on_policy=True)

    told, gradient_BS = _updated(replace(WITHOUT, correction=DELTA), without_old, dtype=torch.float32)
    assert told.metrics[0]["old_kl"] == 0.0
    assert told.metrics[0]["engine_kl"] == pytest.approx((3 * 0.2 + 2 * 0.1 + 2 * 0.2) / 7)
    assert not gradient_BS[0].any() and gradient_BS[1:].any(-1).all()


def test_a_row_that_is_in_no_loss_counts_in_no_mean() -> None:
    """As overlong filtering leaves it: the gradient is that of a mini-batch without the row."""

    def without_first(batch: PolicyBatch) -> PolicyBatch:
        return replace(batch, mask_BS=batch.mask_BS & torch.tensor([False, True, True])[:, None])

    for mode, weight in (("token-mean", 1 / 4), ("seq-mean-token-mean", 1 / 4), ("seq-mean-token-sum", 1 / 2)):
        told, gradient_BS = _updated(replace(WITHOUT, loss_agg_mode=mode), without_first)
        ratio_B = torch.tensor([0.2, 0.1, 0.2]).double().neg().exp()
        expected_B = ratio_B * torch.tensor([0.0, 1.0, -2.0]) * weight
        torch.testing.assert_close(gradient_BS, expected_B[:, None] * _batch().mask_BS)
        assert told.metrics[0]["loss"] == pytest.approx(float((2 * expected_B).sum()))


def test_a_mini_batch_that_is_left_out_as_a_whole_has_a_loss_of_zero() -> None:
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    told, gradient_BS = _updated(replace(WITHOUT, correction=DELTA), lambda b: replace(b, mask_BS=nothing))
    assert not gradient_BS.any()
    assert set(told.metrics[0].values()) == {0.0}
