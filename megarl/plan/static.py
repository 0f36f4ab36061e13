"""Bytes that a rank holds from start to end of a run: parameters, gradient buffers, optimizer state.

Exact: on Megatron the parameters are those of the name map, and the buffers are laid out as megatron.core's DDP and
distributed optimizer do (param_and_grad_buffer.py, distrib_optimizer.py); FSDP's are in ``megarl.plan.fsdp``. Real
ranks are compared with both in tests/dist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from megarl.config.schema import BackendConfig, TrainedMegatronConfig
from megarl.parallel.layout import Coordinates, Layout, layers_of_chunks
from megarl.plan.fsdp import fsdp_static_bytes
from megarl.plan.sizes import FP32_BYTES, StaticBytes
from megarl.roles import DTYPE_BYTES, Role
from megarl.weights.adapters import Lora
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import megatron_shards

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
# Parameters of a bucket that megatron.core's DDP reduces at once, where nothing else is set.
_LEAST_BUCKET, _BUCKET_OF_A_REPLICA = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Parameter:
    """One parameter on one rank. own_bucket: an embedding that two stages share is reduced apart."""

    name: str
    numel: int
    is_expert: bool = False
    own_bucket: bool = False


@cache
def chunk_parameters(shape: ModelShape, layout: Layout, stage: int) -> tuple[tuple[Parameter, ...], ...]:
    """Return the parameters of each model chunk of any rank of a pipeline stage, as megatron registers them in order.

    Layers of a kind are alike: one of each is looked up, and stands with its name for all of its kind.
    """
    sample = replace(shape, num_layers=2 * layout.pp, dense_layers=tuple(range(0, 2 * layout.pp, 2)))
    shared = shape.tied and layout.pp > 1
    parameters = [
        Parameter(
            shard.name,
            math.prod(shard.shape),
            is_expert=".experts." in shard.name,
            own_bucket=shared and shard.name in ("embedding.word_embeddings.weight", "output_layer.weight"),
        )
        for shard in megatron_shards(sample, replace(layout, vpp=1), layout.rank(Coordinates(tp=0, dp=0, pp=stage)))
    ]
    parts: dict[tuple[int, int], list[Parameter]] = {}
    for parameter in sorted(parameters, key=lambda p: _place(p.name)):
        parts.setdefault(_place(parameter.name)[:2], []).append(parameter)
    chunks = [
        [p for layer in layers for p in parts[1, 2 * stage + shape.has_experts(layer)]]
        for layers in layers_of_chunks(shape.num_layers, layout, stage)
    ]
    first, last = ([p for at, part in parts.items() if at[0] == end for p in part] for end in (0, 2))
    chunks[0] = first + chunks[0]
    chunks[-1] += last
    return tuple(map(tuple, chunks))


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
    adam_bytes: int | None = None,
    bucket_numel: int | None = None,
) -> StaticBytes:
    """Return the bytes that ``rank`` holds of a role.

    dtype_bytes: of a parameter; below 4, and on the host, Adam steps float32 copies. adam_bytes: that Adam keeps of one
    parameter, where it isn't all float32. bucket_numel: see Stored. Adam's step counters, 4 bytes a
    parameter where torch's own AdamW is used, are left out.
    """
    stage = layout.coordinates(rank).pp
    if not trained:
        return StaticBytes(sum(p.numel for c in chunk_parameters(shape, layout, stage) for p in c) * dtype_bytes)
    dense, experts = (
        _buffer(shape, layout, stage, is_expert, distributed_optimizer, bucket_numel) for is_expert in (False, True)
    )
    stepped = dense.stepped_numel[_dense_replica(layout, rank)]
    stepped += experts.stepped_numel[layout.expert_coordinates(rank).edp]
    has_copies = dtype_bytes < FP32_BYTES or optimizer_on_host
    state_bytes = adam_bytes or 2 * FP32_BYTES + (FP32_BYTES if has_copies else 0)
    return StaticBytes(
        parameters=(dense.numel + experts.numel) * dtype_bytes,
        gradients=(dense.numel + experts.numel) * FP32_BYTES,
        optimizer=stepped * state_bytes,
    )


@dataclass(frozen=True)
class Stored:
    """What decides the bytes that ranks hold of a role from start to end; see ``static_bytes``.

    bucket_numel: parameters after which gradients that are reduced while the backward pass computes have another
    bucket; None: they are reduced afterwards, from one.
    """

    shape: ModelShape
    layout: Layout
    dtype_bytes: int
    trained: bool
    distributed_optimizer: bool
    optimizer_on_host: bool
    adam_bytes: int | None
    bucket_numel: int | None = None
    lora: Lora | None = None

    def on(self, rank: int) -> StaticBytes:
        """Return the bytes of ``rank``."""
        if self.layout.is_fsdp:
            return fsdp_static_bytes(
                *(self.shape, self.layout, rank), dtype_bytes=self.dtype_bytes, trained=self.trained, lora=self.lora
            )
        return static_bytes(
            self.shape,
            self.layout,
            rank,
            dtype_bytes=self.dtype_bytes,
            trained=self.trained,
            distributed_optimizer=self.distributed_optimizer,
            optimizer_on_host=self.optimizer_on_host,
            adam_bytes=self.adam_bytes,
            bucket_numel=self.bucket_numel,
        )


def stored_of(role: Role) -> Stored:
    """Return the facts that decide the bytes that ranks hold of a role."""
    backend = role.backend
    return Stored(
        role.shape,
        role.layout,
        role.dtype_bytes,
        role.is_trained,
        isinstance(backend, TrainedMegatronConfig) and backend.use_distributed_optimizer,
        role.residency.optimizer_on_host,
        _adam_bytes(backend),
        bucket_numel_of(role),
        role.lora,
    )


def bucket_numel_of(role: Role) -> int | None:
    """Return after how many parameters a role's gradients have another bucket; None: they are reduced in one."""
    backend = role.backend
    if not isinstance(backend, TrainedMegatronConfig) or not backend.overlap_grad_reduce:
        return None
    return backend.ddp_bucket_size or max(_LEAST_BUCKET, _BUCKET_OF_A_REPLICA * role.layout.dp)


