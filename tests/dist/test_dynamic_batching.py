"""Micro-batches by tokens change where a rollout is computed, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithm.loss_specs import PolicyLossSpec
from megarl.batching.plan import MiniBatch
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.monitor.timing import Stopwatch
from megarl.parallel.layout import Layout
from megarl.ranks.spec import RankSpec
from megarl.ranks.worker import Worker
from megarl.roles import Role
from megarl.types import Metrics, PolicyBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import random_sequences
from megarl.verify.roles import TRAINING, role_on
from tests.dist.parity import PPO, ask, summed
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model

A = TypeVar("A")

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4, 15, 6, 10, 8, 4, 16, 11, 5, 6, 13)
LOSS = replace(PPO, entropy_coef=0.01, max_tokens=20)
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LAYOUTS = {
    "dp2": Layout(2),
    "pp2xdp2": Layout(4, pp=2),
    "tp2+spxdp2": Layout(4, tp=2, sequence_parallel=True),
    "cp2xdp2": Layout(4, cp=2),
}
# A sum over tokens and one over sequences, each on a layout of its own; all others are long.
QUICK = {("tp2+spxdp2", "token-mean")}
RELATIVE = 1e-6


@dataclass(frozen=True)
class Learnt:
    """before, after: log-probs of all rows around the update. metrics: of every optimizer step. plan: of the update."""

    before_BS: Tensor
    after_BS: Tensor
    metrics: list[Metrics]
    plan: tuple[MiniBatch, ...]


class EveryRank:
    """A WorkerGroup in which every rank is controller and worker: all submit the same, and hear all answers."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.world_size = worker, dist.get_world_size()
        self.answers: list[Any] = []

    def submit(self, verb: Callable[[Worker, A], Any], arguments: Sequence[A]) -> EveryRank:
        """Do this rank's share, and hear the others'."""
        self.answers = [None] * self.world_size
        dist.all_gather_object(self.answers, verb(self.worker, arguments[dist.get_rank()]))
        return self

    def result(self) -> list[Any]:
        """Return every rank's answer to what was submitted last."""
        return self.answers

    def shutdown(self) -> None:
        """Leave the ranks to the pool."""

    def abort(self) -> None:
        """Leave the ranks to the pool."""


def _learn(role: Role, batch: PolicyBatch, loss: PolicyLossSpec) -> Learnt:
    """Score, update and score again, as a controller does."""
    group = EveryRank(Worker(RankSpec((role,), seed=0, hang_timeout_s=60.0), torch.device("cpu")))
    actor = RoleOnRanks(role, group, 5, Stopwatch(), loss, loss.temperature)
    before_BS = actor.logprobs(batch)
    actor.update(batch, 1)
    metrics = summed([updated and updated.metrics for updated in group.answers], role.layout)
    return Learnt(before_BS, actor.logprobs(batch), metrics, actor.plan(batch, 1))


@dataclass(frozen=True)
class Cut:
    """How rollouts become micro-batches: by tokens of a data-parallel rank where ``max_tokens`` is given."""

    mini_batch_size: int
    micro_batch_size: int = 1
    max_tokens: int | None = None


# Three optimizer steps of six rollouts.
STATIC = Cut(mini_batch_size=6, micro_batch_size=3)
TIGHT, LOOSE = replace(STATIC, max_tokens=20), replace(STATIC, max_tokens=40)

Learner = Callable[..., list[Learnt]]


@pytest.fixture(scope="module")
def learn(ranks: RankPool, folder: Path) -> Learner:
    """Return what lets the ranks of a layout learn rollouts that are cut in one way; it returns what each learnt."""

    def run(layout: Layout, cut: Cut, batch: PolicyBatch, loss: PolicyLossSpec = LOSS) -> list[Learnt]:
        training = replace(TRAINING, mini_batch_size=cut.mini_batch_size, shuffle=True)
        tokens = None if cut.max_tokens is None else cut.max_tokens // layout.cp  # of a device
        role = role_on(layout, folder, training=training, micro_batch_size=cut.micro_batch_size, max_tokens=tokens)
        return ask(ranks, _learn, role, batch, loss)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model."""
    folder = tmp_path_factory.mktemp("dynamic")
    save_tiny_model("qwen3-untied", folder)
    return folder


@pytest.fixture(scope="module")
def batch() -> PolicyBatch:
    """Return rollouts of a policy that isn't far from the model's."""
    generator = torch.Generator().manual_seed(0)
    plain = random_sequences(LENGTHS, VOCAB_SIZE, generator)

    def noise() -> torch.Tensor:
        return torch.randn(plain.mask_BS.shape, generator=generator) * plain.mask_BS

    old_BS = (noise() - 5) * plain.mask_BS
    # Advantages of one sign, or a loss next to zero would be the difference of large numbers.
    advantages_BS = (noise().abs() + 0.5) * plain.mask_BS
    return PolicyBatch(
        **vars(plain), old_logprobs_BS=old_BS, ref_logprobs_BS=old_BS + 0.1 * noise(), advantages_BS=advantages_BS
    )


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
        pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.long)
        for name in LAYOUTS
        for mode in MODES
    ],
)
def test_three_updates_by_tokens_equal_those_by_count(learn: Learner, batch: PolicyBatch, name: str, mode: str) -> None:
    loss = replace(LOSS, loss_agg_mode=mode)
    static, tight, loose = (learn(LAYOUTS[name], cut, batch, loss)[0] for cut in (STATIC, TIGHT, LOOSE))
    assert len(static.metrics) == 3
    _assert_same(tight, static)
    _assert_same(loose, static)
    sizes = {len(rows) for mini in tight.plan for micros in mini.micro_batches_by_rank for rows in micros}
    assert len(sizes) > 1, "every micro-batch has as many rollouts: nothing was spread by tokens"


def test_ranks_without_a_rollout_keep_step_and_change_nothing(learn: Learner, batch: PolicyBatch) -> None:
    few, cut = batch.rows(range(6)), Cut(mini_batch_size=2)
    [alone] = learn(Layout(1), cut, few)
    together = learn(Layout(4), replace(cut, max_tokens=16), few)
    assert any(not row for mini in together[0].plan for micros in mini.micro_batches_by_rank for row in micros)
    _assert_same(together[0], alone)
    losses = [[step["loss"] for step in rank.metrics] for rank in together]
    assert losses == [losses[0]] * 4


def test_a_policy_loss_of_whole_sequences_takes_empty_micro_batches(learn: Learner, batch: PolicyBatch) -> None:
    few, cut = batch.rows(range(6)), Cut(mini_batch_size=2)
    loss = replace(LOSS, name="gspo", loss_agg_mode="seq-mean-token-mean")
    [alone] = learn(Layout(1), cut, few, loss)
    together = learn(Layout(4), replace(cut, max_tokens=30), few, loss)
    _assert_same(together[0], alone)
