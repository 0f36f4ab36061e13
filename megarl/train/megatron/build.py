"""Build this rank's part of a Megatron GPTModel from a ModelShape, and name its parameters as the name map does."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.config.router_losses import ROUTER_LOSS_FIELDS, RouterLosses, router_losses
from megarl.config.schema import RecomputeConfig
from megarl.errors import ModelFolderError
from megarl.parallel.groups import ParallelGroups
from megarl.parallel.layout import Layout, split_layers
from megarl.train.megatron.attention import CausalAttention, RMSNorm
from megarl.train.megatron.language_head import LanguageHead
from megarl.train.megatron.rotary import PackedRotary, inverse_frequencies
from megarl.train.megatron.router import Router, tell_routers
from megarl.train.megatron.value_head import ValueHead
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import entries, local_experts, megatron_shards
from megarl.weights.sources import TensorSource, fill

# The index of an expert among those of its rank: Transformer Engine has them as one module with many weights.
_EXPERT = re.compile(r"\.experts\.(local_experts\.(?=\d)|linear_fc[12]\.weight(?=\d))(?P<index>\d+)")


def transformer_engine_present() -> bool:
    """Whether Megatron found a usable Transformer Engine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE) and torch.cuda.is_available()


def attends_itself(dtype: torch.dtype) -> bool:
    """Whether CausalAttention attends, in a model of ``dtype``: also where Transformer Engine has no packed kernel.

    cuDNN has one from compute capability 9 on, flash-attn on older devices too, and both in half precision alone.
    Without a word, Transformer Engine would then pad the sequences and keep all scores of all pairs of tokens.
    """
    if not transformer_engine_present():
        return True
    has_kernel = torch.cuda.get_device_capability() >= (9, 0) or find_spec("flash_attn") is not None
    return dtype == torch.float32 or not has_kernel


def transformer_config(
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    *,
    recompute: RecomputeConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Return Megatron's configuration of ``shape`` on ``layout``. ``overrides`` are fields that nothing here decides.

    Fusions that need Apex are off. ``calculate_per_token_loss`` makes Megatron sum gradients over micro-batches and
    data-parallel ranks; our losses are already normalised by the whole mini-batch. Megatron's own initialisation stays
    on though the weights are overwritten: it is what marks parameters as tensor-parallel, and the gradient norm
    leaves out the unmarked ones of tp ranks other than 0.

    The router's losses among ``overrides`` aren't told: Megatron's own depend on the layout.

    Chunks that take turns on two stages exchange activations and gradients with the same peer in both directions at
    once. Megatron's default way pairs them wrongly without a word: logits are right and gradients are garbage. So the
    interleaved schedule sends forwards and backwards apart, which Megatron calls overlap.
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
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_model_parallel_layout=_stage_layout(shape.num_layers, layout.pp * layout.vpp),
        microbatch_group_size_per_vp_stage=layout.pp,
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=True,
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
        bias_activation_fusion=torch.cuda.is_available(),  # compiled, it keeps a third of SwiGLU's activations fewer
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **_recompute_fields(recompute),
        # A run may choose how its router computes, and what is fused.
        **(
            {
                "apply_rope_fusion": transformer_engine_present(),
                "gradient_accumulation_fusion": False,
                "moe_token_dispatcher_type": "alltoall",  # megatron's default goes with no variable lengths
            }
            | _expert_fields(shape, layout)
            | _free_fields(shape, overrides or {})
        ),
    )


