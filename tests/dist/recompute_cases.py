"""What the tests of recomputation run on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megarl.batching.plan import micro_batches
from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.train.actor import Actor
from megarl.train.megatron.model import ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import Metrics, OptimizerStep
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import SafetensorsSource
from tests.dist.parity_cases import Piece, pieces
from tests.dist.saved_bytes import saved_activation_bytes


@dataclass(frozen=True)
class Recomputed:
    """saved_bytes: of one forward pass over the whole batch on one stage; 0 where there are several stages."""

    metrics: list[Metrics]
    weights: list[Piece]
    saved_bytes: int


def train_with(
    folder: Path,
    layout: Layout,
    dtype: torch.dtype,
    packed: bool,
    batch: Batch,
    optimizer: OptimizerSpec,
    choices: dict[str, RecomputeConfig | None],
) -> dict[str, Recomputed]:
    """Take three optimizer steps from the weights of the folder with each choice of what to compute again."""
    return {name: _train(folder, layout, dtype, packed, batch, optimizer, c) for name, c in choices.items()}


def _train(
    folder: Path,
    layout: Layout,
    dtype: torch.dtype,
    packed: bool,
    batch: Batch,
    optimizer: OptimizerSpec,
    recompute: RecomputeConfig | None,
) -> Recomputed:
    shape = read_model_shape(folder)
    spec = ModelSpec(shape, layout, dtype, torch.device("cpu"), packed, recompute=recompute)
    actor = Actor(spec, SafetensorsSource(folder, shape), optimizer)
    saved_bytes = _saved_bytes(actor, batch) if layout.pp == 1 else 0
    count = len(batch) // layout.dp
    first = count * layout.coordinates(dist.get_rank()).dp
    tokens_B = batch.mask_BS.sum(-1)
    step = OptimizerStep(micro_batches(range(count), 2), int(tokens_B.sum()), int((tokens_B > 0).sum()))
    metrics = actor.update_sft(batch.rows(list(range(first, first + count))), [step] * 3)
    return Recomputed(metrics, pieces(actor, actor.parameters()), saved_bytes)


def _saved_bytes(actor: Actor, batch: Batch) -> int:
    """Measure the model's own forward pass in training mode, without a loss."""
    micro = actor.pack(batch, range(len(batch)))
    actor.module.train()
    with actor.groups.active():
        return saved_activation_bytes(lambda: actor.forward(actor.module, micro), actor.module.parameters())