def num_buckets(role: Role) -> int:
    """Return the number of buckets, as an int, that a rank of a trained role's first stage reduces its gradients in."""
    stored = stored_of(role)
    facts = stored.distributed_optimizer, stored.bucket_numel
    return sum(len(_stage_buckets(role.shape, role.layout, 0, is_expert, *facts)) for is_expert in (False, True))


def static_of(role: Role, rank: int) -> StaticBytes:
    """Return the bytes that ``rank`` holds of a role from start to end."""
    return stored_of(role).on(rank)


def _adam_bytes(backend: BackendConfig) -> int | None:
    """Return the bytes that Transformer Engine's Adam keeps of a parameter: 16 bits of it, and the moments."""
    if not isinstance(backend, TrainedMegatronConfig) or not backend.use_precision_aware_optimizer:
        return None
    moments = DTYPE_BYTES[backend.exp_avg_dtype] + DTYPE_BYTES[backend.exp_avg_sq_dtype]
    return DTYPE_BYTES["bfloat16"] + moments


def _dense_replica(layout: Layout, rank: int) -> int:
    """Return the rank's place among those with the same dense weights: data-parallel times context ranks."""
    place = layout.coordinates(rank)
    return place.cp + layout.cp * place.dp


@dataclass(frozen=True)
class _Buffer:
    """Megatron's gradient buffers of some parameters. numel: with padding. stepped_numel: what each replica steps."""

    numel: int
    stepped_numel: tuple[int, ...]


@cache
def _buffer(
    shape: ModelShape, layout: Layout, stage: int, is_expert: bool, distributed: bool, bucket_numel: int | None
) -> _Buffer:
    """Return the buffers of a stage's experts, or of all the rest: one for each chunk, taken together."""
    replicas = layout.edp if is_expert else layout.dp * layout.cp
    numel, stepped = 0, [0] * replicas
    for bucket in _stage_buckets(shape, layout, stage, is_expert, distributed, bucket_numel):
        end = bucket[-1][1]
        size = _round_up(end, math.lcm(replicas, _BUCKET_ALIGNMENT)) if distributed else end
        numel += size
        share = size // replicas
        for start, stop in bucket if distributed else ():
            for replica in range(start // share, -(-stop // share)):
                stepped[replica] += min(share * (replica + 1), stop) - max(share * replica, start)
    return _Buffer(numel, tuple(stepped) if distributed else (numel,) * replicas)


def _stage_buckets(
    shape: ModelShape, layout: Layout, stage: int, is_expert: bool, distributed: bool, bucket_numel: int | None
) -> list[list[tuple[int, int]]]:
    """Return the buckets of all chunks of a stage: the first chunk's of the first stage are split, whose come last."""
    chunks = chunk_parameters(shape, layout, stage)
    return [
        bucket
        for i, chunk in enumerate(chunks)
        for bucket in _buckets(
            [p for p in chunk if p.is_expert == is_expert], distributed, bucket_numel if stage == i == 0 else None
        )
    ]


def _buckets(
    parameters: Sequence[Parameter], distributed: bool, bucket_numel: int | None
) -> list[list[tuple[int, int]]]:
    """Cut parameters into buckets, in the order of the backward pass: from where to where each stands in its bucket.

    The distributed optimizer aligns them, and has shared parameters in a bucket of their own. bucket_numel: after which
    the next parameter opens another one.
    """
    buckets: list[list[tuple[int, int]]] = []
    is_open = False
    for parameter in reversed(parameters):
        is_alone = distributed and parameter.own_bucket
        if not is_open or is_alone:
            buckets.append([])
        start = buckets[-1][-1][1] if buckets[-1] else 0
        start = _round_up(start, _PARAMETER_ALIGNMENT if distributed else 1)
        stop = start + parameter.numel
        buckets[-1].append((start, stop))
        is_open = not is_alone and (bucket_numel is None or stop < bucket_numel)
    return buckets


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
