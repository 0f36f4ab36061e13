"""The plan says to the byte what every rank holds of parameters, gradients and optimizer state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megarl.batching.pack import sequences_to_batch
from megarl.parallel.layout import Layout
from tests.dist.parity import OPTIMIZER
from tests.dist.ranks import RankPool
from tests.dist.static_cases import held_and_planned
from tests.dist.tiny_models import MOE_MODELS, save_tiny_model

LAYOUTS = {
    "one_rank": Layout(1),
    "tp2": Layout(2, tp=2),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "pp2": Layout(2, pp=2),
    "dp2": Layout(2),
    "tp4": Layout(4, tp=4),
    "dp4": Layout(4),
    "tp2_pp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "tp2_dp2+sp": Layout(4, tp=2, sequence_parallel=True),
    "pp2_dp2": Layout(4, pp=2),
    "pp2_vpp2": Layout(2, pp=2, vpp=2),
    "cp2_dp2": Layout(4, cp=2),
    "pp2_vpp2_dp2": Layout(4, pp=2, vpp=2),
}
MODELS = ("qwen3-tied", "qwen2-untied")
QUICK = (
    *(("qwen3-tied", name) for name in ("one_rank", "tp2_pp2+sp", "tp2_dp2+sp", "pp2_dp2")),
    *(("qwen3_moe-untied", name) for name in ("dp2_ep2", "tp2_ep2_etp1+sp")),
)
EXPERT_LAYOUTS = {
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "ep2": Layout(2, ep=2),
    "dp2_ep2": Layout(4, ep=2),
    "pp2_ep2": Layout(4, pp=2, ep=2),
    "tp2_ep2_etp1+sp": Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True),
    "tp2_ep2_etp2+sp": Layout(4, tp=2, ep=2, sequence_parallel=True),
    "pp2_vpp2_ep2": Layout(4, pp=2, vpp=2, ep=2),
}
CASES = [
    *((model, name, layout) for model in MODELS for name, layout in LAYOUTS.items()),
    *((model, name, layout) for model in MOE_MODELS for name, layout in EXPERT_LAYOUTS.items()),
]


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "own_optimizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, id=f"{model}-{name}", marks=() if (model, name) in QUICK else pytest.mark.long)
        for model, name, layout in CASES
    ],
)
def test_every_rank_holds_the_planned_bytes(
    ranks: RankPool, tmp_path: Path, model: str, layout: Layout, dtype: torch.dtype, distributed: bool
) -> None:
    save_tiny_model(model, tmp_path, num_hidden_layers=2 * layout.vpp)  # pp x vpp is at most that
    batch = sequences_to_batch([[5, 6, 7, 8], [9, 1, 2, 3]], [[False, True, True, True]] * 2)
    optimizer = replace(OPTIMIZER, use_distributed_optimizer=distributed)
    for held, planned in ranks.run(
        held_and_planned, tmp_path, layout, dtype, optimizer, batch, world_size=layout.world_size
    ):
        assert held == planned