def _expert_fields(shape: ModelShape, layout: Layout) -> dict[str, Any]:
    """Return the fields of TransformerConfig about experts, none in a dense model.

    Megatron weights the chosen experts either by the softmax over all of them, or by that over the chosen ones, which
    is the same as dividing the former by their sum. The router computes in float32: rounded logits tie often, and
    which expert a tie takes would depend on the layout.
    """
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_layer_freq": [int(shape.has_experts(i)) for i in range(shape.num_layers)],
        "moe_ffn_hidden_size": shape.expert_ffn_size,
        "moe_shared_expert_intermediate_size": shape.shared_expert_ffn_size or None,
        "moe_shared_expert_gate": shape.gated_shared_expert,
        "moe_router_topk": shape.experts_per_token,
        "moe_router_score_function": shape.router_score,
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": transformer_engine_present(),
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def _free_fields(shape: ModelShape, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a run sets itself: losses are added by our router, and a dense model has no experts.

    DeepEP is one of the ways of megatron's flex dispatcher.
    """
    free = {name: value for name, value in overrides.items() if name not in ROUTER_LOSS_FIELDS}
    if free.pop("moe_enable_deepep", False):
        free |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    return free if shape.num_experts else {name: v for name, v in free.items() if not name.startswith("moe_")}


def _recompute_fields(recompute: RecomputeConfig | None) -> dict[str, Any]:
    if recompute is None or recompute.granularity is None:
        return {}
    is_full = recompute.granularity == "full"
    return {
        "recompute_granularity": recompute.granularity,
        "recompute_method": recompute.method if is_full else None,
        "recompute_num_layers": recompute.num_layers if is_full else None,
        "recompute_modules": ["core_attn"],  # read where granularity is selective
    }


def _stage_layout(num_layers: int, num_stages: int) -> list[list[str]] | None:
    """Return Megatron's custom layout of virtual stages where the layers don't divide evenly."""
    if num_layers % num_stages == 0:
        return None
    stages = [["decoder"] * len(layers) for layers in split_layers(num_layers, num_stages)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _block_spec(config: TransformerConfig, vp_stage: int | None, losses: RouterLosses) -> TransformerBlockSubmodules:
    """Return a chunk's layers, with our router.

    megatron-core 0.19 describes a layer of experts by a partial where 0.16 has a ModuleSpec.
    """
    block = _layers_spec(config, vp_stage)
    for layer in block.layer_specs:
        mlp = layer.submodules.mlp
        experts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
        if isinstance(experts, MoESubmodules):
            experts.router = partial(Router, losses)
    return block


def _layers_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return Transformer Engine's layers where importable, else local ones with our norm; attention where it's ours."""
    has_te = transformer_engine_present()
    block = get_gpt_decoder_block_spec(config, has_te, None if has_te else "RMSNorm", vp_stage=vp_stage)
    if not has_te:
        block.layer_norm = RMSNorm
    for layer in block.layer_specs:  # often the same object several times
        attention = layer.submodules.self_attention.submodules
        if attends_itself(config.params_dtype):
            attention.core_attention = CausalAttention
        if has_te:
            continue
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block


class _HalfPrecision(Float16Module):
    """Megatron's wrapper without its copy of all logits in float32: what reads them casts a chunk at a time."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the stage's output in the model's dtype."""
        return super().forward(*inputs, fp32_output=False, **kwargs)


def build_model(
    shape: ModelShape,
    groups: ParallelGroups,
    dtype: torch.dtype,
    device: torch.device,
    *,
    recompute: RecomputeConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    fused_head: bool = False,
) -> list[torch.nn.Module]:
    """Build the model chunks of this rank's pipeline stage, weights uninitialised; ``groups`` must be active.

    A chunk takes (tokens [B, S / cp], positions, mask None, packed_seq_params), and of a model with experts what
    the keyword of ``sequences_for_routers``. The last one of the last stage returns this rank's slice of the logits
    [B, S / cp, V / tp], or values [B, S / cp, 1] where the shape has a value head. fused_head: hidden states
    [B, S / cp, H] in place of logits, which are these times ``output_weight``.
    """
    config = transformer_config(shape, groups.layout, dtype, recompute=recompute, overrides=overrides)
    losses = router_losses(overrides or {})
    chunks = [_build_chunk(shape, groups, config, losses, device, chunk) for chunk in range(groups.layout.vpp)]
    if fused_head and groups.is_last_stage and not shape.value_head:
        last = unwrap(chunks[-1])
        last.output_layer = LanguageHead(config, last.output_layer.weight)
    return chunks


def _build_chunk(
    shape: ModelShape,
    groups: ParallelGroups,
    config: TransformerConfig,
    losses: RouterLosses,
    device: torch.device,
    chunk: int,
) -> torch.nn.Module:
    layout = groups.layout
    vp_stage = chunk if layout.vpp > 1 else None
    is_last = groups.is_last_stage and chunk == layout.vpp - 1
    with warnings.catch_warnings():
        # Said of every expert that isn't split, though nothing follows from it.
        warnings.filterwarnings("ignore", "`sequence_parallel` is set to `True`, but tensor model parallel size is 1")
        model = GPTModel(
            config,
            _block_spec(config, vp_stage, losses),
            vocab_size=shape.padded_vocab(layout.tp),
            max_sequence_length=shape.max_positions,
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=is_last,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_base=int(shape.rope.theta),
            vp_stage=vp_stage,
        )
    if shape.value_head and is_last:
        model.output_layer = ValueHead(config)
    _mark_experts(model)
    tell_routers(model)
    model.rotary_pos_emb = PackedRotary(shape.head_dim, rotary_percent=1.0, cp_group=model.pg_collection.cp)
    model.rotary_pos_emb.inv_freq = inverse_frequencies(shape.rope, shape.head_dim).to(device)
    module: torch.nn.Module = model.to(device)
    return _HalfPrecision(config, module) if config.bf16 else module


def _mark_experts(model: GPTModel) -> None:
    """Tell Megatron whose gradients are to be summed with those of experts, and that all of them enter the norm.

    Megatron sums gradients over ranks that hold the same experts where it marks these itself, which it does only with
    expert parallelism. Without it, it would sum them over the data-parallel ranks, which are others where experts have
    a tensor-parallel size of their own: the gradients would be silently wrong.

    Of what isn't marked tensor_model_parallel, the norm of the gradient leaves out the ranks but the first of those
    that share a layer. Transformer Engine marks its experts up to release 2.12, and no longer from 2.13 on.
    """
    for name, parameter in model.named_parameters():
        if _EXPERT.search(name):
            parameter.allreduce = False
            parameter.tensor_model_parallel = True


def unwrap(model: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside DDP and Float16Module."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


def output_weight(model: torch.nn.Module) -> Tensor:
    """Return this rank's slice [V / tp, H] of the last chunk's output layer, which may be the embedding's."""
    inner = unwrap(model)
    weight: Tensor | None = inner.output_layer.weight
    return inner.shared_embedding_or_output_weight() if weight is None else weight


def named_parameters(
    chunks: Sequence[torch.nn.Module], shape: ModelShape, layout: Layout, rank: int
) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters by the name map's names (global layer indices), shapes checked.

    Raises ModelFolderError where the built model and the name map disagree: no parameter is left without an entry.
    """
    aliases = {alias: entry.megatron[0] for entry in entries(shape) for alias in entry.megatron}
    experts = local_experts(shape, layout.ep, layout.expert_coordinates(rank).ep)
    found = {
        _canonical(name, inner, aliases, experts): parameter
        for inner in map(unwrap, chunks)
        for name, parameter in inner.named_parameters()
    }
    expected = {s.name: s.shape for s in megatron_shards(shape, layout, rank)}
    if {n: tuple(p.shape) for n, p in found.items()} != expected:
        odd = sorted({(n, tuple(p.shape)) for n, p in found.items()} ^ set(expected.items()))
        raise ModelFolderError(f"the Megatron model and the name map disagree on rank {rank}: {odd[:4]}")
    return found


def _canonical(name: str, model: GPTModel, aliases: dict[str, str], experts: range) -> str:
    """Return the map's name of a local parameter: global indices of layer and expert, unfused norm."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return aliases.get(name, name)
    place = {"i": model.decoder.layers[int(parts[2])].layer_number - 1}
    parts[2] = "{i}"
    pattern = ".".join(parts)
    if found := _EXPERT.search(pattern):
        place["e"] = experts[int(found["index"])]
        pattern = pattern[: found.start("index")] + "{e}" + pattern[found.end("index") :]
    return aliases.get(pattern, pattern).format(**place)


def load_weights(
    chunks: Sequence[torch.nn.Module], shape: ModelShape, layout: Layout, rank: int, source: TensorSource
) -> None:
    """Fill this rank's parameters from ``source``, reading only the ranges it holds."""
    fill(named_parameters(chunks, shape, layout, rank), megatron_shards(shape, layout, rank), source)
