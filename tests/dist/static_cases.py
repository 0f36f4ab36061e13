"""What a rank really holds of a trained model, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.layout import Layout
from megarl.plan.static import StaticBytes, static_bytes
from megarl.train.actor import Actor
from megarl.train.megatron.model import ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import OptimizerStep
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import RandomSource


def held_and_planned(
    folder: Path, layout: Layout, dtype: torch.dtype, optimizer: OptimizerSpec, batch: Batch
) -> tuple[StaticBytes, StaticBytes]:
    """Train one step, so that Adam has its state; return what this rank then holds, and what the plan says it does."""
    shape = read_model_shape(folder)
    actor = Actor(ModelSpec(shape, layout, dtype, torch.device("cpu")), RandomSource(shape, 0), optimizer)
    actor.update_sft(batch, [OptimizerStep(((0, 1),), 10.0, 2.0)])
    planned = static_bytes(
        shape,
        layout,
        dist.get_rank(),
        dtype_bytes=dtype.itemsize,
        trained=True,
        distributed_optimizer=optimizer.use_distributed_optimizer,
    )
    return _held(actor), planned


def _held(actor: Actor) -> StaticBytes:
    chunks: Any = actor.optimizer.chunks
    parameters = list(actor.own_parameters())
    gradients = [buffer.grad_data for ddp in chunks for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    return StaticBytes(
        _storage_bytes(parameters), _storage_bytes(gradients), _storage_bytes(_optimizer_tensors(actor, parameters))
    )


def _optimizer_tensors(actor: Actor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return Adam's moments, and the main parameters that aren't the model's own."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    outer: Any = actor.optimizer.inner
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
