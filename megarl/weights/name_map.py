"""The one map between Hugging Face, Megatron and vLLM parameters. Load, publish and export all read it.

Each entry names a parameter in the three dialects and how it is split over tensor-parallel ranks. From it follow the
shards of any rank of the trainer and of the engine, in Hugging Face coordinates.

Experts are named by their index in the model, as layers are. vLLM keeps the experts of a layer in one parameter, of
which the map names the slices: ``w13_weight.5`` is ``w13_weight[5]`` on a rank that has all experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megarl.parallel.layout import EngineLayout, Layout, layers_of_chunks
from megarl.weights.model_shape import VALUE_HEAD, ModelShape
from megarl.weights.shard import Pattern, Peers, Shard, alike, whole
from megarl.weights.split import split_shard


@dataclass(frozen=True)
class Entry:
    """One kind of parameter. ``{i}`` stands for the layer, ``{e}`` for the expert.

    megatron: names, the first that the model has counts (Transformer Engine fuses norms into the next linear, and the
    experts of a rank into one module). sizes: of the Hugging Face tensors ``hf``.
    split: ``replicated``, ``vocab`` and ``qkv`` and ``glu`` (split rows), ``row`` (split columns).
    stage: ``embedding`` (first), ``layer`` (every one), ``dense`` and ``moe`` (layers without and with experts),
    ``head`` (last).
    """

    megatron: tuple[str, ...]
    vllm: str
    hf: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    split: str
    stage: str = "layer"

    @property
    def is_expert(self) -> bool:
        """Whether every expert of a layer has this parameter."""
        return "{e}" in self.hf[0]

    def patterns(
        self, shard: Shard, shape: ModelShape, layers: Iterable[int], experts: Iterable[int]
    ) -> Iterator[Pattern]:
        """Yield the one Pattern of those of ``layers`` and ``experts`` that have this parameter, as ``shard`` says."""
        if self.stage in ("embedding", "head"):
            yield Pattern(shard)
            return
        those = tuple(i for i in layers if self.stage == "layer" or shape.has_experts(i) == (self.stage == "moe"))
        these = tuple(experts) if self.is_expert else (0,)
        if those and these:
            yield Pattern(shard, those, these)


_LAYER = "model.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_MEGATRON = "decoder.layers.{i}."
VALUE_HEAD_BIAS = "score.bias"  # which those of tokens have and megarl's critic has not


@lru_cache(maxsize=64)
def entries(shape: ModelShape) -> tuple[Entry, ...]:
    """Return the entries of a model, in checkpoint order."""
    hidden, embedding = (shape.hidden_size,), (shape.vocab_size, shape.hidden_size)
    norm = _MEGATRON + "pre_mlp_layernorm.weight"
    return (
        Entry(("embedding.word_embeddings.weight",), EMBEDDING, (EMBEDDING,), (embedding,), "vocab", "embedding"),
        *_attention(shape),
        _norm(
            (norm, _MEGATRON + "mlp.linear_fc1.layer_norm_weight"), _LAYER + "post_attention_layernorm.weight", hidden
        ),
        *_dense(shape),
        *(_experts(shape) if shape.num_experts else ()),
        *(_shared_expert(shape) if shape.shared_expert_ffn_size else ()),
        _norm(("decoder.final_layernorm.weight",), "model.norm.weight", hidden, "head"),
        _head(shape),
    )


def _norm(megatron: tuple[str, ...], name: str, size: tuple[int, ...], stage: str = "layer") -> Entry:
    """Return the entry of what every rank holds whole, and vLLM names as Hugging Face does."""
    return Entry(megatron, name, (name,), (size,), "replicated", stage)


def _attention(shape: ModelShape) -> Iterator[Entry]:
    """Yield the entries of attention and of the norm before it."""
    q, kv, hidden = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.hidden_size
    megatron, qkv = _MEGATRON + "self_attention.", _ATTENTION + "qkv_proj."
    norms = (_MEGATRON + "input_layernorm.weight", megatron + "linear_qkv.layer_norm_weight")
    yield _norm(norms, _LAYER + "input_layernorm.weight", (hidden,))
    weights, biases = (tuple(f"{_ATTENTION}{part}_proj.{kind}" for part in "qkv") for kind in ("weight", "bias"))
    yield Entry(
        (megatron + "linear_qkv.weight",), qkv + "weight", weights, tuple((n, hidden) for n in (q, kv, kv)), "qkv"
    )
    if shape.qkv_bias:
        yield Entry((megatron + "linear_qkv.bias",), qkv + "bias", biases, tuple((n,) for n in (q, kv, kv)), "qkv")
    if shape.qk_norm:
        for part in "qk":
            name = f"{_ATTENTION}{part}_norm.weight"
            yield _norm((f"{megatron}{part}_layernorm.weight",), name, (shape.head_dim,))
    output = _ATTENTION + "o_proj.weight"
    yield Entry((megatron + "linear_proj.weight",), output, (output,), ((hidden, q),), "row")


def _feed_forward(
    megatron: tuple[str, ...], vllm: tuple[str, str], hf: Sequence[str], ffn_size: int, hidden_size: int, stage: str
) -> tuple[Entry, Entry]:
    """Return the entries of gate over up, and of down. megatron: with ``{n}`` for 1 and 2. hf: gate, up, down."""
    first, second = (tuple(name.replace("{n}", n) for name in megatron) for n in "12")
    gate, up, down = hf
    rows = (ffn_size, hidden_size)
    return (
        Entry(first, vllm[0], (gate, up), (rows, rows), "glu", stage),
        Entry(second, vllm[1], (down,), ((hidden_size, ffn_size),), "row", stage),
    )


def _dense(shape: ModelShape) -> tuple[Entry, Entry]:
    mlp = _LAYER + "mlp."
    hf = [f"{mlp}{part}_proj.weight" for part in ("gate", "up", "down")]
    vllm = (mlp + "gate_up_proj.weight", hf[2])
    return _feed_forward((_MEGATRON + "mlp.linear_fc{n}.weight",), vllm, hf, shape.ffn_size, shape.hidden_size, "dense")


def _experts(shape: ModelShape) -> Iterator[Entry]:
    """Yield the entries of the router and of each expert."""
    is_mixtral = shape.family == "MixtralForCausalLM"
    block = _LAYER + ("block_sparse_moe." if is_mixtral else "mlp.")
    parts = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    router = block + "gate.weight"
    size = (shape.num_experts, shape.hidden_size)
    yield Entry((_MEGATRON + "mlp.router.weight",), router, (router,), (size,), "replicated", "moe")
    megatron, vllm = _MEGATRON + "mlp.experts.", block + "experts.routed_experts."
    yield from _feed_forward(
        (megatron + "local_experts.{e}.linear_fc{n}.weight", megatron + "linear_fc{n}.weight{e}"),
        (vllm + "w13_weight.{e}", vllm + "w2_weight.{e}"),
        [f"{block}experts.{{e}}.{part}.weight" for part in parts],
        shape.expert_ffn_size,
        shape.hidden_size,
        "moe",
    )


def _shared_expert(shape: ModelShape) -> Iterator[Entry]:
    """Yield the entries of the expert that every token takes."""
    megatron, name = _MEGATRON + "mlp.shared_experts.", _LAYER + "mlp.shared_expert"
    hf = [f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")]
    ffn, hidden = shape.shared_expert_ffn_size, shape.hidden_size
    yield from _feed_forward(
        (megatron + "linear_fc{n}.weight",), (name + ".gate_up_proj.weight", hf[2]), hf, ffn, hidden, "moe"
    )
    if shape.gated_shared_expert:
        yield _norm((megatron + "gate_weight",), name + "_gate.weight", (1, hidden), "moe")


def _head(shape: ModelShape) -> Entry:
    """Return the entry of what the last stage puts on top."""
    megatron, hidden = ("output_layer.weight",), shape.hidden_size
    if shape.value_head:
        return _norm(megatron, VALUE_HEAD, (1, hidden), "head")
    hf = EMBEDDING if shape.tied else OUTPUT
    return Entry(megatron, OUTPUT, (hf,), ((shape.vocab_size, hidden),), "vocab", "head")


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the Hugging Face checkpoint, in checkpoint order."""
    if not shape.is_mapped:
        return dict(shape.tensors)
    layers, experts = range(shape.num_layers), range(shape.num_experts)
    return {
        name.format(i=i, e=e): size
        for entry in entries(shape)
        for pattern in entry.patterns(whole(entry.hf[0], entry.sizes[0]), shape, layers, experts)
        for i in pattern.layers
        for e in pattern.experts
        for name, size in zip(entry.hf, entry.sizes, strict=True)
    }


