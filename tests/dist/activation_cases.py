"""What a real forward pass keeps for its backward pass."""

from __future__ import annotations

from pathlib import Path

import torch

from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RecomputeConfig
from megarl.data.batch import pack
from megarl.model.attention import describe_packing
from megarl.model.weights import RandomSource
from megarl.parallel.layout import Layout
from megarl.plan.activations import Pass, chunk_bytes
from megarl.train.model import ModelSpec
from megarl.train.policy import Policy
from megarl.types import Batch
from tests.dist.saved_bytes import saved_activation_bytes


def kept_and_planned(
    folder: Path, layout: Layout, dtype: torch.dtype, recompute: RecomputeConfig, batch: Batch
) -> tuple[int, int]:
    """Score the whole batch as one micro-batch; return the bytes kept, and what the plan says."""
    shape, device = read_model_shape(folder), torch.device("cpu")
    policy = Policy(ModelSpec(shape, layout, dtype, device, recompute=recompute), RandomSource(shape, 0))
    multiple = layout.tp if layout.sequence_parallel else 1
    micro = pack(batch, list(range(len(batch))), packed=True, multiple=multiple)

    def forward() -> object:
        packing = describe_packing(list(micro.lengths), device)
        sequences = micro.sequences if shape.num_experts else None
        logits = policy.module(micro.tokens, micro.positions, None, packed_seq_params=packing, padding_mask=sequences)
        return policy.score(micro, logits, 1.0)

    policy.module.train()
    with policy.groups.active():
        kept = saved_activation_bytes(forward, policy.module.parameters())
    planned = Pass(shape, layout, micro.tokens.numel(), dtype.itemsize, fused=False)
    return kept, chunk_bytes(planned, 0, 0, recompute)
