"""What the reward model tests run on every rank: scores of a batch, on any layout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.batching.plan import micro_batches
from megarl.parallel.layout import Layout
from megarl.train.megatron.model import ModelSpec
from megarl.train.reward_model import RewardModel
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import SafetensorsSource


def score(folder: Path, layout: Layout, batch: Batch) -> dict[bool, Tensor | None]:
    """Return this data-parallel rank's scores, packed and padded, on the rank that reports them.

    Parameters wait on the host between the uses.
    """
    shape = read_model_shape(folder)
    source = SafetensorsSource(folder, shape, may_lack_value_head=False)
    count = len(batch) // layout.dp
    first = count * layout.coordinates(dist.get_rank()).dp
    rows = batch.rows(list(range(first, first + count)))
    answers = {}
    for packed in (True, False):
        spec = ModelSpec(shape, layout, torch.float32, torch.device("cpu"), packed, param_offload=True)
        answers[packed] = RewardModel(spec, source).scores(rows, micro_batches(range(count), 2))
    return answers