def hf_zeros(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that transformers' model has and megarl's has not: it stays zero."""
    return {VALUE_HEAD_BIAS: (1,)} if shape.value_head else {}


def megatron_shards(shape: ModelShape, layout: Layout, rank: int) -> tuple[Shard, ...]:
    """Return the shards of one rank of the trainer as a tuple of Shard, by Megatron's names.

    Layers and experts have their index in the model.
    """
    place, expert = layout.coordinates(rank), layout.expert_coordinates(rank)
    return _megatron_shards(shape, layout, place.pp, place.tp, expert.etp, expert.ep)


@lru_cache(maxsize=256)
def _megatron_shards(
    shape: ModelShape, layout: Layout, stage: int, tp_rank: int, etp_rank: int, ep_rank: int
) -> tuple[Shard, ...]:
    """Return the shards that data-parallel ranks share."""
    patterns = _megatron_patterns(shape, layout, stage, tp_rank, etp_rank, ep_rank)
    return tuple(shard for _, pattern in patterns for shard in pattern.shards())


def megatron_peers(shape: ModelShape, layout: Layout) -> tuple[Peers, ...]:
    """Return the Peers of a trainer, as a tuple: those that share experts, and those that share everything else."""
    ranks: dict[tuple[bool, int, int, int], list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        place, expert = layout.coordinates(rank), layout.expert_coordinates(rank)
        ranks[False, place.pp, place.tp, 0].append(rank)
        ranks[True, expert.pp, expert.etp, expert.ep].append(rank)
    peers = []
    for (of_experts, stage, at, ep_rank), members in ranks.items():
        patterns = _megatron_patterns(shape, layout, stage, at, at, ep_rank)
        held = tuple(pattern for entry, pattern in patterns if entry.is_expert == of_experts)
        peers += [Peers(tuple(members), held)] if held else []
    return tuple(peers)


def _megatron_patterns(
    shape: ModelShape, layout: Layout, stage: int, tp_rank: int, etp_rank: int, ep_rank: int
) -> Iterator[tuple[Entry, Pattern]]:
    """Yield each entry with the Pattern of the ranks at a place."""
    layers = [layer for chunk in layers_of_chunks(shape.num_layers, layout, stage) for layer in chunk]
    experts = local_experts(shape, layout.ep, ep_rank)
    for entry in entries(shape):
        if (entry.stage == "embedding" and stage != 0) or (entry.stage == "head" and stage != layout.pp - 1):
            continue
        if shape.tied and layout.pp == 1 and entry.megatron == ("output_layer.weight",):
            continue  # the same parameter as the embedding
        at, parts = (etp_rank, layout.expert_tp) if entry.is_expert else (tp_rank, layout.tp)
        shard = split_shard(entry.megatron[0], entry.hf, entry.sizes[0], entry.split, shape, at, parts, "megatron")
        yield from ((entry, pattern) for pattern in entry.patterns(shard, shape, layers, experts))


def local_experts(shape: ModelShape, ep: int, ep_rank: int) -> range:
    """Return the experts that the ``ep_rank``-th of ``ep`` expert-parallel ranks holds."""
    count = shape.num_experts // ep
    return range(count * ep_rank, count * (ep_rank + 1))


@lru_cache(maxsize=64)
def vllm_shards(shape: ModelShape, engine: EngineLayout, tp_rank: int) -> tuple[Shard, ...]:
    """Return the shards of one rank of a vLLM engine as a tuple of Shard: of each expert that it has its part."""
    return tuple(shard for pattern in vllm_patterns(shape, engine, tp_rank) for shard in pattern.shards())


def vllm_peers(shape: ModelShape, engine: EngineLayout, ranks: Sequence[int]) -> tuple[Peers, ...]:
    """Return the Peers of vLLM engines, as a tuple. Each engine is as many of ``ranks`` in a row as it has.

    Of a family outside of the map every rank is given whole tensors, of which the engine takes its part.
    """
    if not shape.is_mapped:
        return (Peers(tuple(ranks), alike(whole(*tensor) for tensor in shape.tensors)),)
    return tuple(Peers(tuple(ranks[at :: engine.tp]), vllm_patterns(shape, engine, at)) for at in range(engine.tp))


def vllm_patterns(shape: ModelShape, engine: EngineLayout, tp_rank: int) -> tuple[Pattern, ...]:
    """Return the patterns that ``vllm_shards`` are instances of, as a tuple of Pattern."""
    layers, experts = range(shape.num_layers), engine_experts(shape, engine, tp_rank)
    patterns: list[Pattern] = []
    for entry in entries(shape):
        if shape.tied and entry.vllm == OUTPUT:
            continue
        at, parts = (tp_rank % engine.expert_tp, engine.expert_tp) if entry.is_expert else (tp_rank, engine.tp)
        shard = split_shard(entry.vllm, entry.hf, entry.sizes[0], entry.split, shape, at, parts, "vllm")
        patterns += entry.patterns(shard, shape, layers, experts)
    return tuple(patterns)


def engine_experts(shape: ModelShape, engine: EngineLayout, tp_rank: int) -> range:
    """Return the experts of which a rank of a vLLM engine has a part, or the whole."""
    return local_experts(shape, engine.ep, tp_rank // engine.expert_tp)
