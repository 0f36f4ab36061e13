"""Computing logits together with their log-probs changes no log-prob, metric or gradient but by rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from megarl.algorithm.loss_specs import LossSpec
from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.reference import Reference as FrozenPolicy
from megarl.types import Metrics, PolicyBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import TEMPERATURE, Reference
from megarl.verify.roles import role_on
from megarl.verify.work import backend_on_rank, score, update
from tests.dist.parity import LOOKING, REPLICATED, SEQUENCE_SUM_NORM, SFT, TELLING, Piece, ask, gradients_of, pieces

TIED, UNTIED = TELLING
SIZES = {"num_hidden_layers": 4}
LAYOUTS = {
    "one_rank": Layout(1),
    "tp2": Layout(2, tp=2),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "pp2": Layout(2, pp=2),
    "cp2": Layout(2, cp=2),
    "pp2xvpp2": Layout(2, pp=2, vpp=2),
    "tp2xpp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "tp2xdp2": Layout(4, tp=2),
}
QUICK = {(UNTIED, "tp2+sp"), (TIED, "pp2")}
TOLERANCE = 2e-6
BF16_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Answer:
    """logprobs_BS: None on ranks that don't report. gradients, metrics: of one optimizer step."""

    logprobs_BS: Tensor | None
    metrics: Metrics
    gradients: list[Piece]


def _with_and_without(role: Role, batch: PolicyBatch, loss: LossSpec) -> tuple[Answer, Answer]:
    """Score ``batch`` and take a step on it with a fused head, then without."""
    fused, plain = (_answer(replace(role, fused_head=fused_head), batch, loss) for fused_head in (True, False))
    return fused, plain


def _answer(role: Role, batch: PolicyBatch, loss: LossSpec) -> Answer:
    # A reference scores as an actor does, from a model of its own.
    logprobs_BS = score(FrozenPolicy(backend_on_rank(replace(role, training=None))), batch, TEMPERATURE)
    backend = backend_on_rank(role)
    (metrics,) = update(Actor(backend), batch, loss).metrics
    return Answer(logprobs_BS, metrics, pieces(backend, gradients_of(backend)))


def _assert_alike(fused: Answer, plain: Answer, tolerance: float) -> None:
    """Compare everything with a fused head to the same without, to ``tolerance`` of each tensor's largest value."""
    assert (fused.logprobs_BS is None) == (plain.logprobs_BS is None)
    if fused.logprobs_BS is not None and plain.logprobs_BS is not None:
        assert plain.logprobs_BS.any()
        atol = tolerance * float(plain.logprobs_BS.abs().max())
        torch.testing.assert_close(fused.logprobs_BS, plain.logprobs_BS, rtol=0, atol=atol)
    # Some metrics are sums in which tokens of both signs cancel.
    assert fused.metrics == pytest.approx(plain.metrics, rel=tolerance, abs=tolerance)
    assert plain.gradients
    for one, other in zip(fused.gradients, plain.gradients, strict=True):
        assert (one.name, one.start, one.stop) == (other.name, other.start, other.stop)
        assert other.name is None or other.values.any()
        atol = tolerance * float(other.values.abs().max())
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=atol, msg=lambda m, n=one.name: f"{n}: {m}")


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.long)], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(*pair, id="-".join(pair), marks=() if pair in QUICK else pytest.mark.long)
        for pair in product(TELLING, LAYOUTS)
    ],
)
def test_log_probs_metrics_and_every_gradient_are_those_without_it(
    ranks: RankPool, reference: Callable[..., Reference], model: str, layout: str, packed: bool
) -> None:
    """One row a micro-batch, so that one of them has no token that counts. The loss has entropy and KL in it."""
    found = reference(model, **SIZES)
    role = role_on(LAYOUTS[layout], found.folder, training=LOOKING, packed=packed, micro_batch_size=1, **REPLICATED)
    for fused, plain in ask(ranks, _with_and_without, role, found.rollouts, SEQUENCE_SUM_NORM):
        _assert_alike(fused, plain, TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["one_rank", "tp2+sp", "pp2"])
def test_in_bf16_it_stays_near(ranks: RankPool, reference: Callable[..., Reference], layout: str) -> None:
    found = reference(TIED, **SIZES)
    role = role_on(LAYOUTS[layout], found.folder, dtype="bfloat16", training=LOOKING, **REPLICATED)
    for fused, plain in ask(ranks, _with_and_without, role, found.rollouts, SFT):
        _assert_alike(fused, plain, BF16_TOLERANCE)
