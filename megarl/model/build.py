"""Build this rank's part of a Megatron GPTModel from a ModelShape, and name its parameters as the name map does."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.config.model_shape import ModelShape, Rope
from megarl.errors import ModelFolderError
from megarl.model.attention import CausalAttention, RMSNorm
from megarl.model.name_map import entries, megatron_shards
from megarl.model.value_head import ValueHead
from megarl.model.weights import TensorSource, fill
from megarl.parallel.groups import ParallelGroups
from megarl.parallel.layout import Layout, split_layers


def transformer_engine_present() -> bool:
    """Whether Megatron found a usable Transformer Engine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE) and torch.cuda.is_available()


def transformer_config(shape: ModelShape, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of ``shape`` on ``layout``.

    Fusions that need Apex are off. ``calculate_per_token_loss`` makes Megatron sum gradients over micro-batches and
    data-parallel ranks; our losses are already normalised by the whole mini-batch. Megatron's own initialisation stays
    on though the weights are overwritten: it is what marks parameters as tensor-parallel, and the gradient norm
    leaves out the unmarked ones of tp ranks other than 0.
    """
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_size,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_model_parallel_layout=_stage_layout(shape.num_layers, layout.pp),
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # megatron demands it for variable lengths, dense models included
        calculate_per_token_loss=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        cuda_graph_scope=[],  # the whole layer; the default says the same in a deprecated word, and warns
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _stage_layout(num_layers: int, pp: int) -> list[list[str]] | None:
    """Return Megatron's custom pipeline layout where the layers don't divide evenly."""
    if num_layers % pp == 0:
        return None
    stages = [["decoder"] * len(layers) for layers in split_layers(num_layers, pp)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _block_spec(config: TransformerConfig) -> Any:
    """Return the layer spec: Transformer Engine's where importable, else the local one with our norm and attention."""
    if transformer_engine_present():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def build_model(shape: ModelShape, groups: ParallelGroups, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Build this rank's pipeline stage, weights uninitialised; ``groups`` must be active.

    The stage takes (tokens [B, S], positions, mask None, packed_seq_params) and the last one returns this rank's slice
    of the logits [B, S, V / tp], or values [B, S, 1] where the shape has a value head.
    """
    layout = groups.layout
    config = transformer_config(shape, layout, dtype)
    model = GPTModel(
        config,
        _block_spec(config),
        vocab_size=shape.padded_vocab(layout.tp),
        max_sequence_length=shape.max_positions,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=int(shape.rope.theta),
    )
    if shape.value_head and groups.is_last_stage:
        model.output_layer = ValueHead(config)
    model.rotary_pos_emb.inv_freq = inverse_frequencies(shape.rope, shape.head_dim).to(device)
    module: torch.nn.Module = model.to(device)
    return Float16Module(config, module) if dtype == torch.bfloat16 else module


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Return the rotary frequencies [D / 2]: 1 / theta^(2 i / D), scaled as the model's config asks.

    Computed here because megatron fixes Llama 3's scaling constants. ``llama3``: wavelengths over
    original / low_freq_factor are divided by ``factor``, those under original / high_freq_factor stay, and between them
    the two are mixed (Llama 3.1 model card; transformers' modeling_rope_utils).
    """
    freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "default":
        return freq
    if rope.kind == "linear":
        return freq / rope.factor
    turns = rope.original_max_positions * freq / (2 * math.pi)  # rotations over the original context
    share = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - share) * freq / rope.factor + share * freq


def unwrap(model: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside DDP and Float16Module."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


def named_parameters(model: torch.nn.Module, shape: ModelShape, layout: Layout, rank: int) -> dict[str, Tensor]:
    """Return this rank's parameters by the name map's names (global layer indices), shapes checked.

    Raises ModelFolderError where the built model and the name map disagree: no parameter is left without an entry.
    """
    inner = unwrap(model)
    aliases = {alias: entry.megatron[0] for entry in entries(shape) for alias in entry.megatron}
    found = {_canonical(n, inner, aliases): p.data for n, p in inner.named_parameters()}
    expected = {s.name: s.shape for s in megatron_shards(shape, layout, rank)}
    if {n: tuple(p.shape) for n, p in found.items()} != expected:
        odd = sorted({(n, tuple(p.shape)) for n, p in found.items()} ^ set(expected.items()))
        raise ModelFolderError(f"the Megatron model and the name map disagree on rank {rank}: {odd[:4]}")
    return found


def _canonical(name: str, model: GPTModel, aliases: dict[str, str]) -> str:
    """Return the map's name of a local parameter: global layer index, unfused norm."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return aliases.get(name, name)
    layer = model.decoder.layers[int(parts[2])].layer_number - 1
    pattern = ".".join([*parts[:2], "{i}", *parts[3:]])
    return aliases.get(pattern, pattern).format(i=layer)


def load_weights(model: torch.nn.Module, shape: ModelShape, layout: Layout, rank: int, source: TensorSource) -> None:
    """Fill this rank's parameters from ``source``, reading only the ranges it holds."""
    fill(named_parameters(model, shape, layout, rank), megatron_shards(shape, layout, rank), source)
