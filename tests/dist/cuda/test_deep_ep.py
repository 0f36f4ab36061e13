"""Megatron's dispatcher on DeepEP, its kernels emulated: tokens reach the same experts as by all-to-all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.types import Sequences
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference
from megarl.verify.roles import role_on
from tests.dist.cuda.deep_ep_buffer import CALLS, deep_ep_emulated
from tests.dist.parity import TOLERANCE, Examined, ask, examine

LAYOUTS = {
    "ep2": Layout(2, ep=2),
    "tp2xep2xetp1": Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True),
    "tp2xep2xetp2": Layout(4, tp=2, ep=2, etp=2, sequence_parallel=True),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
}
DEEP_EP = {"override_transformer_config": {"moe_enable_deepep": True}}
CASES = [
    pytest.param("qwen3_moe-untied", "tp2xep2xetp2"),
    *(pytest.param("qwen3_moe-untied", name, marks=pytest.mark.long) for name in ("ep2", "tp2xep2xetp1", "tp2+sp")),
    *(pytest.param("qwen2_moe-tied", name, marks=pytest.mark.long) for name in LAYOUTS),
]


def _examine(role: Role, rows: Sequences) -> tuple[dict[str, Examined], dict[str, int]]:
    CALLS.update(dispatch=0, combine=0)
    with deep_ep_emulated():
        return examine(role, rows), dict(CALLS)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_log_probs_and_every_gradient_are_those_of_all_to_all(
    ranks: RankPool, reference: Callable[..., Reference], model: str, name: str
) -> None:
    found = reference(model)
    expected = ask(ranks, _examine, role_on(LAYOUTS[name], found.folder), found.rollouts)
    told = ask(ranks, _examine, role_on(LAYOUTS[name], found.folder, **DEEP_EP), found.rollouts)
    assert all(calls == {"dispatch": 0, "combine": 0} for _, calls in expected)
    assert all(min(calls.values()) > 0 for _, calls in told)
    for (alone, _), (deep, _) in zip(expected, told, strict=True):
        for packing, examined in alone.items():
            other = deep[packing]
            if examined.scored is not None:
                assert other.scored is not None
                difference = (other.scored.logprobs_BS - examined.scored.logprobs_BS).abs().max()
                assert float(difference) < TOLERANCE
            assert other.metrics["grad_norm"] == pytest.approx(examined.metrics["grad_norm"], rel=1e-5)
            for piece, wanted in zip(other.gradients, examined.gradients, strict=True):
                scale = max(float(wanted.values.abs().max()), 1e-3)
                torch.testing.assert_close(piece.values, wanted.values, rtol=0, atol=1e-5 * scale)
