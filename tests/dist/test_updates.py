"""Optimizer steps beside the usual: on the policy's own log-probs, and with a gradient that isn't finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.backend import Output, Skipped
from megarl.train.megatron.backend import MegatronBackend
from megarl.types import Metrics, PolicyBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import PPO, backend_on_rank, score, share, update
from tests.dist.parity import LOOKING, REPLICATED, SFT, Piece, ask, gradients_of, pieces, summed

RELATIVE = 1e-6
DENSE, EXPERTS = "qwen2-tied", "qwen3_moe-untied"
LAYOUTS = {
    "one_rank": Layout(1),
    "tp2xpp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "cp2xdp2": Layout(4, cp=2),
}


@dataclass(frozen=True)
class Step:
    """What an optimizer step told. logprobs_BS: that it took for the old ones, None where it was handed those."""

    metrics: Metrics
    gradients: list[Piece]
    logprobs_BS: Tensor | None


def _score(role: Role, batch: PolicyBatch) -> Tensor | None:
    return score(Actor(backend_on_rank(role)), batch, PPO.temperature)


def _step(role: Role, batch: PolicyBatch, is_on_policy: bool) -> Step:
    backend = backend_on_rank(role)
    updated = update(Actor(backend), batch, PPO, is_on_policy=is_on_policy)
    return Step(updated.metrics[0], pieces(backend, gradients_of(backend)), updated.logprobs_BS)


def _together(parts_BS: list[Tensor | None], layout: Layout) -> Tensor:
    """Return the rows of all data-parallel ranks, from the ranks that report them."""
    assert tuple(rank for rank, part_BS in enumerate(parts_BS) if part_BS is not None) == layout.output_ranks()
    return torch.cat([part_BS for part_BS in parts_BS if part_BS is not None])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_on_its_own_log_probs_is_that_on_those_of_a_pass_before_it(
    ranks: RankPool, reference: Callable[..., Reference], name: str
) -> None:
    found, layout = reference(DENSE), LAYOUTS[name]
    role = role_on(layout, found.folder, training=LOOKING, **REPLICATED)
    old_BS = _together(ask(ranks, _score, role, found.rollouts), layout)
    handed = ask(ranks, _step, role, replace(found.rollouts, old_logprobs_BS=old_BS), False)
    own = ask(ranks, _step, role, replace(found.rollouts, old_logprobs_BS=None), True)

    assert all(step.logprobs_BS is None for step in handed)
    own_BS = _together([step.logprobs_BS for step in own], layout)
    torch.testing.assert_close(own_BS, old_BS, rtol=0, atol=RELATIVE)
    (own_metrics,), (handed_metrics,) = (summed([[step.metrics] for step in steps], layout) for steps in (own, handed))
    assert own_metrics == pytest.approx(handed_metrics, rel=RELATIVE, abs=RELATIVE)
    assert own_metrics["clip_fraction"] == own_metrics["old_kl"] == 0.0, "some ratio isn't 1"
    assert own_metrics["grad_norm"] > 0
    for one, other in zip(own, handed, strict=True):
        for piece, expected in zip(one.gradients, other.gradients, strict=True):
            atol = RELATIVE * float(expected.values.abs().max())
            torch.testing.assert_close(piece.values, expected.values, rtol=0, atol=atol, msg=str(piece.name))


@dataclass(frozen=True)
class Tried:
    """told: of the step with a gradient that isn't finite. before, after: what the model and Adam held around it.

    next, first: what they held after a usual step that followed it, and after one of a fresh actor.
    """

    told: Metrics | Skipped
    before: list[Tensor]
    after: list[Tensor]
    next: list[Tensor]
    first: list[Tensor]


def _try(role: Role, batch: PolicyBatch) -> Tried:
    backend, fresh = backend_on_rank(role), backend_on_rank(role)
    rows, micros = share(role, batch)

    def loss(micro: MicroBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a loss that is infinite on one micro-batch of one data-parallel rank."""
        is_bad = backend.place.dp == 0 and 0 in micro.row_R.tolist()
        return output.logprobs(1.0).logprobs_N.sum() * (math.inf if is_bad else 1.0), {}

    before = _held(backend)
    with backend.updating():
        told = backend.step(backend.pack(rows, micros), loss, len(batch))
    after = _held(backend)
    for one in (backend, fresh):
        update(Actor(one), batch, SFT)
    return Tried(told, before, after, _held(backend), _held(fresh))


def _skip(role: Role, batch: PolicyBatch) -> tuple[Metrics | Skipped, bool]:
    """Take a step; return what it told, and whether all that is held is as it was."""
    backend = backend_on_rank(role)
    rows, micros = share(role, batch)
    before = _held(backend)
    with backend.updating():
        told = backend.step(
            backend.pack(rows, micros), lambda _, output: (output.logprobs(1.0).logprobs_N.sum(), {}), len(batch)
        )
    return told, _equal(_held(backend), before)


def _held(backend: MegatronBackend) -> list[Tensor]:
    """Return copies of the parameters, and of those that Adam steps."""
    inner: Any = backend.optimizer and backend.optimizer.inner
    stepped = [parameter for group in inner.param_groups for parameter in group["params"]]
    return [tensor.detach().clone() for tensor in (*backend.parameters().values(), *stepped)]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(one.equal(other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("model", "layout", "dtype", "section"),
    [
        pytest.param(DENSE, LAYOUTS["tp2xpp2+sp"], "float32", {}, id="tp2xpp2+sp"),
        pytest.param(DENSE, Layout(2), "bfloat16", {}, id="dp2-bf16"),
        pytest.param(DENSE, Layout(2), "bfloat16", REPLICATED, id="dp2-bf16-replicated"),
        pytest.param(DENSE, Layout(2), "float32", {"optimizer_on_host": True}, id="dp2-on_host"),
        pytest.param(EXPERTS, Layout(4, ep=2), "float32", {}, id="dp4xep2"),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing_and_the_next_step_is_the_first(
    ranks: RankPool,
    reference: Callable[..., Reference],
    model: str,
    layout: Layout,
    dtype: str,
    section: dict[str, bool],
) -> None:
    found = reference(model)
    role = role_on(layout, found.folder, dtype=dtype, training=TRAINING, **section)
    for tried in ask(ranks, _try, role, found.rollouts):
        assert isinstance(tried.told, Skipped) and not math.isfinite(tried.told.grad_norm)
        assert _equal(tried.after, tried.before)
        assert not _equal(tried.first, tried.before)
        assert _equal(tried.next, tried.first)


def test_a_gradient_that_is_too_large_changes_nothing(ranks: RankPool, reference: Callable[..., Reference]) -> None:
    found = reference(DENSE)
    for limit, is_taken in ((1e-6, False), (1e9, True)):
        role = role_on(Layout(2), found.folder, dtype="float32", training=replace(TRAINING, skip_grad_norm=limit))
        for told, is_as_before in ask(ranks, _skip, role, found.rollouts):
            assert isinstance(told, Skipped) != is_taken
            assert is_as_before != is_taken
