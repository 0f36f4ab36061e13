"""The plan says to the byte what every rank holds of parameters, gradients and optimizer state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megarl.data.batch import sequences_to_batch
from megarl.parallel.layout import Layout
from tests.dist.ranks import RankPool
from tests.dist.static_cases import held_and_planned
from tests.dist.test_critic import OPTIMIZER
from tests.dist.tiny_models import save_tiny_model

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
}
MODELS = ("qwen3-tied", "qwen2-untied")


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "own_optimizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_rank_holds_the_planned_bytes(
    ranks: RankPool, tmp_path: Path, model: str, layout: Layout, dtype: torch.dtype, distributed: bool
) -> None:
    save_tiny_model(model, tmp_path)
    batch = sequences_to_batch([[5, 6, 7, 8], [9, 1, 2, 3]], [[False, True, True, True]] * 2)
    optimizer = replace(OPTIMIZER, use_distributed_optimizer=distributed)
    for held, planned in ranks.run(
        held_and_planned, tmp_path, layout, dtype, optimizer, batch, world_size=layout.world_size
    ):
        assert held == planned
