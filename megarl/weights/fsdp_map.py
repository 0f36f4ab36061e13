"""The dialect of transformers' models under FSDP: which rows of which Hugging Face tensors a rank has.

A model in memory is named as its checkpoint, but for the experts of a layer, which are one tensor, and the value head,
which stands where the output layer does. Every parameter is split along dim 0, as evenly as whole rows can be: all
ranks have as many, but the last ones fewer or none. Experts are whole on a rank: ``experts.down_proj.5`` is the slice
of expert 5. Of a family outside of the name map, checkpoint and memory have the names of its state dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from megarl.parallel.layout import Layout
from megarl.weights.model_shape import VALUE_HEAD, ModelShape
from megarl.weights.name_map import EMBEDDING, OUTPUT, Entry, entries
from megarl.weights.shard import Pattern, Peers, Segment, Shard, alike, whole


def rows_of(size: int, part: int, num_parts: int) -> range:
    """Return the rows of ``size`` that a rank has, as FSDP cuts them."""
    share = -(-size // num_parts)
    return range(min(size, part * share), min(size, (part + 1) * share))


def fsdp_peers(shape: ModelShape, layout: Layout) -> tuple[Peers, ...]:
    """Return the Peers of a trainer, as a tuple: of each part of the model, the rank of every copy that has it."""
    parts = range(layout.fsdp)
    return tuple(
        Peers(tuple(range(part, layout.world_size, layout.fsdp)), fsdp_patterns(shape, part, layout.fsdp))
        for part in parts
    )


def fsdp_shards(shape: ModelShape, layout: Layout, rank: int) -> tuple[Shard, ...]:
    """Return the shards of one rank of the trainer as a tuple of Shard, by the names of transformers' model."""
    patterns = fsdp_patterns(shape, rank % layout.fsdp, layout.fsdp)
    return tuple(shard for pattern in patterns for shard in pattern.shards())


@lru_cache(maxsize=1024)
def fsdp_patterns(shape: ModelShape, part: int, num_parts: int) -> tuple[Pattern, ...]:
    """Return the patterns of the ``part``-th of ``num_parts`` ranks, as a tuple of Pattern."""
    if not shape.is_mapped:
        own = (_rows_of_tensor(*tensor, part, num_parts) for tensor in shape.tensors)
        return alike(shard for shards in own for shard in shards)
    layers, experts = range(shape.num_layers), rows_of(shape.num_experts, part, num_parts)
    return tuple(
        pattern
        for entry in entries(shape)
        if not (shape.tied and entry.stage == "head" and entry.hf == (EMBEDDING,))
        for shard in (_of_experts(entry) if entry.is_expert else _of_rows(entry, part, num_parts))
        for pattern in entry.patterns(shard, shape, layers, experts)
    )


def _of_rows(entry: Entry, part: int, num_parts: int) -> Iterator[Shard]:
    """Yield this rank's rows of every tensor of an entry, none where it has none."""
    for tensor, size in zip(entry.hf, entry.sizes, strict=True):
        yield from _rows_of_tensor(tensor, size, part, num_parts)


def _rows_of_tensor(tensor: str, size: tuple[int, ...], part: int, num_parts: int) -> Iterator[Shard]:
    """Yield this rank's rows of a tensor, nothing where it has none."""
    rows = rows_of(size[0], part, num_parts)
    if rows:
        segment = Segment(tensor, rows.start, rows.stop)
        yield Shard(name_in_memory(tensor), (len(rows), *size[1:]), 0, (segment,))


def _of_experts(entry: Entry) -> Iterator[Shard]:
    """Yield the slice of one expert: gate above up, or down."""
    block, _, _ = name_in_memory(entry.hf[0]).partition("{e}")
    if entry.split == "glu":
        rows, columns = entry.sizes[0]
        yield Shard(f"{block}gate_up_proj.{{e}}", (2 * rows, columns), 0, tuple(Segment(n, 0, rows) for n in entry.hf))
    else:
        yield replace(whole(entry.hf[0], entry.sizes[0]), name=f"{block}down_proj.{{e}}")


@lru_cache(maxsize=64)
def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the model in memory, the experts of a layer being one."""
    if not shape.is_mapped:
        return {name_in_memory(name): size for name, size in shape.tensors}
    found: dict[str, tuple[int, ...]] = {}
    for pattern in fsdp_patterns(shape, 0, 1):
        name, is_expert, _ = pattern.shard.name.partition(".{e}")
        size = (shape.num_experts, *pattern.shard.shape) if is_expert else pattern.shard.shape
        found |= {name.format(i=layer): size for layer in pattern.layers}
    return found


def name_in_memory(tensor: str) -> str:
    """Return the name in memory of what a checkpoint calls ``tensor``."""
    return OUTPUT if tensor == VALUE_HEAD else tensor.replace(".block_sparse_moe.", ".mlp.")
