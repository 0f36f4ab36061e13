"""Tiny random Hugging Face models of every family, made so that nothing can be misplaced without being noticed.

The vocabulary divides by no tensor-parallel size, norms and biases are random, and logits are far from uniform.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 99
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
# So short a context is scaled that the rotations of a test's few tokens fall into all three of Llama 3's cases.
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": ROPE}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),  # heads wider together than the hidden size
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # The layers differ: dense ones first, then experts beside one that every token takes.
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}),
}
# Outside of the name map. Heads are of the smallest size that vLLM's attention takes on CPU; windows are shorter than
# the rows of a test. Bloom attends in a way of its own.
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}),
    "phi3": ("Phi3Config", {"hidden_size": 128, **TOKENS}),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": 4, "hidden_size": 64}),
    "gpt2": ("GPT2Config", {"hidden_size": 128, **TOKENS}),
    "bloom": ("BloomConfig", {"hidden_size": 128, **TOKENS}),
}
FIVE_LAYERS = "qwen3-five_layers"
MODELS = tuple(f"{family}-{tied}" for family in FAMILIES for tied in ("untied", "tied"))
MOE_MODELS = ("qwen3_moe-untied", "mixtral-untied", "qwen2_moe-tied")


def save_tiny_model(name: str, folder: Path, **sizes: int) -> None:
    """Write the model ``name`` in float32 to ``folder``: of MODELS, MOE_MODELS or FIVE_LAYERS, or of OTHER_FAMILIES.

    sizes: over ours.
    """
    _save("AutoModelForCausalLM", name, folder, sizes)


def save_tiny_classifier(name: str, folder: Path, **sizes: int) -> None:
    """Write a sequence classification model of one label, a reward model, in the same way."""
    _save("AutoModelForSequenceClassification", name, folder, sizes | {"num_labels": 1})


def _save(auto: str, name: str, folder: Path, sizes: dict[str, int]) -> None:
    import transformers  # here, since ranks shouldn't wait for it

    family, kind = name.split("-")
    config_type, fields = (FAMILIES | MOE_FAMILIES | OTHER_FAMILIES)[family]
    layers = {"num_hidden_layers": 5 if name == FIVE_LAYERS else 2}
    config = getattr(transformers, config_type)(**SIZES | fields | layers | sizes, tie_word_embeddings=kind == "tied")
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # Hugging Face starts norms at one and biases at zero
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    model.save_pretrained(folder)
