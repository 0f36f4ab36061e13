"""The router's losses and statistics, on every layout those of Hugging Face's model and of the papers' formulas.

Shape suffixes: B rollouts, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.types import Sequences
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference, load
from megarl.verify.roles import role_on
from tests.dist.hf_training import checkpoint_tensors, sft_loss
from tests.dist.parity import TOLERANCE, TRAINING_TOLERANCE, Examined, ask, assert_pieces_are, examine
from tests.dist.tiny_models import EXPERTS

LAYOUTS = {
    "one_rank": Layout(1),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "cp2": Layout(2, cp=2),
    "ep2": Layout(2, ep=2),
    "pp2xvpp2": Layout(2, pp=2, vpp=2),
    "tp2xcp2xetp1": Layout(4, tp=2, cp=2, etp=1, sequence_parallel=True),
    "tp2xpp2xep2xetp1": Layout(4, tp=2, pp=2, ep=2, etp=1, sequence_parallel=True),
}
QUICK = {("pp2xvpp2", "one_recomputed"), ("tp2xpp2xep2xetp1", "recomputed")}
SIZES = {"num_hidden_layers": 4}
BALANCE, Z = 0.5, 0.02
LOSSES = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": BALANCE, "moe_z_loss_coeff": Z}
# Of the layers of a stage all are computed again, or one, and Megatron tells those two kinds differently of padding.
RECOMPUTE = {
    "kept": RecomputeConfig(None, None, None),
    "recomputed": RecomputeConfig("full", "uniform", 1),
    "one_recomputed": RecomputeConfig("full", "block", 1),
}
NUM_EXPERTS, TOPK = EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"]
MODEL = "qwen3_moe-untied"


@dataclass(frozen=True)
class Expected:
    """gradients: of the SFT loss and both losses of the router. metrics: by the names that training gives them."""

    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def _router_logits(model: Any, tokens_S: Tensor) -> list[Tensor]:
    """Return the router's logits [S, E] of each layer."""
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_pre_hook(lambda gate, inputs: seen.append(inputs[0] @ gate.weight.t()))
        for layer in model.model.layers
    ]
    model(tokens_S[None])
    for hook in hooks:
        hook.remove()
    return [logits.flatten(0, -2) for logits in seen]


def _expect(folder: Path, batch: Sequences) -> Expected:
    model = load(folder)
    loss = sft_loss(model, batch)
    rollouts = [tokens_S[:length] for tokens_S, length in zip(batch.tokens_BS, batch.lengths_B.tolist(), strict=True)]
    by_layer = list(zip(*(_router_logits(model, tokens_S) for tokens_S in rollouts), strict=True))
    num_rollouts = len(batch)
    balances, zs, entropies, loads = [], [], [], []
    for layer in by_layer:
        scores = [logits_SE.softmax(-1) for logits_SE in layer]
        chosen = [torch.zeros_like(s_SE).scatter(-1, s_SE.topk(TOPK).indices, 1.0) for s_SE in scores]
        balance = [NUM_EXPERTS * (c.mean(0) / TOPK * s.mean(0)).sum() for c, s in zip(chosen, scores, strict=True)]
        balances.append(torch.stack(balance).sum() / num_rollouts)
        zs.append(torch.stack([x.exp().sum(-1).log().square().mean() for x in layer]).sum() / num_rollouts)
        entropies.append(-torch.cat([(s * s.log()).sum(-1) for s in scores]).mean().item())
        loads.append(torch.cat(chosen).mean(0) / TOPK)
    (loss + BALANCE * sum(balances) + Z * sum(zs)).backward()
    load_LE = torch.stack(loads)
    metrics = {
        "moe/load_max": load_LE.max() * NUM_EXPERTS,
        "moe/load_min": load_LE.min() * NUM_EXPERTS,
        "moe/load_entropy": -(load_LE * load_LE.log()).sum(-1).mean() / torch.tensor(NUM_EXPERTS).log(),
        "moe/router_entropy": sum(entropies) / len(entropies),
        "moe/dropped": 0.0,
        "moe/load_balance_loss": torch.stack(balances).mean().item(),
        "moe/z_loss": torch.stack(zs).mean().item(),
    }
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Expected(checkpoint_tensors(model, gradients), {name: float(value) for name, value in metrics.items()})


@pytest.fixture(scope="module")
def found(reference: Callable[..., Reference]) -> Reference:
    """Return the model and its rollouts."""
    return reference(MODEL, **SIZES)


@pytest.fixture(scope="module")
def expected(found: Reference) -> Expected:
    """Return what Hugging Face's model says."""
    return _expect(found.folder, found.rollouts)


def _assert_equal(answers: list[dict[str, Examined]], wanted: Expected) -> None:
    for packing in ("packed", "padded"):
        found = [answer[packing] for answer in answers]
        assert_pieces_are([piece for rank in found for piece in rank.gradients], wanted.gradients, TOLERANCE)
        for rank in found:
            routing = {name: value for name, value in rank.metrics.items() if name.startswith("moe/")}
            assert routing == pytest.approx(wanted.metrics, rel=TRAINING_TOLERANCE, abs=1e-6)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long) for case in product(LAYOUTS, RECOMPUTE)],
)
def test_losses_and_statistics_of_the_router_equal_their_formulas(
    ranks: RankPool, found: Reference, expected: Expected, layout: str, recompute: str
) -> None:
    role = role_on(LAYOUTS[layout], found.folder, recompute=RECOMPUTE[recompute], override_transformer_config=LOSSES)
    _assert_equal(ask(ranks, examine, role, found.rollouts), expected)


def test_without_coefficients_the_gradient_is_that_of_the_loss_alone(
    ranks: RankPool, found: Reference, expected: Expected
) -> None:
    (plain,) = ask(ranks, examine, role_on(LAYOUTS["one_rank"], found.folder), found.rollouts)
    with pytest.raises(AssertionError):
        assert_pieces_are(plain["packed"].gradients, expected.gradients, TOLERANCE)
    metrics = plain["packed"].metrics
    assert metrics["moe/load_balance_loss"] == metrics["moe/z_loss"] == 0.0
    assert metrics["moe/load_max"] == pytest.approx(expected.metrics["moe/load_max"], rel=TRAINING_TOLERANCE)


def test_what_a_capacity_turns_down_is_counted(ranks: RankPool, found: Reference) -> None:
    """Of n choices each of E experts keeps at most capacity n / E: with 1/2, at least half of them are dropped."""
    fields = {"moe_expert_capacity_factor": 0.5}
    role = role_on(LAYOUTS["one_rank"], found.folder, override_transformer_config=fields)
    (answer,) = ask(ranks, examine, role, found.rollouts)
    dropped = answer["packed"].metrics["moe/dropped"]
    assert 0.45 < dropped < 0.9  # rounded up to whole tokens
