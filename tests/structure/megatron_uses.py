"""What megarl uses of megatron-core: names and keywords, found in its source, and what it reaches through objects."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

LEFT_OUT = {"megarl/parallel/cpu"}
"""Adjusts the internals of one release for CPU, and runs with no other: tests/dist/test_platform_guards.py holds it."""

_CORE = "megatron.core."
_BLOCK = _CORE + "transformer.transformer_block"
_LAYER = _CORE + "transformer.transformer_layer"
_ATTENTION = _CORE + "transformer.attention"
_CONFIG = _CORE + "transformer.transformer_config"
_MOE = _CORE + "transformer.moe."
_MODULE = _CORE + "transformer.module"
_SCHEDULES = _CORE + "pipeline_parallel.schedules"
_OPTIMIZER = _CORE + "optimizer.optimizer"
_HYBRID = _CORE + "optimizer.cpu_offloading.hybrid_optimizer"
_ROTARY = _CORE + "models.common.embeddings.rotary_pos_embedding"
_RNG = _CORE + "tensor_parallel.random"
_RUN = "forward_step_func data_iterator model num_microbatches seq_length micro_batch_size forward_only"

# What no import shows: file that relies on it, module, name, keywords it is given.
THROUGH_OBJECTS = [
    ("megarl/train/megatron/model.py", _SCHEDULES, "forward_backward_no_pipelining", _RUN),
    ("megarl/train/megatron/model.py", _SCHEDULES, "forward_backward_pipelining_without_interleaving", _RUN),
    ("megarl/train/megatron/model.py", _SCHEDULES, "forward_backward_pipelining_with_interleaving", _RUN),
    ("megarl/train/megatron/model.py", _CORE + "models.gpt", "GPTModel.forward", "packed_seq_params padding_mask"),
    ("megarl/train/megatron/rotary.py", _ROTARY, "RotaryEmbedding.get_rotary_seq_len", ""),
    ("megarl/train/megatron/rotary.py", _ROTARY, "RotaryEmbedding.inv_freq", ""),
    ("megarl/train/megatron/optimizer.py", _CONFIG, "TransformerConfig", "no_sync_func finalize_model_grads_func"),
    ("megarl/train/megatron/optimizer.py", _CORE + "distributed", "DistributedDataParallel.no_sync", ""),
    ("megarl/train/megatron/optimizer.py", _CORE + "distributed", "DistributedDataParallel.zero_grad_buffer", ""),
    ("megarl/train/megatron/optimizer.py", _OPTIMIZER, "ChainedOptimizer.chained_optimizers", ""),
    ("megarl/train/megatron/optimizer.py", _OPTIMIZER, "ChainedOptimizer.param_groups", ""),
    ("megarl/train/megatron/optimizer.py", _OPTIMIZER, "ChainedOptimizer.step", ""),
    ("megarl/train/megatron/optimizer.py", _OPTIMIZER, "ChainedOptimizer.zero_grad", ""),
    (
        "megarl/train/megatron/optimizer.py",
        _CORE + "optimizer",
        "OptimizerConfig.use_precision_aware_optimizer_no_fp8_or_ds_fp8",
        "",
    ),
    ("megarl/train/megatron/host_adam.py", _CORE + "optimizer", "HybridDeviceOptimizer", ""),
    ("megarl/train/megatron/host_adam.py", _CORE + "optimizer.distrib_optimizer", "HybridDeviceOptimizer", ""),
    *(
        ("megarl/train/megatron/host_adam.py", _HYBRID, f"HybridDeviceOptimizer.{name}", "")
        for name in (
            "_init_sub_optimizers",
            "_sync_hdo_state_to_sub_optimizers",
            "_sync_sub_optimizers_state_to_hdo",
            "cpu_optimizers",
            "fp32_param_to_orig_param",
            "gpu_optimizer",
            "inner_param_to_orig_param",
            "param_to_fp32_param",
            "param_to_inner_param",
            "step",
        )
    ),
    ("megarl/parallel/groups.py", _RNG, "CudaRNGStatesTracker.get_states", ""),
    ("megarl/parallel/groups.py", _RNG, "CudaRNGStatesTracker.set_states", "states"),
    ("megarl/train/megatron/build.py", _MODULE, "Float16Module.forward", "fp32_output"),
    ("megarl/train/megatron/build.py", _BLOCK, "TransformerBlockSubmodules", "layer_specs layer_norm"),
    (
        "megarl/train/megatron/build.py",
        _LAYER,
        "TransformerLayerSubmodules",
        "input_layernorm pre_mlp_layernorm self_attention mlp",
    ),
    ("megarl/train/megatron/build.py", _MOE + "moe_layer", "MoESubmodules", "router"),
    ("megarl/train/megatron/router.py", _MOE + "moe_layer", "MoELayer.forward", "padding_mask"),
    *(
        ("megarl/train/megatron/router.py", _MOE + "router", f"TopKRouter.{name}", "")
        for name in ("routing", "topk", "score_function", "layer_number", "tp_group", "cp_group", "tp_cp_group")
    ),
    ("megarl/train/megatron/build.py", _ATTENTION, "SelfAttentionSubmodules", "core_attention q_layernorm k_layernorm"),
    ("megarl/train/megatron/build.py", _LAYER, "TransformerLayer.layer_number", ""),
    ("megarl/train/megatron/build.py", _CORE + "models.gpt", "GPTModel.output_layer", ""),
    ("megarl/train/megatron/build.py", _CORE + "models.gpt", "GPTModel.shared_embedding_or_output_weight", ""),
    ("megarl/train/megatron/build.py", _CORE + "models.gpt", "GPTModel.rotary_pos_emb", ""),
    ("megarl/train/megatron/build.py", _CORE + "models.gpt", "GPTModel.decoder", ""),
    *(
        ("megarl/weights/name_map.py", _CORE + module, name, "")
        for module, name in (
            ("models.gpt", "GPTModel.embedding"),
            ("models.common.embeddings.language_model_embedding", "LanguageModelEmbedding.word_embeddings"),
            ("transformer.transformer_block", "TransformerBlock.layers"),
            ("transformer.transformer_block", "TransformerBlock.final_layernorm"),
            ("transformer.transformer_layer", "TransformerLayer.input_layernorm"),
            ("transformer.transformer_layer", "TransformerLayer.pre_mlp_layernorm"),
            ("transformer.transformer_layer", "TransformerLayer.self_attention"),
            ("transformer.transformer_layer", "TransformerLayer.mlp"),
            ("transformer.attention", "SelfAttention.linear_qkv"),
            ("transformer.attention", "SelfAttention.linear_proj"),
            ("transformer.attention", "SelfAttention.q_layernorm"),
            ("transformer.attention", "SelfAttention.k_layernorm"),
            ("transformer.mlp", "MLP.linear_fc1"),
            ("transformer.mlp", "MLP.linear_fc2"),
            ("transformer.moe.moe_layer", "MoELayer.router"),
            ("transformer.moe.moe_layer", "MoELayer.experts"),
            ("transformer.moe.moe_layer", "MoELayer.shared_experts"),
            ("transformer.moe.router", "TopKRouter.weight"),
            ("transformer.moe.experts", "SequentialMLP.local_experts"),
            ("transformer.moe.experts", "TEGroupedMLP.linear_fc1"),
            ("transformer.moe.experts", "TEGroupedMLP.linear_fc2"),
            ("transformer.moe.shared_experts", "SharedExpertMLP.gate_weight"),
        )
    ),
]


@dataclass(frozen=True)
class Use:
    """A use of ``name`` of ``module``, with the keywords it is called with. name: empty for the module itself."""

    where: str
    module: str
    name: str
    keywords: frozenset[str] = frozenset()


def megarl_uses() -> list[Use]:
    """Return every use of megatron in megarl."""
    found = []
    for path in sorted((REPOSITORY / "megarl").rglob("*.py")):
        file = path.relative_to(REPOSITORY).as_posix()
        if not any(file.startswith(folder) for folder in LEFT_OUT):
            found += uses(path.read_text(encoding="utf-8"), file)
    return [
        *found,
        *(Use(file, module, name, frozenset(words.split())) for file, module, name, words in THROUGH_OBJECTS),
    ]


def uses(source: str, file: str) -> list[Use]:
    """Return the uses that a source shows: imports, attributes of imported modules, and calls of all these."""
    tree = ast.parse(source)
    imported = _imported(tree)
    subclasses = _subclasses(tree, imported)
    found = [Use(f"{file}", module, name) for module, name in imported.values()]
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="apply"):  # which torch gives to every autograd function
                continue
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if owner in imported and attribute[0] != "_":
                found.append(Use(f"{file}:{node.lineno}", *_below(imported[owner], attribute)))
            case ast.Call(func=function):
                where = f"{file}:{node.lineno}"
                keywords = frozenset(_keywords(node, tree))
                match function:
                    case ast.Name(id=called) if called in imported:
                        found.append(Use(where, *imported[called], keywords))
                    case ast.Name(id=called) if called in subclasses:
                        base, own = subclasses[called]
                        found.append(Use(where, *base, keywords - own))
                    case ast.Attribute(value=ast.Name(id=owner), attr=str(attribute)) if (
                        owner in imported and attribute != "apply"
                    ):
                        found.append(Use(where, *_below(imported[owner], attribute), keywords))
    return found


def _below(owner: tuple[str, str], attribute: str) -> tuple[str, str]:
    """Return the attribute of a module or of a name. A capital says which: megatron's modules have none."""
    module, name = owner
    return (module, f"{name}.{attribute}") if name[:1].isupper() else (f"{module}.{name}".rstrip("."), attribute)


def _imported(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Return local name -> (module, name), wherever the import stands."""
    found = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found |= {a.asname: (a.name, "") for a in names if a.asname and a.name.startswith("megatron.")}
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("megatron."):
                found |= {a.asname or a.name: (module, a.name) for a in names}
    return found


def _subclasses(
    tree: ast.Module, imported: dict[str, tuple[str, str]]
) -> dict[str, tuple[tuple[str, str], frozenset[str]]]:
    """Return the dataclasses here that extend an imported one: name -> (that one, own fields)."""
    found = {}
    for node in tree.body:
        match node:
            case ast.ClassDef(bases=[ast.Name(id=base)], decorator_list=[_, *_]) if base in imported:
                fields = [
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                ]
                found[node.name] = (imported[base], frozenset(fields))
    return found


def _keywords(call: ast.Call, tree: ast.Module) -> Iterator[str]:
    """Yield the keywords of a call, those too of the dictionaries that functions here return into its ``**``."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for keyword in call.keywords:
        if keyword.arg is not None:
            yield keyword.arg
            continue
        for node in ast.walk(keyword.value):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                yield from _returned_keys(functions[node.func.id])


def _returned_keys(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            yield from (str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
