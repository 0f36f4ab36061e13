"""The one map between Hugging Face, Megatron and vLLM parameters. Load, publish and export all read it.

Each entry names a parameter in the three dialects and how it is split over tensor-parallel ranks. From it follow the
shards of any rank of the trainer and of the engine, in Hugging Face coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megarl.config.model_shape import ModelShape
from megarl.parallel.layout import Layout, split_layers
from megarl.parallel.shard import Segment, Shard, clip

VLLM_VOCAB_MULTIPLE = 64  # vLLM pads the vocabulary to a multiple of this before it splits it


@dataclass(frozen=True)
class Entry:
    """One kind of parameter. ``{i}`` stands for the layer.

    megatron: names, the first that the model has counts (Transformer Engine fuses norms into the next linear).
    split: ``replicated``, ``vocab`` and ``qkv`` and ``glu`` (split rows), ``row`` (split columns).
    stage: ``embedding`` (first), ``layer``, ``head`` (last).
    """

    megatron: tuple[str, ...]
    vllm: str
    hf: tuple[str, ...]
    split: str
    stage: str = "layer"
    bias: bool = False


_LAYER = "model.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_EMBEDDING = "model.embed_tokens.weight"
VALUE_HEAD = "score.weight"  # as transformers' token classification models name it


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_ATTENTION}{part}_proj.{kind}" for part in "qkv")


def entries(shape: ModelShape) -> tuple[Entry, ...]:
    """Return the entries of a model, in checkpoint order."""
    attention, mlp = "decoder.layers.{i}.self_attention.", "decoder.layers.{i}.mlp."
    table = [
        Entry(("embedding.word_embeddings.weight",), _EMBEDDING, (_EMBEDDING,), "vocab", "embedding"),
        Entry(
            ("decoder.layers.{i}.input_layernorm.weight", attention + "linear_qkv.layer_norm_weight"),
            _LAYER + "input_layernorm.weight",
            (_LAYER + "input_layernorm.weight",),
            "replicated",
        ),
        Entry((attention + "linear_qkv.weight",), _ATTENTION + "qkv_proj.weight", _qkv("weight"), "qkv"),
        Entry(
            (attention + "linear_proj.weight",), _ATTENTION + "o_proj.weight", (_ATTENTION + "o_proj.weight",), "row"
        ),
        Entry(
            ("decoder.layers.{i}.pre_mlp_layernorm.weight", mlp + "linear_fc1.layer_norm_weight"),
            _LAYER + "post_attention_layernorm.weight",
            (_LAYER + "post_attention_layernorm.weight",),
            "replicated",
        ),
        Entry(
            (mlp + "linear_fc1.weight",),
            _LAYER + "mlp.gate_up_proj.weight",
            (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
            "glu",
        ),
        Entry((mlp + "linear_fc2.weight",), _LAYER + "mlp.down_proj.weight", (_LAYER + "mlp.down_proj.weight",), "row"),
        Entry(("decoder.final_layernorm.weight",), "model.norm.weight", ("model.norm.weight",), "replicated", "head"),
        _head(shape),
    ]
    if shape.qkv_bias:
        table.append(
            Entry((attention + "linear_qkv.bias",), _ATTENTION + "qkv_proj.bias", _qkv("bias"), "qkv", bias=True)
        )
    if shape.qk_norm:
        for part in "qk":
            name = f"{_ATTENTION}{part}_norm.weight"
            table.append(Entry((f"{attention}{part}_layernorm.weight",), name, (name,), "replicated"))
    return tuple(table)


def _head(shape: ModelShape) -> Entry:
    """Return the entry of what the last stage puts on top."""
    if shape.value_head:
        return Entry(("output_layer.weight",), VALUE_HEAD, (VALUE_HEAD,), "replicated", "head")
    hf = _EMBEDDING if shape.tied else "lm_head.weight"
    return Entry(("output_layer.weight",), "lm_head.weight", (hf,), "vocab", "head")


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the Hugging Face checkpoint, in checkpoint order."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, ffn, vocab = shape.hidden_size, shape.ffn_size, shape.vocab_size
    by_suffix = {
        "embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden),
        "q_proj.weight": (q, hidden), "k_proj.weight": (kv, hidden), "v_proj.weight": (kv, hidden),
        "q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,), "o_proj.weight": (hidden, q),
        "gate_proj.weight": (ffn, hidden), "up_proj.weight": (ffn, hidden), "down_proj.weight": (hidden, ffn),
        VALUE_HEAD: (1, hidden), "q_norm.weight": (shape.head_dim,), "k_norm.weight": (shape.head_dim,),
    }  # fmt: skip
    names = [name.format(i=i) for entry in entries(shape) for i in _layers(shape, entry) for name in entry.hf]
    return {name: next((s for suffix, s in by_suffix.items() if name.endswith(suffix)), (hidden,)) for name in names}


def _layers(shape: ModelShape, entry: Entry) -> Sequence[int]:
    return range(shape.num_layers) if entry.stage == "layer" else (0,)


def megatron_shards(shape: ModelShape, layout: Layout, rank: int) -> tuple[Shard, ...]:
    """Return the shards of one rank of the trainer, by Megatron's names with global layer indices."""
    place = layout.coordinates(rank)
    layers = split_layers(shape.num_layers, layout.pp)[place.pp]
    sizes = hf_shapes(shape)
    shards = []
    for entry in entries(shape):
        if (entry.stage == "embedding" and place.pp != 0) or (entry.stage == "head" and place.pp != layout.pp - 1):
            continue
        if shape.tied and layout.pp == 1 and entry.megatron == ("output_layer.weight",):
            continue  # the same parameter as the embedding
        for i in layers if entry.stage == "layer" else (0,):
            shards.append(
                _shard(entry.megatron[0].format(i=i), entry, i, shape, sizes, place.tp, layout.tp, "megatron")
            )
    return tuple(shards)


