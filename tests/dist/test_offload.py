"""What waits in host memory is gone from the device, and comes back bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.batching.pack import sequences_to_batch
from megarl.config.build import build_config
from megarl.config.schema import SFTConfig
from megarl.parallel.layout import Layout
from megarl.train.work import PolicyLossSpec, ValueLossSpec
from megarl.types import Batch
from tests.dist import parity
from tests.dist.offload_cases import Held, Lived, Run, live, work
from tests.dist.ranks import RankPool
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.unit.composed_configs import composed_values

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 4)
OPTIMIZER = replace(parity.OPTIMIZER, lr=1e-3)
POLICY_LOSS = PolicyLossSpec(
    PolicyLossSettings(clip_low=0.2, clip_high=0.2, clip_c=3.0),
    loss_agg_mode="token-mean",
    kl_coef=0.1,
    kl_type="low_var_kl",
    temperature=1.0,
)
TP2_PP2, DP2 = Layout(4, tp=2, pp=2, sequence_parallel=True), Layout(2)
PP2_VPP2 = Layout(2, pp=2, vpp=2)
NOTHING = Held(0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload")
    save_tiny_model("qwen2-tied", path, num_hidden_layers=4)  # an embedding on two stages, and biases
    return path


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = sequences_to_batch(tokens, [[i >= 2 for i in range(length)] for length in LENGTHS])
    noise = [torch.randn(rows.tokens_BS.shape, generator=generator) * rows.mask_BS for _ in range(5)]
    return replace(
        rows,
        old_logprobs_BS=-noise[0].abs(),
        ref_logprobs_BS=-noise[1].abs(),
        advantages_BS=noise[2],
        values_BS=noise[3],
        returns_BS=noise[4],
    )


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "replicated_optimizer"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(TP2_PP2, "float32", id="tp2_pp2+sp-float32", marks=pytest.mark.long),
        pytest.param(TP2_PP2, "bfloat16", id="tp2_pp2+sp-bfloat16", marks=pytest.mark.long),
        pytest.param(DP2, "float32", id="dp2-float32"),
        pytest.param(DP2, "bfloat16", id="dp2-bfloat16"),
        pytest.param(PP2_VPP2, "float32", id="pp2_vpp2-float32"),
        pytest.param(PP2_VPP2, "bfloat16", id="pp2_vpp2-bfloat16"),
    ],
)
def test_roles_that_leave_their_device_between_uses_say_and_learn_the_same_to_the_bit(
    ranks: RankPool, folder: Path, batch: Batch, layout: Layout, dtype: str, distributed: bool
) -> None:
    optimizer = replace(OPTIMIZER, use_distributed_optimizer=distributed)
    value_loss = ValueLossSpec(0.3, "token-mean")
    run = Run(folder, layout, getattr(torch, dtype), batch, optimizer, POLICY_LOSS, value_loss)
    answers: list[list[Lived]] = ranks.run(live, run, (False, True), world_size=layout.world_size)
    for kept, offloaded in answers:
        _assert_same(kept, offloaded)
        for role, resting in offloaded.resting.items():
            assert set(resting) == {NOTHING}, role
            assert offloaded.used[role] == kept.used[role] == kept.resting[role][-1], role
            assert kept.used[role].parameters > 0, role
        assert all(min(kept.used[r].gradients, kept.used[r].optimizer) > 0 for r in ("actor", "critic"))


def _assert_same(one: Lived, other: Lived) -> None:
    for kept, offloaded in zip(one.rounds, other.rounds, strict=True):
        assert kept.actor == offloaded.actor
        assert kept.critic == offloaded.critic
        for name in ("ref_logprobs_BS", "old_logprobs_BS", "values_BS"):
            expected, found = getattr(kept, name), getattr(offloaded, name)
            assert found is expected is None or found.equal(expected), name
    for expected, found in zip(one.weights, other.weights, strict=True):
        assert found.values.equal(expected.values), found.name


def test_a_worker_trains_evaluates_and_exports_the_same_whether_or_not_it_offloads_or_fuses_its_head(
    ranks: RankPool, folder: Path, batch: Batch, tmp_path: Path
) -> None:
    changes: dict[str, object] = {
        "model.path": str(folder),
        "megatron.tensor_model_parallel_size": 2,
        "megatron.pipeline_model_parallel_size": 2,
        "optim.lr": 1e-3,
        "lr_scheduler.warmup_steps": 0,
    }
    offload = dict.fromkeys(("megatron.param_offload", "megatron.grad_offload", "megatron.optimizer_offload"), True)
    fused = {"model.use_fused_kernels": True}
    configs = {
        name: build_config(SFTConfig, composed_values("sft_trainer", **changes, **own))
        for name, own in {"kept": {}, "offloaded": offload, "fused": fused}.items()
    }
    answers = ranks.run(work, folder, configs, tmp_path, batch)
    for answer in answers:
        assert answer["offloaded"] == answer["kept"]
        for step, same_step in zip(answer["fused"], answer["kept"], strict=True):
            for metrics, expected in zip(step, same_step, strict=True):
                assert metrics == pytest.approx(expected, rel=2e-2)
    assert any(answer["fused"] != answer["kept"] for answer in answers), "logits were kept"
    kept, offloaded, start = (
        load_file(path / "model.safetensors") for path in (tmp_path / "kept", tmp_path / "offloaded", folder)
    )
    assert [name for name, tensor in kept.items() if not tensor.equal(offloaded[name])] == []
    assert any(not tensor.equal(start[name].bfloat16()) for name, tensor in kept.items())
