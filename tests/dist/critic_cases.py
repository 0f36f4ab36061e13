"""What the critic tests run on every rank: values, value updates and exports, on any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.batching.plan import micro_batches
from megarl.parallel.layout import Layout
from megarl.train.critic import Critic
from megarl.train.megatron.model import ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import Metrics, OptimizerStep, ValueLossSpec
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import SafetensorsSource


@dataclass(frozen=True)
class Judged:
    """This data-parallel rank's values on the rank that reports them, and the metrics of its optimizer steps."""

    values_BS: Tensor | None
    metrics: list[Metrics]


def judge(
    folder: Path, layout: Layout, packed: bool, batch: Batch, loss: ValueLossSpec, optimizer: OptimizerSpec, steps: int
) -> Judged:
    """Value the batch, then take ``steps`` optimizer steps on the whole of it."""
    critic = _critic(folder, layout, packed, optimizer)
    rows, micros = _share(batch, layout)
    values_BS = critic.values(rows, micros)
    return Judged(values_BS, critic.update(rows, [_step(batch, micros)] * steps, loss))


def learn_and_export(
    folder: Path, layout: Layout, batch: Batch, loss: ValueLossSpec, optimizer: OptimizerSpec, out: Path
) -> Tensor | None:
    """Take an optimizer step, write the critic to ``out``, and return its values as ``judge`` does."""
    critic = _critic(folder, layout, True, optimizer)
    rows, micros = _share(batch, layout)
    critic.update(rows, [_step(batch, micros)], loss)
    critic.export(out, folder)
    return critic.values(rows, micros)


def _critic(folder: Path, layout: Layout, packed: bool, optimizer: OptimizerSpec) -> Critic:
    shape = read_model_shape(folder).with_value_head()
    spec = ModelSpec(shape, layout, torch.float32, torch.device("cpu"), packed)
    return Critic(spec, SafetensorsSource(folder, shape), optimizer)


def _share(batch: Batch, layout: Layout) -> tuple[Batch, tuple[tuple[int, ...], ...]]:
    """Return this data-parallel rank's rows, and their micro-batches."""
    count = len(batch) // layout.dp
    first = count * layout.coordinates(dist.get_rank()).dp
    return batch.rows(list(range(first, first + count))), micro_batches(range(count), 2)


def _step(batch: Batch, micros: tuple[tuple[int, ...], ...]) -> OptimizerStep:
    return OptimizerStep(micros, *mini_batch_totals(batch.mask_BS.sum(-1)))
