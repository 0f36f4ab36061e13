"""What the tests of the fused head run on every rank: the same scoring and optimizer step with it and without."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import Metrics, PolicyLossSpec
from megarl.types import Batch
from tests.dist.parity_cases import Piece, Setup, gradients_of, pieces, step_on


@dataclass(frozen=True)
class Answer:
    """logprobs_BS: None on ranks that don't report. gradients, metrics: of one optimizer step; loss None is SFT."""

    logprobs_BS: Tensor | None
    metrics: Metrics
    gradients: list[Piece]


def with_and_without(
    setup: Setup, batch: Batch, optimizer: OptimizerSpec, loss: PolicyLossSpec | None, temperature: float
) -> tuple[Answer, Answer]:
    """Score ``batch`` and take a step on it with a fused head, then without."""
    fused, plain = (
        _answer(replace(setup, fused_head=fused_head), batch, optimizer, loss, temperature)
        for fused_head in (True, False)
    )
    return fused, plain


def _answer(
    setup: Setup, batch: Batch, optimizer: OptimizerSpec, loss: PolicyLossSpec | None, temperature: float
) -> Answer:
    rows, micros = setup.share(batch)
    # A reference scores as an actor does, from a model of its own.
    logprobs_BS = setup.model().logprobs(rows, micros, temperature)
    actor, step = setup.actor(optimizer), step_on(batch, micros)
    (metrics,) = actor.update_sft(rows, [step]) if loss is None else actor.update(rows, [step], loss)
    return Answer(logprobs_BS, metrics, pieces(actor, gradients_of(actor)))
