"""An optimizer on the host learns what one on the device does, and leaves nothing of Adam on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from megarl.batching.pack import sequences_to_batch
from megarl.parallel.layout import Layout
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.types import Batch
from tests.dist import parity
from tests.dist.host_optimizer_cases import PIECE_NUMEL, Learned, learn, learn_on
from tests.dist.parity_cases import Setup
from tests.dist.ranks import RankPool
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4)
OPTIMIZER = replace(parity.OPTIMIZER, lr=1e-3, schedule="cosine")
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


ON_HOST = replace(OPTIMIZER, optimizer_on_host=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("model", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_three_updates_on_the_host_are_those_on_the_device(
    ranks: RankPool, tmp_path: Path, batch: Batch, model: str, layout: Layout, dtype: torch.dtype
) -> None:
    save_tiny_model(model, tmp_path)
    setup = Setup(tmp_path, layout, dtype=dtype)
    for device, host in ranks.run(learn, setup, [OPTIMIZER, ON_HOST], batch, world_size=layout.world_size):
        assert len(host.metrics) == 3
        _assert_close(host, device)
        # Of all that Megatron's optimizer holds, only this isn't parameters and gradients of the model.
        held, device_held = host.held, device.held
        expected = 12 * held.stepped_numel + 4 * held.num_parameters + held.passing
        assert held.passing == held.num_optimizers * 4 * PIECE_NUMEL * 4
        assert 0 <= held.others - expected <= 8 * held.num_optimizers  # a scale and a flag of each
        # Parameters in float32 are main parameters where Adam is on the device. On the host it has its own.
        main_bytes = 4 if dtype == torch.float32 else 0
        assert held == replace(
            device_held,
            others=device_held.others + main_bytes * held.stepped_numel + held.passing,
            passing=held.passing,
        )


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(ON_HOST, ON_HOST), (OPTIMIZER, ON_HOST), (ON_HOST, OPTIMIZER)],
    ids=["host_to_host", "device_to_host", "host_to_device"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_state_goes_on_wherever_it_is_loaded(
    ranks: RankPool, tmp_path: Path, batch: Batch, dtype: torch.dtype, saved: OptimizerSpec, loaded: OptimizerSpec
) -> None:
    model, layout = LAYOUTS["dp2"]
    save_tiny_model(model, tmp_path)
    setup = Setup(tmp_path, layout, dtype=dtype)
    for first, second in ranks.run(learn_on, setup, saved, loaded, batch, world_size=layout.world_size):
        _assert_close(second, first)
        if saved == loaded:
            assert first.metrics == second.metrics
            assert first.held == second.held  # nothing that was loaded is kept beside what was there


def _assert_close(found: Learned, expected: Learned) -> None:
    # torch's fused Adam, which steps on the host, and its plain one round differently in the last bit.
    for of_found, of_expected in zip(found.metrics, expected.metrics, strict=True):
        assert of_found == pytest.approx(of_expected, rel=1e-6, abs=1e-6)
    assert_close(found.weights, expected.weights, rtol=0, atol=1e-6)
    assert_close(found.state, expected.state, rtol=0, atol=1e-6)
