"""The fields of the installed megatron-core's TransformerConfig, read from its source: a laptop need not import it."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Base class first, as a dataclass collects its fields.
_CLASSES = (
    ("core/model_parallel_config.py", "ModelParallelConfig"),
    ("core/transformer/transformer_config.py", "TransformerConfig"),
)

# Sizes and mathematics of the model: its config.json says them, and its weights fit nothing else.
_OF_THE_MODEL = """
num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size num_moe_experts
moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate moe_layer_freq moe_router_topk
moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups
moe_router_group_topk moe_router_enable_expert_bias moe_latent_size mtp_num_layers gated_linear_unit
activation_func activation_func_clamp_value glu_linear_offset normalization layernorm_epsilon
layernorm_zero_centered_gamma add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm attention_output_gate
multi_latent_attention experimental_attention_variant linear_attention_freq softmax_scale softmax_type
apply_query_key_layer_scaling apply_residual_connection_post_layernorm window_size window_attn_skip_freq
rotary_interleaved no_rope_freq mrope_section is_hybrid_model heterogeneous_block_specs
"""
# What megarl's own passes, losses and pipeline rely on.
_OF_MEGARL = """
params_dtype pipeline_dtype autocast_dtype enable_autocast fp16 bf16 calculate_per_token_loss
variable_seq_lengths hidden_dropout attention_dropout pipeline_model_parallel_layout
num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage account_for_embedding_in_pipeline_split
account_for_loss_in_pipeline_split perform_initialization use_cpu_initialization init_model_with_meta_device
init_method output_layer_init_method embedding_init_method cuda_graph_scope moe_grouped_gemm
bias_activation_fusion masked_softmax_fusion persist_layer_norm timers finalize_model_grads_func grad_scale_func
no_sync_func grad_sync_func param_sync_func test_mode overlap_p2p_comm batch_p2p_comm
microbatch_group_size_per_vp_stage
"""
_BY_A_KEY = {
    "tensor_model_parallel_size": "tensor_model_parallel_size",
    "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
    "context_parallel_size": "context_parallel_size",
    "hierarchical_context_parallel_sizes": "context_parallel_size",
    "expert_model_parallel_size": "expert_model_parallel_size",
    "expert_tensor_parallel_size": "expert_tensor_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "recompute_granularity": "recompute.granularity",
    "recompute_method": "recompute.method",
    "recompute_num_layers": "recompute.num_layers",
    "recompute_modules": "recompute.granularity",
    "moe_token_dispatcher_type": "override_transformer_config.moe_enable_deepep",
    "moe_flex_dispatcher_backend": "override_transformer_config.moe_enable_deepep",
}

# Fields that megarl decides, each with the key of a ``megatron`` section that says it, or "" where there is none.
OURS: dict[str, str] = {**dict.fromkeys((_OF_THE_MODEL + _OF_MEGARL).split(), ""), **_BY_A_KEY}


@cache
def transformer_fields() -> dict[str, str] | None:
    """Return name -> annotation (``X | None`` for optional ones) of every field, None without megatron-core.

    Raises: RuntimeError where the installed release has no such class: it isn't one that megarl knows.
    """
    folder = megatron_folder()
    if folder is None:
        return None
    fields: dict[str, str] = {}
    for file, name in _CLASSES:
        fields |= class_fields((folder / file).read_text(encoding="utf-8"), name)
    return fields


def megatron_folder() -> Path | None:
    """Return the folder of the package ``megatron`` that has ``core``, None where there is none."""
    spec = find_spec("megatron")
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    return next((place for place in places if all((place / file).is_file() for file, _ in _CLASSES)), None)


def class_fields(source: str, name: str) -> dict[str, str]:
    """Return name -> annotation of the fields of dataclass ``name``. Raises RuntimeError where there is none."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return {
                line.target.id: _plain(line.annotation)
                for line in statement.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_field(line)
            }
    raise RuntimeError(f"the installed megatron-core has no class {name}; megarl is made for 0.16")


def _is_field(line: ast.AnnAssign) -> bool:
    """Whether a caller can set it: public, no class variable."""
    assert isinstance(line.target, ast.Name)
    return not line.target.id.startswith("_") and "ClassVar" not in ast.unparse(line.annotation)


def _plain(annotation: ast.expr) -> str:
    """Return an annotation with ``|`` for Optional and Union."""
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inner = annotation.slice
        if annotation.value.id == "Optional":
            return f"{_plain(inner)} | None"
        if annotation.value.id == "Union" and isinstance(inner, ast.Tuple):
            return " | ".join(_plain(item) for item in inner.elts)
    return ast.unparse(annotation)
