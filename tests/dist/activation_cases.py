"""What a real forward pass keeps for its backward pass."""

from __future__ import annotations

from pathlib import Path

import torch

from megarl.batching.pack import pack
from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.plan.activations import Pass, chunk_bytes
from megarl.train.megatron.model import ModelSpec
from megarl.train.policy import Policy
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import RandomSource
from tests.dist.saved_bytes import saved_activation_bytes


def kept_and_planned(
    folder: Path, layout: Layout, dtype: torch.dtype, recompute: RecomputeConfig, batch: Batch, fused_head: bool = False
) -> tuple[int, int]:
    """Score the whole batch as one micro-batch; return the bytes kept, and what the plan says."""
    shape, device = read_model_shape(folder), torch.device("cpu")
    spec = ModelSpec(shape, layout, dtype, device, recompute=recompute, fused_head=fused_head)
    policy = Policy(spec, RandomSource(shape, 0))
    multiple = layout.tp if layout.sequence_parallel else 1
    micro = pack(batch, list(range(len(batch))), packed=True, multiple=multiple)

    policy.module.train()
    with policy.groups.active():
        kept = saved_activation_bytes(
            lambda: policy.score(micro, policy.forward(policy.module, micro), 1.0), policy.module.parameters()
        )
    planned = Pass(shape, layout, micro.tokens.numel(), dtype.itemsize, fused=False, fused_head=fused_head)
    return kept, chunk_bytes(planned, 0, 0, recompute)
