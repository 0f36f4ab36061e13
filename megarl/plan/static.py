"""Bytes that a rank holds from start to end of a run: parameters, gradient buffers, optimizer state.

Exact: the parameters are those of the name map, and the buffers are laid out as megatron.core's DDP and distributed
optimizer do (param_and_grad_buffer.py, distrib_optimizer.py). Real ranks are compared with this in tests/dist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megarl.config.model_shape import ModelShape
from megarl.model.name_map import megatron_shards
from megarl.parallel.layout import Layout

FP32_BYTES = 4
# Where a parameter stands among those of its layer, in the order in which megatron's modules register them; experts
# stand where the feed-forward network does, and after them the shared one.
_IN_A_LAYER = (
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.linear_fc",
)
# The distributed optimizer starts each parameter and each bucket at such multiples, in elements.
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class Parameter:
    """One parameter on one rank. own_bucket: an embedding that two stages share is reduced apart."""

    name: str
    numel: int
    is_expert: bool = False
    own_bucket: bool = False


@dataclass(frozen=True)
class StaticBytes:
    """What one rank holds of one role."""

    parameters: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def rank_parameters(shape: ModelShape, layout: Layout, rank: int) -> tuple[Parameter, ...]:
    """Return the parameters of a rank in the order in which megatron registers them."""
    shared = shape.tied and layout.pp > 1
    parameters = [
        Parameter(
            shard.name,
            math.prod(shard.shape),
            is_expert=".experts." in shard.name,
            own_bucket=shared and shard.name in ("embedding.word_embeddings.weight", "output_layer.weight"),
        )
        for shard in megatron_shards(shape, layout, rank)
    ]
    return tuple(sorted(parameters, key=lambda p: _place(p.name)))


def _place(name: str) -> tuple[int, int, int, int]:
    """Return a sort key: embedding, layers in order, norm, head; experts in order."""
    if name.startswith("embedding"):
        return (0, 0, 0, 0)
    if not name.startswith("decoder.layers."):
        return (2, int(name.startswith("output_layer")), 0, 0)
    parts = name.split(".")
    layer, is_fc2 = int(parts[2]), "linear_fc2" in name
    if "shared_experts" in parts:  # its gate is a parameter of the module, which come before those of its parts
        return (1, layer, len(_IN_A_LAYER), 0 if "gate_weight" in name else 1 + is_fc2)
    if "local_experts" in parts:
        return (1, layer, len(_IN_A_LAYER) - 1, 2 * int(parts[parts.index("local_experts") + 1]) + is_fc2)
    return (1, layer, next(i for i, part in enumerate(_IN_A_LAYER) if part in name), is_fc2)


@cache
def static_bytes(
    shape: ModelShape,
    layout: Layout,
    rank: int,
    *,
    dtype_bytes: int,
    trained: bool,
    distributed_optimizer: bool = False,
    optimizer_on_host: bool = False,
) -> StaticBytes:
    """Return what ``rank`` holds of a role.

    dtype_bytes: of a parameter; below 4, and on the host, Adam steps float32 copies. Adam's step counters, 4 bytes a
    parameter where torch's own AdamW is used, are left out.
    """
    parameters = rank_parameters(shape, layout, rank)
    if not trained:
        return StaticBytes(sum(p.numel for p in parameters) * dtype_bytes)
    dense, experts = (
        _Buffer([p for p in parameters if p.is_expert == is_expert], replicas, replica, distributed_optimizer)
        for is_expert, replicas, replica in (
            (False, layout.dp * layout.cp, _dense_replica(layout, rank)),
            (True, layout.edp, layout.expert_coordinates(rank).edp),
        )
    )
    has_copies = dtype_bytes < FP32_BYTES or optimizer_on_host
    state_bytes = 2 * FP32_BYTES + (FP32_BYTES if has_copies else 0)
    return StaticBytes(
        parameters=(dense.numel + experts.numel) * dtype_bytes,
        gradients=(dense.numel + experts.numel) * FP32_BYTES,
        optimizer=(dense.stepped_numel + experts.stepped_numel) * state_bytes,
    )


def _dense_replica(layout: Layout, rank: int) -> int:
    """Return the rank's place among those with the same dense weights: data-parallel times context ranks."""
    place = layout.coordinates(rank)
    return place.cp + layout.cp * place.dp


class _Buffer:
    """Megatron's gradient buffer of some parameters. numel: with padding. stepped_numel: what this replica steps."""

    def __init__(self, parameters: Sequence[Parameter], replicas: int, replica: int, distributed: bool) -> None:
        if not distributed:
            self.numel = self.stepped_numel = sum(p.numel for p in parameters)
            return
        self.numel = self.stepped_numel = 0
        for bucket in _buckets(parameters):
            ranges, end = [], 0
            for parameter in bucket:
                start = _round_up(end, _PARAMETER_ALIGNMENT)
                end = start + parameter.numel
                ranges.append((start, end))
            size = _round_up(end, math.lcm(replicas, _BUCKET_ALIGNMENT))
            low, high = size // replicas * replica, size // replicas * (replica + 1)
            self.stepped_numel += sum(max(0, min(high, stop) - max(low, start)) for start, stop in ranges)
            self.numel += size


def _buckets(parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    """Cut the parameters into buckets, in the order of the backward pass: one, but for shared parameters."""
    buckets: list[list[Parameter]] = []
    is_open = False
    for parameter in reversed(parameters):
        if not is_open or parameter.own_bucket:
            buckets.append([])
        buckets[-1].append(parameter)
        is_open = not parameter.own_bucket
    return buckets


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