def vllm_shards(shape: ModelShape, tp: int, tp_rank: int) -> tuple[Shard, ...]:
    """Return the shards of one rank of a vLLM engine of ``tp`` ranks."""
    sizes = hf_shapes(shape)
    return tuple(
        _shard(entry.vllm.format(i=i), entry, i, shape, sizes, tp_rank, tp, "vllm")
        for entry in entries(shape)
        if not (shape.tied and entry.vllm == "lm_head.weight")
        for i in _layers(shape, entry)
    )


def _shard(
    name: str,
    entry: Entry,
    layer: int,
    shape: ModelShape,
    sizes: dict[str, tuple[int, ...]],
    tp_rank: int,
    tp: int,
    dialect: str,
) -> Shard:
    """Build one rank's shard of one parameter."""
    hf = [n.format(i=layer) for n in entry.hf]
    full = sizes[hf[0]]
    dim = 1 if entry.split == "row" else 0
    if entry.split == "replicated":
        segments: tuple[Segment, ...] = (Segment(hf[0], 0, full[0]),)
    elif entry.split == "vocab":
        multiple = tp if dialect == "megatron" else math.lcm(VLLM_VOCAB_MULTIPLE, tp)
        segments = _even([Segment(hf[0], 0, full[0])], -(-full[0] // multiple) * multiple, tp_rank, tp)
    elif entry.split == "row":
        segments = _even([Segment(hf[0], 0, full[1])], full[1], tp_rank, tp)
    elif entry.split == "glu":
        segments = tuple(s for n in hf for s in _even([Segment(n, 0, full[0])], full[0], tp_rank, tp))
    elif dialect == "megatron":
        blocks = _interleaved_qkv(shape, hf)
        segments = _even(blocks, sum(b.length for b in blocks), tp_rank, tp)
    else:
        segments = _stacked_qkv(shape, hf, tp_rank, tp)
    rows = sum(s.length for s in segments)
    return Shard(name, (*full[:dim], rows, *full[dim + 1 :]), dim, segments)


def _even(blocks: list[Segment], rows: int, tp_rank: int, tp: int) -> tuple[Segment, ...]:
    """Cut the tp_rank-th of ``tp`` equal windows out of a stack of ``rows`` rows."""
    return clip(blocks, rows * tp_rank // tp, rows * (tp_rank + 1) // tp)


def _interleaved_qkv(shape: ModelShape, hf: Sequence[str]) -> list[Segment]:
    """Megatron's order: for every kv head its query heads, then its key, then its value.

    With fewer kv heads than ranks Megatron still cuts this stack evenly and gathers the whole of it after the matmul.
    """
    q, k, v = hf
    per_group, dim = shape.num_heads // shape.num_kv_heads * shape.head_dim, shape.head_dim
    blocks = []
    for g in range(shape.num_kv_heads):
        blocks.append(Segment(q, g * per_group, (g + 1) * per_group))
        blocks += [Segment(k, g * dim, (g + 1) * dim), Segment(v, g * dim, (g + 1) * dim)]
    return blocks


def _stacked_qkv(shape: ModelShape, hf: Sequence[str], tp_rank: int, tp: int) -> tuple[Segment, ...]:
    """vLLM's order: this rank's query heads, its keys, its values; kv heads are replicated where there are too few."""
    q, k, v = hf
    rows, dim = shape.num_heads * shape.head_dim, shape.head_dim
    heads = max(1, shape.num_kv_heads // tp)
    first = tp_rank * shape.num_kv_heads // tp
    kv = (first * dim, (first + heads) * dim)
    return (Segment(q, rows * tp_rank // tp, rows * (tp_rank + 1) // tp), Segment(k, *kv), Segment(v, *kv))
