"""The plan says to the byte what every rank holds of parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from megarl.batching.pack import sequences_to_batch
from megarl.parallel.layout import Layout
from megarl.plan.sizes import StaticBytes
from megarl.plan.static import static_of
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.megatron.backend import MegatronBackend
from megarl.types import Sequences
from megarl.verify.pool import RankPool
from megarl.verify.roles import TRAINING, role_on, with_section
from megarl.verify.work import backend_on_rank, update
from tests.dist.parity import SFT, ask
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


def _held_and_planned(role: Role, batch: Sequences) -> tuple[StaticBytes, StaticBytes]:
    """Train one step, so that Adam has its state; return what this rank then holds, and what the plan says it does."""
    backend = backend_on_rank(role)
    update(Actor(backend), batch, SFT)
    return _held(backend), static_of(role, dist.get_rank())


def _held(backend: MegatronBackend) -> StaticBytes:
    chunks: Any = backend.optimizer.chunks
    parameters = list(backend.model.own_parameters())
    gradients = [buffer.grad_data for ddp in chunks for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    return StaticBytes(
        _storage_bytes(parameters), _storage_bytes(gradients), _storage_bytes(_optimizer_tensors(backend, parameters))
    )


def _optimizer_tensors(backend: MegatronBackend, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return Adam's moments, and the main parameters that aren't the model's own."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    outer: Any = backend.optimizer.inner
    tensors: list[Tensor] = []
    for part in getattr(outer, "chained_optimizers", [outer]):
        adam = part.optimizer
        for group in adam.param_groups:
            tensors += [p for p in group["params"] if p.untyped_storage().data_ptr() not in own]
        tensors += [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return tensors


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of all storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in tensors if t.numel()}.values())


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "own_optimizer"])
@pytest.mark.parametrize(
    ("model", "layout"),
    [("qwen2-tied", Layout(4, pp=2)), ("qwen2-tied", Layout(4, pp=2, vpp=2)), ("qwen3_moe-untied", Layout(4, ep=2))],
    ids=["pp2_dp2", "pp2_vpp2_dp2", "dp2_ep2"],
)
def test_buckets_that_are_reduced_early_are_padded_as_planned(
    ranks: RankPool, tmp_path: Path, model: str, layout: Layout, distributed: bool
) -> None:
    save_tiny_model(model, tmp_path, num_hidden_layers=2 * layout.pp)
    batch = sequences_to_batch([[5, 6, 7, 8], [9, 1, 2, 3]] * layout.dp, [[False, True, True, True]] * 2 * layout.dp)
    section = {"use_distributed_optimizer": distributed, "overlap_grad_reduce": True, "ddp_bucket_size": 700}
    role = role_on(layout, tmp_path, dtype="bfloat16", training=TRAINING, **section)
    told = ask(ranks, _held_and_planned, role, batch)
    assert all(held == planned for held, planned in told)
    in_one = static_of(with_section(role, overlap_grad_reduce=False), 0)
    assert (told[0][0] == in_one) == (not distributed), "padding of several buckets isn't that of one"


@pytest.mark.parametrize(
    ("dtype", "distributed"),
    [
        pytest.param("bfloat16", True, id="bfloat16-distributed_optimizer"),
        pytest.param("float32", False, id="float32-own_optimizer"),
        pytest.param("bfloat16", False, id="bfloat16-own_optimizer", marks=pytest.mark.long),
        pytest.param("float32", True, id="float32-distributed_optimizer", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, id=f"{model}-{name}", marks=() if (model, name) in QUICK else pytest.mark.long)
        for model, name, layout in CASES
    ],
)
def test_every_rank_holds_the_planned_bytes(
    ranks: RankPool, tmp_path: Path, model: str, layout: Layout, dtype: str, distributed: bool
) -> None:
    save_tiny_model(model, tmp_path, num_hidden_layers=2 * layout.vpp)  # pp x vpp is at most that
    batch = sequences_to_batch([[5, 6, 7, 8], [9, 1, 2, 3]] * layout.dp, [[False, True, True, True]] * 2 * layout.dp)
    section = {"use_distributed_optimizer": distributed}
    role = role_on(layout, tmp_path, dtype=dtype, training=TRAINING, **section)
    for held, planned in ask(ranks, _held_and_planned, role, batch):
        assert held == planned
