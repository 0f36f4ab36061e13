"""The plan says within 5 % what real forward passes keep for their backward passes, alone and in a schedule."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from megarl.batching.pack import sequences_to_batch
from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.types import Batch
from tests.dist.activation_cases import kept_and_planned
from tests.dist.parity import OPTIMIZER
from tests.dist.pipeline_cases import updates
from tests.dist.ranks import RankPool

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS.values(), ids=EXPERT_LAYOUTS)
def test_experts_keep_the_planned_bytes_over_all_ranks(
    ranks: RankPool, tmp_path: Path, layout: Layout, dtype: torch.dtype
) -> None:
    config = {"architectures": ["Qwen3MoeForCausalLM"], **SIZES, **EXPERTS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    answers = ranks.run(
        kept_and_planned, tmp_path, layout, dtype, RECOMPUTE["nothing"], _batch(), world_size=layout.world_size
    )
    # Which rank has how many tokens is the router's choice; the plan spreads them evenly.
    assert sum(planned for _, planned in answers) == pytest.approx(sum(kept for kept, _ in answers), rel=TOLERANCE)


def _quick(architecture: str, layout: str) -> bool:
    return layout in ("one_rank", "tp2+sp") and architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("architecture", "layout"),
    [
        pytest.param(a, layout, id=f"{a}-{name}", marks=() if _quick(a, name) else pytest.mark.long)
        for a in ARCHITECTURES
        for name, layout in LAYOUTS.items()
    ],
)
def test_a_micro_batch_keeps_the_planned_bytes(
    ranks: RankPool, tmp_path: Path, architecture: str, layout: Layout, dtype: torch.dtype, recompute: RecomputeConfig
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **SIZES}))
    for kept, planned in ranks.run(
        kept_and_planned, tmp_path, layout, dtype, recompute, _batch(), world_size=layout.world_size
    ):
        assert planned == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize("recompute", [RECOMPUTE["nothing"], RECOMPUTE["uniform_1"]], ids=["nothing", "uniform_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=() if name == "tp2+sp" else pytest.mark.long)
        for name, layout in LAYOUTS.items()
    ],
)
def test_a_fused_head_keeps_the_planned_bytes_which_no_vocabulary_makes_more(
    ranks: RankPool, tmp_path: Path, layout: Layout, dtype: torch.dtype, recompute: RecomputeConfig
) -> None:
    kept_by_vocabulary = []
    for vocab_size in (500, 5000):
        config = {"architectures": ["Qwen3ForCausalLM"], **SIZES, "vocab_size": vocab_size}
        (tmp_path / "config.json").write_text(json.dumps(config))
        answers = ranks.run(
            kept_and_planned, tmp_path, layout, dtype, recompute, _batch(), True, world_size=layout.world_size
        )
        for kept, planned in answers:
            assert planned == pytest.approx(kept, rel=TOLERANCE)
        kept_by_vocabulary.append([kept for kept, _ in answers])
    assert kept_by_vocabulary[0] == kept_by_vocabulary[1]


NUM_MICRO_BATCHES = (1, 2, 3, 4, 5)
ROWS_EACH, LENGTH = 2, 48
MIXED = {"architectures": ["Qwen2MoeForCausalLM"], **EXPERTS, "shared_expert_intermediate_size": 80}
EIGHT_LAYERS = {
    "dense": {"architectures": ["Qwen3ForCausalLM"]},
    "first_dense": MIXED | {"mlp_only_layers": [0]},
    "some_dense": MIXED | {"mlp_only_layers": [0, 3, 6, 7]},
}
PIPELINES = {
    "pp2": Layout(2, pp=2),
    "pp2xvpp2": Layout(2, pp=2, vpp=2),
    "pp2xvpp4": Layout(2, pp=2, vpp=4),
    "pp4": Layout(4, pp=4),
    "pp4xvpp2": Layout(4, pp=4, vpp=2),
    "tp2xpp2xvpp2+sp": Layout(4, tp=2, pp=2, vpp=2, sequence_parallel=True),
}
ONE_LAYER_EACH = ("pp2xvpp4", "pp4xvpp2")
QUICK = {
    *(("dense", layout, "fp32", "nothing") for layout in ("pp2", "pp2xvpp2")),
    *(("some_dense", layout, "fp32", choice) for layout in ("pp2", "pp2xvpp2") for choice in ("nothing", "uniform_1")),
    ("first_dense", "pp2", "fp32", "block_2"),
}


@pytest.mark.parametrize(
    ("model", "layout", "dtype", "recompute"),
    [
        pytest.param(*case, id="-".join(case), marks=() if case in QUICK else pytest.mark.long)
        for case in product(EIGHT_LAYERS, PIPELINES, ("fp32", "bf16"), RECOMPUTE)
        if case[1] not in ONE_LAYER_EACH or not case[3].endswith("_2")  # more layers than there are: refused
    ],
)
def test_a_schedule_runs_as_planned_and_keeps_the_planned_bytes_at_its_fullest_moment(
    ranks: RankPool, tmp_path: Path, model: str, layout: str, dtype: str, recompute: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"num_hidden_layers": 8} | EIGHT_LAYERS[model]))
    setup = PIPELINES[layout], {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], RECOMPUTE[recompute]
    rows = ROWS_EACH * max(NUM_MICRO_BATCHES)
    batch = sequences_to_batch([list(range(1, LENGTH + 1))] * rows, [[False] + [True] * (LENGTH - 1)] * rows)
    for rank in ranks.run(
        updates, tmp_path, *setup, OPTIMIZER, batch, ROWS_EACH, NUM_MICRO_BATCHES, world_size=setup[0].world_size
    ):
        for update in rank:
            assert update.passes == update.planned_passes
            assert update.planned_bytes == pytest.approx(update.peak_bytes, rel=TOLERANCE)


def _batch() -> Batch:
    lengths = (40, 56, 64)
    return sequences_to_batch([list(range(1, n + 1)) for n in lengths], [[False] + [True] * (n - 1) for n in lengths])
