"""The plan says within 5 % what real forward passes keep for their backward passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarl.batching.pack import sequences_to_batch
from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.plan.activations import chunk_bytes, pass_of, recompute_of
from megarl.roles import Role
from megarl.types import Sequences
from megarl.verify.pool import RankPool
from megarl.verify.roles import role_on
from megarl.verify.work import backend_on_rank
from megarl.weights.model_shape import read_model_shape
from tests.dist.parity import ask
from tests.dist.saved_bytes import saved_activation_bytes

TOLERANCE = 0.05
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
LAYOUTS = {
    "one_rank": Layout(1),
    "tp2": Layout(2, tp=2),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "tp4+sp": Layout(4, tp=4, sequence_parallel=True),
}
RECOMPUTE = {
    "nothing": RecomputeConfig(None, None, None),
    "selective": RecomputeConfig("selective", None, None),
    "uniform_1": RecomputeConfig("full", "uniform", 1),
    "uniform_2": RecomputeConfig("full", "uniform", 2),
    "block_2": RecomputeConfig("full", "block", 2),
}
ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
EXPERT_LAYOUTS = {
    "one_rank": Layout(1),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "ep2": Layout(2, ep=2),
    "tp2_ep2_etp1+sp": Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True),
}


def _kept_and_planned(role: Role, batch: Sequences) -> tuple[int, int]:
    """Score the whole batch as one micro-batch; return the bytes kept, and what the plan says."""
    backend = backend_on_rank(role)
    (micro,), model = backend.pack(batch, [range(len(batch))]), backend.model

    def forward() -> object:
        return model.output(micro, model.forward(model.module, micro)).logprobs(1.0)

    model.set_training(True)
    with model.groups.active():
        kept = saved_activation_bytes(forward, model.own_parameters())
    return kept, chunk_bytes(pass_of(role, micro.tokens.numel(), fused=False), 0, 0, recompute_of(role))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS.values(), ids=EXPERT_LAYOUTS)
def test_experts_keep_the_planned_bytes_over_all_ranks(
    ranks: RankPool, tmp_path: Path, layout: Layout, dtype: str
) -> None:
    config = {"architectures": ["Qwen3MoeForCausalLM"], **SIZES, **EXPERTS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    answers = ask(ranks, _kept_and_planned, role_on(layout, read_model_shape(tmp_path), dtype=dtype), _batch())
    # Which rank has how many tokens is the router's choice; the plan spreads them evenly.
    assert sum(planned for _, planned in answers) == pytest.approx(sum(kept for kept, _ in answers), rel=TOLERANCE)


def _quick(architecture: str, layout: str) -> bool:
    return layout in ("one_rank", "tp2+sp") and architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "layout"),
    [
        pytest.param(a, layout, id=f"{a}-{name}", marks=() if _quick(a, name) else pytest.mark.long)
        for a in ARCHITECTURES
        for name, layout in LAYOUTS.items()
    ],
)
def test_a_micro_batch_keeps_the_planned_bytes(
    ranks: RankPool, tmp_path: Path, architecture: str, layout: Layout, dtype: str, recompute: RecomputeConfig
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **SIZES}))
    role = role_on(layout, read_model_shape(tmp_path), dtype=dtype, recompute=recompute)
    for kept, planned in ask(ranks, _kept_and_planned, role, _batch()):
        assert planned == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize("recompute", [RECOMPUTE["nothing"], RECOMPUTE["uniform_1"]], ids=["nothing", "uniform_1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=() if name == "tp2+sp" else pytest.mark.long)
        for name, layout in LAYOUTS.items()
    ],
)
def test_a_fused_head_keeps_the_planned_bytes_which_no_vocabulary_makes_more(
    ranks: RankPool, tmp_path: Path, layout: Layout, dtype: str, recompute: RecomputeConfig
) -> None:
    kept_by_vocabulary = []
    for vocab_size in (500, 5000):
        config = {"architectures": ["Qwen3ForCausalLM"], **SIZES, "vocab_size": vocab_size}
        (tmp_path / "config.json").write_text(json.dumps(config))
        shape = read_model_shape(tmp_path)
        role = role_on(layout, shape, dtype=dtype, fused_head=True, recompute=recompute)
        answers = ask(ranks, _kept_and_planned, role, _batch())
        for kept, planned in answers:
            assert planned == pytest.approx(kept, rel=TOLERANCE)
        kept_by_vocabulary.append([kept for kept, _ in answers])
    assert kept_by_vocabulary[0] == kept_by_vocabulary[1]


def _batch() -> Sequences:
    lengths = (40, 56, 64)
    return sequences_to_batch([list(range(1, n + 1)) for n in lengths], [[False] + [True] * (n - 1) for n in lengths])
