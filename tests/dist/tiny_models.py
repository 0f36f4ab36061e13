"""Tiny random Hugging Face models of every family, made so that nothing can be misplaced without being noticed.

The vocabulary divides by no tensor-parallel size, norms and biases are random, and logits are far from uniform.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

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
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"rope_parameters": ROPE}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),  # heads wider together than the hidden size
}
FIVE_LAYERS = "qwen3-five_layers"
MODELS = tuple(f"{family}-{tied}" for family in FAMILIES for tied in ("untied", "tied"))


def save_tiny_model(name: str, folder: Path) -> None:
    """Write the model ``name``, of MODELS or FIVE_LAYERS, in float32 to ``folder``."""
    family, kind = name.split("-")
    config_type, fields = FAMILIES[family]
    config = config_type(
        **SIZES, **fields, num_hidden_layers=5 if name == FIVE_LAYERS else 2, tie_word_embeddings=kind == "tied"
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # Hugging Face starts norms at one and biases at zero
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    model.save_pretrained(folder)
