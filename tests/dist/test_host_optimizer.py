"""An optimizer on the host learns what one on the device does, and leaves nothing of Adam on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from megarl.data.batch import sequences_to_batch
from megarl.parallel.layout import Layout
from megarl.train.optimizer import OptimizerSpec
from megarl.types import Batch
from tests.dist.host_optimizer_cases import PIECE_NUMEL, Learned, learn, learn_on
from tests.dist.parity_cases import Setup
from tests.dist.ranks import RankPool
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4)
OPTIMIZER = OptimizerSpec(
    lr=1e-3,
    min_lr=0.0,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    eps=1e-5,
    clip_grad=1.0,
    schedule="cosine",
    warmup_steps=0,
    total_steps=10,
    use_distributed_optimizer=True,
)
LAYOUTS = {
    "tp2_pp2+sp": ("qwen2-tied", Layout(4, tp=2, pp=2, sequence_parallel=True)),
    "dp2": ("qwen2-tied", Layout(2)),
    "moe_ep2": ("qwen3_moe-untied", Layout(2, ep=2)),
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    return sequences_to_batch(tokens, [[i >= 2 for i in range(length)] for length in LENGTHS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("model", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_three_updates_on_the_host_are_those_on_the_device(
    ranks: RankPool, tmp_path: Path, batch: Batch, model: str, layout: Layout, dtype: torch.dtype
) -> None:
    save_tiny_model(model, tmp_path)
    setup = Setup(tmp_path, layout, dtype=dtype)
    for device, host in ranks.run(learn, setup, OPTIMIZER, batch, world_size=layout.world_size):
        print(device.held, host.held)
        for a, b in zip(device.metrics, host.metrics): print({k: (a[k]-b[k]) for k in a})
        for d, h in zip(device.state, host.state):
            pass
        for i in range(3):
            print("state", i, max(float((d[i]-h[i]).abs().max()) for d, h in zip(device.state, host.state)))
        print("w", max(float((d-h).abs().max()) for d, h in zip(device.weights, host.weights)), sum(int((d!=h).sum()) for d, h in zip(device.weights, host.weights)))
    assert 0
