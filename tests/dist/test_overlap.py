"""Gradients that are reduced during the backward pass, and parameters that are gathered during the next forward pass.

Two data-parallel ranks add two numbers, in either order the same: what overlaps equals what doesn't to the bit. Only
the norm of the gradient is summed over other shares of it, so nothing is clipped by it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import Tensor

from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.types import Metrics, PolicyBatch
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import PPO, backend_on_rank, score, update
from tests.dist.parity import Piece, ask, pieces

DENSE, EXPERTS = "qwen2-tied", "qwen3_moe-untied"
EARLY = {"overlap_grad_reduce": True, "ddp_bucket_size": 500}
LATE = EARLY | {"overlap_param_gather": True}
AWAY = dict.fromkeys(("param_offload", "grad_offload", "optimizer_offload"), True)
REPLICATED = {"use_distributed_optimizer": False}
CASES: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "dp2": (DENSE, Layout(2), LATE | AWAY),
    "tp2_dp2+sp": (DENSE, Layout(4, tp=2, sequence_parallel=True), LATE),
    "pp2_dp2": (DENSE, Layout(4, pp=2), LATE),
    "pp2_vpp2_dp2": (DENSE, Layout(4, pp=2, vpp=2), LATE | AWAY),
    "cp2": (DENSE, Layout(2, cp=2), LATE),
    "ep2": (EXPERTS, Layout(2, ep=2), LATE),
    "dp2_replicated_optimizer": (DENSE, Layout(2), EARLY | REPLICATED),
    "ep2_replicated_optimizer": (EXPERTS, Layout(2, ep=2), EARLY | REPLICATED),
}
QUICK = ("dp2", "pp2_vpp2_dp2")
UNCLIPPED = replace(TRAINING, clip_grad=1e9)
NUM_UPDATES, STEPS_AN_UPDATE = 2, 3


@dataclass(frozen=True)
class Lived:
    """metrics: of every step. scores_BS: after each update. weights: at last. launched: buckets reduced early."""

    metrics: list[Metrics]
    scores_BS: list[Tensor | None]
    weights: list[Piece]
    launched: int


def _live(role: Role, batch: PolicyBatch) -> Lived:
    backend = backend_on_rank(role)
    chunks: Any = backend.optimizer.chunks
    groups = [group for ddp in chunks for group in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups)]
    launched = 0

    def counting(group: Any) -> Callable[..., None]:
        start = group.start_grad_sync

        def counted(**options: Any) -> None:
            nonlocal launched
            # Those of the first step are all started after it: which gradients come how often is learned there.
            launched += group.ddp_config.overlap_grad_reduce and not group.is_first_batch
            start(**options)

        return counted

    for group in groups:
        group.start_grad_sync = counting(group)
    actor, metrics, scores_BS = Actor(backend), [], []
    for _ in range(NUM_UPDATES):
        metrics += update(actor, batch, PPO, STEPS_AN_UPDATE).metrics
        scores_BS.append(score(actor, batch, PPO.temperature))
    with backend.resident():
        return Lived(metrics, scores_BS, pieces(backend, backend.parameters()), launched)


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.long) for c in CASES])
def test_what_overlaps_is_to_the_bit_what_does_not(
    ranks: RankPool, reference: Callable[..., Reference], case: str
) -> None:
    model, layout, section = CASES[case]
    found = reference(model, num_hidden_layers=4)
    after_one_another = {key: value for key, value in section.items() if key in REPLICATED}
    apart, together = (
        ask(ranks, _live, role_on(layout, found.folder, training=UNCLIPPED, **chosen), found.rollouts)
        for chosen in (after_one_another, section)
    )
    assert sum(lived.launched for lived in together) > layout.world_size * STEPS_AN_UPDATE, "one bucket is no overlap"
    for one, other in zip(apart, together, strict=True):
        for found_in_step, step in zip(other.metrics, one.metrics, strict=True):
            assert found_in_step | {"grad_norm": step["grad_norm"]} == step
            assert found_in_step["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-6)
        assert len({step["grad_norm"] for step in one.metrics}) == NUM_UPDATES * STEPS_AN_UPDATE
        for expected, score_BS in zip(one.scores_BS, other.scores_BS, strict=True):
            assert score_BS is expected is None or score_BS.equal(expected)
        for piece, expected in zip(other.weights, one.weights, strict=True):
            assert piece.values.equal(expected.values), piece.name
